"""From records of engines that took turns to paces, ratios and tables.

A pace is new tokens a second, by one of two clocks: of the whole decode, or of what comes after the
pass over the prompt, without the tokens that came with it. A prompt's number is the median of its
repeats; a ratio is first taken within a repeat, whose runs stand next to each other, so that a
machine that slows down slows both. Over prompts the median is told, with the least and the most.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from specjax.analysis import intervals

__all__ = ["CLOCKS", "markdown", "summary", "text"]

CLOCKS = ("with_prefill", "after_prefill")
_OURS, _PLAIN = "specjax", "plain"
_HEADING = {"with_prefill": "with prefill", "after_prefill": "after prefill"}

# Records of one program, by prompt and repeat.
_Runs = Mapping[str, Mapping[int, Mapping[str, Any]]]


def summary(
    records: Sequence[Mapping[str, Any]],
    gap_of: Callable[[str, list[int], list[int]], float | None],
) -> dict[str, Any]:
    """What some records say.

    Args:
      records: each with `engine`, `method`, `prompt`, `group`, `repeat`, `new_tokens`,
        `prefill_tokens`, `prefill_seconds`, `seconds` and `target_steps`, as `peer_protocol.Answer`
        has them.
      gap_of: of a prompt and two answers, how far the logits of the tokens lie apart at which they
        part; None where that is not known.

    Returns:
      `rows`, one a program: paces by clock, their ratio to specjax's plain decoding, `tau` (tokens
      after prefill / target steps), on how many prompts the texts are the reference's, and the
      first place where one is not; and `comparisons`: specjax's plain over each peer's, and best
      over best, of all prompts and by group. The reference is specjax's plain decoding, or
      without it the first program.
    """
    programs: dict[tuple[str, str], dict[str, dict[int, Mapping[str, Any]]]] = {}
    for record in records:
        prompts = programs.setdefault((record["engine"], record["method"]), {})
        prompts.setdefault(record["prompt"], {})[record["repeat"]] = record
    if not programs:
        return {"reference": None, "rows": [], "comparisons": []}
    reference = (_OURS, _PLAIN) if (_OURS, _PLAIN) in programs else next(iter(programs))
    rows = [
        _row(program, programs[program], programs[reference], programs.get((_OURS, _PLAIN)), gap_of)
        for program in programs
    ]
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    groups: dict[str, set[str]] = {}
    for record in records:
        groups.setdefault(record["group"], set()).add(record["prompt"])
    order = {engine: place for place, engine in enumerate(engines)}
    comparisons = []
    for peer in engines:
        if peer != _OURS and _OURS in engines:
            comparisons += _compared(rows, programs, peer, groups)
    return {
        "reference": ":".join(reference),
        "rows": sorted(rows, key=lambda row: order[row["engine"]]),
        "comparisons": comparisons,
    }


def _row(
    program: tuple[str, str],
    runs: _Runs,
    reference: _Runs,
    plain: _Runs | None,
    gap_of: Callable[[str, list[int], list[int]], float | None],
) -> dict[str, Any]:
    every = [record for repeats in runs.values() for record in repeats.values()]
    steps = sum(record["target_steps"] for record in every)
    later = sum(len(record["new_tokens"]) - record["prefill_tokens"] for record in every)
    both = [prompt for prompt in runs if prompt in reference]
    parted = []
    for prompt in both:
        known = next(iter(reference[prompt].values()))["new_tokens"]
        others = (record["new_tokens"] for record in runs[prompt].values())
        found = [(_parting(known, other), prompt, other) for other in others if other != known]
        parted += [(*min(found), known)] if found else []
    first = None
    if parted:
        position, prompt, other, known = min(parted)
        gap = gap_of(prompt, known, other)
        first = {"prompt": prompt, "position": position, "logit_gap": gap}
    return {
        "engine": program[0],
        "method": program[1],
        "prompts": len(runs),
        "tokens_per_second": {clock: _spread(_paces(runs, clock)) for clock in CLOCKS},
        "to_plain": {
            clock: plain and _spread(list(_ratios(runs, plain, clock).values())) for clock in CLOCKS
        },
        "tau": later / steps if steps else None,
        "agree": [len(both) - len(parted), len(both)],
        "first_divergence": first,
    }


def _compared(
    rows: Sequence[Mapping[str, Any]],
    programs: Mapping[tuple[str, str], _Runs],
    peer: str,
    groups: Mapping[str, set[str]],
) -> list[dict[str, Any]]:
    """specjax's plain decoding over a peer's, and its best method over the peer's best."""
    made = []
    for clock in CLOCKS:
        pairs = {"plain": ((_OURS, _PLAIN), (peer, _PLAIN))}
        pairs["best"] = (_best(rows, _OURS, clock), _best(rows, peer, clock))
        for what, (ours, theirs) in pairs.items():
            if ours not in programs or theirs not in programs:
                continue
            ratios = _ratios(programs[ours], programs[theirs], clock)
            ratio = _spread(list(ratios.values()))
            by_group = {
                group: _spread([ratios[prompt] for prompt in ratios if prompt in prompts])
                for group, prompts in groups.items()
            }
            if ratio is not None:
                made.append(
                    {
                        "what": what,
                        "clock": clock,
                        "ours": ":".join(ours),
                        "theirs": ":".join(theirs),
                        "ratio": ratio,
                        "by_group": by_group,
                    }
                )
    return made


