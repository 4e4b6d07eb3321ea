"""A draft model: any `LanguageModel` proposes a chain (Leviathan et al. 2023, arXiv 2211.17192)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from specjax import sampling, trees, types

__all__ = ["DraftModelState", "model"]

# Tokens a pass when the draft model lags far behind, as after another drafter's steps.
_CATCH_UP = 8


@struct.dataclass
class DraftModelState:
    """The draft model's own memory.

    Attributes:
      cache: of the draft model.
      seen: int32[B], committed tokens it holds.
      fed: int32[], drafted tokens fed in the current step, uncommitted.
    """

    cache: Any
    seen: jax.Array
    fed: jax.Array


@struct.dataclass
class _Params:
    model: types.LanguageModel
    stop_below: jax.Array


def model(
    draft_model: types.LanguageModel,
    length: int = 5,
    *,
    greedy: bool = False,
    stop_below: float = 0.0,
) -> types.Drafter:
    """Drafts a chain of up to `length` tokens, drawn from the draft model's warped law.

    Args:
      draft_model: shares the target's vocabulary; drafts nothing beyond its own context length.
      length: K, the draft length; static.
      greedy: draft the most probable token instead, a deterministic draft for `match`.
      stop_below: stops before a token when the draft model's largest probability (at temperature 1)
        is below this. The drawn token itself never decides: dropping a drawn token would be lossy.

    Raises:
      ValueError: no `LanguageModel`, `length` below 1, or `stop_below` outside [0, 1].
    """
    if not isinstance(draft_model, types.LanguageModel):
        raise ValueError(
            f"draft_model is of type {type(draft_model).__name__}, no LanguageModel; of a loaded "
            "bundle, give bundle.target"
        )
    length = types.whole("draft length", length, 1)
    if not 0 <= stop_below <= 1:
        raise ValueError(f"stop_below={stop_below} must be a probability between 0 and 1")
    return types.Drafter(
        params=_Params(draft_model, jnp.asarray(stop_below, jnp.float32)),
        init=_init,
        prefill=_prefill,
        propose=_Propose(length, greedy),
        update=_update,
        nodes=length,
        name="model",
    )


def _init(params: _Params, batch: int, capacity: int) -> DraftModelState:
    return DraftModelState(
        # Catching up writes a whole window, of which the last columns may lie past the text.
        cache=params.model.init_cache(batch, capacity + _CATCH_UP),
        seen=jnp.zeros((batch,), jnp.int32),
        fed=jnp.zeros((), jnp.int32),
    )


def _prefill(
    params: _Params,
    state: DraftModelState,
    text: jax.Array,
    start: jax.Array,
    count: jax.Array,
    output: types.ModelOutput,
) -> DraftModelState:
    # When going on, the draft model may lack the last tokens of the turn before; it feeds itself
    # from where it stands, not from where the target does.
    width = output.logits.shape[1]
    lacking = jnp.clip(start + count - state.seen, 0, width)
    return _feed(params.model, state, _window(text, state.seen, width), lacking)[1]


def _window(text: jax.Array, start: jax.Array, width: int) -> jax.Array:
    """`width` tokens of text[B, S] from start[B] on; what lies beyond the text repeats its end."""
    place = start[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
    return jnp.take_along_axis(text, jnp.minimum(place, text.shape[1] - 1), axis=1)


def _feed(
    draft_model: types.LanguageModel, state: DraftModelState, tokens: jax.Array, count: jax.Array
) -> tuple[jax.Array, DraftModelState]:
    """Commits the first `count` of tokens[B, T]; also gives the logits [B, T, V]."""
    output, entries = draft_model.apply(draft_model.params, tokens, state.cache, None, ())
    cache = draft_model.commit(draft_model.append(state.cache, entries), None, count)
    return output.logits, dataclasses.replace(state, cache=cache, seen=state.seen + count)


def _catch_up(
    draft_model: types.LanguageModel, state: DraftModelState, context: types.Context
) -> tuple[jax.Array, DraftModelState]:
    """Feeds the committed tokens the draft model lacks; logits [B, V] after the root."""

    def missing(state):
        return jnp.where(context.active, context.length - 1 - state.seen, 0)

    def window(state, width):
        return _window(context.tokens, state.seen, width)

    def feed(state):
        count = jnp.minimum(missing(state), _CATCH_UP)
        return _feed(draft_model, state, window(state, _CATCH_UP), count)[1]

    state = jax.lax.while_loop(lambda state: jnp.any(missing(state) > 1), feed, state)
    # After full acceptance one token is missing, otherwise none: two columns serve both kinds of
    # row in one pass.
    behind = missing(state)
    count = jnp.where(context.active, behind + 1, 0)
    logits, state = _feed(draft_model, state, window(state, 2), count)
    return jnp.take_along_axis(logits, behind[:, None, None], axis=1)[:, 0], state


@dataclasses.dataclass(frozen=True)
class _Propose:
    length: int
    greedy: bool

    def __call__(
        self, params: _Params, state: DraftModelState, context: types.Context, keys: jax.Array
    ) -> tuple[types.Draft, DraftModelState]:
        draft_model = params.model
        if draft_model.vocab_size != context.target.vocab_size:
            raise ValueError(
                f"the draft model's vocabulary has {draft_model.vocab_size} tokens and the "
                f"target's {context.target.vocab_size}; both must share one tokenizer"
            )
        batch = context.length.shape[0]
        step_keys = sampling.derive(keys, sampling.Stream.DRAFT, context.length)
        tokens = jnp.zeros((batch, self.length), jnp.int32)
        present = jnp.zeros((batch, self.length), bool)
        laws = 0 if self.greedy else self.length

        def draw(depth, logits, going, tokens, present, log_probs):
            """Draws the token at `depth` for the rows that go on."""
            past = types.History(
                context.tokens,
                context.length,
                tokens[:, None],
                jnp.broadcast_to(depth, (batch, 1)),
            )
            law = sampling.warp(context.sampling, logits[:, None], past)[:, 0]
            confidence = jnp.max(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), axis=-1)
            going = going & (confidence >= params.stop_below)
            if draft_model.context_length is not None:
                going = going & (context.length + depth <= draft_model.context_length)
            # At a dead end of a constraint, which the text alone decides, there is none to draft.
            going = going & (jnp.max(law, axis=-1) > -jnp.inf)
            if self.greedy:
                token = sampling.greedy(law)
            else:
                depth_keys = jax.vmap(lambda key: jax.random.fold_in(key, depth))(step_keys)
                token = jnp.maximum(sampling.categorical(depth_keys, law), 0)
                log_probs = jax.lax.dynamic_update_slice_in_dim(
                    log_probs, law[:, None].astype(log_probs.dtype), depth, axis=1
                )
            tokens = jax.lax.dynamic_update_slice_in_dim(tokens, token[:, None], depth, axis=1)
            present = jax.lax.dynamic_update_slice_in_dim(present, going[:, None], depth, axis=1)
            return going, tokens, present, log_probs

        def more(carry):
            depth, _, (going, *_) = carry
            return (depth < self.length) & jnp.any(going)

        def extend(carry):
            depth, cache, (going, tokens, present, log_probs) = carry
            last = jax.lax.dynamic_slice_in_dim(tokens, depth - 1, 1, axis=1)
            output, entries = draft_model.apply(draft_model.params, last, cache, None, ())
            cache = draft_model.append(cache, entries)
            drawn = draw(depth, output.logits[:, 0], going, tokens, present, log_probs)
            return depth + 1, cache, drawn

        logits, state = _catch_up(draft_model, state, context)
        dtype = jnp.promote_types(logits.dtype, jnp.float32)
        log_probs = jnp.zeros((batch, laws, context.target.vocab_size), dtype)
        first = draw(jnp.int32(0), logits, context.active, tokens, present, log_probs)
        depth, cache, (_, tokens, present, log_probs) = jax.lax.while_loop(
            more, extend, (jnp.int32(1), state.cache, first)
        )
        draft = types.draft(
            tokens,
            trees.chain(self.length),
            log_probs=None if self.greedy else log_probs,
            present=present,
            vocab_size=context.target.vocab_size,
        )
        return draft, dataclasses.replace(state, cache=cache, fed=depth - 1)


def _update(
    params: _Params,
    state: DraftModelState,
    context: types.Context,
    draft: types.Draft,
    verdict: types.Verdict,
    output: types.ModelOutput,
) -> DraftModelState:
    """Keeps the accepted of the fed tokens; the last draft, never fed, is caught up next."""
    del draft, output
    kept = jnp.where(context.active, jnp.minimum(verdict.count, state.fed), 0)
    return DraftModelState(
        cache=params.model.commit(state.cache, None, kept),
        seen=state.seen + kept,
        fed=jnp.zeros_like(state.fed),
    )
