"""Draft trees: parents, depths, ancestors, paths and the builders of static topologies.

A tree has N drafted nodes besides its root. Node 0 is the root, the last committed token; nodes 1…N
are drafted tokens. A parent's index is always smaller than its child's, and siblings stand in the
order in which they were drawn. A chain is the tree whose every parent is the previous node.

A topology is either static (a tuple, so its masks are constants of the program) or dynamic (traced
parents, one tree a row). Every function returns a leading axis that is 1 for a static tree and B
for a dynamic one, so that both broadcast alike.
"""

import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

__all__ = [
    "Tree",
    "ancestors",
    "branching",
    "chain",
    "depths",
    "dynamic",
    "earlier_siblings",
    "from_parents",
    "from_paths",
    "most_siblings",
    "parents",
    "paths",
]


@struct.dataclass
class Tree:
    """A draft-tree topology; build one with `chain`, `branching` or another below.

    Attributes:
      traced_parents: int32[B, N], the parent of nodes 1…N of each row, or None for a static tree.
      static_parents: the same as a tuple of N ints, or None for a dynamic tree.
      max_depth: D, an upper bound (for a static tree the exact number) of drafted tokens on any
        path.
    """

    traced_parents: jax.Array | None
    static_parents: tuple[int, ...] | None = struct.field(pytree_node=False)
    max_depth: int = struct.field(pytree_node=False)

    @property
    def size(self) -> int:
        """N, the number of drafted nodes; the root is not counted."""
        if self.static_parents is not None:
            return len(self.static_parents)
        assert self.traced_parents is not None
        return self.traced_parents.shape[-1]

    @property
    def is_chain(self) -> bool:
        """Whether the topology is known, at trace time, to be a chain."""
        return self.size <= 1 or self.static_parents == tuple(range(self.size))


def from_parents(parents_of: Sequence[int]) -> Tree:
    """A static tree from the parents of nodes 1…N, in node order.

    Raises:
      ValueError: a parent's index is negative or not smaller than its child's.
    """
    topology = tuple(operator.index(parent) for parent in parents_of)
    for node, parent in enumerate(topology, start=1):
        if not 0 <= parent < node:
            raise ValueError(
                f"parents={topology}: node {node} has parent {parent}, not in 0…{node - 1}"
            )
    depth = _static_depths(topology)
    return Tree(traced_parents=None, static_parents=topology, max_depth=int(depth.max()))


def from_paths(given: Sequence[Sequence[int]]) -> Tree:
    """The static tree of the nodes that are named by their paths, as Medusa's choices are.

    A path says at each depth which child is taken: (0,) is the root's first child, (0, 2) the third
    of that one's. Nodes stand breadth first, siblings by their number.

    Args:
      given: one path a node, in any order; numbers tell siblings apart and order them.

    Raises:
      ValueError: an empty or repeated path, a negative number, or a node whose parent is missing.
    """
    order = sorted((tuple(map(operator.index, path)) for path in given), key=lambda p: (len(p), p))
    number: dict[tuple[int, ...], int] = {(): 0}
    topology = []
    for path in order:
        if path in number or any(child < 0 for child in path):
            raise ValueError(f"path {path} is empty, repeated or negative")
        if path[:-1] not in number:
            raise ValueError(f"path {path} lacks its parent {path[:-1]}; name that too")
        topology.append(number[path[:-1]])
        number[path] = len(topology)
    return from_parents(topology)


def chain(length: int) -> Tree:
    """The chain of `length` drafted tokens; 0 gives the bare root.

    Raises:
      ValueError: `length` is negative.
    """
    if length < 0:
        raise ValueError(f"a chain of length={length} does not exist; lengths start at 0")
    return from_parents(range(length))


