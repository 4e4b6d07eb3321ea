"""How many drafts of the target's own text survive, differentiable: acceptance without drawing.

Over text that the target wrote, `token` accepts the first i of K drafts with probability

    E Π_{l ≤ i} min(1, q_l / p_l),

and `block` with E min(1, min_{j ≤ i} Π_{l ≤ j} q_l / p_l), where p_l and q_l are what both models
give to the text's own next token. No draft is drawn, so both are bounded, unbiased, and smooth in
the draft's logits almost everywhere: at a full vocabulary they are the way to a gradient.
"""

import jax
import jax.numpy as jnp

__all__ = ["survival"]

_ESTIMATED = ("block", "token")


def survival(rule: str, log_p: jax.Array, log_q: jax.Array, length: int) -> jax.Array:
    """P(accepted ≥ i) for i = 1…K of drafts from every place in the target's text, estimated.

    The mean over places and texts estimates the probability without bias; its sum over i is the
    expected accepted length, whose negative is a loss for the draft.

    Args:
      rule: `token` or `block`.
      log_p: [B, T], natural logs of the target's law at the text's next tokens.
      log_q: [B, T], of the draft's; −inf where it cannot draft the token.
      length: K.

    Returns:
      [B, T − K + 1, K], in [0, 1].

    Raises:
      ValueError: another rule, or texts shorter than `length`.
    """
    if rule not in _ESTIMATED:
        raise ValueError(
            f"rule {rule!r} cannot be estimated from the two models' probabilities of the text; "
            f"{' and '.join(_ESTIMATED)} can"
        )
    count = log_p.shape[1] - length + 1
    if count < 1:
        raise ValueError(f"texts of T={log_p.shape[1]} tokens hold no drafts of length={length}")
    place = jnp.arange(count)[:, None] + jnp.arange(length)[None]
    possible = log_q > -jnp.inf
    # A token that the target does not write (its weight is 0) must not make infinities meet.
    written = log_p > -jnp.inf
    ratio = jnp.where(possible, log_q, 0.0) - jnp.where(written, log_p, 0.0)
    ratio = jnp.where(possible | ~written, jnp.where(written, ratio, 0.0), -jnp.inf)[:, place]
    if rule == "token":
        return jnp.exp(jnp.cumsum(jnp.minimum(ratio, 0.0), axis=-1))
    walk = jnp.cumsum(ratio, axis=-1)
    return jnp.exp(jnp.minimum(jax.lax.cummin(walk, axis=2), 0.0))
