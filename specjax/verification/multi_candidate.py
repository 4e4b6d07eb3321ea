"""`multi_candidate`: round by round min(1, p/q), and p ← norm(max(p − q, 0)) after a rejection.

Keeps the target's law on sampled trees: SpecInfer's multi-step speculative sampling for independent
siblings (Miao et al. 2024, arXiv 2305.09781), recursive rejection sampling for siblings drawn
without replacement, where q loses every rejected token (Sequoia, Chen et al. 2024, arXiv
2402.12374; Jeon et al. 2024, arXiv 2402.14160).
Siblings of a union may have laws of their own, one-hot ones among them. On a chain this is `token`.
"""

import jax

from specjax import types
from specjax.verification import kernel, rounds

__all__ = ["accept", "residual", "rule"]


def accept(draft: types.Draft, target_log_probs: jax.Array, state: rounds.Rounds) -> jax.Array:
    """min(1, p(x)/q(x)) with p and q as earlier rejections left them: [B, N]; 0 if absent."""
    del draft, target_log_probs
    return state.accept


def residual(
    draft: types.Draft, target_log_probs: jax.Array, node: jax.Array, state: rounds.Rounds
) -> jax.Array:
    """The last p: log-law [B, V]."""
    return rounds.remaining(draft, target_log_probs, node, state)


rule = types.VerificationRule(
    "multi_candidate", kernel.check_sampled, accept, residual, rounds.reject
)
