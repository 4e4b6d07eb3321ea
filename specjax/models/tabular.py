"""N-gram tables as language models.

Their laws can be enumerated, for certificates and for tests of the whole loop.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from specjax import trees, types

__all__ = ["TabularCache", "random_table", "tabular_model"]


@struct.dataclass
class TabularCache:
    """The text so far.

    Attributes:
      tokens: int32[B, S]; uncommitted tokens stand behind the committed ones.
      length: int32[B], committed tokens.
      uncommitted: int32[], tokens appended since the last commit.
    """

    tokens: jax.Array
    length: jax.Array
    uncommitted: jax.Array


def random_table(key: jax.Array, vocab_size: int, order: int, sharpness: float = 1.0) -> jax.Array:
    """A random n-gram table for `tabular_model`, natural logs: float32[V+1, …, V+1, V].

    Args:
      key: a typed key, consumed.
      vocab_size: V.
      order: n of the n-grams; the law depends on the last n − 1 tokens.
      sharpness: standard deviation of the logits.
    """
    shape = (vocab_size + 1,) * (order - 1) + (vocab_size,)
    return jax.nn.log_softmax(sharpness * jax.random.normal(key, shape), axis=-1)


def tabular_model(table: jax.Array) -> types.LanguageModel:
    """A model whose logits are looked up by the last n − 1 tokens.

    Args:
      table: float[V+1, …, V+1, V], one leading axis for each token of context, oldest first; index
        V stands for "before the first token". n is the number of axes.

    Raises:
      ValueError: a leading axis is not V + 1.
    """
    vocab_size = table.shape[-1]
    if any(size != vocab_size + 1 for size in table.shape[:-1]):
        raise ValueError(
            f"table.shape={table.shape}: the leading axes must be V + 1 = {vocab_size + 1}"
        )
    return types.LanguageModel(
        params=table,
        apply=_apply,
        append=_append,
        commit=_commit,
        init_cache=_init_cache,
        truncate=_truncate,
        vocab_size=vocab_size,
        num_layers=1,
        hidden_size=vocab_size,
    )


def _init_cache(batch: int, capacity: int) -> TabularCache:
    return TabularCache(
        tokens=jnp.zeros((batch, capacity), jnp.int32),
        length=jnp.zeros((batch,), jnp.int32),
        uncommitted=jnp.zeros((), jnp.int32),
    )


def _apply(
    params: jax.Array,
    tokens: jax.Array,
    cache: TabularCache,
    tree: trees.Tree | None = None,
    taps: tuple[int, ...] = (),
) -> tuple[types.ModelOutput, jax.Array]:
    vocab_size = params.shape[-1]
    count = tokens.shape[1]
    text = _append(cache, tokens).tokens
    start = cache.length[:, None]
    slot = start + cache.uncommitted + jnp.arange(count, dtype=jnp.int32)[None]
    context = []
    for _ in range(params.ndim - 1):
        here = jnp.take_along_axis(text, jnp.maximum(slot, 0), axis=1)
        context.append(jnp.where(slot >= 0, here, vocab_size))
        slot = _previous(slot, start, tree)
    logits = jnp.asarray(params)[tuple(reversed(context))]
    if not context:
        logits = jnp.broadcast_to(logits, (*tokens.shape, vocab_size))
    features = jnp.broadcast_to(logits[:, :, None], (*tokens.shape, len(taps), vocab_size))
    return types.ModelOutput(logits, features), tokens


def _previous(slot: jax.Array, start: jax.Array, tree: trees.Tree | None) -> jax.Array:
    if tree is None or tree.is_chain:
        return slot - 1
    parent = jnp.broadcast_to(trees.parents(tree), (slot.shape[0], tree.size))
    node = slot - start
    index = jnp.clip(node - 1, 0, tree.size - 1)
    return jnp.where(node > 0, start + jnp.take_along_axis(parent, index, axis=1), slot - 1)


def _append(cache: TabularCache, entries: jax.Array) -> TabularCache:
    row = jnp.arange(entries.shape[0], dtype=jnp.int32)[:, None]
    start = (cache.length + cache.uncommitted)[:, None]
    slot = start + jnp.arange(entries.shape[1], dtype=jnp.int32)[None]
    return dataclasses.replace(
        cache,
        tokens=cache.tokens.at[row, slot].set(entries),
        uncommitted=cache.uncommitted + entries.shape[1],
    )


def _commit(cache: TabularCache, nodes: jax.Array | None, count: jax.Array) -> TabularCache:
    tokens = cache.tokens
    if nodes is not None:
        row = jnp.arange(nodes.shape[0], dtype=jnp.int32)[:, None]
        kept = jnp.take_along_axis(tokens, cache.length[:, None] + nodes, axis=1)
        slot = cache.length[:, None] + jnp.arange(nodes.shape[1], dtype=jnp.int32)[None]
        tokens = tokens.at[row, slot].set(kept)
    return TabularCache(tokens, cache.length + count, jnp.zeros_like(cache.uncommitted))


def _truncate(cache: TabularCache, length: jax.Array) -> TabularCache:
    return dataclasses.replace(
        cache,
        length=jnp.minimum(cache.length, length),
        uncommitted=jnp.zeros_like(cache.uncommitted),
    )
