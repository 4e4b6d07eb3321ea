"""`k_seq`: accept the first of k independent siblings with p(x) > u·ρ·q(x), one factor ρ for all.

The k-sequential selection of Sun et al. 2023, "SpecTr: Fast Speculative Decoding via Optimal
Transport" (arXiv 2310.15141), at every node of a tree. Keeps the target's law: with
β = Σ_y min(q(y), p(y)/ρ), the chance that one sibling is accepted, what is accepted has the law
min(q, p/ρ)·Σ_{j<k} (1 − β)^j, which stays below p as long as that sum is at most ρ. The paper asks
for the smallest such ρ, between 1 and k. k counts the siblings that are present, duplicates too. On
a chain ρ is 1, and this is `token`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from specjax import trees, types
from specjax.verification import kernel, token

__all__ = ["accept", "residual", "rule"]


def accept(draft: types.Draft, target_log_probs: jax.Array) -> jax.Array:
    """min(1, p(x)/(ρ·q(x))): [B, N]; 0 where q(x) is 0 and at absent nodes."""
    row = jnp.arange(draft.tokens.shape[0], dtype=jnp.int32)[:, None]
    factor = _factors(draft, target_log_probs)[0][row, trees.parents(draft.tree)]
    ratio = token.log_ratio(draft, target_log_probs) - jnp.log(factor)
    return jnp.exp(jnp.minimum(ratio, 0.0))


def residual(draft: types.Draft, target_log_probs: jax.Array, node: jax.Array) -> jax.Array:
    """norm(p − min(q, p/ρ)·Σ_{j<k} (1 − β)^j), p where the node has no child: log-law [B, V]."""
    draft, target_log_probs = jax.tree.map(jnp.asarray, (draft, target_log_probs))
    row = jnp.arange(node.shape[0], dtype=jnp.int32)
    factor, tries = (values[row, node] for values in _factors(draft, target_log_probs))
    children = kernel.children(draft, node)
    law = target_log_probs[row, node]
    proposal = jnp.exp(kernel.draft_law(draft, 1 + jnp.argmax(children, axis=-1).astype(jnp.int32)))
    target = jnp.exp(law)
    accepted = jnp.minimum(proposal, target / factor[:, None]) * tries[:, None]
    left = jnp.maximum(target - accepted, 0.0)
    return kernel.normalised(left, law, jnp.any(children, axis=-1))


def _factors(draft: types.Draft, target_log_probs: jax.Array) -> tuple[jax.Array, jax.Array]:
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

    def chance(factor):
        """β: one pass over the laws of the parents."""
        target = jnp.exp(target_log_probs[row, nodes])
        proposal = jnp.exp(draft.log_probs[row, jnp.maximum(law, 0)])
        return jnp.sum(jnp.minimum(proposal, target / factor[:, :, None]), axis=-1)

    def tries(factor):
        powers = jnp.broadcast_to(1 - chance(factor)[:, :, None], (*factor.shape, most))
        powers = jnp.cumprod(powers.at[:, :, 0].set(1.0), axis=-1)
        tried = jnp.arange(most, dtype=jnp.int32)[None, None] < count[:, :, None]
        return jnp.sum(jnp.where(tried, powers, 0.0), axis=-1)

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        enough = tries(middle) <= middle
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    low = jnp.ones((batch, nodes.size), target_log_probs.dtype)
    high = jnp.maximum(count, 1).astype(low.dtype)
    # The upper end is always lawful, however early the search stops.
    steps = jnp.finfo(low.dtype).nmant + 2
    factor = jax.lax.fori_loop(0, steps, halve, jax.lax.stop_gradient((low, high)))[1]
    factor = _fixed_point(tries, jax.lax.stop_gradient(factor))
    several = count > 1
    return (
        ones.at[:, nodes].set(jnp.where(several, factor, 1.0)),
        ones.at[:, nodes].set(jnp.where(several, jnp.minimum(tries(factor), factor), 1.0)),
    )


def _fixed_point(function, point):
    """The point, which solves x = function(x), with the derivatives of that solution."""
    value, slope = jax.jvp(function, (point,), (jnp.ones_like(point),))
    slope, kept = jax.lax.stop_gradient((slope, value))
    return point + (value - kept) / (1 - slope)


def _check(draft: types.Draft) -> None:
    """Raises ValueError unless siblings are independent draws from one law."""
    kernel.check_sampled(draft)
    if draft.siblings == "distinct" or draft.sibling_laws > 1:
        how = "distinct" if draft.siblings == "distinct" else "drawn from several laws"
        raise ValueError(
            f"this rule needs siblings drawn independently from one law, and this draft's are "
            f"{how}; use rule='multi_candidate' or rule='traversal'"
        )


rule = types.VerificationRule("k_seq", _check, accept, residual)
