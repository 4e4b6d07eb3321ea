"""Showing a small draft's heads where to look, so that it learns to copy.

Language models copy by two layers together: a head that looks at the tokens just before, and in the
next layer one that looks at what followed the same token earlier (Olsson et al. 2022, arXiv
2209.11895). Found by chance, that takes far more text than a draft is distilled from, and without
it a draft knows little of its prompt; shown, it takes some hundred updates. What was copied is
known from the tokens alone, so no second model is asked.
"""

from typing import Any

import jax
import jax.numpy as jnp

from specjax import models
from specjax.models import norm, products, rotary
from specjax.models import policy as policies

__all__ = ["copied_from", "loss"]

# Heads that hold so much of their attention where it belongs are left alone.
_ENOUGH = 0.6


def copied_from(tokens: jax.Array) -> jax.Array:
    """Where attention would have told the next token: what followed the same token and is the next.

    Args:
      tokens: int32[B, T].

    Returns:
      bool[B, T, T]: place j for place t, j ≤ t: tokens j − 1 and t are the same, and j and t + 1.
    """
    before = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    after = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    same = (before[:, None, :] == tokens[:, :, None]) & (tokens[:, None, :] == after[:, :, None])
    return same & _causal(tokens.shape[1])[None]


def loss(
    config: models.TransformerConfig,
    layers: Any,
    hidden: tuple[jax.Array, jax.Array],
    keys: tuple[jax.Array, jax.Array],
    tokens: jax.Array,
    length: jax.Array,
    policy: policies.Policy,
) -> jax.Array:
    """How far two layers' heads are from looking where copying needs them: nats, float32[B, T].

    The heads that share the first layer's first key head look one, two, … tokens back. Those of
    the second layer, but for the last key head's, look at what a text's token was copied from;
    tokens that are no copies ask nothing of them. Where all share one key head, half of them do
    either. Nothing is asked of a head that holds six tenths of its attention there.

    Args:
      config: the draft's, of two layers or more.
      layers: weights of its layers.
      hidden: what goes into the first two, [B, T, H] each.
      keys: of the first two, rotated, [B, T, KV, D].
      tokens: int32[B, T].
      length: int32[B], beyond which they mean nothing.
      policy: how products are made.

    Raises:
      ValueError: a draft of one layer, which cannot copy so.
    """
    if config.num_layers < 2:
        raise ValueError("guidance needs a draft of two layers: one looks back, one copies")
    group = config.num_heads // config.num_kv_heads
    looking, copying = group, group * (config.num_kv_heads - 1)
    if config.num_kv_heads == 1:
        looking = copying = max(config.num_heads // 2, 1)
    size = tokens.shape[1]
    place = jnp.arange(size, dtype=jnp.int32)
    first, second = (
        _attention(config, layers[index], hidden[index], keys[index], heads, policy)
        for index, heads in enumerate((looking, copying))
    )
    back = jnp.zeros(tokens.shape, jnp.float32)
    for head in range(looking):
        seen = jnp.maximum(place - 1 - head, 0)
        mass = jnp.take_along_axis(first[:, head], seen[None, :, None], axis=2)[:, :, 0]
        back += jnp.where(place[None] > head, _missing(mass), 0.0) / looking
    sources = copied_from(tokens)
    is_copy = jnp.any(sources, axis=2)
    # What is no copy may look anywhere: without a single source its gradient would not be finite.
    sources |= ~is_copy[:, :, None] & _causal(size)[None]
    mass = jax.nn.logsumexp(jnp.where(sources[:, None], second, -1e9), axis=3)
    copied = jnp.sum(_missing(mass), axis=1) / copying
    # What follows the text's last token is not of the text.
    here, continues = (place[None] < (length - less)[:, None] for less in (0, 1))
    return jnp.where(here, back, 0.0) + jnp.where(is_copy & continues, copied, 0.0)


def _missing(log_mass: jax.Array) -> jax.Array:
    """Nats by which attention falls short of what is enough."""
    return jnp.maximum(jnp.log(_ENOUGH) - log_mass, 0.0)


def _causal(size: int) -> jax.Array:
    return jnp.tril(jnp.ones((size, size), bool))


def _attention(config, layer, hidden, key, heads: int, policy) -> jax.Array:
    """Logarithms of what the first heads of a layer attend to: float32[B, heads, T, T]."""
    batch, size, _ = hidden.shape
    normed = norm.rms_norm(hidden, layer["attention_norm"]["scale"], config.norm_epsilon, policy)
    weights = jax.tree.map(
        lambda leaf: leaf[: heads * config.head_size], layer["attention"]["query"]
    )
    (query,) = products.products(normed, [weights["kernel"]], policy)
    if weights.get("bias") is not None:
        query = query + weights["bias"][None, None]
    query = query.reshape(batch, size, heads, config.head_size)
    positions = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32)[None], (batch, size))
    query = rotary.rotate(query, *rotary.tables(config, positions)) * config.head_size**-0.5
    group = config.num_heads // config.num_kv_heads
    key = jnp.repeat(key, group, axis=2)[:, :, :heads]
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key).astype(jnp.float32)
    return jax.nn.log_softmax(jnp.where(_causal(size)[None, None], scores, -jnp.inf), axis=-1)
