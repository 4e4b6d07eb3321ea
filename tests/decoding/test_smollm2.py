"""The real model: one key, one text, whatever drafts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax
from specjax import checkpoints, drafters, models, types
from specjax.models import policy

pytestmark = pytest.mark.optimised

PROMPTS = (
    "Repeat exactly: red green blue red green blue red green",
    "What is the capital of France?",
)


@pytest.fixture(scope="module")
def prompts(smollm2):
    return [smollm2.chat(text) for text in PROMPTS]


@pytest.mark.skipif(not policy.for_backend().native, reason="passes by XLA round as they like")
def test_logits_are_the_same_to_the_last_bit_in_passes_of_any_width(smollm2, prompts):
    model, text = smollm2.target, prompts[0]
    apply = jax.jit(model.apply)

    def logits(width):
        cache, found = model.init_cache(1, 64), []
        for first in range(0, len(text), width):
            tokens = jnp.asarray([text[first : first + width]], jnp.int32)
            output, entries = apply(model.params, tokens, cache, None)
            count = jnp.full((1,), tokens.shape[1], jnp.int32)
            cache = model.commit(model.append(cache, entries), None, count)
            found.append(np.asarray(output.logits[0]))
        return np.concatenate(found)

    alone = logits(1)
    for width in (2, 9, 16, len(text)):
        np.testing.assert_array_equal(logits(width), alone)


@pytest.mark.parametrize(
    "temperature, chosen",
    [(0.0, None), (0.7, None), (1.3, None), (0.7, policy.Policy(vector_parts=2))],
)
def test_match_writes_the_text_of_plain_decoding(smollm2, prompts, temperature, chosen):
    target = smollm2.target
    if chosen is not None:
        laid_out = models.language_model(smollm2.config, target.params, chosen)
        target = dataclasses.replace(target, apply=laid_out.apply, resume=laid_out.resume)
    options = {
        "key": jax.random.key(3),
        "max_new_tokens": [28, 14],
        "sampling": types.Sampling(temperature),
    }
    plain = specjax.autoregressive(target, prompts, **options)
    draft = checkpoints.layer_truncated(smollm2, 8)
    for drafter in (drafters.prompt_lookup(6), drafters.model(draft, 3)):
        result = specjax.generate(target, drafter, prompts, rule="match", **options)
        assert result.new_tokens == plain.new_tokens
        assert result.statistics.tau >= 1


def test_a_prompt_alone_and_in_another_slot(smollm2, prompts):
    keys = jax.random.split(jax.random.key(1), 2)
    shared = {"max_new_tokens": 12, "sampling": types.Sampling(0.8, top_p=0.9)}

    def texts(order):
        result = specjax.generate(
            smollm2.target,
            drafters.prompt_lookup(6),
            [prompts[row] for row in order],
            keys=keys[jnp.asarray(order)],
            **shared,
        )
        return dict(zip(order, result.new_tokens, strict=True))

    together = texts([0, 1])
    assert texts([1, 0]) == together
    assert texts([1]) == {1: together[1]}


def test_a_model_that_drafts_for_itself_is_always_right(smollm2, prompts):
    """Full acceptance at every step: a draft cache that kept or lost an entry would show in τ."""
    drafter = drafters.model(smollm2.target, 4)
    result = specjax.generate(
        smollm2.target, drafter, prompts[1:], rule="block", max_new_tokens=10, eos=()
    )
    assert result.statistics.tau == 5.0
