"""What records of a benchmark say: by group, by method, with intervals; as text and Markdown.

Prompts are the units of every interval: turns of one conversation are summed first. What is timed
together counts once, so the units of a speedup are batches. It is of all tokens over all seconds;
the median of the batches' own stands beside it.
"""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from specjax import decoding
from specjax.analysis import entropy, intervals, practice

__all__ = ["CELL", "OVERALL", "cells", "markdown", "summary", "text"]

OVERALL = "overall"
CELL = ("temperature", "batch", "max_new_tokens", "context")
# What papers measure on, by the groups of Spec-Bench and of others who follow it.
_USUAL = {
    "multi_turn": "MT-Bench",
    "translation": "WMT14 German to English",
    "summarization": "CNN/DailyMail",
    "qa": "Natural Questions",
    "math_reasoning": "GSM8K",
    "rag": "retrieval",
    "code": "HumanEval",
    "mbpp": "MBPP",
    "xsum": "XSum",
}
_SUITE = "suite.jsonl"
_OFTEN = 0.9


def summary(
    header: Mapping[str, Any], records: Sequence[Mapping[str, Any]], left_out: int = 0
) -> dict[str, Any]:
    """The report, ready for JSON: a row for each cell, group and method.

    Args:
      header: what all records share.
      records: of a benchmark.
      left_out: prompts that were too long.
    """
    plain = {(r["unit"], r["turn"]): r for r in records if r["method"] == "plain"}
    rows = []
    for cell in sorted({tuple(r[name] for name in CELL) for r in records}):
        here = [r for r in records if tuple(r[name] for name in CELL) == cell]
        groups = list(dict.fromkeys(r["group"] for r in here))
        # Rows of a batch are of all groups.
        told = [*groups, OVERALL] if cell[CELL.index("batch")] == 1 else [OVERALL]
        for group in told if len(groups) > 1 else groups:
            for method in dict.fromkeys(r["method"] for r in here):
                some = [r for r in here if r["method"] == method and group in (r["group"], OVERALL)]
                row = dict(zip(CELL, cell, strict=True))
                rows.append({**row, "group": group, "method": method, **_row(some, plain)})
    measured = {r["group"] for r in records if r["source"] != _SUITE}
    return {
        **header,
        "commits": sorted({r["commit"] for r in records if r["commit"]}),
        "left_out": left_out,
        "rows": rows,
        "not_measured": [name for group, name in _USUAL.items() if group not in measured],
    }


