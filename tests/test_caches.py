"""The key/value cache against a slow reference: lists of entries, one list a row."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st

from specjax import caches, trees

# Untyped in chex.
all_variants: Any = chex.all_variants
LAYERS, HEADS, SIZE, CAPACITY = 2, 2, 3, 24


class Reference:
    """Per row, committed entries and uncommitted ones; an entry is its number."""

    def __init__(self, rows):
        self.committed = [[] for _ in range(rows)]
        self.uncommitted = [[] for _ in range(rows)]
        self.made = 0

    def append(self, count):
        """Numbers int[B, T] of new entries."""
        new = self.made + np.arange(len(self.committed) * count).reshape(-1, count)
        self.made += new.size
        for row, entries in zip(self.uncommitted, new, strict=True):
            row.extend(entries.tolist())
        return new

    def commit(self, nodes, count):
        for row, keep in enumerate(count):
            order = range(len(self.uncommitted[row])) if nodes is None else nodes[row]
            kept = [self.uncommitted[row][node] for node in list(order)[:keep]]
            self.committed[row] += kept
            self.uncommitted[row] = []

    def truncate(self, length):
        for row, most in enumerate(length):
            del self.committed[row][most:]
            self.uncommitted[row] = []


def entries_of(numbers):
    """Keys and values that tell layer, head and number apart."""
    number = jnp.asarray(numbers, jnp.float32)[:, :, None, None]
    head = jnp.arange(HEADS, dtype=jnp.float32)[None, None, :, None] / 8
    feature = jnp.arange(SIZE, dtype=jnp.float32)[None, None, None] / 64
    keys = tuple(number + head + feature + 1000.0 * layer for layer in range(LAYERS))
    return keys, tuple(-key for key in keys)


def assert_holds(cache, wanted):
    assert cache.length.dtype == cache.uncommitted.dtype == jnp.int32
    assert cache.length.tolist() == [len(row) for row in wanted.committed]
    assert int(cache.uncommitted) == len(wanted.uncommitted[0])
    for row in range(len(wanted.committed)):
        numbers = wanted.committed[row] + wanted.uncommitted[row]
        keys, values = entries_of([numbers])
        for layer in range(LAYERS):
            for buffer, entries in ((cache.keys, keys), (cache.values, values)):
                chex.assert_shape(buffer[layer], (None, HEADS, CAPACITY, SIZE))
                found = np.asarray(buffer[layer])[row, :, : len(numbers)]
                np.testing.assert_array_equal(found.swapaxes(0, 1), np.asarray(entries[layer][0]))


append, commit, truncate = map(jax.jit, (caches.append, caches.commit, caches.truncate))


def fresh(rows):
    return caches.init(rows, CAPACITY, LAYERS, HEADS, SIZE, jnp.float32)


def ragged(rows, uncommitted=0):
    """A cache whose rows hold 0, 1, 2, … entries, then `uncommitted` ones, and its reference."""
    cache, wanted = fresh(rows), Reference(rows)
    cache = append(cache, entries_of(wanted.append(rows)))
    count = list(range(rows))
    wanted.commit(None, count)
    cache = commit(cache, None, jnp.asarray(count, jnp.int32))
    if uncommitted:
        cache = append(cache, entries_of(wanted.append(uncommitted)))
    return cache, wanted


# Few rows are written one by one, many by one scatter.
@pytest.mark.parametrize("rows", [3, 12])
@settings(max_examples=12)
@given(data=st.data())
def test_any_sequence_of_operations(rows, data):
    cache, wanted = ragged(rows, uncommitted=2)
    for _ in range(data.draw(st.integers(1, 5), "operations")):
        room = CAPACITY - max(
            len(done) + len(new)
            for done, new in zip(wanted.committed, wanted.uncommitted, strict=True)
        )
        pending = len(wanted.uncommitted[0])
        kind = data.draw(st.sampled_from(["append", "chain", "tree", "truncate"]), "kind")
        if kind == "append":
            count = data.draw(st.sampled_from([1, 2, 5]), "count")
            if count <= room:
                cache = append(cache, entries_of(wanted.append(count)))
        elif kind == "chain":
            count = [data.draw(st.integers(0, pending)) for _ in range(rows)]
            wanted.commit(None, count)
            cache = commit(cache, None, jnp.asarray(count, jnp.int32))
        elif kind == "tree" and pending:
            width = min(pending, 4)
            # A path goes down: indices increase; the rest of the row has no meaning.
            nodes = np.sort(
                [np.random.default_rng(row).permutation(pending)[:width] for row in range(rows)]
            )
            count = [data.draw(st.integers(0, width)) for _ in range(rows)]
            wanted.commit(nodes, count)
            meaningless = np.arange(width)[None] >= np.asarray(count)[:, None]
            nodes = np.where(meaningless, 0, nodes)
            cache = commit(cache, jnp.asarray(nodes, jnp.int32), jnp.asarray(count, jnp.int32))
        elif kind == "truncate":
            length = [data.draw(st.integers(0, CAPACITY)) for _ in range(rows)]
            wanted.truncate(length)
            cache = truncate(cache, jnp.asarray(length, jnp.int32))
        assert_holds(cache, wanted)


def test_entries_left_out_complete_the_last_ones():
    cache, _ = ragged(3, uncommitted=2)
    keys, values = entries_of([[7, 8]] * 3)
    found = append(cache, ((None, keys[1]), (None, values[1])))
    assert int(found.uncommitted) == 2
    np.testing.assert_array_equal(found.keys[0], cache.keys[0])
    np.testing.assert_array_equal(found.values[0], cache.values[0])
    for row in range(3):
        np.testing.assert_array_equal(
            found.keys[1][row, :, row : row + 2], jnp.swapaxes(keys[1][row], 0, 1)
        )


def primitives(jaxpr):
    """Names of all operations, those of inner programs included."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")
        ):
            if hasattr(inner, "eqns"):
                yield from primitives(inner)
            elif hasattr(inner, "jaxpr"):
                yield from primitives(inner.jaxpr)


