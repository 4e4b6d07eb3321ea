"""Confidence intervals of what was measured on some prompts, by the bootstrap (Efron 1979).

Prompts are what is independent: tokens of one text are not. So each function takes one number, or
one pair of them, a prompt.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy import typing as npt
from scipy import stats

__all__ = ["FEWEST", "LEVEL", "Interval", "bootstrap", "mean", "median", "ratio"]

LEVEL = 0.95
# Of fewer, resampling says little more than the least and the most.
FEWEST = 5
_RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate with its interval at the level 0.95.

    Attributes:
      estimate: from all that was measured.
      low, high: percentiles of resampled estimates; NaN for fewer than `FEWEST` units.
    """

    estimate: float
    low: float
    high: float

    @classmethod
    def read(cls, told: Sequence[float | None]) -> "Interval":
        """From what `told` gave."""
        return cls(*(np.nan if value is None else value for value in told))

    def told(self) -> list[float | None]:
        """Estimate, low and high, ready for JSON, which knows no NaN."""
        values = (self.estimate, self.low, self.high)
        return [None if np.isnan(value) else value for value in values]

    def __str__(self) -> str:
        if np.isnan(self.estimate):
            return "–"
        if np.isnan(self.low):
            return f"{self.estimate:.2f}"
        return f"{self.estimate:.2f} ({self.low:.2f}–{self.high:.2f})"


def bootstrap(
    statistic: Callable[..., Any], *columns: npt.ArrayLike, resamples: int = _RESAMPLES
) -> Interval:
    """The percentile interval of a statistic, over units drawn anew with replacement.

    Args:
      statistic: `(*columns, axis) -> values`, along one axis.
      *columns: one number a unit each, of one length.
      resamples: how often units are drawn, always with the same seed.

    Raises:
      ValueError: no units, or columns of unlike lengths.
    """
    arrays = [np.asarray(column, np.float64) for column in columns]
    sizes = [len(array) for array in arrays]
    if len(set(sizes)) != 1 or not sizes[0]:
        raise ValueError(f"columns of {sizes} units; an interval needs equally many, and some")
    estimate = float(statistic(*arrays, axis=-1))
    if sizes[0] < FEWEST:
        return Interval(estimate, np.nan, np.nan)
    found = stats.bootstrap(
        arrays,
        statistic,
        n_resamples=resamples,
        paired=True,
        vectorized=True,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(estimate, float(found.low), float(found.high))


def mean(values: npt.ArrayLike) -> Interval:
    """Of the mean."""
    return bootstrap(np.mean, values)


def median(values: npt.ArrayLike) -> Interval:
    """Of the median."""
    return bootstrap(np.median, values)


def ratio(numerators: npt.ArrayLike, denominators: npt.ArrayLike) -> Interval:
    """Of the ratio of two sums, as τ is one of tokens and steps.

    Units whose denominator is 0 (nothing was tested) say nothing and are left out; without any
    others all is NaN.
    """
    above, below = (np.asarray(column, np.float64) for column in (numerators, denominators))
    if not np.any(below):
        return Interval(np.nan, np.nan, np.nan)
    return bootstrap(_ratio, above[below != 0], below[below != 0])


def _ratio(numerators: np.ndarray, denominators: np.ndarray, axis: int) -> Any:
    return np.sum(numerators, axis=axis) / np.sum(denominators, axis=axis)
