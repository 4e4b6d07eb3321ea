"""Trees against a slow reference that walks parents one at a time."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given
from hypothesis import strategies as st

from specjax import trees

# Untyped in chex.
all_variants: Any = chex.all_variants


def topologies(size):
    return st.tuples(*(st.integers(0, node - 1) for node in range(1, size + 1)))


any_topology = st.integers(0, 8).flatmap(topologies)
# Rows of one batch: as many trees of the same size, which differ.
any_rows = st.integers(1, 8).flatmap(
    lambda size: st.lists(topologies(size), min_size=1, max_size=4)
)


def walk(parents, node):
    """Nodes from the root's child down to `node`."""
    path = []
    while node:
        path.append(node)
        node = parents[node - 1]
    return path[::-1]


def check(tree, rows):
    """Holds every table of a tree to the reference, row by row."""
    size = len(rows[0])
    tables = (
        trees.parents(tree),
        trees.ancestors(tree),
        trees.depths(tree),
        trees.paths(tree),
        trees.earlier_siblings(tree),
    )
    chex.assert_shape(tables[0], (len(rows), size))
    chex.assert_shape(tables[1], (len(rows), size + 1, size + 1))
    chex.assert_shape(tables[2], (len(rows), size + 1))
    chex.assert_shape(tables[3], (len(rows), size + 1, tree.max_depth))
    chex.assert_shape(tables[4], (len(rows), size, size))
    assert [table.dtype for table in tables] == [jnp.int32, bool, jnp.int32, jnp.int32, bool]
    parents, ancestors, depths, paths, earlier = map(np.asarray, tables)
    for row, topology in enumerate(rows):
        assert tuple(parents[row]) == topology
        for node in range(size + 1):
            path = walk(topology, node)
            assert set(np.flatnonzero(ancestors[row, node])) == {0, *path}
            assert depths[row, node] == len(path)
            assert list(paths[row, node, : len(path)]) == path
        for node in range(1, size + 1):
            siblings = [m for m in range(1, node) if topology[m - 1] == topology[node - 1]]
            assert list(np.flatnonzero(earlier[row, node - 1]) + 1) == siblings


@given(any_topology)
def test_static_tree(topology):
    tree = trees.from_parents(topology)
    assert tree.size == len(topology)
    assert tree.max_depth == max(len(walk(topology, node)) for node in range(len(topology) + 1))
    assert tree.is_chain == (topology == tuple(range(len(topology))))
    check(tree, [topology])


@given(any_rows, st.integers(0, 3))
def test_dynamic_tree(rows, slack):
    deepest = max(len(walk(row, node)) for row in rows for node in range(len(row) + 1))
    tree = trees.dynamic(jnp.asarray(rows, jnp.int32), max_depth=deepest + slack)
    assert tree.size == len(rows[0])
    # With one node there is no other topology.
    assert tree.is_chain == (tree.size == 1)
    check(tree, rows)


@pytest.mark.parametrize("length", [0, 1, 5])
def test_chain(length):
    tree = trees.chain(length)
    assert tree.size == tree.max_depth == length
    assert tree.is_chain
    check(tree, [tuple(range(length))])


def test_branching_is_breadth_first():
    assert trees.branching((2, 1, 2)).static_parents == (0, 0, 1, 2, 3, 3, 4, 4)
    assert trees.branching((3,)).static_parents == (0, 0, 0)
    assert trees.branching((1, 1, 1)).is_chain
    assert trees.branching(()).size == 0
    assert trees.branching((2, 3)).max_depth == 2


@pytest.mark.parametrize("topology", [(1,), (0, 2), (0, -1), (0, 1, 5)])
def test_a_parent_that_is_not_earlier_is_refused(topology):
    with pytest.raises(ValueError, match=rf"node {len(topology)} has parent {topology[-1]}"):
        trees.from_parents(topology)


def test_bad_builders_print_the_value():
    with pytest.raises(ValueError, match="length=-3"):
        trees.chain(-3)
    with pytest.raises(ValueError, match=r"\(2, 0, 1\)"):
        trees.branching((2, 0, 1))


def test_a_static_tree_is_part_of_the_program_and_a_dynamic_one_an_argument():
    static, other = trees.from_parents((0, 0)), trees.from_parents((0, 1))
    assert jax.tree.leaves(static) == []
    assert jax.tree.structure(static) != jax.tree.structure(other)
    assert jax.tree.structure(static) == jax.tree.structure(trees.from_parents([0, 0]))

    depths = jax.jit(chex.assert_max_traces(trees.depths, n=1))
    for rows in ([[0, 0, 1]], [[0, 1, 2]]):
        found = depths(trees.dynamic(jnp.asarray(rows, jnp.int32), max_depth=3))
        assert found[0, 3] == len(walk(rows[0], 3))


@pytest.mark.parametrize("function", [trees.ancestors, trees.depths, trees.paths])
def test_dynamic_tables_are_the_same_under_jit_and_vmap(function):
    rows = jnp.asarray([[0, 0, 1, 3], [0, 1, 2, 3], [0, 1, 1, 2]], jnp.int32)
    whole = function(trees.dynamic(rows, 4))
    chex.assert_trees_all_equal(whole, jax.jit(function)(trees.dynamic(rows, 4)))
    alone = jax.vmap(lambda row: function(trees.dynamic(row[None], 4))[0])(rows)
    chex.assert_trees_all_equal(whole, alone)


class Variants(chex.TestCase):
    """The same tables with and without jit, from parents on host and device."""

    @all_variants(with_pmap=False)
    @parameterized.parameters("parents", "ancestors", "depths", "paths", "earlier_siblings")
    def test_table(self, name):
        function = getattr(trees, name)
        rows = jnp.asarray([[0, 0, 1, 3], [0, 1, 2, 3], [0, 1, 1, 2]], jnp.int32)
        for tree in (trees.from_parents((0, 0, 1, 3)), trees.dynamic(rows, 4)):
            chex.assert_trees_all_equal(self.variant(function)(tree), function(tree))
