"""The beginning of a decode: arrays sized, caches made, prompts run through the models."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax import types
from specjax.decoding import requests, speculative
from specjax.decoding import state as states

__all__ = ["init"]

# Capacities are rounded up to this many slots, so that prompts of like length share programs.
_CAPACITY_STEP = 128
_LARGEST_CHUNK = 128
_SMALLEST_CHUNK = 16
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
      key: a typed key, folded with each prompt's index; not consumed. Default `jax.random.key(0)`.
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
      state: a `DecodeResult.state` to go on from, with the same drafter; it is consumed, and
        `prompts` are appended to its rows.

    Raises:
      ValueError: a bad option, an empty prompt, or a text that fits neither the context nor the
        capacity.
    """
    tokens, counts = requests.pad(
        prompts, lengths, target.vocab_size, may_be_empty=state is not None
    )
    batch, widest = tokens.shape
    after = counts
    if state is not None:
        _check_state(drafter, state)
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
    if chunk is None:
        room = max(drafter.nodes + 1, _ROOM)
        width = _chunk(widest, slots + room)
    else:
        width = types.whole("chunk", chunk, 1)
        room = max(drafter.nodes + 1, width)
    # Outside a trace numpy pads: jax would compile a program for every length.
    numeric = jnp if requests.is_traced(tokens, counts) else np
    text = numeric.asarray(tokens, np.int32)[:, :slots]
    text = numeric.pad(text, ((0, 0), (0, slots - text.shape[1])))
    counts = numeric.asarray(counts, np.int32)
    if state is not None:
        # Rows go on from anywhere, so the last chunk may reach this far past the text.
        return request, _go_on(
            target, drafter, state, text, counts, request.limit, min(width, state.room)
        )
    return request, _start(target, drafter, text, counts, room, width)


def _check_state(drafter: types.Drafter, state: states.DecodeState) -> None:
    """Refuses a state that cannot go on, before anything of it is consumed."""
    if not requests.is_traced(state.tokens) and state.tokens.is_deleted():
        raise ValueError(
            "this state has been consumed, since a state goes on once; take the newest result's"
        )
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


def _chunk(widest: int, slots: int) -> int:
    """A power of two, so that prompts of like length share a prefill program.

    Prompts begin at slot 0, so chunks lie at its multiples; the last must end within `slots`.
    """
    rounded = 1 << max(widest - 1, 0).bit_length()
    chunk = min(max(rounded, _SMALLEST_CHUNK), _LARGEST_CHUNK)
    while chunk > _SMALLEST_CHUNK and -(-widest // chunk) * chunk > slots:
        chunk //= 2
    return chunk


def _capacity(
    context: int | None,
    after: Any,
    limit: jax.Array,
    widest: int,
    max_new_tokens: Any,
    capacity: int | None,
) -> int:
    """Text slots a row; refuses what does not fit, as far as it is known outside a trace."""
    if not requests.is_traced(after, limit):
        longest, needed = int(np.max(np.asarray(after))), int(np.max(np.asarray(limit)))
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
def _start(target, drafter, text, counts, room: int, chunk: int) -> states.DecodeState:
    batch, slots = text.shape
    # Copies: a result that is an argument would be the caller's own buffer, and be donated later.
    state = states.DecodeState(
        tokens=jnp.copy(text),
        length=jnp.copy(counts),
        start=jnp.copy(counts),
        stop_from=jnp.copy(counts),
        finish=jnp.full((batch,), np.int32(states.FinishReason.RUNNING)),
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
    state = dataclasses.replace(
        state,
        tokens=state.tokens.at[row, place].set(text, mode="drop"),
        length=state.length + counts,
        start=state.length + counts,
        stop_from=jnp.where(counts > 0, state.length + counts, state.stop_from),
        finish=_finish_on_going_on(state, counts, limit),
    )
    return speculative.prefill(target, drafter, state, cached, chunk)


def _finish_on_going_on(state, counts, limit) -> jax.Array:
    """Rows run on to their limits, save that nothing follows a dead end but new tokens."""
    dead_end, running, full = (
        np.int32(reason)
        for reason in (
            states.FinishReason.DEAD_END,
            states.FinishReason.RUNNING,
            states.FinishReason.LENGTH,
        )
    )
    goes_on = jnp.where(limit > state.length + counts, running, full)
    return jnp.where((state.finish == dead_end) & (counts == 0), dead_end, goes_on)
