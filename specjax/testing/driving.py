"""Drives a drafter through two turns of decoding, and shows what it drafts on the way.

Rows run under `script.rule`, so that each meets no, partial and full acceptance, ends inside a
block, steps in which it has finished, and a turn that it sits out. The drafter runs inside one that
records its drafts, so that the one compiled step both decodes and shows.
"""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from specjax import decoding, types
from specjax.testing import script

__all__ = ["Driver", "Moment", "Row", "rows_of"]

_CHUNK = 4
_TEMPERATURES = (1.0, 0.0, 0.7, 1.4)


@dataclasses.dataclass(frozen=True)
class Row:
    """One row through two turns.

    Attributes:
      turns: tokens given in each turn.
      limits: most tokens wanted in each.
      temperature: of its law.
      eos: tokens that end it.
      key: index of its request key.
    """

    turns: tuple[list[int], list[int]]
    limits: tuple[int, int]
    temperature: float
    eos: tuple[int, ...]
    key: int


def rows_of(prompts: Sequence[Sequence[int]], depth: int) -> list[Row]:
    """A row for each prompt; the second goes on without new tokens, the third sits a turn out.

    Args:
      prompts: token ids.
      depth: D, of the drafts; limits follow it, so that rows take unequal numbers of steps.
    """
    reach = depth + 2
    later = (list(prompts[0][:3]), [], [], list(prompts[-1][:1]))
    limits = (3 * reach, reach, 0, 2 * reach)
    return [
        Row(
            turns=(list(prompt), later[index % 4]),
            limits=(1 + index % 4 * 2 * reach, limits[index % 4]),
            temperature=_TEMPERATURES[index % 4],
            eos=(prompt[0],) if index % 2 else (),
            key=index,
        )
        for index, prompt in enumerate(prompts)
    ]


@dataclasses.dataclass(frozen=True)
class Moment:
    """A state on the way.

    Attributes:
      turn, step: how it was reached.
      request, state: of the decode.
      draft: what every row would draft next, those that have finished included; on the host.
      info: of the step that led here, None at the start of a turn.
    """

    turn: int
    step: int
    request: decoding.Request
    state: decoding.DecodeState
    draft: types.Draft
    info: decoding.StepInfo | None

    @property
    def name(self) -> str:
        """For complaints."""
        return f"turn {self.turn + 1}, after {self.step} steps"


