"""Which method and draft length promise most, from a short profile: scores of texts, and costs.

Scoring tells what decoding the profile's texts takes at every draft length, misses included; what
steps of those widths cost on the machine makes seconds of it.
"""

import dataclasses
from collections.abc import Iterable

from specjax import decoding
from specjax.analysis import scoring

__all__ = ["Option", "options"]


@dataclasses.dataclass(frozen=True)
class Option:
    """A way to decode, and what it promises.

    Attributes:
      length: K, the draft length, or the depth of a tree.
      tau: accepted length, tokens a step.
      acceptance_rate: accepted over tested drafts; NaN where none was tested.
      speedup: predicted, over plain decoding.
    """

    length: int
    tau: float
    acceptance_rate: float
    speedup: float


def options(
    scores: scoring.Scores,
    cost: decoding.Cost,
    lengths: Iterable[int],
    rule: str | None = None,
    batch: int = 1,
) -> list[Option]:
    """What drafts of these lengths promise on the texts that were scored.

    A step without a draft is a plain one; every step costs the drafter's time, as a lookup that
    finds nothing has looked too. A pass is as wide as the row that drafted most needs:
    with more rows fewer passes are narrow.

    Args:
      scores: of one drafter; a tree's tell its own depth alone.
      cost: of its steps.
      lengths: K to try; those that the scores cannot tell are left out.
      rule: that verifies; by default what `generate` takes.
      batch: rows decoded together, of whose steps `cost` is.

    Raises:
      ValueError: as `Scores.counts`, of lengths that it could tell.
    """
    tree = scores.form.tree
    if not tree.is_chain:
        lengths = (tree.max_depth,)
    elif scores.form.is_deterministic:
        lengths = [length for length in lengths if length <= tree.max_depth]
    found = []
    for length in lengths:
        counts = scores.counts(length, rule)
        steps = float(counts.steps.sum())
        missing = max(1 - float(counts.tested[:, 0].sum()) / steps, 0.0)
        narrow = steps * missing**batch
        width = length + 1 if tree.is_chain else tree.size + 1
        took = (steps - narrow) * cost.of_step(length, width) + narrow * cost.of_step(length, 1)
        tokens = float(counts.tokens.sum())
        rate = counts.acceptance_rate.estimate
        found.append(Option(length, tokens / steps, rate, tokens / took))
    return found
