"""From logits to log-probabilities, and the keyed noise that turns them into tokens.

`warp` is the only way from logits to a law: plain decoding, drafts and verification all call it, so
a warper cannot be applied in two orders. Randomness is never a running key: every draw derives its
key from the request's key, a named stream and a position (`derive`), so a text depends on its
prompt and its key alone, whatever its batch or drafter.
"""

import enum
from typing import Any

import jax
import jax.numpy as jnp

from specjax import trees, types

__all__ = [
    "Stream",
    "categorical",
    "derive",
    "draw_target",
    "greedy",
    "history",
    "position_noise",
    "warp",
]

_BLOCK = 128


class Stream(enum.IntEnum):
    """Named consumers of randomness; each folds its own number into the request's key."""

    TARGET = 0
    DRAFT = 1
    ACCEPT = 2
    RESIDUAL = 3
    CASCADE = 4


def derive(keys: jax.Array, stream: Stream, position: jax.Array) -> jax.Array:
    """Keys[...] for one consumer at one position; the request keys[...] are not consumed.

    Args:
      keys: typed keys, any shape.
      stream: the consumer.
      position: int32, the same shape as `keys`: an absolute token position or a committed length.
    """

    def one(key, where):
        return jax.random.fold_in(jax.random.fold_in(key, int(stream)), where)

    for _ in range(keys.ndim):
        one = jax.vmap(one)
    return one(keys, position)


def history(
    tokens: jax.Array, length: jax.Array, tree: trees.Tree, drafted: jax.Array
) -> types.History:
    """The `History` of a tree's N + 1 nodes.

    Args:
      tokens: int32[B, S], committed text.
      length: int32[B].
      tree: topology of N nodes.
      drafted: int32[B, N], tokens of nodes 1…N.
    """
    batch, size = drafted.shape
    if size == 0:
        return types.History(
            tokens, length, jnp.zeros((batch, 1, 0), jnp.int32), jnp.zeros((batch, 1), jnp.int32)
        )
    nodes = trees.paths(tree)
    nodes = jnp.broadcast_to(nodes, (batch, *nodes.shape[1:]))
    flat = jnp.maximum(nodes - 1, 0).reshape(batch, -1)
    path = jnp.take_along_axis(drafted, flat, axis=1).reshape(nodes.shape)
    depth = jnp.broadcast_to(trees.depths(tree), (batch, size + 1))
    return types.History(tokens, length, path, depth)


def warp(sampling: types.Sampling, logits: jax.Array, past: types.History) -> jax.Array:
    """The law to sample from: normalised natural-log probabilities, same shape as `logits`.

    Logit bias, repetition penalty, constraint, temperature, top-k, top-p and min-p, in Hugging
    Face's order and with its definitions, save that tokens tied with the last one kept by top-p are
    all kept. A row at temperature 0 gets the one-hot law of the argmax, ties to the lowest token.
    Where the constraint allows no token at all (a dead end), the law is −inf everywhere.

    Args:
      sampling: fields are scalars or one value a row.
      logits: [B, T, V], float; computed in float32 or wider.
      past: what stands before each of the T laws; read only by the repetition penalty and by a
        constraint.

    Raises:
      ValueError: a constraint gives something other than bool[B, T, V].
    """
    batch, _, vocab_size = logits.shape
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))

    def rows(field):
        return jnp.broadcast_to(jnp.asarray(field).reshape(-1), (batch,))[:, None, None]

    if sampling.logit_bias is not None:
        bias = jnp.asarray(sampling.logit_bias, logits.dtype)
        logits = logits + jnp.broadcast_to(jnp.atleast_2d(bias), (batch, vocab_size))[:, None, :]
    if sampling.repetition_penalty is not None:
        penalty = rows(sampling.repetition_penalty).astype(logits.dtype)
        penalised = jnp.where(logits < 0, logits * penalty, logits / penalty)
        logits = jnp.where(_seen(past, vocab_size), penalised, logits)
    possible = jnp.ones((1, 1, 1), bool)
    if sampling.constraint is not None:
        allowed = _allowed(sampling.constraint, past, logits.shape) & (logits > -jnp.inf)
        possible = jnp.any(allowed, axis=-1, keepdims=True)
        # A dead end keeps its logits until the end, so that the arithmetic never sees only −inf.
        logits = jnp.where(allowed | ~possible, logits, -jnp.inf)

    temperature = rows(sampling.temperature).astype(logits.dtype)
    best = greedy(logits)

    def sampled():
        # With the maximum taken off first, no temperature overflows.
        scale = jnp.where(temperature > 0, temperature, 1)
        scores = (logits - jnp.max(logits, axis=-1, keepdims=True)) / scale
        if sampling.top_k is not None:
            top_k = rows(sampling.top_k)
            least = _quantile(scores, jnp.ones_like(scores), top_k.astype(scores.dtype))
            scores = jnp.where((scores >= least) | (top_k == 0), scores, -jnp.inf)
        if sampling.top_p is not None:
            top_p = rows(sampling.top_p).astype(scores.dtype)
            mass = jax.nn.softmax(scores, axis=-1)
            least = _quantile(scores, mass, top_p)
            scores = jnp.where((scores >= least) | (top_p >= 1), scores, -jnp.inf)
        if sampling.min_p is not None:
            floor = jnp.log(rows(sampling.min_p).astype(scores.dtype))
            scores = jnp.where(scores >= floor, scores, -jnp.inf)
        return jnp.where(temperature > 0, jax.nn.log_softmax(scores, axis=-1), one_hot())

    def one_hot():
        tokens = jnp.arange(vocab_size, dtype=best.dtype)[None, None]
        return jnp.where(tokens == best[:, :, None], 0.0, -jnp.inf).astype(logits.dtype)

    # An all-greedy batch needs no exponentials.
    log_probs = jax.lax.cond(jnp.any(temperature > 0), sampled, one_hot)
    return log_probs if sampling.constraint is None else jnp.where(possible, log_probs, -jnp.inf)


