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
import statistics as medians
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import app, flags

from experiments import (
    benchmark_plots,
    benchmark_record,
    benchmark_report,
    benchmark_run,
    benchmark_turn,
    binary,
    methods,
    outputs,
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
# Of passes whose cost is measured in any case, besides those that methods make.
_WIDTHS = (1, 2, 4, 8, 16)
# What stands around the notes, in tokens, and some more.
_AROUND_NOTES = 32

# Capacity of a row, its fill to a power of two, and the temperature; nothing of a batch.
_PricedBy = tuple[int, int, float] | None


@dataclasses.dataclass(frozen=True)
class Config:
    """One run, as the flags give it; `is_predicted`: whether steps are timed, for predictions."""

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
    is_predicted: bool = True

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
        told = [str(asked) for asked in self.methods]
        if len(set(told)) < len(told) or benchmark_record.PLAIN in [m.name for m in self.methods]:
            raise ValueError(f"--methods={told}: give each once; plain decoding always runs")
        if max(self.batches) > 1 and any(m.settings.draft_length == "auto" for m in self.methods):
            raise ValueError(
                f"--batches={','.join(map(str, self.batches))}: draft_length=auto goes by the "
                "costs of one row; leave it out"
            )

    def header(self, bundle: checkpoints.Bundle) -> dict[str, Any]:
        """What all records of a file share."""
        return {
            "target": bundle.name,
            "fingerprint": folders.fingerprint(bundle.target.params),
            "dtype": self.dtype,
            "methods": {str(asked): asked.told() for asked in self.methods},
            "repeats": self.repeats,
            "seed": self.seed,
            "device": jax.devices()[0].device_kind,
            "machine": binary.machine(),
            "versions": binary.versions(),
        }


def run(
    config: Config,
    bundle: checkpoints.Bundle | None = None,
    prompts: Sequence[prompt_files.Prompt] | None = None,
) -> dict[str, Any]:
    """The report, ready for JSON; of bundle and prompts where the caller has them already."""
    if prompts is None:
        prompts = prompt_files.chosen(
            prompt_files.read(*config.prompts), config.count, config.groups
        )
    binary.start()
    bundle = bundle or targets.load(config.model, config.dtype)
    header = config.header(bundle)
    every = (methods.Asked(benchmark_record.PLAIN), *config.methods)
    made: list[dict[str, Any]] = []
    if config.out is not None:
        made = records.open_file(
            config.out, header, lambda unit: len(unit) == len(every) * unit[0]["turns"]
        )
    units, tasks, left_out = _tasks(config, bundle, prompts, {record["unit"] for record in made})
    # A file may hold what is not asked for now.
    made = [record for record in made if record["unit"] in units]
    if made:
        found = len({record["unit"] for record in made})
        print(f"{config.out} holds {found} of {len(units)} prompts already", file=sys.stderr)
    if not units:
        raise ValueError(
            f"no prompt is left to measure: {left_out} have more than "
            f"--longest_prompt={config.longest_prompt} tokens, or do not fit the model's context"
        )
    decoders = {str(asked): asked.decoder(bundle) for asked in every}
    told = {str(asked): asked.told() for asked in every}
    shared = {"dtype": config.dtype, "device": header["device"], "versions": header["versions"]}
    shared |= {"commit": binary.commit()}
    warm: dict[tuple, int | None] = {}
    prices = _known_prices(config, made, units)
    with binary.Progress(f"{len(every)} methods on {len(tasks)} batches of prompts") as progress:
        for done, task in enumerate(tasks, start=1):
            at = units[task.unit(0)]
            if config.is_predicted and at is not None and at not in prices:
                progress.say(f"measuring steps of about {at[1]} tokens")
                prices[at] = prices_of(
                    config, bundle, [one for one in tasks if units[one.unit(0)] == at]
                )
            found = benchmark_run.measured(
                bundle, decoders, task, config.repeats, config.seed, warm, prices.get(at, {})
            )
            some = [{**record, "settings": told[record["method"]], **shared} for record in found]
            made += some
            if config.out is not None:
                records.append(config.out, some)
            progress.at(done, len(tasks))
    return benchmark_report.summary(header, made, left_out)


def prices_of(
    config: Config, bundle: checkpoints.Bundle, tasks: Sequence[benchmark_turn.Task]
) -> dict[str, benchmark_record.Price]:
    """What a row's step costs here, by method and at the median fill of such tasks.

    Lengths that are chosen on the way have no price.
    """
    priced = {
        str(asked): asked for asked in config.methods if asked.settings.draft_length != "auto"
    }
    if not priced:
        return {}
    fills = [_fill(task.prompts[0], task.first[0], task.max_new_tokens) for task in tasks]
    costs, _ = step_costs.of_all(
        bundle.target,
        {name: asked.unstopping(bundle) for name, asked in priced.items()},
        fill=int(medians.median(fills)),
        widths=_WIDTHS,
        temperature=tasks[0].temperature,
        capacity=tasks[0].capacity,
        chunk=benchmark_turn.CHUNK,
    )
    return {
        name: benchmark_record.Price(costs[name], asked.stops) for name, asked in priced.items()
    }


def _known_prices(
    config: Config, records: Sequence[Mapping[str, Any]], units: Mapping[str, _PricedBy]
) -> dict[_PricedBy, dict[str, benchmark_record.Price]]:
    """What an earlier start measured, as its records hold it."""
    stops = {str(asked): asked.stops for asked in config.methods}
    found: dict[_PricedBy, dict[str, benchmark_record.Price]] = {}
    for record in records:
        if record["cost"] is not None:
            method = record["method"]
            price = benchmark_record.Price(decoding.Cost.read(record["cost"]), stops[method])
            found.setdefault(units[record["unit"]], {})[method] = price
    return found


def _priced_by(
    batch: int,
    capacity: int,
    temperature: float,
    prompt: prompt_files.Prompt,
    first: Sequence[int],
    length: int,
) -> _PricedBy:
    """What a row's step costs by; None in a batch, where no row tells what a step takes."""
    if batch > 1:
        return None
    return capacity, 1 << round(math.log2(_fill(prompt, first, length))), temperature


def _fill(prompt: prompt_files.Prompt, first: Sequence[int], length: int) -> int:
    """Tokens that stand before a step, in the middle of a conversation of the longest answers."""
    return len(first) + len(prompt.turns) * length // 2


def _tasks(
    config: Config,
    bundle: checkpoints.Bundle,
    prompts: Sequence[prompt_files.Prompt],
    done: set[str],
) -> tuple[dict[str, _PricedBy], list[benchmark_turn.Task], int]:
    """What each unit is priced by, what is left to do, how many prompts do not fit somewhere."""
    units: dict[str, _PricedBy] = {}
    tasks, left_out = [], set()
    limit = bundle.target.context_length or math.inf
    if max(config.contexts) > limit:
        raise ValueError(
            f"--contexts={max(config.contexts)} is more than the model's context of {limit}"
        )
    first = {
        (context, length, prompt.key): _first(bundle, prompt, context, length)
        for context in config.contexts
        for length in config.lengths
        for prompt in prompts
    }
    cells = itertools.product(config.contexts, config.lengths, config.batches, config.temperatures)
    for context, length, batch, temperature in cells:
        cell = {"temperature": temperature, "max_new_tokens": length, "context": context}
        # Prompts of one capacity follow each other, and share programs.
        fitting: dict[tuple[int, int], list[prompt_files.Prompt]] = {}
        for prompt in prompts:
            tokens = first[context, length, prompt.key]
            size = _size(bundle, prompt, tokens, length)
            if size is None or len(tokens) > config.longest_prompt + context:
                left_out.add(prompt.key)
            else:
                fitting.setdefault((len(prompt.turns), size), []).append(prompt)
        for size, some in _pools(fitting, batch):
            named = {benchmark_turn.unit_of(one.key, {"batch": batch, **cell}): one for one in some}
            for unit, one in named.items():
                tokens = first[context, length, one.key]
                units[unit] = _priced_by(batch, size, temperature, one, tokens, length)
            waiting = [one for unit, one in named.items() if unit not in done]
            for start in range(0, len(waiting), batch):
                new = waiting[start : start + batch]
                company = [one for one in some if one not in new][: batch - len(new)]
                rows = (*new, *company)
                tokens = tuple(first[context, length, prompt.key] for prompt in rows)
                tasks.append(benchmark_turn.Task(rows, tokens, new=len(new), capacity=size, **cell))
    return units, tasks, len(left_out)


def _pools(
    fitting: Mapping[tuple[int, int], list[prompt_files.Prompt]], batch: int
) -> list[tuple[int, list[prompt_files.Prompt]]]:
    """Capacities with the prompts that are decoded at them.

    Rows of a batch are different prompts of all groups, as a server has them: equal ones would
    miss, accept and end together. So all share the largest capacity.

    Args:
      fitting: prompts by their number of turns and the capacity they need.
      batch: rows.

    Raises:
      ValueError: fewer prompts than rows.
    """
    if batch == 1:
        return sorted(((size, some) for (_, size), some in fitting.items()), key=lambda one: one[0])
    pools = []
    for turns in sorted({turns for turns, _ in fitting}):
        sizes = [size for own, size in fitting if own == turns]
        some = [one for size in sizes for one in fitting[turns, size]]
        if len(some) < batch:
            raise ValueError(
                f"--batches={batch} needs as many prompts of {turns} turns, and there are "
                f"{len(some)}; ask for more, or for smaller batches"
            )
        seen: dict[str, int] = {}
        ranks = {}
        for prompt in some:
            ranks[prompt.key] = seen[prompt.group] = seen.get(prompt.group, -1) + 1
        pools.append((max(sizes), sorted(some, key=lambda one, ranks=ranks: ranks[one.key])))
    return pools


def _first(
    bundle: checkpoints.Bundle, prompt: prompt_files.Prompt, context: int, length: int
) -> list[int]:
    """The first turn, behind about `context` tokens of other text where the model has the room.

    Raises:
      ValueError: a text that the tokenizer does not take; the message names its prompt.
    """
    try:
        tokens = bundle.chat(prompt.asked())
        if not context:
            return tokens
        later = sum(len(bundle.tokenizer.follow_up(turn, [])) for turn in prompt.turns[1:])
        needed = len(tokens) + later + len(prompt.turns) * length + _AROUND_NOTES
        room = (bundle.target.context_length or math.inf) - needed
        told = _notes(bundle, prompt, int(min(context, room)))
        return bundle.chat(prompt.asked(told))
    except ValueError as error:
        raise ValueError(f"{prompt.source}, question {prompt.question}: {error}") from error


def _notes(bundle: checkpoints.Bundle, prompt: prompt_files.Prompt, tokens: int) -> str:
    """The first message behind so many tokens of the built-in suite's other texts."""
    others = [one.turns[0] for one in prompt_files.read() if one.turns[0] != prompt.turns[0]]
    ids = bundle.tokenizer.encode("\n\n".join(others))
    if tokens > len(ids):
        raise ValueError(
            f"--contexts={tokens} is more than the {len(ids)} tokens of the built-in suite"
        )
    notes = bundle.tokenizer.decode(ids[: max(tokens, 0)])
    return f"Here are some notes.\n\n{notes}\n\nNow to my question.\n\n{prompt.turns[0]}"


def _size(
    bundle: checkpoints.Bundle, prompt: prompt_files.Prompt, first: list[int], length: int
) -> int | None:
    """Text slots for a conversation; None where it does not fit the model's context."""
    later = sum(len(bundle.tokenizer.follow_up(turn, [])) for turn in prompt.turns[1:])
    needed = len(first) + later + len(prompt.turns) * length
    limit = bundle.target.context_length or math.inf
    return benchmark_turn.capacity_of(needed) if needed <= limit else None


def write(report: Mapping[str, Any], path: str | None, folder: str | None) -> None:
    """Writes the Markdown report and the pictures, where they are asked for."""
    drawn = [] if folder is None else benchmark_plots.draw(report, folder)
    if path is not None:
        outputs.write(path, benchmark_report.markdown(report), drawn)
    written = [str(one) for one in (path, drawn and folder) if one]
    if written:
        print(f"written: {', '.join(written)}", file=sys.stderr)


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
        config = config_from_flags()
        # Found out now, not after hours.
        outputs.check(binary.REPORT.value, binary.PLOTS.value)
        report = run(config)
        write(report, binary.REPORT.value, binary.PLOTS.value)
        return report

    binary.report(argv, made, benchmark_report.text, _TAKES)


if __name__ == "__main__":
    app.run(main, flags_parser=binary.parse_flags)