def branching(factors: Sequence[int]) -> Tree:
    """The tree whose nodes at depth d have `factors[d]` children, breadth first (as SpecInfer's).

    Raises:
      ValueError: a factor is smaller than 1.
    """
    if any(factor < 1 for factor in factors):
        raise ValueError(f"branching factors={tuple(factors)} must all be at least 1")
    topology: list[int] = []
    level = [0]
    for factor in factors:
        children = []
        for parent in level:
            for _ in range(factor):
                topology.append(parent)
                children.append(len(topology))
        level = children
    return from_parents(topology)


def dynamic(traced_parents: jax.Array, max_depth: int) -> Tree:
    """A tree per row from traced parents int32[B, N], no deeper than `max_depth`.

    The caller promises `0 <= parents[:, n-1] < n`; what is traced cannot be checked here.
    """
    return Tree(traced_parents=traced_parents, static_parents=None, max_depth=max_depth)


def most_siblings(tree: Tree) -> int:
    """The most children that a node has, or could have in a dynamic tree; at least 1."""
    if tree.static_parents is None:
        return max(tree.size, 1)
    return max(int(np.bincount(np.asarray(tree.static_parents, int), minlength=1).max()), 1)


def parents(tree: Tree) -> jax.Array:
    """Parents of nodes 1…N: int32[1 or B, N]."""
    if tree.static_parents is not None:
        return jnp.asarray(np.asarray(tree.static_parents, np.int32).reshape(1, -1))
    assert tree.traced_parents is not None
    return tree.traced_parents


def ancestors(tree: Tree) -> jax.Array:
    """`[.., n, m]`: is node m on the path from the root to n, both included; bool[.., N+1, N+1]."""
    if tree.static_parents is not None:
        return jnp.asarray(_static_ancestors(tree.static_parents)[None])
    assert tree.traced_parents is not None
    size = tree.size
    step = jax.nn.one_hot(tree.traced_parents, size + 1, dtype=jnp.int32)
    reach = jnp.pad(step, ((0, 0), (1, 0), (0, 0))) + jnp.eye(size + 1, dtype=jnp.int32)[None]
    # Squaring doubles the distance covered, so a path of depth D needs about log2(D) products.
    for _ in range(max(0, tree.max_depth - 1).bit_length()):
        reach = jnp.minimum(reach @ reach, 1)
    return reach > 0


def depths(tree: Tree) -> jax.Array:
    """Drafted tokens on the path to each node, 0 for the root: int32[1 or B, N+1]."""
    if tree.static_parents is not None:
        return jnp.asarray(_static_depths(tree.static_parents)[None])
    return jnp.sum(ancestors(tree), axis=-1, dtype=jnp.int32) - 1


def paths(tree: Tree) -> jax.Array:
    """Nodes from the root's child down to each node: int32[1 or B, N+1, D].

    Row n holds `depths[n]` nodes; what stands beyond them has no meaning.
    """
    depth = depths(tree)
    on_path = ancestors(tree)
    # At most one ancestor has a given depth, so a sum over nodes reads it off.
    at_depth = depth[:, :, None] == jnp.arange(1, tree.max_depth + 1, dtype=jnp.int32)[None, None]
    nodes = jnp.where(at_depth, jnp.arange(tree.size + 1, dtype=jnp.int32)[None, :, None], 0)
    return jnp.einsum("bnm,bmd->bnd", on_path.astype(jnp.int32), nodes)


def earlier_siblings(tree: Tree) -> jax.Array:
    """`[.., n-1, m-1]`: has m the parent of n, and was it drawn before n; bool[1 or B, N, N]."""
    parent = parents(tree)
    before = np.tril(np.ones((tree.size, tree.size), bool), k=-1)
    return (parent[:, :, None] == parent[:, None, :]) & jnp.asarray(before)[None]


@functools.lru_cache(maxsize=256)
def _static_ancestors(topology: tuple[int, ...]) -> np.ndarray:
    table = np.eye(len(topology) + 1, dtype=bool)
    for node, parent in enumerate(topology, start=1):
        table[node] |= table[parent]
    return table


def _static_depths(topology: tuple[int, ...]) -> np.ndarray:
    return _static_ancestors(topology).sum(axis=-1, dtype=np.int32) - 1
