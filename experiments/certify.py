"""Certifies verification rules: exactly, by enumeration, through the code that decodes.

    python -m experiments.certify

prints, for every rule and every kind of draft that it takes, the largest error of the law of texts,
its total variation, the expected accepted length and the least bound on it. The exit code is 1 when
a rule that says it is lossless is not. --full certifies more topologies and also holds 10^7 draws
of `verify` a rule against the enumerated law. --rule=name,name certifies these rules, and
--rule=module:attribute one of your own, from a module that Python finds (PYTHONPATH=folder).
"""

import collections
import contextlib
import importlib
from collections.abc import Sequence
from typing import Any

import jax
from absl import app, flags

from experiments import binary, certify_cases, certify_draws
from specjax import types, verification

_TAKES = binary.takes(binary.RULE)
_FULL = flags.DEFINE_bool("full", False, "More topologies and laws, and draws of every rule.")
_SEEDS = flags.DEFINE_integer("seeds", 2, "Random pairs of laws under each warper.")
_DRAWS = flags.DEFINE_integer(
    "draws",
    None,
    "Draws of `verify` a rule; default 10 million with --full, otherwise 200,000 of rules that "
    "draw from the target, and none of others.",
)
_FEW_DRAWS = 200_000


def rule_of(name: str) -> types.VerificationRule:
    """A rule by its name, or by module:attribute (a rule, or a function that makes one).

    Raises:
      ValueError: there is no such thing.
    """
    if ":" not in name:
        return verification.get(name)
    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--rule={name}: {error}") from error
    if callable(found):
        try:
            found = found()
        except TypeError as error:
            raise ValueError(
                f"--rule={name} is a function, and calling it without arguments fails ({error}); "
                "name a VerificationRule, or a function that makes one"
            ) from error
    if not isinstance(found, types.VerificationRule):
        raise ValueError(
            f"--rule={name} is of type {type(found).__name__}; it must be a VerificationRule"
        )
    return found


def run(
    rules: Sequence[types.VerificationRule], full: bool, seeds: int, draws: int
) -> dict[str, Any]:
    """The report, ready for JSON."""
    if seeds < 1 or draws < 0:
        raise ValueError(f"--seeds={seeds} must be at least 1, and --draws={draws} not negative")
    binary.start()
    # Both precisions are certified.
    with jax.enable_x64(True):
        return _run(rules, full, seeds, draws)


def _run(rules, full: bool, seeds: int, draws: int) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    refused: dict[tuple[types.VerificationRule, str, str], str] = {}
    todo = list(certify_cases.cases(rules, full))
    shape = None
    with binary.Progress(f"certifying {', '.join(rule.name for rule in rules)}") as progress:
        for number, case in enumerate(todo):
            if case.shape != shape:
                # No other shape needs these programs, and thousands of them exhaust the memory
                # mappings of a process.
                jax.clear_caches()
                shape = case.shape
            if (case.rule, case.shape, case.kind) in refused:
                continue
            try:
                found = certify_cases.certificates(case, seeds)
            except verification.RefusedDraftError as error:
                refused[case.rule, case.shape, case.kind] = str(error)
                continue
            rows += [_row(case, warper, certificate) for warper, certificate in found]
            progress.at(number + 1, len(todo))
    order = [rule.name for rule in rules]
    rows.sort(key=lambda row: order.index(row["rule"]))
    report: dict[str, Any] = {
        "versions": binary.versions(),
        "certificates": rows,
        "count": len(rows),
        "seconds": progress.seconds,
        "refused": [
            {"rule": rule.name, "shape": shape, "kind": kind, "reason": reason}
            for (rule, shape, kind), reason in refused.items()
        ],
        "example": {},
        "traversal": _traversal_against_rounds(rows),
        "draws": [],
    }
    for rule in rules:
        if not any(row["rule"] == rule.name for row in rows):
            reason = next(text for (other, *_), text in refused.items() if other == rule)
            raise ValueError(f"rule {rule.name!r} takes no draft that could be certified: {reason}")
        with contextlib.suppress(verification.RefusedDraftError):
            report["example"][rule.name] = certify_cases.example(rule)
        # Enumeration multiplies the laws of draws; that the draws have them is seen by drawing.
        count = draws if draws or rule.draw is None else _FEW_DRAWS
        if count:
            drawing = binary.Progress(f"drawing {count:,} times by {rule.name}")
            # As decoding draws, in single precision.
            with drawing, jax.enable_x64(False):
                report["draws"] += certify_draws.rows(rule, count)
    order_kept = report["traversal"]
    report["passed"] = (
        all(row["passed"] for row in (*rows, *report["draws"]) if row["lossless"])
        and all(row["expected_accepted"] <= row["bound"] + 1e-5 for row in rows if row["lossless"])
        and (order_kept is None or order_kept["no_less"] == order_kept["pairs"])
    )
    return report


