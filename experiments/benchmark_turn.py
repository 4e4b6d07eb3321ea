"""One turn of conversations by one method: prefilled, compiled off the clock, timed.

A turn goes on from the state that the one before left. Before a timed decode some steps of the same
decode are streamed, for the time between tokens: a step's is spread over those that it brought.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from experiments import loop_program, methods, prompt_files
from specjax import checkpoints, decoding, types

__all__ = [
    "CHUNK",
    "Conversation",
    "Task",
    "Timed",
    "capacity_of",
    "compiled",
    "hash_of",
    "options",
    "unit_of",
]

# Capacities, so that a run compiles a handful of programs.
_CAPACITIES = (512, 1024, 2048, 4096, 8192)
CHUNK = 64
_STREAMED = 24

_State = TypeVar("_State")


@dataclasses.dataclass(frozen=True)
class Task:
    """Prompts to be decoded together, by every method in turn.

    Attributes:
      prompts: one a row, with equally many turns.
      first: the first turn of each, as token ids.
      new: how many are measured; those behind them fill up the batch.
      temperature: 0 is greedy.
      max_new_tokens: of every turn.
      context: tokens that were put before the question, about.
      capacity: text slots for the whole conversation.
    """

    prompts: tuple[prompt_files.Prompt, ...]
    first: tuple[list[int], ...]
    new: int
    temperature: float
    max_new_tokens: int
    context: int
    capacity: int

    @property
    def batch(self) -> int:
        """Rows."""
        return len(self.prompts)

    @property
    def cell(self) -> dict[str, Any]:
        """What its records share."""
        return {
            "batch": self.batch,
            "temperature": self.temperature,
            "max_new_tokens": self.max_new_tokens,
            "context": self.context,
        }

    def unit(self, row: int) -> str:
        """Of a row's records."""
        return unit_of(self.prompts[row].key, self.cell)


@dataclasses.dataclass
class Conversation:
    """One method's side of a task.

    Attributes:
      name: of the method.
      decoder: the method.
      before: where the last turn left it.
      rows: the tokens that the next turn appends.
      texts: all tokens so far, the next turn's among them.
    """

    name: str
    decoder: methods.Decoder
    before: decoding.DecodeState | None
    rows: list[list[int]]
    texts: list[list[int]]

    def start(
        self, options: dict[str, Any]
    ) -> tuple[decoding.Request, decoding.DecodeState, float]:
        """The turn's prompt run through the models, and the seconds it took."""
        before = jax.block_until_ready(_copied(self.before))
        began = time.perf_counter()
        request, state = decoding.init(
            self.decoder.target, self.decoder.drafter, self.rows, state=before, **options
        )
        jax.block_until_ready(state)
        return request, state, time.perf_counter() - began

    def decode(self, asked: dict[str, Any]) -> tuple["Timed", decoding.DecodeState]:
        """One timed decode, and where it left the method."""
        request, state, prefill_seconds = self.start(asked)
        gaps: list[list[float]] = [[] for _ in self.rows]
        stream = self.decoder.stream(request, jax.block_until_ready(_copied(state)))
        last = time.perf_counter()
        for _, new in zip(range(_STREAMED), stream, strict=False):
            now = time.perf_counter()
            for of_row, tokens in zip(gaps, new, strict=True):
                of_row += [(now - last) / max(len(tokens), 1)] * len(tokens)
            last = now
        began = time.perf_counter()
        result = self.decoder.decode(request, state)
        jax.block_until_ready(result.tokens)
        seconds = time.perf_counter() - began
        counts = jax.tree.map(np.asarray, result.statistics)
        answers, reasons = result.new_tokens, result.finish_reasons
        return Timed(answers, reasons, counts, prefill_seconds, seconds, gaps), result.state

    def go_on(
        self,
        bundle: checkpoints.Bundle,
        messages: Sequence[str],
        answers: list[list[int]],
        state: decoding.DecodeState,
    ) -> None:
        """Appends the user's next messages, one a row, behind the answers."""
        self.before = state
        self.rows = [
            bundle.tokenizer.follow_up(message, answer)
            for message, answer in zip(messages, answers, strict=True)
        ]
        self.texts = [
            [*text, *answer, *new]
            for text, answer, new in zip(self.texts, answers, self.rows, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class Timed:
    """A turn decoded by one method, once.

    Attributes:
      answers: new token ids a row, through the token that ended it.
      reasons: why each ended.
      counts: of every row.
      prefill_seconds, seconds: of the batch; of the prompts' way through the models, and after it.
      gaps: of every row, seconds a token, in the first steps of the decode.
    """

    answers: list[list[int]]
    reasons: list[str]
    counts: decoding.Statistics
    prefill_seconds: float
    seconds: float
    gaps: list[list[float]]


def options(
    rows: Sequence[Sequence[int]], temperature: float, max_new_tokens: int, seed: int
) -> dict[str, Any]:
    """What `decoding.init` is told of prompts: keys that hang on them, a few capacities."""
    key = jax.random.key(seed)
    return {
        "keys": jnp.stack([jax.random.fold_in(key, hash_of(tokens)) for tokens in rows]),
        "max_new_tokens": max_new_tokens,
        "sampling": types.Sampling(temperature),
        "capacity": capacity_of(max(map(len, rows)) + max_new_tokens),
        "chunk": CHUNK,
    }


def compiled(
    side: Conversation, asked: dict[str, Any], warm: dict[tuple, int | None]
) -> dict[str, Any]:
    """Compiles what a turn runs, once a shape: seconds, and the bytes that the loop's takes.

    The seconds hold a prompt's way through the models and two tokens.
    """
    shape = (side.name, len(side.rows), asked["capacity"], side.before is not None)
    began = time.perf_counter()
    is_new = shape not in warm
    if is_new:
        short = asked | {"max_new_tokens": 2}
        request, state, _ = side.start(short)
        decoder = side.decoder
        warm[shape] = loop_program.peak_bytes(
            decoder.target, decoder.drafter, request, state, decoder.rule
        )
        decoder.warm([row[-2:] for row in side.rows], short)
        jax.block_until_ready(decoder.decode(request, state).tokens)
    return {
        "compile_seconds": time.perf_counter() - began if is_new else 0.0,
        "peak_bytes": warm[shape],
    }


def _copied(state: _State) -> _State:
    """A decode consumes its state."""
    return jax.tree.map(jnp.copy, state)


def unit_of(prompt: str, cell: Mapping[str, Any]) -> str:
    """A prompt, by its key, in a cell: what is measured as a whole or not at all."""
    names = ("batch", "temperature", "max_new_tokens", "context")
    return "/".join([prompt, *(str(cell[name]) for name in names)])


def hash_of(tokens: Sequence[int]) -> int:
    """A number that a prompt has in whatever batch it stands: 31 bits."""
    value = 0
    for token in tokens:
        value = (value * 1000003 + token) % (1 << 31)
    return value


def capacity_of(needed: int) -> int:
    """Text slots for so many tokens, one of a few sizes."""
    return next((size for size in _CAPACITIES if size >= needed), needed)
