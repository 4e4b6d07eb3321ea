"""`token`: accept a drafted token with probability min(1, p/q), else draw from norm(max(p − q, 0)).

Leviathan et al. 2023 (arXiv 2211.17192, algorithm 1) and Chen et al. 2023 (arXiv 2302.01318,
theorem 1), on sampled chains. A deterministic node inside such a chain has a one-hot law.
"""

import jax
import jax.numpy as jnp

from specjax import types
from specjax.verification import kernel

__all__ = ["accept", "check_sampled_chain", "clipped_difference", "log_ratio", "residual", "rule"]


def accept(draft: types.Draft, target_log_probs: jax.Array) -> jax.Array:
    """min(1, p(x)/q(x)): [B, N]; 0 where q(x) is 0 and at absent nodes."""
    return jnp.exp(jnp.minimum(log_ratio(draft, target_log_probs), 0.0))


def residual(draft: types.Draft, target_log_probs: jax.Array, node: jax.Array) -> jax.Array:
    """norm(max(p − q, 0)) after a rejected token, p at the end of the chain: log-law [B, V]."""
    return clipped_difference(draft, target_log_probs, node, jnp.zeros(node.shape))


def log_ratio(draft: types.Draft, target_log_probs: jax.Array) -> jax.Array:
    """log p(x)/q(x) of every node's token: [B, N]; −inf where q(x) is 0 and at absent nodes."""
    drawn = kernel.node_log_probs(draft)
    possible = draft.present & (drawn > -jnp.inf)
    # Masked before the difference: −∞ − (−∞) would be NaN, and so would its gradient.
    drawn = jnp.where(possible, drawn, 0.0)
    return jnp.where(possible, kernel.parent_laws(draft, target_log_probs) - drawn, -jnp.inf)


def clipped_difference(
    draft: types.Draft, target_log_probs: jax.Array, node: jax.Array, log_weight: jax.Array
) -> jax.Array:
    """norm(max(w·p − q, 0)) after a rejected child of `node`, p where it has none: log-law [B, V].

    Args:
      draft: a chain.
      target_log_probs: [B, N+1, V].
      node: int32[B], where the walk stopped.
      log_weight: [B], log w.
    """
    law = jnp.take_along_axis(target_log_probs, node[:, None, None], axis=1)[:, 0]
    child = jnp.minimum(node + 1, draft.tokens.shape[1])
    proposal = kernel.draft_law(draft, child)
    weight = log_weight.astype(law.dtype)[:, None]
    gap = jnp.maximum(jnp.exp(law + weight) - jnp.exp(proposal), 0.0)
    rejected = jnp.any(kernel.children(draft, node), axis=-1)
    return kernel.normalised(gap, law, rejected)


def check_sampled_chain(draft: types.Draft) -> None:
    """Raises ValueError unless the draft is a sampled chain."""
    kernel.check_sampled(draft)
    if not draft.tree.is_chain:
        raise ValueError(
            f"this rule verifies chains, and this draft is a tree of {draft.tree.size} nodes; use "
            "rule='multi_candidate', 'traversal' or 'match'"
        )


rule = types.VerificationRule("token", check_sampled_chain, accept, residual)
