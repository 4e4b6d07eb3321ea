"""What decoding a text takes, given the text: steps and drafts, in the mean over what is drawn.

Given the text that comes out, i drafts of a step are accepted with the probability S_i that
`verification.survival` gives for the place where the step begins, exactly i with S_i − S_(i+1), and
the next step begins behind them and one token more. So where steps begin is a Markov chain over the
places of the text, and its sums need no draws.
"""

import dataclasses

import jax
import numpy as np

from specjax import verification
from specjax.analysis import intervals

__all__ = ["Counts", "Row", "begins", "by_agreement", "by_laws"]

Row = tuple[float, np.ndarray, np.ndarray]
"""Of one text: steps, and drafts tested and accepted at each depth, float64[K]."""

# Places are padded to a multiple of so many, so that texts of like length share a program.
_PLACES = 128
_survival = jax.jit(verification.survival, static_argnames=("rule", "length"))


@dataclasses.dataclass(frozen=True)
class Counts:
    """What decoding texts takes in the mean, given the texts; one entry a text.

    Attributes:
      tokens: int64[texts], of the answers.
      steps: float64[texts], target steps.
      tested: float64[texts, K], drafts tested at each depth: accepted, or the first rejected.
      accepted: float64[texts, K], of these the accepted.
    """

    tokens: np.ndarray
    steps: np.ndarray
    tested: np.ndarray
    accepted: np.ndarray

    @property
    def tau(self) -> intervals.Interval:
        """Accepted length τ: tokens a target step, the bonus token included."""
        return _ratio(self.tokens, self.steps)

    @property
    def accepted_length(self) -> intervals.Interval:
        """Drafts accepted a target step."""
        return _ratio(self.accepted.sum(axis=1), self.steps)

    @property
    def acceptance_rate(self) -> intervals.Interval:
        """α: accepted drafts over tested ones; NaN where none was."""
        return _ratio(self.accepted.sum(axis=1), self.tested.sum(axis=1))

    @property
    def by_position(self) -> list[intervals.Interval]:
        """The acceptance rate at each depth of the draft; NaN where nothing was tested."""
        return [_ratio(*columns) for columns in zip(self.accepted.T, self.tested.T, strict=True)]


def _ratio(above: np.ndarray, below: np.ndarray) -> intervals.Interval:
    return intervals.ratio(above.tolist(), below.tolist())


def begins(survival: np.ndarray) -> np.ndarray:
    """The probability that a step begins at each place of a text: float64[T].

    Args:
      survival: [T, K], S_i for i = 1…K of a step that begins there.
    """
    count, length = survival.shape
    exactly = -np.diff(survival.astype(np.float64), prepend=1, append=0, axis=1)
    found = np.zeros(count + length + 1)
    found[0] = 1
    for place in range(count):
        found[place + 1 : place + length + 2] += found[place] * exactly[place]
    return found[:count]


def by_agreement(accepted: np.ndarray, refused: np.ndarray, length: int) -> Row:
    """Of drafts that agree with the text as far as is told, cut to K = `length`.

    Args:
      accepted: int[T], levels that agree from each place on, through the text's end.
      refused: bool[T], whether another was tried behind them.
      length: K.
    """
    order = np.arange(length)[None]
    survival = accepted[:, None] > order
    tested = survival | ((accepted[:, None] == order) & refused[:, None])
    weight = begins(survival)
    return float(weight.sum()), weight @ tested, weight @ survival


def by_laws(rule: str, log_p: np.ndarray, log_q: np.ndarray, length: int) -> Row:
    """Of chains of K = `length` drawn from laws that follow from the text, in the mean over draws.

    Args:
      rule: `token`, `block` or `match`.
      log_p, log_q: float[T], natural logs of what both models give to the text's tokens; NaN in
        `log_q` where nothing is drafted.
      length: K, at least 1.

    Raises:
      ValueError: another rule.
    """
    count, present = len(log_p), ~np.isnan(log_q)
    possible = present
    if rule == "match":
        # A draft is to equal the target's draw, which is the text: it does with probability q.
        rule, log_p = "token", np.zeros_like(log_p)
    else:
        # A draft to which the target gives nothing is never accepted.
        possible = present & (log_p > -np.inf)
    log_p, log_q = np.where(possible, log_p, 0.0), np.where(possible, log_q, -np.inf)
    # Beyond its end nothing is accepted.
    beyond = length - 1 + -(count + length - 1) % _PLACES
    log_p, log_q = np.pad(log_p, (0, beyond)), np.pad(log_q, (0, beyond), constant_values=-np.inf)
    survival = np.asarray(_survival(rule, log_p[None], log_q[None], length)[0, :count], np.float64)
    before = np.pad(survival[:, :-1], ((0, 0), (1, 0)), constant_values=1)
    ahead = np.arange(count)[:, None] + np.arange(length)[None]
    weight = begins(survival)
    tested = weight @ (before * np.pad(present, (0, length - 1))[ahead])
    return float(weight.sum()), tested, weight @ survival
