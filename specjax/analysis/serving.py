"""How many requests a machine has at once, from a log of arrivals: processor sharing.

Requests that are being answered advance together, each at a pace that falls with their number, as
rows of a batch do; a request joins as soon as it comes. Reading prompts does not share its cost: of
n requests each gets an n-th of the machine for its own.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from numpy import typing as npt

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
    arrivals: npt.ArrayLike,
    prefills: npt.ArrayLike,
    tokens: npt.ArrayLike,
    pace: Callable[[int], float],
) -> Timeline:
    """Lets requests share a machine: first the prompt of each is read, then it is answered.

    Args:
      arrivals: seconds, in any order.
      prefills: seconds that each prompt takes alone.
      tokens: new tokens of each.
      pace: tokens a second that each of n requests gets.

    Raises:
      ValueError: unlike lengths, no requests, work below 0, or a pace that is not above 0.
    """
    came, reads, answers = (np.array(given, float) for given in (arrivals, prefills, tokens))
    if not len(came) == len(reads) == len(answers) > 0:
        raise ValueError(
            f"{len(came)} arrivals, {len(reads)} prefills and {len(answers)} answers; give some of "
            "each"
        )
    left = np.stack([reads, answers])
    if left.min() < 0:
        raise ValueError(f"a request of {left.min()}; work must not be below 0")
    order = np.argsort(came, kind="stable")
    now, place = came[order[0]], 0
    active: list[int] = []
    seconds, requests, latencies = [], [], np.zeros(len(came))
    while place < len(order) or active:
        comes = came[order[place]] - now if place < len(order) else np.inf
        count, span = len(active), comes
        if active:
            rate = pace(count)
            if not rate > 0:
                raise ValueError(f"the pace of {count} requests is {rate}, not above 0")
            rates = np.asarray([[1 / count], [rate]])
            # What each is at: its prompt, or its answer.
            phase = (left[0, active] <= 0).astype(int)
            needed = left[phase, active] / rates[phase, 0]
            span = min(comes, float(needed.min()))
            left[phase, active] -= span * rates[phase, 0]
            # What rounding leaves of the one that is through would never end.
            through = needed <= span
            left[phase[through], np.asarray(active)[through]] = 0.0
        seconds.append(span)
        requests.append(count)
        now += span
        for index in [one for one in active if not left[:, one].any()]:
            latencies[index] = now - came[index]
            active.remove(index)
        if span == comes:
            active.append(int(order[place]))
            place += 1
    return Timeline(np.asarray(seconds), np.asarray(requests), latencies[order])
