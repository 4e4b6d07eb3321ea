"""Conditional laws of short texts over a small vocabulary: what certificates enumerate.

A *conditional law* over texts of up to D + 1 tokens is a list of D + 1 arrays: entry d is [V^d, V],
natural logs of the next token's law after each of the V^d paths of d tokens, a path's index having
its first token as the highest digit. A path whose law is −inf everywhere is a dead end: its text
ends there, and that end is an outcome like any token.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from specjax import sampling, trees, types

__all__ = ["at_nodes", "digits", "path_index", "random_law", "warped_law"]


def random_law(
    key: jax.Array,
    vocab_size: int,
    depth: int,
    concentration: float | jax.Array = 1.0,
    dtype=jnp.float32,
) -> list[jax.Array]:
    """A conditional law of `depth` entries, each row from a Dirichlet.

    Args:
      key: a typed key, consumed.
      vocab_size: V.
      depth: entries.
      concentration: of the Dirichlet; small values give sharp laws.
      dtype: of the natural logs.
    """
    # One draw for all paths; a law of its own needs a program of its own.
    counts = [vocab_size**level for level in range(depth)]
    alpha = jnp.full((vocab_size,), concentration, dtype)
    rows = jax.random.dirichlet(key, alpha, (sum(counts),), dtype)
    log_law = jax.nn.log_softmax(jnp.log(jnp.maximum(rows, 1e-30)), axis=-1)
    return jnp.split(log_law, np.cumsum(counts)[:-1])


def warped_law(settings: types.Sampling, law: Sequence[jax.Array]) -> list[jax.Array]:
    """The law that warpers make of a conditional law, whose logs are taken for logits.

    Args:
      settings: scalars only, and nothing that reads the text before (no repetition penalty).
      law: a conditional law.
    """
    warped = []
    for level in law:
        rows = level.shape[0]
        text, length = jnp.zeros((rows, 1), jnp.int32), jnp.ones((rows,), jnp.int32)
        past = sampling.history(text, length, trees.chain(0), jnp.zeros((rows, 0), jnp.int32))
        warped.append(sampling.warp(settings, level[:, None], past)[:, 0])
    return warped


@functools.lru_cache(maxsize=64)
def digits(base: int, count: int) -> np.ndarray:
    """All numbers of `count` digits, one a row: int32[base^count, count]."""
    grid = np.meshgrid(*[np.arange(base, dtype=np.int32)] * count, indexing="ij")
    return (
        np.stack([axis.reshape(-1) for axis in grid], axis=1)
        if count
        else np.zeros((1, 0), np.int32)
    )


def path_index(tree: trees.Tree, drafted: jax.Array, vocab_size: int) -> jax.Array:
    """The base-V index of every node's path: int32[A, N+1]."""
    index = [jnp.zeros(drafted.shape[:1], jnp.int32)]
    assert tree.static_parents is not None
    for node, parent in enumerate(tree.static_parents):
        index.append(index[parent] * vocab_size + drafted[:, node])
    return jnp.stack(index, axis=1)


def at_nodes(laws: Sequence[jax.Array], depths: jax.Array, index: jax.Array) -> jax.Array:
    """The entry of every node by its depth and path: [A, nodes, …]."""
    count = depths.shape[0]
    width = laws[0].shape[1]
    result = jnp.zeros((*index.shape, width), laws[0].dtype)
    for level, law in enumerate(laws):
        here = (depths == level).reshape(1, count, 1)
        result = jnp.where(here, jnp.asarray(law)[jnp.minimum(index, law.shape[0] - 1)], result)
    return result
