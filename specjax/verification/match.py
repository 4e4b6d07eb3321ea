"""`match`: sample from the target and accept the draft's tokens while they agree.

The law of the text is the target's by construction, whatever the draft: only the target's own draws
are emitted. With noise keyed by position, the very text is that of plain decoding at any
temperature. At temperature 0 this is greedy verification (Stern et al. 2018, arXiv 1811.03115).
"""

import jax
import jax.numpy as jnp

from specjax import sampling, trees, types
from specjax.verification import kernel

__all__ = ["accept", "draw", "residual", "rule"]


def accept(draft: types.Draft, target_log_probs: jax.Array) -> jax.Array:
    """p(x) / (1 − Σ p of earlier distinct siblings), 0 for a token already among them: [B, N]."""
    same = draft.tokens[:, :, None] == draft.tokens[:, None, :]
    earlier = trees.earlier_siblings(draft.tree) & draft.present[:, None, :]
    repeated = jnp.any(earlier & same, axis=-1)
    probability = jnp.exp(kernel.parent_laws(draft, target_log_probs))
    counted = jnp.where(repeated, 0.0, probability)
    taken = jnp.sum(jnp.where(earlier, counted[:, None, :], 0.0), axis=-1)
    possible = draft.present & ~repeated & (probability > 0)
    # Rounding may make what is left smaller than one of its parts.
    left = jnp.where(possible, jnp.maximum(1 - taken, probability), 1.0)
    return jnp.where(possible, probability / left, 0.0)


def residual(draft: types.Draft, target_log_probs: jax.Array, node: jax.Array) -> jax.Array:
    """p without the node's children, renormalised: log-law [B, V]."""
    law = jnp.take_along_axis(target_log_probs, node[:, None, None], axis=1)[:, 0]
    row = jnp.arange(law.shape[0], dtype=jnp.int32)[:, None]
    beyond = law.shape[1]
    token = jnp.where(kernel.children(draft, node), draft.tokens, beyond)
    left = law.at[row, token].set(-jnp.inf, mode="drop")
    # Children that hold all the mass are never all rejected, so any law will do there; at a dead
    # end the law has no token to begin with.
    nothing = jnp.all(left == -jnp.inf, axis=-1, keepdims=True)
    return jnp.where(nothing, law, jax.nn.log_softmax(jnp.where(nothing, 0.0, left), axis=-1))


def draw(
    keys: jax.Array, length: jax.Array, draft: types.Draft, target_log_probs: jax.Array
) -> jax.Array:
    """The target's token after each node, keyed by its position: int32[B, N+1]."""
    position = length[:, None] + trees.depths(draft.tree)
    # Nobody reads a draw after an absent node, save the drafter of a passenger.
    wanted = jnp.pad(draft.present | draft.passengers, ((0, 0), (1, 0)), constant_values=True)
    return sampling.draw_target(keys, position, target_log_probs, wanted)


def _check(draft: types.Draft) -> None:
    """Any draft will do."""
    del draft


rule = types.VerificationRule("match", _check, accept, residual, draw=draw)
