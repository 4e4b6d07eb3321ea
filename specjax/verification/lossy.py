"""Rules that do not keep the target's law. Never a default; every report says that they are lossy.

`typical` is Medusa's typical acceptance (Cai et al. 2024, arXiv 2401.10774).
"""

import dataclasses

import jax
import jax.numpy as jnp

from specjax import trees, types
from specjax.verification import kernel

__all__ = ["typical"]


def typical(epsilon: float = 0.09, delta: float = 0.3) -> types.VerificationRule:
    """**Lossy**: accepts what the target finds likely enough, p(x) > min(ε, δ·exp(−H(p))).

    Each pair of numbers is a rule, hence a program, of its own.

    Of all paths of accepted tokens the longest is taken, ties to the first; then a token is drawn
    from the target's law. H is the entropy in nats of the law after the parent.

    Args:
      epsilon: ε, in (0, 1]: tokens more probable than this are always accepted.
      delta: δ, above 0; the paper takes √ε.

    Raises:
      ValueError: a value out of range.
    """
    for name, value, most in (("epsilon", epsilon, 1.0), ("delta", delta, float("inf"))):
        if not 0 < value <= most:
            raise ValueError(f"{name}={value} must be above 0 and at most {most}")
    return types.VerificationRule(
        "lossy.typical",
        _check,
        _Typical(float(epsilon), float(delta)),
        _target_law,
        lossless=False,
    )


@dataclasses.dataclass(frozen=True)
class _Typical:
    epsilon: float
    delta: float

    def __call__(self, draft: types.Draft, target_log_probs: jax.Array) -> jax.Array:
        """1 for nodes on the path that is taken, otherwise 0: [B, N]."""
        possible = target_log_probs > -jnp.inf
        log_probs = jnp.where(possible, target_log_probs, 0.0)
        entropy = -jnp.sum(jnp.where(possible, jnp.exp(log_probs) * log_probs, 0.0), axis=-1)
        threshold = jnp.minimum(self.epsilon, self.delta * jnp.exp(-entropy))
        row = jnp.arange(draft.tokens.shape[0], dtype=jnp.int32)[:, None]
        wanted = threshold[row, trees.parents(draft.tree)]
        probability = jnp.exp(kernel.parent_laws(draft, target_log_probs))
        refused = jnp.pad(~(draft.present & (probability > wanted)), ((0, 0), (1, 0)))
        on_path = trees.ancestors(draft.tree)
        whole = ~jnp.any(on_path & refused[:, None, :], axis=-1)
        length = jnp.where(whole, trees.depths(draft.tree), -1)
        longest = jnp.argmax(length, axis=-1)[:, None, None]
        taken = jnp.take_along_axis(
            jnp.broadcast_to(on_path, (*length.shape, length.shape[1])), longest, axis=1
        )
        return taken[:, 0, 1:].astype(target_log_probs.dtype)


def _target_law(draft: types.Draft, target_log_probs: jax.Array, node: jax.Array) -> jax.Array:
    del draft
    return jnp.take_along_axis(target_log_probs, node[:, None, None], axis=1)[:, 0]


def _check(draft: types.Draft) -> None:
    """Any draft will do."""
    del draft
