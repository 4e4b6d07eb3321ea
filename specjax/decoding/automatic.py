"""The draft length chosen on the way: by the acceptance so far, and what steps cost.

Leviathan et al. 2023 (arXiv 2211.17192, theorem 3.8) give the speedup of a draft length K where
every draft is accepted with one probability; measured acceptance at each position beats that model,
since later drafts are accepted less. A decode goes in pieces of a few steps, each with the length
that promises most; a length is a program of its own, and a few are enough.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax import types
from specjax.decoding import generation, plain, requests, speculative, start
from specjax.decoding import state as states

__all__ = [
    "AutomaticStream",
    "Cost",
    "best_length",
    "decode_automatically",
    "generate_automatically",
]

# What is believed before anything is measured: as many drafts, of which this part is accepted.
_PRIOR_COUNT = 4.0
_PRIOR_RATE = 0.6


@dataclasses.dataclass(frozen=True)
class Cost:
    """What steps cost on a machine, in plain steps of the target.

    Attributes:
      draft: c, a drafted token.
      passes: v by width: pairs (T, v(T)), T rising from 1; between them v is a straight line, and
        beyond the last it goes on as before it.
      overhead: what a step costs beside drafts and pass, for every node that the pass is wide; one
        that drafted nothing is a plain step.

    Raises:
      ValueError: a cost below 0, or widths that do not rise from 1.
    """

    draft: float
    passes: tuple[tuple[int, float], ...]
    overhead: float = 0.0

    def __post_init__(self):
        widths = [width for width, _ in self.passes]
        if not widths or widths[0] != 1 or any(np.diff(widths) <= 0):
            raise ValueError(f"passes={self.passes}: widths must rise from 1")
        if self.draft < 0 or self.overhead < 0 or min(cost for _, cost in self.passes) <= 0:
            raise ValueError(f"{self}: a cost must not be below 0")

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> "Cost":
        """What `dataclasses.asdict` told, as it comes out of JSON."""
        passes = tuple((int(width), float(cost)) for width, cost in told["passes"])
        return cls(told["draft"], passes, told["overhead"])

    def of_pass(self, width: int) -> float:
        """v(T), a pass of the target over T tokens."""
        if len(self.passes) == 1:
            return self.passes[0][1]
        right = next((i for i, (w, _) in enumerate(self.passes) if w >= width), -1)
        right = max(right % len(self.passes), 1)
        (x, low), (y, high) = self.passes[right - 1], self.passes[right]
        return low + (high - low) * (width - x) / (y - x)

    def of_step(self, drafted: int, width: int) -> float:
        """A step of so many passes of the drafter, whose own pass has this width."""
        rest = 1.0 if width == 1 else self.of_pass(width) + self.overhead * (width - 1)
        return drafted * self.draft + rest

    def of_steps(self, drafted: Sequence[int], draft_steps: int, is_chain: bool = True) -> float:
        """Steps of a decode together.

        Args:
          drafted: steps by the number of nodes drafted for them, 0…N.
          draft_steps: passes of the drafter.
          is_chain: whether drafts are chains, of which a part may be passed alone.
        """
        widths = speculative.pass_widths(len(drafted) - 1, is_chain)
        took = draft_steps * self.draft
        for nodes, steps in enumerate(drafted):
            width = next(width for width in widths if width > nodes)
            took += steps * self.of_step(0, width)
        return took

    def speedup(self, acceptance: Sequence[float], length: int) -> float:
        """Over plain decoding, with drafts of K = `length` tokens; 1 for 0.

        Args:
          acceptance: of the draft at each position, given that those before it were accepted; the
            last one stands for all later positions.
          length: K.
        """
        rates = [acceptance[min(i, len(acceptance) - 1)] for i in range(length)]
        emitted = 1.0 + float(np.sum(np.cumprod(rates)))
        if length == 0:
            return 1.0
        return emitted / self.of_step(length, length + 1)


def best_length(
    cost: Cost, tested: np.ndarray, accepted: np.ndarray, lengths: Sequence[int]
) -> int:
    """The length of the best expected speedup, after so many drafts tested and accepted.

    Args:
      cost: of the machine.
      tested, accepted: int[D], as in `Statistics`, summed over rows.
      lengths: to choose among.
    """
    rates, before = [], _PRIOR_RATE
    for drafts, good in zip(tested, accepted, strict=True):
        # A position that few drafts came to is held to be as good as the one before it.
        before = float((good + _PRIOR_COUNT * before) / (drafts + _PRIOR_COUNT))
        rates.append(before)
    return max(lengths, key=lambda length: cost.speedup(rates, length))


def generate_automatically(
    target: types.LanguageModel,
    choices: Mapping[int, types.Drafter],
    prompts: requests.Prompts,
    cost: Cost,
    *,
    rule: str | types.VerificationRule | None = None,
    steps: int = 8,
    **options: Any,
) -> states.DecodeResult:
    """Decodes as `generate` does, with draft lengths chosen on the way.

    The text has the law of plain decoding: a length hangs on what was accepted before its draft is
    made, never on the draft. It hangs on the acceptance of all rows and on the costs, though, so
    under a rule that draws otherwise for another length (every one but `match` and `coupled`, at a
    temperature) the text of one key is another in another batch, or at other costs.

    Args:
      target: the model whose law is kept.
      choices: drafters by draft length K, alike but for it, so that one's memory serves the others.
      prompts: as in `generate`.
      cost: of the machine.
      rule: as in `generate`.
      steps: target steps between choices.
      **options: see `init`.

    Returns:
      A `DecodeResult` whose statistics are of the depth of the longest choice.

    Raises:
      ValueError: as `generate`; no choices, or drafters whose memories differ.
    """
    longest = _longest(choices)
    # First of all, since a state to go on from is consumed by what follows.
    _check_chains(target, choices, rule)
    request, state = start.init(target, longest, prompts, **options)
    return decode_automatically(target, choices, request, state, cost, rule, steps)


def decode_automatically(
    target: types.LanguageModel,
    choices: Mapping[int, types.Drafter],
    request: states.Request,
    state: states.DecodeState,
    cost: Cost,
    rule: str | types.VerificationRule | None = None,
    steps: int = 8,
) -> states.DecodeResult:
    """As `generate_automatically`, after an `init` with the longest of the choices.

    Args:
      state: consumed.
      The others: as there.
    """
    stream = AutomaticStream(target, choices, request, state, cost, rule, steps)
    for _ in stream:
        pass
    return stream.result


class AutomaticStream(generation.TokenStream):
    """A `TokenStream` that chooses the draft length anew before it yields.

    Args:
      target, choices, request, cost, rule, steps: as in `decode_automatically`.
      state: consumed.
    """

    def __init__(
        self,
        target: types.LanguageModel,
        choices: Mapping[int, types.Drafter],
        request: states.Request,
        state: states.DecodeState,
        cost: Cost,
        rule: str | types.VerificationRule | None = None,
        steps: int = 8,
    ):
        for drafter in (_longest(choices), *choices.values()):
            start.check_state(drafter, state)
        _check_chains(target, choices, rule)
        super().__init__(target, _longest(choices), request, state, rule, steps)
        self._choices, self._cost, self._depth = dict(choices), cost, max(choices)
        # A rule left open is picked for each length by itself: they draft alike.
        self._asked, self._steps = rule, steps

    def _advance(self) -> None:
        counts = (self._statistics.tested, self._statistics.accepted)
        tested, accepted = (np.sum(np.asarray(count), axis=0) for count in counts)
        length = best_length(self._cost, tested, accepted, sorted(self._choices))
        self._state, made = generation.advance(
            self._models[0],
            self._choices[length],
            self._request,
            self._state,
            self._asked,
            self._steps,
        )
        self._statistics = jax.tree.map(jnp.add, self._statistics, _deepen(made, self._depth))


def _longest(choices: Mapping[int, types.Drafter]) -> types.Drafter:
    if not choices or min(choices) < 1:
        raise ValueError(f"choices={sorted(choices)} must be some draft lengths of at least 1")
    for length, drafter in choices.items():
        if drafter.nodes != length or drafter is plain.NOTHING:
            raise ValueError(
                f"choices[{length}] drafts {drafter.nodes} tokens; give each drafter its length"
            )
    return choices[max(choices)]


def _check_chains(
    target: types.LanguageModel,
    choices: Mapping[int, types.Drafter],
    rule: str | types.VerificationRule | None,
) -> None:
    for length, drafter in choices.items():
        depth = generation.form_of(target, drafter, rule).depth
        if depth != length:
            raise ValueError(
                f"choices[{length}] drafts a tree of depth {depth}; only chains have a length to "
                "choose"
            )


def _deepen(statistics: states.Statistics, depth: int) -> states.Statistics:
    """The same counts, for drafts of up to `depth`."""
    more = ((0, 0), (0, depth - statistics.tested.shape[1]))
    return dataclasses.replace(
        statistics,
        tested=jnp.pad(statistics.tested, more),
        accepted=jnp.pad(statistics.accepted, more),
        histogram=jnp.pad(statistics.histogram, more),
        drafted=jnp.pad(statistics.drafted, more),
    )
