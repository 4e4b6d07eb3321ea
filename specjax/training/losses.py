"""What a draft is trained on: distances between its law and the target's, and acceptance itself.

DistillSpec (Zhou et al. 2023, arXiv 2310.08461, section 3 and table 1) compares the first four. All
are of laws in natural logs, and differentiable in the draft's. A draft that speaks of a part of the
vocabulary is compared there: `log_p` then lacks the mass of the tokens left out, which no training
of this draft can win.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from specjax import verification

__all__ = [
    "LOSSES",
    "JensenShannon",
    "Loss",
    "forward_kl",
    "negative_accepted_length",
    "overlap",
    "reverse_kl",
    "total_variation",
]


def forward_kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """Σ p log(p/q) over the tokens that the draft speaks of: [...], in nats.

    Args:
      log_p: [..., V], the target's law, natural logs; its mass may be below 1.
      log_q: [..., V], the draft's, finite wherever `log_p` is.
    """
    return jnp.sum(_times_log(log_p, log_p) - _times_log(log_p, log_q), axis=-1)


def reverse_kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """Σ q log(q/p): [...], in nats; arguments as `forward_kl`, the laws' parts exchanged."""
    return jnp.sum(_times_log(log_q, log_q) - _times_log(log_q, log_p), axis=-1)


@struct.dataclass
class JensenShannon:
    """β KL(p ‖ m) + (1 − β) KL(q ‖ m) with m = β p + (1 − β) q: [...], in nats.

    Attributes:
      beta: between 0 and 1, both excluded; near 0 it is like the forward divergence, near 1 like
        the reverse. A leaf, so that a sweep compiles once.

    Raises:
      ValueError: `beta` outside.
    """

    beta: Any = 0.5

    def __post_init__(self):
        # As a leaf it may be a tracer, or what tree transformations put in place.
        numbers = (int, float, np.floating, np.integer)
        if isinstance(self.beta, numbers) and not 0 < float(self.beta) < 1:
            raise ValueError(f"beta={self.beta} must lie between 0 and 1, both excluded")

    def __call__(self, log_p: jax.Array, log_q: jax.Array) -> jax.Array:
        """Arguments as `forward_kl`."""
        beta = self.beta
        log_m = jnp.logaddexp(log_p + jnp.log(beta), log_q + jnp.log1p(-beta))
        inside = beta * forward_kl(log_p, log_m) + (1 - beta) * forward_kl(log_q, log_m)
        # On a token left out m is β p, and the draft has nothing there.
        left_out = 1 - jnp.sum(jnp.exp(log_p), axis=-1)
        return inside - beta * jnp.log(beta) * jnp.maximum(left_out, 0)


def total_variation(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """1 − Σ min(p, q): [...], what `token` and `block` refuse of a first draft.

    Arguments as `forward_kl`; half the sum of differences, for laws of mass 1.
    """
    return 1 - overlap(log_p, log_q)


def overlap(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """Σ min(p, q): [...], the acceptance rate of a first draft; arguments as `forward_kl`."""
    return jnp.sum(jnp.exp(jnp.minimum(log_p, log_q)), axis=-1)


def negative_accepted_length(
    log_p: jax.Array, log_q: jax.Array, present: jax.Array, length: int, rule: str = "block"
) -> jax.Array:
    """−E accepted drafts of `length`, from every place of texts that the target wrote: [B, T].

    The rule's own acceptance, in closed form (`verification.survival`), so that training maximises
    what decoding will count.

    Args:
      log_p: [B, T], natural logs of the target's law at the text's tokens.
      log_q: [B, T], of the draft's; −inf where it does not speak of the token.
      present: bool[B, T], where there is text, from the left.
      length: K; drafts that reach past the text's end are counted up to there.
      rule: `block` or `token`.

    Raises:
      ValueError: another rule, or `length` below 1.
    """
    if length < 1:
        raise ValueError(f"length={length} must be at least 1")
    past = ((0, 0), (0, length - 1))
    log_p = jnp.pad(jnp.where(present, log_p, 0.0), past)
    log_q = jnp.pad(jnp.where(present, log_q, -jnp.inf), past, constant_values=-jnp.inf)
    return -jnp.sum(verification.survival(rule, log_p, log_q, length), axis=-1)


def _times_log(log_weight: jax.Array, log_value: jax.Array) -> jax.Array:
    """exp(log_weight) · log_value, 0 where the weight is 0, with a gradient that is no NaN."""
    some = log_weight > -jnp.inf
    weight = jnp.exp(jnp.where(some, log_weight, 0.0))
    return jnp.where(some, weight * jnp.where(some, log_value, 0.0), 0.0)


Loss = Callable[[jax.Array, jax.Array], jax.Array]

LOSSES: dict[str, Loss] = {
    "forward_kl": jax.tree_util.Partial(forward_kl),
    "reverse_kl": jax.tree_util.Partial(reverse_kl),
    "jensen_shannon": JensenShannon(),
    "total_variation": jax.tree_util.Partial(total_variation),
}
"""Losses by name, as pytrees: what is a number in them is traced."""
