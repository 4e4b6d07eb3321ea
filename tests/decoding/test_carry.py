"""The carry stays where it is, copied by no step, and is that of plain decoding to the bit."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax
from specjax import decoding, drafters, models, types
from specjax.decoding import generation, start
from specjax.decoding import state as states
from specjax.models import policy
from tests.cases import exhaustive
from tests.decoding import test_identity as identity

pytestmark = pytest.mark.optimised

CONFIG = models.TransformerConfig(50, 16, 32, 3, 4, 2, 8, 1024)
PARAMS = models.init_params(CONFIG, jax.random.key(0))
POLICIES = {"xla": policy.Policy(vector_parts=2), "backend's": policy.for_backend()}
TARGETS = {name: models.language_model(CONFIG, PARAMS, given) for name, given in POLICIES.items()}
DRAFTERS = {
    "plain": lambda target: (decoding.NOTHING, "match"),
    "prompt_lookup": lambda target: (drafters.prompt_lookup(8), "match"),
    "model": lambda target: (drafters.model(target, 4), "block"),
}
SLOTS = re.compile(r"f32\[\d+,2,(\d+),8\]")


def copies(program, least):
    """Instructions that copy a buffer of keys or values with at least so many slots."""
    found = []
    for line in program.splitlines():
        made, _, operation = line.strip().partition(" = ")[2].partition(" ")
        shape = SLOTS.match(made)
        if shape and int(shape[1]) >= least and operation.startswith("copy"):
            found.append(line.strip())
    return found


def loop(target, drafter, rule, batch):
    options = {"max_new_tokens": 20, "capacity": 256, "sampling": types.Sampling(0.7)}
    request, state = decoding.init(target, drafter, [[1, 2, 3]] * batch, **options)
    statistics = states.no_statistics(batch, drafter.nodes, drafter.nodes)
    rule = decoding.rule_for(target, drafter, rule)
    steps = jnp.int32(9)
    lowered = generation._run.lower(target, drafter, request, state, statistics, steps, rule)
    return str(lowered.compile().as_text())


@pytest.mark.parametrize("batch", [1, exhaustive(3), 16])
@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("chosen", TARGETS)
def test_no_step_copies_a_cache(chosen, name, batch):
    target = TARGETS[chosen]
    drafter, rule = DRAFTERS[name](target)
    program = loop(target, drafter, rule, batch)
    assert SLOTS.search(program), "the caches are not where this test looks for them"
    assert copies(program, 256) == []


@pytest.mark.parametrize("chosen", TARGETS)
def test_prefill_computes_no_logits(chosen):
    """Nothing asks for them, so nothing in the program has the vocabulary's width but weights."""
    target = TARGETS[chosen]
    text, counts = jnp.zeros((1, 32), jnp.int32), jnp.ones((1,), jnp.int32)
    arguments = (target, drafters.prompt_lookup(8), text, counts, counts)
    lowered = start._start.lower(*arguments, room=32, chunk=16)
    program = str(lowered.compile().as_text())
    assert "f32[50,16]" in program, "the head is not where this test looks for it"
    assert not re.search(r"f32\[(1,)?16,50\]", program)
    one_pass = jax.jit(target.apply).lower(target.params, text[:, :16], target.init_cache(1, 48))
    assert re.search(r"f32\[(1,)?16,50\]", str(one_pass.compile().as_text()))


def test_the_test_sees_a_cache_that_is_copied():
    def swap(flag, cache):
        return jax.lax.cond(flag, lambda: cache + 1, lambda: cache)

    cache = jnp.zeros((1, 2, 256, 8))
    program = jax.jit(swap).lower(True, cache).compile().as_text()
    assert copies(program, 256)


@pytest.mark.skipif(not policy.for_backend().native, reason="passes by XLA round as they like")
def test_the_caches_are_those_of_plain_decoding_to_the_last_bit():
    """After steps of any width, over trees too: what an entry was made beside does not show."""
    target, options = identity.make("transformer"), identity.options(0.0, eos=())
    plain = specjax.autoregressive(target, identity.PROMPTS, **options).state.cache
    drafter = identity.make_drafters("transformer")
    for name in ("greedy, stopping", "dynamic tree"):
        made = specjax.generate(target, drafter[name], identity.PROMPTS, **options).state.cache
        np.testing.assert_array_equal(made.length, plain.length)
        for left, right in zip(
            (*made.keys, *made.values), (*plain.keys, *plain.values), strict=True
        ):
            for row, length in enumerate(np.asarray(plain.length)):
                np.testing.assert_array_equal(left[row, :, :length], right[row, :, :length], name)
