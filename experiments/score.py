"""Acceptance without generating: a method held against logged prompts and answers of the target.

    python -m experiments.score --log=traffic.jsonl --method=draft

Target and drafter are led through every answer of the log, at the temperature that it was drawn at
(--temperature), and what decoding would have taken follows from what they say at its places: tokens
a target step (τ) and acceptance rate (accepted over tested drafts, also by position), exact given
the texts, and the overlap Σ min(p, q), the probability that a first draft is accepted, over all
places where there is one. Intervals are those of the bootstrap over texts, at the level 0.95.

Texts are encoded anew, so a log of texts whose tokens were others is scored by those of the
tokenizer; token ids are scored as they are. Tokens to which the target gives no probability are
counted: a log of another model or temperature has many. `experiments.logs` says what a line may
hold. Every text is a line of --out as soon as it is scored, and a run that was stopped goes on.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import app

from experiments import binary, logs, methods, outputs, prompt_files, records, targets
from specjax import checkpoints, decoding, types
from specjax.analysis import counts, entropy, intervals, plots, scoring
from specjax.training import folders

_TAKES = binary.takes(
    binary.COUNT,
    binary.DRAFT,
    binary.DRAFT_LENGTH,
    binary.LOG,
    binary.LONGEST,
    binary.METHOD,
    binary.OUT,
    binary.PLOTS,
    binary.RULE,
    binary.STOP,
    binary.TEMPERATURE,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """One run, as the flags give it."""

    model: str
    asked: methods.Asked
    log: tuple[str, ...]
    count: int | None
    longest_prompt: int
    temperature: float
    out: str | None

    def __post_init__(self):
        methods.check(self.asked.name, self.asked.settings)
        if self.asked.name == "plain":
            raise ValueError("--method=plain drafts nothing that could be scored")
        for name in ("count", "longest_prompt"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)} must be at least 1")
        types.Sampling(self.temperature)

    def header(self, bundle: checkpoints.Bundle, length: int, rule: str) -> dict[str, Any]:
        """What all records of a file share."""
        return {
            "target": bundle.name,
            "fingerprint": folders.fingerprint(bundle.target.params),
            "method": self.asked.name,
            "settings": self.asked.told() | {"draft_length": length},
            "rule": rule,
            "temperature": self.temperature,
            "versions": binary.versions(),
        }


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A method ready to score.

    Attributes:
      target: the model.
      drafter: what is led through the texts.
      rule: what would verify.
      length: K, levels of the drafts that are counted.
      is_counted: whether what decoding takes can be told.
    """

    target: types.LanguageModel
    drafter: types.Drafter
    rule: str
    length: int
    is_counted: bool

    def record(self, text: tuple[list[int], list[int]], temperature: float) -> dict[str, Any]:
        """Sums of one text."""
        scores = scoring.score(self.target, self.drafter, [text], types.Sampling(temperature))
        drafted = ~np.isnan(scores.overlap[0])
        made: dict[str, Any] = {
            "prompt_tokens": len(text[0]),
            "tokens": len(text[1]),
            "places": int(drafted.sum()),
            "overlap": float(scores.overlap[0].sum(where=drafted)),
            "entropy_target": float(scores.entropy_p[0].sum()),
            "entropy_draft": float(scores.entropy_q[0].sum(where=drafted)),
            "improbable": int(np.sum(scores.log_p[0] == -np.inf)),
            "by_entropy": entropy.of_text(scores, 0),
        }
        if self.is_counted:
            found = scores.counts(self.length, self.rule)
            made |= {
                "target_steps": float(found.steps[0]),
                "tested": found.tested[0].tolist(),
                "accepted": found.accepted[0].tolist(),
            }
        return made


