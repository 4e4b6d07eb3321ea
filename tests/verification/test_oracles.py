"""Rules where the answer is known by hand: acceptance, laws at the edges of probability 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import analysis, trees, types, verification
from specjax.verification import kernel
from tests.verification import kinds

_RULES = sorted(verification.RULES)
_RATIO = kinds.RATIO

outcome_law = jax.jit(analysis.outcome_law, static_argnums=0)


def context_free(law, depth):
    """The conditional law of independent tokens."""
    law = jnp.log(jnp.asarray(law, jnp.float32))
    return [jnp.broadcast_to(law, (law.shape[0] ** level, law.shape[0])) for level in range(depth)]


def accepted(rule, target, proposal, length):
    tree = trees.chain(length)
    certificate = analysis.certify(rule, tree, target, proposal, siblings=kinds.siblings(rule))
    assert certificate.passed, certificate
    return certificate.expected_accepted


@pytest.mark.parametrize(
    "rule, expected",
    [
        ("token", 10 / 9),
        ("multi_candidate", 10 / 9),
        ("k_seq", 10 / 9),
        ("block", 11 / 9),
        ("traversal", 11 / 9),
        ("match", 52 / 81),
        # With two tokens the draws agree as often as can be.
        ("coupled", 10 / 9),
    ],
)
def test_binary_example_of_the_block_paper(rule, expected):
    target = context_free([1 / 3, 2 / 3], 3)
    proposal = context_free([2 / 3, 1 / 3], 2)
    assert accepted(rule, target, proposal, 2) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("length", [1, 3])
def test_token_accepts_geometrically_where_laws_have_no_context(length):
    rows = np.random.default_rng(length).dirichlet([1.0] * 3, size=2)
    target, proposal = context_free(rows[0], length + 1), context_free(rows[1], length)
    alpha = 1 - np.abs(rows[0] - rows[1]).sum() / 2
    found = accepted("token", target, proposal, length)
    assert found == pytest.approx(sum(alpha**i for i in range(1, length + 1)), abs=1e-5)
    assert found + 1 == pytest.approx((1 - alpha ** (length + 1)) / (1 - alpha), abs=1e-5)


def test_equal_laws_are_accepted_whole_by_ratio_rules():
    length = 3
    target = analysis.random_law(jax.random.key(length), 3, length + 1)
    for rule in _RATIO:
        assert accepted(rule, target, target[:length], length) == pytest.approx(length, abs=1e-5)
    row = np.random.default_rng(0).dirichlet([1.0] * 3)
    same = np.sum(row**2)
    found = accepted("match", context_free(row, length + 1), context_free(row, length), length)
    assert found == pytest.approx(sum(same**i for i in range(1, length + 1)), abs=1e-5)


@pytest.mark.parametrize("rule", _RULES)
def test_disjoint_laws_accept_nothing_and_keep_the_targets(rule):
    target, proposal = context_free([0.3, 0.7, 0.0], 3), context_free([0.0, 0.0, 1.0], 2)
    assert accepted(rule, target, proposal, 2) == 0
    draft = types.draft(
        jnp.full((1, 2), 2, jnp.int32),
        trees.chain(2),
        log_probs=jnp.stack([proposal[0]] * 3, 1),
        siblings=kinds.siblings(rule),
    )
    law = outcome_law(verification.get(rule), draft, jnp.stack([target[0]] * 3, axis=1))
    np.testing.assert_allclose(law[0], [[0.3, 0.7, 0], [0, 0, 0], [0, 0, 0]], atol=1e-6)


@pytest.mark.parametrize("length, concentration", [(2, 0.3), (2, 1.0), (3, 0.3), (3, 3.0)])
def test_block_accepts_at_least_as_much_as_token(length, concentration):
    gains = []
    for seed in range(12):
        first, second = jax.random.split(jax.random.key(seed))
        target = analysis.random_law(first, 3, length + 1, concentration)
        proposal = analysis.random_law(second, 3, length, concentration)
        more = accepted("block", target, proposal, length)
        gains.append(more - accepted("token", target, proposal, length))
    assert min(gains) > -1e-5
    assert max(gains) > 1e-3


# Edges.


def edge_cases():
    """One draft a row, K = 1: what the row is, p, q, and the acceptance of token 0."""
    yield "q = 0 < p", [0.5, 0.5, 0.0], [0.0, 0.5, 0.5], 0.0
    yield "p = q = 0", [0.0, 0.5, 0.5], [0.0, 0.5, 0.5], 0.0
    yield "p = 0 < q", [0.0, 0.5, 0.5], [0.2, 0.4, 0.4], 0.0
    yield "p = q: no residual", [0.25, 0.5, 0.25], [0.25, 0.5, 0.25], 1.0
    yield "p < q", [0.25, 0.5, 0.25], [0.5, 0.5, 0.0], 0.5


@pytest.mark.parametrize("rule", _RATIO)
@pytest.mark.parametrize("name, p, q, expected", list(edge_cases()))
def test_edges_of_probability_0(rule, name, p, q, expected):
    del name
    p, q = (jnp.log(jnp.asarray(law))[None, None] for law in (p, q))
    tree = trees.chain(1)
    draft = types.draft(jnp.zeros((1, 1), jnp.int32), tree, log_probs=jnp.repeat(q, 2, axis=1))
    rule = verification.get(rule)
    accept, residual = verification.judge(rule, draft, jnp.repeat(p, 2, axis=1))
    np.testing.assert_allclose(accept, [[expected]], rtol=1e-6)
    residual = residual(jnp.zeros((1,), jnp.int32))
    assert not jnp.any(jnp.isnan(residual))
    np.testing.assert_allclose(jnp.sum(jnp.exp(residual)), 1, rtol=1e-6)
    # Never a token that the target holds impossible.
    assert jnp.all(jnp.where(p[:, 0] == -jnp.inf, residual, -jnp.inf) == -jnp.inf)


@pytest.mark.parametrize("rule", _RATIO)
def test_impossible_drafts_are_refused_at_a_uniform_of_0(rule, monkeypatch):
    def zeros(key, shape=(), dtype=jnp.float32, **bounds):
        del key, bounds
        return jnp.zeros(shape, dtype)

    monkeypatch.setattr(jax.random, "uniform", zeros)
    cases = [case for case in edge_cases() if case[3] == 0]
    p, q = (jnp.log(jnp.asarray([case[index] for case in cases])) for index in (1, 2))
    for nodes in (1, 3):
        tokens = jnp.zeros((len(cases), nodes), jnp.int32)
        rows = [jnp.repeat(law[:, None], nodes + 1, axis=1) for law in (p, q)]
        draft = types.draft(tokens, trees.chain(nodes), log_probs=rows[1])
        length = jnp.full((len(cases),), 5, jnp.int32)
        # A function of its own, so that the patched uniform is traced.
        patched = jax.jit(lambda *given: kernel.verify(verification.get(rule), *given))
        verdict = patched(jax.random.split(jax.random.key(8), len(cases)), length, draft, rows[0])
        np.testing.assert_array_equal(verdict.count, np.zeros(len(cases)))
        chosen = jnp.take_along_axis(p, verdict.next_token[:, None], axis=1)
        assert jnp.all(chosen > -jnp.inf)
