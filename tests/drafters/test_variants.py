"""Both drafters as every kind of program: with and without jit, of arrays on host and device."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest
from absl.testing import parameterized

from specjax import drafters, models, types
from specjax.models import recurrent, transformer

# Untyped in chex.
all_variants: Any = chex.all_variants
_VOCABULARY, _LENGTH, _TEXT = 5, 3, 12
_TABLE = models.tabular_model(models.random_table(jax.random.key(0), _VOCABULARY, 3))
_CONFIG = models.TransformerConfig(
    vocab_size=_VOCABULARY,
    hidden_size=16,
    intermediate_size=24,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_size=8,
    context_length=64,
)
_TRANSFORMER = models.language_model(
    _CONFIG, transformer.init_params(_CONFIG, jax.random.key(1), 2.0)
)
_RECURRENT = models.recurrent_model(recurrent.init_params(jax.random.key(2), _VOCABULARY, 8))
_DRAFTERS = {
    "tabular": drafters.model(_TABLE, _LENGTH, stop_below=0.3),
    "transformer": drafters.model(_TRANSFORMER, _LENGTH),
    "recurrent": drafters.model(_RECURRENT, _LENGTH),
    "greedy": drafters.model(_TABLE, _LENGTH, greedy=True),
    "prompt_lookup": drafters.prompt_lookup(_LENGTH, shortest=1),
}


def problem(drafter, seed):
    """A drafter's state after a prefill of unequal texts, the context and keys; one row rests."""
    keys = jax.random.split(jax.random.key(seed), 5)
    requests = jax.random.split(keys[1], 4)
    length = (jnp.asarray([5, 1, 8, 3], jnp.int32) + seed) % 9 + 1
    active = jnp.arange(4) != seed % 4
    tokens = jax.random.randint(keys[0], (4, _TEXT), 0, _VOCABULARY, jnp.int32)
    settings = types.Sampling(temperature=0.5 + seed)
    context = types.Context(tokens, length, active, settings, _TABLE, None, requests)
    state = drafter.init(drafter.params, 4, _TEXT + _LENGTH + 1)
    state = jax.jit(drafter.prefill)(
        drafter.params, state, tokens, jnp.zeros_like(length), length - 1, output(_TEXT)
    )
    return drafter.params, state, context, requests


def output(count):
    """The target's, at `count` tokens."""
    return types.ModelOutput(jnp.zeros((4, count, _VOCABULARY)), jnp.zeros((4, count, 0, 1)))


def step(drafter, seed):
    """What `update` is given after a step that accepted unequally."""
    params, state, context, keys = problem(drafter, seed)
    draft, state = jax.jit(drafter.propose)(params, state, context, keys)
    count = jnp.minimum(jnp.sum(draft.present, axis=1), (jnp.arange(4) + seed) % (_LENGTH + 1))
    path = jnp.broadcast_to(jnp.arange(1, _LENGTH + 1, dtype=jnp.int32), draft.tokens.shape)
    verdict = types.Verdict(path, count.astype(jnp.int32), jnp.zeros((4,), jnp.int32))
    length = context.length + jnp.where(context.active, verdict.count + 1, 0)
    context = dataclasses.replace(context, length=length)
    return params, state, context, draft, verdict, output(_LENGTH + 1)


class Variants(chex.TestCase):
    @all_variants(with_pmap=False)
    @parameterized.parameters(*_DRAFTERS)
    def test_propose(self, name):
        drafter = _DRAFTERS[name]
        given = problem(drafter, 0)
        found, wanted = self.variant(drafter.propose)(*given), drafter.propose(*given)
        assert jnp.any(wanted[0].present)
        chex.assert_trees_all_close(found, wanted, atol=1e-5)

    @all_variants(with_pmap=False)
    @parameterized.parameters(*_DRAFTERS)
    def test_update(self, name):
        drafter = _DRAFTERS[name]
        given = step(drafter, 0)
        found = self.variant(drafter.update)(*given)
        chex.assert_trees_all_close(found, drafter.update(*given), atol=1e-5)


@pytest.mark.parametrize("name", _DRAFTERS)
def test_new_values_do_not_compile_again(name):
    drafter = _DRAFTERS[name]

    @jax.jit
    @chex.assert_max_traces(n=1)
    def propose(*given):
        return drafter.propose(*given)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def update(*given):
        return drafter.update(*given)

    for seed in range(3):
        propose(*problem(drafter, seed))
        update(*step(drafter, seed))
