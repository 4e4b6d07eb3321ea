"""Whether a draft tuned on a domain pays: acceptance on every group, and when it breaks even.

    python -m experiments.domains --folder=runs/domains --prompts=questions.jsonl

goes on training the generic draft on text of one domain at a time, measures it and the generic
draft on all groups of the prompts, and holds what the tuning cost against what each token saves.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from absl import app

from experiments import (
    acceptance,
    binary,
    distill_config,
    distill_run,
    distill_stages,
    methods,
    prompt_files,
    step_costs,
    targets,
)
from specjax import checkpoints, drafters
from specjax.training import data, folders

_TAKES = binary.takes(
    *binary.OF_TRAINING, binary.COUNT, binary.DRAFT, binary.MAX_NEW_TOKENS, binary.PROMPTS
)

# The group of prompts that a domain's draft is meant for, where the names differ.
_GROUPS = {
    "mathematics": "math_reasoning",
    "question_answering": "qa",
    "summarisation": "summarization",
}


def _group(domain: str) -> str:
    return _GROUPS.get(domain, domain)


@dataclasses.dataclass(frozen=True)
class Config:
    """One run, as the flags give it."""

    model: str
    draft: str
    folder: str
    prompts: tuple[str, ...]
    count: int | None
    domains: tuple[str, ...]
    tokens: int
    steps: int
    rate: float
    batch: int
    batch_tokens: int
    max_new_tokens: int
    draft_length: int
    seed: int

    def __post_init__(self):
        for domain in self.domains:
            if domain not in data.DOMAINS:
                raise ValueError(f"unknown domain {domain!r}; known: {', '.join(data.DOMAINS)}")


def tune(config: Config, bundle: checkpoints.Bundle, domain: str) -> dict[str, Any]:
    """Goes on training the generic draft on one domain; the card of what comes out."""
    # Domains that work on others' answers need those too.
    needed = data.needed(domain)
    asked = distill_config.Config(
        folder=str(pathlib.Path(config.folder) / domain),
        tokens=config.tokens,
        texts=data.Settings(
            seed=config.seed,
            domains=(domain,) if needed is None else (needed, domain),
            batch=config.batch,
        ),
        steps=config.steps,
        rate=config.rate,
        batch_tokens=config.batch_tokens,
        draft_length=config.draft_length,
        seed=config.seed,
    )
    asked = distill_stages.of_draft(asked, bundle, config.draft)
    return distill_run.run(asked, bundle, "python -m experiments.domains")


def measure(config: Config, bundle: checkpoints.Bundle, draft: str) -> dict[str, dict[str, Any]]:
    """Acceptance by group, from records that are kept."""
    asked = acceptance.greedily(
        bundle,
        draft,
        config.draft_length,
        config.prompts,
        pathlib.Path(config.folder),
        count=config.count,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
    )
    return acceptance.run(asked, bundle)["groups"]


def break_even(minutes: float, step_seconds: float, generic: float, tuned: float) -> float | None:
    """Tokens after which what tuning took is saved again; None where nothing is saved.

    Args:
      minutes: that tuning took, data and training.
      step_seconds: of a plain step.
      generic, tuned: speedups on the domain.
    """
    saved = step_seconds * (1 / generic - 1 / tuned)
    return 60 * minutes / saved if saved > 0 else None


def run(config: Config) -> dict[str, Any]:
    """The report, ready for JSON."""
    prompt_files.read(*config.prompts)
    binary.start()
    bundle = targets.load(config.model)
    drafts = {"generic": config.draft}
    minutes = {}
    for domain in config.domains:
        card = tune(config, bundle, domain)
        drafts[domain] = str(pathlib.Path(config.folder) / domain / "draft.safetensors")
        minutes[domain] = {
            "data": card["data"]["minutes"],
            "training": card["training"]["minutes"],
        }
    model = checkpoints.drafts.read(config.draft, bundle)
    costs, step_seconds = step_costs.of_all(
        bundle.target, {"generic": drafters.model(model, config.draft_length)}
    )
    cost = costs["generic"]
    groups = {name: measure(config, bundle, draft) for name, draft in drafts.items()}
    speedups = {
        name: {
            group: row["tau"] / cost.of_step(config.draft_length, config.draft_length + 1)
            for group, row in rows.items()
        }
        for name, rows in groups.items()
    }
    evens = {}
    for domain in config.domains:
        group = _group(domain)
        if group in groups["generic"]:
            evens[domain] = break_even(
                sum(minutes[domain].values()),
                step_seconds,
                speedups["generic"][group],
                speedups[domain][group],
            )
    report = {
        **dataclasses.asdict(config),
        "cost": dataclasses.asdict(cost),
        "plain_step_seconds": step_seconds,
        "minutes": minutes,
        "groups": groups,
        "predicted_speedup": speedups,
        "break_even_tokens": evens,
        "versions": binary.versions(),
    }
    folders.write_json(pathlib.Path(config.folder) / "domains.json", report)
    return report


def table(report: Mapping[str, Any]) -> str:
    """τ of each draft on each group, and when tuning has paid."""
    names = list(report["groups"])
    lines = [f"{'τ':<20}" + "".join(f"{name:>14}" for name in names)]
    for group in report["groups"]["generic"]:
        taus = (report["groups"][name][group]["tau"] for name in names)
        lines.append(f"{group:<20}" + "".join(f"{tau:>14.2f}" for tau in taus))
    for domain, spent in report["minutes"].items():
        evens = report["break_even_tokens"]
        if domain not in evens:
            paid = f"no prompt of the group {_group(domain)} tells whether it pays"
        elif evens[domain] is None:
            paid = "pays never on this group"
        else:
            paid = f"pays after {evens[domain]:,.0f} tokens"
        lines.append(
            f"{domain}: {spent['data']:.1f} minutes of data, {spent['training']:.1f} of training; "
            f"{paid}"
        )
    return "\n".join(lines)


def config_from_flags() -> Config:
    """Reads the flags; ValueError names the one that is wrong."""
    return Config(
        model=binary.MODEL.value,
        draft=str(binary.given(binary.DRAFT, methods.SHIPPED)),
        folder=binary.folder(),
        prompts=tuple(binary.PROMPTS.value),
        count=binary.COUNT.value,
        domains=tuple(binary.given(binary.DOMAINS, ("code", "translation"))),
        tokens=binary.given(binary.TOKENS, 100_000),
        steps=binary.given(binary.STEPS, 250),
        rate=binary.given(binary.RATE, 2e-3),
        batch=binary.given(binary.BATCH, data.Settings.batch),
        batch_tokens=binary.BATCH_TOKENS.value,
        max_new_tokens=binary.given(binary.MAX_NEW_TOKENS, 128),
        draft_length=binary.draft_length_or(5),
        seed=binary.SEED.value,
    )


def main(argv: list[str]) -> None:
    """Runs what the flags ask for; bad input ends in one line and exit code 2."""
    binary.report(argv, lambda: run(config_from_flags()), table, _TAKES)


if __name__ == "__main__":
    app.run(main, flags_parser=binary.parse_flags)
