"""Every rule as every kind of program: with and without jit, of arrays on host and device."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import pytest
from absl.testing import parameterized

from specjax import analysis, trees, types, verification
from specjax.verification import kernel
from tests.verification import kinds

_BATCH, _LENGTH, _VOCABULARY = 24, 4, 3
_CASES = [
    *((rule, "chain") for rule in sorted(verification.RULES)),
    ("match", "certain tree"),
    *((rule, "tree") for rule in kinds.ON_TREES),
    ("multi_candidate", "distinct"),
    ("traversal", "distinct"),
]
# Untyped in chex.
all_variants: Any = chex.all_variants


def problem(seed, kind, rule="token"):
    """Keys, lengths, a draft with absent nodes and the target's laws, some tokens impossible."""
    keys = jax.random.split(jax.random.key(seed), 4)
    logits = 2 * jax.random.normal(keys[0], (2, _BATCH, _LENGTH + 1, _VOCABULARY))
    possible = jax.random.bernoulli(keys[1], 0.8, logits.shape).at[..., 0].set(True)
    target, proposal = jax.nn.log_softmax(jnp.where(possible, logits, -jnp.inf), axis=-1)
    tokens = jax.random.categorical(keys[2], proposal[:, :-1]).astype(jnp.int32)
    row = jnp.arange(_BATCH, dtype=jnp.int32)[:, None]
    if kind == "chain":
        # The second node is certain.
        node = jnp.arange(_LENGTH, dtype=jnp.int32)[None]
        law = jnp.broadcast_to(jnp.where(node == 1, -1, node), tokens.shape)
        draft = types.draft(
            tokens,
            trees.chain(_LENGTH),
            log_probs=proposal,
            law=law,
            present=node < (row + seed) % (_LENGTH + 1),
            siblings=kinds.siblings(rule),
        )
    else:
        topologies = jnp.asarray([(0, 0, 1, 1), (0, 0, 0, 2), (0, 1, 1, 3)], jnp.int32)
        tree = trees.dynamic(jnp.tile(topologies, (_BATCH // 3, 1)), 3)
        sampled = kind != "certain tree"
        node = jnp.arange(_LENGTH, dtype=jnp.int32)[None]
        draft = types.draft(
            tokens,
            tree,
            log_probs=proposal if sampled else None,
            present=node != (row + seed) % 5,
            vocab_size=_VOCABULARY,
            siblings="distinct" if kind == "distinct" else "independent",
        )
    requests = jax.random.split(keys[3], _BATCH)
    return requests, (row[:, 0] + seed) % 7, draft, target


def acceptance(rule, draft, target):
    return kernel.judge(rule, draft, target)[0]


def residual(rule, draft, target, node):
    """As probabilities: impossible tokens have no distance as logarithms."""
    return jnp.exp(kernel.judge(rule, draft, target)[1](node))


class Variants(chex.TestCase):
    @all_variants(with_pmap=False)
    @parameterized.parameters(*_CASES)
    def test_laws(self, name, kind):
        rule = verification.get(name)
        _, length, draft, target = problem(0, kind, name)
        node = length % (_LENGTH + 1)
        for function, given in (
            (acceptance, (rule, draft, target)),
            (residual, (rule, draft, target, node)),
            (analysis.outcome_law, (rule, draft, target)),
        ):
            found = self.variant(function, static_argnums=0)(*given)
            wanted = function(*given)
            chex.assert_trees_all_close(found, wanted, atol=1e-6)

    @all_variants(with_pmap=False)
    @parameterized.parameters(*_CASES)
    def test_verdicts(self, name, kind):
        given = verification.get(name), *problem(1, kind, name)
        wanted = kernel.verify(*given)
        chex.assert_trees_all_equal(self.variant(kernel.verify, static_argnums=0)(*given), wanted)
        assert len(set(wanted.count.tolist())) > 1

    @all_variants(with_pmap=False)
    @parameterized.parameters("chain", "certain tree")
    def test_walks(self, kind):
        _, _, draft, _ = problem(2, kind)
        flags = jax.random.bernoulli(jax.random.key(3), 0.7, draft.tokens.shape)
        found = self.variant(kernel.resolve)(draft, flags)
        chex.assert_trees_all_equal(found, kernel.resolve(draft, flags))


@pytest.mark.parametrize("name, kind", _CASES)
def test_new_values_do_not_compile_again(name, kind):
    rule = verification.get(name)

    def once(function, static=()):
        return jax.jit(chex.assert_max_traces(function, n=1), static_argnums=static)

    verify, outcome_law = once(kernel.verify, 0), once(analysis.outcome_law, 0)
    accept, remaining = once(acceptance, 0), once(residual, 0)
    resolve = once(kernel.resolve)
    for seed in range(3):
        keys, length, draft, target = problem(seed, kind, name)
        verify(rule, keys, length, draft, target)
        outcome_law(rule, draft, target)
        remaining(rule, draft, target, length % (_LENGTH + 1))
        resolve(draft, accept(rule, draft, target) > 0.5)
