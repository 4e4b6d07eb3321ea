"""Sharing a machine: by hand, and against a simulation in small steps."""

import numpy as np
import pytest

from specjax.analysis import serving


def test_by_hand():
    """Two of ten tokens at once at half the pace, then a third alone, after a pause."""
    found = serving.share([0.0, 0.0, 10.0], [0, 0, 0], [10, 10, 5], lambda n: 10.0 / n)
    np.testing.assert_allclose(found.latencies, [2.0, 2.0, 0.5])
    assert found.concurrency(0.95) == 2
    assert found.concurrency(0.15) == 1
    assert found.utilisation == pytest.approx(2.5 / 10.5)


def test_latecomers_slow_those_that_are_there():
    found = serving.share([1.0, 0.0], [0, 0], [3.0, 4.0], lambda n: 2.0 / n)
    # Two tokens are done when the other comes; 2 and 3 are left at pace 1, then 1 at pace 2.
    np.testing.assert_allclose(found.latencies, [3.0, 2.5])


def test_prompts_take_the_machine_whatever_the_pace():
    """Two prompts of a second each share it for two; answers then go at their own pace."""
    for pace in (4.0, 8.0):
        found = serving.share([0.0, 0.0], [1.0, 1.0], [8, 8], lambda n, pace=pace: pace)
        np.testing.assert_allclose(found.latencies, [2 + 8 / pace] * 2)
    # One is answered while the other's prompt is read, at half the machine.
    found = serving.share([0.0, 0.0], [0.0, 1.0], [2, 1], lambda n: 1.0)
    np.testing.assert_allclose(found.latencies, [2.0, 3.0])


def test_against_small_steps():
    random = np.random.default_rng(0)
    arrivals = np.cumsum(random.exponential(0.7, 60))
    prefills, tokens = random.uniform(0, 0.3, 60), random.integers(1, 40, 60).astype(float)

    def pace(n):
        return 40.0 / (0.6 + 0.4 * n)

    left, step, now = np.stack([prefills, tokens]), 1e-3, 0.0
    latencies, counts = np.zeros(60), []
    while np.any(left > 0):
        active = (arrivals <= now) & np.any(left > 0, axis=0)
        count = int(active.sum())
        counts.append(count)
        if count:
            reads = active & (left[0] > 0)
            answers = active & ~reads
            left[0, reads] -= step / count
            left[1, answers] -= step * pace(count)
            done = answers & (left[1] <= 0)
            latencies[done] = now + step - arrivals[done]
        now += step
    found = serving.share(arrivals, prefills, tokens, pace)
    np.testing.assert_allclose(found.latencies, latencies, atol=0.1)
    busy = np.sort([count for count in counts if count])
    assert abs(found.concurrency(0.95) - busy[int(0.95 * len(busy))]) <= 1


def test_bad_loads_are_named():
    with pytest.raises(ValueError, match="0 arrivals"):
        serving.share([], [], [], lambda n: 1.0)
    with pytest.raises(ValueError, match="2 arrivals, 2 prefills and 1"):
        serving.share([0.0, 1.0], [0, 0], [1], lambda n: 1.0)
    with pytest.raises(ValueError, match="request of -1"):
        serving.share([0.0], [0], [-1], lambda n: 1.0)
    with pytest.raises(ValueError, match="pace of 1 requests is 0"):
        serving.share([0.0], [0], [1], lambda n: 0.0)
    nothing = serving.share([3.0], [0], [0], lambda n: 1.0)
    assert nothing.concurrency(0.95) == 1 and nothing.latencies[0] == 0
