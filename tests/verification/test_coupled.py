"""Drafts drawn with the target's noise: how often they agree, and what is drawn where not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from specjax import analysis, sampling, trees, types, verification
from specjax.verification import coupled

pytestmark = pytest.mark.optimised

DRAWS = 1_000_000
PAIRS = {
    "apart": ([0.5, 0.3, 0.2, 0.0], [0.1, 0.2, 0.3, 0.4]),
    "near": ([0.4, 0.3, 0.2, 0.1], [0.35, 0.3, 0.2, 0.15]),
    "impossible to draft": ([0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0]),
    "equal": ([0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1]),
}


def chain(p, q):
    """Every draft of one token: [V] rows."""
    tokens = jnp.arange(len(p), dtype=jnp.int32)[:, None]
    log_probs = jnp.broadcast_to(jnp.log(jnp.asarray(q)), (len(p), 1, len(p)))
    draft = types.draft(tokens, trees.chain(1), log_probs=log_probs, siblings="coupled")
    return draft, jnp.broadcast_to(jnp.log(jnp.asarray(p)), (len(p), 2, len(p)))


@pytest.mark.parametrize("pair", PAIRS)
def test_a_million_pairs_of_draws_have_the_joint_law(pair):
    """Whatever is said of the target's draw given the draft, against the noise itself."""
    p, q = PAIRS[pair]
    keys = jax.random.split(jax.random.key(2), DRAWS)
    position = jnp.full((DRAWS, 1), 7, jnp.int32)

    @jax.jit
    def draw(law, keys):
        laws = jnp.broadcast_to(jnp.log(jnp.asarray(law)), (DRAWS, 1, len(law)))
        return sampling.draw_target(keys, position, laws)[:, 0]

    counts = np.zeros((len(p), len(p)))
    np.add.at(counts, (np.asarray(draw(q, keys)), np.asarray(draw(p, keys))), 1)
    draft, target = chain(p, q)
    joint = np.asarray(q)[:, None] * np.exp(np.asarray(coupled.draw_law(draft, target)[:, 0]))
    possible = joint > 1e-9
    assert counts[~possible].sum() == 0
    wanted = joint[possible] / joint.sum() * DRAWS
    statistic = np.sum((counts[possible] - wanted) ** 2 / wanted)
    assert stats.chi2.sf(statistic, possible.sum() - 1) > 1e-6
    np.testing.assert_allclose(joint.sum(axis=0), p, atol=1e-6)


@pytest.mark.parametrize("concentration", [0.2, 1.0, 5.0])
def test_agreement_is_no_less_than_its_bound(concentration):
    """(1 − TV) / (1 + TV), and no more than 1 − TV."""
    chance = np.random.default_rng(3)
    for _ in range(20):
        p, q = chance.dirichlet([concentration] * 6, 2)
        draft, target = chain(p, q)
        agreement = float(jnp.sum(jnp.asarray(q) * coupled.accept(draft, target)[:, 0]))
        distance = np.abs(p - q).sum() / 2
        assert (1 - distance) / (1 + distance) - 1e-5 <= agreement <= 1 - distance + 1e-5


def test_the_verdict_is_that_of_match():
    """Only the target's draws are emitted, whatever the rule is called."""
    p, q = PAIRS["near"]
    draft, target = chain(p, q)
    keys, length = jax.random.split(jax.random.key(5), 4), jnp.arange(4, dtype=jnp.int32)
    one, other = (
        verification.verify(verification.get(name), keys, length, draft, target)
        for name in ("coupled", "match")
    )
    np.testing.assert_array_equal(one.next_token, other.next_token)
    np.testing.assert_array_equal(one.count, other.count)


def test_the_law_of_match_is_not_that_of_coupled_drafts():
    laws = [analysis.random_law(jax.random.key(seed), 3, 2) for seed in range(2)]
    with pytest.raises(ValueError, match="certify rule='coupled'"):
        analysis.certify("match", trees.chain(1), *laws, siblings="coupled")
