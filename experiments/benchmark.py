"""Methods on prompts: acceptance, speed and identity, beside plain decoding of the same prompts.

    python -m experiments.benchmark --methods=prompt_lookup --methods="draft draft_length=3"

decodes every prompt (the built-in suite's, or those of --prompts) by every method, in turn with
plain decoding, at every batch size, temperature, length of answer and length of context asked for.
Every prompt is written to --out as soon as it is done, and a run that was stopped goes on after it.
--report writes the tables as Markdown, --plots pictures.
"""

import dataclasses
import itertools
import math
import pathlib
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import app, flags

from experiments import (
    benchmark_report,
    benchmark_run,
    binary,
    methods,
    prompt_files,
    records,
    step_costs,
    targets,
)
from specjax import checkpoints, decoding, types
from specjax.training import folders

_TAKES = binary.takes(
    binary.BATCHES,
    binary.COUNT,
    binary.DTYPE,
    binary.LONGEST,
    binary.METHODS,
    binary.OUT,
    binary.PLOTS,
    binary.PROMPTS,
    binary.REPEATS,
    binary.REPORT,
)
_GROUPS = flags.DEFINE_list("groups", [], "Groups of prompts; default all.")
_TEMPERATURES = flags.DEFINE_list("temperatures", ["0"], "0 is greedy.")
_LENGTHS = flags.DEFINE_list("lengths", ["128"], "Longest answers, in tokens.")
_CONTEXTS = flags.DEFINE_list(
    "contexts", ["0"], "Tokens of other text before every question, about."
)


@dataclasses.dataclass(frozen=True)
class Config:
    """One run, as the flags give it."""

    model: str
    dtype: str
    methods: tuple[methods.Asked, ...]
    prompts: tuple[str, ...]
    groups: tuple[str, ...]
    count: int | None
    longest_prompt: int
    batches: tuple[int, ...]
    temperatures: tuple[float, ...]
    lengths: tuple[int, ...]
    contexts: tuple[int, ...]
    repeats: int
    seed: int
    out: str | None = None

    def __post_init__(self):
        for name in ("batches", "lengths", "contexts", "temperatures"):
            values = getattr(self, name)
            least = 0 if name in ("contexts", "temperatures") else 1
            if not values or min(values) < least or len(set(values)) < len(values):
                raise ValueError(
                    f"--{name}={','.join(map(str, values))}: give some, each once and at least "
                    f"{least}"
                )
        for name in ("count", "longest_prompt", "repeats"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name}={value} must be at least 1")
        for temperature in self.temperatures:
            types.Sampling(temperature)
        if len({*map(str, self.methods), benchmark_run.PLAIN}) != len(self.methods) + 1:
            raise ValueError(
                f"--methods={[str(asked) for asked in self.methods]}: give each once; plain "
                "decoding always runs"
            )

    def header(self, bundle: checkpoints.Bundle) -> dict[str, Any]:
        """What all records of a file share."""
        return {
            "target": bundle.name,
            "fingerprint": folders.fingerprint(bundle.target.params),
            "dtype": self.dtype,
            "methods": {str(asked): _told(asked) for asked in self.methods},
            "repeats": self.repeats,
            "seed": self.seed,
            "device": jax.devices()[0].device_kind,
            "versions": binary.versions(),
        }


def _told(asked: methods.Asked) -> dict[str, Any]:
    """A method's settings with what its card says, and what its draft's file holds."""
    told = dataclasses.asdict(methods.resolved(asked.name, asked.settings))
    if asked.name in methods.OF_A_FILE:
        told["draft"] = folders.digest(asked.settings.draft or methods.SHIPPED)
    return told


def run(
    config: Config,
    bundle: checkpoints.Bundle | None = None,
    prompts: Sequence[prompt_files.Prompt] | None = None,
) -> dict[str, Any]:
    """The report, ready for JSON; of bundle and prompts where the caller has them already."""
    prompts = prompts or prompt_files.chosen(
        prompt_files.read(*config.prompts), config.count, config.groups
    )
    binary.start()
    bundle = bundle or targets.load(config.model, config.dtype)
    header = config.header(bundle)
    names = [benchmark_run.PLAIN, *map(str, config.methods)]
    turns = {prompt.key: len(prompt.turns) for prompt in prompts}
    made: list[dict[str, Any]] = []
    if config.out is not None:
        made = records.open_file(
            config.out,
            header,
            lambda unit: len(unit) == len(names) * (1 + max(one["turn"] for one in unit)),
        )
        # A file may hold those of other prompts too.
        made = [record for record in made if record["prompt"] in turns]
    tasks, left_out = _tasks(config, bundle, prompts, {record["unit"] for record in made})
    if not tasks and not made:
        raise ValueError(
            f"no prompt is left to measure: {left_out} have more than "
            f"--longest_prompt={config.longest_prompt} tokens, or do not fit the model's context"
        )
    asked_methods = (methods.Asked(names[0]), *config.methods)
    decoders = {str(asked): asked.decoder(bundle) for asked in asked_methods}
    told = {name: _told(asked) for name, asked in zip(names, asked_methods, strict=True)}
    shared = {"dtype": config.dtype, "device": header["device"], "versions": header["versions"]}
    shared |= {"commit": commit()}
    warm = benchmark_run.Warm()
    costs: dict[tuple[int, int], dict[str, decoding.Cost]] = {}
    with binary.Progress(f"{len(names)} methods on {len(tasks)} batches of prompts") as progress:
        for done, task in enumerate(tasks, start=1):
            at = (task.batch, task.context)
            if at not in costs:
                costs[at] = costs_of(config, bundle, *at)
            found = benchmark_run.measured(
                bundle, decoders, task, config.repeats, config.seed, warm, costs[at]
            )
            some = [
                {"unit": unit_of(record), **record, "settings": told[record["method"]], **shared}
                for record in found
            ]
            made += some
            if config.out is not None:
                records.append(config.out, some)
            progress.at(done, len(tasks))
    return benchmark_report.summary({**header, "commit": shared["commit"]}, made, left_out)


