"""Where two decodes of one prompt part, and by how little.

Floating point can flip an argmax between two programs that compute the same law.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from specjax import types

__all__ = ["Divergence", "first_divergence"]


@dataclasses.dataclass(frozen=True)
class Divergence:
    """The first token at which two answers differ.

    Attributes:
      position: index into the answers.
      tokens: the two tokens; None where an answer has ended.
      logit_gap: |difference of their logits| after the common text; 0 when an answer has ended.
        Rounding alone explains gaps up to some 1e-4 in float32.
    """

    position: int
    tokens: tuple[int | None, int | None]
    logit_gap: float


def first_divergence(
    target: types.LanguageModel,
    prompt: Sequence[int],
    first: Sequence[int],
    second: Sequence[int],
) -> Divergence | None:
    """Compares two answers to one prompt; None when they are the same.

    Args:
      target: the model that wrote them.
      prompt: token ids.
      first, second: token ids of the answers.
    """
    if list(first) == list(second):
        return None
    shorter = min(len(first), len(second))
    position = next((i for i in range(shorter) if first[i] != second[i]), shorter)
    one, other = (
        answer[position] if position < len(answer) else None for answer in (first, second)
    )
    if one is None or other is None:
        return Divergence(position, (one, other), 0.0)
    text = [*prompt, *first[:position]]
    # Padded, so that many comparisons share few programs; later tokens cannot be seen by earlier
    # ones.
    padded = np.zeros((1, -(-len(text) // 128) * 128), np.int32)
    padded[0, : len(text)] = text
    logits = np.asarray(_last_logits(target, jnp.asarray(padded), jnp.int32(len(text) - 1)))
    return Divergence(position, (one, other), float(abs(logits[one] - logits[other])))


@jax.jit
def _last_logits(target: types.LanguageModel, tokens: jax.Array, last: jax.Array) -> jax.Array:
    cache = target.init_cache(1, tokens.shape[1])
    output, _ = target.apply(target.params, tokens, cache, None, ())
    return output.logits[0, last]
