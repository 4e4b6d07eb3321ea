"""What practitioners quote of acceptance and speedup, to be held against models and measurements.

Their numbers come without machine, draft or target; they are here to be tested. The sources are
blog posts, vendors' guides and talks, which repeat each other; papers' own figures name the paper.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from specjax import decoding
from specjax.analysis import cost_model

__all__ = ["CLAIMS", "READ", "Claim", "Range", "compare", "markdown", "verdict"]

Range = tuple[float, float]

# c of the drafts that claims are thought to be about: a tenth-size draft, and a smaller one.
_DRAFTS = (0.05, 0.2)
_NEAR = 0.05


@dataclasses.dataclass(frozen=True)
class Claim:
    """A number that is quoted.

    Attributes:
      what: of what, as one says it.
      acceptance: α from and to, or None where none is named.
      speedup: from and to.
      groups: groups of prompts that it speaks of; none for all.
      source: who says so.
    """

    what: str
    acceptance: Range | None
    speedup: Range
    groups: tuple[str, ...] = ()
    source: str = "practitioners' guides"


CLAIMS = (
    Claim("acceptance of 80 %", (0.8, 0.8), (3.0, 4.0)),
    Claim("acceptance of 60 %", (0.6, 0.6), (1.5, 2.0)),
    Claim("acceptance below 50 %", (0.0, 0.5), (0.0, 1.0)),
    Claim("code completion", (0.75, 0.85), (2.5, 3.5), ("code", "mbpp")),
    Claim("summarisation", (0.65, 0.75), (2.0, 2.5), ("summarization", "summarisation", "xsum")),
    Claim("open chat", (0.55, 0.70), (1.5, 2.0), ("multi_turn", "chat")),
    Claim("translation", (0.70, 0.80), (2.0, 3.0), ("translation",)),
    Claim("in production", None, (1.5, 3.0)),
)


# How to read the table of `markdown`.
READ = (
    "quoted: speedup; v = 1: the cost model's best draft length where any pass costs one token's, "
    "at c = 0.2 … 0.05; here: the same at this machine's costs; both over the claim's acceptance"
)


def compare(
    cost: decoding.Cost | None, points: Mapping[str, tuple[float, float]]
) -> list[dict[str, Any]]:
    """Every claim beside the cost model and what was measured; ready for JSON.

    Args:
      cost: of a machine's drafts; None leaves its column empty.
      points: by group, the measured acceptance rate and speedup of a method.

    Returns:
      A row a claim: `what`, `source`, `acceptance`, `claimed` (speedup, from and to), `ideal` (the
      cost model's where a pass of any width costs one token's, at c = 0.2 and 0.05, at the ends of
      the claim's acceptance), `machine` (the same at `cost`), `measured` (acceptance and speedup by
      group, of groups that the claim speaks of, or whose acceptance is in its range, or within 0.05
      of its one number), and the `verdict`.
    """
    rows = []
    for claim in CLAIMS:
        near = {
            group: list(point) for group, point in points.items() if _is_about(claim, group, point)
        }
        row = {
            "what": claim.what,
            "source": claim.source,
            "acceptance": claim.acceptance and list(claim.acceptance),
            "claimed": list(claim.speedup),
            "ideal": _model(claim, [cost_model.free_width(draft) for draft in _DRAFTS]),
            "machine": None if cost is None else _model(claim, [cost]),
            "measured": near,
        }
        rows.append({**row, "verdict": verdict(claim, list(near.values()))})
    return rows


def _is_about(claim: Claim, group: str, point: tuple[float, float]) -> bool:
    if claim.groups:
        return group in claim.groups
    if claim.acceptance is None:
        return True
    low, high = claim.acceptance
    # An end that is open has nothing near it.
    near = _NEAR if low == high else 0.0
    return low - near <= point[0] <= high + near


def _model(claim: Claim, costs: Sequence[decoding.Cost]) -> list[float] | None:
    """Speedup from and to, over the claim's acceptance and some costs."""
    if claim.acceptance is None:
        return None
    found = [cost_model.best(rate, cost).speedup for rate in claim.acceptance for cost in costs]
    return [min(found), max(found)]


def verdict(claim: Claim, measured: Sequence[Sequence[float]]) -> str:
    """What measurements say of a claim: `not measured`, or of acceptance and speedup each.

    Args:
      claim: as quoted.
      measured: pairs of acceptance rate and speedup.
    """
    if not measured:
        return "not measured"
    parts = []
    sides = {"speedup": claim.speedup}
    if claim.groups and claim.acceptance is not None:
        sides = {"acceptance": claim.acceptance, **sides}
    for name, (low, high) in sides.items():
        values = [pair[0] if name == "acceptance" else pair[1] for pair in measured]
        inside = sum(low <= value <= high for value in values)
        if inside == len(values):
            parts.append(f"{name} holds")
        elif all(value < low for value in values):
            parts.append(f"{name} lower here")
        elif all(value > high for value in values):
            parts.append(f"{name} higher here")
        else:
            parts.append(f"{name} holds for {inside} of {len(values)}")
    return ", ".join(parts)


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of `compare` as a table in Markdown."""
    head = ("claim", "source", "acceptance", "quoted", "v = 1", "here", "measured", "verdict")
    lines = [head, ("---",) * len(head)]
    for row in rows:
        found = [f"{group} α {a:.2f}: {s:.2f}×" for group, (a, s) in row["measured"].items()]
        spans = [_span(row[name]) for name in ("acceptance", "claimed", "ideal", "machine")]
        lines.append((row["what"], row["source"], *spans, ", ".join(found) or "–", row["verdict"]))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _span(pair: Sequence[float] | None) -> str:
    return "–" if pair is None else " … ".join(f"{value:.2f}" for value in dict.fromkeys(pair))
