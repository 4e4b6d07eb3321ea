"""The key/value cache: committed entries per row, uncommitted ones after them, commit and truncate.

Row b holds `length[b]` committed entries in slots 0…length[b]−1 and the uncommitted entry j in slot
length[b]+j. A chain is committed by a length alone; a path through a tree moves only its accepted
entries down. Entries are stored rotated (rotary positions count from the committed length by depth,
and a path keeps its depths), so moving them is enough.

One array a layer: per-row writes into a stacked [L, B, …] cost many times more on the CPU.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from specjax import trees

__all__ = ["KVCache", "append", "commit", "init", "new_positions", "truncate", "visible"]

# Up to this many rows, a write per row beats one scatter.
_UNROLLED_ROWS = 8


@struct.dataclass
class KVCache:
    """Keys and values of every layer.

    Attributes:
      keys, values: tuples of L arrays [B, KV heads, S, head size].
      length: int32[B], committed entries.
      uncommitted: int32[], entries appended since the last commit, the same for all rows.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length: jax.Array
    uncommitted: jax.Array


def init(
    batch: int, capacity: int, num_layers: int, num_kv_heads: int, head_size: int, dtype: Any
) -> KVCache:
    """An empty cache of `capacity` slots a row."""
    shape = (batch, num_kv_heads, capacity, head_size)
    return KVCache(
        keys=tuple(jnp.zeros(shape, dtype) for _ in range(num_layers)),
        values=tuple(jnp.zeros(shape, dtype) for _ in range(num_layers)),
        length=jnp.zeros((batch,), jnp.int32),
        uncommitted=jnp.zeros((), jnp.int32),
    )


def append(cache: KVCache, entries: tuple[tuple[Any, ...], tuple[Any, ...]]) -> KVCache:
    """Writes T more uncommitted entries, or completes the last T of them.

    Args:
      cache: with room for them: a write past the capacity would silently clamp onto committed
        entries.
      entries: new keys and values, each a tuple of L arrays [B, T, KV heads, head size]. Where the
        first layers' are None, as a pass that resumed at a later layer leaves them, those layers
        hold these tokens already, as the last T uncommitted entries, and the others are written
        beside them.
    """
    count = next(entry.shape[1] for entry in entries[0] if entry is not None)
    completes = entries[0][0] is None
    start = cache.length + cache.uncommitted - (count if completes else 0)

    def write_all(buffers, new):
        return tuple(
            buffer if entry is None else _write(buffer, jnp.swapaxes(entry, 1, 2), start)
            for buffer, entry in zip(buffers, new, strict=True)
        )

    return dataclasses.replace(
        cache,
        keys=write_all(cache.keys, entries[0]),
        values=write_all(cache.values, entries[1]),
        uncommitted=cache.uncommitted + (0 if completes else count),
    )


def commit(cache: KVCache, nodes: jax.Array | None, count: jax.Array) -> KVCache:
    """Keeps the first `count[B]` of the uncommitted entries `nodes[B, P]`, and drops the rest.

    Args:
      cache: the cache.
      nodes: int32[B, P], uncommitted entries in the order they are to stand; None is their own
        order (a chain), for which no data moves.
      count: int32[B].
    """
    keys, values = cache.keys, cache.values
    if nodes is not None:
        slots = (cache.length[:, None] + nodes)[:, None, :, None]

        def move(buffer):
            return _write(buffer, jnp.take_along_axis(buffer, slots, axis=2), cache.length)

        keys, values = tuple(map(move, keys)), tuple(map(move, values))
    return KVCache(keys, values, cache.length + count, jnp.zeros_like(cache.uncommitted))


def truncate(cache: KVCache, length: jax.Array) -> KVCache:
    """Forgets committed entries beyond `length[B]` and all uncommitted ones; no data moves."""
    return dataclasses.replace(
        cache,
        length=jnp.minimum(cache.length, length),
        uncommitted=jnp.zeros_like(cache.uncommitted),
    )


def new_positions(cache: KVCache, tree: trees.Tree | None, count: int) -> jax.Array:
    """Positions of `count` new tokens, the committed length plus the depth: int32[B, T]."""
    new = jnp.arange(count, dtype=jnp.int32)
    if tree is None or tree.is_chain:
        depth = (cache.uncommitted + new)[None]
    else:
        depth = _new_rows(trees.depths(tree), cache, tree, count)
    return cache.length[:, None] + depth


def visible(cache: KVCache, tree: trees.Tree | None, count: int) -> tuple[jax.Array, jax.Array]:
    """What each of `count` new tokens may attend to.

    Returns:
      bool[B, 1 or T, S] over the cache's slots and bool[1 or B, T, T] over the new tokens
      themselves: the committed prefix and the token's ancestors.
    """
    slot = jnp.arange(cache.keys[0].shape[2], dtype=jnp.int32)[None]
    if tree is None or tree.is_chain:
        filled = (cache.length + cache.uncommitted)[:, None]
        return (slot < filled)[:, None], jnp.tril(jnp.ones((count, count), bool))[None]
    table = _new_rows(trees.ancestors(tree), cache, tree, count)
    old = tree.size + 1 - count
    committed = (slot < cache.length[:, None])[:, None]
    if old == 0:
        return committed, table
    # A slot beyond the committed ones holds an uncommitted node, visible if it is an ancestor.
    node = slot - cache.length[:, None]
    table = jnp.broadcast_to(table, (slot.shape[0] * cache.length.shape[0], *table.shape[1:]))
    index = jnp.clip(node, 0, tree.size)[:, None, :]
    index = jnp.broadcast_to(index, (*table.shape[:2], index.shape[-1]))
    ancestor = jnp.take_along_axis(table, index, axis=2)
    uncommitted = (node >= 0) & (node < cache.uncommitted)
    among_new = jax.lax.dynamic_slice_in_dim(table, cache.uncommitted, count, axis=2)
    return committed | (uncommitted[:, None] & ancestor), among_new


def _new_rows(table: jax.Array, cache: KVCache, tree: trees.Tree, count: int) -> jax.Array:
    """Rows of a per-node table [.., N+1, …] that belong to the `count` new tokens."""
    if tree.size + 1 == count:
        return table
    return jax.lax.dynamic_slice_in_dim(table, cache.uncommitted, count, axis=1)


def _write(buffer: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """Writes new[B, KV, T, D] into buffer[B, KV, S, D] from slot start[B] on."""
    new = new.astype(buffer.dtype)
    # Of one dtype with `start`, also where JAX's whole numbers have 64 bits.
    zero = jnp.zeros((), jnp.int32)
    if buffer.shape[0] <= _UNROLLED_ROWS:
        for row in range(buffer.shape[0]):
            place = (jnp.int32(row), zero, start[row], zero)
            buffer = jax.lax.dynamic_update_slice(buffer, new[row : row + 1], place)
        return buffer
    return jax.vmap(lambda b, n, s: jax.lax.dynamic_update_slice(b, n, (zero, s, zero)))(
        buffer, new, start
    )