class Driver:
    """One drafter over one target; its programs are compiled once for each number of rows.

    Args:
      target, drafter: as given to `check_drafter`.
      form: what the drafter drafts, abstractly.
      keys: typed keys, to which the rows' indices refer.
      capacity: slots of a text.
    """

    def __init__(self, target, drafter, form, keys, capacity):
        self.target, self.drafter = target, _recording(drafter, form)
        self.keys, self.capacity = keys, capacity
        self.traces = collections.Counter()
        self._step = jax.jit(self._counted_step)

    def _counted_step(self, target, drafter, request, state):
        self.traces[state.tokens.shape] += 1
        return decoding.step(target, drafter, request, state, script.rule)

    def options(self, rows: Sequence[Row], turn: int) -> dict[str, Any]:
        """What `decoding.init` is to be told of these rows."""
        return {
            "keys": self.keys[jnp.asarray([row.key for row in rows])],
            "max_new_tokens": [row.limits[turn] for row in rows],
            "sampling": types.Sampling(temperature=[row.temperature for row in rows]),
            "eos": [list(row.eos) for row in rows],
            "chunk": _CHUNK,
        }

    def begin(self, rows: Sequence[Row]) -> tuple[decoding.Request, decoding.DecodeState]:
        """Request and state after the prompts."""
        prompts = [row.turns[0] for row in rows]
        options = self.options(rows, 0)
        return decoding.init(self.target, self.drafter, prompts, capacity=self.capacity, **options)

    def fresh(self, moment: Moment) -> types.Draft:
        """What the moment's texts would draft after a prefill, on the host.

        In slots of another number, which beyond the text hold other tokens: neither means anything.
        """
        tokens, length = np.asarray(moment.state.tokens), np.asarray(moment.state.length)
        beyond = np.arange(tokens.shape[1])[None] >= length[:, None]
        tokens = np.where(beyond, (tokens + 1) % self.target.vocab_size, tokens)
        _, state = decoding.init(
            self.target,
            self.drafter,
            tokens,
            lengths=length,
            keys=moment.request.keys,
            max_new_tokens=1,
            capacity=self.capacity + 3,
            chunk=_CHUNK,
        )
        return self.draft(moment.request, state)

    def moments(self, rows: Sequence[Row], turns: int = 2) -> Iterator[Moment]:
        """Every state of the turns; the last of a turn is consumed when the next is asked for."""
        request, state = self.begin(rows)
        for turn in range(turns):
            if turn:
                request, state = decoding.init(
                    self.target,
                    self.drafter,
                    [row.turns[turn] for row in rows],
                    state=state,
                    **self.options(rows, turn),
                )
            step, info = 0, None
            while True:
                yield Moment(turn, step, request, state, self.draft(request, state), info)
                if not np.any(np.asarray(state.finish) == decoding.FinishReason.RUNNING):
                    break
                state, info = self._step(self.target, self.drafter, request, state)
                step += 1

    def draft(self, request: decoding.Request, state: decoding.DecodeState) -> types.Draft:
        """The next draft of all rows, on the host; the state is not consumed."""
        after = self.step_of_all(self.target, self.drafter.params, request, state)
        return jax.device_get(after.drafter.draft)

    def step_of_all(
        self,
        target: types.LanguageModel,
        drafter: types.Drafter,
        request: decoding.Request,
        state: decoding.DecodeState,
    ) -> decoding.DecodeState:
        """A step in which every row takes part, be it finished or not, with these weights."""
        running = dataclasses.replace(state, finish=jnp.zeros_like(state.finish))
        recording = dataclasses.replace(self.drafter, params=drafter)
        return self._step(target, recording, request, running)[0]

    def state_forms(self, batch: int, capacity: int) -> list[tuple[int, ...]]:
        """Shapes of the leaves of the drafter's own state."""

        def init(drafter):
            return drafter.init(drafter.params, batch, capacity)

        return [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(init, self.drafter.params))]


@struct.dataclass
class _Recorded:
    """A drafter's own state, and the draft it made last."""

    own: Any
    draft: types.Draft


@dataclasses.dataclass(frozen=True)
class _Init:
    """`init` of a recording drafter: the draft made last is of zeros."""

    structure: Any
    forms: tuple[tuple[tuple[int, ...], str], ...]

    def __call__(self, drafter, batch, capacity):
        leaves = [jnp.zeros((batch, *shape), dtype) for shape, dtype in self.forms]
        own = drafter.init(drafter.params, batch, capacity)
        return _Recorded(own, jax.tree.unflatten(self.structure, leaves))


def _prefill(drafter, state, *given):
    return dataclasses.replace(state, own=drafter.prefill(drafter.params, state.own, *given))


def _propose(drafter, state, context, keys):
    draft, own = drafter.propose(drafter.params, state.own, context, keys)
    # Weakly typed leaves would give the recording another form than its beginning.
    made = jax.tree.map(lambda leaf: jax.lax.convert_element_type(leaf, leaf.dtype), draft)
    return draft, _Recorded(own, made)


def _update(drafter, state, *given):
    return dataclasses.replace(state, own=drafter.update(drafter.params, state.own, *given))


def _recording(drafter: types.Drafter, form: types.Draft) -> types.Drafter:
    """The same drafter, whose state also holds its last draft; its params are the drafter."""
    leaves, structure = jax.tree.flatten(form)
    forms = tuple((leaf.shape[1:], leaf.dtype.name) for leaf in leaves)
    return dataclasses.replace(
        drafter,
        params=drafter,
        init=_Init(structure, forms),
        prefill=_prefill,
        propose=_propose,
        update=_update,
    )
