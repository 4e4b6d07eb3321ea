"""Measures where the time of decoding goes on this machine, beside the least it could take.

  python -m experiments.profile --json

Bandwidth and arithmetic of the machine; a pass of the target by its width, by capacity and by fill;
drafting, verifying, the loop around them; prefill, start and memory. Figures of one run belong
together; ratios compare between machines, seconds do not. With --quick it shows in two minutes that
everything runs, and its figures mean little.
"""

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
from absl import app, flags

import specjax
from experiments import binary, compilation, measure, methods, process, profile_parts, profile_table
from specjax import checkpoints, decoding, drafters, types

_TAKES = binary.takes(binary.DRAFT, binary.DRAFT_LENGTH, binary.REPEATS)
_PROMPT_LENGTH = flags.DEFINE_integer(
    "prompt_length", None, "Tokens before a pass, a draft or a loop; default 128."
)
_WIDTHS = flags.DEFINE_list("widths", None, "Tokens of a pass; default 1,2,4,8,16,32,64.")
_CAPACITIES = flags.DEFINE_list(
    "capacities", None, "Slots of the cache; default 256,1024,2048,8192."
)
_FILLS = flags.DEFINE_list("fills", None, "Tokens in the cache; default 128,512,2000.")
_QUICK = flags.DEFINE_bool("quick", False, "Smaller defaults of everything.")


def config_from_flags() -> profile_parts.Config:
    """Reads the flags; ValueError names the one that is wrong."""
    given: dict[str, Any] = {
        "model": binary.MODEL.value,
        "draft": binary.DRAFT.value,
        "draft_length": binary.draft_length(),
        "repeats": binary.REPEATS.value,
        "prompt_length": _PROMPT_LENGTH.value,
    }
    for flag in (_WIDTHS, _CAPACITIES, _FILLS):
        values = flag.value
        if values is not None and not all(value.strip().isdecimal() for value in values):
            raise ValueError(f"--{flag.name}={','.join(values)} must be whole numbers")
        given[flag.name] = values and tuple(sorted({int(value) for value in values}))
    chosen = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(
        profile_parts.QUICK if _QUICK.value else profile_parts.Config(), **chosen
    )


def run(config: profile_parts.Config) -> dict[str, Any]:
    """Measures everything; the report is ready for JSON, its seconds medians with extremes."""
    kernels = binary.start()
    began = process.seconds_since_start()
    start, bundle, lookup = _start(config)
    start["imports_seconds"], start["kernels_seconds"] = began, kernels
    settings = methods.Settings(config.draft_length, config.draft)
    draft = methods.build("model", bundle, settings)
    job = profile_parts.Job(config, bundle, lookup, draft)
    parts: dict[str, Callable[[], Any]] = {
        "machine": job.machine,
        "width": job.width,
        "capacity": job.capacity,
        "drafting": job.drafting,
        "verification": job.verification,
        "loop": job.loop,
        "prefill": job.prefill,
        "program": job.program,
    }
    report: dict[str, Any] = {
        "config": dataclasses.asdict(config),
        "versions": binary.versions(),
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "dtype": job.dtype.name,
        "start": start,
    }
    for number, (name, part) in enumerate(parts.items(), start=1):
        with binary.Progress(f"[{number}/{len(parts)}] {name}") as progress:
            job.expect = progress.expect
            report[name] = part()
    report["peak_memory_bytes"] = process.peak_memory()
    return report


def _start(
    config: profile_parts.Config,
) -> tuple[dict[str, Any], checkpoints.Bundle, types.Drafter]:
    """The first token of a process, before anything else has been compiled."""
    with binary.Progress(f"loading {config.model}") as loading:
        bundle = specjax.load(config.model)
        jax.block_until_ready(bundle.target.params)
    lookup = drafters.prompt_lookup(config.draft_length)
    prompt = measure.copying_prompt(bundle.config.vocab_size, config.prompt_length)
    with binary.Progress("first token") as first, compilation.CompilationClock() as clock:
        next(decoding.stream(bundle.target, lookup, [prompt], eos=()))
    report = {
        "load_seconds": loading.seconds,
        "first_token_seconds": first.seconds,
        "first_token_phases": clock.seconds,
        "programs": clock.programs,
        "process_to_first_token_seconds": process.seconds_since_start(),
        "peak_memory_bytes": process.peak_memory(),
    }
    return report, bundle, lookup


def main(argv: list[str]) -> None:
    """Runs what the flags ask for; bad input ends in one line and exit code 2."""
    binary.report(argv, lambda: run(config_from_flags()), profile_table.table, _TAKES)


if __name__ == "__main__":
    app.run(main, flags_parser=binary.parse_flags)
