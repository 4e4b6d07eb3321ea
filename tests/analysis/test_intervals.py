"""Bootstrap intervals against the distributions that resampling has in closed form."""

import numpy as np
import pytest
from scipy import stats

from specjax.analysis import intervals

VALUES = np.random.default_rng(3).exponential(size=25)


def test_of_a_mean():
    """Resampled means have the variance s²/n, and are nearly normal for many units."""
    values = np.random.default_rng(4).normal(size=400)
    found = intervals.mean(values)
    half = stats.norm.ppf(0.975) * np.std(values) / np.sqrt(len(values))
    assert found.estimate == pytest.approx(np.mean(values))
    np.testing.assert_allclose(
        [found.low, found.high], np.mean(values) + np.array([-half, half]), atol=0.012
    )


def test_of_a_median():
    """Of n = 2m + 1 units it is at most the k-th least if m + 1 draws or more fall there."""
    n = len(VALUES)
    at_most = stats.binom.sf(n // 2, n, np.arange(n + 1) / n)
    ordered = np.sort(VALUES)
    low, high = (ordered[np.searchsorted(at_most[1:], tail)] for tail in (0.025, 0.975))
    found = intervals.median(VALUES)
    assert found.estimate == np.median(VALUES)
    # A percentile may fall between two values where a tail lies near a step.
    steps = np.searchsorted(ordered, [low, high])
    assert ordered[steps[0] - 1] <= found.low <= ordered[steps[0] + 1]
    assert ordered[steps[1] - 1] <= found.high <= ordered[steps[1] + 1]


def test_of_a_ratio():
    """Numerator and denominator stay together: with every ratio 2, so is every interval."""
    found = intervals.ratio(2 * VALUES, VALUES)
    np.testing.assert_allclose([found.estimate, found.low, found.high], 2.0)
    both = intervals.ratio([*VALUES, 0], [*(2 * VALUES), 0])
    assert both == intervals.ratio(VALUES, 2 * VALUES)
    assert intervals.ratio([3, 1], [1, 1]).estimate == 2
    assert np.isnan(intervals.ratio([0], [0]).estimate)


def test_of_few_units_and_none():
    """Of few units the ends would be the least and the most."""
    few = intervals.mean([3.0, 1.0, 2.0, 4.0])
    assert few.estimate == 2.5 and np.isnan(few.low) and np.isnan(few.high)
    assert str(few) == "2.50" and "–" in str(intervals.mean([3.0, 1.0, 2.0, 4.0, 5.0]))
    with pytest.raises(ValueError, match=r"\[0\] units"):
        intervals.mean([])
    with pytest.raises(ValueError, match=r"\[2, 1\] units"):
        intervals.bootstrap(np.mean, [1, 2], [1])


def test_the_same_every_time():
    assert intervals.mean(VALUES) == intervals.mean(VALUES)
