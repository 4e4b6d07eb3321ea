"""Plain decoding: the drafter that drafts nothing, so that every step is one token."""

import jax
import jax.numpy as jnp

from specjax import trees, types

__all__ = ["NOTHING"]


def _init(params: tuple, batch: int, capacity: int) -> tuple:
    del params, batch, capacity
    return ()


def _prefill(params: tuple, state: tuple, text, start, count, output) -> tuple:
    del params, text, start, count, output
    return state


def _propose(
    params: tuple, state: tuple, context: types.Context, keys: jax.Array
) -> tuple[types.Draft, tuple]:
    del params, keys
    tokens = jnp.zeros((context.length.shape[0], 0), jnp.int32)
    return types.draft(tokens, trees.chain(0), vocab_size=context.target.vocab_size), state


def _update(params: tuple, state: tuple, context, draft, verdict, output) -> tuple:
    del params, context, draft, verdict, output
    return state


NOTHING = types.Drafter(
    params=(),
    init=_init,
    prefill=_prefill,
    propose=_propose,
    update=_update,
    nodes=0,
    name="plain",
)
