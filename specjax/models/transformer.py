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
from specjax.models import attention, norm, products, rotary
from specjax.models import config as configs
from specjax.models import policy as policies

__all__ = [
    "Attention",
    "FeedForward",
    "Layer",
    "Linear",
    "RMSNorm",
    "Transformer",
    "head_kernel",
    "init_params",
    "language_model",
    "parameter_shapes",
]


class Linear(nnx.Module):
    """A kernel [out, in], the way checkpoints store it, and a bias [out] or None."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False):
        self.kernel = nnx.Param(jnp.zeros((outputs, inputs)))
        self.bias = nnx.Param(jnp.zeros((outputs,))) if bias else None


def _project(hidden, linears, policy):
    """hidden[B,T,in] through every `Linear`: a list of [B,T,out]."""
    made = products.products(hidden, [linear.kernel[...] for linear in linears], policy)
    return [
        product if linear.bias is None else product + linear.bias[...][None, None]
        for linear, product in zip(linears, made, strict=True)
    ]


class RMSNorm(nnx.Module):
    """Holds the scale [H]; see `norm.rms_norm`."""

    def __init__(self, config: configs.TransformerConfig):
        self.epsilon = config.norm_epsilon
        self.scale = nnx.Param(jnp.ones((config.hidden_size,)))

    def __call__(self, hidden, policy):
        return norm.rms_norm(hidden, self.scale[...], self.epsilon, policy)


class Attention(nnx.Module):
    """Projections and rotary positions around `attention.attend`."""

    def __init__(self, config: configs.TransformerConfig):
        self.config = config
        queries = config.num_heads * config.head_size
        shared = config.num_kv_heads * config.head_size
        width, bias = config.hidden_size, config.qkv_bias
        self.query = Linear(width, queries, bias=bias)
        self.key = Linear(width, shared, bias=bias)
        self.value = Linear(width, shared, bias=bias)
        self.output = Linear(queries, width, bias=config.output_bias)

    def __call__(self, hidden, rotation, old, masks, filled, policy):
        """hidden[B,T,H], old keys and values [B,KV,S,D] -> ([B,T,H], new ones [B,T,KV,D])."""
        batch, count, _ = hidden.shape
        query, key, value = (
            product.reshape(batch, count, -1, self.config.head_size)
            for product in _project(hidden, (self.query, self.key, self.value), policy)
        )
        query, key = (rotary.rotate(heads, *rotation) for heads in (query, key))
        query = query * self.config.head_size**-0.5
        mixed = attention.attend(query, (key, value), old, masks, filled, policy)
        (mixed,) = _project(mixed.reshape(batch, count, -1), (self.output,), policy)
        return mixed, (key, value)


class FeedForward(nnx.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: configs.TransformerConfig):
        width, inner, bias = config.hidden_size, config.intermediate_size, config.ffn_bias
        self.gate = Linear(width, inner, bias=bias)
        self.up = Linear(width, inner, bias=bias)
        self.down = Linear(inner, width, bias=bias)

    def __call__(self, hidden, policy):
        gate, up = _project(hidden, (self.gate, self.up), policy)
        return _project(jax.nn.silu(gate) * up, (self.down,), policy)[0]


class Layer(nnx.Module):
    """Attention and feed-forward, each behind an RMSNorm and added to the residual stream."""

    def __init__(self, config: configs.TransformerConfig):
        self.attention_norm, self.ffn_norm = RMSNorm(config), RMSNorm(config)
        self.attention = Attention(config)
        self.ffn = FeedForward(config)

    def __call__(self, hidden, rotation, old, masks, filled, policy):
        mixed, new = self.attention(
            self.attention_norm(hidden, policy), rotation, old, masks, filled, policy
        )
        hidden = hidden + mixed
        return hidden + self.ffn(self.ffn_norm(hidden, policy), policy), new


class Transformer(nnx.Module):
    """Embedding, layers, final norm and head."""

    def __init__(self, config: configs.TransformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.layers = nnx.List([Layer(config) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config)
        if not config.tied_embeddings:
            self.head = Linear(config.hidden_size, config.head_rows or config.vocab_size)

    def __call__(self, hidden, first_layer, cache, tree, taps, policy):
        """hidden[B,T,H] at the input of `first_layer` -> (logits, features, new entries)."""
        config = self.config
        strange = [tap for tap in taps if not first_layer <= tap <= config.num_layers]
        if strange:
            raise ValueError(
                f"taps={taps}: {strange[0]} is none of the layers {first_layer}…{config.num_layers}"
            )
        count = hidden.shape[1]
        # Behind a barrier, or the compiler takes cosines and sines anew in every layer. (Some
        # versions drop the barrier first; they are right, and do.)
        rotation, masks = jax.lax.optimization_barrier(
            (
                rotary.tables(config, caches.new_positions(cache, tree, count)),
                caches.visible(cache, tree, count),
            )
        )
        filled = jnp.max(cache.length) + cache.uncommitted
        tapped = {}
        keys: list[Any] = [None] * first_layer
        values: list[Any] = [None] * first_layer
        for index in range(first_layer, config.num_layers):
            tapped[index] = hidden
            old = (cache.keys[index], cache.values[index])
            hidden, (key, value) = self.layers[index](hidden, rotation, old, masks, filled, policy)
            keys.append(key)
            values.append(value)
        keys, values = _after(hidden, (keys, values))
        hidden = self.norm(hidden, policy)
        head = self.embed.embedding if config.tied_embeddings else self.head.kernel
        (logits,) = products.products(hidden, [head[...]], policy, jnp.float32)
        tapped[config.num_layers] = hidden
        chosen = [tapped[tap] for tap in taps]
        features = jnp.stack(chosen, axis=2) if chosen else hidden[:, :, None][:, :, :0]
        return types.ModelOutput(logits, features), (tuple(keys), tuple(values))


def _after(hidden: jax.Array, entries: Any) -> Any:
    """The entries [B, T, …], to be had only once hidden[B, T, H] is known.

    Nothing may be written before every layer has read what the cache holds, or the compiler copies
    the whole cache, every layer, every step. `optimization_barrier` says just that, but some
    versions drop it too early; a value that hangs on the result cannot be dropped.
    """
    sound = jnp.isfinite(hidden[:, :, 0])

    def wait(entry):
        return jnp.where(sound[:, :, None, None], entry, jnp.nan)

    return jax.tree.map(wait, entries)


@functools.lru_cache(maxsize=64)
def _abstract(config: configs.TransformerConfig):
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))


def parameter_shapes(config: configs.TransformerConfig) -> dict:
    """The weights as nested dicts of `jax.ShapeDtypeStruct`, float32, kernels [out, in]."""
    shapes = nnx.to_pure_dict(_abstract(config)[1])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), shapes)


def head_kernel(params: Any) -> jax.Array:
    """The head's rows [V, H]: its own, or the embedding that it is tied to."""
    return params["head"]["kernel"] if "head" in params else params["embed"]["embedding"]


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
        return draw(leaf_key, shape, shape.shape[-1])

    return jax.tree_util.tree_map_with_path(init, jax.tree.unflatten(structure, list(keys)), shapes)


