"""The pytrees of the decoding loop: the request, the carry, what a step reports, and the result.

The request is constant through a decode; the state is the loop's whole carry; statistics leave
through `StepInfo` and never change decoding.
"""

import enum
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from specjax import types

__all__ = [
    "DecodeResult",
    "DecodeState",
    "FinishReason",
    "Request",
    "Statistics",
    "StepInfo",
    "no_statistics",
    "record",
]


class FinishReason(enum.IntEnum):
    """Why a row stopped.

    An end-of-sequence token or a stop sequence beats a limit at the same token. `DEAD_END`: the
    constraint allows no token after the text; such a row goes on only with new tokens appended.
    `EMPTY`: a prompt of no tokens, which only a trace lets through.
    """

    RUNNING = 0
    EOS = 1
    STOP = 2
    LENGTH = 3
    CACHE_FULL = 4
    DEAD_END = 5
    EMPTY = 6


@struct.dataclass
class Request:
    """What is asked for, one row a prompt; constant through a decode.

    Attributes:
      keys: typed keys[B]; only ever folded.
      sampling: fields one value a row.
      limit: int32[B], text length, prompt included, at which a row stops.
      eos: int32[B, E], end-of-sequence tokens; −1, which no token is, fills unequal rows.
      stop: int32[B, Q, W], stop sequences, ending at the last column.
      stop_length: int32[B, Q], their lengths; 0 for none.
    """

    keys: jax.Array
    sampling: types.Sampling
    limit: jax.Array
    eos: jax.Array
    stop: jax.Array
    stop_length: jax.Array


@struct.dataclass
class DecodeState:
    """The carry of the loop; the target's cache holds every committed token but the last.

    Attributes:
      tokens: int32[B, S], prompt and answer; only the first `length` count.
      length: int32[B], committed tokens.
      start: int32[B], where the answer begins.
      stop_from: int32[B], where the model last began to write, before which no stop sequence may
        begin; earlier than `start` in a row that went on without new tokens.
      finish: int32[B], a `FinishReason`.
      cache: the target's.
      drafter: the drafter's state.
      room: slots that the caches have beyond S, for a draft and its root, or for the last chunk of
        a prefill.
    """

    tokens: jax.Array
    length: jax.Array
    start: jax.Array
    stop_from: jax.Array
    finish: jax.Array
    cache: Any
    drafter: Any
    room: int = struct.field(pytree_node=False)


@struct.dataclass
class StepInfo:
    """What one step did, for statistics and for curious callers.

    Attributes:
      tokens: int32[B, D+1], the tokens emitted; only the first `emitted` count.
      log_probs: [B, D+1, V], the target's warped law of each of them: what a speculative decoder
        proposes from when it drafts for a larger target; None unless `step` was asked for it.
      emitted: int32[B], 0 for a row that had finished.
      accepted: int32[B], drafted tokens among them.
      tested: bool[B, D], whether a draft at this depth was accepted or was the first rejected.
      drafted: int32[B], nodes proposed.
      draft_steps: int32[B], the depth of the deepest of them.
      active: bool[B], rows that took part.
    """

    tokens: jax.Array
    log_probs: jax.Array | None
    emitted: jax.Array
    accepted: jax.Array
    tested: jax.Array
    drafted: jax.Array
    draft_steps: jax.Array
    active: jax.Array


@struct.dataclass
class Statistics:
    """Counts of a decode, per row. Prefill is not counted, nor is anything past the end of a text.

    Attributes:
      target_steps: int32[B], passes of the target.
      emitted: int32[B], new tokens.
      drafted: int32[B, N+1], steps by the number of nodes proposed.
      draft_steps: int32[B], levels proposed: what a drafter that goes level by level takes for
        them. A level that it looked at and left out, being unsure, is not among them.
      tested: int32[B, D], drafts tested at each depth: accepted, or the first rejected.
      accepted: int32[B, D], of these the accepted.
      histogram: int32[B, D+1], steps by the number of drafts accepted.
    """

    target_steps: jax.Array
    emitted: jax.Array
    drafted: jax.Array
    draft_steps: jax.Array
    tested: jax.Array
    accepted: jax.Array
    histogram: jax.Array

    @property
    def nodes_drafted(self) -> jax.Array:
        """Nodes proposed: int32[B]."""
        return self.drafted @ jnp.arange(self.drafted.shape[1], dtype=jnp.int32)

    @property
    def tau(self) -> float:
        """Accepted length τ: emitted tokens per target step, the bonus token included."""
        return int(jnp.sum(self.emitted)) / max(int(jnp.sum(self.target_steps)), 1)

    @property
    def acceptance_rate(self) -> float:
        """α: accepted drafts over tested (accepted, or the first rejected); NaN if none was."""
        tested = int(jnp.sum(self.tested))
        return int(jnp.sum(self.accepted)) / tested if tested else float("nan")


def no_statistics(batch: int, depth: int, nodes: int) -> Statistics:
    """All counts 0, for drafts of N nodes in D levels."""
    return Statistics(
        target_steps=jnp.zeros((batch,), jnp.int32),
        emitted=jnp.zeros((batch,), jnp.int32),
        drafted=jnp.zeros((batch, nodes + 1), jnp.int32),
        draft_steps=jnp.zeros((batch,), jnp.int32),
        tested=jnp.zeros((batch, depth), jnp.int32),
        accepted=jnp.zeros((batch, depth), jnp.int32),
        histogram=jnp.zeros((batch, depth + 1), jnp.int32),
    )


def record(statistics: Statistics, info: StepInfo) -> Statistics:
    """Adds one step."""
    depth, nodes = info.tested.shape[1], statistics.drafted.shape[1] - 1
    level = jnp.arange(depth + 1, dtype=jnp.int32)[None]
    accepted = level[:, :depth] < info.accepted[:, None]

    def at(values, size):
        here = values[:, None] == jnp.arange(size + 1, dtype=jnp.int32)[None]
        return (here & info.active[:, None]).astype(jnp.int32)

    return Statistics(
        target_steps=statistics.target_steps + info.active.astype(jnp.int32),
        emitted=statistics.emitted + info.emitted,
        drafted=statistics.drafted + at(info.drafted, nodes),
        draft_steps=statistics.draft_steps + info.draft_steps,
        tested=statistics.tested + info.tested.astype(jnp.int32),
        accepted=statistics.accepted + accepted.astype(jnp.int32),
        histogram=statistics.histogram + at(info.accepted, depth),
    )


@struct.dataclass
class DecodeResult:
    """What a decode gave.

    Attributes:
      tokens: int32[B, S], prompt and answer.
      start, length: int32[B]; the answer of row b is `tokens[b, start[b]:length[b]]`, through an
        end-of-sequence token or stop sequence and no further.
      finish: int32[B], a `FinishReason`.
      statistics: counts.
      state: from which decoding can go on (`generate(…, state=result.state)`, which consumes it).
    """

    tokens: jax.Array
    start: jax.Array
    length: jax.Array
    finish: jax.Array
    statistics: Statistics
    state: DecodeState

    @property
    def new_tokens(self) -> list[list[int]]:
        """The answers, on the host."""
        tokens, start, length = (np.asarray(x) for x in (self.tokens, self.start, self.length))
        return [row[a:b].tolist() for row, a, b in zip(tokens, start, length, strict=True)]

    @property
    def finish_reasons(self) -> list[str]:
        """`eos`, `stop`, `length`, `cache_full`, `dead_end` or `empty` for each row, on the host.

        A result taken in the middle of a stream may also say `running`.
        """
        return [FinishReason(int(code)).name.lower() for code in np.asarray(self.finish)]
