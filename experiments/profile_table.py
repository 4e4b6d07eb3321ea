"""The report of `experiments.profile` as text for people."""

from typing import Any

__all__ = ["table"]


def table(report: dict[str, Any]) -> str:
    """Every part of the report in a few columns; milliseconds are medians [least, most]."""
    parts = (
        _machine,
        _width,
        _capacity,
        _drafting,
        _verification,
        _loop,
        _prefill,
        _start,
    )
    return "\n\n".join(part(report) for part in parts)


def _grid(title: str, rows: list[list[str]]) -> str:
    """A title and rows of cells; the first row names the columns, the first column is text."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join([title, *lines])


def _milliseconds(seconds: dict[str, float]) -> str:
    form = "{:.2f}" if seconds["median"] < 0.01 else "{:.1f}"
    median, least, most = (form.format(1e3 * seconds[key]) for key in ("median", "min", "max"))
    return f"{median} [{least}, {most}]"


def _giga(rate: dict[str, float]) -> str:
    median, least, most = (f"{1e-9 * rate[key]:.1f}" for key in ("median", "min", "max"))
    return f"{median} [{least}, {most}]"


def _show(value: float | None, form: str = "{:.2f}") -> str:
    return "–" if value is None else form.format(value)


def _megabytes(value: float | None) -> str:
    return _show(None if value is None else 1e-6 * value, "{:.1f} MB")


def _machine(report: dict[str, Any]) -> str:
    machine, versions = report["machine"], report["versions"]
    title = (
        f"{report['config']['model']} in {report['dtype']}; {report['backend']} "
        f"({report['device']}), {report['cores']} cores; "
        + ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    )
    rows = [
        ["machine", "median [least, most]"],
        ["GB/s read", f"{_giga(machine['bytes_per_second'])} ({machine['best_form']})"],
        ["GFLOP/s", _giga(machine["flops_per_second"])],
    ]
    return _grid(title, rows)


def _width(report: dict[str, Any]) -> str:
    part = report["width"]
    rows = [["tokens", "ms", "plain steps", "floor ms", "floor / time"]]
    for row in part["passes"]:
        rows.append(
            [
                str(row["tokens"]),
                _milliseconds(row["seconds"]),
                f"{row['plain_steps']:.2f}",
                f"{1e3 * row['floor_seconds']:.2f}",
                f"{row['floor_seconds'] / row['seconds']['median']:.2f}",
            ]
        )
    return _grid(f"a pass by width, {part['fill']} of {part['capacity']} slots filled", rows)


def _capacity(report: dict[str, Any]) -> str:
    cells = {(row["capacity"], row["fill"], row["shape"]): row for row in report["capacity"]}
    shapes = list(dict.fromkeys(shape for _, _, shape in cells))
    rows = [["capacity", "fill", *(f"{shape}, ms" for shape in shapes)]]
    for capacity, fill in dict.fromkeys(key[:2] for key in cells):
        found = [cells[capacity, fill, shape] for shape in shapes]
        shown = [f"{_milliseconds(r['seconds'])} {r['ratio_to_first']:.2f}×" for r in found]
        rows.append([str(capacity), str(fill), *shown])
    return _grid("a pass by capacity and fill, beside the first row", rows)


def _drafting(report: dict[str, Any]) -> str:
    part = report["drafting"]
    rows = [
        ["drafting", "ms", "target steps"],
        ["target step", _milliseconds(part["target_step_seconds"]), "1.00"],
        [
            f"draft model ({report['config']['draft']}), a step",
            _milliseconds(part["draft_step_seconds"]),
            f"{part['draft_step_in_target_steps']:.2f}",
        ],
    ]
    for name, row in part["proposals"].items():
        rows.append([f"{name}, a draft", _milliseconds(row["seconds"]), _steps(row)])
    return _grid(f"drafts of {part['draft_length']}", rows)


def _steps(row: dict[str, Any]) -> str:
    return f"{row['target_steps']:.3f}"


def _verification(report: dict[str, Any]) -> str:
    part = report["verification"]
    rows = [["law, rule", "ms", "of the pass"]]
    for row in part["rules"]:
        name = f"{row['law']}, {row['rule']}"
        rows.append([name, _milliseconds(row["seconds"]), f"{row['passes']:.3f}"])
    title = f"warping and verifying {part['nodes']} nodes, whose pass takes"
    return _grid(f"{title} {_milliseconds(part['pass_seconds'])} ms", rows)


def _loop(report: dict[str, Any]) -> str:
    rows = [["loop", "iterations", "τ", "ms an iteration", "ms its pass", "overhead"]]
    for name, row in report["loop"].items():
        rows.append(
            [
                name,
                f"{row['iterations']} ({row['wide_iterations']} wide)",
                f"{row['tau']:.2f}",
                f"{1e3 * row['seconds_per_iteration']:.2f}",
                f"{1e3 * row['pass_seconds_per_iteration']:.2f}",
                f"{row['overhead']:.1%}",
            ]
        )
    return _grid("the compiled loop beside its passes alone", rows)


def _prefill(report: dict[str, Any]) -> str:
    rows = [["prompt", "ms", "ms a token", "floor ms", "first token, ms"]]
    for row in report["prefill"]:
        rows.append(
            [
                str(row["tokens"]),
                _milliseconds(row["seconds"]),
                f"{1e3 * row['seconds_per_token']:.2f}",
                f"{1e3 * row['floor_seconds']:.1f}",
                _milliseconds(row["first_token_seconds"]),
            ]
        )
    return _grid("prefill, warm", rows)


def _start(report: dict[str, Any]) -> str:
    start, program = report["start"], report["program"]
    phases = start["first_token_phases"]
    rows = [
        ["start", "s"],
        ["imports", _show(start["imports_seconds"])],
        ["native kernels", _show(start["kernels_seconds"])],
        ["loading", _show(start["load_seconds"])],
        ["first token", _show(start["first_token_seconds"])],
        *[[f"  {name}", _show(seconds)] for name, seconds in phases.items()],
        ["process to first token", _show(start["process_to_first_token_seconds"])],
        ["the loop anew: trace", _show(program["trace_seconds"])],
        ["  lower", _show(program["lower_seconds"])],
        ["  compile", _show(program["compile_seconds"])],
        ["  temporary memory", _megabytes(program["temporary_bytes"])],
        ["memory at the first token, most so far", _megabytes(start["peak_memory_bytes"])],
        ["memory of the whole profile, most", _megabytes(report["peak_memory_bytes"])],
    ]
    return _grid(f"from the start, {start['programs']} programs", rows)