def _traversal_against_rounds(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """On how many of the same trees and laws `traversal` accepts no less than `multi_candidate`."""
    accepted: dict[str, dict[tuple, list[float]]] = {"traversal": {}, "multi_candidate": {}}
    for row in rows:
        if row["rule"] in accepted:
            where = (row["shape"], row["kind"], row["dtype"], row["warper"])
            accepted[row["rule"]].setdefault(where, []).append(row["expected_accepted"])
    gains = [
        more - less
        for where, values in accepted["traversal"].items()
        for more, less in zip(values, accepted["multi_candidate"].get(where, ()), strict=False)
    ]
    if not gains:
        return None
    return {"pairs": len(gains), "no_less": sum(gain > -1e-6 for gain in gains), "most": max(gains)}


def _row(case: certify_cases.Case, warper: str, certificate) -> dict[str, Any]:
    return {
        "rule": case.rule.name,
        "lossless": case.rule.lossless,
        "shape": case.shape,
        "kind": case.kind,
        "warper": warper,
        "dtype": case.dtype,
        "nodes": certificate.nodes,
        "vocab_size": certificate.vocab_size,
        "error": certificate.error,
        "walk_error": certificate.walk_error,
        "total_variation": certificate.total_variation,
        "expected_accepted": certificate.expected_accepted,
        "bound": certificate.bound,
        "passed": certificate.passed,
    }


def table(report: dict[str, Any]) -> str:
    """A line for every rule, kind and topology: the worst of both precisions and all laws."""
    groups = collections.defaultdict(list)
    for row in report["certificates"]:
        groups[row["rule"], row["kind"], row["shape"]].append(row)
    lines = [
        f"{'rule':<16}{'drafts':<16}{'tree':<24}{'laws':>5}{'float32':>10}{'float64':>10}"
        f"{'variation':>10}{'accepted':>10}{'bound':>8}"
    ]
    for (rule, kind, shape), rows in groups.items():
        worst = {
            dtype: max(
                (max(r["error"], r["walk_error"]) for r in rows if r["dtype"] == dtype), default=0.0
            )
            for dtype in ("float32", "float64")
        }
        unwarped = [row for row in rows if row["warper"] == "none"]
        mean = {
            name: sum(row[name] for row in unwarped) / len(unwarped)
            for name in ("expected_accepted", "bound")
        }
        verdict = "" if all(row["passed"] for row in rows) else "  NOT EXACT"
        lossy = "" if rows[0]["lossless"] else ", as it says: lossy"
        lines.append(
            f"{rule:<16}{kind:<16}{shape:<24}{len(rows):>5}"
            f"{worst['float32']:>10.1e}{worst['float64']:>10.1e}"
            f"{max(row['total_variation'] for row in rows):>10.1e}"
            f"{mean['expected_accepted']:>10.4f}{mean['bound']:>8.4f}"
            f"{verdict}{lossy if verdict else ''}"
        )
    names = list(dict.fromkeys(row["rule"] for row in report["refused"]))
    for name in names:
        kinds = dict.fromkeys(row["kind"] for row in report["refused"] if row["rule"] == name)
        taken = {row["kind"] for row in report["certificates"] if row["rule"] == name}
        always = ", ".join(kind for kind in kinds if kind not in taken) or "none"
        on_some = ", ".join(kind for kind in kinds if kind in taken)
        also = f"; on some trees: {on_some}" if on_some else ""
        lines.append(f"{name:<16}refuses everywhere: {always}{also}")
    for row in report["draws"]:
        lines.append(
            f"{row['rule']:<16}{row['count']:,} draws on {row['shape']}: p = {row['p_value']:.3f}"
            f"{'' if row['passed'] else '  NOT THE LAW'}"
        )
    lines.append(
        "accepted of two drafts from (2/3, 1/3) for a target of (1/3, 2/3): "
        + ", ".join(
            f"{name} {value:.4f} = {9 * value:.4g}/9" for name, value in report["example"].items()
        )
    )
    if report["traversal"] is not None:
        lines.append(
            "traversal accepts no less than multi_candidate in {no_less} of {pairs} pairs of "
            "certificates, at most {most:.4f} more".format(**report["traversal"])
        )
    lossless = sum(row["lossless"] for row in report["certificates"])
    good = "all exact" if report["passed"] else "NOT ALL EXACT"
    total = (
        f"{report['count']} certificates; {lossless} of rules that say they are lossless: {good}"
    )
    return "\n".join([*lines, "", total])


def main(argv: list[str]) -> None:
    """Runs what the flags ask for; exit code 1 where a lossless rule is not, 2 for bad input."""

    def job():
        given = binary.RULE.value
        names = (
            given.split(",")
            if given
            else [*verification.RULES, "specjax.verification.lossy:typical"]
        )
        rules = [rule_of(name) for name in names]
        draws = _DRAWS.value if _DRAWS.value is not None else 10_000_000 * _FULL.value
        return run(rules, _FULL.value, _SEEDS.value, draws)

    binary.report(argv, job, table, _TAKES)


if __name__ == "__main__":
    app.run(main, flags_parser=binary.parse_flags)
