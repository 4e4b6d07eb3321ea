"""Muon (Jordan et al. 2024): a matrix moves along its momentum made orthogonal.

Every direction of a layer's input then has its say, where Adam's steps follow the few that the
gradient is large in. Small drafts learn more from the same text (BUILD.md). Written here rather
than taken from optax, since its products are most of its cost, and ours are rounded.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from specjax.models import policy as policies
from specjax.models import products

__all__ = ["muon", "orthogonal"]

# One step takes a singular value s to as + bs³ + cs⁵: five take what is above 0.01 to 0.7 … 1.2.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_STEPS = 5
# The root mean square of an update, that of Adam's (Liu et al. 2025, arXiv 2502.16982, section
# 2.2): one rate then suits both.
_SIZE = 0.2
_MOMENTUM = 0.95


def orthogonal(matrix: jax.Array) -> jax.Array:
    """Near U Vᵀ of matrix[m, n] = U Σ Vᵀ, by Newton–Schulz: its singular values are 0.7 … 1.2.

    Products are rounded as `policies.for_training()` says.
    """
    rows, columns = matrix.shape
    policy = policies.for_training()

    def times(left, right):
        """left @ right.T."""
        return products.products(left[None], [right], policy)[0][0]

    tall = matrix if rows >= columns else matrix.T
    tall = tall / jnp.maximum(jnp.linalg.norm(tall), 1e-12)
    first, third, fifth = _QUINTIC
    for _ in range(_STEPS):
        wide = tall.T
        gram = times(wide, wide)
        # Symmetric, so that the product with its transpose is that with itself.
        tall = first * tall + times(tall, third * gram + fifth * times(gram, gram))
    return tall if rows >= columns else tall.T


class _Momentum(NamedTuple):
    momentum: optax.Updates


def _scale_by_muon() -> optax.GradientTransformation:
    def init(params):
        return _Momentum(jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None):
        del params
        momentum = jax.tree.map(lambda old, new: _MOMENTUM * old + new, state.momentum, updates)

        def move(momentum, new):
            # Nesterov's: where the momentum will be after the next step.
            ahead = orthogonal(_MOMENTUM * momentum + new)
            return _SIZE * max(ahead.shape) ** 0.5 * ahead

        return jax.tree.map(move, momentum, updates), _Momentum(momentum)

    return optax.GradientTransformation(init, update)


def muon(other: optax.GradientTransformation) -> optax.GradientTransformation:
    """Muon for matrices, and `other` for all else; for layers, not embeddings and heads.

    Args:
      other: of norms and biases, say; scales a gradient, as Muon does, and leaves rate and sign to
        its caller.
    """
    return optax.partition(
        {"matrix": _scale_by_muon(), "other": other},
        lambda params: jax.tree.map(lambda leaf: "matrix" if leaf.ndim == 2 else "other", params),
    )
