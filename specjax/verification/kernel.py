"""Verification: the one resolve, the one walk and the one sampler that every rule shares.

A rule gives, for every node, the probability that it is accepted given that its parent was and its
earlier siblings were not, and the residual law wherever the walk may stop. Everything else is here,
so that the certificate runs through the code that decodes.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax import sampling, trees, types

__all__ = [
    "RefusedDraftError",
    "check",
    "check_sampled",
    "children",
    "draft_law",
    "judge",
    "matches",
    "node_log_probs",
    "normalised",
    "parent_laws",
    "resolve",
    "sums",
    "verify",
]

# Numbers of a law's size that are worked on at once: few enough to stay near a core.
_AT_ONCE = 1 << 17


def verify(
    rule: types.VerificationRule,
    keys: jax.Array,
    length: jax.Array,
    draft: types.Draft,
    target_log_probs: jax.Array,
) -> types.Verdict:
    """Accepts a path of the draft and draws the token after it, keeping the target's law exactly.

    Args:
      rule: how.
      keys: request keys[B]; folded, not consumed.
      length: int32[B], committed tokens, the root included.
      draft: the proposal.
      target_log_probs: [B, N+1, V], natural logs; row i is the warped law after node i.

    Raises:
      RefusedDraftError: the rule cannot take the draft.
      ValueError: shapes that do not agree.
    """
    batch, size = draft.tokens.shape
    if target_log_probs.shape[:2] != (batch, size + 1):
        raise ValueError(
            f"target_log_probs[B, N+1, V] has shape {target_log_probs.shape}, but the draft's "
            f"tokens[B, N] have shape {draft.tokens.shape}"
        )
    if draft.log_probs.shape[1] and draft.log_probs.shape[2] != target_log_probs.shape[2]:
        raise ValueError(
            f"the draft's laws are over V={draft.log_probs.shape[2]} tokens, the target's over "
            f"V={target_log_probs.shape[2]}"
        )
    check(rule, draft)
    if rule.draw is not None:
        draws = rule.draw(keys, length, draft, target_log_probs)
        path, count, stop = resolve(draft, matches(draft, draws))
        next_token = jnp.take_along_axis(draws, stop[:, None], axis=1)[:, 0]
        return types.Verdict(path, count, next_token, draws)

    accept, residual = judge(rule, draft, target_log_probs)
    accept_keys = sampling.derive(keys, sampling.Stream.ACCEPT, length)
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (size,), accept.dtype))(accept_keys)
    # Strictly below, so that an acceptance of 0 never accepts, even at a uniform of 0.
    path, count, stop = resolve(draft, uniform < accept)
    residual_keys = sampling.derive(keys, sampling.Stream.RESIDUAL, length)
    return types.Verdict(path, count, sampling.categorical(residual_keys, residual(stop)))


def judge(
    rule: types.VerificationRule, draft: types.Draft, target_log_probs: jax.Array
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """A rule's acceptances [B, N], and its residual as a function of node[B], a log-law [B, V].

    Args:
      rule, draft: a rule that takes the draft.
      target_log_probs: [B, N+1, V], natural logs.
    """
    prepared = () if rule.prepare is None else (rule.prepare(draft, target_log_probs),)

    def residual(node: jax.Array) -> jax.Array:
        return rule.residual(draft, target_log_probs, node, *prepared)

    return rule.accept(draft, target_log_probs, *prepared), residual


class RefusedDraftError(ValueError):
    """A rule cannot take a draft of this kind; the message names the rule and those that can."""


def check(rule: types.VerificationRule, draft: types.Draft) -> None:
    """Raises `RefusedDraftError` for a draft that a rule cannot take, with the rules that can."""
    try:
        rule.check(draft)
    except ValueError as error:
        raise RefusedDraftError(f"rule {rule.name!r}: {error}") from error


def check_sampled(draft: types.Draft) -> None:
    """Raises ValueError unless the draft was drawn from laws, afresh every step."""
    if draft.is_deterministic:
        raise ValueError(
            "this rule needs drafts drawn from a law, and this drafter's are deterministic; use "
            "rule='match'"
        )
    if draft.siblings == "coupled":
        # The same noise drafts a position again after a rejection, which a rule that reads the
        # later drafts, as `block` does, would remember.
        raise ValueError(
            "this rule needs fresh draws every step, and this draft's are coupled to the target's; "
            "use rule='coupled' or rule='match'"
        )


def matches(draft: types.Draft, draws: jax.Array) -> jax.Array:
    """Whether each node equals the target's draw at its parent, if there is one: bool[B, N]."""
    parent = jnp.broadcast_to(trees.parents(draft.tree), draft.tokens.shape)
    drawn = jnp.take_along_axis(draws, parent, axis=1)
    return (draft.tokens == drawn) & (drawn >= 0)


