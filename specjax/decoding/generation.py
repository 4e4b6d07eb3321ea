"""The entry points: `generate`, `autoregressive`, `stream`, and `init` for those who drive the loop by hand."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax import types, verification
from specjax.decoding import plain, requests, speculative
from specjax.decoding import state as states

__all__ = ["autoregressive", "decode", "generate", "init", "rule_for", "stream"]

_CAPACITY_STEP = 128
_LARGEST_CHUNK = 128
_SMALLEST_CHUNK = 16


def generate(
    target: types.LanguageModel,
    drafter: types.Drafter,
    prompts: requests.Prompts,
    *,
    rule: str | types.VerificationRule | None = None,
    **options: Any,
) -> states.DecodeResult:
    """Decodes speculatively; the text has the law of plain decoding.

    Args:
      target: the model whose law is kept.
      drafter: what proposes.
      prompts: one list of token ids a row, or int[B, P] with `lengths`. With `state`, tokens to append to each row (a
        row may be empty: it simply goes on).
      rule: a verification rule or its name; None picks one by the draft's kind.
      **options: see `init`.

    Returns:
      A `DecodeResult`. At temperature 0 under every rule, and at any temperature under `match`, the text is that of
      `autoregressive` with the same key; under the other rules it has the same law.

    Raises:
      ValueError: a bad option, an empty prompt, a text that does not fit, or a rule that cannot take the draft.
    """
    chosen = None if rule is None else verification.get(rule)
    return decode(target, drafter, *init(target, drafter, prompts, **options), chosen)


def decode(
    target: types.LanguageModel,
    drafter: types.Drafter,
    request: states.Request,
    state: states.DecodeState,
    rule: str | types.VerificationRule | None = None,
) -> states.DecodeResult:
    """Runs the compiled loop until every row has finished.

    Args:
      target, drafter, request: as given to and by `init`.
      state: consumed (its buffers are donated).
      rule: as in `generate`.
    """
    chosen = None if rule is None else verification.get(rule)
    statistics = _no_statistics(target, drafter, request, state)
    # Every step emits a token, so a decode takes at most as many steps as the text has room for.
    most_steps = jnp.asarray(state.tokens.shape[1], jnp.int32)
    state, statistics = _run(target, drafter, request, state, statistics, most_steps, chosen)
    return _result(state, statistics)


def autoregressive(
    target: types.LanguageModel, prompts: requests.Prompts, **options: Any
) -> states.DecodeResult:
    """Plain decoding, one token a target step: the baseline, and the law that everything else keeps.

    Args and raises: as `generate`.
    """
    return generate(target, plain.NOTHING, prompts, rule="match", **options)


def stream(
    target: types.LanguageModel,
    drafter: types.Drafter,
    prompts: requests.Prompts,
    *,
    rule: str | types.VerificationRule | None = None,
    steps: int = 1,
    **options: Any,
) -> Iterator[list[list[int]]]:
    """Decodes as `generate` does and yields tokens as they are accepted.

    Args:
      steps: target steps between two yields.
      The others: as `generate`.

    Yields:
      One list of new tokens a row, empty for a row that has finished. The generator's value is the `DecodeResult`.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    chosen = None if rule is None else verification.get(rule)
    request, state = init(target, drafter, prompts, **options)
    statistics = _no_statistics(target, drafter, request, state)
    return _stream(target, drafter, request, state, statistics, chosen, steps)


def _stream(target, drafter, request, state, statistics, rule, steps):
    most_steps = jnp.asarray(steps, jnp.int32)
    shown = np.asarray(state.length)
    while np.any(np.asarray(state.finish) == states.FinishReason.RUNNING):
        state, statistics = _run(target, drafter, request, state, statistics, most_steps, rule)
        length, tokens = np.asarray(state.length), np.asarray(state.tokens)
        yield [tokens[row, shown[row] : length[row]].tolist() for row in range(len(length))]
        shown = length
    return _result(state, statistics)


