"""What compiles, how often, and that everything works under the caller's own transformations."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax
from specjax import decoding, drafters, models, types
from specjax.decoding import generation
from specjax.decoding import start as starts
from tests.cases import exhaustive

VOCAB = 5
CONFIG = models.TransformerConfig(VOCAB, 16, 32, 2, 2, 1, 8, 512)


def target(seed=0):
    return models.language_model(CONFIG, models.init_params(CONFIG, jax.random.key(seed), 2.0))


def draft_model(seed=1):
    return models.tabular_model(models.random_table(jax.random.key(seed), VOCAB, 2))


def programs():
    """How many programs the entry points have compiled."""
    entries: tuple[Any, ...] = (generation._run, starts._start, starts._go_on)
    return tuple(entry._cache_size() for entry in entries)


@pytest.mark.parametrize("rule", ["match", "block"])
def test_values_do_not_recompile(rule):
    def decode(seed, prompt, temperature, top_p, stop_below=0.1, new_tokens=5):
        drafter = drafters.model(draft_model(seed), 3, stop_below=stop_below)
        return specjax.generate(
            target(seed),
            drafter,
            [prompt, [1]],
            rule=rule,
            key=jax.random.key(seed),
            sampling=types.Sampling(temperature=temperature, top_p=top_p),
            max_new_tokens=new_tokens,
        )

    decode(0, [1, 2, 3], 0.7, 0.9)
    before = programs()
    decode(0, [1, 2, 3], 0.7, 0.9)
    decode(1, [3, 2, 3], 0.7, 0.9)
    decode(2, [1] * 14, 1, 1)
    decode(3, [2] * 9, jnp.float32(0.0), np.float64(0.3), stop_below=0.6, new_tokens=17)
    decode(4, [2], [0.1, 0.2], 1.0)
    decode(5, [2], np.asarray([0, 1]), 0.5)
    assert programs() == before


def test_the_loop_is_one_program_whatever_is_asked_of_it():
    """Prompts of any length, an equal rule by name, other ends: only prefill widths may differ."""
    drafter = drafters.prompt_lookup(2)

    def decode(prompt, **options):
        specjax.generate(target(), drafter, [prompt], max_new_tokens=5, capacity=200, **options)

    decode([1] * 3)
    before = programs()[0]
    for length in (15, 40, 100, 180):
        decode([1] * length)
    decode([1] * 3, rule="match")
    decode([1] * 3, eos=(1, 2))
    assert programs()[0] == before
    decode([1] * 3, stop=[[1, 2]])
    decode([1] * 3, stop=[[1, 2, 4], [3]])
    assert programs()[0] == before + 1


def test_streaming_and_generating_share_their_programs():
    drafter = drafters.prompt_lookup(2)
    options = {"max_new_tokens": 9, "eos": ()}
    specjax.generate(target(), drafter, [[1, 2]], **options)
    before = programs()
    list(specjax.stream(target(), drafter, [[1, 2]], **options))
    list(specjax.stream(target(), drafter, [[1, 2]], steps=3, **options))
    assert programs() == before


def test_a_step_is_traced_once():
    drafter = drafters.model(draft_model(), 2)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(model, drafter, request, state):
        return decoding.step(model, drafter, request, state, "block")

    for seed in range(3):
        request, state = decoding.init(
            target(seed),
            drafters.model(draft_model(seed), 2),
            [[1, 2, 3][: seed + 1]],
            key=jax.random.key(seed),
            sampling=types.Sampling(0.5 + seed),
            max_new_tokens=8,
        )
        for _ in range(2):
            state, _ = step(target(seed), drafter, request, state)


def test_generate_under_the_callers_jit():
    model, drafter = target(), drafters.model(draft_model(), 3)
    options = {
        "key": jax.random.key(3),
        "max_new_tokens": 6,
        "sampling": types.Sampling(0.9),
        "rule": "match",
    }

    @jax.jit
    def decode(model, tokens, lengths):
        result = specjax.generate(model, drafter, tokens, lengths=lengths, **options)
        return result.tokens, result.start, result.length

    prompts, lengths = np.asarray([[1, 2, 3], [4, 0, 0]]), np.asarray([3, 1])
    outside = specjax.generate(model, drafter, prompts, lengths=lengths, **options)
    tokens, start, length = decode(model, prompts, lengths)
    inside = [tokens[row, start[row] : length[row]].tolist() for row in range(len(prompts))]
    assert inside == outside.new_tokens


def test_generate_under_vmap_over_weights():
    """Four targets at once, each with the text it writes alone."""
    tables = jax.vmap(lambda key: models.random_table(key, VOCAB, 2, 2.0))(
        jax.random.split(jax.random.key(0), 4)
    )
    drafter = drafters.prompt_lookup(2, shortest=1)

    def decode(table):
        result = specjax.generate(
            models.tabular_model(table), drafter, [[1, 2]], max_new_tokens=7, eos=()
        )
        return result.tokens[0, 2:9]

    # Under vmap a branch becomes a selection of its operands, which the checker takes for a use.
    with jax.debug_key_reuse(False):
        together = jax.jit(jax.vmap(decode))(tables)
    alone = jnp.stack([decode(table) for table in tables])
    np.testing.assert_array_equal(together, alone)


def test_results_survive_going_on():
    """The state is consumed; what the caller holds of result and input is not."""
    keys = jax.random.split(jax.random.key(0), 2)
    bias = jnp.zeros((VOCAB,))
    options = {"keys": keys, "sampling": types.Sampling(0.5, logit_bias=bias), "eos": ()}
    model = target()
    result = specjax.autoregressive(model, [[1], [2, 3]], max_new_tokens=4, **options)
    again = specjax.autoregressive(
        model, [[], [1]], state=result.state, max_new_tokens=3, **options
    )
    assert [len(answer) for answer in result.new_tokens] == [4, 4]
    assert [len(answer) for answer in again.new_tokens] == [3, 3]
    assert not any(array.is_deleted() for array in (keys, bias))
    assert result.state.tokens.is_deleted()


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_prefill_in_any_chunks(chunk):
    prompts = [[1, 2, 3, 4, 0, 1, 2, 2, 1], [4], [3, 2, 1, 0]]
    drafter = drafters.model(target(2), 3)
    options = {"max_new_tokens": 8, "eos": (), "sampling": types.Sampling(0.7)}
    result = specjax.generate(target(), drafter, prompts, rule="block", chunk=chunk, **options)
    whole = specjax.generate(target(), drafter, prompts, rule="block", **options)
    assert result.new_tokens == whole.new_tokens
    assert result.statistics.tau == whole.statistics.tau


@pytest.mark.parametrize("capacity", [130, exhaustive(165), 294, exhaustive(300)])
def test_the_last_chunk_of_a_prefill_stays_within_the_caches(capacity):
    """A chunk written past the end would clamp, silently, onto entries before it."""
    prompt = np.random.default_rng(capacity).integers(0, VOCAB, capacity - 4).tolist()
    drafter = drafters.model(target(2), 3)
    options = {"max_new_tokens": 4, "eos": (), "sampling": types.Sampling(0.7), "rule": "block"}
    tight = specjax.generate(target(), drafter, [prompt, [1]], capacity=capacity, **options)
    roomy = specjax.generate(target(), drafter, [prompt, [1]], capacity=512, **options)
    assert tight.new_tokens == roomy.new_tokens
    for ours, theirs in zip(tight.state.cache.keys, roomy.state.cache.keys, strict=True):
        held = int(tight.state.cache.length[0])
        np.testing.assert_allclose(ours[0, :, :held], theirs[0, :, :held], atol=1e-3)
