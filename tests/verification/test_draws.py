"""What verification draws: its outcomes against their law, and plain decoding's own tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import analysis, sampling, trees, types, verification
from specjax.verification import kernel, match

pytestmark = pytest.mark.optimised

# A coupled draft is drawn with the draws; tests/verification/test_coupled.py has those.
_RULES = sorted({*verification.RULES} - {"coupled"})

verify = jax.jit(kernel.verify, static_argnums=0)
outcome_law = jax.jit(analysis.outcome_law, static_argnums=0)
draw_target = jax.jit(sampling.draw_target)


def g_test(counts, law):
    """p-value of counts under a law, by the likelihood ratio; impossible cells must be empty."""
    counts, law = np.asarray(counts, np.float64), np.asarray(law, np.float64)
    possible = law > 1e-7
    assert counts[~possible].sum() <= 2
    counts, law = counts[possible], law[possible] / law[possible].sum()
    seen = counts > 0
    statistic = 2 * np.sum(counts[seen] * np.log(counts[seen] / (counts.sum() * law[seen])))
    freedom = jnp.float32((len(law) - 1) / 2)
    return float(jax.scipy.special.gammaincc(freedom, jnp.float32(statistic / 2)))


@pytest.mark.parametrize("rule", _RULES)
def test_a_million_draws_have_the_outcome_law(rule):
    batch, rounds, size, vocab_size = 50_000, 20, 3, 3
    flat = jnp.log(jnp.asarray([[0.5, 0.3, 0.2], [0.2, 0.6, 0.2], [0.4, 0.1, 0.5]]))
    draft = types.draft(
        jnp.asarray([[0, 1, 2]], jnp.int32), trees.chain(size), log_probs=flat[None]
    )
    target = jnp.log(
        jnp.asarray([[0.4, 0.4, 0.2], [0.3, 0.4, 0.3], [0.7, 0.0, 0.3], [0.1, 0.8, 0.1]])
    )
    target = target[None]
    rule = verification.get(rule)

    @jax.jit
    def counts(keys):
        def wide(leaf):
            return jnp.broadcast_to(leaf, (batch, *leaf.shape[1:]))

        length = jnp.full((batch,), 7, jnp.int32)
        verdict = kernel.verify(rule, keys, length, jax.tree.map(wide, draft), wide(target))
        # On a chain the stop is the count.
        cell = verdict.count * vocab_size + verdict.next_token
        return jnp.bincount(cell, length=(size + 1) * vocab_size)

    total = np.zeros((size + 1) * vocab_size)
    for seed in range(rounds):
        total += np.asarray(counts(jax.random.split(jax.random.key(seed), batch)))
    law = np.asarray(outcome_law(rule, draft, target)).reshape(-1)
    assert total.sum() == 1_000_000
    assert g_test(total, law) > 1e-9
    # The test sees an error of a hundredth in one cell.
    biased = law + 0.01 * np.eye(len(law))[np.argmax(law)]
    assert g_test(total, biased / biased.sum()) < 1e-9


def test_matching_draws_what_plain_decoding_would():
    """At the same key and position; the law alone decides, not the node it stands at."""
    batch, vocab_size = 6, 16
    tree = trees.from_parents((0, 0, 1, 2, 2, 4))
    keys = jax.random.split(jax.random.key(16), batch)
    length = jnp.asarray([3, 1, 4, 1, 5, 9], jnp.int32)
    logits = jax.random.normal(jax.random.key(17), (batch, tree.size + 1, vocab_size))
    # A third of the tokens is impossible.
    possible = jnp.arange(vocab_size, dtype=jnp.int32) % 3 > 0
    target = jax.nn.log_softmax(jnp.where(possible[None, None], logits, -jnp.inf), axis=-1)
    tokens = jax.random.randint(jax.random.key(18), (batch, tree.size), 0, vocab_size)
    draft = types.draft(tokens, tree, vocab_size=vocab_size)
    draws = verify(match.rule, keys, length, draft, target).draws
    nothing = types.draft(jnp.zeros((batch, 0), jnp.int32), trees.chain(0), vocab_size=vocab_size)
    for node, depth in enumerate((0, 1, 1, 2, 2, 2, 3)):
        law = target[:, node : node + 1]
        plain = verify(match.rule, keys, length + depth, nothing, law)
        np.testing.assert_array_equal(draws[:, node], plain.next_token)
        again = draw_target(keys, (length + depth)[:, None], law)
        np.testing.assert_array_equal(draws[:, node], again[:, 0])
