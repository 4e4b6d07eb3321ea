"""Acceptance by domain: tokens a target step (τ) and acceptance rate on files of prompts.

    python -m experiments.acceptance --prompts=questions.jsonl --method=draft

decodes the first turn of every prompt, in batches: the counts are those of each prompt alone (but
with --draft_length=auto, whose lengths hang on all rows), and come sooner. What they are worth in
time `experiments.benchmark` measures. Every batch is written to --out as soon as it is done, and a
run that was stopped goes on after it.
"""

import dataclasses
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import app

from experiments import benchmark_turn, binary, methods, prompt_files, records, targets
from specjax import checkpoints, decoding, types
from specjax.training import folders

_TAKES = binary.takes(
    binary.BATCH,
    binary.COUNT,
    binary.DRAFT,
    binary.DRAFT_LENGTH,
    binary.LONGEST,
    binary.MAX_NEW_TOKENS,
    binary.METHOD,
    binary.OUT,
    binary.PROMPTS,
    binary.RULE,
    binary.STOP,
    binary.TEMPERATURE,
)


@dataclasses.dataclass(frozen=True)
class Config:
    """One run, as the flags give it."""

    model: str
    method: str
    settings: methods.Settings
    prompts: tuple[str, ...]
    count: int | None
    longest_prompt: int
    max_new_tokens: int
    temperature: float
    rule: str | None
    batch: int
    seed: int
    out: str | None

    def __post_init__(self):
        methods.check(self.method, self.settings)
        for name in ("count", "longest_prompt", "max_new_tokens", "batch"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)} must be at least 1")
        types.Sampling(self.temperature)

    def fixed(self, bundle: checkpoints.Bundle) -> dict[str, Any]:
        """What two records must share to stand in one file."""
        asked = methods.Asked(self.method, self.settings, self.rule)
        kept = dataclasses.asdict(self) | {"settings": asked.told()}
        kept |= {"target": folders.fingerprint(bundle.target.params)}
        kept |= {"versions": binary.versions()}
        return {name: kept[name] for name in kept if name not in ("prompts", "count", "out")}


def greedily(
    bundle: checkpoints.Bundle,
    draft: pathlib.Path | str,
    draft_length: int,
    prompts: tuple[str, ...],
    folder: pathlib.Path,
    **others: Any,
) -> Config:
    """Greedy acceptance of a draft that never stops, in batches; others are fields of `Config`."""
    # Records are of this draft with this target on these prompts, wherever they lie.
    contents = [folders.fingerprint(bundle.target.params), *map(folders.digest, (draft, *prompts))]
    out = folder / f"acceptance-{'-'.join(str(content)[:8] for content in contents)}.jsonl"
    asked = {
        **{"count": None, "longest_prompt": 1536, "max_new_tokens": 128, "batch": 8, "seed": 0},
        **{"temperature": 0.0, "rule": None},
        **others,
    }
    settings = methods.Settings(draft_length, str(draft), stop="never")
    return Config(bundle.name, "draft", settings, prompts, out=str(out), **asked)


def measure(
    decoder: methods.Decoder,
    asked: Sequence[tuple[prompt_files.Prompt, list[int]]],
    config: Config,
) -> list[dict[str, Any]]:
    """Decodes prompts together: a record for each."""
    rows = [tokens for _, tokens in asked]
    # The last batch starts over, so that all have one size.
    padded = [rows[index % len(rows)] for index in range(config.batch)]
    asked_for = benchmark_turn.options(
        padded, config.temperature, config.max_new_tokens, config.seed
    )
    request, state = decoding.init(decoder.target, decoder.drafter, padded, **asked_for)
    result = decoder.decode(request, state)
    counts = jax.tree.map(np.asarray, result.statistics)
    return [
        {
            "unit": prompt.key,
            "question_id": prompt.question,
            "group": prompt.group,
            "prompt_tokens": len(tokens),
            "new_tokens": len(result.new_tokens[row]),
            "target_steps": int(counts.target_steps[row]),
            "tested": counts.tested[row].tolist(),
            "accepted": counts.accepted[row].tolist(),
            "finish_reason": result.finish_reasons[row],
        }
        for row, (prompt, tokens) in enumerate(asked)
    ]


