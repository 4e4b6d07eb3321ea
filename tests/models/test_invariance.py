"""With native kernels a token's logits are the same to the last bit, whatever passes beside it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import models, native, trees
from specjax.models import policy

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="no C++ compiler"),
    pytest.mark.optimised,
]

NATIVE = policy.Policy(native=True)
BASE = models.TransformerConfig(
    vocab_size=50,
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_size=16,
    context_length=256,
)
CONFIGS = {
    "even": BASE,
    "odd": dataclasses.replace(
        BASE,
        vocab_size=37,
        hidden_size=45,
        intermediate_size=50,
        num_heads=3,
        num_kv_heads=1,
        head_size=22,
    ),
    # More query heads of a key head than are done at a time.
    "one key head": dataclasses.replace(BASE, num_heads=12, num_kv_heads=1, head_size=80),
    "biased": dataclasses.replace(
        BASE, qkv_bias=True, output_bias=True, ffn_bias=True, tied_embeddings=False
    ),
}
TEXT = np.random.default_rng(0).integers(0, 37, 41).tolist()


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    config = CONFIGS[request.param]
    params = models.init_params(config, jax.random.key(0), scale=2.0)
    params = jax.tree.map(lambda leaf: leaf + 0.01, params)
    model = models.language_model(config, params, NATIVE)
    return dataclasses.replace(model, apply=jax.jit(model.apply, static_argnums=4))


def feed(model, cache, tokens, widths):
    """Logits after every token of a chain, fed in passes of the given widths, and the cache."""
    logits, first = [], 0
    for width in widths:
        chunk = jnp.asarray(tokens[:, first : first + width], jnp.int32)
        output, entries = model.apply(model.params, chunk, cache, None, ())
        cache = model.append(cache, entries)
        path = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), (tokens.shape[0], width))
        cache = model.commit(cache, path, jnp.full((tokens.shape[0],), width, jnp.int32))
        logits.append(np.asarray(output.logits))
        first += width
    return np.concatenate(logits, axis=1), cache


@pytest.fixture(scope="module")
def alone(model):
    """Logits of the text's tokens, fed one by one."""
    return feed(model, model.init_cache(1, 64), np.asarray([TEXT]), [1] * len(TEXT))[0]


@pytest.mark.parametrize("widths", [[41], [40, 1], [9, 9, 9, 9, 5], [2, 7, 8, 16, 3, 5], [33, 8]])
@pytest.mark.parametrize("capacity", [41 + 33, 200])
def test_passes_of_any_width(model, alone, widths, capacity):
    cache = model.init_cache(1, capacity)
    np.testing.assert_array_equal(feed(model, cache, np.asarray([TEXT]), widths)[0], alone)


@pytest.mark.parametrize("batch", [2, 5])
def test_a_row_in_a_batch(model, alone, batch):
    texts = np.random.default_rng(1).integers(0, 37, (batch, len(TEXT)))
    texts[1] = TEXT
    made, _ = feed(model, model.init_cache(batch, 64), texts, [20, 1, 20])
    np.testing.assert_array_equal(made[1:2], alone)


def test_rows_of_different_lengths(model, alone):
    texts = np.asarray([TEXT, TEXT, TEXT])
    _, cache = feed(model, model.init_cache(3, 64), texts, [30])
    lengths = jnp.asarray([3, 30, 12], jnp.int32)
    cache = dataclasses.replace(cache, length=lengths)
    chunk = jnp.asarray([TEXT[length : length + 9] for length in (3, 30, 12)], jnp.int32)
    output, _ = model.apply(model.params, chunk, cache, None, ())
    for row, length in enumerate((3, 30, 12)):
        np.testing.assert_array_equal(output.logits[row], alone[0, length : length + 9])


def test_a_path_of_a_tree(model, alone):
    """Nodes 2, 4, 6 go on as the text does, between others that do not; then the path is kept."""
    tree = trees.from_parents([0, 0, 2, 2, 4, 4, 1])
    _, cache = feed(model, model.init_cache(1, 64), np.asarray([TEXT]), [10])
    path = [0, 2, 4, 6]
    tokens = np.full(8, 5)
    tokens[path] = TEXT[10:14]
    output, entries = model.apply(
        model.params, jnp.asarray(tokens[None], jnp.int32), cache, tree, ()
    )
    np.testing.assert_array_equal(output.logits[0, jnp.asarray(path)], alone[0, 10:14])
    cache = model.commit(
        model.append(cache, entries), jnp.asarray([path], jnp.int32), jnp.asarray([4], jnp.int32)
    )
    rest = jnp.asarray([TEXT[14:20]], jnp.int32)
    output, _ = model.apply(model.params, rest, cache, None, ())
    np.testing.assert_array_equal(output.logits, alone[:, 14:20])


def test_other_tokens_would_be_seen(model, alone):
    changed = np.asarray([TEXT])
    changed[0, 3] += 1
    made, _ = feed(model, model.init_cache(1, 64), changed, [41])
    assert np.all(np.any(made[0, 3:] != alone[0, 3:], axis=-1))
