"""Sharing a machine: by hand, and against a simulation in small steps."""

import numpy as np
import pytest

from specjax.analysis import serving


def test_by_hand():
    """Two of ten tokens at once at half the pace, then a third alone, after a pause."""
    found = serving.share([0.0, 0.0, 10.0], [10, 10, 5], lambda n: 10.0 / n)
    np.testing.assert_allclose(found.latencies, [2.0, 2.0, 0.5])
    assert found.concurrency(0.95) == 2
    assert found.concurrency(0.15) == 1
    assert found.utilisation == pytest.approx(2.5 / 10.5)


def test_latecomers_slow_those_that_are_there():
    found = serving.share([1.0, 0.0], [3.0, 4.0], lambda n: 2.0 / n)
    # Two tokens are done when the other comes; 2 and 3 are left at pace 1, then 1 at pace 2.
    np.testing.assert_allclose(found.latencies, [3.0, 2.5])


def test_against_small_steps():
    random = np.random.default_rng(0)
    arrivals, work = (
        np.cumsum(random.exponential(0.7, 60)),
        random.integers(1, 40, 60).astype(float),
    )

    def pace(n):
        return 25.0 / (0.6 + 0.4 * n)

    left, step, now = work.copy(), 1e-3, 0.0
    latencies, counts = np.zeros(60), []
    while np.any(left > 0):
        active = (arrivals <= now) & (left > 0)
        counts.append(active.sum())
        if active.any():
            left[active] -= step * pace(active.sum())
            latencies[active & (left <= 0)] = now + step - arrivals[active & (left <= 0)]
        now += step
    found = serving.share(arrivals, work, pace)
    np.testing.assert_allclose(found.latencies, latencies, atol=0.02)
    busy = np.sort([count for count in counts if count])
    assert abs(found.concurrency(0.95) - busy[int(0.95 * len(busy))]) <= 1


def test_bad_loads_are_named():
    with pytest.raises(ValueError, match="0 arrivals"):
        serving.share([], [], lambda n: 1.0)
    with pytest.raises(ValueError, match="2 arrivals and 1"):
        serving.share([0.0, 1.0], [1], lambda n: 1.0)
    with pytest.raises(ValueError, match="-1 tokens"):
        serving.share([0.0], [-1], lambda n: 1.0)
    with pytest.raises(ValueError, match="pace of 1 requests is 0"):
        serving.share([0.0], [1], lambda n: 0.0)
    nothing = serving.share([3.0], [0], lambda n: 1.0)
    assert nothing.concurrency(0.95) == 1 and nothing.latencies[0] == 0
