"""The draws against their laws, and the keyed noise and streams they come from."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from specjax import sampling, trees, types
from specjax.sampling import Stream

# Untyped in chex.
all_variants: Any = chex.all_variants


def some_laws(*shape):
    """Random natural-log laws, every third row of them one-hot."""
    laws = jax.nn.log_softmax(3 * jax.random.normal(jax.random.key(9), shape), axis=-1)
    one_hot = jnp.log(jax.nn.one_hot(jnp.argmin(laws, axis=-1), shape[-1]))
    certain = jnp.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)) % 3 == 1
    return jnp.where(certain, one_hot, laws)


class Variants(chex.TestCase):
    """The same draws with and without jit, on host and device arrays."""

    @all_variants(with_pmap=False)
    def test_draw_target(self):
        keys = jax.random.split(jax.random.key(5), 3)
        log_probs = some_laws(3, 4, 40)
        position = jnp.arange(12, dtype=jnp.int32).reshape(3, 4)
        wanted = jnp.asarray([[True], [True], [False]]) | (position % 4 == 0)
        draw = self.variant(sampling.draw_target)
        found = draw(keys, position, log_probs)
        np.testing.assert_array_equal(found, sampling.draw_target(keys, position, log_probs))
        noise = sampling.position_noise(keys, position, jnp.arange(40, dtype=jnp.int32))
        np.testing.assert_array_equal(found, jnp.argmax(log_probs + noise, axis=-1))
        some = draw(keys, position, log_probs, wanted)
        np.testing.assert_array_equal(some[wanted], found[wanted])

    @all_variants(with_pmap=False)
    def test_categorical(self):
        log_probs = some_laws(6, 300)
        keys = jax.random.split(jax.random.key(6), 6)
        found = self.variant(sampling.categorical)(jax.random.clone(keys), log_probs)
        chex.assert_shape(found, (6,))
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(found, jax.jit(sampling.categorical)(keys, log_probs))

    @all_variants(with_pmap=False)
    def test_position_noise(self):
        keys = jax.random.split(jax.random.key(7), 2)
        given = keys, jnp.asarray([[0, 7], [3, 0]], jnp.int32), jnp.asarray([5, 0, 39], jnp.int32)
        found = self.variant(sampling.position_noise)(*given)
        chex.assert_trees_all_close(found, sampling.position_noise(*given), rtol=1e-6)


def test_new_values_do_not_compile_again():
    draw = jax.jit(chex.assert_max_traces(sampling.draw_target, n=1))
    one = jax.jit(chex.assert_max_traces(sampling.categorical, n=1))
    log_probs = some_laws(3, 2, 40)
    for seed, temperature in enumerate((1.0, 0.5, 1e-3)):
        keys = jax.random.split(jax.random.key(seed), 3)
        law = jax.nn.log_softmax(log_probs / temperature, axis=-1)
        draw(keys, jnp.full((3, 2), seed, jnp.int32), law)
        one(keys, law[:, 0])


def law_with_gaps(vocab_size):
    """Natural logs of a law with mass over many magnitudes and a third of it impossible."""
    generator = np.random.default_rng(7)
    weights = generator.exponential(size=vocab_size) ** 3
    weights[generator.permutation(vocab_size)[: vocab_size // 3]] = 0
    weights[0] = weights[-1] = 0
    with np.errstate(divide="ignore"):
        return np.log(weights / weights.sum()).astype(np.float32)


def assert_drawn_from(tokens, log_probs):
    """Chi-square of draws against a law; cells expecting fewer than 5 draws are joined."""
    counts = np.bincount(np.asarray(tokens).reshape(-1), minlength=len(log_probs))
    law = np.exp(log_probs.astype(np.float64))
    assert counts[law == 0].sum() == 0
    expected = law / law.sum() * counts.sum()
    rare = expected < 5
    cells = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    statistic = (((cells - wanted) ** 2)[wanted > 0] / wanted[wanted > 0]).sum()
    assert scipy.stats.chi2.sf(statistic, (wanted > 0).sum() - 1) > 1e-9


def test_categorical_draws_from_its_law():
    log_probs = law_with_gaps(300)

    @jax.jit
    def draw(keys):
        return sampling.categorical(keys, jnp.broadcast_to(log_probs, (keys.shape[0], 300)))

    keys = jax.random.split(jax.random.key(0), (20, 50_000))
    assert_drawn_from([draw(part) for part in keys], log_probs)


def test_categorical_of_a_one_hot_law_is_certain():
    tokens = np.asarray([0, 127, 128, 299])
    one_hot = jnp.log(jax.nn.one_hot(tokens, 300))
    keys = jax.random.split(jax.random.key(1), 4)
    np.testing.assert_array_equal(sampling.categorical(jax.random.clone(keys), one_hot), tokens)
    # And in a batch in which another row is drawn.
    mixed = jnp.asarray(np.concatenate([one_hot[:3], law_with_gaps(300)[None]]))
    np.testing.assert_array_equal(sampling.categorical(keys, mixed)[:3], tokens[:3])


# One block of the vocabulary, and more than two, the last of them in part.
@pytest.mark.parametrize("vocab_size", [12, 300])
def test_draw_target_draws_from_its_law(vocab_size):
    log_probs = law_with_gaps(vocab_size)

    @jax.jit
    def draw(keys):
        position = jnp.broadcast_to(jnp.arange(1000, dtype=jnp.int32), (keys.shape[0], 1000))
        laws_everywhere = jnp.broadcast_to(log_probs, (*position.shape, vocab_size))
        return sampling.draw_target(keys, position, laws_everywhere)

    keys = jax.random.split(jax.random.key(2), (10, 100))
    assert_drawn_from([draw(part) for part in keys], log_probs)


SIZES = (1, 2, 5, 127, 128, 129, 256, 700)


@pytest.mark.parametrize("vocab_size", SIZES)
def test_draw_target_is_the_argmax_of_law_and_noise(vocab_size):
    keys = jax.random.split(jax.random.key(10), 3)
    position = jnp.arange(600, dtype=jnp.int32).reshape(3, 200)
    noise = sampling.position_noise(keys, position, jnp.arange(vocab_size, dtype=jnp.int32))
    for spread in (0.0, 1.0, 6.0):
        shape = (*position.shape, vocab_size)
        law = jax.nn.log_softmax(spread * jax.random.normal(jax.random.key(11), shape), axis=-1)
        found = jax.jit(sampling.draw_target)(keys, position, law)
        np.testing.assert_array_equal(found, jnp.argmax(law + noise, axis=-1))


def test_a_draw_is_the_same_alone_and_beside_laws_of_other_kinds():
    laws = np.array(some_laws(5, 2, 300))
    laws[2] = -np.inf
    laws[3, :, 40:] = -np.inf
    laws[4] = -np.log(300)
    keys = jax.random.split(jax.random.key(12), 5)
    position = jnp.arange(10, dtype=jnp.int32).reshape(5, 2)
    together = sampling.draw_target(keys, position, jnp.asarray(laws))
    np.testing.assert_array_equal(together[1], laws[1].argmax(-1))
    np.testing.assert_array_equal(together[2], -1)
    for row, column in np.ndindex(5, 2):
        here = np.s_[row : row + 1, column : column + 1]
        key = jax.random.clone(keys)[row : row + 1]
        alone = sampling.draw_target(key, position[here], jnp.asarray(laws[here]))
        np.testing.assert_array_equal(alone[0, 0], together[row, column])


@pytest.mark.parametrize("vocab_size", SIZES)
def test_greedy_is_the_first_of_the_best(vocab_size):
    generator = np.random.default_rng(13)
    # Of so few values the best stands in many places, most often in several blocks.
    values = generator.integers(-3, 2, (50, 2, vocab_size)).astype(np.float32)
    values[0] = -np.inf
    found = jax.jit(sampling.greedy)(values)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, np.argmax(values, axis=-1))
    np.testing.assert_array_equal(sampling.greedy(jnp.asarray(values[7, 1])), found[7, 1])


def test_noise_comes_from_the_key_folded_with_the_token():
    """Against `jax.random`, whose Threefry is held to published vectors."""
    keys = jax.random.split(jax.random.key(14), 2)
    position = jnp.asarray([[0, 3], [2**31 - 1, 8]], jnp.int32)
    tokens = jnp.asarray([0, 1, 49151, 2**31 - 1], jnp.int32)
    noise = sampling.position_noise(keys, position, tokens)
    for row, column, place in np.ndindex(noise.shape):
        key = jax.random.clone(keys)[row]
        key = sampling.derive(key, Stream.TARGET, position[row, column])
        word = int(jax.random.key_data(jax.random.fold_in(key, tokens[place]))[1])
        wanted = -np.log(-np.log1p(-(word + 0.5) * 2.0**-32))
        np.testing.assert_allclose(noise[row, column, place], wanted, rtol=1e-5, atol=1e-6)


def test_draw_target_is_the_argmax_of_a_one_hot_law():
    logits = 3 * jax.random.normal(jax.random.key(0), (6, 4, 40))
    nothing = jnp.zeros((6, 3), jnp.int32)
    past = sampling.history(nothing, jnp.full((6,), 3, jnp.int32), trees.chain(3), nothing)
    law = sampling.warp(types.Sampling(temperature=0.0), logits, past)
    position = jnp.zeros(law.shape[:2], jnp.int32)
    drawn = sampling.draw_target(jax.random.split(jax.random.key(3), 6), position, law)
    np.testing.assert_array_equal(drawn, jnp.argmax(logits, axis=-1))


def test_noise_is_gumbel():
    keys = jax.random.split(jax.random.key(4), 20)
    position = jnp.broadcast_to(jnp.arange(100, dtype=jnp.int32), (20, 100))
    noise = sampling.position_noise(keys, position, jnp.arange(100, dtype=jnp.int32))
    chex.assert_shape(noise, (20, 100, 100))
    assert noise.dtype == jnp.float32
    assert np.isfinite(noise).all()
    assert scipy.stats.kstest(np.asarray(noise).reshape(-1), "gumbel_r").pvalue > 1e-6


def test_noise_of_a_token_depends_on_key_position_and_token_alone():
    keys = jax.random.split(jax.random.key(5), 3)
    position = jnp.asarray([[4, 9], [4, 0], [7, 4]], jnp.int32)
    everything = sampling.position_noise(keys, position, jnp.arange(50, dtype=jnp.int32))
    some = jnp.asarray([31, 2, 49], jnp.int32)
    np.testing.assert_array_equal(
        sampling.position_noise(keys, position, some), everything[:, :, np.asarray(some)]
    )
    # Another batch, other neighbours, another place in the call.
    alone = sampling.position_noise(keys[2:], position[2:, 1:], some)
    np.testing.assert_array_equal(alone[0, 0], everything[2, 1, np.asarray(some)])
    assert len(np.unique(everything)) == everything.size


def test_streams_are_distinct_and_repeatable():
    keys = jax.random.split(jax.random.key(6), 4)
    position = jnp.asarray([0, 1, 1, 100_000], jnp.int32)
    derived = {
        stream: jax.random.key_data(sampling.derive(keys, stream, position)) for stream in Stream
    }
    rows = np.concatenate([np.asarray(data) for data in derived.values()])
    assert len(np.unique(rows, axis=0)) == len(Stream) * 4
    for stream, data in derived.items():
        again = jax.random.key_data(sampling.derive(keys, stream, position))
        np.testing.assert_array_equal(data, again)
        one = sampling.derive(jax.random.clone(keys)[3], stream, position[3])
        np.testing.assert_array_equal(jax.random.key_data(one), data[3])
    # Request keys are folded, not consumed: the checker of reused keys lets them be split now.
    jax.random.split(keys[0])


def test_streams_are_uncorrelated():
    keys = jnp.broadcast_to(jax.random.key(8), (20_000,))
    position = jnp.arange(20_000, dtype=jnp.int32)
    draws = np.stack(
        [jax.vmap(jax.random.normal)(sampling.derive(keys, stream, position)) for stream in Stream]
    )
    correlation = np.corrcoef(np.concatenate([draws, draws[:, ::-1]]))
    beside = correlation[~np.eye(len(correlation), dtype=bool)]
    assert np.abs(beside).max() < 5 / np.sqrt(20_000)
