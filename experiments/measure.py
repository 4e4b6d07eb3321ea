"""Seconds of the parts of a decode: functions of models and drafters, without flags or printing.

What is compared is measured in alternation, warm, in one process: the variants take turns, so that
a machine that slows down slows all of them. Every program ends in something small that hangs on all
it computed, so that nothing large is fetched and nothing can be dropped.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from experiments import loop_program
from specjax import decoding, sampling, trees, types, verification

__all__ = [
    "Seconds",
    "Variant",
    "bandwidth_forms",
    "begin",
    "copying_prompt",
    "first_token",
    "forward",
    "interleave",
    "loop",
    "matmul",
    "proposal",
    "read_size",
    "steps",
    "verifications",
]

_ROW_BYTES = 16384
_PASSES = 8

_Name = TypeVar("_Name", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Wall-clock seconds of some runs of one thing."""

    median: float
    min: float
    max: float


@dataclasses.dataclass(frozen=True)
class Variant:
    """Something to be timed: `run(*prepare())`, of which only `run` is on the clock.

    Attributes:
      times: how often a run does the thing; its seconds are a run's, divided.
    """

    run: Callable[..., Any]
    prepare: Callable[[], tuple] = tuple
    times: int = 1


def interleave(
    variants: Mapping[_Name, Variant],
    repeats: int,
    expect: Callable[[float], None] = lambda seconds: None,
    settling: float = 0.06,
) -> dict[_Name, Seconds]:
    """Times all variants in turn, `repeats` rounds after one that compiles and one that warms.

    At every turn a variant first runs off the clock for a while: a wide pass leaves the cores at a
    lower rate for some 50 milliseconds, and the next would pay for it. A small part finds its
    arguments in the caches then, as it does after the pass that made them; what it does not find
    there in a loop counts as the loop's overhead. A run of ten times that while needs none of it.

    Args:
      variants: by name.
      repeats: rounds that count.
      expect: told, when everything is warm, how many seconds the rounds will take.
      settling: seconds off the clock at every turn.
    """
    for variant in variants.values():
        _run(variant)
    once = [_run(variant) for variant in variants.values()]
    settles = [seconds < 10 * settling for seconds in once]
    settled_once = [need * max(settling, s) for need, s in zip(settles, once, strict=True)]
    expect(repeats * (sum(once) + sum(settled_once)))
    taken: dict[_Name, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for (name, variant), need in zip(variants.items(), settles, strict=True):
            settled = time.perf_counter() + need * settling
            while time.perf_counter() < settled:
                _run(variant)
            taken[name].append(_run(variant) / variant.times)
    return {
        name: Seconds(statistics.median(runs), min(runs), max(runs)) for name, runs in taken.items()
    }


def _run(variant: Variant) -> float:
    arguments = jax.block_until_ready(variant.prepare())
    began = time.perf_counter()
    jax.block_until_ready(variant.run(*arguments))
    return time.perf_counter() - began


# The machine.


def read_size(size: int) -> int:
    """What `bandwidth_forms` reads, in bytes: `size`, rounded down to whole rows of both halves."""
    return size // _ROW_BYTES // 2 * 2 * _ROW_BYTES


def bandwidth_forms(size: int) -> dict[str, Variant]:
    """Ways to read `read_size(size)` bytes; a compiler is slow at some, so the quickest counts."""
    columns = _ROW_BYTES // 4
    halves = jnp.ones((2, read_size(size) // 2 // _ROW_BYTES, columns), jnp.float32)
    vector = jnp.ones((2, columns), jnp.float32)
    forms = {
        "sum": jax.jit(lambda halves, vector: jnp.sum(halves)),
        "sums of halves": jax.jit(lambda halves, vector: jnp.sum(halves, axis=(1, 2))),
        "products with a vector": jax.jit(
            lambda halves, vector: jnp.einsum("pij,pj->pi", halves, vector)
        ),
    }
    return {name: Variant(functools.partial(form, halves, vector)) for name, form in forms.items()}


def matmul(side: int) -> Variant:
    """A product of two float32 matrices, 2·side³ operations."""
    left, right = jnp.ones((side, side), jnp.float32), jnp.full((side, side), 0.5, jnp.float32)
    return Variant(functools.partial(jax.jit(jnp.matmul), left, right))


# The target's pass.


def forward(
    model: types.LanguageModel,
    count: int,
    fill: int,
    cache: Any,
    tree: trees.Tree | None = None,
    passes: int = _PASSES,
) -> Variant:
    """A pass over `count` new tokens, down to the most probable token after each.

    Some passes in one program, as a decode is one, each over the tokens that the one before gave: a
    call costs a while of its own.

    Args:
      model: with a key/value cache.
      count: T; with a tree, its nodes and the root.
      fill: committed tokens, int.
      cache: of any rows; what it holds does not matter, and its length is replaced.
      tree: how the new tokens hang together; None is a chain.
      passes: in the program.
    """
    batch = cache.length.shape[0]
    drawn = np.random.default_rng(0).integers(0, model.vocab_size, (batch, count))
    tokens = jnp.asarray(drawn, jnp.int32)
    cache = dataclasses.replace(cache, length=jnp.full((batch,), fill, jnp.int32))
    run = functools.partial(_forward, model, tokens, cache, tree, passes)
    return Variant(run, times=passes)


@jax.jit
def _forward(model, tokens, cache, tree, passes):
    def again(_, made):
        output, entries = model.apply(model.params, made[0], cache, tree, ())
        return sampling.greedy(output.logits), entries

    shapes = jax.eval_shape(again, 0, (tokens,))
    entries = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes[1])
    return jax.lax.fori_loop(0, passes, again, (tokens, entries))


# Drafting, verifying, and the whole loop.


def copying_prompt(vocab_size: int, length: int) -> list[int]:
    """A prompt that repeats 16 random tokens, so that a model will go on and lookup will find."""
    pattern = np.random.default_rng(1).integers(0, vocab_size, 16)
    return np.resize(pattern, length).tolist()


def begin(
    target: types.LanguageModel,
    drafter: types.Drafter,
    prompt: Sequence[int],
    batch: int = 1,
    temperature: float = 0.0,
    passes: int = _PASSES,
    **shape: Any,
) -> tuple[decoding.Request, decoding.DecodeState]:
    """The prompt run through both models, with room for so many steps, in rows that stay equal.

    `shape` may hold `capacity` and `chunk`, as `decoding.init` takes them.
    """
    options = {
        "keys": jnp.stack([jax.random.key(0)] * batch),
        "max_new_tokens": passes * (drafter.nodes + 1),
        "sampling": types.Sampling(temperature),
        "eos": (),
    }
    return decoding.init(target, drafter, [prompt] * batch, **options, **shape)


def proposal(
    target: types.LanguageModel,
    drafter: types.Drafter,
    request: decoding.Request,
    state: decoding.DecodeState,
) -> Variant:
    """One draft after a prompt."""
    return Variant(functools.partial(_propose, target, drafter, request, state))


@jax.jit
def _propose(target, drafter, request, state):
    active = state.finish == decoding.FinishReason.RUNNING
    context = types.Context(
        state.tokens, state.length, active, request.sampling, target, state.cache, request.keys
    )
    draft, _ = drafter.propose(drafter.params, state.drafter, context, request.keys)
    return draft.tokens, draft.present


def steps(
    target: types.LanguageModel,
    drafter: types.Drafter,
    request: decoding.Request,
    state: decoding.DecodeState,
    passes: int = _PASSES,
) -> Variant:
    """Steps of the compiled loop after a prompt, several in one program, as in `forward`.

    A step is a draft, its pass, and all the rest. What `decoding.advance` does before its program
    runs is off the clock.
    """
    form, most = decoding.form_of(target, drafter), jnp.int32(passes)

    def copied():
        # The loop consumes its state and counts.
        counts = decoding.no_statistics(state.length.shape[0], form.depth, drafter.nodes)
        return jax.tree.map(jnp.copy, state), counts

    def run(state, counts):
        state, counts = loop_program.run(
            target, drafter, request, state, counts, most, rule=form.rule
        )
        return state.length, counts

    return Variant(run, copied, passes)


def verifications(
    target: types.LanguageModel, prompt: Sequence[int], length: int, law: types.Sampling
) -> dict[str, Variant]:
    """Warping and each rule, over the logits that the target gives at the prompt's end.

    Args:
      target: the model.
      prompt: of more than `length` tokens.
      length: K, draft length; K + 1 laws are warped.
      law: the sampling.
    """
    request, state = decoding.init(target, decoding.NOTHING, [prompt], sampling=law, eos=())
    tokens = jnp.asarray([prompt], jnp.int32)
    cache = target.init_cache(1, len(prompt))
    logits = jax.jit(_last_logits, static_argnames=("count",))(target, tokens, cache, length + 1)
    chain, drafted = trees.chain(length), sampling.greedy(logits)[:, :length]
    certain = types.draft(drafted, chain, vocab_size=target.vocab_size)
    # The most probable tokens, under the target's own law at temperature 1: all but certain to be
    # accepted, so that the rule goes through every node.
    drawn = types.draft(drafted, chain, log_probs=jax.nn.log_softmax(logits[:, :length], axis=-1))
    drafts = {"match": certain, "coupled": dataclasses.replace(drawn, siblings="coupled")}
    return {
        name: Variant(
            functools.partial(_verify, request, state, logits, drafts.get(name, drawn), rule=rule)
        )
        for name, rule in verification.RULES.items()
    }


def _last_logits(target, tokens, cache, count: int):
    output, _ = target.apply(target.params, tokens, cache, None, ())
    return output.logits[:, -count:].astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("rule",))
def _verify(request, state, logits, draft, rule):
    past = sampling.history(state.tokens, state.length, draft.tree, draft.tokens)
    log_probs = sampling.warp(request.sampling, logits, past)
    return verification.verify(rule, request.keys, state.length, draft, log_probs)


def loop(
    target: types.LanguageModel,
    drafter: types.Drafter,
    prompt: Sequence[int],
    new_tokens: int,
    repeats: int,
    expect: Callable[[float], None] = lambda seconds: None,
) -> dict[str, Any]:
    """The compiled loop beside passes of the same widths and fills, timed alone.

    An iteration's pass is wide where something was drafted and one token otherwise; its cost is the
    mean over three fills, the loop's first, middle and last, in a cache of the loop's capacity.

    Args:
      target: with a key/value cache.
      drafter: drafts all of its nodes or none (prompt lookup, or plain decoding's).
      prompt: one row.
      new_tokens: how long the loop runs.
      repeats: rounds.
      expect: as in `interleave`.

    Returns:
      `iterations`, `wide_iterations`, `tau`, `fills`, `seconds_per_iteration` and
      `pass_seconds_per_iteration` (medians), `seconds` of the whole loop, `overhead_seconds` an
      iteration and its share `overhead`.
    """
    request, state = decoding.init(target, drafter, [prompt], max_new_tokens=new_tokens, eos=())

    def copied():
        # A decode consumes its state.
        return (jax.tree.map(jnp.copy, state),)

    def run(state):
        result = decoding.decode(target, drafter, request, state)
        return result.tokens, result.statistics

    counts = run(*copied())[1]
    iterations = int(counts.target_steps[0])
    wide = int(counts.nodes_drafted[0]) // max(drafter.nodes, 1)
    first = len(prompt) - 1
    last = first + max(int(counts.emitted[0]) - round(counts.tau), 0)
    fills = sorted({first, (first + last) // 2, last})
    weights = {drafter.nodes + 1: wide, 1: iterations - wide}
    weights = {width: weight for width, weight in weights.items() if weight}
    variants: dict[Any, Variant] = {"loop": Variant(run, copied)}
    for width in weights:
        for fill in fills:
            variants[width, fill] = forward(target, width, fill, state.cache)
    times = interleave(variants, repeats, expect)
    passes = sum(
        weight * statistics.mean(times[width, fill].median for fill in fills)
        for width, weight in weights.items()
    )
    whole = times["loop"].median
    return {
        "iterations": iterations,
        "wide_iterations": wide,
        "width": drafter.nodes + 1,
        "tau": counts.tau,
        "fills": fills,
        "seconds": dataclasses.asdict(times["loop"]),
        "seconds_per_iteration": whole / iterations,
        "pass_seconds_per_iteration": passes / iterations,
        "overhead_seconds": (whole - passes) / iterations,
        "overhead": (whole - passes) / whole,
    }


# The beginning of a decode.


def first_token(
    target: types.LanguageModel, drafter: types.Drafter, prompt: Sequence[int], steps: int = 1
) -> Variant:
    """The prompt run through the models, and `steps` (0 or 1) steps after it."""

    def run():
        request, state = decoding.init(target, drafter, [prompt], max_new_tokens=1, eos=())
        if steps == 0:
            return state
        return decoding.decode(target, drafter, request, state).tokens

    return Variant(run)