def _best(rows: Sequence[Mapping[str, Any]], engine: str, clock: str) -> tuple[str, str]:
    """The method of an engine with the highest median pace over prompts."""

    def pace(row: Mapping[str, Any]) -> float:
        spread = row["tokens_per_second"][clock]
        return 0.0 if spread is None else spread["median"]

    best = max((row for row in rows if row["engine"] == engine), key=pace)
    return best["engine"], best["method"]


def _pace(record: Mapping[str, Any], clock: str) -> float | None:
    """Tokens a second; None where there was nothing to be timed."""
    tokens, seconds = len(record["new_tokens"]), record["seconds"]
    if clock == "with_prefill":
        seconds += record["prefill_seconds"]
    else:
        tokens -= record["prefill_tokens"]
    return tokens / seconds if tokens and seconds else None


def _paces(runs: _Runs, clock: str) -> list[float]:
    """A prompt's median over its repeats."""
    paces = {key: [_pace(record, clock) for record in some.values()] for key, some in runs.items()}
    return list(_medians(paces).values())


def _ratios(runs: _Runs, others: _Runs, clock: str) -> dict[str, float]:
    """By prompt, the median over the repeats that both have."""
    made: dict[str, list[float | None]] = {}
    for prompt in runs:
        made[prompt] = []
        for repeat in set(runs[prompt]) & set(others.get(prompt, ())):
            above = _pace(runs[prompt][repeat], clock)
            below = _pace(others[prompt][repeat], clock)
            made[prompt].append(above / below if above and below else None)
    return _medians(made)


def _medians(values: Mapping[str, Sequence[float | None]]) -> dict[str, float]:
    found = {key: [value for value in some if value is not None] for key, some in values.items()}
    return {key: statistics.median(some) for key, some in found.items() if some}


def _spread(values: Sequence[float]) -> dict[str, float | None] | None:
    """Over prompts; `low` and `high` are the median's interval at 95 %, None for one prompt."""
    if not values:
        return None
    interval = intervals.median(values)
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        **{
            name: None if math.isnan(end) else end
            for name, end in (("low", interval.low), ("high", interval.high))
        },
    }


def _parting(text: Sequence[int], other: Sequence[int]) -> int:
    shorter = min(len(text), len(other))
    return next((place for place in range(shorter) if text[place] != other[place]), shorter)


# The tables.


