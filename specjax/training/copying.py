"""Lessons in copying: random text that repeats itself, beside what a draft is trained on.

A draft that does not copy knows little of its prompt, and the text that a draft is distilled from
is too little, and too much like itself, to learn it from. Random tokens leave nothing else to
learn: the only way to tell the next one is to find where the last one stood before.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from specjax import models
from specjax.models import policy as policies
from specjax.models import transformer
from specjax.training import core, guidance, shapes

__all__ = ["Copying", "draw"]

# Tokens a copied span has on average.
_SPAN = 16


@struct.dataclass
class Copying:
    """A `core.Objective`: new texts in every step, to copy from and into; beside another, or alone.

    What is minimised is the cross-entropy of the copied tokens, and how far the heads of the first
    two layers are from looking where copying needs them.

    Attributes:
      base: the objective that lessons are added to, or None for lessons alone, whatever the batch.
      config: the draft's, of two layers or more; static.
      weight: of the lessons.
      rows, size: how many texts each step, or each of its parts, draws, and their tokens; static.
      policy: how products are made, `policies.for_training()` for None; static.
    """

    base: core.Objective | None
    config: models.TransformerConfig = struct.field(pytree_node=False)
    weight: Any = 0.5
    rows: int = struct.field(pytree_node=False, default=1)
    size: int = struct.field(pytree_node=False, default=512)
    policy: policies.Policy | None = struct.field(pytree_node=False, default=None)

    def __call__(self, params: Any, frozen: Any, batch: Any, key: jax.Array):
        """As `core.Objective`, of what `shapes.begin` gives.

        Reports `copied` besides: the share of the copied tokens that were told rightly.
        """
        ours, theirs = jax.random.split(key)
        total, count, told = jnp.float32(0), jnp.float32(1), {}
        if self.base is not None:
            total, count, told = self.base(params, frozen, batch, theirs)
        loss, right = self._lesson(params, frozen, ours)
        return total + self.weight * count * loss, count, {**told, "copied": count * right}

    def _lesson(self, params: Any, frozen: Any, key: jax.Array):
        """Nats of a copied token, and the share of them that are the most probable ones."""
        policy = self.policy or policies.for_training()
        text, is_copy = jax.vmap(draw, (0, None, None))(
            jax.random.split(key, self.rows), frozen["tokens"], self.size
        )
        weights = shapes.weights(params, frozen)
        model = transformer.language_model(self.config, weights, policy)
        cache = model.init_cache(self.rows, 1)
        output, (keys, _) = model.apply(weights, text, cache, None, (0, 1))
        inputs = (output.features[:, :, 0], output.features[:, :, 1])
        length = jnp.full((self.rows,), self.size, jnp.int32)
        off = guidance.loss(self.config, weights["layers"], inputs, keys[:2], text, length, policy)
        law = jax.nn.log_softmax(output.logits[:, :-1].astype(jnp.float32), axis=-1)
        row, is_copy = frozen["place"][text[:, 1:]], is_copy[:, 1:]
        told = jnp.take_along_axis(law, row[:, :, None], axis=2)[:, :, 0]
        copies = jnp.maximum(jnp.sum(is_copy, dtype=jnp.float32), 1.0)
        loss = -jnp.sum(jnp.where(is_copy, told, 0.0)) / copies + jnp.mean(off)
        hit = is_copy & (jnp.argmax(law, axis=-1) == row)
        return loss, jnp.sum(hit, dtype=jnp.float32) / copies


def draw(key: jax.Array, tokens: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
    """A random text whose second half is made of spans of its first; needs two tokens or more.

    Args:
      key: a typed key, consumed.
      tokens: int32[M], to draw from, all alike.
      size: T.

    Returns:
      The text, int32[T], and which of its tokens continue a span, and so could be told: bool[T].
    """
    fresh_key, span_key, start_key = jax.random.split(key, 3)
    half = size // 2
    fresh = tokens[jax.random.randint(fresh_key, (half,), 0, tokens.shape[0])]
    place = jnp.arange(size - half, dtype=jnp.int32)
    begins = (place == 0) | jax.random.bernoulli(span_key, 1 / _SPAN, place.shape)
    # The place where the span of each token began, and where in the first half that was taken from.
    began = jax.lax.cummax(jnp.where(begins, place, 0))
    taken = jax.random.randint(start_key, place.shape, 0, half)[began]
    source = (taken + place - began) % half
    # After the first half's last token comes its first, which nobody could tell.
    is_copy = ~begins & (source > 0)
    text = jnp.concatenate([fresh, fresh[source]])
    return text, jnp.concatenate([jnp.zeros((half,), bool), is_copy])