MOVES = {"scatter", "dynamic_update_slice", "gather", "dynamic_slice", "copy", "concatenate"}


@pytest.mark.parametrize("function", [caches.truncate, lambda c, n: caches.commit(c, None, n)])
@pytest.mark.parametrize("rows", [3, 12])
def test_a_chain_is_committed_and_truncated_by_a_length_alone(function, rows):
    cache, _ = ragged(rows, uncommitted=2)
    count = jnp.ones((rows,), jnp.int32)
    program = jax.make_jaxpr(function)(cache, count).jaxpr
    assert not MOVES & set(primitives(program))
    # Keys and values leave as the very arrays that came in.
    buffers = len(cache.keys) + len(cache.values)
    assert program.outvars[:buffers] == program.invars[:buffers]
    after = function(cache, count)
    assert all(new is old for new, old in zip(after.keys, cache.keys, strict=True))
    assert all(new is old for new, old in zip(after.values, cache.values, strict=True))
    # The same inspection finds the moves of a path through a tree.
    nodes = jnp.zeros((rows, 1), jnp.int32)
    moving = jax.make_jaxpr(caches.commit)(cache, nodes, count).jaxpr
    assert MOVES & set(primitives(moving))


def test_a_cache_in_half_precision_takes_wider_entries():
    cache = caches.init(2, CAPACITY, LAYERS, HEADS, SIZE, jnp.bfloat16)
    cache = caches.append(cache, entries_of([[1, 2], [3, 4]]))
    assert {buffer.dtype for buffer in (*cache.keys, *cache.values)} == {jnp.dtype(jnp.bfloat16)}


TOPOLOGIES = [(0, 0, 1, 2, 1), (0, 1, 2, 3, 4), (0, 0, 0, 0, 0)]


@pytest.mark.parametrize("old", [0, 1, 3])
@pytest.mark.parametrize("kind", ["none", "chain", "static", "dynamic"])
def test_new_tokens_see_the_text_and_their_ancestors(kind, old):
    rows, count = 3, 6 - old
    cache, _ = ragged(rows, uncommitted=old)
    topologies = [TOPOLOGIES[1]] * 3 if kind in ("none", "chain") else [TOPOLOGIES[0]] * 3
    tree = None if kind == "none" else trees.from_parents(topologies[0])
    if kind == "dynamic":
        topologies = TOPOLOGIES
        tree = trees.dynamic(jnp.asarray(topologies, jnp.int32), 5)
    positions = np.broadcast_to(caches.new_positions(cache, tree, count), (rows, count))
    in_cache, among_new = caches.visible(cache, tree, count)
    in_cache = np.broadcast_to(in_cache, (rows, count, CAPACITY))
    among_new = np.broadcast_to(among_new, (rows, count, count))
    for row, topology in enumerate(topologies):
        for new in range(count):
            node, path = old + new, [old + new]
            while path[-1]:
                path.append(topology[path[-1] - 1])
            assert positions[row, new] == row + len(path) - 1
            seen = set(range(row)) | {row + ancestor for ancestor in path if ancestor < old}
            assert set(np.flatnonzero(in_cache[row, new])) == seen
            assert set(np.flatnonzero(among_new[row, new]) + old) == {n for n in path if n >= old}
            assert node in path


DYNAMIC = trees.dynamic(jnp.asarray(TOPOLOGIES, jnp.int32), 5)
# Each with what it is given besides the cache; what is whole is static.
OPERATIONS = {
    "append": (caches.append, entries_of([[1, 2], [3, 4], [5, 6]])),
    "commit a chain": (caches.commit, None, jnp.asarray([2, 0, 1], jnp.int32)),
    "commit a path": (
        caches.commit,
        jnp.asarray([[0, 2], [1, 2], [0, 0]], jnp.int32),
        jnp.asarray([2, 1, 0], jnp.int32),
    ),
    "truncate": (caches.truncate, jnp.asarray([0, 4, 1], jnp.int32)),
    "positions in a chain": (caches.new_positions, None, 3),
    "positions in trees": (caches.new_positions, DYNAMIC, 3),
    "visible in a chain": (caches.visible, None, 3),
    "visible in trees": (caches.visible, DYNAMIC, 3),
}


class Variants(chex.TestCase):
    """The same caches with and without jit, of arrays on host and device."""

    @all_variants(with_pmap=False)
    @parameterized.parameters(*OPERATIONS)
    def test_operations(self, name):
        operation, *given = OPERATIONS[name]
        cache, _ = ragged(3, uncommitted=3)
        static = [place for place, value in enumerate(given, start=1) if isinstance(value, int)]
        variant = self.variant(operation, static_argnums=static)
        chex.assert_trees_all_equal(variant(cache, *given), operation(cache, *given))


def test_new_values_do_not_compile_again():
    jitted = {
        operation: jax.jit(chex.assert_max_traces(operation, n=1))
        for operation in (caches.append, caches.commit, caches.truncate)
    }
    for value in range(3):
        cache, _ = ragged(3, uncommitted=3)
        count = jnp.full((3,), value, jnp.int32)
        jitted[caches.append](cache, entries_of([[value]] * 3))
        jitted[caches.commit](cache, count[:, None], count)
        jitted[caches.truncate](cache, count)
