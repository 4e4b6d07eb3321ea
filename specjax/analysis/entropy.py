"""Acceptance by how open the next token is: sums over bins of entropy, which add up over texts."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy import typing as npt

from specjax.analysis import intervals, scoring

__all__ = ["EDGES", "LAWS", "Bins", "binned", "of_text", "rates"]

Bins = tuple[list[int], list[float]]
"""Places of every bin, and the sums of their acceptance probabilities."""

LAWS = ("target", "draft")

EDGES = (0.0, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 7.0, 11.0)


def binned(entropy: npt.ArrayLike, acceptance: npt.ArrayLike) -> Bins:
    """Sums over the places of every bin.

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


def of_text(scores: scoring.Scores, index: int) -> dict[str, Bins]:
    """Acceptance of a draft's first level by the entropy of the target's law, and of the draft's.

    Of a chain with a law it is Σ min(p, q). Of others, copies and trees, it is whether the text's
    token is among the guesses, as `match` accepts it, and every rule at temperature 0.

    Args:
      scores: of some texts.
      index: of the text.

    Returns:
      Bins by law; the draft's is told of chains that have one.
    """
    if scores.form.tree.is_chain and not scores.form.is_deterministic:
        share = scores.overlap[index]
        laws = {"target": scores.entropy_p[index], "draft": scores.entropy_q[index]}
        return {law: binned(entropy, share) for law, entropy in laws.items()}
    accepted = scores.accepted[index]
    is_tried = (accepted > 0) | scores.refused[index]
    share = np.where(is_tried, accepted > 0, np.nan)
    return {"target": binned(scores.entropy_p[index], share)}


def rates(units: Sequence[Sequence[Mapping[str, Bins]]]) -> dict[str, list[intervals.Interval]]:
    """Acceptance probability in every bin of each law's entropy, with intervals over units.

    Args:
      units: of independent prompts the bins of their texts, as `of_text` gives them; empty for a
        text without drafts.

    Returns:
      An interval a bin by law, of the laws that there are; NaN where a bin holds no place.
    """
    made = {}
    for law in LAWS:
        known = [[text[law] for text in unit if law in text] for unit in units]
        found = [np.sum(unit, axis=0) for unit in known if unit]
        if found:
            # [2, bins, units].
            places, sums = np.moveaxis(np.asarray(found), 0, -1)
            made[law] = [intervals.ratio(*pair) for pair in zip(sums, places, strict=True)]
    return made
