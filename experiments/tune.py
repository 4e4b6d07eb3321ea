"""Method and draft length for your prompts on this machine: predicted, then measured.

    python -m experiments.tune --prompts=questions.jsonl

lets the target answer half of the prompts, scores every candidate on the answers, measures what
steps cost here, and predicts the speedup of every draft length and tree. The best of each candidate
is then decoded, in turn with plain decoding, on the other half.
"""

import dataclasses
import functools
import math
import statistics as medians
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import app

from experiments import (
    benchmark,
    benchmark_record,
    benchmark_turn,
    binary,
    methods,
    outputs,
    prompt_files,
    step_costs,
    targets,
)
from specjax import checkpoints, decoding, types
from specjax.analysis import intervals, plots, scoring, tuning

_TAKES = binary.takes(
    binary.COUNT,
    binary.LONGEST,
    binary.MAX_NEW_TOKENS,
    binary.METHODS,
    binary.PLOTS,
    binary.PROMPTS,
    binary.REPEATS,
    binary.TEMPERATURE,
)
_CANDIDATES = (
    "prompt_lookup",
    "draft",
    "tree greedy_draft=True expansion=2-1-1",
    "tree greedy_draft=True expansion=2-2-1",
    "tree greedy_draft=True expansion=3-1-1",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """One run, as the flags give it."""

    model: str
    candidates: tuple[methods.Asked, ...]
    prompts: tuple[str, ...]
    count: int
    longest_prompt: int
    max_new_tokens: int
    temperature: float
    repeats: int
    seed: int

    def __post_init__(self):
        for name in ("count", "longest_prompt", "max_new_tokens", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)} must be at least 1")
        types.Sampling(self.temperature)
        for asked in self.candidates:
            found = {"draft_length": asked.settings.draft_length, "stop": asked.settings.stop}
            if asked.name == benchmark_record.PLAIN or any(found.values()):
                raise ValueError(
                    f"--methods={asked}: name drafting methods without draft_length, which is "
                    "what is found, and without stop, which experiments.stopping finds"
                )


def profile(
    bundle: checkpoints.Bundle, prompts: Sequence[prompt_files.Prompt], config: Config
) -> list[tuple[list[int], list[int]]]:
    """First turns with the target's own answers, as token ids."""
    return answered(bundle, [bundle.chat(prompt.asked()) for prompt in prompts], config)


def answered(
    bundle: checkpoints.Bundle, questions: Sequence[list[int]], config: Config
) -> list[tuple[list[int], list[int]]]:
    """Prompts with the target's own answers, as token ids."""
    plain = methods.Asked(benchmark_record.PLAIN).decoder(bundle)
    texts = []
    with binary.Progress(f"writing {len(questions)} answers") as progress:
        for done, tokens in enumerate(questions, start=1):
            asked = benchmark_turn.options(
                [tokens], config.temperature, config.max_new_tokens, config.seed
            )
            request, state = decoding.init(plain.target, plain.drafter, [tokens], **asked)
            (answer,) = plain.decode(request, state).new_tokens
            texts.append((tokens, answer))
            progress.at(done, len(questions))
    return texts


def check(bundle: checkpoints.Bundle, config: Config) -> None:
    """Whether every candidate can be scored, before anything is decoded.

    Raises:
      ValueError: a rule that does not take the candidate's drafts, or drafts that tell no length,
        such as a sampled tree's.
    """
    for asked in config.candidates:
        drafter = asked.decoder(bundle).drafter
        form = jax.eval_shape(decoding.first_draft, bundle.target, drafter)
        is_told = form.tree.is_chain or form.is_deterministic or config.temperature == 0
        if not is_told:
            raise ValueError(
                f"--methods={asked} cannot be scored at temperature {config.temperature}: trees "
                "are told greedily, or with greedy_draft=True"
            )