def _row(
    records: Sequence[Mapping[str, Any]], plain: Mapping[tuple, Mapping[str, Any]]
) -> dict[str, Any]:
    """Everything that is told of one method on one group."""
    prompts = _units(records, "prompt")
    batches = [
        list({record["turn"]: record for record in unit}.values())
        for unit in _units(records, "batch_of")
    ]
    paces = _sums(batches, "batch_tokens", "seconds", "plain_batch_tokens", "plain_seconds")
    before = _sums(batches, "prefill_seconds", "plain_prefill_seconds")
    whole = [paces[0], paces[1] + before[0], paces[2], paces[3] + before[1]]
    own = _speedup(*(column[:, None] for column in paces), axis=-1)
    claimed = [r for r in records if r["identical"] is not None]
    parted = [r["first_divergence"] for r in claimed if r["first_divergence"]]
    compared = sum(r["new_tokens"] for r in claimed if not r["first_divergence"])
    compared += sum(found["position"] + 1 for found in parted)
    priced = [r for r in records if r["predicted_speedup"]]
    costs = [r["new_tokens"] / r["predicted_speedup"] for r in priced]
    bytes_more = [
        record["peak_bytes"] / plain[record["unit"], record["turn"]]["peak_bytes"] - 1
        for record in records
        if record["peak_bytes"]
    ]
    return {
        "rule": records[0]["rule"],
        "prompts": len(prompts),
        "new_tokens": sum(r["new_tokens"] for r in records),
        "text_tokens": float(np.median([r["text_tokens"] for r in records])),
        "drafting": sum(r["tested"][0] for r in records) / sum(r["target_steps"] for r in records)
        if records[0]["tested"]
        else None,
        "tau": intervals.ratio(*_sums(prompts, "new_tokens", "target_steps")).told(),
        "acceptance_rate": intervals.ratio(*_sums(prompts, "accepted", "tested")).told(),
        "acceptance_by_position": [
            intervals.ratio(*_sums(prompts, "accepted", "tested", place=place)).told()
            for place in range(len(records[0]["tested"]))
        ],
        "overlap": _overlap(prompts),
        "speedup": intervals.bootstrap(_speedup, *paces).told(),
        "speedup_median": intervals.median(own).told(),
        "speedup_with_prefill": intervals.bootstrap(_speedup, *whole).told(),
        "predicted_speedup": sum(r["new_tokens"] for r in priced) / sum(costs) if costs else None,
        "tokens_per_second": float(paces[0].sum() / paces[1].sum()),
        "inter_token_p50": float(np.median([r["inter_token_p50"] for r in records])),
        "inter_token_p95": float(np.median([r["inter_token_p95"] for r in records])),
        "identical": [len(claimed) - len(parted), len(claimed)] if claimed else None,
        "divergences_per_1000": 1000 * len(parted) / compared if compared else None,
        "logit_gaps": sorted(f["logit_gap"] for f in parted if f["logit_gap"] is not None),
        "cost": _usual_cost(priced),
        "certified": all(r["certified"] for r in records),
        "memory_overhead": float(np.median(bytes_more)) if bytes_more else None,
        "by_entropy": {
            law: [rate.told() for rate in rates]
            for law, rates in entropy.rates(
                [[r["by_entropy"] or {} for r in unit] for unit in prompts]
            ).items()
        },
    }


