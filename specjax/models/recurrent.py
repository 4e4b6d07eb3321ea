"""A small recurrent language model (Elman 1990): a `LanguageModel` without attention.

Its cache is a state, not a list of entries. Every new token stacks the state it leads to, from its
parent's; `commit` selects one of the stacked states. It cannot truncate: a state has no memory of
earlier ones.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from specjax import trees, types

__all__ = ["RecurrentCache", "init_params", "recurrent_model"]


@struct.dataclass
class RecurrentCache:
    """Committed state and the states of uncommitted tokens.

    Attributes:
      state: [B, H], after the last committed token.
      stack: [B, C, H], after each uncommitted token.
      uncommitted: int32[], how many of the stack count.
    """

    state: jax.Array
    stack: jax.Array
    uncommitted: jax.Array


def init_params(key: jax.Array, vocab_size: int, hidden_size: int, sharpness: float = 1.0) -> dict:
    """Random weights: `embedding` [V, H], `recurrence` [H, H], `head` [H, V].

    Args:
      key: a typed key, consumed.
      vocab_size: V.
      hidden_size: H.
      sharpness: scale of the head; larger values give sharper laws.
    """
    embedding, recurrence, head = jax.random.split(key, 3)
    width = hidden_size**-0.5
    return {
        "embedding": jax.random.normal(embedding, (vocab_size, hidden_size)),
        "recurrence": jax.random.normal(recurrence, (hidden_size, hidden_size)) * width,
        "head": jax.random.normal(head, (hidden_size, vocab_size)) * width * 2 * sharpness,
    }


def recurrent_model(params: dict) -> types.LanguageModel:
    """h ← tanh(h·recurrence + embedding[token]), logits = h·head; weights as in `init_params`."""
    vocab_size, hidden_size = params["embedding"].shape
    return types.LanguageModel(
        params=params,
        apply=_apply,
        append=_append,
        commit=_commit,
        init_cache=_InitCache(hidden_size, jnp.dtype(params["head"].dtype).name),
        vocab_size=vocab_size,
        num_layers=1,
        hidden_size=hidden_size,
    )


@struct.dataclass
class _InitCache:
    hidden_size: int = struct.field(pytree_node=False)
    dtype: str = struct.field(pytree_node=False)

    def __call__(self, batch: int, capacity: int) -> RecurrentCache:
        return RecurrentCache(
            state=jnp.zeros((batch, self.hidden_size), self.dtype),
            stack=jnp.zeros((batch, capacity, self.hidden_size), self.dtype),
            uncommitted=jnp.zeros((), jnp.int32),
        )


def _apply(
    params: dict,
    tokens: jax.Array,
    cache: RecurrentCache,
    tree: trees.Tree | None = None,
    taps: tuple[int, ...] = (),
) -> tuple[types.ModelOutput, jax.Array]:
    batch, count = tokens.shape
    inputs = jnp.asarray(params["embedding"])[tokens]
    row = jnp.arange(batch, dtype=jnp.int32)
    if tree is None or tree.is_chain:
        parents = jnp.arange(cache.stack.shape[1], dtype=jnp.int32)[None]
    else:
        parents = trees.parents(tree)
    parents = jnp.broadcast_to(parents, (batch, parents.shape[1]))

    def step(new, stack):
        node = cache.uncommitted + new
        # Node 0 follows the committed state; any other its parent's.
        parent = jnp.take(parents, jnp.maximum(node - 1, 0), axis=1)
        before = jnp.where(node == 0, cache.state, stack[row, parent])
        after = jnp.tanh(before @ params["recurrence"] + inputs[:, new])
        return jax.lax.dynamic_update_slice_in_dim(stack, after[:, None], node, axis=1)

    stack = jax.lax.fori_loop(0, count, step, cache.stack)
    states = jax.lax.dynamic_slice_in_dim(stack, cache.uncommitted, count, axis=1)
    features = jnp.broadcast_to(states[:, :, None], (batch, count, len(taps), states.shape[-1]))
    return types.ModelOutput(states @ params["head"], features), states


def _append(cache: RecurrentCache, entries: jax.Array) -> RecurrentCache:
    stack = jax.lax.dynamic_update_slice_in_dim(cache.stack, entries, cache.uncommitted, axis=1)
    return dataclasses.replace(cache, stack=stack, uncommitted=cache.uncommitted + entries.shape[1])


def _commit(cache: RecurrentCache, nodes: jax.Array | None, count: jax.Array) -> RecurrentCache:
    last = jnp.maximum(count - 1, 0)[:, None]
    index = last if nodes is None else jnp.take_along_axis(nodes, last, axis=1)
    chosen = jnp.take_along_axis(cache.stack, index[:, :, None], axis=1)[:, 0]
    return dataclasses.replace(
        cache,
        state=jnp.where((count > 0)[:, None], chosen, cache.state),
        uncommitted=jnp.zeros_like(cache.uncommitted),
    )