@dataclasses.dataclass(frozen=True)
class _Apply:
    config: configs.TransformerConfig
    policy: policies.Policy | None

    def __call__(
        self,
        params: Any,
        tokens: jax.Array,
        cache: caches.KVCache,
        tree: trees.Tree | None = None,
        taps: tuple[int, ...] = (),
    ):
        module = nnx.merge(_abstract(self.config)[0], params)
        policy = self.policy or policies.for_backend()
        # Not by the module's own call, which widens what it looks up to float32.
        hidden = jnp.take(module.embed.embedding[...], tokens, axis=0)
        return module(hidden, 0, cache, tree, taps, policy)


@dataclasses.dataclass(frozen=True)
class _Resume:
    config: configs.TransformerConfig
    policy: policies.Policy | None

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
        policy = self.policy or policies.for_backend()
        return module(hidden, layer, before, tree, taps, policy)


@dataclasses.dataclass(frozen=True)
class _InitCache:
    config: configs.TransformerConfig
    dtype: str

    def __call__(self, batch: int, capacity: int) -> caches.KVCache:
        config = self.config
        return caches.init(
            batch, capacity, config.num_layers, config.num_kv_heads, config.head_size, self.dtype
        )


def language_model(
    config: configs.TransformerConfig, params: Any, policy: policies.Policy | None = None
) -> types.LanguageModel:
    """The `LanguageModel` of a configuration and its weights.

    Args:
      config: static; equal configurations share compiled programs.
      params: weights as `parameter_shapes` lays them out, in any float dtype (activations and cache
        follow it; logits are float32).
      policy: how its passes are laid out; None is `policy.for_backend()` of the backend that is the
        default when a program is traced.

    Raises:
      ValueError: a weight is missing, extra or misshapen; the message names it.
    """
    _check(parameter_shapes(config), params)
    dtype = jnp.dtype(params["embed"]["embedding"].dtype)
    return types.LanguageModel(
        params=params,
        apply=_Apply(config, policy),
        append=caches.append,
        commit=caches.commit,
        init_cache=_InitCache(config, dtype.name),
        truncate=caches.truncate,
        resume=_Resume(config, policy),
        vocab_size=config.head_rows or config.vocab_size,
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
