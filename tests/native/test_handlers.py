"""Every handler against its function in JAX, of any shape; and transformed as that one is."""

from concurrent import futures

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from experiments import compilation
from specjax import native
from specjax.models import attention, norm, products
from specjax.models import policy as policies
from specjax.native import build

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="no C++ compiler"),
    pytest.mark.optimised,
]

NATIVE, XLA, ROUNDED = (
    policies.Policy(native=True),
    policies.Policy(),
    policies.Policy(rounded=True),
)

rounding = pytest.mark.skipif(
    not native.multiplies_bfloat16(), reason="the CPU does not multiply bfloat16"
)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("inputs", [1, 15, 16, 33, 576, 1536])
@pytest.mark.parametrize("tokens", [*range(1, 11), 18, 19, 28, 64])
def test_products(tokens, inputs):
    hidden = normal(0, 1, tokens, inputs)
    kernels = [normal(1, outputs, inputs) for outputs in (1, 7, 24, 100)]
    made = products.products(hidden, kernels, NATIVE)
    for product, kernel in zip(made, kernels, strict=True):
        exact = np.asarray(hidden[0], np.float64) @ np.asarray(kernel, np.float64).T
        np.testing.assert_allclose(product[0], exact, atol=2e-6 * inputs**0.5 + 1e-6)


def rounded(array):
    return np.asarray(array.astype(jnp.bfloat16), np.float64)


@rounding
@pytest.mark.parametrize(
    "tokens, inputs, outputs",
    [
        (1, 1, 1),
        (5, 7, 3),
        (32, 32, 32),
        (33, 65, 47),
        (31, 1025, 50),
        (300, 2100, 70),
        (3, 40, 4130),
        (0, 3, 5),
    ],
)
def test_rounded_products(tokens, inputs, outputs):
    """Forward, and both gradients, of which one is summed over tokens."""
    rows, kernel = normal(0, tokens, inputs), normal(1, outputs, inputs)
    change = normal(2, tokens, outputs)

    def times(rows, kernel):
        return products.products(rows[None], [kernel], ROUNDED)[0][0]

    made, back = jax.vjp(times, rows, kernel)
    np.testing.assert_allclose(made, rounded(rows) @ rounded(kernel).T, atol=1e-3, rtol=1e-5)
    of_rows, of_kernel = back(change)
    np.testing.assert_allclose(of_rows, rounded(change) @ rounded(kernel), atol=1e-3, rtol=1e-5)
    np.testing.assert_allclose(of_kernel, rounded(change).T @ rounded(rows), atol=1e-3, rtol=1e-5)


@rounding
def test_rounded_products_do_not_hide_what_is_not_finite():
    rows = normal(0, 40, 40).at[3, 39].set(jnp.nan).at[35, 0].set(jnp.inf)
    made = products.products(rows[None], [jnp.ones((33, 40))], ROUNDED)[0][0]
    finite = np.isfinite(made)
    assert not finite[[3, 35]].any() and finite.sum() == 38 * 33


@pytest.mark.parametrize("size", [1, 16, 45, 576])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_rms_norm(size, scale):
    hidden, factors = scale * normal(0, 2, 3, size), normal(1, size)
    wide = np.asarray(hidden, np.float64)
    exact = wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + 1e-5) * np.asarray(factors)
    np.testing.assert_allclose(
        norm.rms_norm(hidden, factors, 1e-5, NATIVE), exact, rtol=2e-6, atol=1e-7
    )