def costs_of(
    config: Config, bundle: checkpoints.Bundle, batch: int, context: int
) -> dict[str, decoding.Cost]:
    """What a step of every method costs here, in plain steps."""
    drafts = {str(asked): asked.unstopping(bundle) for asked in config.methods}
    widths = {w for drafter in drafts.values() for w in decoding.pass_widths(drafter.nodes)}
    fill = context + step_costs.FILL
    return step_costs.of_all(bundle.target, drafts, fill=fill, batch=batch, widths=sorted(widths))[
        0
    ]


def unit_of(record: Mapping[str, Any]) -> str:
    """A prompt in a cell: what is measured as a whole or not at all."""
    cell = (record[name] for name in ("batch", "temperature", "max_new_tokens", "context"))
    return "/".join([record["prompt"], *map(str, cell)])


def _tasks(
    config: Config,
    bundle: checkpoints.Bundle,
    prompts: Sequence[prompt_files.Prompt],
    done: set[str],
) -> tuple[list[benchmark_run.Task], int]:
    """What is left to do, and how many prompts are too long for it."""
    tasks, left_out = [], set()
    first = {
        (context, prompt.key): bundle.chat(in_context(bundle, prompt, context))
        for context in config.contexts
        for prompt in prompts
    }
    cells = itertools.product(config.contexts, config.lengths, config.batches, config.temperatures)
    for context, length, batch, temperature in cells:
        cell = {
            "batch": batch,
            "temperature": temperature,
            "max_new_tokens": length,
            "context": context,
        }
        # Prompts of one capacity follow each other, and share programs.
        waiting: dict[tuple[int, int], list[prompt_files.Prompt]] = {}
        for prompt in prompts:
            size = _size(bundle, prompt, first[context, prompt.key], length)
            if size is None or len(first[context, prompt.key]) > config.longest_prompt + context:
                left_out.add(prompt.key)
            elif unit_of({"prompt": prompt.key, **cell}) not in done:
                waiting.setdefault((size, len(prompt.turns)), []).append(prompt)
        for (size, _), some in sorted(waiting.items()):
            for start in range(0, len(some), batch):
                together = tuple(some[start : start + batch])
                tokens = tuple(first[context, prompt.key] for prompt in together)
                tasks.append(benchmark_run.Task(together, tokens, capacity=size, **cell))
    return tasks, len(left_out)


def _size(
    bundle: checkpoints.Bundle, prompt: prompt_files.Prompt, first: list[int], length: int
) -> int | None:
    """Text slots for a conversation; None where it does not fit the model's context."""
    later = sum(len(bundle.tokenizer.follow_up(turn, [])) for turn in prompt.turns[1:])
    needed = len(first) + later + len(prompt.turns) * length
    limit = bundle.target.context_length or math.inf
    return benchmark_run.capacity_of(needed) if needed <= limit else None


def in_context(bundle: checkpoints.Bundle, prompt: prompt_files.Prompt, tokens: int) -> str:
    """The first message behind about so many tokens of the suite's other texts."""
    if not tokens:
        return prompt.turns[0]
    notes, length = [], 0
    for other in prompt_files.read():
        if other.turns[0] == prompt.turns[0]:
            continue
        size = len(bundle.tokenizer.encode(other.turns[0]))
        if length + size > tokens:
            break
        notes.append(other.turns[0])
        length += size
    else:
        raise ValueError(
            f"--contexts={tokens} is more than the {length} tokens of the built-in suite"
        )
    return "\n\n".join(["Here are some notes.", *notes, "Now to my question.", prompt.turns[0]])


def commit() -> str | None:
    """The checkout's commit, with + where files differ from it; None outside of one."""
    folder = pathlib.Path(__file__).parent

    def git(*words: str) -> str:
        told = subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, check=True
        )
        return told.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", ".", "../specjax")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def config_from_flags() -> Config:
    """Reads the flags; ValueError names the one that is wrong."""

    def numbers(flag: flags.FlagHolder, kind: type) -> tuple[Any, ...]:
        try:
            return tuple(kind(value) for value in flag.value)
        except ValueError:
            raise ValueError(f"--{flag.name}={','.join(flag.value)} must be numbers") from None

    return Config(
        model=binary.MODEL.value,
        dtype=binary.DTYPE.value,
        methods=tuple(map(methods.parse, binary.METHODS.value or ["prompt_lookup", "draft"])),
        prompts=tuple(binary.PROMPTS.value),
        groups=tuple(_GROUPS.value),
        count=binary.COUNT.value,
        longest_prompt=binary.given(binary.LONGEST, 1536),
        batches=numbers(binary.BATCHES, int) or (1,),
        temperatures=numbers(_TEMPERATURES, float),
        lengths=numbers(_LENGTHS, int),
        contexts=numbers(_CONTEXTS, int),
        repeats=binary.given(binary.REPEATS, 1),
        seed=binary.SEED.value,
        out=binary.OUT.value,
    )


def main(argv: list[str]) -> None:
    """Runs what the flags ask for; bad input ends in one line and exit code 2."""

    def made() -> dict[str, Any]:
        report = run(config_from_flags())
        benchmark_report.write(report, binary.REPORT.value, binary.PLOTS.value)
        return report

    binary.report(argv, made, benchmark_report.text, _TAKES)


if __name__ == "__main__":
    app.run(main, flags_parser=binary.parse_flags)
