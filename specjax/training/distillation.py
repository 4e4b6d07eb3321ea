"""Distilling a small draft from the target: what is minimised."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from specjax import models
from specjax.models import policy as policies
from specjax.models import products, transformer
from specjax.training import batches, losses, shapes

__all__ = ["Distillation"]


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
        2401.15077, section 3.2). Drafts of another width have nothing to compare.
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
        whole = shapes.weights(params, frozen)
        hidden, target, tokens, present = self._hidden(whole, batch)
        normalizer = jnp.where(present, batch.normalizer, 0.0)
        log_p, log_q = self._laws(frozen, whole["head"]["kernel"], target, hidden, normalizer)
        return {"log_p": log_p, "log_q": log_q, "present": present, "tokens": tokens}

    def _laws(self, frozen: Any, own_head, target, hidden, normalizer):
        """Hidden states [B, A, H] of both, and the target's normalizer [B, A]: [B, A, M] each."""
        head = frozen["head"]["kernel"].astype(jnp.float32)
        # In low precision only what is trained: rounding would be learnt as the target's law. (Of
        # rounded products that is what is asked for.)
        (scores,) = products.products(target, [head], self._products, jnp.float32)
        low = own_head.astype(hidden.dtype)
        (own,) = products.products(hidden, [low], self._products, jnp.float32)
        return scores - normalizer[:, :, None], jax.nn.log_softmax(own, axis=-1)

    @property
    def _products(self) -> policies.Policy:
        return self.policy or policies.for_training()

    def _hidden(self, whole: Any, batch: batches.Batch):
        """Hidden states before the head, the draft's and the target's, tokens, and presence."""
        model = transformer.language_model(self.config, whole, self._products)
        rows, _ = batch.tokens.shape
        cache = model.init_cache(rows, 1)
        # Logits are made where an answer is, not here: what nobody reads is not computed.
        output, _ = model.apply(whole, batch.tokens, cache, None, (self.config.num_layers,))
        answers = batch.normalizer.shape[1]
        hidden = batches.before_answers(output.features[:, :, 0], batch.start, answers)
        order = jnp.arange(answers, dtype=jnp.int32)[None]
        place = jnp.minimum(batch.start[:, None] + order, batch.tokens.shape[1] - 1)
        tokens = jnp.take_along_axis(batch.tokens, place, axis=1)
        present = order < batch.length[:, None]
        # What lies behind an answer may be anything, and a gradient of 0 would not undo a NaN.
        target = jnp.where(present[:, :, None], batch.features.astype(jnp.float32), 0)
        return hidden, target, tokens, present

    def __call__(self, params: Any, frozen: Any, batch: batches.Batch, key: jax.Array):
        """As `core.Objective`; the examples are answer tokens."""
        del key
        whole = shapes.weights(params, frozen)
        hidden, target, tokens, present = self._hidden(whole, batch)
        normalizer = jnp.where(present, batch.normalizer, 0.0)
        some = (target, hidden, normalizer, tokens)
        if "outward" in params:
            value, log_p, log_q = self._of_own_head(frozen, whole["head"]["kernel"], *some)
        else:
            loss, log_p, log_q = self._of_parts(frozen, *some)
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

        def of(some):
            target, hidden, normalizer, tokens = some

            def at(hidden):
                value, own_p, own_q = self._told(
                    frozen, frozen["head"]["kernel"], target, hidden, normalizer, tokens
                )
                return (value, own_q), own_p

            values, back, own_p = jax.vjp(at, hidden, has_aux=True)
            nothing, one = jnp.zeros_like(own_p), jnp.ones_like(own_p)
            # Each token's numbers depend on its own hidden state alone.
            slopes = [*back((one, nothing)), *(back((nothing, one)) if self.length else ())]
            return values, slopes, own_p

        fixed = jax.lax.stop_gradient(hidden)
        (loss, own_q), slopes, own_p = _in_parts(of, (target, fixed, normalizer, tokens))
        # Nothing in value, and the gradient that was made on the way.
        moved = [
            jnp.sum((slope * (hidden - fixed)).astype(jnp.float32), axis=-1) for slope in slopes
        ]
        return loss + moved[0], own_p, own_q + moved[1] if self.length else own_q

    def _of_own_head(self, frozen: Any, own_head, target, hidden, normalizer, tokens):
        """As `_of_parts`, of a head that is learnt too: laws are made again for the gradient."""

        @jax.checkpoint
        def of(some):
            return self._told(frozen, own_head, *some)

        return _in_parts(of, (target, hidden, normalizer, tokens))

    def _told(self, frozen: Any, own_head, target, hidden, normalizer, tokens):
        """The loss, and both laws at the text's own tokens: float32[B, A] each."""
        log_p, log_q = self._laws(frozen, own_head, target, hidden, normalizer)
        return self.loss(log_p, log_q), *self._of_tokens(frozen, log_p, log_q, tokens)

    def _of_tokens(self, frozen: Any, log_p, log_q, tokens) -> tuple[jax.Array, jax.Array]:
        """Both laws at the text's own tokens: the draft's −inf for foreign ones."""
        row = frozen["place"][tokens]
        known = row < self.config.head_rows
        index = jnp.where(known, row, 0)[:, :, None]
        own_p, own_q = (jnp.take_along_axis(law, index, axis=2)[:, :, 0] for law in (log_p, log_q))
        # A token without a row is never drafted; the target's law of it is then of no account.
        return jnp.where(known, own_p, 0.0), jnp.where(known, own_q, -jnp.inf)


def _in_parts(function: Any, some: tuple[jax.Array, ...]) -> Any:
    """A function of arrays [B, A, …] whose results are such, a part of the text at a time."""
    rows, answer = some[0].shape[:2]
    part = min(max(_PART // rows, 1), answer)

    def split(leaf):
        # Along the text: rows may lie on several devices.
        padding = ((0, 0), (0, -answer % part), *((0, 0) for _ in leaf.shape[2:]))
        parts = jnp.pad(leaf, padding).reshape(rows, -1, part, *leaf.shape[2:])
        return jnp.swapaxes(parts, 0, 1)

    def joined(parts):
        whole = jnp.swapaxes(parts, 0, 1).reshape(rows, -1, *parts.shape[3:])
        return whole[:, :answer]

    return jax.tree.map(joined, jax.lax.map(function, tuple(map(split, some))))
