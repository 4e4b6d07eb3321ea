"""The loop's program: what it costs before it runs, and the memory that it takes."""

import itertools
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from specjax import decoding, types

__all__ = ["peak_bytes", "run", "start"]

run = jax.jit(decoding.run, static_argnames=("rule",), donate_argnames=("state", "statistics"))
"""`decoding.run`, compiled as a decode compiles it; state and statistics are consumed."""


def start(
    target: types.LanguageModel, drafter: types.Drafter, prompt: Sequence[int]
) -> dict[str, Any]:
    """What the program after such a prompt costs.

    Returns:
      `trace_seconds`, `lower_seconds`, `compile_seconds`; `temporary_bytes`, `argument_bytes` and
      `program_bytes`, None where the backend does not tell.
    """
    request, state = decoding.init(target, drafter, [prompt], eos=())
    times = [time.perf_counter()]
    traced = _traced(target, drafter, request, state, decoding.rule_for(target, drafter))
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    compiled = lowered.compile()
    times.append(time.perf_counter())
    trace, lower, build = (after - before for before, after in itertools.pairwise(times))
    memory = compiled.memory_analysis()
    names = {
        "temporary_bytes": "temp_size_in_bytes",
        "argument_bytes": "argument_size_in_bytes",
        "program_bytes": "generated_code_size_in_bytes",
    }
    return {
        "trace_seconds": trace,
        "lower_seconds": lower,
        "compile_seconds": build,
        **{name: getattr(memory, attribute, None) for name, attribute in names.items()},
    }


def peak_bytes(
    target: types.LanguageModel,
    drafter: types.Drafter,
    request: decoding.Request,
    state: decoding.DecodeState,
    rule: types.VerificationRule,
) -> int | None:
    """What the loop's program holds: weights, caches and text, and its temporaries.

    What two models share counts once. None where the backend does not tell.
    """
    memory = _traced(target, drafter, request, state, rule).lower().compile().memory_analysis()
    held = {id(leaf): leaf for leaf in jax.tree.leaves((target, drafter, request, state))}
    if memory is None:
        return None
    return memory.temp_size_in_bytes + sum(leaf.nbytes for leaf in held.values())


def _traced(target, drafter, request, state, rule) -> Any:
    """The loop's program, traced; nothing is consumed."""
    depth = decoding.form_of(target, drafter, rule).depth
    counts = decoding.no_statistics(state.length.shape[0], depth, drafter.nodes)
    return run.trace(target, drafter, request, state, counts, jnp.int32(1), rule=rule)
