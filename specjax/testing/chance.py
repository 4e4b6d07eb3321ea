"""How surprising it is that draws came as often as they did."""

import math

import numpy as np

__all__ = ["LIMIT", "LIMIT_ALONE", "surprise"]

# Beyond it, counts are none of the law's: among a million of them, one would be by chance in ten
# million checks.
LIMIT = 30.0
# The same for a count that is alone in its check.
LIMIT_ALONE = LIMIT - math.log(1e6)


def surprise(counts: np.ndarray, expected: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """−log of a bound on the probability of counts so far from what was expected.

    Bernstein's inequality, for sums of draws that need not have one law, each of which is told
    before it is drawn. What cannot happen and did is an infinite surprise.

    Args:
      counts: any shape.
      expected, variance: of each count.
    """
    gap = np.abs(counts - expected)
    surprise = gap**2 / (2 * (variance + gap / 3) + 1e-9)
    return np.where((expected == 0) & (counts > 0), np.inf, surprise)
