"""Rules on trees against their papers' procedures, and the laws that tie the rules together."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specjax import analysis, trees, types, verification
from specjax.verification import lossy
from tests.verification import literal

NODES, VOCABULARY, BATCH = 6, 4, 8
KINDS = ["independent", "distinct", "several laws"]
STATIC = {
    "siblings": [0, 0, 0, 0, 0, 0],
    "chain": [0, 1, 2, 3, 4, 5],
    "breadth first": [0, 0, 1, 1, 2, 2],
    "depth first": [0, 1, 1, 0, 4, 4],
    "ragged": [0, 0, 2, 2, 4, 0],
}
TYPICAL = lossy.typical(0.4, 0.5)

outcome_law = jax.jit(analysis.outcome_law, static_argnums=0)


def laws(chance, *shape):
    """Random laws, of which three tokens in ten are impossible, and some are one-hot."""
    weights = chance.gamma(0.7, size=shape) * (chance.random(shape) < 0.7)
    weights[..., 0] += weights.sum(-1) == 0
    return weights / weights.sum(-1, keepdims=True)


def problem(seed, kind, parents=None, dtype: Any = np.float64):
    """A batch of random drafts and targets; row by row other trees where none is given."""
    chance = np.random.default_rng(seed)
    if parents is None:
        rows = np.stack([chance.integers(0, np.arange(NODES) + 1) for _ in range(BATCH)])
        tree = trees.dynamic(jnp.asarray(rows, jnp.int32), NODES)
    else:
        rows = np.broadcast_to(np.asarray(parents), (BATCH, NODES))
        tree = trees.from_parents(parents)
    target = laws(chance, BATCH, NODES + 1, VOCABULARY)
    # A second law for every node: a union's second drafter.
    proposal = laws(chance, BATCH, 2 * (NODES + 1), VOCABULARY)
    law = rows.copy()
    if kind == "several laws":
        choice = chance.integers(0, 3, (BATCH, NODES))
        law = np.where(choice == 2, -1, rows + choice * (NODES + 1))
    present = chance.random((BATCH, NODES)) < 0.85
    tokens = np.zeros((BATCH, NODES), np.int32)
    for row in range(BATCH):
        for node in range(NODES):
            drawn = proposal[row, law[row, node]].copy()
            if kind == "distinct":
                drawn[
                    tokens[row, :node][(rows[row, :node] == rows[row, node]) & present[row, :node]]
                ] = 0
                present[row, node] &= drawn.sum() > 0
            if law[row, node] < 0 or drawn.sum() == 0:
                drawn = np.ones(VOCABULARY)
            tokens[row, node] = chance.choice(VOCABULARY, p=drawn / drawn.sum())
    with np.errstate(divide="ignore"):
        draft = types.draft(
            jnp.asarray(tokens),
            tree,
            log_probs=jnp.asarray(np.log(proposal), dtype),
            law=jnp.asarray(law, jnp.int32),
            present=jnp.asarray(present),
            siblings="distinct" if kind == "distinct" else "independent",
            sibling_laws=2 if kind == "several laws" else 1,
        )
        return draft, rows, jnp.asarray(np.log(target), dtype)


def assert_as_told(rule, draft, rows, target, atol):
    procedure = literal.RULES.get(rule)
    if procedure is None:
        rule, procedure = TYPICAL, functools.partial(literal.typical, epsilon=0.4, delta=0.5)
    made = np.asarray(outcome_law(verification.get(rule), draft, target))
    for row in range(BATCH):
        told = procedure(
            literal.Row.of(draft, rows[row], row), np.exp(np.asarray(target[row], np.float64))
        )
        np.testing.assert_allclose(made[row], told, atol=atol, err_msg=f"row {row}")


CASES = [(rule, kind) for rule in ("multi_candidate", "traversal") for kind in KINDS]
CASES += [("k_seq", "independent"), ("typical", "several laws")]


@pytest.mark.parametrize("rule, kind", CASES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_any_tree(rule, kind, seed):
    with jax.enable_x64(True):
        assert_as_told(rule, *problem(seed, kind), atol=1e-11)


@pytest.mark.parametrize("rule, kind", CASES)
@pytest.mark.parametrize("shape", STATIC)
def test_static_trees(rule, kind, shape):
    with jax.enable_x64(True):
        for seed in range(4):
            assert_as_told(rule, *problem(seed, kind, STATIC[shape]), atol=1e-11)


@pytest.mark.parametrize("rule, kind", CASES)
def test_single_precision(rule, kind):
    for seed in range(4):
        assert_as_told(rule, *problem(seed, kind, dtype=np.float32), atol=2e-6)


@pytest.mark.parametrize("rule", ["multi_candidate", "traversal", "k_seq"])
def test_on_chains_they_are_the_chain_rules(rule):
    with jax.enable_x64(True):
        draft, _, target = problem(3, "independent", STATIC["chain"])
        chain_rule = "block" if rule == "traversal" else "token"
        made, wanted = (
            outcome_law(verification.get(name), draft, target) for name in (rule, chain_rule)
        )
        np.testing.assert_allclose(made, wanted, atol=1e-12)


@pytest.mark.parametrize("siblings", ["independent", "distinct"])
@pytest.mark.parametrize("shape", STATIC)
def test_traversal_accepts_no_less_than_multi_candidate(shape, siblings):
    """In expectation over the drafts, on the same tree."""
    tree = trees.from_parents(STATIC[shape][:4])
    with jax.enable_x64(True):
        for seed in range(4):
            keys = jax.random.split(jax.random.key(seed))
            target, proposal = (
                analysis.random_law(key, 3, depth, 0.5, jnp.float64)
                for key, depth in zip(keys, (tree.max_depth + 1, tree.max_depth), strict=True)
            )
            walked, round_by_round = (
                analysis.certify(rule, tree, target, proposal, siblings=siblings)
                for rule in ("traversal", "multi_candidate")
            )
            assert walked.passed and round_by_round.passed
            assert walked.expected_accepted >= round_by_round.expected_accepted - 1e-12


@pytest.mark.parametrize("rule", ["multi_candidate", "traversal"])
def test_a_distinct_sibling_without_a_law_is_as_good_as_absent(rule):
    """The first sibling has all of q that float32 resolves; the second is any other token."""
    proposal = jnp.asarray([[[0.0, -95.0, -120.0]]], jnp.float32)
    target = jnp.log(jnp.asarray([[[1e-3, 0.9, 0.099]]], jnp.float32))
    target = jnp.broadcast_to(target, (1, 3, 3))
    draft = types.draft(
        jnp.asarray([[0, 1]], jnp.int32),
        trees.branching((2,)),
        log_probs=proposal,
        siblings="distinct",
    )
    without = dataclasses.replace(draft, present=jnp.asarray([[True, False]]))
    made, wanted = (outcome_law(verification.get(rule), d, target) for d in (draft, without))
    np.testing.assert_allclose(made, wanted)
    np.testing.assert_allclose(jnp.sum(made, axis=1)[0], jnp.exp(target[0, 0]), atol=2e-3)
