"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) and its scaling variants."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from specjax.models import config as configs

__all__ = ["frequencies", "rotate", "tables"]


def frequencies(config: configs.TransformerConfig) -> tuple[np.ndarray, float]:
    """Angular frequencies, radians a token, and the factor on cosines and sines.

    Returns:
      float32[head_size / 2], highest frequency first, and a float (1.0 except for `yarn`).
    """
    exponent = np.arange(0, config.head_size, 2, dtype=np.float64) / config.head_size
    plain = config.rotary_base**-exponent
    scaling = config.rotary_scaling
    if scaling is None:
        return plain.astype(np.float32), 1.0
    if scaling.kind == "linear":
        return (plain / scaling.factor).astype(np.float32), 1.0
    if scaling.kind == "llama3":
        rotations = scaling.original_context * plain / (2 * math.pi)
        band = scaling.high_frequency_factor - scaling.low_frequency_factor
        keep = np.clip((rotations - scaling.low_frequency_factor) / band, 0, 1)
        return (keep * plain + (1 - keep) * plain / scaling.factor).astype(np.float32), 1.0
    return _yarn(plain, scaling, config)


def _yarn(
    plain: np.ndarray, scaling: configs.RotaryScaling, config: configs.TransformerConfig
) -> tuple[np.ndarray, float]:
    """Interpolates slow dimensions, keeps fast ones, ramps between (section 3.2 of the paper)."""

    def dimension(rotations):
        turns = scaling.original_context / (rotations * 2 * math.pi)
        return config.head_size * math.log(turns) / (2 * math.log(config.rotary_base))

    low = max(math.floor(dimension(scaling.fast_rotations)), 0)
    high = min(math.ceil(dimension(scaling.slow_rotations)), config.head_size - 1)
    ramp = (np.arange(len(plain)) - low) / max(high - low, 1e-3)
    stretch = np.clip(ramp, 0, 1)
    mixed = plain * (1 - stretch) + plain / scaling.factor * stretch
    attention = scaling.attention_factor
    if attention is None:
        attention = 0.1 * math.log(scaling.factor) + 1.0
    return mixed.astype(np.float32), float(attention)


def tables(config: configs.TransformerConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines: two float32[B, T, 1, head_size / 2] for positions int32[B, T]."""
    frequency, factor = frequencies(config)
    where = positions[:, :, None, None].astype(jnp.float32)
    angle = where * jnp.asarray(frequency)[None, None, None]
    return jnp.cos(angle) * factor, jnp.sin(angle) * factor


def rotate(heads: jax.Array, cosine: jax.Array, sine: jax.Array) -> jax.Array:
    """Turns pairs (i, i + head_size / 2) of [B, T, heads, head_size], Hugging Face's layout."""
    first, second = jnp.split(heads.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate(
        [first * cosine - second * sine, second * cosine + first * sine], axis=-1
    )
    return turned.astype(heads.dtype)
