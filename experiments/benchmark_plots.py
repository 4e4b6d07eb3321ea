"""The pictures of a benchmark's report; each is drawn where the report has what it shows."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import benchmark_report, outputs
from specjax import decoding
from specjax.analysis import cost_model, entropy, plots, practice

__all__ = ["draw"]

_PLAIN = "plain"


def draw(report: Mapping[str, Any], folder: str) -> list[pathlib.Path]:
    """Draws what there is into a folder that is there, as PNG files; returns them."""
    drawn = []
    found = benchmark_report.cells(report)
    for number, (heading, rows) in enumerate(found, start=1):
        drafting = [row for row in rows if row["method"] != _PLAIN]
        if drafting:
            end = f"_{number}" if len(found) > 1 else ""
            drawn += outputs.draw(folder, _of_cell(drafting), heading, end)
    return drawn + outputs.draw(folder, _of_all(report))


def _of_cell(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Pictures of one temperature, batch, length and context, by name."""
    overall = _overall(rows)
    speedups: dict[str, dict[str, Any]] = {}
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        speedups.setdefault(row["method"], {})[row["group"]] = row["speedup"]
        accepted = points.setdefault(row["method"], [])
        if row["acceptance_rate"][0] is not None and row["group"] != benchmark_report.OVERALL:
            accepted.append((row["acceptance_rate"][0], row["speedup"][0]))
    rates = {row["method"]: row["acceptance_by_position"] for row in overall}
    made = {
        "acceptance_by_position": plots.acceptance_by_position(rates),
        "speedup_by_domain": plots.speedup_by_domain(speedups),
        "speedup_by_acceptance": plots.speedup_against_acceptance(
            _curves(overall), points, _CLAIMED
        ),
    }
    for law, of in (("target", "the target's law"), ("draft", "the draft's law")):
        bins = {
            row["method"]: row["by_entropy"][law] for row in overall if law in row["by_entropy"]
        }
        if bins:
            name = f"acceptance_by_entropy_of_{law}"
            made[name] = plots.acceptance_against_entropy(entropy.EDGES, bins, of)
    return made


def _of_all(report: Mapping[str, Any]) -> dict[str, Any]:
    """Pictures across cells, by name."""
    made = {}
    for name, what in _SWEPT.items():
        lines = _lines(report, name)
        if lines:
            made[f"speedup_by_{name}"] = plots.speedup_against(what, lines)
    promised: dict[str, list[tuple[float, float]]] = {}
    for row in report["rows"]:
        if row["predicted_speedup"] is not None and row["group"] != benchmark_report.OVERALL:
            pair = (row["predicted_speedup"], row["speedup"][0])
            promised.setdefault(row["method"], []).append(pair)
    if promised:
        made["predicted_against_measured"] = plots.predicted_against_measured(promised)
    return made


_RATES = tuple(index / 50 for index in range(50))
_CLAIMED = [
    (claim.what, claim.acceptance, claim.speedup)
    for claim in practice.CLAIMS
    if claim.acceptance is not None
]


def _curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The cost model where width is free, and at the costs of a draft model here."""
    costs = {f"v = 1, c = {draft}": cost_model.free_width(draft) for draft in (0.05, 0.2)}
    measured = [row for row in rows if row["cost"] and row["overlap"] is not None]
    if measured:
        dearest = max(measured, key=lambda row: row["cost"]["draft"])
        cost = decoding.Cost.read(dearest["cost"])
        costs[f"measured v, c = {cost.draft:.2f}"] = cost
    return {
        name: (_RATES, [cost_model.best(rate, cost).speedup for rate in _RATES])
        for name, cost in costs.items()
    }


_SWEPT = {
    "batch": "batch size",
    "max_new_tokens": "new tokens at most",
    "context": "tokens of context before the question",
}


def _overall(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rows of all groups together; of the only one where there is one."""
    found = [row for row in rows if row["group"] == benchmark_report.OVERALL]
    return found or list(rows)


def _lines(report: Mapping[str, Any], name: str) -> dict[str, dict[float, Any]]:
    """Speedup of all groups by one value of the cell, everything else as in the first cell."""
    others = [one for one in benchmark_report.CELL if one != name]
    rows = [row for row in _overall(report["rows"]) if row["method"] != _PLAIN]
    lines: dict[str, dict[float, Any]] = {}
    for row in rows:
        if all(row[one] == rows[0][one] for one in others):
            lines.setdefault(row["method"], {})[row[name]] = row["speedup"]
    return lines if any(len(line) > 1 for line in lines.values()) else {}
