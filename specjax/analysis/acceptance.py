"""Expected accepted length by enumeration, differentiable in both laws."""

import jax
import jax.numpy as jnp

from specjax import trees, types, verification
from specjax.analysis import certificates, outcomes
from specjax.verification import kernel

__all__ = ["accepted_of", "expected_accepted"]


def accepted_of(
    rule: str | types.VerificationRule, draft: types.Draft, target_log_probs: jax.Array
) -> jax.Array:
    """The mean number of accepted nodes of a given draft, over the rule's own draws: [B].

    Args:
      rule: the rule or its name.
      draft: the proposal, whose tokens are given.
      target_log_probs: [B, N+1, V], natural logs.

    Raises:
      RefusedDraftError: the rule cannot take the draft.
    """
    rule = verification.get(rule)
    kernel.check(rule, draft)
    stop = outcomes.stops(draft, kernel.judge(rule, draft, target_log_probs)[0])
    return jnp.sum(stop * trees.depths(draft.tree).astype(stop.dtype), axis=-1)


def expected_accepted(
    rule: str | types.VerificationRule,
    tree: trees.Tree,
    target: list[jax.Array],
    proposal: list[jax.Array],
    siblings: str = "independent",
) -> jax.Array:
    """The mean number of accepted drafts, over all drafts too: [], differentiable in both laws.

    By enumeration of V^N drafts; the arguments are those of `certify`.
    """
    kind = certificates.Kind((0,) * tree.size, siblings)
    draft, weight, after = certificates.every_draft(kind, tree, target, [proposal])
    return jnp.sum(weight * accepted_of(rule, draft, after))