def scored(
    bundle: checkpoints.Bundle, texts: Sequence[tuple[list[int], list[int]]], config: Config
) -> dict[methods.Asked, scoring.Scores]:
    """Every candidate led through the texts; a chain drawn from laws is told token by token."""
    found = {}
    for asked in config.candidates:
        drafter = of_length(asked, max(step_costs.LENGTHS)).unstopping(bundle)
        form = jax.eval_shape(decoding.first_draft, bundle.target, drafter)
        if form.tree.is_chain and not form.is_deterministic:
            drafter = of_length(asked, 1).unstopping(bundle)
        law = types.Sampling(config.temperature)
        with binary.Progress(f"scoring {asked}"):
            found[asked] = scoring.score(bundle.target, drafter, texts, law)
    return found


def weigh(
    bundle: checkpoints.Bundle,
    scores: Mapping[methods.Asked, scoring.Scores],
    fill: int,
    temperature: float,
    batch: int = 1,
) -> tuple[dict[methods.Asked, list[tuning.Option]], decoding.Cost, float]:
    """What every candidate promises in such a batch, by draft length.

    Args:
      bundle: the target with its tokenizer.
      scores: of the candidates.
      fill: tokens that stand before a step, about.
      temperature: of the decodes.
      batch: rows.

    Returns:
      The options, the costs of one of the candidates (the passes of all), and the seconds of a
      plain step.
    """
    drafters = {
        asked: of_length(asked, max(step_costs.LENGTHS)).unstopping(bundle) for asked in scores
    }
    with binary.Progress(f"measuring costs at batch {batch}"):
        costs, seconds = step_costs.of_all(
            bundle.target, drafters, fill=fill, batch=batch, temperature=temperature
        )
    found = {
        asked: tuning.options(of_texts, costs[asked], step_costs.LENGTHS, asked.rule, batch)
        for asked, of_texts in scores.items()
    }
    return found, next(iter(costs.values())), seconds


def of_length(asked: methods.Asked, length: int) -> methods.Asked:
    """The method with drafts of K = `length`, which never stop; a tree as it is."""
    takes = methods.find(asked.name).takes
    settings = asked.settings
    if "draft_length" in takes:
        settings = dataclasses.replace(settings, draft_length=length)
    if "stop" in takes:
        settings = dataclasses.replace(settings, stop="never")
    return dataclasses.replace(asked, settings=settings)


