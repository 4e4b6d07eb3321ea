"""A draft model's memory of the text: fed, caught up, and cut to what was accepted."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from specjax import types

__all__ = ["Memory", "catch_up", "check", "check_vocabulary", "init", "keep", "prefill"]

# Tokens a pass when the draft model lags far behind, as after another drafter's steps.
_CATCH_UP = 8


@struct.dataclass
class Memory:
    """What a draft model holds of the text.

    Attributes:
      cache: of the draft model.
      seen: int32[B], committed tokens it holds.
      fed: int32[], how deep the drafts of the current step were fed; uncommitted, as is the root.
    """

    cache: Any
    seen: jax.Array
    fed: jax.Array


def check(draft_model: types.LanguageModel) -> None:
    """Raises ValueError for what is no model."""
    if not isinstance(draft_model, types.LanguageModel):
        raise ValueError(
            f"draft_model is of type {type(draft_model).__name__}, no LanguageModel; of a loaded "
            "bundle, give bundle.target"
        )


def check_vocabulary(draft_model: types.LanguageModel, target: types.LanguageModel) -> None:
    """Raises ValueError for a model that speaks of other tokens."""
    if draft_model.vocab_size != target.vocab_size:
        raise ValueError(
            f"the draft model's vocabulary has {draft_model.vocab_size} tokens and the target's "
            f"{target.vocab_size}; both must share one tokenizer"
        )


def init(draft_model: types.LanguageModel, batch: int, capacity: int) -> Memory:
    """An empty memory."""
    return Memory(
        # Catching up writes a whole window, of which the last columns may lie past the text.
        cache=draft_model.init_cache(batch, capacity + _CATCH_UP),
        seen=jnp.zeros((batch,), jnp.int32),
        fed=jnp.zeros((), jnp.int32),
    )


def prefill(
    draft_model: types.LanguageModel,
    state: Memory,
    text: jax.Array,
    start: jax.Array,
    count: jax.Array,
    width: int,
) -> Memory:
    """Feeds a chunk of the text; as `Drafter.prefill`, `width` tokens wide."""
    # When going on, the draft model may lack the last tokens of the turn before; it feeds itself
    # from where it stands, not from where the target does.
    lacking = jnp.clip(start + count - state.seen, 0, width)
    return _feed(draft_model, state, _window(text, state.seen, width), lacking)[2]


def catch_up(
    draft_model: types.LanguageModel, state: Memory, context: types.Context
) -> tuple[jax.Array, Memory]:
    """Feeds the committed tokens that it lacks; the root stays its one uncommitted entry.

    Returns:
      Logits [B, V] after the root, and the state.
    """

    def missing(state):
        return jnp.where(context.active, context.length - 1 - state.seen, 0)

    def feed(state):
        count = jnp.minimum(missing(state), _CATCH_UP)
        return _feed(draft_model, state, _window(context.tokens, state.seen, _CATCH_UP), count)[2]

    state = jax.lax.while_loop(lambda state: jnp.any(missing(state) > 1), feed, state)
    # After full acceptance one token is missing, otherwise none: two columns serve both kinds of
    # row in one pass, and the root is in the one or the other.
    behind = missing(state)
    logits, entries, state = _feed(
        draft_model, state, _window(context.tokens, state.seen, 2), behind
    )

    def of_root(leaf):
        index = behind.reshape(-1, *[1] * (leaf.ndim - 1))
        return jnp.take_along_axis(leaf, index, axis=1)

    cache = draft_model.append(state.cache, jax.tree.map(of_root, entries))
    return of_root(logits)[:, 0], dataclasses.replace(state, cache=cache)


def keep(
    draft_model: types.LanguageModel,
    state: Memory,
    context: types.Context,
    verdict: types.Verdict,
    is_chain: bool,
) -> Memory:
    """Keeps the root and what was accepted of the fed nodes; the rest is caught up with next."""
    kept = jnp.where(context.active, 1 + jnp.minimum(verdict.count, state.fed), 0)
    nodes = None if is_chain else jnp.pad(verdict.path, ((0, 0), (1, 0)))
    return Memory(
        cache=draft_model.commit(state.cache, nodes, kept),
        seen=state.seen + kept,
        fed=jnp.zeros_like(state.fed),
    )


def _window(text: jax.Array, start: jax.Array, width: int) -> jax.Array:
    """`width` tokens of text[B, S] from start[B] on; what lies beyond the text repeats its end."""
    place = start[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
    return jnp.take_along_axis(text, jnp.minimum(place, text.shape[1] - 1), axis=1)


def _feed(
    draft_model: types.LanguageModel, state: Memory, tokens: jax.Array, count: jax.Array
) -> tuple[jax.Array, Any, Memory]:
    """Commits the first `count` of tokens[B, T]; also gives all logits [B, T, V] and entries."""
    output, entries = draft_model.apply(draft_model.params, tokens, state.cache, None, ())
    cache = draft_model.commit(draft_model.append(state.cache, entries), None, count)
    state = dataclasses.replace(state, cache=cache, seen=state.seen + count)
    return output.logits, entries, state
