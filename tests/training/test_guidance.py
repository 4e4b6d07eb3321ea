"""Guidance: which places copying needs, and that heads learn to look at them."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specjax import models
from specjax.models import policy as policies
from specjax.training import core, guidance

CONFIG = models.TransformerConfig(
    vocab_size=16,
    hidden_size=32,
    intermediate_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=16,
    context_length=64,
)
POLICY = policies.Policy()


def off(params, tokens, length, config=CONFIG):
    model = models.language_model(config, params, POLICY)
    cache = model.init_cache(tokens.shape[0], 1)
    output, (keys, _) = model.apply(params, tokens, cache, None, (0, 1))
    inputs = (output.features[:, :, 0], output.features[:, :, 1])
    return guidance.loss(config, params["layers"], inputs, keys[:2], tokens, length, POLICY)


def repeats(seed, rows=8, half=12):
    drawn = np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (rows, half))
    return jnp.asarray(np.concatenate([drawn, drawn], axis=1), jnp.int32)


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=12))
def test_sources_are_what_followed_the_same_token_and_is_the_next(text):
    found = np.asarray(guidance.copied_from(jnp.asarray([text], jnp.int32)))[0]
    for t in range(len(text)):
        for j in range(len(text)):
            holds = (
                1 <= j <= t
                and t + 1 < len(text)
                and text[j - 1] == text[t]
                and text[j] == text[t + 1]
            )
            assert found[t, j] == holds, (t, j)


def test_the_sum_is_that_of_the_heads_one_by_one():
    """From attention weights that another program makes, with sources found by loops."""
    params = models.init_params(CONFIG, jax.random.key(0), 2.0)
    tokens = repeats(0, rows=2)
    length = jnp.asarray([24, 17], jnp.int32)
    got = np.asarray(off(params, tokens, length))
    weights = attention_weights(params, tokens)
    text = np.asarray(tokens)
    want = np.zeros(text.shape)
    for row in range(2):
        for t in range(int(length[row])):
            for head in range(2):
                if t > head:
                    mass = weights[0][row, head, t, t - 1 - head]
                    want[row, t] += max(np.log(0.6) - np.log(mass), 0) / 2
            places = [
                j
                for j in range(1, t + 1)
                if t + 1 < length[row]
                and text[row, j - 1] == text[row, t]
                and text[row, j] == text[row, t + 1]
            ]
            for head in range(2):
                if places:
                    mass = weights[1][row, head, t, places].sum()
                    want[row, t] += max(np.log(0.6) - np.log(mass), 0) / 2
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def attention_weights(params, tokens):
    """Both layers' attention, with rotations written out as complex numbers."""
    size, half = tokens.shape[1], CONFIG.head_size // 2
    model = models.language_model(CONFIG, params, POLICY)
    cache = model.init_cache(tokens.shape[0], 1)
    output, _ = model.apply(params, tokens, cache, None, (0, 1))
    turn = np.exp(
        1j * np.arange(size)[:, None] * CONFIG.rotary_base ** (-np.arange(half) / half)[None]
    )

    def heads(hidden, kernel):
        made = (hidden @ np.asarray(kernel, float).T).reshape(*hidden.shape[:2], -1, 2, half)
        return (made[..., 0, :] + 1j * made[..., 1, :]) * turn[None, :, None]

    found = []
    for index in range(2):
        layer = params["layers"][index]
        hidden = np.asarray(output.features[:, :, index], float)
        hidden = hidden / np.sqrt(np.mean(hidden**2, axis=-1, keepdims=True) + CONFIG.norm_epsilon)
        query = heads(hidden, layer["attention"]["query"]["kernel"])
        key = np.repeat(heads(hidden, layer["attention"]["key"]["kernel"]), 2, axis=2)
        scores = np.einsum("bqhd,bkhd->bhqk", query, key.conj()).real * CONFIG.head_size**-0.5
        scores = np.where(np.tril(np.ones((size, size), bool)), scores, -np.inf)
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        found.append(scores / scores.sum(axis=-1, keepdims=True))
    return found


def test_guided_heads_find_what_text_was_copied_from():
    def total(params, frozen, tokens, key):
        del frozen, key
        length = jnp.full((tokens.shape[0],), tokens.shape[1], jnp.int32)
        told = off(params, tokens, length)
        return jnp.sum(told), jnp.float32(told.size), {}

    state = core.init(models.init_params(CONFIG, jax.random.key(0)), core.MUON)
    schedule = core.Schedule(150, 2e-2, warmup=10)
    objective = jax.tree_util.Partial(total)
    for number in range(schedule.steps):
        state, _ = core.step(
            state,
            (),
            repeats(number),
            jax.random.key(0),
            schedule.at(number),
            objective,
            optimizer=core.MUON,
        )
    tokens = repeats(10**6)
    weights = attention_weights(state.params, tokens)
    sources = np.asarray(guidance.copied_from(tokens))
    second = np.arange(12, 23)
    mass = np.where(sources[:, None], weights[1][:, :2], 0)[:, :, second].sum(axis=-1)
    assert mass.mean() > 0.5
    before = weights[0][:, 0, second, second - 1]
    assert before.mean() > 0.5


def test_text_that_repeats_nothing_and_what_lies_behind_it_change_nothing():
    params = models.init_params(CONFIG, jax.random.key(1), 2.0)
    text = jnp.asarray([[3, 1, 2, 0, 5, 6, 7, 8]], jnp.int32)
    length = jnp.asarray([5], jnp.int32)
    other = text.at[0, 5:].set(jnp.asarray([1, 2, 0], jnp.int32))

    def value(params, tokens):
        return jnp.sum(off(params, tokens, length))

    made = [jax.value_and_grad(value)(params, tokens) for tokens in (text, other)]
    chex.assert_trees_all_equal(*made)
    chex.assert_tree_all_finite(made[0])


def test_a_draft_of_one_layer_is_refused():
    config = dataclasses.replace(CONFIG, num_layers=1)
    params = models.init_params(config, jax.random.key(0))
    hidden = jnp.zeros((1, 4, 32))
    keys = jnp.zeros((1, 4, 2, 16))
    length = jnp.asarray([4], jnp.int32)
    with pytest.raises(ValueError, match="two layers"):
        guidance.loss(
            config,
            params["layers"],
            (hidden, hidden),
            (keys, keys),
            jnp.zeros((1, 4), jnp.int32),
            length,
            POLICY,
        )