def scorer(config: Config, bundle: checkpoints.Bundle) -> Scorer:
    """Of a method; a chain drawn from laws is scored token by token, whatever its length.

    Raises:
      ValueError: as `methods.decoder`.
    """
    decoder = config.asked.decoder(bundle)
    drafter = decoder.drafter
    form = jax.eval_shape(decoding.first_draft, bundle.target, drafter)
    is_chain = form.tree.is_chain and not form.is_deterministic
    if is_chain:
        one = dataclasses.replace(config.asked.settings, draft_length=1)
        drafter = methods.build(config.asked.name, bundle, one)
    is_counted = is_chain or form.is_deterministic or config.temperature == 0
    length = form.tree.max_depth
    return Scorer(bundle.target, drafter, decoder.rule.name, length, is_counted)


def run(config: Config, bundle: checkpoints.Bundle | None = None) -> dict[str, Any]:
    """The report, ready for JSON; of the bundle where the caller has loaded it."""
    chosen = _chosen(config)
    binary.start()
    bundle = bundle or targets.load(config.model)
    method = scorer(config, bundle)
    header = config.header(bundle, method.length, method.rule)
    made: list[dict[str, Any]] = []
    if config.out is not None:
        made = records.open_file(config.out, header, lambda unit: len(unit) == 1)
    keys = {pair.key for pair in chosen}
    # A file may hold those of other texts too.
    made = [record for record in made if record["unit"] in keys]
    done = {record["unit"] for record in made}
    texts = [(pair, pair.tokens(bundle)) for pair in chosen if pair.key not in done]
    waiting = [
        (pair, text)
        for pair, text in texts
        if len(text[0]) <= config.longest_prompt
        and sum(map(len, text)) <= (bundle.target.context_length or np.inf)
    ]
    left_out = len(texts) - len(waiting)
    if not waiting and not made:
        raise ValueError(
            f"all {left_out} texts have prompts of more than --longest_prompt="
            f"{config.longest_prompt} tokens, or do not fit the model's context"
        )
    # Texts of one capacity follow each other, and share programs.
    waiting.sort(key=lambda asked: sum(map(len, asked[1])))
    with binary.Progress(f"{config.asked} on {len(waiting)} texts") as progress:
        for place, (pair, text) in enumerate(waiting, start=1):
            record = {"unit": pair.key, "group": pair.group}
            made.append(record | method.record(text, config.temperature))
            if config.out is not None:
                records.append(config.out, made[-1:])
            progress.at(place, len(waiting))
    return {**header, "left_out": left_out, "groups": by_group(made)}


def _chosen(config: Config) -> list[logs.Pair]:
    groups: dict[str, list[logs.Pair]] = {}
    for pair in logs.read(*config.log):
        groups.setdefault(pair.group, []).append(pair)
    return [p for some in groups.values() for p in prompt_files.spread(some, config.count)]


