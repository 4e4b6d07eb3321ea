"""The pictures of a benchmark's report; each is drawn where the report has what it shows."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import benchmark_report
from specjax import decoding
from specjax.analysis import cost_model, entropy, plots, practice

__all__ = ["draw"]

_PLAIN = "plain"


def draw(report: Mapping[str, Any], folder: pathlib.Path) -> list[pathlib.Path]:
    """Draws what there is into a folder, as PNG files; returns them.

    Raises:
      ValueError: the folder cannot be made.
      ImportError: matplotlib is not installed (extra `plots`).
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "--plots needs matplotlib; install the extra `plots` (pip install -e '.[plots]')"
        ) from error
    matplotlib.use("agg")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--plots={folder} cannot be made: {error}") from error
    drawn = []

    def save(name: str, axes: Any, heading: str = "") -> None:
        path = folder / f"{name}.png"
        plots.save(axes, path, heading)
        drawn.append(path)

    for number, (heading, rows) in enumerate(benchmark_report.cells(report), start=1):
        methods = [row for row in rows if row["method"] != _PLAIN]
        overall = _overall(methods)
        if not overall:
            continue
        end = f"_{number}" if len(benchmark_report.cells(report)) > 1 else ""
        rates = {row["method"]: row["acceptance_by_position"] for row in overall}
        save(f"acceptance_by_position{end}", plots.acceptance_by_position(rates), heading)
        by_domain: dict[str, dict[str, Any]] = {}
        for row in methods:
            by_domain.setdefault(row["method"], {})[row["group"]] = row["speedup"]
        save(f"speedup_by_domain{end}", plots.speedup_by_domain(by_domain), heading)
        for law, of in (("target", "the target's law"), ("draft", "the draft's law")):
            bins = {
                row["method"]: row["by_entropy"][law] for row in overall if law in row["by_entropy"]
            }
            if bins:
                axes = plots.acceptance_against_entropy(entropy.EDGES, bins, of)
                save(f"acceptance_by_entropy_of_{law}{end}", axes, heading)
        points = {
            name: [
                (row["acceptance_rate"][0], row["speedup"][0])
                for row in methods
                if row["method"] == name and row["acceptance_rate"][0] is not None
            ]
            for name in by_domain
        }
        axes = plots.speedup_against_acceptance(_curves(overall), points, _CLAIMED)
        save(f"speedup_by_acceptance{end}", axes, heading)
    for name, what in _SWEPT.items():
        lines = _lines(report, name)
        if lines:
            save(f"speedup_by_{name}", plots.speedup_against(what, lines))
    promised: dict[str, list[tuple[float, float]]] = {}
    for row in report["rows"]:
        if row["predicted_speedup"] is not None and row["group"] != benchmark_report.OVERALL:
            pair = (row["predicted_speedup"], row["speedup"][0])
            promised.setdefault(row["method"], []).append(pair)
    if promised:
        save("predicted_against_measured", plots.predicted_against_measured(promised))
    return drawn


_RATES = tuple(index / 50 for index in range(50))
_CLAIMED = [
    (claim.what, claim.acceptance, claim.speedup)
    for claim in practice.CLAIMS
    if claim.acceptance is not None
]


def _curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The cost model where width is free, and at the costs of a draft model here."""
    costs = {f"v = 1, c = {draft}": cost_model.free_width(draft) for draft in (0.05, 0.2)}
    measured = [row for row in rows if row["cost"] is not None]
    if measured:
        dearest = max(measured, key=lambda row: row["cost"]["draft"])
        cost = decoding.Cost(**dearest["cost"])
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
            # No logarithm shows 0: a context of none is drawn as one token.
            lines.setdefault(row["method"], {})[max(row[name], 1)] = row["speedup"]
    return lines if any(len(line) > 1 for line in lines.values()) else {}
