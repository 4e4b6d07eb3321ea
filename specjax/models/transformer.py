"""A decoder-only transformer of the Llama line, in Flax NNX, behind a functional wall.

The modules hold weights and arithmetic; caches are arguments and results, never variables.
`language_model` turns a configuration and a pytree of weights into a `LanguageModel`, whose static
functions depend on the configuration alone. The same forward pass serves prefill, one token, chains
and trees: new tokens attend to the committed prefix and to their ancestors.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from specjax import caches, trees, types
from specjax.models import config as configs
from specjax.models import rotary

__all__ = [
    "Attention",
    "FeedForward",
    "Layer",
    "Transformer",
    "init_params",
    "language_model",
    "parameter_shapes",
]


# From jax 0.11 on, the CPU backend multiplies one row more slowly than two.
_ONE_TOKEN_IS_SLOW = jax.__version_info__ >= (0, 11)


class Attention(nnx.Module):
    """Grouped-query attention over cache and new tokens (Ainslie et al. 2023, arXiv 2305.13245)."""

    def __init__(self, config: configs.TransformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        queries = config.num_heads * config.head_size
        shared = config.num_kv_heads * config.head_size
        width, bias = config.hidden_size, config.qkv_bias
        self.query = nnx.Linear(width, queries, use_bias=bias, rngs=rngs)
        self.key = nnx.Linear(width, shared, use_bias=bias, rngs=rngs)
        self.value = nnx.Linear(width, shared, use_bias=bias, rngs=rngs)
        self.output = nnx.Linear(queries, width, use_bias=config.output_bias, rngs=rngs)

    def __call__(self, hidden, rotation, old, masks):
        """hidden[B,T,H], old keys and values [B,KV,S,D] -> ([B,T,H], new ones [B,T,KV,D])."""
        config = self.config
        batch, count, _ = hidden.shape
        split = (batch, count, -1, config.head_size)
        query = rotary.rotate(self.query(hidden).reshape(split), *rotation)
        key = rotary.rotate(self.key(hidden).reshape(split), *rotation)
        value = self.value(hidden).reshape(split)
        # Query heads that share a key head are laid side by side: one product a key head.
        groups = config.num_heads // config.num_kv_heads
        query = query.reshape(batch, count, config.num_kv_heads, groups, config.head_size)
        query = query.transpose(0, 2, 3, 1, 4) * config.head_size**-0.5

        old_key, old_value = old
        old_mask, new_mask = masks
        to_old = jnp.einsum("bkgtd,bksd->bkgts", query, old_key)
        to_new = jnp.einsum("bkgtd,bukd->bkgtu", query, key)
        scores = jnp.concatenate(
            [
                jnp.where(old_mask[:, None, None], to_old, -jnp.inf),
                jnp.where(new_mask[:, None, None], to_new, -jnp.inf),
            ],
            axis=-1,
        )
        weights = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(hidden.dtype)
        capacity = old_key.shape[2]
        mixed = jnp.einsum("bkgts,bksd->btkgd", weights[..., :capacity], old_value)
        mixed = mixed + jnp.einsum("bkgtu,bukd->btkgd", weights[..., capacity:], value)
        return self.output(mixed.reshape(batch, count, -1)), (key, value)


class FeedForward(nnx.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: configs.TransformerConfig, *, rngs: nnx.Rngs):
        width, inner, bias = config.hidden_size, config.intermediate_size, config.ffn_bias
        self.gate = nnx.Linear(width, inner, use_bias=bias, rngs=rngs)
        self.up = nnx.Linear(width, inner, use_bias=bias, rngs=rngs)
        self.down = nnx.Linear(inner, width, use_bias=bias, rngs=rngs)

    def __call__(self, hidden):
        return self.down(jax.nn.silu(self.gate(hidden)) * self.up(hidden))


class Layer(nnx.Module):
    """Attention and feed-forward, each behind an RMSNorm and added to the residual stream."""

    def __init__(self, config: configs.TransformerConfig, *, rngs: nnx.Rngs):
        norm = functools.partial(
            nnx.RMSNorm, config.hidden_size, epsilon=config.norm_epsilon, rngs=rngs
        )
        self.attention_norm, self.ffn_norm = norm(), norm()
        self.attention = Attention(config, rngs=rngs)
        self.ffn = FeedForward(config, rngs=rngs)

    def __call__(self, hidden, rotation, old, masks):
        mixed, new = self.attention(self.attention_norm(hidden), rotation, old, masks)
        hidden = hidden + mixed
        return hidden + self.ffn(self.ffn_norm(hidden)), new


class Transformer(nnx.Module):
    """Embedding, layers, final norm and head."""

    def __init__(self, config: configs.TransformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.layers = nnx.List([Layer(config, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = nnx.RMSNorm(config.hidden_size, epsilon=config.norm_epsilon, rngs=rngs)
        if not config.tied_embeddings:
            self.head = nnx.Linear(config.hidden_size, config.vocab_size, use_bias=False, rngs=rngs)

    def __call__(self, hidden, first_layer, cache, tree, taps):
        """hidden[B,T,H] at the input of `first_layer` -> (logits, features, new entries)."""
        config = self.config
        strange = [tap for tap in taps if not first_layer <= tap <= config.num_layers]
        if strange:
            raise ValueError(
                f"taps={taps}: {strange[0]} is none of the layers {first_layer}…{config.num_layers}"
            )
        count = hidden.shape[1]
        rotation = rotary.tables(config, caches.new_positions(cache, tree, count))
        masks = caches.visible(cache, tree, count)
        tapped = {}
        keys: list[Any] = [None] * first_layer
        values: list[Any] = [None] * first_layer
        for index in range(first_layer, config.num_layers):
            tapped[index] = hidden
            old = (cache.keys[index], cache.values[index])
            hidden, (key, value) = self.layers[index](hidden, rotation, old, masks)
            keys.append(key)
            values.append(value)
        keys, values = _after(hidden, (keys, values))
        hidden = self.norm(hidden)
        tapped[config.num_layers] = hidden
        logits = self.embed.attend(hidden) if config.tied_embeddings else self.head(hidden)
        chosen = [tapped[tap] for tap in taps]
        features = jnp.stack(chosen, axis=2) if chosen else hidden[:, :, None][:, :, :0]
        return types.ModelOutput(logits, features), (tuple(keys), tuple(values))


def _after(hidden: jax.Array, entries: Any) -> Any:
    """The entries [B, T, …], to be had only once hidden[B, T, H] is known.

    Nothing may be written before every layer has read what the cache holds, or the compiler copies
    the whole cache, every layer, every step. `optimization_barrier` says just that, but some
    versions drop it too early; a value that hangs on the result cannot be dropped.
    """
    sound = jnp.isfinite(hidden[:, :, :1, None])
    return jax.tree.map(lambda entry: jnp.where(sound, entry, jnp.nan), entries)


@functools.lru_cache(maxsize=64)
def _abstract(config: configs.TransformerConfig):
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))


def parameter_shapes(config: configs.TransformerConfig) -> dict:
    """The weights as nested dicts of `jax.ShapeDtypeStruct`, float32, kernels [in, out]."""
    shapes = nnx.to_pure_dict(_abstract(config)[1])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), shapes)


def init_params(config: configs.TransformerConfig, key: jax.Array, scale: float = 1.0) -> dict:
    """Random weights, normal with standard deviation `scale` / √fan-in; norms 1, biases 0.

    Args:
      config: the configuration.
      key: a typed key, consumed.
      scale: larger values give sharper laws.
    """
    shapes = parameter_shapes(config)
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(key, len(leaves))

    def draw(leaf_key, shape, fan_in):
        return scale * jax.random.normal(leaf_key, shape.shape, shape.dtype) * fan_in**-0.5

    def init(path, leaf_key, shape):
        kind = path[-1].key
        if kind == "scale":
            return jnp.ones(shape.shape, shape.dtype)
        if kind == "bias":
            return jnp.zeros(shape.shape, shape.dtype)
        if kind == "embedding":
            return draw(leaf_key, shape, shape.shape[-1])
        return draw(leaf_key, shape, shape.shape[-2])

    return jax.tree_util.tree_map_with_path(init, jax.tree.unflatten(structure, list(keys)), shapes)


@dataclasses.dataclass(frozen=True)
class _Apply:
    config: configs.TransformerConfig

    def __call__(
        self,
        params: Any,
        tokens: jax.Array,
        cache: caches.KVCache,
        tree: trees.Tree | None = None,
        taps: tuple[int, ...] = (),
    ):
        module = nnx.merge(_abstract(self.config)[0], params)
        lone = tokens.shape == (1, 1) and (tree is None or tree.size == 0)
        if not (lone and _ONE_TOKEN_IS_SLOW and jax.default_backend() == "cpu"):
            return module(module.embed(tokens), 0, cache, tree, taps)
        # A second column that nothing sees turns slow matrix-vector products into fast ones.
        pair = jnp.pad(tokens, ((0, 0), (0, 1)))
        result = module(module.embed(pair), 0, cache, None, taps)
        return jax.tree.map(lambda leaf: leaf[:, :1], result)


@dataclasses.dataclass(frozen=True)
class _Resume:
    config: configs.TransformerConfig

    def __call__(
        self,
        params: Any,
        hidden: jax.Array,
        layer: int,
        cache: caches.KVCache,
        tree: trees.Tree | None = None,
        taps: tuple[int, ...] = (),
    ):
        if not 0 <= layer < self.config.num_layers:
            raise ValueError(
                f"resume at layer={layer}: the model has {self.config.num_layers} layers"
            )
        # The last T uncommitted entries are the same tokens, so far run through the earlier layers
        # only.
        count = hidden.shape[1]
        before = dataclasses.replace(cache, uncommitted=cache.uncommitted - count)
        module = nnx.merge(_abstract(self.config)[0], params)
        return module(hidden, layer, before, tree, taps)


@dataclasses.dataclass(frozen=True)
class _InitCache:
    config: configs.TransformerConfig
    dtype: str

    def __call__(self, batch: int, capacity: int) -> caches.KVCache:
        config = self.config
        return caches.init(
            batch, capacity, config.num_layers, config.num_kv_heads, config.head_size, self.dtype
        )


def language_model(config: configs.TransformerConfig, params: Any) -> types.LanguageModel:
    """The `LanguageModel` of a configuration and its weights.

    Args:
      config: static; equal configurations share compiled programs.
      params: weights as `parameter_shapes` lays them out, in any float dtype (activations and cache
        follow it).

    Raises:
      ValueError: a weight is missing, extra or misshapen; the message names it.
    """
    _check(parameter_shapes(config), params)
    dtype = jnp.dtype(params["embed"]["embedding"].dtype)
    return types.LanguageModel(
        params=params,
        apply=_Apply(config),
        append=caches.append,
        commit=caches.commit,
        init_cache=_InitCache(config, dtype.name),
        truncate=caches.truncate,
        resume=_Resume(config),
        vocab_size=config.vocab_size,
        context_length=config.context_length,
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
    )


def _check(expected: dict, params: Any) -> None:
    def names(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in leaves}

    want, got = names(expected), names(params)
    faults = [f"missing {name} {want[name]}" for name in want.keys() - got.keys()]
    faults += [f"unexpected {name} {got[name]}" for name in got.keys() - want.keys()]
    faults += [
        f"{name} has shape {got[name]}, not {want[name]}"
        for name in want.keys() & got.keys()
        if want[name] != got[name]
    ]
    if faults:
        raise ValueError("transformer weights: " + "; ".join(sorted(faults)[:8]))
