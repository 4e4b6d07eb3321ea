"""How surprising it is that draws came as often as they did."""

import numpy as np

__all__ = ["LIMIT", "surprise"]

# Beyond it, counts are none of the law's: among a million of them, one would be by chance in ten
# million checks.
LIMIT = 30.0


def surprise(counts: np.ndarray, expected: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """−log of a bound on the probability of counts so far from what was expected.

    Bernstein's inequality, for sums of independent draws that need not have one law.

    Args:
      counts: any shape.
      expected, variance: of each count.
    """
    gap = np.abs(counts - expected)
    return gap**2 / (2 * (variance + gap / 3) + 1e-9)
