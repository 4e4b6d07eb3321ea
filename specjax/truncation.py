"""The least score that top-k, top-p and min-p keep, without sorting a vocabulary.

Top-k and top-p both ask for the largest score whose upper set weighs enough, in tokens or in mass.
It is nearly always among the few largest scores; where it is not, bisection finds it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

__all__ = ["least_kept"]

# So many of the largest scores are looked at before a threshold is searched for among all.
_LEADING = 128


def least_kept(
    scores: jax.Array,
    needed: jax.Array,
    top_k: jax.Array | None,
    top_p: jax.Array | None,
    min_p: jax.Array | None,
) -> jax.Array:
    """The least score that is kept: [B, T, 1], in the dtype of `scores`; −inf keeps all.

    Tokens tied with the last one kept are kept too. Top-p weighs what top-k left.

    Args:
      scores: [B, T, V], float, the best of each row 0.
      needed: bool[B, 1, 1], rows whose answer anyone reads.
      top_k, top_p, min_p: [B, 1, 1], as in `Sampling`, or None.
    """
    least = jnp.full((*scores.shape[:2], 1), -jnp.inf, scores.dtype)
    if top_k is not None or top_p is not None:
        leading = _leading(scores)
        if top_k is not None:
            count = jnp.broadcast_to(top_k.astype(scores.dtype), least.shape)
            found = _quantile(scores, leading, _ones, least, count, needed & (top_k > 0))
            least = jnp.where(top_k > 0, found, least)
        if top_p is not None:
            total = jnp.sum(_masses(scores, least), axis=-1, keepdims=True)
            mass = top_p.astype(scores.dtype) * total
            found = _quantile(scores, leading, _masses, least, mass, needed & (top_p < 1))
            least = jnp.where(top_p < 1, jnp.maximum(least, found), least)
    if min_p is not None:
        least = jnp.maximum(least, jnp.log(min_p.astype(scores.dtype)))
    return least


def _leading(scores: jax.Array) -> jax.Array:
    """The largest scores of each row, in falling order: [B, T, M]; all where V ≤ _LEADING."""
    vocab_size = scores.shape[-1]
    if vocab_size > _LEADING and scores.dtype != jnp.float32:
        # A `top_k` of other floats sorts the whole row, which takes longer than the search.
        return jnp.max(scores, axis=-1, keepdims=True)
    return jax.lax.top_k(scores, min(_LEADING, vocab_size))[0]


def _ones(scores: jax.Array, least: jax.Array) -> jax.Array:
    """Weights for top-k."""
    del least
    return jnp.ones_like(scores)


def _masses(scores: jax.Array, least: jax.Array) -> jax.Array:
    """Weights for top-p: what top-k left, unnormalised."""
    return jnp.where(scores >= least, jnp.exp(scores), 0)


def _quantile(
    scores: jax.Array,
    leading: jax.Array,
    weigh: Callable[[jax.Array, jax.Array], jax.Array],
    least: jax.Array,
    mass: jax.Array,
    needed: jax.Array,
) -> jax.Array:
    """The largest score v of a row such that entries of at least v weigh `mass` or more: [B, T, 1].

    −inf where all entries together weigh less. Where the leading scores weigh enough, v is one of
    them, and cumulating their weights finds it; only columns in which some row needs more search
    all scores. Which way a row's answer comes from depends on that row alone, so that rounding,
    which may differ between the two, cannot make a text depend on its batch.

    Args:
      scores: [B, T, V].
      leading: [B, T, M], the M largest of each row, in falling order.
      weigh: `(scores, least) -> weights`.
      least: [B, T, 1], for `weigh`.
      mass: [B, T, 1].
      needed: bool[B, 1, 1], rows whose answer anyone reads.
    """
    enough = jnp.cumsum(weigh(leading, least), axis=-1) >= mass
    found = jnp.any(enough, axis=-1, keepdims=True)
    first = jnp.argmax(enough, axis=-1, keepdims=True)
    leader = jnp.take_along_axis(leading, first, axis=-1)
    if leading.shape[-1] == scores.shape[-1]:
        return jnp.where(found, leader, -jnp.inf)

    def column(index):
        def of(values):
            return jax.lax.dynamic_index_in_dim(values, index, axis=1)

        return jax.lax.cond(
            jnp.any(of(needed & ~found)),
            lambda: _bisected(of(scores), weigh(of(scores), of(least)), of(mass))[:, 0],
            lambda: of(leader)[:, 0],
        )

    columns = jax.lax.map(column, jnp.arange(scores.shape[1], dtype=jnp.int32))
    return jnp.where(found, leader, columns.swapaxes(0, 1))


def _bisected(values: jax.Array, weights: jax.Array, mass: jax.Array) -> jax.Array:
    """The largest value v of a row [V] such that entries of at least v weigh `mass` or more.

    Found by bisection over the bit patterns of the floats, which order as the floats do: as many
    passes as the type has bits, and no sort. −inf (keep everything) where all entries together
    weigh less than `mass`.
    """
    bits = jnp.finfo(values.dtype).bits
    integer = jnp.int32 if bits == 32 else jnp.int64

    def ordered(x):
        pattern = jax.lax.bitcast_convert_type(x, integer)
        return jnp.where(pattern < 0, pattern ^ jnp.iinfo(integer).max, pattern)

    codes = ordered(values)

    def halve(_, bounds):
        low, high = bounds
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        enough = jnp.sum(jnp.where(codes >= middle, weights, 0), axis=-1, keepdims=True) >= mass
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    shape = (*values.shape[:-1], 1)
    low = jnp.full(shape, ordered(jnp.asarray(-jnp.inf, values.dtype)))
    high = jnp.full(shape, ordered(jnp.asarray(jnp.inf, values.dtype)))
    low, _ = jax.lax.fori_loop(0, bits, halve, (low, high))
    pattern = jnp.where(low < 0, low ^ jnp.iinfo(integer).max, low)
    return jax.lax.bitcast_convert_type(pattern, values.dtype)
