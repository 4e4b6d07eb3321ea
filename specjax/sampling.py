"""From logits to log-probabilities, and the keyed noise that turns them into tokens.

`warp` is the only way from logits to a law: plain decoding, drafts and verification all call it, so
a warper cannot be applied in two orders. Randomness is never a running key: every draw derives its
key from the request's key, a named stream and a position (`derive`), so a text depends on its
prompt and its key alone, whatever its batch or drafter.
"""

import enum
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax import trees, truncation, types

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

# Vocabularies are scanned in blocks of this many tokens: a maximum a block, then one block alone.
_BLOCK = 128


class Stream(enum.IntEnum):
    """Named consumers of randomness; each folds its own number into the request's key."""

    TARGET = 0
    DRAFT = 1
    ACCEPT = 2
    RESIDUAL = 3
    CASCADE = 4
    UNION = 5


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
    # Asked of numpy, which knows the wider one even where jax forbids to mix them.
    logits = logits.astype(np.promote_types(logits.dtype, np.float32))

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
    best = greedy(logits)[:, :, None]

    def sampled():
        # With the maximum taken off first, no temperature overflows; the best score is then 0.
        scale = jnp.where(temperature > 0, temperature, 1)
        scores = (logits - jnp.take_along_axis(logits, best, axis=-1)) / scale
        fields = sampling.top_k, sampling.top_p, sampling.min_p
        given = [None if field is None else rows(field) for field in fields]
        # A NaN is kept: it is a fault, and must not look like a dead end.
        kept = ~(scores < truncation.least_kept(scores, temperature > 0, *given))
        total = jnp.sum(jnp.where(kept, jnp.exp(scores), 0), axis=-1, keepdims=True)
        law = jnp.where(kept, scores - jnp.log(total), -jnp.inf)
        return jnp.where(temperature > 0, law, one_hot())

    def one_hot():
        tokens = jnp.arange(vocab_size, dtype=best.dtype)[None, None]
        return jnp.where(tokens == best, 0.0, -jnp.inf).astype(logits.dtype)

    # An all-greedy batch needs no exponentials.
    log_probs = jax.lax.cond(jnp.any(temperature > 0), sampled, one_hot)
    return log_probs if sampling.constraint is None else jnp.where(possible, log_probs, -jnp.inf)


def greedy(log_probs: jax.Array) -> jax.Array:
    """The most probable token, ties to the lowest: int32[...] from [..., V]."""
    blocks = _in_blocks(log_probs)
    block = _first_best(jnp.max(blocks, axis=-1))
    return block * _BLOCK + _first_best(_one_block(blocks, block))


def position_noise(keys: jax.Array, position: jax.Array, tokens: jax.Array) -> jax.Array:
    """Gumbel noise keyed by (request key, position, token id): float32[B, T, M].

    The value for a token does not depend on which others are asked for, so survivors of a warper
    can be drawn alone and vocabulary shards agree.

    Args:
      keys: request keys[B], threefry2x32; folded, not consumed.
      position: int32[B, T], counted from the first prompt token.
      tokens: int32[M], token ids.
    """
    return _gumbel(_words(keys, position)[:, :, None], tokens[None, None])


