"""A model that speaks of a part of the vocabulary only.

FR-Spec (Zhao et al. 2025, arXiv 2502.14856) cuts the head of a draft to the tokens that are written
most. At small sizes the head is most of what a draft step costs, and nearly all text is made of few
tokens. The draft's law is 0 on the others, which no rule minds: verification keeps the target's law
whatever the draft leaves out.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from specjax import types

__all__ = ["Reduced", "check_table", "reduced_vocabulary"]


@struct.dataclass
class Reduced:
    """Weights of a reduced model.

    Attributes:
      params: of the model within.
      place: int32[V], the row of the head that speaks of a token; the number of rows for a token
        that none speaks of.
    """

    params: Any
    place: jax.Array


def reduced_vocabulary(
    model: types.LanguageModel, tokens: np.ndarray, vocab_size: int
) -> types.LanguageModel:
    """The model with its logits spread over the whole vocabulary, −inf where it says nothing.

    Args:
      model: reads all V tokens; its logits [B, T, M] are of the M tokens listed.
      tokens: int[M], distinct.
      vocab_size: V.

    Raises:
      ValueError: a token outside the vocabulary or listed twice, or another number of them than the
        model has logits.
    """
    tokens = np.asarray(tokens)
    check_table(tokens, model.vocab_size, vocab_size)
    place = np.full(vocab_size, len(tokens), np.int32)
    place[tokens] = np.arange(len(tokens))
    return dataclasses.replace(
        model,
        params=Reduced(model.params, jnp.asarray(place)),
        apply=_Apply(model.apply),
        resume=None if model.resume is None else _Resume(model.resume),
        vocab_size=vocab_size,
    )


def check_table(tokens: np.ndarray, rows: int, vocab_size: int) -> None:
    """Holds a table of tokens against a head's rows.

    Args:
      tokens: int[M], the token of each row.
      rows: of the head.
      vocab_size: V.

    Raises:
      ValueError: another number of tokens than rows, or what is no whole number, lies outside the
        vocabulary, or is listed twice.
    """
    if tokens.shape != (rows,):
        raise ValueError(
            f"the vocabulary table has shape {tokens.shape}, and the model's head {rows} rows"
        )
    if not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"the vocabulary table holds {tokens.dtype}, not whole numbers")
    strange = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if strange.size:
        raise ValueError(
            f"the vocabulary table holds token {strange[0]}, outside the vocabulary "
            f"0…{vocab_size - 1}"
        )
    if len(np.unique(tokens)) != len(tokens):
        raise ValueError("the vocabulary table lists a token twice")


def _spread(output: types.ModelOutput, place: jax.Array) -> types.ModelOutput:
    # A gather: writing each logit to its place takes several times as long on the CPU.
    padded = jnp.pad(output.logits, ((0, 0), (0, 0), (0, 1)), constant_values=-jnp.inf)
    return dataclasses.replace(output, logits=jnp.take(padded, place, axis=2))


@dataclasses.dataclass(frozen=True)
class _Apply:
    within: Any

    def __call__(self, params: Reduced, tokens, cache, tree=None, taps=()):
        output, entries = self.within(params.params, tokens, cache, tree, taps)
        return _spread(output, params.place), entries


@dataclasses.dataclass(frozen=True)
class _Resume:
    within: Any

    def __call__(self, params: Reduced, hidden, layer, cache, tree=None, taps=()):
        output, entries = self.within(params.params, hidden, layer, cache, tree, taps)
        return _spread(output, params.place), entries
