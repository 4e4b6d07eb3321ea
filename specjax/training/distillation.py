"""Distilling a small draft from the target: its shape, its beginning, and what it minimises."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from specjax import checkpoints, models, types
from specjax.models import policy as policies
from specjax.models import products, transformer
from specjax.training import batches, losses, shards

__all__ = [
    "Distillation",
    "Shape",
    "begin",
    "configure",
    "draft_model",
    "vocabulary",
    "weights",
]


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a draft: what the cost model chooses among.

    The embedding and the head's rows are the target's own and stay as they are, so that only the
    layers are learnt, and stored.

    Attributes:
      layers: the target's layers that the draft's begin as, first to last.
      intermediate_size: width of the feed-forward layers; the target's most telling neurons.
      vocabulary: rows of the head.
    """

    layers: tuple[int, ...]
    intermediate_size: int
    vocabulary: int

    def __str__(self) -> str:
        layers = "+".join(map(str, self.layers))
        return f"layers {layers}, feed-forward {self.intermediate_size}, {self.vocabulary} tokens"


def configure(target: models.TransformerConfig, shape: Shape) -> models.TransformerConfig:
    """The draft's configuration.

    Raises:
      ValueError: a layer that the target does not have, or a size above the target's.
    """
    for layer in shape.layers:
        if not 0 <= layer < target.num_layers:
            raise ValueError(f"layers={shape.layers}: the target has {target.num_layers}")
    if not shape.layers:
        raise ValueError("layers=(): a draft needs at least one")
    for name, most in (
        ("intermediate_size", target.intermediate_size),
        ("vocabulary", target.vocab_size),
    ):
        if not 1 <= getattr(shape, name) <= most:
            raise ValueError(f"{name}={getattr(shape, name)} must lie between 1 and {most}")
    return dataclasses.replace(
        target,
        num_layers=len(shape.layers),
        intermediate_size=shape.intermediate_size,
        tied_embeddings=False,
        head_rows=shape.vocabulary,
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
    bundle: checkpoints.Bundle, shape: Shape, tokens: np.ndarray
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is trained, as it begins, and what stays the target's.

    Args:
      bundle: the target.
      shape: the draft's sizes.
      tokens: int32[M], the head's tokens.

    Returns:
      What is trained, `layers` and `norm`; and the rest: `embed`, `head`, `tokens` int32[M], and
      `place` int32[V], the head's row of a token, M where it has none.
    """
    configure(bundle.config, shape)
    target = bundle.target.params

    def narrow(layer: dict[str, Any]) -> dict[str, Any]:
        ffn = layer["ffn"]
        # What a neuron can add: its weights out, times its weights in.
        size = jnp.linalg.norm(ffn["down"]["kernel"], axis=0) * jnp.linalg.norm(
            ffn["up"]["kernel"], axis=1
        )
        kept = jnp.sort(jnp.argsort(-size)[: shape.intermediate_size])
        chosen = {name: jax.tree.map(lambda leaf: leaf[kept], ffn[name]) for name in ("gate", "up")}
        down = {**ffn["down"], "kernel": ffn["down"]["kernel"][:, kept]}
        return {**layer, "ffn": {**chosen, "down": down}}

    layers = {place: narrow(target["layers"][layer]) for place, layer in enumerate(shape.layers)}
    rows = transformer.head_kernel(target)[jnp.asarray(tokens)]
    return (
        {"layers": layers, "norm": target["norm"]},
        {
            "embed": target["embed"],
            "head": {"kernel": rows},
            "tokens": jnp.asarray(tokens, jnp.int32),
            "place": jnp.full((bundle.config.vocab_size,), len(tokens), jnp.int32)
            .at[jnp.asarray(tokens)]
            .set(jnp.arange(len(tokens), dtype=jnp.int32)),
        },
    )


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
    whole = {**params, "embed": frozen["embed"], "head": frozen["head"]}
    return jax.tree.map(lambda leaf: leaf.astype(dtype), whole)


# Tokens whose laws are made at a time.
_PART = 512


@struct.dataclass
class Distillation:
    """A `core.Objective`: the draft's law against the target's, at every token of the answers.

    Attributes:
      config: the draft's; static.
      loss: `(log_p[..., M], log_q[..., M]) -> [...]`, as those of `losses.LOSSES`.
      features: weight of the distance between the hidden states before the head, which the heads'
        rows being the same makes comparable; smooth L1, as EAGLE's (Li et al. 2024, arXiv
        2401.15077, section 3.2).
      length: K, adds the negative expected accepted length of drafts of K on answers that are
        drawn from the target's own law, at temperature 1; 0 leaves it out; static.
      rule: whose acceptance that is; static.
      share: weight of that part, the rest being that of `loss`.
      policy: how products are made, `policies.for_training()` for None; static.
    """

    config: models.TransformerConfig = struct.field(pytree_node=False)
    loss: losses.Loss = losses.LOSSES["forward_kl"]
    features: Any = 0.0
    length: int = struct.field(pytree_node=False, default=0)
    rule: str = struct.field(pytree_node=False, default="block")
    share: Any = 0.5
    policy: policies.Policy | None = struct.field(pytree_node=False, default=None)

    def laws(self, params: Any, frozen: Any, batch: batches.Batch) -> dict[str, jax.Array]:
        """Both laws over the head's tokens at every token of the answers.

        Returns:
          `log_p`, `log_q` float32[B, A, M], `present` bool[B, A], and `tokens` int32[B, A].
        """
        hidden, target, tokens, present = self._hidden(params, frozen, batch)
        normalizer = jnp.where(present, batch.normalizer, 0.0)
        log_p, log_q = self._laws(frozen, target, hidden, normalizer)
        return {"log_p": log_p, "log_q": log_q, "present": present, "tokens": tokens}

    def _laws(self, frozen: Any, target, hidden, normalizer) -> tuple[jax.Array, jax.Array]:
        """Hidden states [B, A, H] of both, and the target's normalizer [B, A]: [B, A, M] each."""
        head = frozen["head"]["kernel"].astype(jnp.float32)
        # In low precision only what is trained: rounding would be learnt as the target's law.
        (scores,) = products.products(target, [head], self._products, jnp.float32)
        low = head.astype(hidden.dtype)
        (own,) = products.products(hidden, [low], self._products, jnp.float32)
        return scores - normalizer[:, :, None], jax.nn.log_softmax(own, axis=-1)

    @property
    def _products(self) -> policies.Policy:
        return self.policy or policies.for_training()

    def _hidden(self, params: Any, frozen: Any, batch: batches.Batch):
        """Hidden states before the head, the draft's and the target's, tokens, and presence."""
        whole = weights(params, frozen)
        model = transformer.language_model(self.config, whole, self._products)
        rows, _ = batch.tokens.shape
        cache = model.init_cache(rows, 1)
        # Logits are made where an answer is, not here: what nobody reads is not computed.
        output, _ = model.apply(whole, batch.tokens, cache, None, (self.config.num_layers,))
        order = jnp.arange(batch.normalizer.shape[1], dtype=jnp.int32)[None]
        place = jnp.minimum(batch.start[:, None] + order, batch.tokens.shape[1] - 1)
        hidden = jnp.take_along_axis(output.features[:, :, 0], place[:, :, None] - 1, axis=1)
        tokens = jnp.take_along_axis(batch.tokens, place, axis=1)
        present = order < batch.length[:, None]
        # What lies behind an answer may be anything, and a gradient of 0 would not undo a NaN.
        target = jnp.where(present[:, :, None], batch.features.astype(jnp.float32), 0)
        return hidden, target, tokens, present

    def __call__(self, params: Any, frozen: Any, batch: batches.Batch, key: jax.Array):
        """As `core.Objective`; the examples are answer tokens."""
        del key
        hidden, target, tokens, present = self._hidden(params, frozen, batch)
        normalizer = jnp.where(present, batch.normalizer, 0.0)
        loss, log_p, log_q = self._of_parts(frozen, target, hidden, normalizer, tokens)
        off = jnp.abs(hidden.astype(jnp.float32) - target)
        smooth = jnp.where(off < 1, 0.5 * off * off, off - 0.5)
        value = loss + self.features * jnp.mean(smooth, axis=-1)
        if self.length:
            accepted = losses.negative_accepted_length(
                log_p, log_q, present, self.length, self.rule
            )
            share = jnp.where(batch.temperature == 1, self.share, 0.0)[:, None]
            value = (1 - share) * value + share * accepted
        # Acceptance is measured on text held out: here it would be a tenth of the step.
        total = jnp.sum(jnp.where(present, value, 0.0))
        return total, jnp.sum(present, dtype=jnp.float32), {}

    def _of_parts(self, frozen: Any, target, hidden, normalizer, tokens):
        """The loss at every token, and both laws at the text's own: float32[B, A] each.

        In parts, each with its slopes along the hidden states: the laws of all tokens together are
        the largest arrays of all, and to keep them for the gradient would take longer than to make
        them.
        """
        rows, answer = tokens.shape
        part = min(max(_PART // rows, 1), answer)

        def split(leaf):
            # Along the text: rows may lie on several devices.
            padding = ((0, 0), (0, -answer % part), *((0, 0) for _ in leaf.shape[2:]))
            parts = jnp.pad(leaf, padding).reshape(rows, -1, part, *leaf.shape[2:])
            return jnp.swapaxes(parts, 0, 1)

        def joined(parts):
            whole = jnp.swapaxes(parts, 0, 1).reshape(rows, -1, *parts.shape[3:])
            return whole[:, :answer]

        def of(some):
            target, hidden, normalizer, tokens = some

            def at(hidden):
                log_p, log_q = self._laws(frozen, target, hidden, normalizer)
                own_p, own_q = self._of_tokens(frozen, log_p, log_q, tokens)
                return (self.loss(log_p, log_q), own_q), own_p

            values, back, own_p = jax.vjp(at, hidden, has_aux=True)
            nothing, one = jnp.zeros_like(own_p), jnp.ones_like(own_p)
            # Each token's numbers depend on its own hidden state alone.
            slopes = [*back((one, nothing)), *(back((nothing, one)) if self.length else ())]
            return values, slopes, own_p

        fixed = jax.lax.stop_gradient(hidden)
        made = jax.lax.map(of, tuple(map(split, (target, fixed, normalizer, tokens))))
        (loss, own_q), slopes, own_p = jax.tree.map(joined, made)
        # Nothing in value, and the gradient that was made on the way.
        moved = [
            jnp.sum((slope * (hidden - fixed)).astype(jnp.float32), axis=-1) for slope in slopes
        ]
        return loss + moved[0], own_p, own_q + moved[1] if self.length else own_q

    def _of_tokens(self, frozen: Any, log_p, log_q, tokens) -> tuple[jax.Array, jax.Array]:
        """Both laws at the text's own tokens: the draft's −inf for foreign ones."""
        row = frozen["place"][tokens]
        known = row < self.config.head_rows
        index = jnp.where(known, row, 0)[:, :, None]
        own_p, own_q = (jnp.take_along_axis(law, index, axis=2)[:, :, 0] for law in (log_p, log_q))
        # A token without a row is never drafted; the target's law of it is then of no account.
        return jnp.where(known, own_p, 0.0), jnp.where(known, own_q, -jnp.inf)