def init(
    target: types.LanguageModel,
    drafter: types.Drafter,
    prompts: requests.Prompts,
    *,
    lengths: Any = None,
    key: jax.Array | None = None,
    keys: jax.Array | None = None,
    max_new_tokens: Any = 128,
    sampling: types.Sampling | None = None,
    eos: Any = None,
    stop: Any = (),
    capacity: int | None = None,
    chunk: int | None = None,
    state: states.DecodeState | None = None,
) -> tuple[states.Request, states.DecodeState]:
    """Builds the request and runs the prompts through the models; `decoding.step` goes on from there.

    Args:
      target: the model.
      drafter: what will propose.
      prompts: as in `generate`.
      lengths: int[B], when prompts are an array.
      key: a typed key, folded with each prompt's index; not consumed. Default `jax.random.key(0)`.
      keys: instead, one typed key a prompt: a prompt with its key gives the same text in any batch and slot.
      max_new_tokens: an int or one a row.
      sampling: default greedy.
      eos: end-of-sequence tokens, for all rows or a list of lists; None takes the target's own.
      stop: stop sequences of token ids, for all rows or a list of them a row; they may span steps, and are kept in the
        text as an end-of-sequence token is.
      capacity: text slots a row, S; by default the longest prompt plus its new tokens, rounded up. Give more to go on
        later. Each value is a program of its own.
      chunk: tokens a prefill pass; by default by the longest prompt.
      state: a `DecodeResult.state` to go on from, with the same drafter; it is consumed, and `prompts` are appended.

    Raises:
      ValueError: a bad option, an empty prompt, or a text that fits neither the context nor the capacity.
    """
    if state is not None:
        prompts = _additions(prompts, state)
        counts = prompts[1]
        before = state.length
    else:
        prompts = requests.pad(prompts, lengths, target.vocab_size)
        counts = prompts[1]
        before = 0
    tokens, _ = prompts
    batch = tokens.shape[0]
    rows = requests.request_keys(key, keys, batch)
    after = jnp.asarray(counts, jnp.int32) + before
    ends = target.eos_ids if eos is None else eos
    request = requests.build(
        rows, after, max_new_tokens, sampling, ends, stop, target.vocab_size
    )
    slots = state.tokens.shape[1] if state is not None else capacity
    slots = _capacity(target, request, after, tokens, max_new_tokens, slots)
    widest = max(tokens.shape[1], 1)
    chunk = chunk or min(max(1 << (widest - 1).bit_length(), _SMALLEST_CHUNK), _LARGEST_CHUNK)
    if state is not None:
        chunk = min(chunk, state.room)
        tokens = _widen(tokens, slots)
        return request, _resume(target, drafter, state, tokens, jnp.asarray(counts, jnp.int32), chunk)
    room = max(drafter.nodes + 1, chunk)
    tokens = _widen(tokens, slots)
    return request, _start(target, drafter, tokens, jnp.asarray(counts, jnp.int32), room, chunk)


def rule_for(
    target: types.LanguageModel, drafter: types.Drafter, rule: str | types.VerificationRule | None = None
) -> types.VerificationRule:
    """The rule that `generate` would use with this drafter."""
    if rule is not None:
        return verification.get(rule)
    request, state = jax.eval_shape(_abstract_init, target, drafter)
    return verification.default_rule(_abstract_draft(target, drafter, request, state))


def _abstract_init(target: types.LanguageModel, drafter: types.Drafter):
    tokens = jnp.zeros((1, 8), jnp.int32)
    counts = jnp.ones((1,), jnp.int32)
    request = requests.build(
        jax.random.key(0)[None], counts, 1, None, (), (), target.vocab_size
    )
    return request, _start(target, drafter, tokens, counts, drafter.nodes + 1, 1)


def _abstract_draft(target, drafter, request, state) -> types.Draft:
    def propose(target, drafter, request, state):
        context = types.Context(
            state.tokens,
            state.length,
            state.finish == states.FinishReason.RUNNING,
            request.sampling,
            target,
            state.cache,
        )
        return drafter.propose(drafter.params, state.drafter, context, request.keys)[0]

    return jax.eval_shape(propose, target, drafter, request, state)


@jax.jit
def _no_statistics(target, drafter, request, state) -> states.Statistics:
    depth = _abstract_draft(target, drafter, request, state).tree.max_depth
    return states.no_statistics(state.length.shape[0], depth)


