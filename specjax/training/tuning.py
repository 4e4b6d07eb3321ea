"""Tuning a target on text: what makes the drafts that were distilled from it stale."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from specjax import models
from specjax.models import policy as policies
from specjax.models import transformer

__all__ = ["NextToken", "Text", "Windows"]


@struct.dataclass
class Text:
    """Windows of text.

    Attributes:
      tokens: int32[B, T].
    """

    tokens: Any


class Windows:
    """Batches of windows drawn from texts, each a function of the seed and its number alone.

    Args:
      texts: token ids, each text longer than a window.
      rows, width: B and T.
      seed: of what is drawn.

    Raises:
      ValueError: no text is long enough.
    """

    def __init__(self, texts: Sequence[Sequence[int]], rows: int, width: int, seed: int):
        self._texts = [np.asarray(text, np.int32) for text in texts if len(text) > width]
        if not self._texts:
            raise ValueError(f"no text of {len(texts)} is longer than a window of {width} tokens")
        self._rows, self._width, self._seed = rows, width, seed
        sizes = np.asarray([len(text) - width for text in self._texts], float)
        self._shares = sizes / sizes.sum()

    def __call__(self, step: int, params: Any = None) -> Text:
        """The batch of a step."""
        del params
        generator = np.random.default_rng([self._seed, step])
        rows = []
        for index in generator.choice(len(self._texts), size=self._rows, p=self._shares):
            text = self._texts[index]
            begin = int(generator.integers(len(text) - self._width))
            rows.append(text[begin : begin + self._width])
        return Text(np.stack(rows))


@struct.dataclass
class NextToken:
    """A `core.Objective`: cross-entropy of each next token, in nats; the whole model is trained.

    Attributes:
      config: the model's; static.
    """

    config: models.TransformerConfig = struct.field(pytree_node=False)

    def __call__(self, params: Any, frozen: Any, batch: Text, key: jax.Array):
        """As `core.Objective`; the examples are tokens."""
        del frozen, key
        model = transformer.language_model(self.config, params, policies.for_training())
        cache = model.init_cache(batch.tokens.shape[0], 1)
        output, _ = model.apply(params, batch.tokens[:, :-1], cache, None, ())
        law = jax.nn.log_softmax(output.logits.astype(jnp.float32), axis=-1)
        told = jnp.take_along_axis(law, batch.tokens[:, 1:, None], axis=-1)[:, :, 0]
        best = jnp.argmax(law, axis=-1) == batch.tokens[:, 1:]
        count = jnp.float32(told.size)
        return -jnp.sum(told), count, {"accuracy": jnp.sum(best, dtype=jnp.float32)}
