"""A draft model: any `LanguageModel` proposes a chain (Leviathan et al. 2023, arXiv 2211.17192)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from specjax import sampling, trees, types
from specjax.drafters import memory

__all__ = ["model"]


@struct.dataclass
class _Params:
    model: types.LanguageModel
    stop_below: jax.Array | None
    stop_above: jax.Array | None


def model(
    draft_model: types.LanguageModel,
    length: int = 5,
    *,
    greedy: bool = False,
    coupled: bool = False,
    stop_below: float | None = None,
    stop_above: float | None = None,
) -> types.Drafter:
    """Drafts a chain of up to `length` tokens, drawn from the draft model's warped law.

    Args:
      draft_model: shares the target's vocabulary; drafts nothing beyond its own context length.
      length: K, the draft length; static.
      greedy: draft the most probable token instead, a deterministic draft for `match`.
      coupled: draw with the noise of plain decoding, keyed by position, for `coupled` and `match`:
        where the models agree, so do the draws (Daliri et al. 2024, arXiv 2408.07978).
      stop_below: stops before a token when the draft model's largest probability (at temperature 1)
        is below this. The drawn token itself never decides: dropping a drawn token would be lossy.
      stop_above: stops before a token when the entropy of the draft model's law (at temperature 1,
        in nats) is above this.

    Raises:
      ValueError: no `LanguageModel`, `length` below 1, `stop_below` outside [0, 1], `stop_above`
        below 0, or both `greedy` and `coupled`.
    """
    memory.check(draft_model)
    length = types.whole("draft length", length, 1)
    if greedy and coupled:
        raise ValueError(
            "greedy=True and coupled=True exclude each other: greedy drafts draw nothing"
        )
    if stop_below is not None and not 0 <= stop_below <= 1:
        raise ValueError(f"stop_below={stop_below} must be a probability between 0 and 1")
    if stop_above is not None and not stop_above >= 0:
        raise ValueError(f"stop_above={stop_above} must be an entropy in nats, 0 or more")
    # Left None they are no part of the program.
    stops = (None if stop is None else jnp.float32(stop) for stop in (stop_below, stop_above))
    return types.Drafter(
        params=_Params(draft_model, *stops),
        init=_init,
        prefill=_prefill,
        propose=_Propose(length, greedy, coupled),
        update=_update,
        nodes=length,
        name="model",
    )


def _init(params: _Params, batch: int, capacity: int) -> memory.Memory:
    return memory.init(params.model, batch, capacity)


def _prefill(params: _Params, state, text, start, count, output) -> memory.Memory:
    return memory.prefill(params.model, state, text, start, count, output.logits.shape[1])


@dataclasses.dataclass(frozen=True)
class _Propose:
    length: int
    greedy: bool
    coupled: bool

    def __call__(
        self, params: _Params, state: memory.Memory, context: types.Context, keys: jax.Array
    ) -> tuple[types.Draft, memory.Memory]:
        draft_model = params.model
        memory.check_vocabulary(draft_model, context.target)
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
            going = going & _sure(params, logits)
            if draft_model.context_length is not None:
                going = going & (context.length + depth <= draft_model.context_length)
            # At a dead end of a constraint, which the text alone decides, there is none to draft.
            going = going & (jnp.max(law, axis=-1) > -jnp.inf)
            if self.greedy:
                token = sampling.greedy(law)
            else:
                if self.coupled:
                    position = (context.length + depth)[:, None]
                    token = sampling.draw_target(
                        context.keys, position, law[:, None], going[:, None]
                    )[:, 0]
                else:
                    depth_keys = jax.vmap(lambda key: jax.random.fold_in(key, depth))(step_keys)
                    token = sampling.categorical(depth_keys, law)
                token = jnp.maximum(token, 0)
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

        logits, state = memory.catch_up(draft_model, state, context)
        dtype = np.promote_types(logits.dtype, np.float32)
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
            siblings="coupled" if self.coupled else "independent",
        )
        return draft, dataclasses.replace(state, cache=cache, fed=depth - 1)


def _sure(params: _Params, logits: jax.Array) -> jax.Array | bool:
    """Whether the law of logits[B, V] is one to draft from: bool[B]."""
    if params.stop_below is None and params.stop_above is None:
        return True
    log_law = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    law = jnp.exp(log_law)
    sure = jnp.ones(law.shape[:1], bool)
    if params.stop_below is not None:
        sure &= jnp.max(law, axis=-1) >= params.stop_below
    if params.stop_above is not None:
        entropy = -jnp.sum(jnp.where(law > 0, law * log_law, 0.0), axis=-1)
        sure &= entropy <= params.stop_above
    return sure


def _update(params: _Params, state, context, draft, verdict, output) -> memory.Memory:
    del draft, output
    return memory.keep(params.model, state, context, verdict, is_chain=True)
