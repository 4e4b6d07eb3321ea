"""The beginning of a decode: arrays sized, caches made, prompts run through the models."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax import sampling, trees, types
from specjax.decoding import requests, speculative
from specjax.decoding import state as states

__all__ = ["check_state", "init"]

# Capacities are rounded up to this many slots, so that prompts of like length share programs.
_CAPACITY_STEP = 128
_LARGEST_CHUNK = 128
_CHUNK_STEP = 16
# Slots past the text, whatever the prompt, so that its length never changes the loop's program.
_ROOM = 32


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
    """Builds the request and runs the prompts through the models; `step` goes on from there.

    Args:
      target: the model.
      drafter: what will propose.
      prompts: as in `generate`.
      lengths: int[B], when prompts are an array.
      key: a typed threefry2x32 key, folded with each prompt's index; not consumed. Default
        `jax.random.key(0)`.
      keys: instead, one typed key a prompt: a prompt with its key gives the same text in any batch
        and slot.
      max_new_tokens: an int or one a row; 0 lets a row sit a turn out when going on.
      sampling: default greedy.
      eos: end-of-sequence tokens, for all rows or a list of lists; None takes the target's own.
      stop: stop sequences of token ids, for all rows or a list of them a row; they may span steps,
        and are kept in the text as an end-of-sequence token is.
      capacity: text slots a row, S; by default the longest prompt plus its new tokens, rounded up.
        Give more to go on later. Each value is a program of its own.
      chunk: tokens a prefill pass; by default by the longest prompt. The caches get room for it.
      state: a `DecodeResult.state` to go on from, with the same target and drafter (only the shapes
        of their memories are compared); it is consumed, and `prompts` are appended to its rows.

    Raises:
      ValueError: a bad option, an empty prompt, or a text that fits neither the context nor the
        capacity. Under a trace, where lengths and limits cannot be seen, such a row ends at once
        with a finish reason instead.
    """
    requests.check(target, drafter, state)
    tokens, counts = requests.pad(
        prompts, lengths, target.vocab_size, may_be_empty=state is not None
    )
    batch, widest = tokens.shape
    after = counts
    if state is not None:
        check_state(drafter, state)
        rows, slots = state.tokens.shape
        if rows != batch:
            raise ValueError(f"the state has {rows} rows, and {batch} prompts were given to go on")
        if capacity not in (None, slots):
            raise ValueError(
                f"capacity={capacity} cannot be changed on the way; the state has {slots}"
            )
        after, capacity = counts + state.length, slots
    request = requests.build(
        requests.request_keys(key, keys, batch),
        after,
        max_new_tokens,
        sampling,
        target.eos_ids if eos is None else eos,
        stop,
        target.vocab_size,
        # A row may sit a turn out.
        least=1 if state is None else 0,
    )
    slots = _capacity(target.context_length, after, request.limit, widest, max_new_tokens, capacity)
    _check_constraint(request.sampling, target.vocab_size, batch, slots, drafter.nodes)
    # Rows that go on do so from anywhere, so their last chunk may reach this far past the text.
    room = max(drafter.nodes + 1, _ROOM) if state is None else state.room
    if chunk is None:
        # The last token is left to the first step; going on, the one left before comes on top.
        fed = max(min(widest, slots) - (state is None), 1)
        width = _chunk(fed, slots + room)
        width = width if state is None else min(width, room)
    else:
        width = types.whole("chunk", chunk, 1)
        room = max(drafter.nodes + 1, width) if state is None else room
        if width > room:
            raise ValueError(
                f"chunk={chunk} is more than the room={room} that the state's caches have; start "
                f"the decode with chunk={chunk}, or go on with less"
            )
    # Outside a trace numpy pads: jax would compile a program for every length.
    numeric = jnp if requests.is_traced(tokens, counts) else np
    text = numeric.asarray(tokens, np.int32)[:, :slots]
    text = numeric.pad(text, ((0, 0), (0, slots - text.shape[1])))
    counts = numeric.asarray(counts, np.int32)
    if state is not None:
        return request, _go_on(target, drafter, state, text, counts, request.limit, width)
    return request, _start(target, drafter, text, counts, request.limit, room, width)


def check_state(drafter: types.Drafter, state: states.DecodeState) -> None:
    """Refuses a state that cannot go on, before anything of it is consumed."""
    speculative.check_room(drafter.nodes, state)
    batch, slots = state.tokens.shape
    made = jax.eval_shape(
        lambda params: drafter.init(params, batch, slots + state.room), drafter.params
    )

    def form(tree):
        leaves, structure = jax.tree.flatten(tree)
        return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]

    if form(made) != form(state.drafter):
        raise ValueError(
            f"the state was started with another drafter than {drafter.name!r}; go on with that one"
        )


def _check_constraint(
    law: types.Sampling, vocab_size: int, batch: int, slots: int, nodes: int
) -> None:
    """Asks the constraint once, abstractly: it must not fail after a state has been consumed."""
    if law.constraint is None:
        return

    def ask():
        text, length = jnp.zeros((batch, slots), jnp.int32), jnp.ones((batch,), jnp.int32)
        drafted = jnp.zeros((batch, nodes), jnp.int32)
        past = sampling.history(text, length, trees.chain(nodes), drafted)
        return sampling.warp(law, jnp.zeros((batch, nodes + 1, vocab_size)), past)

    jax.eval_shape(ask)


def _chunk(needed: int, slots: int) -> int:
    """Tokens a prefill pass: as few passes as may be, of even width, so that little is padded.

    A multiple of 16, so that prompts of like length share a prefill program. Prompts begin at slot
    0, so chunks lie at its multiples; the last must end within `slots`.
    """
    passes = -(-needed // _LARGEST_CHUNK)
    chunk = -(-needed // (passes * _CHUNK_STEP)) * _CHUNK_STEP
    while chunk > _CHUNK_STEP and -(-needed // chunk) * chunk > slots:
        chunk -= _CHUNK_STEP
    return chunk


def _capacity(
    context: int | None,
    after: Any,
    limit: Any,
    widest: int,
    max_new_tokens: Any,
    capacity: int | None,
) -> int:
    """Text slots a row; refuses what does not fit, as far as it is known outside a trace."""
    if not requests.is_traced(after, limit):
        after, limit = np.asarray(after), np.asarray(limit)
        # Rows that sit a turn out may have no room left.
        longest, needed = int(np.max(after, where=limit > after, initial=0)), int(np.max(limit))
    elif capacity is not None:
        longest, needed = 0, capacity
    elif requests.is_traced(max_new_tokens):
        raise ValueError(
            "max_new_tokens is traced, so the capacity cannot follow it; give capacity"
        )
    else:
        longest, needed = widest, widest + int(np.max(max_new_tokens))
    if context is not None and longest >= context:
        raise ValueError(
            f"a prompt of {longest} tokens leaves no room in the model's context of {context}; "
            "shorten it"
        )
    if context is not None and needed > context:
        raise ValueError(
            f"prompt and new tokens come to {needed}, and the model's context holds {context}; "
            f"ask for at most {context - longest} new tokens"
        )
    if capacity is None:
        rounded = -(-needed // _CAPACITY_STEP) * _CAPACITY_STEP
        return rounded if context is None else min(rounded, context)
    capacity = types.whole("capacity", capacity, 1)
    if needed > capacity:
        raise ValueError(
            f"capacity={capacity} is too small for prompt plus new tokens; start the decode with "
            f"capacity={needed} or more"
        )
    return capacity


@functools.partial(jax.jit, static_argnames=("room", "chunk"))
def _start(target, drafter, text, counts, limit, room: int, chunk: int) -> states.DecodeState:
    batch, slots = text.shape
    counts = jnp.minimum(counts, slots)
    # Copies: a result that is an argument would be the caller's own buffer, and be donated later.
    state = states.DecodeState(
        tokens=jnp.copy(text),
        length=jnp.copy(counts),
        start=jnp.copy(counts),
        stop_from=jnp.copy(counts),
        finish=_finish(counts, limit, slots),
        cache=target.init_cache(batch, slots + room),
        drafter=drafter.init(drafter.params, batch, slots + room),
        room=room,
    )
    return speculative.prefill(target, drafter, state, jnp.zeros_like(counts), chunk)


@functools.partial(jax.jit, static_argnames=("chunk",), donate_argnames=("state",))
def _go_on(target, drafter, state, text, counts, limit, chunk: int) -> states.DecodeState:
    slots = state.tokens.shape[1]
    row = jnp.arange(text.shape[0], dtype=jnp.int32)[:, None]
    order = jnp.arange(slots, dtype=jnp.int32)[None]
    place = jnp.where(order < counts[:, None], state.length[:, None] + order, slots)
    cached = jnp.maximum(state.length - 1, 0)
    length = jnp.minimum(state.length + counts, slots)
    # Nothing follows a dead end but new tokens.
    dead_end = np.int32(states.FinishReason.DEAD_END)
    stays = (state.finish == dead_end) & (counts == 0)
    state = dataclasses.replace(
        state,
        tokens=state.tokens.at[row, place].set(text, mode="drop"),
        length=length,
        start=jnp.copy(length),
        stop_from=jnp.where(counts > 0, length, state.stop_from),
        finish=jnp.where(stays, dead_end, _finish(length, limit, slots)),
    )
    return speculative.prefill(target, drafter, state, cached, chunk)


def _finish(length: jax.Array, limit: jax.Array, slots: int) -> jax.Array:
    """Why a row has ended before it began, if it has: int32[B]."""
    ended = {
        states.FinishReason.LENGTH: length >= limit,
        states.FinishReason.CACHE_FULL: (length >= slots) & (length < limit),
        states.FinishReason.EMPTY: length < 1,
    }
    finish = jnp.full(length.shape, np.int32(states.FinishReason.RUNNING))
    for reason, here in ended.items():
        finish = jnp.where(here, np.int32(reason), finish)
    return finish