@hypothesis.given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 12),
    shared=st.integers(1, 3),
    groups=st.integers(1, 11),
    size=st.sampled_from([2, 16, 22, 64, 80]),
    slots=st.integers(1, 50),
    sharpness=st.sampled_from([0.0, 1.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_attention(batch, tokens, shared, groups, size, slots, sharpness, seed):
    chance = np.random.default_rng(seed)
    filled = int(chance.integers(0, slots + 1))
    query = sharpness * normal(seed, batch, tokens, shared * groups, size)
    keys, values = (normal(seed + n, batch, tokens, shared, size) for n in (1, 2))
    old_keys, old_values = (normal(seed + n, batch, shared, slots, size) for n in (3, 4))
    old_rows, new_rows = chance.choice([1, tokens]), chance.choice([1, batch])
    masks = (
        chance.random((batch, old_rows, slots)) < 0.7,
        (chance.random((new_rows, tokens, tokens)) < 0.5) | np.eye(tokens, dtype=bool),
    )
    masks[0][:, :, filled:] = False
    operands = (
        query,
        (keys, values),
        (old_keys, old_values),
        jax.tree.map(jnp.asarray, masks),
        jnp.int32(filled),
    )
    made, expected = (attention.attend(*operands, policy) for policy in (NATIVE, XLA))
    # Scores are rounded at their own size, and weights change by as much.
    np.testing.assert_allclose(made, expected, rtol=1e-5, atol=2e-6 * (1 + sharpness))


def test_attention_weighs_nothing_beyond_the_reach_of_floats():
    """A score 200 below the largest weighs 0, and one of −inf too."""
    query = jnp.ones((1, 1, 1, 2))
    keys = jnp.asarray([[[[0.0, 0.0], [-100.0, -100.0], [-jnp.inf, 0.0]]]])
    values = jnp.asarray([[[[1.0, 0.0], [jnp.finfo(jnp.float32).max] * 2, [5.0, 5.0]]]])
    masks = (jnp.ones((1, 1, 3), bool), jnp.ones((1, 1, 1), bool))
    new = (jnp.zeros((1, 1, 1, 2)), jnp.asarray([[[[3.0, 0.0]]]]))
    made = attention.attend(query, new, (keys, values), masks, jnp.int32(3), NATIVE)
    np.testing.assert_allclose(made[0, 0, 0], [2.0, 0.0], rtol=1e-6)


@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_attention_does_not_hide_what_is_not_finite(where, poison):
    query, keys, values = (np.ones((1, 1, 1, 2)), np.ones((1, 1, 20, 2)), np.ones((1, 1, 20, 2)))
    {"query": query, "key": keys, "value": values}[where][..., -1, :] = poison
    masks = (jnp.ones((1, 1, 20), bool), jnp.ones((1, 1, 1), bool))
    old = (jnp.asarray(keys, jnp.float32), jnp.asarray(values, jnp.float32))
    new = (jnp.ones((1, 1, 1, 2)), jnp.ones((1, 1, 1, 2)))
    asked = jnp.asarray(query, jnp.float32)
    made, expected = (
        attention.attend(asked, new, old, masks, jnp.int32(20), policy) for policy in (NATIVE, XLA)
    )
    assert not np.any(np.isfinite(expected))
    np.testing.assert_array_equal(made, expected)


@rounding
def test_rounded_products_within_vmap_and_scan():
    kernel, many = normal(1, 5, 6), normal(3, 3, 2, 4, 6)

    def loss(kernel, hidden):
        return jnp.sum(jnp.sin(products.products(hidden, [kernel], ROUNDED)[0]))

    one_by_one = [jax.grad(loss)(kernel, hidden) for hidden in many]
    np.testing.assert_allclose(
        jax.vmap(jax.grad(loss), (None, 0))(kernel, many), one_by_one, rtol=1e-5, atol=1e-5
    )
    scanned = jax.lax.scan(lambda c, hidden: (c, jax.grad(loss)(kernel, hidden)), 0.0, many)[1]
    np.testing.assert_allclose(scanned, one_by_one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap rows", "vmap kernels", "vmap grad"])
def test_transformations_are_those_of_jax(transform):
    hidden, kernel = normal(0, 2, 4, 6), normal(1, 5, 6)

    def loss(hidden, kernel, policy):
        (product,) = products.products(hidden, [kernel], policy)
        scaled = norm.rms_norm(product, jnp.full((5,), 2.0), 1e-5, policy)
        heads = scaled[:, :, None]
        masks = (jnp.ones((2, 1, 3), bool), jnp.tril(jnp.ones((1, 4, 4), bool)))
        old = (jnp.ones((2, 1, 3, 5)), normal(2, 2, 1, 3, 5))
        mixed = attention.attend(heads, (heads, heads), old, masks, jnp.int32(3), policy)
        return jnp.sum(jnp.sin(mixed))

    def run(policy):
        def of(hidden, kernel):
            return loss(hidden, kernel, policy)

        many, kernels = normal(3, 3, 2, 4, 6), normal(4, 3, 5, 6)
        match transform:
            case "grad":
                return jax.grad(of, (0, 1))(hidden, kernel)
            case "jvp":
                return jax.jvp(of, (hidden, kernel), (hidden, kernel))
            case "vmap rows":
                return jax.vmap(of, (0, None))(many, kernel)
            case "vmap kernels":
                return jax.vmap(of, (None, 0))(hidden, kernels)
            case _:
                return jax.vmap(jax.grad(of, 1), (0, None))(many, kernel)

    for made, expected in zip(*map(jax.tree.leaves, (run(NATIVE), run(XLA))), strict=True):
        np.testing.assert_allclose(made, expected, rtol=2e-5, atol=2e-5)


def test_a_call_outside_a_program_is_compiled_once():
    hidden, kernel = normal(0, 1, 2, 6), normal(1, 5, 6)
    scale = jnp.ones((6,))

    def call():
        products.products(hidden, [kernel], NATIVE)
        norm.rms_norm(hidden, scale, 1e-5, NATIVE)

    call()
    with compilation.CompilationClock() as clock:
        call()
    assert clock.programs == 0


def test_other_dtypes_go_by_xla():
    hidden, kernel = normal(0, 1, 2, 6).astype(jnp.bfloat16), normal(1, 5, 6).astype(jnp.bfloat16)
    made = products.products(hidden, [kernel], NATIVE)[0]
    np.testing.assert_array_equal(made, products.products(hidden, [kernel], XLA)[0])


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_programs_for_other_platforms_hold_no_handler(platform):
    """As when a program is compiled ahead of time on a machine without the device."""
    traced = jax.jit(lambda *factors: products.products(factors[0], factors[1:], NATIVE)).trace(
        normal(0, 1, 2, 6), normal(1, 5, 6)
    )
    assert "specjax_products" in traced.lower().as_text()
    assert "specjax_products" not in traced.lower(lowering_platforms=(platform,)).as_text()


def test_products_refuses_results_that_no_kernel_makes():
    two = [jax.ShapeDtypeStruct((2, 5), jnp.float32)] * 2
    with pytest.raises(Exception, match="not one result a kernel"):
        made = jax.ffi.ffi_call(build.target("products"), two)(normal(0, 2, 6), normal(1, 5, 6))
        jax.block_until_ready(made)


def test_a_batch_of_nothing():
    (made,) = products.products(jnp.ones((0, 3, 6)), [normal(1, 5, 6)], NATIVE)
    assert made.shape == (0, 3, 5)


@pytest.mark.parametrize(
    "handler, sizes",
    [
        ("products", [(2, 6), (5, 7)]),
        ("rms_norm", [(2, 6), (5,), ()]),
    ],
)
def test_a_handler_refuses_sizes_that_do_not_agree(handler, sizes):
    operands = [jnp.ones(size) for size in sizes]
    result = jax.ShapeDtypeStruct((2, sizes[1][0] if handler == "products" else 6), jnp.float32)
    call = jax.ffi.ffi_call(build.target(handler), (result,))
    with pytest.raises(Exception, match="sizes do not agree"):
        jax.block_until_ready(call(*operands))


@rounding
@pytest.mark.parametrize("handler", ["times_transposed", "times", "transposed_times"])
@pytest.mark.parametrize("sizes", [((4, 5), (6, 7), (4, 6)), ((5, 5), (5, 5), (5, 6))])
def test_rounded_products_refuse_sizes_that_do_not_agree(handler, sizes):
    left, right, out = sizes
    call = jax.ffi.ffi_call(build.target(handler), jax.ShapeDtypeStruct(out, jnp.float32))
    with pytest.raises(Exception, match="sizes do not agree"):
        jax.block_until_ready(call(jnp.ones(left), jnp.ones(right)))


@pytest.mark.parametrize("wrong", range(8))
def test_attention_refuses_sizes_that_do_not_agree(wrong):
    sizes = [(2, 3, 4, 8), (2, 3, 2, 8), (2, 3, 2, 8), (2, 2, 5, 8), (2, 2, 5, 8)]
    sizes += [(2, 3, 5), (1, 3, 3), (2, 3, 4, 8)]
    right = list(sizes)
    sizes[wrong] = (*sizes[wrong][:-1], sizes[wrong][-1] + 1)
    dtypes = [jnp.float32] * 5 + [bool] * 2

    def call(sizes):
        operands = [jnp.ones(size, dtype) for size, dtype in zip(sizes, dtypes, strict=False)]
        result = jax.ShapeDtypeStruct(sizes[-1], jnp.float32)
        name = build.target("attend")
        return jax.block_until_ready(jax.ffi.ffi_call(name, result)(*operands, jnp.int32(5)))

    call(right)
    with pytest.raises(Exception, match="sizes do not agree"):
        call(sizes)


def test_callers_that_share_the_threads_wait_for_each_other_only():
    """Many calls that hang on nothing of each other, in one program and from several threads."""
    hidden, kernels = normal(0, 1, 3, 64), [normal(n, 96, 64) for n in range(24)]

    @jax.jit
    def many(hidden):
        return [products.products(hidden, [kernel], NATIVE)[0] for kernel in kernels]

    expected = jax.device_get(many(hidden))
    with futures.ThreadPoolExecutor(4) as threads:
        started = list(threads.map(lambda _: many(hidden), range(50)))
    for made in started:
        for product, kept in zip(made, expected, strict=True):
            np.testing.assert_array_equal(product, kept)