def by_group(made: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What every group comes to, and all texts together."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in made:
        groups.setdefault(record["group"], []).append(record)
    found = {name: _summary(some) for name, some in sorted(groups.items())}
    return found | {"overall": _summary(made)}


def _summary(made: Sequence[dict[str, Any]]) -> dict[str, Any]:
    columns = {name: [record[name] for record in made] for name in made[0]}
    tokens, places = sum(columns["tokens"]), sum(columns["places"])
    summary = {
        "texts": len(made),
        "tokens": tokens,
        "places": places,
        "overlap": intervals.ratio(columns["overlap"], columns["places"]).told(),
        "entropy_target": sum(columns["entropy_target"]) / tokens,
        "entropy_draft": sum(columns["entropy_draft"]) / places if places else None,
        "improbable": sum(columns["improbable"]),
        "by_entropy": {
            law: [rate.told() for rate in rates]
            for law, rates in entropy.rates([[bins] for bins in columns["by_entropy"]]).items()
        },
    }
    if "target_steps" in columns:
        names = ("tokens", "target_steps", "tested", "accepted")
        found = counts.Counts(*(np.asarray(columns[name]) for name in names))
        summary |= {
            "tau": found.tau.told(),
            "acceptance_rate": found.acceptance_rate.told(),
            "acceptance_by_position": [rate.told() for rate in found.by_position],
        }
    return summary


def table(report: dict[str, Any]) -> str:
    """A line a group."""
    settings = report["settings"]
    kind, _, line = (settings["stop"] or "never").partition(":")
    stops = f" stopping at {kind} {float(line):.2g}" if line else ""
    lines = [
        f"{report['method']} of {settings['draft_length']} tokens{stops}, rule {report['rule']}, "
        f"temperature {report['temperature']}; {report['left_out']} texts left out as too long",
        "τ: tokens a target step; α: accepted over tested drafts; Σ min(p, q): probability that a "
        "first draft is accepted; H: mean entropy of target and draft, nats",
        f"{'group':<20}{'texts':>7}{'tokens':>9}  {'τ':<18}{'α':<18}{'Σ min(p, q)':<18}"
        f"{'H(p)':>6}{'H(q)':>6}  α by position",
    ]
    for name, row in report["groups"].items():
        entropies = (_shown(row[key]) for key in ("entropy_target", "entropy_draft"))
        positions = row.get("acceptance_by_position", [])
        shown = [
            "–" if key not in row else str(intervals.Interval.read(row[key]))
            for key in ("tau", "acceptance_rate", "overlap")
        ]
        lines.append(
            f"{name:<20}{row['texts']:>7}{row['tokens']:>9}  "
            + "".join(f"{text:<18}" for text in shown)
            + "".join(f"{text:>6}" for text in entropies)
            + "  "
            + " ".join(_shown(rate[0]) for rate in positions)
        )
    overall = report["groups"]["overall"]
    bins = list(itertools.pairwise(entropy.EDGES))
    for law, rates in overall["by_entropy"].items():
        lines.append(f"acceptance of the first level by entropy of the {law}'s law, nats:")
        told = zip(bins, rates, strict=True)
        lines.append(", ".join(f"{a:g}–{b:g}: {_shown(rate[0])}" for (a, b), rate in told))
    if overall["improbable"]:
        lines.insert(
            2,
            f"the target gives no probability to {overall['improbable']} of {overall['tokens']} "
            f"tokens at temperature {report['temperature']}: they are not its own, or were drawn "
            "at another",
        )
    return "\n".join(lines)


def pictures(report: dict[str, Any]) -> dict[str, Any]:
    """Axes by name: acceptance by position, a line a group, and by the entropy of both laws."""
    groups, name = report["groups"], report["method"]
    made = {
        f"acceptance_by_entropy_of_{law}": plots.acceptance_against_entropy(
            entropy.EDGES, {name: rates}, f"the {law}'s law"
        )
        for law, rates in groups["overall"]["by_entropy"].items()
    }
    by_position = {
        group: row["acceptance_by_position"]
        for group, row in groups.items()
        if "acceptance_by_position" in row
    }
    if by_position:
        made["acceptance_by_position"] = plots.acceptance_by_position(by_position)
    return made


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def config_from_flags() -> Config:
    """Reads the flags; ValueError names the one that is wrong."""
    settings = methods.Settings(binary.draft_length(), binary.DRAFT.value, stop=binary.STOP.value)
    return Config(
        model=binary.MODEL.value,
        asked=methods.Asked(binary.given(binary.METHOD, "draft"), settings, binary.RULE.value),
        log=tuple(binary.LOG.value),
        count=binary.COUNT.value,
        longest_prompt=binary.given(binary.LONGEST, 1536),
        temperature=binary.given(binary.TEMPERATURE, 0.0),
        out=binary.OUT.value,
    )


def main(argv: list[str]) -> None:
    """Runs what the flags ask for; bad input ends in one line and exit code 2."""
    made = functools.partial(outputs.illustrated, config_from_flags, run, pictures)
    binary.report(argv, made, table, _TAKES)


if __name__ == "__main__":
    app.run(main, flags_parser=binary.parse_flags)
