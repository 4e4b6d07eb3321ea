"""The law of one verification's outcomes, as a product and by enumeration of what is drawn."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from specjax import trees, types
from specjax.analysis import laws
from specjax.verification import kernel

__all__ = [
    "enumerated_law",
    "law_of_draws",
    "outcome_law",
    "residuals",
    "stops",
    "stops_of_flags",
]


def outcome_law(
    rule: types.VerificationRule, draft: types.Draft, target_log_probs: jax.Array
) -> jax.Array:
    """P(the walk stops at this node, the next token is this one): [B, N+1, V].

    Reach times residual; differentiable in both laws. Where the target's law is a dead end nothing
    follows, and the outcomes lack what stops there.

    Args:
      rule: the rule.
      draft: the proposal.
      target_log_probs: [B, N+1, V], natural logs.

    Raises:
      RefusedDraftError: the rule cannot take the draft.
    """
    kernel.check(rule, draft)
    accept, residual = kernel.judge(rule, draft, target_log_probs)
    return stops(draft, accept)[:, :, None] * residuals(draft, residual)


def enumerated_law(
    rule: types.VerificationRule, draft: types.Draft, target_log_probs: jax.Array
) -> jax.Array:
    """`outcome_law`, summed over all 2^N flags or all V^(N+1) draws through `resolve`."""
    if rule.draw is not None:
        return law_of_draws(rule, draft, target_log_probs)[0]
    accept, residual = kernel.judge(rule, draft, target_log_probs)
    return stops_of_flags(draft, accept)[:, :, None] * residuals(draft, residual)


def stops(draft: types.Draft, accept: jax.Array) -> jax.Array:
    """P(the walk stops at this node), as a product of acceptances [B, N]: [B, N+1]."""
    earlier = trees.earlier_siblings(draft.tree)
    chosen = accept * jnp.prod(jnp.where(earlier, 1 - accept[:, None, :], 1.0), axis=-1)
    on_path = trees.ancestors(draft.tree)[:, :, 1:]
    reach = jnp.prod(jnp.where(on_path, chosen[:, None, :], 1.0), axis=-1)
    node = jnp.arange(draft.tree.size + 1, dtype=jnp.int32)
    is_child = trees.parents(draft.tree)[:, None, :] == node[None, :, None]
    return reach * jnp.prod(jnp.where(is_child, 1 - accept[:, None, :], 1.0), axis=-1)


def stops_of_flags(draft: types.Draft, accept: jax.Array) -> jax.Array:
    """`stops`, summed over all 2^N flags through `resolve`."""

    def weigh(flag):
        weight = jnp.prod(jnp.where(flag[None] > 0, accept, 1 - accept), axis=-1)
        flags = jnp.broadcast_to(flag[None] > 0, accept.shape)
        stop = kernel.resolve(draft, flags)[2]
        here = jnp.arange(draft.tree.size + 1, dtype=jnp.int32)[None] == stop[:, None]
        return jnp.where(here, weight[:, None], 0.0)

    return _sum_over(weigh, 2, draft.tree.size)


def law_of_draws(
    rule: types.VerificationRule, draft: types.Draft, target_log_probs: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`outcome_law` of a rule that draws and its `stops`, summed over all V^(N+1) draws."""
    if rule.draw_law is not None:
        target_log_probs = rule.draw_law(draft, target_log_probs)
    batch, rows, vocab_size = target_log_probs.shape
    # A dead end draws −1 with certainty; token 0 stands in for it until the end.
    dead = jnp.max(target_log_probs, axis=-1) == -jnp.inf
    certain = jax.nn.one_hot(0, vocab_size, dtype=target_log_probs.dtype)
    probabilities = jnp.where(dead[:, :, None], certain[None, None], jnp.exp(target_log_probs))

    def weigh(draw):
        own = jnp.take_along_axis(probabilities, draw[None, :, None], axis=2)[:, :, 0]
        draws = jnp.where(dead, -1, draw[None])
        stop = kernel.resolve(draft, kernel.matches(draft, draws))[2]
        row = jnp.arange(batch, dtype=jnp.int32)
        return jnp.zeros_like(probabilities).at[row, stop, draw[stop]].set(jnp.prod(own, axis=1))

    law = _sum_over(weigh, vocab_size, rows)
    return jnp.where(dead[:, :, None], 0.0, law), jnp.sum(law, axis=2)


def _sum_over(weigh: Callable[[jax.Array], jax.Array], base: int, count: int) -> jax.Array:
    """Σ `weigh` over all numbers of `count` digits, in blocks: a long float32 sum loses digits."""
    block = base ** min(count, 4)
    numbers = jnp.asarray(laws.digits(base, count)).reshape(-1, block, count)
    return jnp.sum(
        jax.lax.map(lambda some: jnp.sum(jax.vmap(weigh)(some), axis=0), numbers), axis=0
    )


def residuals(draft: types.Draft, residual: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The law of the next token wherever the walk may stop: [B, N+1, V].

    Args:
      draft: the proposal.
      residual: as `verification.judge` gives it.
    """

    def at(node):
        return residual(jnp.broadcast_to(node, draft.tokens.shape[:1]))

    node = jnp.arange(draft.tree.size + 1, dtype=jnp.int32)
    return jnp.exp(jax.vmap(at, out_axes=1)(node))
