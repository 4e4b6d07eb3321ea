"""The sizes of a draft, and what it begins as: layers of the target's, or layers of its own."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax import checkpoints, models, types
from specjax.models import transformer
from specjax.training import shards

__all__ = [
    "Own",
    "Shape",
    "begin",
    "configure",
    "draft_model",
    "vocabulary",
    "weights",
]


@dataclasses.dataclass(frozen=True)
class Own:
    """Sizes that are not the target's: of a draft whose layers are its own.

    Its heads are as large as the target's, as many as its width holds, and share keys and values
    as far as the target's number of key heads divides theirs. Two projections lead from the
    target's embedding to its width and from there to the rows of the target's head.

    Attributes:
      num_layers: L.
      hidden_size: H, a multiple of the target's head size.
    """

    num_layers: int
    hidden_size: int

    def __str__(self) -> str:
        return f"{self.num_layers}x{self.hidden_size}"


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a draft: what the cost model chooses among.

    Embedding and head are the target's and stay as they are: only layers are learnt, and stored,
    and the projections of a draft of another width.

    Attributes:
      layers: the target's layers that the draft's begin as, first to last; or its own sizes.
      intermediate_size: width of the feed-forward layers; of the target's layers the most telling
        neurons are kept.
      vocabulary: rows of the head.
    """

    layers: tuple[int, ...] | Own
    intermediate_size: int
    vocabulary: int

    @property
    def num_layers(self) -> int:
        """How many layers the draft has."""
        return self.layers.num_layers if isinstance(self.layers, Own) else len(self.layers)

    @property
    def told(self) -> str:
        """The layers, for people: 0+29, or 4x256 for four of width 256."""
        return str(self.layers) if isinstance(self.layers, Own) else "+".join(map(str, self.layers))

    def __str__(self) -> str:
        return (
            f"layers {self.told}, feed-forward {self.intermediate_size}, {self.vocabulary} tokens"
        )


def configure(target: models.TransformerConfig, shape: Shape) -> models.TransformerConfig:
    """The draft's configuration.

    Raises:
      ValueError: a layer that the target does not have, a size above the target's where its own
        parts are taken, or a width that heads of the target's size do not fill.
    """
    most, own = target.intermediate_size, {}
    if isinstance(shape.layers, Own):
        most = 2**20
        if shape.num_layers < 1:
            raise ValueError(f"layers={shape.told}: a draft needs at least one")
        heads, beside = divmod(shape.layers.hidden_size, target.head_size)
        if heads < 1 or beside:
            raise ValueError(
                f"layers={shape.told}: the width must be a multiple of the target's head size, "
                f"{target.head_size}"
            )
        own = {
            "hidden_size": shape.layers.hidden_size,
            "num_heads": heads,
            "num_kv_heads": math.gcd(heads, target.num_kv_heads),
        }
    else:
        for layer in shape.layers:
            if not 0 <= layer < target.num_layers:
                raise ValueError(f"layers={shape.layers}: the target has {target.num_layers}")
        if not shape.layers:
            raise ValueError("layers=(): a draft needs at least one")
    for name, bound in (("intermediate_size", most), ("vocabulary", target.vocab_size)):
        if not 1 <= getattr(shape, name) <= bound:
            raise ValueError(f"{name}={getattr(shape, name)} must lie between 1 and {bound}")
    return dataclasses.replace(
        target,
        num_layers=shape.num_layers,
        intermediate_size=shape.intermediate_size,
        tied_embeddings=False,
        head_rows=shape.vocabulary,
        **own,
    )


def vocabulary(held: Iterable[shards.Shard], size: int, keep: Sequence[int], total: int):
    """The tokens that the target writes most: int32[size], ascending.

    Args:
      held: shards, of which the answers to train on are counted.
      size: how many.
      keep: tokens that belong to it whatever their count, as those that end a text.
      total: V; tokens never seen come last, lower numbers first, as byte-pair merges came earlier.
    """
    counts = np.zeros(total, np.int64)
    for shard in held:
        for index in shard.rows(unseen=False):
            counts += np.bincount(shard.text(index)[1], minlength=total)
    counts[list(keep)] = np.iinfo(np.int64).max
    return np.sort(np.argsort(-counts, kind="stable")[:size]).astype(np.int32)


