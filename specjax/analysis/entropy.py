"""Acceptance by how open the next token is: sums over bins of entropy, which add up over texts."""

import numpy as np
from numpy import typing as npt

__all__ = ["EDGES", "binned"]

EDGES = (0.0, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0, 11.0)


def binned(entropy: npt.ArrayLike, acceptance: npt.ArrayLike) -> tuple[list[int], list[float]]:
    """Places of every bin, and the sum of their acceptance probabilities.

    Args:
      entropy: float[T], nats; what is beyond the last of `EDGES` falls in the last bin.
      acceptance: float[T], such as `Scores.overlap`; places with NaN are left out.
    """
    values, weights = np.asarray(entropy, np.float64), np.asarray(acceptance, np.float64)
    known = ~np.isnan(weights) & ~np.isnan(values)
    inside = np.clip(values[known], EDGES[0], EDGES[-1])
    counts = np.histogram(inside, EDGES)[0]
    sums = np.histogram(inside, EDGES, weights=weights[known])[0]
    return counts.tolist(), sums.tolist()
