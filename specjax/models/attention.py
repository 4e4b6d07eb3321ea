"""Attention over the filled part of a cache and over new tokens."""

import functools

import jax
import jax.numpy as jnp

from specjax import native
from specjax.models import policy as policies

__all__ = ["attend", "prefixes"]


def prefixes(capacity: int, shortest: int) -> tuple[int, ...]:
    """Lengths to which a cache of `capacity` slots is cut for reading, ascending.

    `shortest` and its doublings, then the capacity; a doubling close to the capacity is left out.
    """
    lengths = []
    length = shortest
    while 4 * length <= 3 * capacity:
        lengths.append(length)
        length *= 2
    return (*lengths, capacity)


def attend(
    query: jax.Array,
    new: tuple[jax.Array, jax.Array],
    old: tuple[jax.Array, jax.Array],
    masks: tuple[jax.Array, jax.Array],
    filled: jax.Array,
    policy: policies.Policy,
) -> jax.Array:
    """Grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245), softmax in float32.

    The cost follows what is filled, not the capacity.

    Args:
      query: [B, T, heads, D], scaled; heads that share a key head are neighbours.
      new: keys and values of the new tokens, [B, T, KV, D].
      old: the cache's, [B, KV, S, D].
      masks: bool[B, 1 or T, S] and bool[1 or B, T, T], what a new token may attend to.
      filled: int32[], slots beyond which no row holds anything.
      policy: the form, and in what prefixes XLA's reads the cache.

    Returns:
      [B, T, heads, D].
    """
    operands = (query, new, old, masks, filled)
    if policy.native and query.dtype == old[0].dtype == jnp.float32:
        return _native(*operands)
    return _by_xla(*operands, policy.shortest_prefix)


def _by_xla(query, new, old, masks, filled, shortest_prefix: int = 128):
    """One branch for every prefix length, of which one runs."""
    batch, count, heads, size = query.shape
    shared = old[0].shape[1]
    groups = heads // shared
    # Plain batched products of three dimensions: fewer, larger steps for the compiler.
    query = query.reshape(batch, count, shared, groups, size).transpose(0, 2, 3, 1, 4)
    query = query.reshape(batch * shared, groups * count, size)

    def over(length):
        def read(query, old, new, masks):
            def slots(old, new):
                both = jnp.concatenate([old[:, :, :length], jnp.swapaxes(new, 1, 2)], axis=2)
                return both.reshape(batch * shared, length + count, size)

            mask = jnp.concatenate(
                [
                    jnp.broadcast_to(masks[0][:, :, :length], (batch, count, length)),
                    jnp.broadcast_to(masks[1], (batch, count, count)),
                ],
                axis=-1,
            )
            mask = jnp.broadcast_to(
                mask[:, None, None], (batch, shared, groups, count, length + count)
            ).reshape(batch * shared, groups * count, length + count)
            # Sums are float32, whatever they are sums of.
            product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
            scores = product("bxd,bsd->bxs", query, slots(old[0], new[0]))
            scores = jnp.where(mask, scores, -jnp.inf)
            # Every token sees itself, so no maximum is −inf.
            weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
            total = jnp.sum(weights, axis=-1, keepdims=True)
            mixed = product("bxs,bsd->bxd", weights.astype(query.dtype), slots(old[1], new[1]))
            return (mixed / total).astype(query.dtype)

        return read

    lengths = prefixes(old[0].shape[2], shortest_prefix)
    enough = jnp.sum(jnp.asarray(lengths[:-1], jnp.int32) < filled)
    mixed = jax.lax.switch(enough, [over(length) for length in lengths], query, old, new, masks)
    mixed = mixed.reshape(batch, shared, groups, count, size).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(batch, count, heads, size)


def _result(query, *_):
    return jax.ShapeDtypeStruct(query.shape, query.dtype)


_native = native.function("attend", _result, _by_xla)
