"""The pictures of a benchmark's report; each is drawn where the report has what it shows."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import benchmark_report
from specjax.analysis import entropy, plots

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

    def save(name: str, axes: Any, title: str = "") -> None:
        if title:
            axes.set_title(title, fontsize=9)
        path = folder / f"{name}.png"
        plots.save(axes, path)
        drawn.append(path)

    for number, (heading, rows) in enumerate(benchmark_report.cells(report), start=1):
        methods = [row for row in rows if row["method"] != _PLAIN]
        overall = _overall(methods)
        if not overall:
            continue
        end = f"_{number}" if len(benchmark_report.cells(report)) > 1 else ""
        rates = {row["method"]: row["acceptance_by_position"] for row in overall}
        tested = {row["method"]: row["tested_by_position"] for row in overall}
        save(f"acceptance_by_position{end}", plots.acceptance_by_position(rates, tested), heading)
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
    for name, what in _SWEPT.items():
        lines = _lines(report, name)
        if lines:
            save(f"speedup_by_{name}", plots.speedup_against(what, lines))
    points: dict[str, list[tuple[float, float]]] = {}
    for row in report["rows"]:
        if row["predicted_speedup"] is not None and row["group"] != benchmark_report.OVERALL:
            pair = (row["predicted_speedup"], row["speedup"][0])
            points.setdefault(row["method"], []).append(pair)
    if points:
        save("predicted_against_measured", plots.predicted_against_measured(points))
    return drawn


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