def _rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Cells, the heading first."""
    later = "… after prefill"
    made = [["engine", "method", "tokens/s", later, "× our plain", later, "τ", "texts agree"]]
    for row in report["rows"]:
        made.append(
            [
                row["engine"],
                row["method"],
                *(_range(row["tokens_per_second"][clock], ".1f") for clock in CLOCKS),
                *(_range(row["to_plain"][clock], ".2f") for clock in CLOCKS),
                "–" if row["tau"] is None else f"{row['tau']:.2f}",
                _agreement(row),
            ]
        )
    return made


def _comparison_rows(report: Mapping[str, Any]) -> list[list[str]]:
    made = [["", "ours", "theirs", "clock", "ratio", "95 % of the median"]]
    for row in report["comparisons"]:
        ratio = row["ratio"]
        interval = "–" if ratio["low"] is None else f"{ratio['low']:.2f}–{ratio['high']:.2f}"
        names = [row["what"], row["ours"], row["theirs"], _HEADING[row["clock"]]]
        made.append([*names, _range(ratio, ".2f"), interval])
    return made


def _group_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Medians of the ratios by group, where there are several."""
    groups = list(next((row["by_group"] for row in report["comparisons"]), {}))
    if len(groups) < 2:
        return []
    return [
        ["ours", "theirs", "clock", *groups],
        *(
            [row["ours"], row["theirs"], _HEADING[row["clock"]]]
            + [_median(row["by_group"][group]) for group in groups]
            for row in report["comparisons"]
        ),
    ]


def _tables(report: Mapping[str, Any]) -> list[list[list[str]]]:
    """Those that have something to tell."""
    tables = (_rows(report), _comparison_rows(report), _group_rows(report))
    return [rows for rows in tables if len(rows) > 1]


def _range(spread: Mapping[str, float] | None, form: str) -> str:
    if spread is None:
        return "–"
    middle, least, most = (format(spread[name], form) for name in ("median", "min", "max"))
    return f"{middle} [{least}, {most}]"


def _median(spread: Mapping[str, float] | None) -> str:
    return "–" if spread is None else format(spread["median"], ".2f")


def _agreement(row: Mapping[str, Any]) -> str:
    told = "{}/{}".format(*row["agree"])
    first = row["first_divergence"]
    if first is None:
        return told
    gap = first["logit_gap"]
    apart = "" if gap is None else f" (logits {gap:.1g} apart)"
    return f"{told}, first at token {first['position']}{apart}"


def _notes(report: Mapping[str, Any]) -> list[str]:
    return [
        f"{report['model']} in float32, greedily, batch 1, threads: {report['threads']} "
        f"({report['machine']}); "
        f"{report['prompts']} prompts ({report['left_out']} left out as too long), up to "
        f"{report['max_new_tokens']} new tokens; warm runs of each, in turn: {report['repeats']}. "
        f"{'; '.join(report['versions'].values())}.",
        "Medians over prompts [least, most]. tokens/s: new tokens over the seconds of the whole "
        "decode, or over those after the pass over the prompt, without the tokens that came with "
        "it. τ: new tokens a pass of the target, of the latter. "
        f"Texts are held against those of {report['reference']}.",
        *(f"Skipped: {name}: {reason}" for name, reason in report["skipped"].items()),
    ]


def text(report: Mapping[str, Any]) -> str:
    """For a terminal."""
    parts = []
    for rows in _tables(report):
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        padded = (
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            for row in rows
        )
        parts.append("\n".join(line.rstrip() for line in padded))
    return "\n\n".join([*parts, "\n".join(_notes(report))])


def markdown(report: Mapping[str, Any]) -> str:
    """As a file."""
    lines = ["# Engines side by side", ""]
    for note in _notes(report):
        lines += [note, ""]
    for rows in _tables(report):
        heading, *others = ("| " + " | ".join(row) + " |" for row in rows)
        lines += [heading, "|" + "---|" * len(rows[0]), *others, ""]
    return "\n".join(lines)
