"""A rule that accepts by a script, so that any drafter meets every kind of acceptance.

How deep it goes is drawn from the request key and the committed length alone: none, some and all of
a draft are accepted in turn, unequally among rows, however good the draft is. The text is not the
target's; drafters alone are tested with it.
"""

import jax
import jax.numpy as jnp

from specjax import sampling, trees, types
from specjax.verification import match

__all__ = ["rule"]

# Log-probability below which all tokens are alike, so that a one-hot law offers others too.
_UNLIKELY = -8.0


def _check(draft: types.Draft) -> None:
    """Any draft will do."""
    del draft


def _draw(
    keys: jax.Array, length: jax.Array, draft: types.Draft, target_log_probs: jax.Array
) -> jax.Array:
    """A child's token down to a drawn depth, and beyond it a token that no child has.

    Args and result as of a `VerificationRule`'s `draw`: int32[B, N+1]. Where the children hold the
    whole vocabulary there is no other token, and token 0 is given.
    """
    size, vocab_size = draft.tokens.shape[1], target_log_probs.shape[2]
    uniform = _uniform(keys, length, 1 + size + vocab_size)[:, None]
    # The whole draft is followed in a third of the steps and more, since only then does a drafter
    # lack tokens that it drafted and never fed to itself.
    depth = draft.tree.max_depth
    deepest = (jnp.minimum(1.5 * uniform[:, :, 0], 0.999) * (depth + 1)).astype(jnp.int32)
    preference = uniform[:, :, 1 : size + 1]
    noise = -jnp.log(-jnp.log(uniform[:, :, size + 1 :]))

    node = jnp.arange(size + 1, dtype=jnp.int32)[None, :, None]
    is_child = (trees.parents(draft.tree)[:, None, :] == node) & draft.present[:, None, :]
    child = jnp.argmax(jnp.where(is_child, preference, -1.0), axis=-1)
    followed = jnp.take_along_axis(draft.tokens, child, axis=1)

    token = jnp.arange(vocab_size, dtype=jnp.int32)[None, None, None]
    taken = jnp.any(is_child[..., None] & (draft.tokens[:, None, :, None] == token), axis=2)
    likely = jnp.maximum(target_log_probs, _UNLIKELY) + noise.astype(target_log_probs.dtype)
    other = sampling.greedy(jnp.where(taken, -jnp.inf, likely))
    goes_on = jnp.any(is_child, axis=-1) & (trees.depths(draft.tree) < deepest)
    return jnp.where(goes_on, followed, other)


def _uniform(keys: jax.Array, length: jax.Array, count: int) -> jax.Array:
    """float32[B, count] in (0, 1), a hash of key and length (the mixer of MurmurHash3).

    Far quicker to compile than draws of `jax.random`, and good enough for a script.
    """
    words = jax.random.key_data(keys)
    seed = words[:, -1] + words[:, 0] * jnp.uint32(0x9E3779B9)
    column = jnp.arange(count, dtype=jnp.uint32)[None] * jnp.uint32(0x27D4EB2F)
    bits = seed[:, None] + length.astype(jnp.uint32)[:, None] * jnp.uint32(0x165667B1) + column
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits = (bits ^ (bits >> jnp.uint32(shift))) * jnp.uint32(factor)
    bits = bits ^ (bits >> jnp.uint32(16))
    return ((bits >> jnp.uint32(8)).astype(jnp.float32) + 0.5) * jnp.float32(2.0**-24)


rule = types.VerificationRule(
    "script", _check, match.accept, match.residual, draw=_draw, lossless=False
)