def greedy(log_probs: jax.Array) -> jax.Array:
    """The most probable token, ties to the lowest: int32[...] from [..., V]."""
    return jnp.argmax(log_probs, axis=-1).astype(jnp.int32)


def position_noise(keys: jax.Array, position: jax.Array, tokens: jax.Array) -> jax.Array:
    """Gumbel noise keyed by (request key, position, token id): float32[B, T, M].

    The value for a token does not depend on which others are asked for, so survivors of a warper
    can be drawn alone and vocabulary shards agree.

    Args:
      keys: request keys[B]; folded, not consumed.
      position: int32[B, T], counted from the first prompt token.
      tokens: int32[M], token ids.
    """
    spread = jnp.broadcast_to(keys[:, None], position.shape)
    at_position = derive(spread, Stream.TARGET, position)

    def one(key, token):
        return jax.random.bits(jax.random.fold_in(key, token), dtype=jnp.uint32)

    bits = jax.vmap(jax.vmap(lambda key: jax.vmap(lambda token: one(key, token))(tokens)))(
        at_position
    )
    # A winner of the race has a small exponential. Taken from the small end of the uniform, it
    # keeps 32 bits of resolution; 1 − u would leave 24, and visibly bend a flat law over a large
    # vocabulary.
    uniform = (bits.astype(jnp.float32) + 0.5) * jnp.float32(2.0**-32)
    return -jnp.log(-jnp.log1p(-jnp.minimum(uniform, jnp.float32(1 - 2.0**-24))))


def draw_target(
    keys: jax.Array, position: jax.Array, log_probs: jax.Array, wanted: jax.Array | None = None
) -> jax.Array:
    """The target's own tokens, argmax(log p + Gumbel noise): int32[B, T]; −1 at a dead end.

    The same request key gives the same token at the same position and law, in any program. Noise is
    drawn for the columns in which some row wants a draw from a law that is not one-hot.

    Args:
      keys: request keys[B]; folded, not consumed.
      position: int32[B, T], of the token to draw, counted from the first prompt token.
      log_probs: [B, T, V], warped laws.
      wanted: bool[B, T], draws that anyone will read; None wants all. The others have no meaning.
    """
    batch, count, vocab_size = log_probs.shape
    position = jnp.broadcast_to(position, (batch, count))
    highest = jnp.max(log_probs, axis=-1)
    is_random = (highest < 0) & (highest > -jnp.inf)
    if wanted is not None:
        is_random = is_random & wanted
    tokens = jnp.arange(vocab_size, dtype=jnp.int32)

    def column(index):
        law = jax.lax.dynamic_index_in_dim(log_probs, index, axis=1)
        place = jax.lax.dynamic_index_in_dim(position, index, axis=1)

        def sampled():
            return greedy(law + position_noise(keys, place, tokens).astype(law.dtype))[:, 0]

        return jax.lax.cond(
            jnp.any(jax.lax.dynamic_index_in_dim(is_random, index, axis=1)),
            sampled,
            lambda: greedy(law)[:, 0],
        )

    drawn = jax.lax.map(column, jnp.arange(count, dtype=jnp.int32)).T
    # Only a law of nothing but −inf is a dead end; a NaN is a fault, and must not look like one.
    return jnp.where(highest == -jnp.inf, -1, drawn)


