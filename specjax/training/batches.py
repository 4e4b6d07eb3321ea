"""Batches of recorded conversations, each a function of the seed and its number alone."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from specjax.training import shards

__all__ = ["Batch", "Batches", "before_answers"]

# Widths are rounded up to a multiple of this part of them, so that little is padded and the
# programs, one a width, stay few.
_PART = 8
_LEAST_STEP = 32


@struct.dataclass
class Batch:
    """Conversations with the target's laws of their answers; B rows, T tokens, A of an answer.

    Attributes:
      tokens: int32[B, T], from slot 0 on; what lies behind a text means nothing.
      start: int32[B], where the answer begins.
      length: int32[B], tokens of the answer, A at the most.
      temperature: float32[B], at which the target wrote the answer, 0 for greedy; NaN where
        something else did.
      features: float16[B, A, H], of the final norm, at the token before each answer token.
      normalizer: float32[B, A], as in `shards.Shard`.
    """

    tokens: Any
    start: Any
    length: Any
    temperature: Any
    features: Any
    normalizer: Any


def before_answers(hidden: jax.Array, start: jax.Array, answers: int) -> jax.Array:
    """What stands at the token before each token of the answers, as a pass over the texts made it.

    Args:
      hidden: [B, T, H].
      start: int32[B], where the answers begin.
      answers: A, tokens of the longest.

    Returns:
      [B, A, H]; past a text's last token, that one's again.
    """
    place = jnp.asarray(start)[:, None] - 1 + jnp.arange(answers, dtype=jnp.int32)[None]
    place = jnp.minimum(place, hidden.shape[1] - 1)
    return jnp.take_along_axis(hidden, place[:, :, None], axis=1)


@dataclasses.dataclass(frozen=True)
class _Place:
    shard: int
    row: int


class Batches:
    """All conversations of some shards, shuffled anew each epoch, like lengths together.

    Args:
      held: shards with features of the final norm.
      tokens: B·T, tokens a batch with padding; rows are as many as fit.
      seed: of the order.
      multiple: rows are a multiple of this, as parts and devices want.
      unseen: the conversations that are held out, instead of those to train on; None for all, to
        measure on.
      tap: which of the recorded features is the final norm's.

    Raises:
      ValueError: shards without such features, or too few conversations for a single batch.
    """

    def __init__(
        self,
        held: Sequence[shards.Shard],
        tokens: int,
        seed: int,
        *,
        multiple: int = 1,
        unseen: bool | None = False,
        tap: int = -1,
    ):
        self._width = 0
        for shard in held:
            _, taps, self._width = shard.features.shape
            if taps == 0:
                raise ValueError(f"{shard.folder} holds no features; record the final norm's")
        self._held, self._seed, self._tap = held, seed, tap
        # By width: its conversations, and its longest answer, to which laws are padded.
        self._groups: dict[int, list[_Place]] = {}
        self._answers: dict[int, int] = {}
        for index, shard in enumerate(held):
            lengths = np.diff(shard.offsets)
            for row in shard.rows(unseen):
                width = _width(int(lengths[row]))
                self._groups.setdefault(width, []).append(_Place(index, row))
                answer = int(lengths[row] - shard.prompts[row])
                self._answers[width] = max(self._answers.get(width, 0), answer)
        self._rows = {
            width: max(tokens // width // multiple, 1) * multiple for width in self._groups
        }
        to_train_on = unseen is False
        if to_train_on:
            self._merge(multiple)
        # Steps of one width share a program, so what is left over waits for the next epoch; text
        # that is only measured on is all looked at.
        self._least = None if to_train_on else 1
        self.per_epoch = len(self._shuffled(0))
        if not self.per_epoch:
            count = sum(len(shard.rows(unseen)) for shard in held)
            raise ValueError(
                f"{count} conversations make no batch of {multiple} rows; generate more, or ask "
                "for fewer parts or devices"
            )
        self._order: tuple[int, list[tuple[int, list[_Place]]]] = (-1, [])

    def __call__(self, step: int, params: Any = None) -> Batch:
        """The batch of a step; the same for the same shards and seed, whatever the params."""
        del params
        epoch, index = divmod(step, self.per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, self._shuffled(epoch)
        width, places = self._order[1][index]
        return self._gather(width, places)

    def _merge(self, multiple: int) -> None:
        """Gives conversations too few for a batch to the next width, or they were never seen."""
        widths = sorted(self._groups)
        for width, wider in zip(widths, widths[1:], strict=False):
            if len(self._groups[width]) < self._rows[width]:
                self._groups[wider] += self._groups.pop(width)
                self._answers[wider] = max(self._answers[wider], self._answers[width])
        # For the widest there is no wider one: its batches are as small as what it has.
        widest = max(self._groups, default=None)
        if widest is not None:
            whole = len(self._groups[widest]) // multiple * multiple
            self._rows[widest] = min(self._rows[widest], max(whole, multiple))

    def _shuffled(self, epoch: int) -> list[tuple[int, list[_Place]]]:
        generator = np.random.default_rng([self._seed, epoch])
        order = []
        for width, places in sorted(self._groups.items()):
            mixed = [places[i] for i in generator.permutation(len(places))]
            rows = self._rows[width]
            parts = [mixed[begin : begin + rows] for begin in range(0, len(mixed), rows)]
            order += [(width, part) for part in parts if len(part) >= (self._least or rows)]
        return [order[i] for i in generator.permutation(len(order))]

    def _gather(self, width: int, places: Sequence[_Place]) -> Batch:
        rows, answer = len(places), self._answers[width]
        batch = Batch(
            tokens=np.zeros((rows, width), np.int32),
            start=np.zeros(rows, np.int32),
            length=np.zeros(rows, np.int32),
            temperature=np.zeros(rows, np.float32),
            features=np.zeros((rows, answer, self._width), np.float16),
            normalizer=np.zeros((rows, answer), np.float32),
        )
        for row, place in enumerate(places):
            shard = self._held[place.shard]
            prompt, answer = shard.text(place.row)
            begin = shard.answer_offsets[place.row]
            laws = slice(begin, begin + len(answer))
            batch.tokens[row, : len(prompt) + len(answer)] = np.concatenate([prompt, answer])
            batch.start[row], batch.length[row] = len(prompt), len(answer)
            batch.temperature[row] = shard.temperature[place.row]
            batch.features[row, : len(answer)] = shard.features[laws, self._tap]
            batch.normalizer[row, : len(answer)] = shard.normalizer[laws]
        return batch


def _width(length: int) -> int:
    step = max(1 << max(length // _PART - 1, 0).bit_length(), _LEAST_STEP)
    return -(-length // step) * step
