"""specjax beside other engines: the same weights, prompts, dtype and threads, in the same minutes.

    python -m experiments.peers --count=2 --report=peers.md

decodes every prompt greedily by specjax, transformers and llama.cpp (extra `peers`), each in a
process of its own and all in turn, A B A B, and prints ratios of tokens a second with their spread,
tokens a pass, and whether the texts agree. What is not installed is left out, and the report says
why. With --out every decode is a line of a file, and a run that was stopped goes on after the last.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags

from experiments import (
    binary,
    exactness,
    methods,
    outputs,
    peer_protocol,
    peer_report,
    peer_weights,
    peer_workers,
    prompt_files,
    records,
    targets,
)
from specjax import checkpoints, storage
from specjax.analysis import plots
from specjax.training import folders

_TAKES = binary.takes(
    binary.COUNT,
    binary.DRAFT,
    binary.FOLDER,
    binary.LONGEST,
    binary.MAX_NEW_TOKENS,
    binary.OUT,
    binary.PLOTS,
    binary.PROMPTS,
    binary.REPEATS,
    binary.REPORT,
)
_THREADS = flags.DEFINE_integer("threads", None, "Of every engine; by default as many as cores.")
_ENGINES = flags.DEFINE_list(
    "engines",
    list(peer_workers.ENGINES),
    "Each an engine, for its usual methods, or ENGINE:METHOD, perhaps with a setting, as in "
    "`llama.cpp:prompt_lookup draft_length=3`.",
)

_ROOM = 64


@dataclasses.dataclass(frozen=True)
class Config:
    """One run, as the flags give it."""

    model: str
    draft: str | None
    programs: tuple[peer_workers.Program, ...]
    prompts: tuple[str, ...]
    count: int | None
    longest_prompt: int
    max_new_tokens: int
    repeats: int
    threads: int
    folder: str
    out: str | None = None
    compilation_cache: str | None = None

    def __post_init__(self):
        for name in ("count", "longest_prompt", "max_new_tokens", "repeats"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name}={value} must be at least 1")
        peer_workers.cores_of(self.threads)

    @property
    def engines(self) -> tuple[str, ...]:
        """In the order of their first turns."""
        return tuple(dict.fromkeys(program.engine for program in self.programs))


def config_from_flags() -> Config:
    """Reads the flags; ValueError names the one that is wrong."""
    return Config(
        model=binary.MODEL.value,
        draft=binary.DRAFT.value,
        programs=peer_workers.programs_of(_ENGINES.value),
        prompts=tuple(binary.PROMPTS.value),
        count=binary.COUNT.value,
        longest_prompt=binary.given(binary.LONGEST, 1536),
        max_new_tokens=binary.given(binary.MAX_NEW_TOKENS, 128),
        repeats=binary.given(binary.REPEATS, 3),
        threads=binary.given(_THREADS, binary.cores()),
        folder=binary.given(binary.FOLDER, str(storage.cache_folder() / "peers")),
        out=binary.OUT.value,
        compilation_cache=binary.COMPILATION_CACHE.value,
    )


def run(config: Config, bundle: checkpoints.Bundle | None = None) -> dict[str, Any]:
    """The report, ready for JSON; of the bundle where the caller has loaded it.

    Raises:
      ValueError: no prompt is short enough, or --out holds another measurement.
    """
    chosen = prompt_files.chosen(prompt_files.read(*config.prompts), config.count)
    bundle = bundle or targets.load(config.model)
    versions = {name: peer_workers.ENGINES[name].version for name in config.engines}
    header = {
        "target": bundle.name,
        "fingerprint": folders.fingerprint(bundle.target.params),
        "draft": folders.digest(config.draft or methods.SHIPPED),
        "programs": list(map(str, config.programs)),
        "max_new_tokens": config.max_new_tokens,
        "threads": config.threads,
        "machine": binary.machine(),
        "versions": versions,
        "commit": binary.commit(),
    }
    made = []
    if config.out is not None:
        made = records.open_file(config.out, header, lambda unit: len(unit) == unit[0]["of"])
    asked = {prompt.key: bundle.chat(prompt.asked()) for prompt in chosen}
    room = (bundle.target.context_length or math.inf) - config.max_new_tokens - _ROOM
    longest = min(config.longest_prompt, room)
    short = {key: some for key, some in asked.items() if len(some) <= longest}
    if not short:
        raise ValueError(
            f"all {len(asked)} prompts have more than {longest} tokens, by --longest_prompt or the "
            "model's context"
        )
    groups = {prompt.key: prompt.group for prompt in chosen}
    # What is compared is measured in the same minutes: all programs, or none of them.
    rounds = [(key, repeat) for key in short for repeat in range(config.repeats)]
    known: dict[str, list[dict[str, Any]]] = {}
    for record in made:
        known.setdefault(record["unit"], []).append(record)
    waiting = [(key, repeat) for key, repeat in rounds if _unit(key, repeat) not in known]
    settings, skipped = _prepared(config, bundle, max(map(len, short.values())))
    with (
        peer_workers.Workers(settings, config.threads, skipped) as workers,
        binary.Progress(f"{len(config.programs)} programs on {len(short)} prompts") as progress,
    ):
        for done, (key, repeat) in enumerate(waiting):
            progress.at(done, len(waiting))
            unit = _unit(key, repeat)
            answers = {
                program: workers.ask(program, short[key], config.max_new_tokens)
                for program in config.programs
            }
            of_unit = {"unit": unit, "prompt": key, "group": groups[key], "repeat": repeat}
            of_unit["prompt_tokens"] = len(short[key])
            known[unit] = [
                {
                    **of_unit,
                    **dataclasses.asdict(program),
                    **_counted(answer, bundle.target.eos_ids),
                }
                for program, answer in answers.items()
                if answer is not None
            ]
            for record in known[unit]:
                record["of"] = len(known[unit])
            if config.out is not None:
                records.append(config.out, known[unit])
        skipped = workers.skipped

    def gap_of(prompt: str, text: list[int], other: list[int]) -> float | None:
        found = exactness.parting(bundle.target, short[prompt], text, [other])
        return None if found is None else found["logit_gap"]

    # What was skipped half way says nothing that can be compared.
    counted = [
        record
        for key, repeat in rounds
        for record in known[_unit(key, repeat)]
        if not {record["engine"], f"{record['engine']}:{record['method']}"} & set(skipped)
    ]
    return {
        "model": config.model,
        "dtype": "float32",
        "threads": config.threads,
        "prompts": len(short),
        "left_out": len(asked) - len(short),
        "max_new_tokens": config.max_new_tokens,
        "repeats": config.repeats,
        "machine": header["machine"],
        "versions": {name: told for name, told in versions.items() if name not in skipped},
        **peer_report.summary(counted, gap_of),
        "skipped": skipped,
    }


def _unit(prompt: str, repeat: int) -> str:
    """A round of all programs: what is measured as a whole or not at all."""
    return f"{prompt}/{repeat}"


def _counted(answer: peer_protocol.Answer, ends: Sequence[int]) -> dict[str, Any]:
    """An answer with the tokens that count: through the first that ends it."""
    tokens = answer.new_tokens
    place = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    return dataclasses.asdict(answer) | {"new_tokens": tokens[: place + 1]}


def _prepared(
    config: Config, bundle: checkpoints.Bundle, longest: int
) -> tuple[dict[str, Mapping[str, Any]], dict[str, str]]:
    """Every engine's settings, its weights written; and what cannot run, with the reason."""
    folder = pathlib.Path(config.folder).expanduser()
    shared = {
        "model": config.model,
        "draft": config.draft,
        "compilation_cache": config.compilation_cache,
        # What is drafted behind the end of a text needs room too.
        "capacity": longest + config.max_new_tokens + _ROOM,
        "ends": list(bundle.target.eos_ids),
    }
    settings: dict[str, Mapping[str, Any]] = {}
    skipped: dict[str, str] = {}
    with binary.Progress("writing weights for other engines, once"):
        for engine in config.engines:
            reason = peer_workers.ENGINES[engine].missing()
            try:
                if reason is None:
                    written = peer_weights.written(engine, bundle, folder)
                    settings[engine] = {**shared, **written}
            except ValueError as error:
                reason = str(error)
            if reason is not None:
                skipped[engine] = reason
        for program in config.programs:
            if program.engine in skipped or not program.method.startswith("assisted"):
                continue
            try:
                draft = config.draft or methods.SHIPPED
                assistant = str(peer_weights.draft_folder(bundle, draft, folder))
                settings[program.engine] = {**settings[program.engine], "assistant": assistant}
            except ValueError as error:
                skipped[str(program)] = str(error)
    return settings, skipped


