"""The walk through a tree, against a slow one that follows one child at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specjax import trees, types, verification
from specjax.verification import kernel

_BATCH = 3
_resolve = jax.jit(verification.resolve)


def slow_walk(topology, flags, present):
    """Path and last node of one row."""
    path, node = [], 0
    while True:
        children = [n for n in range(1, len(topology) + 1) if topology[n - 1] == node]
        chosen = [n for n in children if present[n - 1] and flags[n - 1]]
        if not chosen:
            return path, node
        node = chosen[0]
        path.append(node)


def check(draft, topologies, flags):
    # Every static tree is a program of its own, not worth compiling for one walk.
    walk = verification.resolve if draft.tree.traced_parents is None else _resolve
    path, count, stop = map(np.asarray, walk(draft, jnp.asarray(flags)))
    assert path.shape == (len(topologies), draft.tree.max_depth)
    assert path.dtype == count.dtype == stop.dtype == np.int32
    for row, topology in enumerate(topologies):
        expected, last = slow_walk(topology, flags[row], np.asarray(draft.present)[row])
        assert count[row] == len(expected)
        assert list(path[row, : count[row]]) == expected
        assert stop[row] == last


def topology_of(size):
    return st.tuples(*(st.integers(0, node - 1) for node in range(1, size + 1)))


@st.composite
def cases(draw, trees_per_case, sizes):
    """Topologies, flags and presence of a batch; most flags are set, or walks would be short."""
    size = draw(sizes)
    topologies = [draw(topology_of(size)) for _ in range(trees_per_case)]
    bits = st.integers(0, 2**32 - 1)
    random = np.random.default_rng(draw(bits))
    flags = random.random((_BATCH, size)) < draw(st.sampled_from([0.5, 0.9]))
    present = random.random((_BATCH, size)) < draw(st.sampled_from([0.6, 1.0]))
    return topologies, flags, present


def bare_draft(tree, present):
    """A draft as a drafter might build it by hand: descendants of absent nodes may be present."""
    shape = present.shape
    laws = jnp.zeros((shape[0], 0, 2), jnp.float32)
    tokens = jnp.zeros(shape, jnp.int32)
    return types.Draft(tokens, jnp.asarray(present), tree, laws, jnp.full(shape, -1, jnp.int32))


@given(cases(1, st.integers(1, 8)))
def test_static_trees(case):
    (topology,), flags, present = case
    draft = bare_draft(trees.from_parents(topology), present)
    check(draft, [topology] * _BATCH, flags)


@settings(max_examples=100)
@given(cases(_BATCH, st.sampled_from([1, 3, 8])))
def test_dynamic_trees_whose_rows_differ(case):
    """Rows are shallower than the bound on their depth, each by its own amount."""
    topologies, flags, present = case
    tree = trees.dynamic(jnp.asarray(topologies, jnp.int32), len(topologies[0]))
    check(bare_draft(tree, present), topologies, flags)


@settings(max_examples=10)
@given(cases(_BATCH, st.just(6)))
def test_dynamic_trees_under_a_tight_bound(case):
    topologies, flags, present = case
    depth = max(trees.from_parents(topology).max_depth for topology in topologies)
    tree = trees.dynamic(jnp.asarray(topologies, jnp.int32), depth)
    check(bare_draft(tree, present), topologies, flags)


@given(cases(1, st.integers(1, 8)))
def test_descendants_of_absent_nodes_are_absent(case):
    (topology,), flags, present = case
    tree = trees.from_parents(topology)
    tokens = jnp.zeros(present.shape, jnp.int32)
    draft = types.draft(tokens, tree, present=jnp.asarray(present), vocab_size=2)
    for row in range(_BATCH):
        for node in range(1, len(topology) + 1):
            above, alive = node, True
            while above:
                alive, above = alive and present[row, above - 1], topology[above - 1]
            assert draft.present[row, node - 1] == alive
    # Whether or not they are cleared, the walk is the same: it never comes past an absent node.
    whole = verification.resolve(bare_draft(tree, present), jnp.asarray(flags))
    for one, other in zip(whole, verification.resolve(draft, jnp.asarray(flags)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_first_of_two_equal_siblings_is_taken():
    tree = trees.from_parents((0, 0, 1, 2))
    draft = types.draft(jnp.asarray([[1, 1, 0, 2]], jnp.int32), tree, vocab_size=3)
    draws = jnp.asarray([[1, 2, 2, 0, 0]], jnp.int32)
    flags = kernel.matches(draft, draws)
    np.testing.assert_array_equal(flags, [[True, True, False, True]])
    path, count, stop = verification.resolve(draft, flags)
    # The second sibling's child matches too, but nobody comes there.
    assert (path[0, 0], count[0], stop[0]) == (1, 1, 1)


def test_nothing_flagged_stops_at_the_root():
    draft = types.draft(jnp.zeros((2, 3), jnp.int32), trees.from_parents((0, 0, 1)), vocab_size=2)
    _, count, stop = verification.resolve(draft, jnp.zeros((2, 3), bool))
    np.testing.assert_array_equal(count, [0, 0])
    np.testing.assert_array_equal(stop, [0, 0])


def test_a_bare_root():
    draft = types.draft(jnp.zeros((2, 0), jnp.int32), trees.chain(0), vocab_size=3)
    path, count, stop = verification.resolve(draft, jnp.zeros((2, 0), bool))
    assert path.shape == (2, 0)
    np.testing.assert_array_equal(count, [0, 0])
    np.testing.assert_array_equal(stop, [0, 0])
    laws = jnp.log(jnp.asarray([[[0.0, 1.0, 0.0]], [[0.0, 0.0, 1.0]]]))
    keys = jax.random.split(jax.random.key(0), 2)
    length = jnp.asarray([3, 5], jnp.int32)
    verdict = kernel.verify(verification.match.rule, keys, length, draft, laws)
    np.testing.assert_array_equal(verdict.next_token, [1, 2])


def test_children_are_the_present_ones():
    tree = trees.from_parents((0, 0, 1, 1, 2))
    present = jnp.asarray([[True, False, True, True, True], [True, True, False, True, True]])
    draft = types.draft(jnp.zeros((2, 5), jnp.int32), tree, present=present, vocab_size=2)
    found = verification.children(draft, jnp.asarray([0, 1], jnp.int32))
    np.testing.assert_array_equal(found, [[1, 0, 0, 0, 0], [0, 0, 0, 1, 0]])


def test_shapes_that_disagree_are_named():
    keys = jax.random.split(jax.random.key(0), 2)
    length = jnp.asarray([3, 5], jnp.int32)
    draft = types.draft(jnp.zeros((2, 3), jnp.int32), trees.chain(3), vocab_size=4)
    with pytest.raises(ValueError, match=r"\(2, 3, 4\).*\(2, 3\)"):
        kernel.verify(verification.match.rule, keys, length, draft, jnp.zeros((2, 3, 4)))
    with pytest.raises(ValueError, match=r"\(1, 4, 4\).*\(2, 3\)"):
        kernel.verify(verification.match.rule, keys, length, draft, jnp.zeros((1, 4, 4)))

    laws = jnp.zeros((2, 4, 5))
    draft = types.draft(jnp.zeros((2, 3), jnp.int32), trees.chain(3), log_probs=laws)
    with pytest.raises(ValueError, match="V=5.*V=4"):
        kernel.verify(verification.token.rule, keys, length, draft, jnp.zeros((2, 4, 4)))
