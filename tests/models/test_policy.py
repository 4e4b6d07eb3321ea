"""Policies change the program of a pass, never its result; and the backend chooses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import models, native, trees
from specjax.models import attention, policy, transformer

CONFIG = models.TransformerConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_size=8,
    context_length=64,
    qkv_bias=True,
)
PLAIN = policy.Policy(vector_parts=1, shortest_prefix=1024)
POLICIES = {
    "native": policy.Policy(native=True),
    "parts": policy.Policy(vector_parts=4, shortest_prefix=1024),
    "prefixes": policy.Policy(vector_parts=1, shortest_prefix=4),
    "indivisible": policy.Policy(vector_parts=7, shortest_prefix=5),
}
TREE = trees.from_parents([0, 0, 1, 1, 2])


@pytest.fixture(scope="module")
def params():
    return transformer.init_params(CONFIG, jax.random.key(0), scale=2.0)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                chosen.native and not native.available(), reason="no C++ compiler"
            ),
        )
        for name, chosen in POLICIES.items()
    ],
)
@pytest.mark.parametrize("fill", [0, 3, 4, 5, 9, 31])
@pytest.mark.parametrize("kind", ["token", "chain", "tree", "batch"])
def test_the_pass_is_the_same(params, name, fill, kind):
    batch = 3 if kind == "batch" else 1
    count = {"token": 1, "chain": 5, "tree": 6, "batch": 1}[kind]
    tree = TREE if kind == "tree" else None
    chance = np.random.default_rng(fill)
    tokens = jnp.asarray(chance.integers(0, CONFIG.vocab_size, (batch, count)), jnp.int32)
    old = jnp.asarray(chance.normal(size=(batch, 2, 40, 8)), jnp.float32)

    def run(chosen):
        model = models.language_model(CONFIG, params, chosen)
        cache = model.init_cache(batch, 40)
        # Rows of different lengths: the longest one decides how far a pass reads.
        length = jnp.maximum(fill - jnp.arange(batch, dtype=jnp.int32), 0)
        cache = dataclasses.replace(cache, keys=(old, old), values=(old, old), length=length)
        return jax.jit(model.apply)(params, tokens, cache, tree)

    for left, right in zip(*map(jax.tree.leaves, (run(POLICIES[name]), run(PLAIN))), strict=True):
        np.testing.assert_allclose(left, right, atol=2e-5)


@pytest.mark.parametrize("by", ["xla", "native"])
def test_what_lies_beyond_the_fill_is_not_read(params, by):
    if by == "native" and not native.available():
        pytest.skip("no C++ compiler")
    chosen = policy.Policy(native=by == "native", shortest_prefix=8)
    model = models.language_model(CONFIG, params, chosen)
    cache = model.init_cache(1, 32)
    length = jnp.full((1,), 7, jnp.int32)
    poison = tuple(leaf.at[:, :, 8:].set(jnp.nan) for leaf in cache.keys)
    cache = dataclasses.replace(cache, keys=poison, values=poison, length=length)
    output, _ = jax.jit(model.apply)(params, jnp.ones((1, 2), jnp.int32), cache, None)
    assert jnp.all(jnp.isfinite(output.logits))


@pytest.mark.parametrize(
    "capacity, shortest, lengths",
    [
        (288, 128, (128, 288)),
        (128, 128, (128,)),
        (100, 128, (100,)),
        (2048, 128, (128, 256, 512, 1024, 2048)),
        (2080, 128, (128, 256, 512, 1024, 2080)),
        (3, 1, (1, 2, 3)),
    ],
)
def test_prefixes(capacity, shortest, lengths):
    assert attention.prefixes(capacity, shortest) == lengths


def test_the_backend_chooses(monkeypatch):
    monkeypatch.setattr(policy.os, "cpu_count", lambda: 6)
    assert policy.for_backend("cpu").vector_parts == 8
    assert policy.for_backend("tpu").vector_parts == 1
    assert policy.for_backend() == policy.for_backend(jax.default_backend())


def test_native_kernels_are_for_one_cpu_device(monkeypatch):
    monkeypatch.setattr(policy.native, "available", lambda: True)
    assert policy.for_backend("cpu").native
    assert not policy.for_backend("tpu").native
    monkeypatch.setattr(policy.jax, "device_count", lambda: 8)
    assert not policy.for_backend("cpu").native


def test_the_choice_can_be_overridden(params):
    """The program of one token holds products in parts, or not, as it was told."""

    def program(chosen):
        model = models.language_model(CONFIG, params, chosen)
        cache = model.init_cache(1, 16)
        lowered = jax.jit(model.apply).lower(params, jnp.ones((1, 1), jnp.int32), cache, None)
        return lowered.as_text()

    assert "tensor<4x6x16xf32>" in program(POLICIES["parts"])
    # More parts than divide the 24 rows: as many as do.
    assert "tensor<8x3x16xf32>" in program(policy.Policy(vector_parts=64))
    assert "tensor<4x6x16xf32>" not in program(PLAIN)
    if native.available():
        assert "specjax_products" in program(POLICIES["native"])
        assert "specjax_products" not in program(PLAIN)


def test_a_value_below_one_is_refused():
    with pytest.raises(ValueError, match="vector_parts=0"):
        policy.Policy(vector_parts=0)
