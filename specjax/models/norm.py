"""RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467)."""

import jax
import jax.numpy as jnp

from specjax import native
from specjax.models import policy as policies

__all__ = ["rms_norm"]


def rms_norm(
    hidden: jax.Array, scale: jax.Array, epsilon: float, policy: policies.Policy
) -> jax.Array:
    """hidden[…, H] over the root of its mean square (in float32) plus `epsilon`, times scale[H]."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    chosen = _native if policy.native and rows.dtype == scale.dtype == jnp.float32 else _by_xla
    return chosen(rows, scale, jnp.float32(epsilon)).reshape(hidden.shape)


def _by_xla(rows, scale, epsilon):
    wide = rows.astype(jnp.float32)
    mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
    scaled = wide * jax.lax.rsqrt(mean + epsilon) * scale.astype(jnp.float32)[None]
    return scaled.astype(rows.dtype)


def _result(rows, scale, epsilon):
    del scale, epsilon
    return jax.ShapeDtypeStruct(rows.shape, rows.dtype)


_native = native.function("rms_norm", _result, _by_xla)
