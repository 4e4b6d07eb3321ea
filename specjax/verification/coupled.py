"""`coupled`: draft and target draw with the same noise, and the draft is right where they agree.

Daliri, Musco and Suresh 2024, "Coupling without Communication and Drafter-Invariant Speculative
Decoding" (arXiv 2408.07978). The drafter draws its token as argmax(log q + g), with the
noise g that plain decoding uses at that position; verification draws argmax(log p + g). Only the
target's draws are emitted, so the text is plain decoding's, as under `match`; but the two draws
agree with probability at least (1 − TV)/(1 + TV), where independent ones agree with Σ p·q.

In the race of exponentials E_i with rates p_i and q_i, the drafted token x wins for the target with
probability 1 / Σ_i max(q_i, p_i·q_x/p_x), and another token y in its place with density
p_y / (Σ_i max(q_i, w·p_i))² at every w between q_y/p_y and q_x/p_x.
"""

import jax
import jax.numpy as jnp

from specjax import types
from specjax.verification import kernel, match

__all__ = ["accept", "draw_law", "residual", "rule"]


def accept(draft: types.Draft, target_log_probs: jax.Array) -> jax.Array:
    """1 / Σ_i max(q_i, p_i·q_x/p_x), of a token x that was drawn: [B, N]; 0 at absent nodes."""
    row = jnp.arange(draft.tokens.shape[0], dtype=jnp.int32)[:, None]
    drawn = jnp.exp(kernel.node_log_probs(draft))
    wanted = jnp.exp(kernel.parent_laws(draft, target_log_probs))
    target = jnp.exp(target_log_probs[:, :-1])
    proposal = jnp.exp(draft.log_probs[row, jnp.maximum(draft.law, 0)])
    larger = jnp.maximum(proposal * wanted[:, :, None], target * drawn[:, :, None])
    # Against a one-hot law the larger one is the target's everywhere.
    total = jnp.where(draft.law < 0, 1.0, jnp.sum(larger, axis=-1))
    possible = draft.present & (wanted > 0) & (drawn > 0)
    agree = jnp.where(possible, jnp.minimum(wanted / jnp.where(possible, total, 1.0), 1.0), 0.0)
    # A token that was never drawn tells nothing of the noise.
    return jnp.where(draft.present & (drawn == 0), wanted, agree)


def residual(draft: types.Draft, target_log_probs: jax.Array, node: jax.Array) -> jax.Array:
    """The target's draw, given that it is not the drafted child of `node`: log-law [B, V]."""
    law = jnp.take_along_axis(target_log_probs, node[:, None, None], axis=1)[:, 0]
    child = jnp.minimum(node + 1, draft.tokens.shape[1])
    token = jnp.take_along_axis(draft.tokens, child[:, None] - 1, axis=1)
    target, proposal = jnp.exp(law), jnp.exp(kernel.draft_law(draft, child))
    left = target * jax.vmap(_overtaken)(target, proposal, token[:, 0])
    return kernel.normalised(left, law, jnp.any(kernel.children(draft, node), axis=-1))


def _overtaken(target: jax.Array, proposal: jax.Array, token: jax.Array) -> jax.Array:
    """∫ dw / (Σ_i max(q_i, w·p_i))² from q_y/p_y up to q_x/p_x, for every y: [V]."""
    possible = target > 0
    ratio = jnp.where(possible, proposal / jnp.where(possible, target, 1.0), jnp.inf)
    order = jnp.argsort(ratio)
    at = ratio[order]
    finite = at < jnp.inf
    # Between two neighbouring ratios the sum is a straight line, so 1/sum² integrates to their
    # distance over the product of both sums.
    point = jnp.where(finite, at, 0.0)
    below = jnp.cumsum(jnp.where(finite, target[order], 0.0))
    above = jnp.cumsum(proposal[order][::-1])[::-1] - proposal[order]
    total = above + below * point
    product = jnp.where(finite[1:], total[1:] * total[:-1], 1.0)
    step = jnp.where(finite[1:], jnp.diff(point) / product, 0.0)
    upto = jnp.concatenate([jnp.zeros((1,), step.dtype), jnp.cumsum(step)])
    # Beyond the last finite ratio the line rises by w forever.
    last = jnp.sum(finite, dtype=jnp.int32) - 1
    upto = jnp.where(finite, upto, upto[last] + 1 / total[last])
    reached = jnp.zeros_like(upto).at[order].set(upto)
    overtaken = jnp.where(ratio < ratio[token], jnp.maximum(reached[token] - reached, 0.0), 0.0)
    other = jnp.arange(ratio.shape[0], dtype=jnp.int32) != token
    return jnp.where(proposal[token] > 0, overtaken, other.astype(overtaken.dtype))


def draw_law(draft: types.Draft, target_log_probs: jax.Array) -> jax.Array:
    """The law of the target's draw after every node, given the draft: natural logs [B, N+1, V]."""
    batch, rows, vocab_size = target_log_probs.shape

    def at(node):
        return residual(draft, target_log_probs, jnp.broadcast_to(node, (batch,)))

    others = jax.vmap(at, out_axes=1)(jnp.arange(rows, dtype=jnp.int32))
    agree = jnp.pad(accept(draft, target_log_probs), ((0, 0), (0, 1)))[:, :, None]
    tokens = jnp.pad(draft.tokens, ((0, 0), (0, 1)))[:, :, None]
    drafted = jnp.arange(vocab_size, dtype=jnp.int32)[None, None] == tokens
    return jnp.log(jnp.where(drafted, agree, 0.0) + (1 - agree) * jnp.exp(others))


def _check(draft: types.Draft) -> None:
    """Raises ValueError unless the draft is a chain drawn with the target's noise."""
    if draft.siblings != "coupled":
        raise ValueError(
            "this rule needs drafts drawn with the target's own noise (siblings='coupled', as of "
            f"drafters.model(…, coupled=True)), and this draft's are {draft.siblings}; use "
            "rule='match'"
        )
    if not draft.tree.is_chain:
        raise ValueError(
            f"this rule verifies chains, and this draft is a tree of {draft.tree.size} nodes; use "
            "rule='match'"
        )


rule = types.VerificationRule(
    "coupled", _check, accept, residual, draw=match.draw, draw_law=draw_law
)
