"""Expected accepted length: by enumeration, from the target's text, and its gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import analysis, trees, verification
from tests.verification import kinds

TREES = {"chain": trees.chain(2), "tree": trees.from_parents([0, 0, 1])}


def random_laws(seed, depth, dtype=jnp.float64):
    return analysis.random_law(jax.random.key(seed), 3, depth, 1.0, dtype)


@pytest.mark.parametrize("rule, expected", [("token", 10 / 9), ("block", 11 / 9)])
def test_the_targets_text_gives_the_example_of_the_block_paper(rule, expected):
    p, q = np.asarray([1 / 3, 2 / 3]), np.asarray([2 / 3, 1 / 3])
    total = 0.0
    for text in itertools.product(range(2), repeat=2):
        chosen = list(text)
        log_p, log_q = (jnp.log(jnp.asarray(law[chosen]))[None] for law in (p, q))
        shares = verification.survival(rule, log_p, log_q, 2)
        assert shares.shape == (1, 1, 2)
        total += float(np.prod(p[chosen]) * jnp.sum(shares))
    assert total == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_targets_text_gives_what_enumeration_does(rule, length):
    with jax.enable_x64(True):
        target, proposal = random_laws(1, length + 1), random_laws(2, length)
        certificate = analysis.certify(rule, trees.chain(length), target, proposal)
        total = 0.0
        for text in itertools.product(range(3), repeat=length):
            rows = [
                sum(t * 3 ** (n - i - 1) for i, t in enumerate(text[:n])) for n in range(length)
            ]
            log_p, log_q = (
                jnp.stack([law[n][rows[n], text[n]] for n in range(length)])[None]
                for law in (target, proposal)
            )
            shares = verification.survival(rule, log_p, log_q, length)
            total += float(jnp.exp(jnp.sum(log_p)) * jnp.sum(shares))
        assert total == pytest.approx(certificate.expected_accepted, abs=1e-12)


@pytest.mark.parametrize("rule", ["match", *kinds.RATIO])
@pytest.mark.parametrize("shape", TREES)
def test_enumeration_is_differentiable(rule, shape):
    """In the draft's logits, against finite differences; its value is the certificate's."""
    tree = TREES[shape]
    if shape == "tree" and rule in ("token", "block"):
        pytest.skip("a rule of chains")
    with jax.enable_x64(True):
        target, logits = random_laws(3, tree.max_depth + 1), random_laws(4, tree.max_depth)
        directions = random_laws(5, tree.max_depth)

        def length(logits):
            proposal = [jax.nn.log_softmax(level, axis=-1) for level in logits]
            return analysis.expected_accepted(rule, tree, target, proposal)

        value, gradient = jax.jit(jax.value_and_grad(length))(logits)
        wanted = analysis.certify(rule, tree, target, logits).expected_accepted
        assert float(value) == pytest.approx(wanted, abs=1e-12)
        length, step = jax.jit(length), 1e-6

        def along(size):
            pairs = zip(logits, directions, strict=True)
            return length([level + size * change for level, change in pairs])

        slope = (along(step) - along(-step)) / (2 * step)
        pairs = zip(gradient, directions, strict=True)
        found = sum(jnp.sum(level * change) for level, change in pairs)
        np.testing.assert_allclose(found, slope, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("rule", ["multi_candidate", "traversal"])
def test_distinct_siblings_that_end_with_the_support_leave_the_gradient_finite(rule):
    tree = trees.from_parents((0, 0, 0))

    def length(logits):
        proposal = [jax.nn.log_softmax(logits, axis=-1)]
        return analysis.expected_accepted(rule, tree, random_laws(3, 2), proposal, "distinct")

    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(length))(jnp.asarray([[0.3, 0.1, -jnp.inf]]))
        assert jnp.all(jnp.isfinite(gradient)) and jnp.any(gradient != 0)


@pytest.mark.parametrize("rule", ["token", "block"])
def test_text_gives_a_gradient_at_a_full_vocabulary(rule):
    log_p = jnp.log(jnp.asarray([[0.5, 0.2, 0.4, 0.3]]))
    logits = jnp.asarray([[0.1, -0.4, 0.3, 0.2]])

    def length(logits):
        return jnp.sum(verification.survival(rule, log_p, jax.nn.log_sigmoid(logits), 2))

    gradient = jax.grad(length)(logits)
    for place in range(4):
        step = 1e-2 * jax.nn.one_hot(place, 4)[None]
        slope = (length(logits + step) - length(logits - step)) / 2e-2
        np.testing.assert_allclose(gradient[0, place], slope, rtol=1e-2, atol=1e-3)


def test_a_token_that_cannot_be_drafted_ends_acceptance():
    log_p = jnp.zeros((1, 3)) - 1.0
    log_q = log_p.at[0, 1].set(-jnp.inf)
    for rule in ("token", "block"):
        np.testing.assert_allclose(verification.survival(rule, log_p, log_q, 3)[0, 0], [1, 0, 0])
        gradient = jax.grad(lambda q, rule=rule: jnp.sum(verification.survival(rule, log_p, q, 3)))(
            log_q
        )
        assert jnp.all(jnp.isfinite(gradient))


@pytest.mark.parametrize("rule", ["token", "block"])
def test_a_token_that_the_target_does_not_write_gives_numbers(rule):
    """Its weight is 0 when another temperature is asked for; a NaN would outlive that."""
    log_p = jnp.log(jnp.asarray([[0.5, 0.0, 0.5, 0.5]]))
    log_q = jnp.log(jnp.asarray([[0.5, 0.5, 0.0, 0.5]]))
    assert np.all(np.isfinite(verification.survival(rule, log_p, log_q, 2)))


def test_what_cannot_be_estimated_is_refused():
    law = jnp.zeros((1, 3))
    with pytest.raises(ValueError, match="'traversal'.*block and token can"):
        verification.survival("traversal", law, law, 2)
    with pytest.raises(ValueError, match="T=3 tokens hold no drafts of length=4"):
        verification.survival("token", law, law, 4)
