"""`block`: accept a chain's tokens jointly; never fewer than `token` in expectation.

Sun et al. 2024, "Block Verification Accelerates Speculative Decoding" (arXiv 2403.10444, algorithm
2). The paper draws a flag per position and stops at the last one set; here the same law stands in
conditional form, so that the shared walk applies: with h_i the paper's acceptance probability,
P(stop ≥ i) = 1 − Π_{j≥i}(1 − h_j).
"""

import jax
import jax.numpy as jnp

from specjax import types
from specjax.verification import kernel, token

__all__ = ["accept", "residual", "rule"]


def accept(draft: types.Draft, target_log_probs: jax.Array) -> jax.Array:
    """P(stop ≥ i) / P(stop ≥ i − 1): [B, N]; 0 at absent nodes."""
    # Where the target's law has no token, the chain ends: nothing is drafted beyond a dead end. It
    # has not the drafted one either, and where it always has that, there is no need to look.
    refused = kernel.parent_laws(draft, target_log_probs) == -jnp.inf
    lives = jax.lax.cond(
        jnp.any(refused),
        lambda: jnp.any(target_log_probs[:, :-1] > -jnp.inf, axis=-1),
        lambda: jnp.ones(draft.tokens.shape, bool),
    )
    present = draft.present & (jnp.cumprod(lives.astype(jnp.int32), axis=1) > 0)
    weight = jnp.exp(_log_weights(draft, target_log_probs))
    following = jnp.pad(present[:, 1:], ((0, 0), (0, 1)))
    surplus = _surplus(draft, target_log_probs, weight)
    # In this order the total is never below the surplus, whatever is rounded off.
    total = surplus + (1 - weight)
    certain = total <= 0
    joint = jnp.where(certain, 1.0, surplus / jnp.where(certain, 1.0, total))
    flag = jnp.where(present, jnp.where(following, joint, weight), 0.0)
    at_least = 1 - jnp.cumprod((1 - flag)[:, ::-1], axis=1)[:, ::-1]
    before = jnp.pad(at_least[:, :-1], ((0, 0), (1, 0)), constant_values=1.0)
    reachable = before > 0
    # A cumulated product need not fall monotonically when rounded.
    share = jnp.minimum(at_least, before)
    return jnp.where(reachable, share / jnp.where(reachable, before, 1.0), 0.0)


def residual(draft: types.Draft, target_log_probs: jax.Array, node: jax.Array) -> jax.Array:
    """norm(max(P_i·p − q, 0)) after a rejection at i, p at the end of the chain: log-law [B, V]."""
    weight = jnp.pad(_log_weights(draft, target_log_probs), ((0, 0), (1, 0)))
    chosen = jnp.take_along_axis(weight, node[:, None], axis=1)[:, 0]
    return token.clipped_difference(draft, target_log_probs, node, chosen)


def _log_weights(draft: types.Draft, target_log_probs: jax.Array) -> jax.Array:
    """log P_i of nodes 1…N, P_i = min(1, P_{i−1}·p(x_i)/q(x_i)) and P_0 = 1: [B, N]."""
    # A walk held below 0 is its free walk less the free walk's highest point so far, 0 included.
    walk = jnp.cumsum(token.log_ratio(draft, target_log_probs), axis=1)
    return walk - jnp.maximum(jax.lax.cummax(walk, axis=1), 0.0)


def _surplus(draft: types.Draft, target_log_probs: jax.Array, weight: jax.Array) -> jax.Array:
    """Σ_y max(P_i·p(y | x_≤i) − q(y | x_≤i), 0) of nodes 1…N; 0 at the last: [B, N]."""
    batch, size = draft.tokens.shape
    law, weight = draft.law[:, 1:], weight[:, :-1]
    draft, target_log_probs = jax.tree.map(jnp.asarray, (draft, target_log_probs))

    def surplus(given):
        row, node, law, weight = given
        after, proposal = target_log_probs[row, node], draft.log_probs[row, law]
        return jnp.sum(jnp.maximum(weight * jnp.exp(after) - jnp.exp(proposal), 0.0))

    row = jnp.arange(batch, dtype=jnp.int32)[:, None]
    node = jnp.arange(1, size, dtype=jnp.int32)[None]
    given = row, node, jnp.maximum(law, 0), weight
    sampled = kernel.sums(surplus, given, target_log_probs.shape[2])
    # Against a one-hot law only the drafted token's mass is lost.
    certain = weight * -jnp.expm1(kernel.parent_laws(draft, target_log_probs)[:, 1:])
    return jnp.pad(jnp.where(law < 0, certain, sampled), ((0, 0), (0, 1)))


rule = types.VerificationRule("block", token.check_sampled_chain, accept, residual)
