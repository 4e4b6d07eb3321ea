"""What a report may claim of a text: the very one of plain decoding, or of its law."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from specjax import analysis, trees, types

__all__ = ["certified", "is_pathwise", "parting"]


def is_pathwise(rule: types.VerificationRule, temperature: float) -> bool:
    """Whether texts, and not only their law, are those of plain decoding."""
    return rule.lossless and (temperature == 0 or rule.draw is not None)


def parting(
    target: types.LanguageModel,
    prompt: Sequence[int],
    text: Sequence[int],
    others: Iterable[Sequence[int]],
) -> dict[str, Any] | None:
    """The first of other answers that is not `text`, as `analysis.Divergence` ready for JSON."""
    for other in others:
        found = analysis.first_divergence(target, prompt, text, other)
        if found is not None:
            gap = None if math.isnan(found.logit_gap) else found.logit_gap
            return dataclasses.asdict(found) | {"logit_gap": gap}
    return None


@functools.lru_cache
def certified(rule: types.VerificationRule, length: int) -> bool:
    """Whether enumeration certifies a rule, on chains and on a tree if it takes them.

    Args:
      rule: certified as it decodes.
      length: of the chain; enumeration takes a few tokens, so 3 stands for more.
    """
    siblings = "independent" if rule.draw_law is None else "coupled"
    found = []
    for tree in (trees.chain(max(1, length)), trees.branching((2, 1))):
        target_key, draft_key = jax.random.split(jax.random.key(0))
        target = analysis.random_law(target_key, 3, tree.max_depth + 1)
        proposal = analysis.random_law(draft_key, 3, tree.max_depth)
        for proposals in ([proposal], []):
            try:
                certificate = analysis.certify(rule, tree, target, *proposals, siblings=siblings)
            except ValueError:
                # Drafts that the rule does not take.
                continue
            found.append(certificate.passed)
    return bool(found) and all(found)