def draw_target(
    keys: jax.Array, position: jax.Array, log_probs: jax.Array, wanted: jax.Array | None = None
) -> jax.Array:
    """The target's own tokens, argmax(log p + Gumbel noise): int32[B, T]; −1 at a dead end.

    The same request key gives the same token at the same position and law, in any program. No noise
    is drawn where every wanted law is one-hot.

    Args:
      keys: request keys[B], threefry2x32; folded, not consumed.
      position: int32[B, T], of the token to draw, counted from the first prompt token.
      log_probs: [B, T, V], warped laws.
      wanted: bool[B, T], draws that anyone will read; None wants all. The others have no meaning.
    """
    best = greedy(log_probs)
    highest = jnp.take_along_axis(log_probs, best[:, :, None], axis=-1)[:, :, 0]
    is_random = (highest < 0) & (highest > -jnp.inf)
    if wanted is not None:
        is_random = is_random & wanted

    count = best.shape[1]
    widths = sorted({1, (count + 1) // 2, count})

    def sampled(width: int) -> jax.Array:
        laws, places = log_probs[:, :width], jnp.broadcast_to(position, best.shape)[:, :width]
        words = _words(keys, places)[:, :, None]
        blocks = _in_blocks(laws)
        within = jnp.arange(_BLOCK, dtype=jnp.int32)[None, None]
        tokens = jnp.arange(blocks.shape[2], dtype=jnp.int32)[None, None, :, None] * _BLOCK
        noise = _gumbel(words[:, :, None], tokens + within[:, :, None]).astype(blocks.dtype)
        block = _first_best(jnp.max(blocks + noise, axis=-1))
        # Drawing one block's noise again is cheaper than keeping that of all.
        noise = _gumbel(words, block[:, :, None] * _BLOCK + within).astype(blocks.dtype)
        drawn = block * _BLOCK + _first_best(_one_block(blocks, block) + noise)
        return best.at[:, :width].set(drawn)

    # Noise is dear, and of a chain that was cut short the last nodes need none.
    needed = jnp.max(jnp.where(is_random, jnp.arange(1, count + 1, dtype=jnp.int32)[None], 0))
    shortest = jnp.sum(needed > np.asarray([0, *widths[:-1]], np.int32), dtype=jnp.int32)
    branches = [lambda: best, *(functools.partial(sampled, width) for width in widths)]
    drawn = jax.lax.switch(shortest, branches)
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


def _in_blocks(values: jax.Array) -> jax.Array:
    """[..., V] as [..., blocks, _BLOCK], the last block filled up with −inf."""
    rest = -values.shape[-1] % _BLOCK
    if rest:
        padding = [(0, 0)] * (values.ndim - 1) + [(0, rest)]
        values = jnp.pad(values, padding, constant_values=-jnp.inf)
    return values.reshape(*values.shape[:-1], -1, _BLOCK)


def _one_block(blocks: jax.Array, block: jax.Array) -> jax.Array:
    """The chosen block of each row: [..., _BLOCK] from [..., blocks, _BLOCK] and int32[...]."""
    return jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]


def _first_best(values: jax.Array) -> jax.Array:
    """The index of the largest value, ties to the lowest: int32[...]. For short rows: it is slow.

    An argmax keeps the compiler from vectorising, and whatever is fused into it with it; hence the
    maximum of each block first, and this only among maxima and within one block.
    """
    return jnp.argmax(values, axis=-1).astype(jnp.int32)


def _words(keys: jax.Array, position: jax.Array) -> jax.Array:
    """The two words of the target's key at each position: uint32[B, T, 2]."""
    spread = jnp.broadcast_to(keys[:, None], position.shape)
    return jax.random.key_data(derive(spread, Stream.TARGET, position))


def _gumbel(words: jax.Array, tokens: jax.Array) -> jax.Array:
    """Gumbel noise of tokens, int32[...], each under a key, uint32[..., 2]: float32[...]."""
    bits = _folded_word(words, tokens)
    # A winner of the race has a small exponential. Taken from the small end of the uniform, it
    # keeps 32 bits of resolution; 1 − u would leave 24, and visibly bend a flat law over a large
    # vocabulary.
    uniform = (bits.astype(jnp.float32) + 0.5) * jnp.float32(2.0**-32)
    return -jnp.log(-jnp.log1p(-jnp.minimum(uniform, jnp.float32(1 - 2.0**-24))))


def _folded_word(words: jax.Array, tokens: jax.Array) -> jax.Array:
    """The last word of `fold_in(key, token)`: uint32[...], 32 random bits.

    One block of Threefry-2x32 with 20 rounds (Salmon et al. 2011, "Parallel random numbers: as easy
    as 1, 2, 3"), written out: that of `jax.random` is a loop on CPU, which keeps a whole vocabulary
    of words in memory between rounds, where this fuses with what reads it.
    """
    first, second = words[..., 0], words[..., 1]
    schedule = first, second, first ^ second ^ jnp.uint32(0x1BD11BDA)
    left, right = jnp.broadcast_arrays(first, tokens.astype(jnp.uint32) + second)
    for group in range(5):
        for rotation in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            left = left + right
            right = (right << jnp.uint32(rotation)) | (right >> jnp.uint32(32 - rotation))
            right = right ^ left
        left = left + schedule[(group + 1) % 3]
        right = right + schedule[(group + 2) % 3] + jnp.uint32(group + 1)
    return right
