"""Dead ends: where the target has no token the text ends, and drafts beyond change nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import analysis, trees, verification
from specjax.verification import block
from tests.verification import kinds

VOCAB = 3


def laws(seed, depth, dtype, share=0.4):
    """A target of depth + 1 entries, many of them dead ends, and a proposal that knows of none."""
    target_key, draft_key = jax.random.split(jax.random.key(seed))
    target = analysis.random_law(target_key, VOCAB, depth + 1, dtype=dtype)
    random = np.random.default_rng(seed)
    for level in range(1, depth + 1):
        dead = random.random(VOCAB**level) < share
        target[level] = jnp.where(dead[:, None], -jnp.inf, target[level])
    return target, analysis.random_law(draft_key, VOCAB, depth, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rule", sorted(verification.RULES))
def test_rules_are_exact_though_drafts_run_past_dead_ends(rule, dtype):
    with jax.enable_x64(dtype == "float64"):
        for seed in range(6):
            certificate = analysis.certify(
                rule, trees.chain(3), *laws(seed, 3, dtype), siblings=kinds.siblings(rule)
            )
            assert certificate.passed, (seed, certificate)


@pytest.mark.parametrize("rule", sorted(verification.RULES))
def test_a_text_that_cannot_begin_is_no_text(rule):
    target, proposal = laws(0, 2, "float32")
    target[0] = jnp.full_like(target[0], -jnp.inf)
    certificate = analysis.certify(
        rule, trees.chain(2), target, proposal, siblings=kinds.siblings(rule)
    )
    assert certificate.passed and certificate.expected_accepted == 0


def test_match_on_a_tree_with_dead_ends():
    target, proposal = laws(2, 2, "float32")
    for proposals in ([proposal], []):
        certificate = analysis.certify("match", trees.branching((2, 1)), target, *proposals)
        assert certificate.passed, certificate


def test_acceptance_that_reads_drafts_beyond_a_dead_end_fails():
    """The joint acceptance then holds nothing for the end itself."""

    def accept(draft, target_log_probs):
        # A law of almost nothing in place of none hides the dead end from the rule.
        alive = jnp.max(target_log_probs, axis=-1, keepdims=True) > -jnp.inf
        return block.accept(draft, jnp.where(alive, target_log_probs, -1e4))

    blind = dataclasses.replace(block.rule, accept=accept)
    worst = max(
        analysis.certify(blind, trees.chain(3), *laws(seed, 3, "float32")).total_variation
        for seed in range(6)
    )
    assert worst > 0.02