def pictures(report: Mapping[str, Any]) -> dict[str, Any]:
    """Axes by name: ratios to the other engines by group, after the pass over the prompt."""
    ratios = {
        f"{row['ours']} / {row['theirs']}": {
            group: (ratio["median"], ratio["low"], ratio["high"])
            for group, ratio in {**row["by_group"], "overall": row["ratio"]}.items()
            if ratio is not None
        }
        for row in report["comparisons"]
        if row["clock"] == "after_prefill"
    }
    if not ratios:
        return {}
    return {"ratios_by_group": plots.speedup_by_domain(ratios, "ratio of tokens a second")}


def main(argv: list[str]) -> None:
    """Runs what the flags ask for; bad input ends in one line and exit code 2."""

    def made() -> dict[str, Any]:
        config = config_from_flags()
        outputs.check(binary.REPORT.value, binary.PLOTS.value)
        report = run(config)
        drawn = []
        if binary.PLOTS.value is not None:
            drawn = outputs.draw(binary.PLOTS.value, pictures(report))
        if binary.REPORT.value is not None:
            outputs.write(binary.REPORT.value, peer_report.markdown(report), drawn)
        return report

    binary.report(argv, made, peer_report.text, _TAKES)


if __name__ == "__main__":
    app.run(main, flags_parser=binary.parse_flags)