def resolve(draft: types.Draft, flags: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Walks from the root to the first flagged child, again and again, until there is none.

    Deterministic, and without a loop: a node is chosen when it is flagged and no earlier sibling
    is, and accepted when its whole path is chosen.

    Args:
      draft: the proposal; absent nodes are never accepted.
      flags: bool[B, N].

    Returns:
      path int32[B, D] (the first `count` count), count int32[B], stop int32[B] (a node, 0 is the
      root).
    """
    flags = flags & draft.present
    batch, size = flags.shape
    tree = draft.tree
    beaten = jnp.any(trees.earlier_siblings(tree) & flags[:, None, :], axis=-1)
    rejected = jnp.pad(~flags | beaten, ((0, 0), (1, 0)))
    accepted = ~jnp.any(trees.ancestors(tree)[:, 1:] & rejected[:, None, :], axis=-1)
    count = jnp.sum(accepted, axis=-1, dtype=jnp.int32)
    node = jnp.arange(1, size + 1, dtype=jnp.int32)[None]
    # Indices grow along a path, so the deepest accepted node has the largest.
    stop = jnp.max(jnp.where(accepted, node, 0), axis=-1, initial=0)
    level = jnp.arange(1, tree.max_depth + 1, dtype=jnp.int32)[None, None]
    here = accepted[:, :, None] & (trees.depths(tree)[:, 1:, None] == level)
    path = jnp.sum(jnp.where(here, node[:, :, None], 0), axis=1, dtype=jnp.int32)
    return path, count, stop


def node_log_probs(draft: types.Draft) -> jax.Array:
    """log q of every node's own token under its law: [B, N]; 0 for a deterministic node."""
    if draft.is_deterministic:
        return jnp.zeros(draft.tokens.shape, draft.log_probs.dtype)
    row = jnp.arange(draft.tokens.shape[0], dtype=jnp.int32)[:, None]
    drawn = draft.log_probs[row, jnp.maximum(draft.law, 0), draft.tokens]
    return jnp.where(draft.law < 0, 0.0, drawn)


def draft_law(draft: types.Draft, node: jax.Array) -> jax.Array:
    """The law a node was drawn from, natural logs [B, V]; one-hot where deterministic.

    Args:
      draft: the proposal.
      node: int32[B], in 1…N.
    """
    index = (node - 1)[:, None]
    token = jnp.take_along_axis(draft.tokens, index, axis=1)
    law = jnp.take_along_axis(draft.law, index, axis=1)
    vocabulary = jnp.arange(draft.log_probs.shape[2], dtype=jnp.int32)[None]
    one_hot = jnp.where(vocabulary == token, 0.0, -jnp.inf).astype(draft.log_probs.dtype)
    if draft.is_deterministic:
        return one_hot
    drawn = jnp.take_along_axis(draft.log_probs, jnp.maximum(law, 0)[:, :, None], axis=1)[:, 0]
    return jnp.where(law < 0, one_hot, drawn)


def parent_laws(draft: types.Draft, target_log_probs: jax.Array) -> jax.Array:
    """log p of every node's own token under the target's law at its parent: [B, N]."""
    row = jnp.arange(draft.tokens.shape[0], dtype=jnp.int32)[:, None]
    parent = jnp.broadcast_to(trees.parents(draft.tree), draft.tokens.shape)
    return target_log_probs[row, parent, draft.tokens]


def children(draft: types.Draft, node: jax.Array) -> jax.Array:
    """Which nodes are present children of node[B]: bool[B, N]."""
    return (trees.parents(draft.tree) == node[:, None]) & draft.present


def sums(function: Callable[..., Any], given: Any, vocab_size: int) -> Any:
    """`function` of every entry of `given`, where it sums over laws: some entries at a time.

    A large vocabulary's laws are gone through one by one, so that nothing of the size of all of
    them is ever written; a small one's together.

    Args:
      function: of a pytree of scalars or rows, to a pytree of scalars.
      given: pytree of [B, n, …], where B and n may be 1 for the same everywhere.
      vocab_size: V.

    Returns:
      A pytree of [B, n].
    """
    shape = np.broadcast_shapes(*(leaf.shape[:2] for leaf in jax.tree.leaves(given)))

    def flat(leaf):
        rest = leaf.shape[2:]
        return jnp.broadcast_to(leaf, (*shape, *rest)).reshape(-1, *rest)

    given, at_once = jax.tree.map(flat, given), max(1, _AT_ONCE // vocab_size)
    if math.prod(shape) <= at_once:
        found = jax.vmap(function)(given)
    else:
        found = jax.lax.map(function, given, batch_size=None if at_once == 1 else at_once)
    return jax.tree.map(lambda leaf: leaf.reshape(shape), found)


def normalised(left: jax.Array, law: jax.Array, rejected: jax.Array) -> jax.Array:
    """The log-law of what a rejection left, [B, V]; `law` where nothing was rejected.

    Args:
      left: [B, V], at least 0, not normalised.
      law: [B, V], natural logs.
      rejected: bool[B].
    """
    total = jnp.sum(left, axis=-1, keepdims=True)
    # What is left without mass is reached with probability 0, but for rounding; the target's law is
    # right then.
    rejected = rejected[:, None] & (total > 0)
    share = jnp.where(rejected, left / jnp.where(total > 0, total, 1.0), 1.0)
    log_share = jnp.where(share > 0, jnp.log(jnp.where(share > 0, share, 1.0)), -jnp.inf)
    return jnp.where(rejected, log_share, law)