def run(config: Config, bundle: checkpoints.Bundle | None = None) -> dict[str, Any]:
    """The report, ready for JSON; of the bundle where the caller has loaded it."""
    prompts = prompt_files.chosen(prompt_files.read(*config.prompts), config.count)
    binary.start()
    bundle = bundle or targets.load(config.model)
    room = (bundle.target.context_length or math.inf) - config.max_new_tokens
    longest = min(config.longest_prompt, room)
    prompts = [p for p in prompts if len(bundle.chat(p.asked())) <= longest]
    by_group: dict[str, list[prompt_files.Prompt]] = {}
    for prompt in prompts:
        by_group.setdefault(prompt.group, []).append(prompt)
    profiled = [prompt for some in by_group.values() for prompt in some[::2]]
    held = [prompt for some in by_group.values() for prompt in some[1::2]]
    if not held:
        raise ValueError(
            f"no group has two prompts of at most {longest} tokens (by --longest_prompt or the "
            f"model's context) among --count={config.count}: half is profiled, and half measured"
        )
    check(bundle, config)
    texts = profile(bundle, profiled, config)
    fill = int(medians.median(len(prompt) + len(answer) // 2 for prompt, answer in texts))
    weighed, _, _ = weigh(bundle, scored(bundle, texts, config), fill, config.temperature)
    best = {
        of_length(asked, option.length): option
        for asked, option in (
            (asked, max(options, key=lambda option: option.speedup))
            for asked, options in weighed.items()
        )
    }
    measured = benchmark.run(
        benchmark.Config(
            model=config.model,
            dtype="float32",
            # A draft that stops where its card says may beat all that never stop.
            methods=(*best, *(asked for asked in config.candidates if asked.stops)),
            prompts=config.prompts,
            groups=(),
            count=None,
            longest_prompt=config.longest_prompt,
            batches=(1,),
            temperatures=(config.temperature,),
            lengths=(config.max_new_tokens,),
            contexts=(0,),
            repeats=config.repeats,
            seed=config.seed,
            is_predicted=False,
        ),
        bundle,
        held,
    )
    rows = {row["method"]: row for row in measured["rows"]}  # the last of each is of all groups
    promised = {str(asked): _told(option) for asked, option in best.items()}
    chosen = [
        {
            "method": name,
            "promised": promised.get(name),
            "measured_tau": row["tau"],
            "measured": row["speedup"],
        }
        for name, row in rows.items()
        if name != benchmark_record.PLAIN
    ]
    chosen.sort(key=lambda row: -row["measured"][0])
    return {
        "temperature": config.temperature,
        "profiled": len(profiled),
        "held": len(held),
        "weighed": {
            str(asked): [_told(option) for option in options] for asked, options in weighed.items()
        },
        "chosen": chosen,
        "best": chosen[0]["method"] if chosen[0]["measured"][0] > 1 else benchmark_record.PLAIN,
        "fill": fill,
        "machine": binary.machine(),
        "versions": binary.versions(),
    }


def _told(option: tuning.Option) -> dict[str, Any]:
    """Ready for JSON, which knows no NaN."""
    told = dataclasses.asdict(option)
    return {name: None if value != value else value for name, value in told.items()}


def table(report: dict[str, Any]) -> str:
    """Every length's promise, then what the best of each came to."""
    lines = [f"predicted speedup on the answers to {report['profiled']} prompts, by draft length"]
    width = max(map(len, report["weighed"]))
    for name, options in report["weighed"].items():
        told = "  ".join(f"{one['length']}: {one['speedup']:.2f}" for one in options)
        lines.append(f"{name:<{width}}  {told}")
    lines += ["", f"the best of each, measured on {report['held']} other prompts"]
    width = max(len(row["method"]) for row in report["chosen"])
    for row in report["chosen"]:
        measured, promised = intervals.Interval.read(row["measured"]), row["promised"]
        told = "as its card has it"
        if promised is not None:
            told = f"predicted {promised['speedup']:.2f} at τ {promised['tau']:.2f}"
        lines.append(
            f"{row['method']:<{width}}  {told}, measured {measured} at τ "
            f"{row['measured_tau'][0]:.2f}"
        )
    lines.append(f"best here: {report['best']}")
    return "\n".join(lines)


def pictures(report: dict[str, Any]) -> dict[str, Any]:
    """Axes by name: what every draft length promises, and what became of the best."""
    promised = {
        name: {one["length"]: (one["speedup"], None, None) for one in options}
        for name, options in report["weighed"].items()
    }
    came = {
        row["method"]: [(row["promised"]["speedup"], row["measured"][0])]
        for row in report["chosen"]
        if row["promised"] is not None
    }
    return {
        "promised_by_draft_length": plots.speedup_against(
            "draft length", promised, "predicted speedup"
        ),
        "predicted_against_measured": plots.predicted_against_measured(came),
    }


def config_from_flags() -> Config:
    """Reads the flags; ValueError names the one that is wrong."""
    return Config(
        model=binary.MODEL.value,
        candidates=tuple(map(methods.parse, binary.METHODS.value or _CANDIDATES)),
        prompts=tuple(binary.PROMPTS.value),
        count=binary.given(binary.COUNT, 4),
        longest_prompt=binary.given(binary.LONGEST, 1024),
        max_new_tokens=binary.given(binary.MAX_NEW_TOKENS, 96),
        temperature=binary.given(binary.TEMPERATURE, 0.0),
        repeats=binary.given(binary.REPEATS, 1),
        seed=binary.SEED.value,
    )


def main(argv: list[str]) -> None:
    """Runs what the flags ask for; bad input ends in one line and exit code 2."""
    made = functools.partial(outputs.illustrated, config_from_flags, run, pictures)
    binary.report(argv, made, table, _TAKES)


if __name__ == "__main__":
    app.run(main, flags_parser=binary.parse_flags)
