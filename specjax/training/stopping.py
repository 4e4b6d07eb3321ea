"""When a draft had better stop: replaying greedy decoding from what a draft guessed of a text.

A guess that will be refused costs a draft step, and one that is left out may have been right. How
sure a draft is tells some of it beforehand; where to draw the line is found on text held out.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from specjax import decoding

__all__ = ["Choice", "Counts", "Guesses", "choose", "replay"]

# Thresholds that are tried: quantiles of what was seen, from "never stop" on.
_QUANTILES = np.linspace(0, 0.9, 19)


@dataclasses.dataclass(frozen=True)
class Guesses:
    """What a draft guessed of the tokens of one text that the target wrote greedily.

    Attributes:
      right: bool[T], whether its most probable token was the text's.
      maximum: float32[T], that token's probability.
      entropy: float32[T], of its law, in nats.
    """

    right: np.ndarray
    maximum: np.ndarray
    entropy: np.ndarray


@dataclasses.dataclass(frozen=True)
class Counts:
    """What decoding the texts would have taken.

    Attributes:
      emitted: tokens.
      drafted: target steps by the number of tokens drafted for them, 0…K.
      draft_steps: passes of the draft.
    """

    emitted: int
    drafted: tuple[int, ...]
    draft_steps: int

    @property
    def tau(self) -> float:
        """Accepted length: tokens a target step."""
        return self.emitted / max(sum(self.drafted), 1)

    def speedup(self, cost: decoding.Cost) -> float:
        """Over plain decoding, at these costs, in passes of the widths that decoding has."""
        return self.emitted / max(cost.of_steps(self.drafted, self.draft_steps), 1e-9)


@dataclasses.dataclass(frozen=True)
class Choice:
    """A draft length with a line to stop at.

    Attributes:
      length: K.
      stop_below, stop_above: as `drafters.model` takes them; None never stops.
      tau: accepted length in the replay.
      speedup: predicted.
    """

    length: int
    stop_below: float | None
    stop_above: float | None
    tau: float
    speedup: float

    @property
    def is_whole(self) -> bool:
        """Whether every draft has all its tokens."""
        return self.stop_below is None and self.stop_above is None


def replay(
    texts: Sequence[Guesses],
    length: int,
    stop_below: float | None = None,
    stop_above: float | None = None,
) -> Counts:
    """Decodes the texts greedily from what was guessed.

    Exact in emitted tokens and target steps. Behind a wrong guess a draft goes on from its own
    tokens, of which nothing was recorded: what it drafts there, and so its draft steps and the
    widths of passes, is counted as if it were as sure as it was of the text.

    Args:
      texts: what was guessed.
      length: K.
      stop_below, stop_above: as `drafters.model` takes them.
    """
    emitted = draft_steps = 0
    steps = [0] * (length + 1)
    for text in texts:
        count = len(text.right)
        sure = np.ones(count, bool)
        if stop_below is not None:
            sure &= text.maximum >= stop_below
        if stop_above is not None:
            sure &= text.entropy <= stop_above
        # From each place, how many are drafted and how many of these are right.
        run, good = _runs(sure), _runs(sure & text.right)
        place = 0
        while place < count:
            # A draft does not know where the text will end.
            drafted = length if place + run[place] == count else min(int(run[place]), length)
            accepted = min(int(good[place]), length)
            draft_steps += min(drafted + 1, length)
            steps[drafted] += 1
            # The last step may offer more than the text has room for.
            step = min(accepted + 1, count - place)
            emitted, place = emitted + step, place + step
    return Counts(emitted, tuple(steps), draft_steps)


def choose(
    texts: Sequence[Guesses], cost: decoding.Cost, lengths: Sequence[int]
) -> tuple[Choice, list[Choice]]:
    """The draft length and line of the best predicted speedup, and all that were tried.

    Args:
      texts: of text held out.
      cost: of the machine.
      lengths: draft lengths to try, each with a line by maximum, by entropy, and without one.

    Raises:
      ValueError: no texts.
    """
    if not texts:
        raise ValueError("no greedy answers are held out; generate more, or hold out more")
    maxima = np.quantile(np.concatenate([text.maximum for text in texts]), _QUANTILES)
    entropies = np.quantile(np.concatenate([text.entropy for text in texts]), 1 - _QUANTILES)
    lines: list[tuple[float | None, float | None]] = [(None, None)]
    lines += [(float(line), None) for line in maxima] + [(None, float(line)) for line in entropies]
    tried = []
    for length in lengths:
        for line in lines:
            counts = replay(texts, length, *line)
            tried.append(Choice(length, *line, counts.tau, counts.speedup(cost)))
    return max(tried, key=lambda choice: choice.speedup), tried


def _runs(flags: np.ndarray) -> np.ndarray:
    """How many flags in a row are set from each place on."""
    runs, run = np.zeros(len(flags), int), 0
    for place in range(len(flags) - 1, -1, -1):
        run = run + 1 if flags[place] else 0
        runs[place] = run
    return runs
