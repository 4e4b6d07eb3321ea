"""Teacher forcing: target and drafter led through a text that is there already.

The target takes a chunk of the text a pass; within it place follows place, at each of which a
measure sees what `Drafter.propose` would, before both are told what the text says.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from specjax import decoding, sampling, trees, types

__all__ = ["CHUNK", "Place", "Text", "forced"]

Text = tuple[Sequence[int], Sequence[int]]
"""A prompt and its answer, token ids."""

CHUNK = 64
# Texts are padded to a power of two of slots, from here on, so that they share few programs.
_LEAST_CAPACITY = 256


@struct.dataclass
class Place:
    """One place of a text, as a measure sees it.

    Attributes:
      context: what a drafter may read before it, in a batch of one.
      past: the same, as `sampling.warp` takes it.
      logits: [1, 1, V], the target's.
      token: int32[], that the text has here.
      end: int32[], tokens of the whole text, which `context.tokens` holds.
    """

    context: types.Context
    past: types.History
    logits: jax.Array
    token: jax.Array
    end: jax.Array


def forced(
    measure: Callable[..., Any],
    given: Any,
    target: types.LanguageModel,
    drafter: types.Drafter,
    text: Text,
    asked: types.Sampling,
    *,
    chunk: int = CHUNK,
) -> Any:
    """What `measure` finds at every place of a text's answer.

    Args:
      measure: `(given, drafter, state, place) -> arrays`, a module-level function of the drafter's
        state and a `Place`.
      given: pytree of arrays.
      target: the model.
      drafter: is told the text, whatever it drafts.
      text: prompt and answer.
      asked: the sampling of the answer, scalars.
      chunk: tokens a pass of the target, which changes nothing but time and memory; static.

    Returns:
      Its arrays on the host, with a leading axis [T] of the answer's tokens.

    Raises:
      ValueError: an empty prompt or answer, or a text beyond the target's context.
    """
    prompt, answer = (np.asarray(part, np.int32) for part in text)
    if not len(prompt) or not len(answer):
        raise ValueError("a text needs a prompt and an answer of at least one token each")
    start, end = len(prompt), len(prompt) + len(answer)
    tokens = np.zeros((1, max(_LEAST_CAPACITY, 1 << (end - 1).bit_length())), np.int32)
    tokens[0, :end] = np.concatenate([prompt, answer])
    # The caches get room for a last chunk that reaches beyond the text.
    request, state = decoding.init(
        target,
        drafter,
        tokens[:, :start],
        lengths=[start],
        keys=jax.random.key(0)[None],
        max_new_tokens=len(answer),
        sampling=asked,
        eos=(),
        capacity=tokens.shape[1],
        chunk=chunk,
    )
    models, memories, parts = (target, drafter), (state.cache, state.drafter), []
    for place in range(start, end, chunk):
        span = np.asarray([place, end], np.int32)
        memories, found = _chunk(models, memories, request, tokens, span, given, measure, chunk)
        parts.append(jax.tree.map(np.asarray, found))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[: end - start], *parts)


@functools.partial(jax.jit, static_argnames=("measure", "chunk"), donate_argnames=("memories",))
def _chunk(models, memories, request, tokens, span, given, measure, chunk: int):
    """The places of one chunk, from span[0] to the text's end span[1] at most.

    Returns:
      What the models hold of the text behind them, and what was measured, [chunk, …].
    """
    (target, drafter), (cache, state), (first, end) = models, memories, span
    # The token before each place is the root there.
    fed = first - 1 + jnp.arange(chunk, dtype=jnp.int32)
    fed = tokens[:, jnp.minimum(fed, tokens.shape[1] - 1)]
    output, entries = target.apply(target.params, fed, cache, None, drafter.taps)
    cache = target.append(cache, entries)

    def at(index, state):
        length = (first + index)[None]
        root = jax.tree.map(
            lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, index, 1, axis=1), output
        )
        before = target.commit(cache, None, index[None])
        context = types.Context(
            tokens, length, length > 0, request.sampling, target, before, request.keys
        )
        past = sampling.history(tokens, length, trees.chain(0), jnp.zeros((1, 0), jnp.int32))
        place = Place(context, past, root.logits, tokens[0, length[0]], end)
        found = measure(given, drafter, state, place)
        one = jnp.ones((1,), jnp.int32)
        return drafter.prefill(drafter.params, state, tokens, length - 1, one, root), found

    def step(index, carry):
        state, found = at(index, carry[0])
        return state, jax.tree.map(lambda rows, row: rows.at[index].set(row), carry[1], found)

    shapes = jax.eval_shape(lambda: at(jnp.int32(0), state)[1])
    empty = jax.tree.map(lambda leaf: jnp.zeros((chunk, *leaf.shape), leaf.dtype), shapes)
    count = jnp.minimum(end - first, chunk)
    state, found = jax.lax.fori_loop(jnp.int32(0), count, step, (state, empty))
    return (target.commit(cache, None, count[None]), state), found