def _usual_cost(priced: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """Of the costs of steps at one fill or another, that at which most tokens were made."""
    tokens: dict[str, int] = {}
    for record in priced:
        told = json.dumps(record["cost"])
        tokens[told] = tokens.get(told, 0) + record["new_tokens"]
    return json.loads(max(tokens, key=tokens.__getitem__)) if tokens else None


def _units(records: Sequence[Mapping[str, Any]], name: str) -> list[list[Mapping[str, Any]]]:
    """Records by a field's value."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        found.setdefault(record[name], []).append(record)
    return list(found.values())


def _sums(
    units: Sequence[Sequence[Mapping[str, Any]]], *names: str, place: int | None = None
) -> list[np.ndarray]:
    """A column a field, summed over each unit: of a list its one place, or all of it."""

    def value(given: Any) -> float:
        return float(np.sum(given) if place is None else given[place])

    return [np.asarray([sum(value(r[name]) for r in unit) for unit in units]) for name in names]


def _overlap(prompts: Sequence[Sequence[Mapping[str, Any]]]) -> list[float | None] | None:
    """Over all places of all answers where there is a draft's law."""
    known = [[r for r in unit if r["overlap"] is not None] for unit in prompts]
    (places,) = _sums(known, "places")
    sums = [sum(r["overlap"] * r["places"] for r in unit) for unit in known]
    return intervals.ratio(sums, places).told() if places.any() else None


def _speedup(tokens, seconds, plain_tokens, plain_seconds, axis: int) -> Any:
    own = np.sum(tokens, axis=axis) / np.sum(seconds, axis=axis)
    return own / (np.sum(plain_tokens, axis=axis) / np.sum(plain_seconds, axis=axis))


def cells(report: Mapping[str, Any]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """The rows of each temperature, batch, length and context, under a heading."""
    made = []
    for cell, rows in itertools.groupby(report["rows"], lambda row: [row[n] for n in CELL]):
        temperature, batch, length, context = cell
        heading = f"temperature {temperature:g}, batch {batch}, {length} new tokens"
        made.append((heading + (f", context {context}" if context else ""), list(rows)))
    return made


def _interval(told: Sequence[float | None] | None) -> str:
    return "–" if told is None else str(intervals.Interval.read(told))


def _number(value: float | None, form: str = "{:.2f}") -> str:
    return "–" if value is None else form.format(value)


def _predicted(row: Mapping[str, Any]) -> str:
    """With how far it lies from what was measured."""
    value = row["predicted_speedup"]
    return "–" if value is None else f"{value:.2f} ({value / row['speedup'][0] - 1:+.0%})"


_COLUMNS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "group": lambda row: row["group"],
    "method": lambda row: row["method"],
    "rule": lambda row: row["rule"],
    "prompts": lambda row: str(row["prompts"]),
    "before": lambda row: _number(row["text_tokens"], "{:.0f}"),
    "tokens": lambda row: str(row["new_tokens"]),
    "τ": lambda row: _interval(row["tau"]),
    "α": lambda row: _interval(row["acceptance_rate"]),
    "drafting": lambda row: _number(row["drafting"]),
    "overlap": lambda row: _interval(row["overlap"]),
    "by position": lambda row: " ".join(_number(rate[0]) for rate in row["acceptance_by_position"]),
    "speedup": lambda row: _interval(row["speedup"]),
    "median": lambda row: _interval(row["speedup_median"]),
    "predicted": lambda row: _predicted(row),
    "with prefill": lambda row: _interval(row["speedup_with_prefill"]),
    "tokens/s": lambda row: _number(row["tokens_per_second"], "{:.1f}"),
    "p50, p95 ms": lambda row: ", ".join(
        _number(1000 * row[f"inter_token_{name}"], "{:.0f}") for name in ("p50", "p95")
    ),
    "identical": lambda row: "{}/{}".format(*row["identical"]) if row["identical"] else "in law",
    "certified": lambda row: "yes" if row["certified"] else "NO",
    "memory": lambda row: _number(row["memory_overhead"], "{:+.1%}"),
}


def _matrix(rows: Sequence[Mapping[str, Any]], value: str) -> list[list[str]]:
    """Groups by methods."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    found = {(row["group"], row["method"]): row for row in rows}
    lines = [["group", *methods]]
    for group in dict.fromkeys(row["group"] for row in rows):
        lines.append([group, *(_interval(found[group, name][value]) for name in methods)])
    return lines


def text(report: Mapping[str, Any]) -> str:
    """Speedup, τ and acceptance rate of every method by group, for a terminal."""
    lines = []
    for heading, rows in cells(report):
        for title, value in (("speedup", "speedup"), ("τ", "tau"), ("α", "acceptance_rate")):
            table = _matrix(rows, value)
            widths = [max(map(len, column)) for column in zip(*table, strict=True)]
            lines.append(f"{title} at {heading} (95 % intervals, from five prompts on)")
            for cells_ in table:
                first, *others = (
                    cell.ljust(width) for cell, width in zip(cells_, widths, strict=True)
                )
                lines.append("  ".join([first, *others]).rstrip())
            lines.append("")
        for row in rows:
            if row["identical"] and row["identical"][0] < row["identical"][1]:
                lines.append(_parted(row))
    return "\n".join([*lines, _notes(report)])


def _parted(row: Mapping[str, Any]) -> str:
    gaps = row["logit_gaps"]
    return (
        f"{row['method']} on {row['group']}: {row['identical'][1] - row['identical'][0]} of "
        f"{row['identical'][1]} texts part from plain decoding's, "
        f"{row['divergences_per_1000']:.2f} per 1,000 tokens, at logit gaps "
        f"{_number(min(gaps, default=None), '{:.2g}')} to "
        f"{_number(max(gaps, default=None), '{:.2g}')}"
    )


def _notes(report: Mapping[str, Any]) -> str:
    return (
        f"{report['left_out']} prompts left out as too long. Not measured, of what is usual: "
        f"{', '.join(report['not_measured']) or 'nothing'}."
    )


def markdown(report: Mapping[str, Any]) -> str:
    """The whole report."""
    versions = ", ".join(f"{name} {value}" for name, value in report["versions"].items() if value)
    lines = [
        "# Benchmark",
        "",
        f"{report['target']} in {report['dtype']} on {report['device']} "
        f"({report['machine']}); {versions}; commit "
        f"{', '.join(report['commits']) or 'unknown'}; medians of {report['repeats']} runs; seed "
        f"{report['seed']}.",
        "",
        "τ: emitted tokens a target step, the bonus token included, prefill excluded. α: accepted "
        "over tested drafts (the accepted and the first rejected). Drafting: share of the steps "
        "that had a draft to test. Overlap: mean of Σ min(p, q) over the answers' places. Speedup: "
        "tokens a second over plain decoding's of the same prompts, in turn, prefill excluded; in "
        "brackets 95 % intervals by the bootstrap over prompts, where there are five or more. "
        "Predicted: by the cost model, from the steps and drafts that were counted and what they "
        "cost here, with its distance from what was measured. Before: tokens before the answer, "
        "median. p50, p95: milliseconds a token in the first steps, each spread over the tokens "
        "that it brought; medians over prompts. Memory: what the loop's program holds beyond plain "
        "decoding's.",
        "",
        _notes(report),
        "",
    ]
    for heading, rows in cells(report):
        lines += [f"## {heading[0].upper()}{heading[1:]}", ""]
        for title, value in (("Speedup", "speedup"), ("τ", "tau")):
            lines += [f"{title}:", "", *_table(_matrix(rows, value)), ""]
        details = [[show(row) for show in _COLUMNS.values()] for row in rows]
        lines += ["In detail:", "", *_table([list(_COLUMNS), *details]), ""]
        parted = [
            f"- {_parted(row)}"
            for row in rows
            if row["identical"] and row["identical"][0] < row["identical"][1]
        ]
        lines += [*parted, ""] if parted else []
        lines += _worst(rows)
        lines += _costs(rows)
        lines += _entropies(rows)
        lines += _practice(rows)
    return "\n".join(lines)


def _worst(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where the cost model was furthest off."""
    told = [row for row in rows if row["predicted_speedup"] is not None]
    if not told:
        return []
    row = max(told, key=lambda row: abs(row["predicted_speedup"] / row["speedup"][0] - 1))
    return [f"Furthest from what was predicted: {row['method']} on {row['group']}.", ""]


def _entropies(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Acceptance of the first draft by the entropy of both laws, of all groups together."""
    last = {row["method"]: row for row in rows if row["by_entropy"]}
    made = []
    bins = [f"{low:g} … {high:g}" for low, high in itertools.pairwise(entropy.EDGES)]
    for law in entropy.LAWS:
        table = [["method", *bins]]
        for method, row in last.items():
            if law in row["by_entropy"]:
                table.append([method, *map(_interval, row["by_entropy"][law])])
        if len(table) > 1:
            made += [
                f"Acceptance of the first level of a draft, by the entropy of the {law}'s law in "
                "nats (greedily at temperature 1); of copies and trees, whether the token was "
                "among the guesses:",
                "",
                *_table(table),
                "",
            ]
    return made


def _costs(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What steps cost here, in plain steps, at the fill that most of all tokens had."""
    told = {row["method"]: row["cost"] for row in rows if row["cost"]}
    if not told:
        return []
    lines = [
        "Costs in plain steps of the loop (c of a level of the draft; v of the target's passes "
        "alone, so that v(1) may lie below 1):",
        "",
    ]
    for method, cost in told.items():
        passes = ", ".join(f"v({width}) = {value:.2f}" for width, value in cost["passes"])
        lines.append(
            f"- {method}: c = {cost['draft']:.3f}, {passes}, overhead a node {cost['overhead']:.3f}"
        )
    return [*lines, ""]


def _practice(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What practitioners quote, beside each method that has an acceptance rate."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method and row["group"] != OVERALL]
        points = {
            row["group"]: (row["acceptance_rate"][0], row["speedup"][0])
            for row in own
            # A copy is there where something was found: of its worth α tells half.
            if row["overlap"] is not None or (row["drafting"] or 0.0) > _OFTEN
        }
        if points:
            # Of all groups, which come last.
            told = [row for row in rows if row["method"] == method][-1]["cost"]
            cost = told and decoding.Cost.read(told)
            lines += [f"What practitioners quote, beside {method} ({practice.READ}):", ""]
            lines += [practice.markdown(practice.compare(cost, points)), ""]
    return lines


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]
