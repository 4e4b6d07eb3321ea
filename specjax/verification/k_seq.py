"""`k_seq`: accept the first of k independent siblings with p(x) > u·ρ·q(x), one factor ρ for all.

The k-sequential selection of Sun et al. 2023, "SpecTr: Fast Speculative Decoding via Optimal
Transport" (arXiv 2310.15141), at every node of a tree. Keeps the target's law: with
β = Σ_y min(q(y), p(y)/ρ), the chance that one sibling is accepted, what is accepted has the law
min(q, p/ρ)·Σ_{j<k} (1 − β)^j, which stays below p as long as that sum is at most ρ. The paper asks
for the smallest such ρ, between 1 and k. k counts the siblings that are present, duplicates too;
it must not hang on what they are, so that here a node may be absent for what was drawn above it,
but not for its siblings. On a chain ρ is 1, and this is `token`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from specjax import trees, types
from specjax.verification import kernel, token

__all__ = ["accept", "prepare", "residual", "rule"]


def accept(
    draft: types.Draft, target_log_probs: jax.Array, prepared: tuple[jax.Array, jax.Array]
) -> jax.Array:
    """min(1, p(x)/(ρ·q(x))): [B, N]; 0 where q(x) is 0 and at absent nodes."""
    row = jnp.arange(draft.tokens.shape[0], dtype=jnp.int32)[:, None]
    factor = prepared[0][row, trees.parents(draft.tree)]
    ratio = token.log_ratio(draft, target_log_probs) - jnp.log(factor)
    return jnp.exp(jnp.minimum(ratio, 0.0))


def residual(
    draft: types.Draft,
    target_log_probs: jax.Array,
    node: jax.Array,
    prepared: tuple[jax.Array, jax.Array],
) -> jax.Array:
    """norm(p − min(q, p/ρ)·Σ_{j<k} (1 − β)^j), p where the node has no child: log-law [B, V]."""
    draft, target_log_probs = jax.tree.map(jnp.asarray, (draft, target_log_probs))
    row = jnp.arange(node.shape[0], dtype=jnp.int32)
    factor, tries = (values[row, node] for values in prepared)
    children = kernel.children(draft, node)
    law = target_log_probs[row, node]
    proposal = jnp.exp(kernel.draft_law(draft, 1 + jnp.argmax(children, axis=-1).astype(jnp.int32)))
    target = jnp.exp(law)
    accepted = jnp.minimum(proposal, target / factor[:, None]) * tries[:, None]
    left = jnp.maximum(target - accepted, 0.0)
    return kernel.normalised(left, law, jnp.any(children, axis=-1))


def prepare(draft: types.Draft, target_log_probs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """ρ and Σ_{j<k} (1 − β)^j of every node: [B, N+1] each; both 1 with less than two children."""
    draft, target_log_probs = jax.tree.map(jnp.asarray, (draft, target_log_probs))
    batch, rows, _ = target_log_probs.shape
    ones = jnp.ones((batch, rows), target_log_probs.dtype)
    topology = draft.tree.static_parents
    if topology is None:
        nodes, most = np.arange(rows), rows - 1
    else:
        counts = np.bincount(np.asarray(topology, int), minlength=rows)
        nodes, most = np.flatnonzero(counts > 1), int(counts.max(initial=0))
    if most < 2:
        return ones, ones
    is_child = trees.parents(draft.tree)[:, None, :] == jnp.asarray(nodes, jnp.int32)[None, :, None]
    is_child = is_child & draft.present[:, None, :]
    count = jnp.sum(is_child, axis=-1, dtype=jnp.int32)
    law = jnp.max(jnp.where(is_child, draft.law[:, None, :], -1), axis=-1)
    row = jnp.arange(batch, dtype=jnp.int32)[:, None]

    def shares(laws, factor):
        """Σ q where q ≤ p/ρ and Σ p elsewhere, so that β = first + second/ρ: a pass over laws."""

        def share(given):
            row, node, law, factor = given
            target, proposal = jnp.exp(laws[0][row, node]), jnp.exp(laws[1][row, law])
            whole = proposal * factor <= target
            return (
                jnp.sum(jnp.where(whole, proposal, 0.0)),
                jnp.sum(jnp.where(whole, 0.0, target)),
            )

        given = row, jnp.asarray(nodes, jnp.int32)[None], jnp.maximum(law, 0), factor
        return kernel.sums(share, given, target_log_probs.shape[2])

    def tries(drafted, wanted, factor):
        powers = jnp.broadcast_to((1 - drafted - wanted / factor)[:, :, None], (*law.shape, most))
        powers = jnp.cumprod(powers.at[:, :, 0].set(1.0), axis=-1)
        tried = jnp.arange(most, dtype=jnp.int32)[None, None] < count[:, :, None]
        return jnp.sum(jnp.where(tried, powers, 0.0), axis=-1)

    highest = jnp.maximum(count, 1).astype(target_log_probs.dtype)
    steps = jnp.finfo(highest.dtype).nmant + 2

    def solved(drafted, wanted):
        """The smallest ρ with Σ_{j<k} (1 − β)^j ≤ ρ for this split of β, by halving."""

        def halve(_, ends):
            low, high = ends
            middle = (low + high) / 2
            enough = tries(drafted, wanted, middle) <= middle
            return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

        return jax.lax.fori_loop(0, steps, halve, (jnp.ones_like(highest), highest))[1]

    laws = target_log_probs, draft.log_probs
    known = jax.lax.stop_gradient(laws)

    def grow(carry):
        # β is the least of what all splits make of it, so no split's ρ is too large: it grows, as
        # Newton's steps do, until the split stays.
        step, _, factor = carry
        return step + 1, factor, jnp.maximum(solved(*shares(known, factor)), factor)

    start = jnp.zeros((), jnp.int32), jnp.zeros_like(highest), jnp.ones_like(highest)
    factor = jax.lax.while_loop(
        lambda carry: (carry[0] < steps) & jnp.any(carry[2] > carry[1]), grow, start
    )[2]
    drafted, wanted = shares(laws, factor)
    factor = _fixed_point(lambda point: tries(drafted, wanted, point), factor)
    several = count > 1
    accepted = jnp.minimum(tries(drafted, wanted, factor), factor)
    return (
        ones.at[:, nodes].set(jnp.where(several, factor, 1.0)),
        ones.at[:, nodes].set(jnp.where(several, accepted, 1.0)),
    )


def _fixed_point(function, point):
    """The point, which solves x = function(x), with the derivatives of that solution."""
    value, slope = jax.jvp(function, (point,), (jnp.ones_like(point),))
    slope, kept = jax.lax.stop_gradient((slope, value))
    # Where the curve touches the diagonal the solution has no derivative.
    crosses = slope < 1
    return point + jnp.where(crosses, (value - kept) / jnp.where(crosses, 1 - slope, 1.0), 0.0)


def _check(draft: types.Draft) -> None:
    """Raises ValueError unless siblings are independent draws from one law."""
    kernel.check_sampled(draft)
    if draft.siblings == "distinct" or draft.sibling_laws > 1:
        how = "distinct" if draft.siblings == "distinct" else "drawn from several laws"
        raise ValueError(
            f"this rule needs siblings drawn independently from one law, and this draft's are "
            f"{how}; use rule='multi_candidate' or rule='traversal'"
        )


rule = types.VerificationRule("k_seq", _check, accept, residual, prepare)
