"""Where a text ends, found by every kind of program: with and without jit, on host and device."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from specjax import types
from specjax.decoding import finish
from specjax.decoding import state as states

# Untyped in chex.
all_variants: Any = chex.all_variants
_CAPACITY, _WIDTH = 8, 3
_FINISH = states.FinishReason
_EOS, _STOP = 4, [2, 3]
# A row for each end: length, start, offered tokens, limit, then tokens kept and why. Every other
# token of the text is the first of the stop sequence.
_ROWS = [
    (2, 2, [1, 4, 6], 9, 2, _FINISH.EOS),
    (2, 1, [3, 1, 1], 9, 1, _FINISH.STOP),
    (2, 2, [3, 1, 1], 9, 3, _FINISH.RUNNING),
    (1, 1, [1, 1, 1], 3, 2, _FINISH.LENGTH),
    (6, 2, [1, 1, 1], 9, 2, _FINISH.CACHE_FULL),
    (3, 1, [1, 1], 6, 2, _FINISH.RUNNING),
]
_STATIC = 5


def problem(rows):
    """What `close` is given, its width last, and what it must find."""
    length, start, offered, limit, kept, reason = zip(*rows, strict=True)
    text = np.full((len(rows), _CAPACITY + _WIDTH), _STOP[0], np.int32)
    for row, (where, tokens) in enumerate(zip(length, offered, strict=True)):
        text[row, where : where + len(tokens)] = tokens
    batch = len(rows)
    request = states.Request(
        keys=jax.random.split(jax.random.key(0), batch),
        sampling=types.Sampling(),
        limit=jnp.asarray(limit, jnp.int32),
        eos=jnp.full((batch, 1), _EOS, jnp.int32),
        stop=jnp.tile(jnp.asarray(_STOP, jnp.int32), (batch, 1, 1)),
        stop_length=jnp.full((batch, 1), 2, jnp.int32),
    )
    counts = [jnp.asarray(x, jnp.int32) for x in (start, length, list(map(len, offered)))]
    given = (request, jnp.asarray(text[:, :_CAPACITY]), *counts, _WIDTH)
    return given, (np.asarray(kept), np.asarray(reason))


class Variants(chex.TestCase):
    @all_variants(with_pmap=False)
    def test_close(self):
        given, wanted = problem(_ROWS)
        found = self.variant(finish.close, static_argnums=_STATIC)(*given)
        assert found[0].dtype == found[1].dtype == jnp.int32
        chex.assert_trees_all_equal(found, tuple(wanted))
        chex.assert_trees_all_equal(found, finish.close(*given))


def test_new_values_do_not_compile_again():
    close = jax.jit(chex.assert_max_traces(finish.close, n=1), static_argnums=_STATIC)
    for turn in range(3):
        given, wanted = problem(_ROWS[turn:] + _ROWS[:turn])
        chex.assert_trees_all_equal(close(*given), wanted)
