"""Losses against closed forms, finite differences and the rule that decodes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import analysis, trees
from specjax.training import losses

LOSSES = {**losses.LOSSES, "jensen_shannon(0.1)": losses.JensenShannon(0.1)}


def laws(seed, shape=(3, 5)):
    keys = jax.random.split(jax.random.key(seed), 2)
    return [jax.nn.log_softmax(2 * jax.random.normal(key, shape, jnp.float64)) for key in keys]


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


def test_closed_forms():
    log_p, log_q = jnp.log(jnp.asarray([0.5, 0.25, 0.25])), jnp.log(jnp.asarray([0.25, 0.25, 0.5]))
    ln2 = np.log(2)
    assert losses.forward_kl(log_p, log_q) == pytest.approx(0.25 * ln2)
    assert losses.reverse_kl(log_p, log_q) == pytest.approx(0.25 * ln2)
    assert losses.total_variation(log_p, log_q) == pytest.approx(0.25)
    m = np.asarray([0.375, 0.25, 0.375])
    p = np.asarray([0.5, 0.25, 0.25])
    assert losses.JensenShannon()(log_p, log_q) == pytest.approx(np.sum(p * np.log(p / m)))


@pytest.mark.parametrize("name", LOSSES)
def test_zero_at_equality_and_positive_elsewhere(name):
    log_p, log_q = laws(0)
    np.testing.assert_allclose(LOSSES[name](log_p, log_p), 0, atol=1e-12)
    assert np.all(LOSSES[name](log_p, log_q) > 0)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_against_finite_differences(name):
    log_p, _ = laws(1, (4,))
    logits = jnp.asarray([0.3, -0.2, 0.9, 0.1])

    def value(logits):
        return LOSSES[name](log_p, jax.nn.log_softmax(logits))

    gradient = jax.grad(value)(logits)
    for index in range(4):
        step = 1e-6 * np.eye(4)[index]
        slope = (value(logits + step) - value(logits - step)) / 2e-6
        assert gradient[index] == pytest.approx(float(slope), abs=1e-6)


def test_jensen_shannon_reaches_both_divergences():
    """JS(β)/β tends to the forward divergence as β → 0, JS(β)/(1 − β) to the reverse as β → 1."""
    log_p, log_q = laws(2)
    small = 1e-7
    near = losses.JensenShannon(small)(log_p, log_q) / small
    np.testing.assert_allclose(near, losses.forward_kl(log_p, log_q), rtol=1e-4)
    far = losses.JensenShannon(1 - small)(log_p, log_q) / small
    np.testing.assert_allclose(far, losses.reverse_kl(log_p, log_q), rtol=1e-4)


@pytest.mark.parametrize("name", ["total_variation", "jensen_shannon", "jensen_shannon(0.1)"])
def test_mass_left_out_is_what_the_whole_vocabulary_would_say(name):
    """With q = 0 on the last tokens, the cut laws give the value of the whole ones."""
    log_p, log_q = laws(3)
    whole_q = jnp.where(jnp.arange(5)[None] < 3, log_q, -jnp.inf)
    whole_q = whole_q - jax.nn.logsumexp(whole_q, axis=-1, keepdims=True)
    whole = LOSSES[name](log_p, whole_q)
    np.testing.assert_allclose(LOSSES[name](log_p[:, :3], whole_q[:, :3]), whole, rtol=1e-10)


# The reverse divergence is infinite there: the draft has mass where the target has none.
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "reverse_kl"])
def test_gradient_is_finite_where_laws_are_zero(name):
    log_p = jnp.asarray([0.0, -jnp.inf, -jnp.inf])

    def value(logits):
        return LOSSES[name](log_p, jax.nn.log_softmax(logits))

    assert np.all(np.isfinite(jax.grad(value)(jnp.zeros(3))))


@pytest.mark.parametrize("rule", ["token", "block"])
def test_negative_accepted_length_is_the_rules_own(rule):
    """Averaged over every text, it is the enumeration of `analysis.expected_accepted`."""
    target = analysis.random_law(jax.random.key(1), 3, 3, 1.0, jnp.float64)
    draft = analysis.random_law(jax.random.key(2), 3, 2, 1.0, jnp.float64)
    total = 0.0
    for a in range(3):
        for b in range(3):
            log_p = jnp.stack([target[0][0, a], target[1][a, b]])[None]
            log_q = jnp.stack([draft[0][0, a], draft[1][a, b]])[None]
            value = losses.negative_accepted_length(log_p, log_q, jnp.ones((1, 2), bool), 2, rule)
            total += jnp.exp(jnp.sum(log_p)) * value[0, 0]
    expected = analysis.expected_accepted(rule, trees.chain(2), target, draft)
    assert -total == pytest.approx(float(expected), abs=1e-10)


@pytest.mark.parametrize("rule", ["token", "block"])
def test_accepted_length_against_finite_differences(rule):
    tokens = jax.random.randint(jax.random.key(5), (2, 6), 0, 4)
    log_p, log_q = laws(4, (2, 6, 4))
    present = jnp.arange(6)[None] < jnp.asarray([[6], [4]])

    def value(move):
        found = jax.nn.log_softmax(log_q + move)
        at_text = [
            jnp.take_along_axis(law, tokens[..., None], -1)[..., 0] for law in (log_p, found)
        ]
        return jnp.sum(losses.negative_accepted_length(at_text[0], at_text[1], present, 3, rule))

    still = jnp.zeros_like(log_q)
    gradient = jax.grad(value)(still)
    # Some of the drafts are certain to be accepted, where nothing moves; not all are.
    assert np.sum(np.abs(gradient) > 1e-3) > 12
    for place in np.ndindex(*log_q.shape):
        step = still.at[place].set(1e-6)
        slope = (value(step) - value(-step)) / 2e-6
        assert gradient[place] == pytest.approx(float(slope), abs=1e-6)


def test_accepted_length_stops_at_the_text_and_at_foreign_tokens():
    log_p = jnp.log(jnp.full((2, 4), 0.5))
    present = jnp.asarray([[True, True, True, False], [True, True, True, True]])
    log_q = log_p.at[1, 2].set(-jnp.inf)
    value = losses.negative_accepted_length(log_p, log_q, present, 2)
    np.testing.assert_allclose(value, [[-2, -2, -1, 0], [-2, -1, 0, -1]], atol=1e-12)
    gradient = jax.grad(lambda q: jnp.sum(losses.negative_accepted_length(log_p, q, present, 2)))(
        log_q - 0.1
    )
    assert np.all(np.isfinite(gradient))


def test_bad_values_are_named():
    with pytest.raises(ValueError, match="beta=1"):
        losses.JensenShannon(1)
    with pytest.raises(ValueError, match="beta=5.0"):
        losses.JensenShannon(np.float32(5))
    with pytest.raises(ValueError, match="length=0"):
        losses.negative_accepted_length(
            jnp.zeros((1, 2)), jnp.zeros((1, 2)), jnp.ones((1, 2), bool), 0
        )
