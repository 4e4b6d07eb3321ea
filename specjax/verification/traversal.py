"""`traversal`: accept whole sequences of a sampled tree, from the leaves to the root.

Weng et al. 2025, "Traversal Verification for Speculative Tree Decoding" (arXiv 2505.12398).
Keeps the target's law; on a chain it is `block`, and on no tree does it accept fewer
tokens in expectation than `multi_candidate`. The paper walks from leaf to root and forgets a leaf
that it rejects; here the same law stands top down, so that the shared walk applies. With ā(v) the
weight that a node has when its children are all rejected, none of the sequences through v is
accepted with probability Π (1 − ā(u)) over v and everything below it.
"""

import dataclasses

import jax
import jax.numpy as jnp

from specjax import trees, types
from specjax.verification import kernel, rounds

__all__ = ["accept", "prepare", "residual", "rule"]


def accept(
    draft: types.Draft,
    target_log_probs: jax.Array,
    prepared: tuple[types.Draft, rounds.Rounds],
) -> jax.Array:
    """P(the walk goes through this node | through its parent, not its earlier siblings): [B, N]."""
    del target_log_probs
    draft, state = prepared
    tree = draft.tree
    row = jnp.arange(draft.tokens.shape[0], dtype=jnp.int32)[:, None]
    parent = trees.parents(tree)
    node = jnp.arange(tree.size + 1, dtype=jnp.int32)
    is_child = (parent[:, None, :] == node[None, :, None]) & draft.present[:, None, :]
    end = state.total + (1 - state.weight)
    rejected = jnp.where(end > 0, state.total / jnp.where(end > 0, end, 1.0), 1.0)
    stay = jnp.where(jnp.any(is_child, axis=-1), rejected, state.weight)
    # none[v]: no sequence through v is accepted.
    below = jnp.swapaxes(trees.ancestors(tree), 1, 2)
    none = jnp.prod(jnp.where(below, 1 - stay[:, None, :], 1.0), axis=-1)
    none_later = jnp.swapaxes(trees.earlier_siblings(tree), 1, 2)
    none_later = jnp.prod(jnp.where(none_later, none[:, None, 1:], 1.0), axis=-1)
    through = 1 - none[:, 1:]
    total = 1 - (1 - stay[row, parent]) * none[:, 1:] * none_later
    possible = draft.present & (through > 0)
    share = through / jnp.where(possible, total, 1.0)
    return jnp.where(possible, jnp.minimum(share, 1.0), 0.0)


def residual(
    draft: types.Draft,
    target_log_probs: jax.Array,
    node: jax.Array,
    prepared: tuple[types.Draft, rounds.Rounds],
) -> jax.Array:
    """norm(max(a·p − Σ c·q, 0)), a the node's weight; p where it has no child: log-law [B, V]."""
    draft, state = prepared
    return rounds.remaining(draft, target_log_probs, node, state)


def prepare(draft: types.Draft, target_log_probs: jax.Array) -> tuple[types.Draft, rounds.Rounds]:
    """The draft without what lies beyond a dead end, and its rounds with weights handed down."""
    ends = jnp.max(target_log_probs, axis=-1) == -jnp.inf
    above = trees.ancestors(draft.tree) & ~jnp.eye(draft.tree.size + 1, dtype=bool)[None]
    beyond = jnp.any(above & ends[:, None, :], axis=-1)[:, 1:]
    draft = dataclasses.replace(draft, present=draft.present & ~beyond)
    return draft, rounds.reject(draft, target_log_probs, hand_down=True)


rule = types.VerificationRule("traversal", kernel.check_sampled, accept, residual, prepare)