def _capacity(target, request, after, tokens, max_new_tokens, capacity) -> int:
    """Text slots a row; refuses what does not fit."""
    context = target.context_length
    known = not requests.is_traced(request.limit, after)
    if known:
        longest = int(jnp.max(after))
        needed = int(jnp.max(request.limit))
    elif requests.is_traced(max_new_tokens):
        if capacity is None:
            raise ValueError("with a traced max_new_tokens, say the capacity")
        return capacity
    else:
        longest = tokens.shape[1]
        needed = longest + int(np.max(max_new_tokens)) if capacity is None else capacity
    if context is not None and longest >= context:
        raise ValueError(
            f"a prompt of {longest} tokens leaves no room in the model's context of {context}; shorten it"
        )
    if context is not None and needed > context:
        raise ValueError(
            f"prompt and max_new_tokens come to {needed} tokens, and the model's context holds {context}; "
            f"ask for at most {context - longest} new tokens"
        )
    if capacity is None:
        capacity = -(-needed // _CAPACITY_STEP) * _CAPACITY_STEP
        return capacity if context is None else min(capacity, context)
    if needed > capacity:
        raise ValueError(
            f"capacity={capacity} is too small for prompt plus new tokens, {needed}; raise it to at least {needed}"
        )
    return capacity


def _additions(prompts: requests.Prompts, state: states.DecodeState) -> tuple[np.ndarray, np.ndarray]:
    """Tokens to append to the rows of a state; unlike first prompts, they may be empty."""
    rows = [np.asarray(row, np.int32).reshape(-1) for row in prompts]
    if len(rows) != state.length.shape[0]:
        raise ValueError(
            f"the state has {state.length.shape[0]} rows, and {len(rows)} prompts were given to go on"
        )
    counts = np.asarray([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), int(counts.max())), np.int32)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = row
    return tokens, counts


def _widen(tokens: Any, slots: int) -> jax.Array:
    tokens = jnp.asarray(tokens, jnp.int32)[:, :slots]
    return jnp.pad(tokens, ((0, 0), (0, slots - tokens.shape[1])))


@functools.partial(jax.jit, static_argnames=("room", "chunk"))
def _start(target, drafter, tokens, counts, room: int, chunk: int) -> states.DecodeState:
    batch, slots = tokens.shape
    state = states.DecodeState(
        tokens=tokens,
        length=counts,
        start=counts,
        finish=jnp.full((batch,), states.FinishReason.RUNNING, jnp.int32),
        cache=target.init_cache(batch, slots + room),
        drafter=drafter.init(drafter.params, batch, slots + room),
        room=room,
    )
    state = speculative.prefill(target, drafter, state, jnp.zeros_like(counts), chunk)
    # A result of the program that is one of its arguments would be the caller's own buffer, and be donated later.
    return state.replace(tokens=jnp.copy(tokens), length=jnp.copy(counts), start=jnp.copy(counts))


@functools.partial(jax.jit, static_argnames=("chunk",), donate_argnames=("state",))
def _resume(target, drafter, state, tokens, counts, chunk: int) -> states.DecodeState:
    slots = state.tokens.shape[1]
    row = jnp.arange(tokens.shape[0], dtype=jnp.int32)[:, None]
    order = jnp.arange(slots, dtype=jnp.int32)[None]
    place = jnp.where(order < counts[:, None], state.length[:, None] + order, slots)
    length = state.length + counts
    cached = jnp.maximum(state.length - 1, 0)
    state = state.replace(
        tokens=state.tokens.at[row, place].set(tokens, mode="drop"),
        length=length,
        start=jnp.copy(length),
        finish=jnp.full_like(state.finish, states.FinishReason.RUNNING),
    )
    return speculative.prefill(target, drafter, state, cached, chunk)


_run = jax.jit(
    speculative.run, static_argnames=("rule",), donate_argnames=("state", "statistics")
)


def _result(state: states.DecodeState, statistics: states.Statistics) -> states.DecodeResult:
    # Copies, since going on from the state donates its buffers.
    return states.DecodeResult(
        tokens=jnp.copy(state.tokens),
        start=jnp.copy(state.start),
        length=jnp.copy(state.length),
        finish=jnp.copy(state.finish),
        statistics=statistics,
        state=state,
    )
