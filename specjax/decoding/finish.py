"""Where a text ends: end-of-sequence tokens, stop sequences, the limit, the capacity."""

import jax
import jax.numpy as jnp

from specjax.decoding import state as states

__all__ = ["close"]


def close(
    request: states.Request,
    text: jax.Array,
    start: jax.Array,
    length: jax.Array,
    offered: jax.Array,
    width: int,
) -> tuple[jax.Array, jax.Array]:
    """Cuts what a step offers at the first end.

    Args:
      request: limits, end-of-sequence tokens and stop sequences.
      text: int32[B, S], with the offered tokens already written behind `length`.
      start: int32[B], before which no stop sequence may begin.
      length: int32[B], committed tokens.
      offered: int32[B], tokens offered, at most `width`.
      width: most tokens a step offers.

    Returns:
      int32[B] tokens to keep and int32[B] `FinishReason`.
    """
    capacity = text.shape[1]
    position = length[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
    counts = jnp.arange(width, dtype=jnp.int32)[None] < offered[:, None]

    token = jnp.take_along_axis(text, jnp.minimum(position, capacity - 1), axis=1)
    is_eos = jnp.any(token[:, :, None] == request.eos[:, None, :], axis=-1)

    _, _, longest = request.stop.shape
    back = jnp.arange(1 - longest, 1, dtype=jnp.int32)[None, None]
    place = position[:, :, None] + back
    flat = jnp.clip(place, 0, capacity - 1).reshape(place.shape[0], -1)
    window = jnp.take_along_axis(text, flat, axis=1).reshape(place.shape)[:, :, None, :]
    needed = 1 - request.stop_length[:, None, :, None] <= back[:, :, None, :]
    within = place[:, :, None, :] >= start[:, None, None, None]
    agrees = jnp.all(~needed | (within & (window == request.stop[:, None])), axis=-1)
    is_stop = jnp.any(agrees & (request.stop_length > 0)[:, None, :], axis=-1)

    end = jnp.minimum(request.limit, capacity)
    is_last = position + 1 >= end[:, None]
    full = jnp.where(
        request.limit > capacity, states.FinishReason.CACHE_FULL, states.FinishReason.LENGTH
    )
    reason = jnp.where(is_last, full[:, None], states.FinishReason.RUNNING)
    reason = jnp.where(is_stop, states.FinishReason.STOP, reason)
    reason = jnp.where(is_eos, states.FinishReason.EOS, reason)
    ends = counts & (reason != states.FinishReason.RUNNING)
    ended = jnp.any(ends, axis=-1)
    first = jnp.argmax(ends, axis=-1).astype(jnp.int32)
    kept = jnp.where(ended, first + 1, offered)
    chosen = jnp.take_along_axis(reason, first[:, None], axis=1)[:, 0]
    return kept, jnp.where(ended, chosen, states.FinishReason.RUNNING).astype(jnp.int32)
