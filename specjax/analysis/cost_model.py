"""What acceptance is worth: tokens a step, and the speedup they make at what steps cost.

Leviathan et al. 2023 (arXiv 2211.17192): with every draft accepted independently with probability
α, a step emits τ(K) = (1 − α^(K+1)) / (1 − α) tokens (equation 1), and the speedup is
τ / (K·c + v(K+1)) with c the cost of a drafted token and v(T) of a target's pass over T tokens,
both in plain steps (theorem 3.8 has v = 1). Acceptance measured at each position beats that model.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from specjax import decoding

__all__ = ["Best", "best", "free_width", "tokens_per_step"]

_LENGTHS = range(1, 16)


@dataclasses.dataclass(frozen=True)
class Best:
    """A draft length and what it promises.

    Attributes:
      length: K; 0 where no draft pays.
      tau: tokens a step.
      speedup: over plain decoding.
    """

    length: int
    tau: float
    speedup: float


def tokens_per_step(acceptance: float | Sequence[float], length: int) -> float:
    """τ of drafts of K = `length` tokens, the bonus token included.

    Args:
      acceptance: α, one for all positions; or one a position, given that those before it were
        accepted, of which the last stands for all later ones.
      length: K.
    """
    rates = np.atleast_1d(np.asarray(acceptance, float))
    rates = rates[np.minimum(np.arange(length), len(rates) - 1)]
    return 1.0 + float(np.sum(np.cumprod(rates)))


def best(
    acceptance: float | Sequence[float],
    cost: decoding.Cost,
    lengths: Iterable[int] = _LENGTHS,
) -> Best:
    """The draft length of the largest expected speedup; length 0 where none reaches 1.

    Args:
      acceptance: as in `tokens_per_step`.
      cost: of the machine.
      lengths: to choose among.
    """
    rates = np.atleast_1d(np.asarray(acceptance, float)).tolist()
    options = [
        Best(length, tokens_per_step(rates, length), cost.speedup(rates, length))
        for length in (0, *lengths)
    ]
    return max(options, key=lambda option: option.speedup)


def free_width(draft: float) -> decoding.Cost:
    """Costs where a pass of any width is as quick as one token's (v = 1), as papers assume.

    Args:
      draft: c, a drafted token, in plain steps.
    """
    return decoding.Cost(draft, ((1, 1.0),))