def by_group(made: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """τ and acceptance of every group, and of all prompts together."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in made:
        groups.setdefault(record["group"], []).append(record)
    found = {name: _summary(some) for name, some in sorted(groups.items())}
    return found | {"overall": _summary(made)}


def _summary(made: Sequence[dict[str, Any]]) -> dict[str, Any]:
    tested, accepted = (
        np.sum([record[name] for record in made], axis=0) for name in ("tested", "accepted")
    )
    new = sum(record["new_tokens"] for record in made)
    return {
        "prompts": len(made),
        "new_tokens": new,
        "tau": new / max(sum(record["target_steps"] for record in made), 1),
        "acceptance_rate": float(accepted.sum() / max(tested.sum(), 1)),
        "acceptance_by_position": [
            round(float(a / t), 4) if t else None for a, t in zip(accepted, tested, strict=True)
        ],
    }


def run(config: Config, bundle: checkpoints.Bundle | None = None) -> dict[str, Any]:
    """The report, ready for JSON; of the bundle where the caller has loaded it."""
    chosen = prompt_files.chosen(prompt_files.read(*config.prompts), config.count)
    binary.start()
    bundle = bundle or targets.load(config.model)
    decoder = methods.decoder(config.method, bundle, config.settings, config.rule)
    header, keys = config.fixed(bundle), {prompt.key for prompt in chosen}
    made: list[dict[str, Any]] = []
    if config.out is not None:
        made = records.open_file(config.out, header, lambda unit: len(unit) == 1)
        # A file may hold those of other prompts too.
        made = [record for record in made if record["unit"] in keys]
    done = {record["unit"] for record in made}
    waiting = [(prompt, bundle.chat(prompt.asked())) for prompt in chosen if prompt.key not in done]
    room = (bundle.target.context_length or math.inf) - config.max_new_tokens
    longest = min(config.longest_prompt, room)
    left_out = [prompt for prompt, tokens in waiting if len(tokens) > longest]
    waiting = [asked for asked in waiting if len(asked[1]) <= longest]
    if not waiting and not made:
        raise ValueError(
            f"all {len(left_out)} prompts have more than {longest} tokens, by --longest_prompt or "
            "the model's context"
        )
    # Prompts of one capacity follow each other: few programs, and batches of like lengths.
    waiting.sort(key=lambda asked: len(asked[1]))
    with binary.Progress(f"{config.method} on {len(waiting)} prompts") as progress:
        for first in range(0, len(waiting), config.batch):
            some = measure(decoder, waiting[first : first + config.batch], config)
            made += some
            if config.out is not None:
                records.append(config.out, some)
            progress.at(min(first + config.batch, len(waiting)), len(waiting))
    return {
        **header,
        "left_out": len(left_out),
        "groups": by_group(made),
    }


def table(report: dict[str, Any]) -> str:
    """A line a group."""
    told = {name: value for name, value in report["settings"].items() if value is not None}
    lines = [
        f"{report['method']} {told}, temperature {report['temperature']}, "
        f"{report['max_new_tokens']} new tokens; {report['left_out']} prompts left out as too long",
        f"{'group':<20}{'prompts':>8}{'τ':>7}{'α':>7}  by position",
    ]
    for name, row in report["groups"].items():
        positions = " ".join(
            "–" if rate is None else f"{rate:.2f}" for rate in row["acceptance_by_position"]
        )
        lines.append(
            f"{name:<20}{row['prompts']:>8}{row['tau']:>7.2f}{row['acceptance_rate']:>7.2f}  "
            f"{positions}"
        )
    return "\n".join(lines)


def config_from_flags() -> Config:
    """Reads the flags; ValueError names the one that is wrong."""
    return Config(
        model=binary.MODEL.value,
        method=binary.given(binary.METHOD, "draft"),
        settings=methods.Settings(
            binary.draft_length(auto=True), binary.DRAFT.value, stop=binary.STOP.value
        ),
        prompts=tuple(binary.PROMPTS.value),
        count=binary.COUNT.value,
        longest_prompt=binary.given(binary.LONGEST, 1536),
        max_new_tokens=binary.given(binary.MAX_NEW_TOKENS, 128),
        temperature=binary.given(binary.TEMPERATURE, 0.0),
        rule=binary.RULE.value,
        batch=binary.given(binary.BATCH, 8),
        seed=binary.SEED.value,
        out=binary.OUT.value,
    )


def main(argv: list[str]) -> None:
    """Runs what the flags ask for; bad input ends in one line and exit code 2."""
    binary.report(argv, lambda: run(config_from_flags()), table, _TAKES)


if __name__ == "__main__":
    app.run(main, flags_parser=binary.parse_flags)