def begin(
    bundle: checkpoints.Bundle, shape: Shape, tokens: np.ndarray, key: jax.Array
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is trained, as it begins, and what stays the target's.

    Args:
      bundle: the target.
      shape: the draft's sizes.
      tokens: int32[M], the head's tokens.
      key: a typed key, consumed by a draft of sizes of its own.

    Returns:
      What is trained: `layers` and `norm`, and of sizes of its own `inward` and `outward`; and the
      rest: `embed`, `head`, `tokens` int32[M], and `place` int32[V], the head's row of a token, M
      where it has none.
    """
    config = configure(bundle.config, shape)
    target = bundle.target.params
    frozen = {
        "embed": target["embed"],
        "head": {"kernel": transformer.head_kernel(target)[jnp.asarray(tokens)]},
        "tokens": jnp.asarray(tokens, jnp.int32),
        "place": jnp.full((bundle.config.vocab_size,), len(tokens), jnp.int32)
        .at[jnp.asarray(tokens)]
        .set(jnp.arange(len(tokens), dtype=jnp.int32)),
    }
    if isinstance(shape.layers, Own):
        return _own(config, frozen, target["norm"]["scale"], key), frozen
    layers = {
        place: _narrow(target["layers"][layer], shape.intermediate_size)
        for place, layer in enumerate(shape.layers)
    }
    return {"layers": layers, "norm": target["norm"]}, frozen


def _narrow(layer: dict[str, Any], size: int) -> dict[str, Any]:
    """A layer with the neurons of the feed-forward part that can add most."""
    ffn = layer["ffn"]
    # What a neuron can add: its weights out, times its weights in.
    adds = jnp.linalg.norm(ffn["down"]["kernel"], axis=0) * jnp.linalg.norm(
        ffn["up"]["kernel"], axis=1
    )
    kept = jnp.sort(jnp.argsort(-adds)[:size])
    chosen = {name: jax.tree.map(lambda leaf: leaf[kept], ffn[name]) for name in ("gate", "up")}
    down = {**ffn["down"], "kernel": ffn["down"]["kernel"][:, kept]}
    return {**layer, "ffn": {**chosen, "down": down}}


def _own(config: models.TransformerConfig, frozen: Any, scale, key: jax.Array) -> dict[str, Any]:
    """Layers that add nothing yet, between the directions that embedding and head say most in."""
    embedding = frozen["embed"]["embedding"].astype(jnp.float32)
    # As the target applies it, behind its norm.
    head = frozen["head"]["kernel"].astype(jnp.float32) * scale.astype(jnp.float32)[None]
    energy = sum(part.T @ part / jnp.sum(part * part) for part in (embedding, head))
    directions = jnp.linalg.eigh(energy)[1][:, ::-1][:, : config.hidden_size]
    # Of a draft wider than its target the rest are nothing, until they are learnt.
    wider = ((0, 0), (0, config.hidden_size - directions.shape[1]))
    inward = jnp.pad(directions, wider)
    params = transformer.init_params(config, key)
    for layer in params["layers"].values():
        for linear in (layer["attention"]["output"], layer["ffn"]["down"]):
            linear["kernel"] = jnp.zeros_like(linear["kernel"])
    learnt = {name: params[name] for name in ("layers", "norm")}
    return {**learnt, "inward": inward, "outward": inward * scale.astype(jnp.float32)[:, None]}


def draft_model(config: models.TransformerConfig, params: Any, frozen: Any) -> types.LanguageModel:
    """The draft as a model of the target's whole vocabulary, ready for `drafters.model`.

    Args:
      config: of `configure`.
      params: what was trained.
      frozen: the rest, as `begin` gives it.
    """
    within = models.language_model(config, weights(params, frozen))
    return models.reduced_vocabulary(within, np.asarray(frozen["tokens"]), config.vocab_size)


def weights(params: Any, frozen: Any) -> dict[str, Any]:
    """All weights of a draft, in the dtype of what is trained; arguments as `draft_model`."""
    dtype = params["norm"]["scale"].dtype
    given = {**params, "embed": frozen["embed"], "head": frozen["head"]}
    return checkpoints.drafts.whole(jax.tree.map(lambda leaf: leaf.astype(dtype), given))
