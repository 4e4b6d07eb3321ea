"""How many requests a machine has at once, from a log of arrivals: processor sharing.

Requests that are being answered advance together, each at a pace that falls with their number, as
rows of a batch do; a request joins as soon as it comes. Prompts are work too, in units of tokens.
"""

import dataclasses
import heapq
from collections.abc import Callable, Sequence

import numpy as np

__all__ = ["Timeline", "share"]


@dataclasses.dataclass(frozen=True)
class Timeline:
    """What a machine had to do.

    Attributes:
      seconds: float[M], lengths of the spans between which no request came or went.
      requests: int[M], how many there were in each.
      latencies: float[N], seconds that each request took, in the order of arrival.
    """

    seconds: np.ndarray
    requests: np.ndarray
    latencies: np.ndarray

    def concurrency(self, share: float) -> int:
        """Requests at once that are not exceeded in this share of the busy time; 0 if never busy.

        Args:
          share: such as 0.95.
        """
        busy = self.requests > 0
        if not np.any(self.seconds[busy] > 0):
            return int(np.max(self.requests, initial=0))
        order = np.argsort(self.requests[busy], kind="stable")
        passed = np.cumsum(self.seconds[busy][order])
        place = np.searchsorted(passed, share * passed[-1])
        return int(self.requests[busy][order][min(place, len(order) - 1)])

    @property
    def utilisation(self) -> float:
        """Share of the time, from the first arrival to the last answer, with a request."""
        return float(self.seconds[self.requests > 0].sum() / max(self.seconds.sum(), 1e-12))


def share(
    arrivals: Sequence[float], work: Sequence[float], pace: Callable[[int], float]
) -> Timeline:
    """Lets requests share a machine.

    All that are there advance equally, so one clock of work done serves them all: a request is
    done when the clock has advanced by its work since it came.

    Args:
      arrivals: seconds, in any order.
      work: tokens of each.
      pace: tokens a second that each of n requests gets.

    Raises:
      ValueError: unlike lengths, no requests, work below 0, or a pace that is not above 0.
    """
    if len(arrivals) != len(work) or not len(arrivals):
        raise ValueError(f"{len(arrivals)} arrivals and {len(work)} works; give some of each")
    if min(work) < 0:
        raise ValueError(f"a request of {min(work)} tokens; work must not be below 0")
    order = np.argsort(np.asarray(arrivals, float), kind="stable")
    waiting = [(float(arrivals[index]), int(index)) for index in order]
    now, clock = waiting[0][0], 0.0
    active: list[tuple[float, int]] = []
    seconds, requests, latencies = [], [], np.zeros(len(work))
    place = 0
    while place < len(waiting) or active:
        rate = 1.0
        if active:
            rate = pace(len(active))
            if not rate > 0:
                raise ValueError(
                    f"the pace of {len(active)} requests is {rate}; it must be above 0"
                )
        done = now + (active[0][0] - clock) / rate if active else np.inf
        comes = waiting[place][0] if place < len(waiting) else np.inf
        then = min(done, comes)
        seconds.append(then - now)
        requests.append(len(active))
        clock += (then - now) * rate if active else 0.0
        now = then
        if done <= comes:
            index = heapq.heappop(active)[1]
            latencies[index] = now - float(arrivals[index])
        else:
            index = waiting[place][1]
            heapq.heappush(active, (clock + float(work[index]), index))
            place += 1
    by_arrival = latencies[order]
    return Timeline(np.asarray(seconds), np.asarray(requests), by_arrival)
