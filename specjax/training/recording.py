"""A drafter that drafts nothing and records what the target says of every token that it writes.

It rides in the compiled loop of plain decoding, so recording costs no second pass.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from specjax import decoding, types

__all__ = ["Record", "recorder"]


@struct.dataclass
class Record:
    """What was recorded at each slot of the text, of the law that its token was drawn from.

    Everything is of the model's own law, before any sampling option. Slots of the prompt hold
    nothing.

    Attributes:
      features: float16[B, S, taps, H], hidden states at the token before.
      normalizer: float32[B, S], log Σ exp of the logits: the final norm's output times the head,
        less this, is the law, as far as both products are rounded alike.
      top_tokens: int32[B, S, k], the most probable tokens, falling.
      top_log_probs: float32[B, S, k], natural logs; one minus their mass is that of all others.
    """

    features: jax.Array
    normalizer: jax.Array
    top_tokens: jax.Array
    top_log_probs: jax.Array


def recorder(
    target: types.LanguageModel, taps: tuple[int, ...] = (), top: int = 0
) -> types.Drafter:
    """A drafter of no nodes whose state, after a decode, is a `Record` of it.

    Args:
      target: the model that will decode.
      taps: layers whose features to record, as in `LanguageModel.apply`.
      top: k, how many of the most probable tokens to record; 0 for none.

    Raises:
      ValueError: a tap that the model does not have, or `top` outside 0…V.
    """
    for tap in taps:
        if not 0 <= tap <= target.num_layers:
            raise ValueError(f"taps={taps}: {tap} is none of the layers 0…{target.num_layers}")
    if types.whole("top", top, 0) > target.vocab_size:
        raise ValueError(f"top={top} is more than the vocabulary's {target.vocab_size} tokens")
    return dataclasses.replace(
        decoding.NOTHING,
        init=_Init(len(taps), target.hidden_size, top),
        update=_update,
        taps=tuple(taps),
        name="recorder",
    )


@dataclasses.dataclass(frozen=True)
class _Init:
    taps: int
    width: int
    top: int

    def __call__(self, params: tuple, batch: int, capacity: int) -> Record:
        del params
        return Record(
            features=jnp.zeros((batch, capacity, self.taps, self.width), jnp.float16),
            normalizer=jnp.zeros((batch, capacity), jnp.float32),
            top_tokens=jnp.zeros((batch, capacity, self.top), jnp.int32),
            top_log_probs=jnp.zeros((batch, capacity, self.top), jnp.float32),
        )


def _update(params: tuple, state: Record, context, draft, verdict, output: Any) -> Record:
    """Writes what the pass said at the root into the slot of the token that it gave."""
    del params, draft, verdict
    logits = output.logits[:, 0].astype(jnp.float32)
    normalizer = jax.nn.logsumexp(logits, axis=-1)
    scores, tokens = jax.lax.top_k(logits, state.top_tokens.shape[2])
    row = jnp.arange(logits.shape[0], dtype=jnp.int32)
    # Rows that took no part write nothing: their slots are out of range.
    slot = jnp.where(context.active, context.length - 1, state.normalizer.shape[1])

    def write(buffer, new):
        return buffer.at[row, slot].set(new.astype(buffer.dtype), mode="drop")

    return Record(
        features=write(state.features, output.features[:, 0]),
        normalizer=write(state.normalizer, normalizer),
        top_tokens=write(state.top_tokens, tokens),
        top_log_probs=write(state.top_log_probs, scores - normalizer[:, None]),
    )