def categorical(keys: jax.Array, log_probs: jax.Array) -> jax.Array:
    """One token a row by a two-level inverse CDF: int32[B]; −1 where the law has no token.

    A block of the vocabulary is drawn by its mass, then a token within it, each with a uniform of
    its own. A token of probability 0 is never drawn. Far cheaper than a row of Gumbel noise.

    Args:
      keys: typed keys[B]; consumed.
      log_probs: [B, V], natural logs, normalised.
    """
    batch, vocab_size = log_probs.shape
    highest = jnp.max(log_probs, axis=-1, keepdims=True)
    possible = highest != -jnp.inf

    def sampled():
        mass = jnp.exp(log_probs - jnp.where(possible, highest, 0.0))
        blocks = jnp.pad(mass, ((0, 0), (0, -vocab_size % _BLOCK))).reshape(batch, -1, _BLOCK)
        uniform = jax.vmap(lambda key: jax.random.uniform(key, (2,), log_probs.dtype))(keys)
        block = _inverse_cdf(jnp.sum(blocks, axis=-1), uniform[:, 0])
        within = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
        return block * _BLOCK + _inverse_cdf(within, uniform[:, 1])

    # No noise where every law is one-hot.
    drawn = jax.lax.cond(jnp.any(possible & (highest < 0)), sampled, lambda: greedy(log_probs))
    return jnp.where(possible[:, 0], drawn, -1)


def _inverse_cdf(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """The first index with weight at which the cumulated weight exceeds `uniform` × total.

    Args:
      weights: [B, M], at least 0, not all 0.
      uniform: [B], in [0, 1).
    """
    cumulated = jnp.cumsum(weights, axis=-1)
    beyond = (cumulated > uniform[:, None] * cumulated[:, -1:]) & (weights > 0)
    # Rounding may leave the last cumulated weights at the threshold; the last index with weight is
    # then meant.
    last = weights.shape[-1] - 1 - jnp.argmax(weights[:, ::-1] > 0, axis=-1)
    return jnp.where(jnp.any(beyond, axis=-1), jnp.argmax(beyond, axis=-1), last).astype(jnp.int32)


def _allowed(constraint: Any, past: types.History, shape: tuple[int, ...]) -> jax.Array:
    """What a constraint allows: bool[B, T, V]; ValueError when it says something else."""
    allowed = jnp.asarray(constraint(past))
    if allowed.shape != shape or allowed.dtype != jnp.bool_:
        raise ValueError(
            f"sampling constraint gave {allowed.dtype}{list(allowed.shape)}; for this history it "
            f"must give bool[B, T, V] = bool{list(shape)}"
        )
    return allowed


def _seen(past: types.History, vocab_size: int) -> jax.Array:
    """Whether a token stands in the text before each node: bool[B, T, V]."""
    batch, count, depth = past.path.shape
    row = jnp.arange(batch, dtype=jnp.int32)[:, None]
    place = jnp.arange(past.tokens.shape[1], dtype=jnp.int32)[None]
    # Tokens that do not count are sent out of range, and dropped there.
    text = jnp.where(place < past.length[:, None], past.tokens, vocab_size)
    committed = jnp.zeros((batch, vocab_size), bool).at[row, text].set(True, mode="drop")
    seen = jnp.broadcast_to(committed[:, None], (batch, count, vocab_size))
    counts = jnp.arange(depth, dtype=jnp.int32)[None, None] < past.depth[:, :, None]
    path = jnp.where(counts, past.path, vocab_size)
    node = jnp.arange(count, dtype=jnp.int32)[None, :, None]
    return seen.at[row[:, :, None], node, path].set(True, mode="drop")


def _quantile(values: jax.Array, weights: jax.Array, mass: jax.Array) -> jax.Array:
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
