"""Prompt lookup: the text itself proposes.

Saxena 2023, "Prompt Lookup Decoding"; Yang et al. 2023 (arXiv 2304.04487).

The longest earlier occurrence of the text's last tokens is found in prompt and answer alike, and
what followed it there is the draft. No weights, and next to no time; it pays where the answer
copies.
"""

import dataclasses

import jax
import jax.numpy as jnp

from specjax import trees, types

__all__ = ["prompt_lookup"]


def prompt_lookup(length: int = 8, *, shortest: int = 2, longest: int = 16) -> types.Drafter:
    """Drafts what followed the longest n-gram match, the latest among equals; absent without one.

    A match so close to the end that its continuation runs into the end goes on periodically, as
    repeating text does.

    Args:
      length: K, the draft length; static.
      shortest: fewest tokens that count as a match; traced.
      longest: tokens beyond which a longer match is no better; static.

    Raises:
      ValueError: `length` below 1, or not 1 ≤ shortest ≤ longest.
    """
    length = types.whole("draft length", length, 1)
    shortest = types.whole("shortest", shortest, 1)
    longest = types.whole("longest", longest, shortest)
    return types.Drafter(
        params=jnp.asarray(shortest, jnp.int32),
        init=_init,
        prefill=_prefill,
        propose=_Propose(length, longest),
        update=_update,
        nodes=length,
        name="prompt_lookup",
    )


def _init(params: jax.Array, batch: int, capacity: int) -> tuple:
    del params, batch, capacity
    return ()


def _prefill(params: jax.Array, state: tuple, text, start, count, output) -> tuple:
    del params, text, start, count, output
    return state


def _update(params: jax.Array, state: tuple, context, draft, verdict, output) -> tuple:
    del params, context, draft, verdict, output
    return state


@dataclasses.dataclass(frozen=True)
class _Propose:
    length: int
    longest: int

    def __call__(
        self, params: jax.Array, state: tuple, context: types.Context, keys: jax.Array
    ) -> tuple[types.Draft, tuple]:
        del keys
        length = context.length[:, None]
        end, matched = _longest_match(context.tokens, length, self.longest)
        # The text between the match's end and the text's end, once more and again if need be.
        period = jnp.maximum(length - 1 - end, 1)
        offset = jnp.arange(self.length, dtype=jnp.int32)[None] % period
        place = jnp.clip(end + 1 + offset, 0, context.tokens.shape[1] - 1)
        tokens = jnp.take_along_axis(context.tokens, place, axis=1)
        draft = types.draft(
            tokens,
            trees.chain(self.length),
            present=jnp.broadcast_to(matched >= params, tokens.shape),
            vocab_size=context.target.vocab_size,
        )
        return draft, state


def _longest_match(
    tokens: jax.Array, length: jax.Array, longest: int
) -> tuple[jax.Array, jax.Array]:
    """Where the longest earlier match of the last tokens ends, and its length (0 if none).

    Returns:
      Two int32[B, 1].
    """
    slots = tokens.shape[1]
    place = jnp.arange(slots, dtype=jnp.int32)[None]
    agrees = jnp.broadcast_to(place < length - 1, tokens.shape)
    matched = jnp.zeros(tokens.shape, jnp.int32)
    for back in range(longest):
        last = jnp.take_along_axis(tokens, jnp.maximum(length - 1 - back, 0), axis=1)
        shifted = jnp.pad(tokens, ((0, 0), (back, 0)))[:, :slots]
        agrees = agrees & (place >= back) & (shifted == last)
        matched = matched + agrees.astype(jnp.int32)
    # Among equals the latest: the position breaks ties.
    score = jnp.where(matched > 0, matched * slots + place, 0)
    end = jnp.argmax(score, axis=1)[:, None].astype(jnp.int32)
    return end, jnp.take_along_axis(matched, end, axis=1)
