"""The rules: their limits, gradients and edges, what they refuse, and which drafts stay exact."""

import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import analysis, sampling, trees, types, verification
from specjax.verification import block, kernel, match, multi_candidate, token
from tests.verification import kinds

_RULES = sorted(verification.RULES)
_RATIO = kinds.RATIO
# One shape for most tests: they share compiled programs.
_BATCH, _LENGTH, _VOCABULARY = 256, 4, 4

verify = jax.jit(kernel.verify, static_argnums=0)
outcome_law = jax.jit(analysis.outcome_law, static_argnums=0)


def laws(key, shape):
    """Random laws with some tokens impossible."""
    values, mask = jax.random.split(key)
    logits = 2 * jax.random.normal(values, shape)
    possible = jax.random.bernoulli(mask, 0.7, shape).at[..., 0].set(True)
    return jax.nn.log_softmax(jnp.where(possible, logits, -jnp.inf), axis=-1)


def chain_draft(key, batch=_BATCH, length=_LENGTH, vocab_size=_VOCABULARY, rule="token"):
    """A chain whose tokens are drawn from random laws, for a rule, and a random target."""
    first, second, third = jax.random.split(key, 3)
    log_probs = laws(first, (batch, length + 1, vocab_size))
    target = laws(second, (batch, length + 1, vocab_size))
    tokens = jax.random.categorical(third, log_probs[:, :length]).astype(jnp.int32)
    siblings = kinds.siblings(rule)
    return types.draft(tokens, trees.chain(length), log_probs=log_probs, siblings=siblings), target


def request_keys(seed, batch):
    return jax.random.split(jax.random.key(seed), batch)


# Limits.


def test_block_is_token_for_one_draft():
    draft, target = chain_draft(jax.random.key(1), 64, 1, 5)
    chex.assert_trees_all_close(
        outcome_law(block.rule, draft, target),
        outcome_law(token.rule, draft, target),
        atol=1e-6,
    )


@pytest.mark.parametrize("rule", _RULES)
def test_at_temperature_0_the_text_is_greedy(rule):
    draft, target = chain_draft(jax.random.key(2), rule=rule)
    best = sampling.greedy(target)
    one_hot = jnp.log(jax.nn.one_hot(best, _VOCABULARY))
    length = jnp.arange(_BATCH, dtype=jnp.int32)
    verdict = verify(verification.get(rule), request_keys(3, _BATCH), length, draft, one_hot)
    best, count, last = map(np.asarray, (best, verdict.count, verdict.next_token))
    agrees = np.cumprod(np.asarray(draft.tokens) == best[:, :_LENGTH], axis=1)
    np.testing.assert_array_equal(count, agrees.sum(axis=1))
    np.testing.assert_array_equal(last, best[np.arange(_BATCH), count])
    assert len(set(count.tolist())) > 2


# Gradients.


def spread(rule, draft, target, weight):
    return jnp.sum(analysis.outcome_law(verification.get(rule), draft, target) * weight)


@pytest.mark.parametrize("rule", _RULES)
def test_gradients_are_finite_with_impossible_tokens(rule):
    draft, target = chain_draft(jax.random.key(4), 32, 3, 4, rule)
    # Also drafts that were never drawn: tokens impossible under q, under p and under both.
    draft = dataclasses.replace(draft, tokens=draft.tokens.at[16:].set(3))
    same = draft.log_probs.at[::4].set(target[::4])
    weight = jax.random.normal(jax.random.key(5), (32, 4, 4))

    def value(draft_logits, target_logits):
        some = dataclasses.replace(draft, log_probs=jax.nn.log_softmax(draft_logits))
        return spread(rule, some, jax.nn.log_softmax(target_logits), weight)

    gradients = jax.jit(jax.grad(value, argnums=(0, 1)))(same, target)
    chex.assert_tree_all_finite(gradients)
    assert jnp.any(gradients[1] != 0)
    assert jnp.any(gradients[0] != 0) == (rule != "match")


@pytest.mark.parametrize("rule", _RULES)
def test_gradients_are_finite_differences(rule):
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(6), 5)
        shape = (4, 4, 3)
        draft_logits = jax.random.normal(keys[0], shape, jnp.float64)
        target_logits = jax.random.normal(keys[1], shape, jnp.float64)
        weight = jax.random.normal(keys[2], shape, jnp.float64)
        direction = [jax.random.normal(key, shape, jnp.float64) for key in keys[3:]]
        tokens = jnp.asarray([[0, 1, 2], [2, 2, 0], [1, 0, 0], [2, 1, 1]], jnp.int32)

        def value(draft_logits, target_logits):
            log_probs = jax.nn.log_softmax(draft_logits)
            draft = types.draft(
                tokens, trees.chain(3), log_probs=log_probs, siblings=kinds.siblings(rule)
            )
            return spread(rule, draft, jax.nn.log_softmax(target_logits), weight)

        gradients = jax.jit(jax.grad(value, argnums=(0, 1)))(draft_logits, target_logits)
        value = jax.jit(value)
        step = 1e-5
        for index in range(2):

            def along(size, index=index):
                given = [draft_logits, target_logits]
                given[index] = given[index] + size * direction[index]
                return value(*given)

            slope = (along(step) - along(-step)) / (2 * step)
            found = jnp.sum(gradients[index] * direction[index])
            np.testing.assert_allclose(found, slope, rtol=1e-6, atol=1e-9)


# Edges.


@pytest.mark.parametrize("rule", _RULES)
def test_acceptance_is_a_probability_and_residuals_are_laws(rule):
    draft, target = chain_draft(jax.random.key(7), rule=rule)
    present = jnp.arange(_LENGTH)[None] < jnp.arange(_BATCH)[:, None] % 5
    draft = dataclasses.replace(draft, present=present)
    rule = verification.get(rule)
    # Nearly equal laws too: rounding must not take an acceptance beyond 1.
    noise = 1e-6 * jax.random.normal(jax.random.key(19), target.shape)
    near = jax.nn.log_softmax(draft.log_probs + noise, axis=-1)
    target = jnp.where(jnp.arange(_BATCH)[:, None, None] % 2 == 0, target, near)
    accept, residuals = jax.jit(judged, static_argnums=0)(rule, draft, target)
    assert accept.shape == draft.tokens.shape
    assert jnp.all((accept >= 0) & (accept <= 1))
    assert jnp.all(jnp.where(draft.present, 0.0, accept) == 0)
    total = jnp.sum(outcome_law(rule, draft, target), axis=(1, 2))
    np.testing.assert_allclose(total, np.ones(_BATCH), atol=1e-5)
    for node in range(_LENGTH + 1):
        total = jnp.sum(jnp.exp(residuals[node]), axis=-1)
        np.testing.assert_allclose(total, np.ones(_BATCH), atol=1e-5)


def judged(rule, draft, target):
    """The acceptances, and the residual at every node."""
    accept, residual = verification.judge(rule, draft, target)
    return accept, [residual(jnp.full((_BATCH,), node, jnp.int32)) for node in range(_LENGTH + 1)]


@pytest.mark.parametrize("rule", _RATIO)
def test_a_draft_that_a_rule_cannot_take_is_refused_with_a_remedy(rule):
    tokens = jnp.zeros((1, 2), jnp.int32)
    target = jnp.full((1, 3, 4), -jnp.log(4.0))
    length = jnp.ones((1,), jnp.int32)
    deterministic = types.draft(tokens, trees.chain(2), vocab_size=4)
    tree = types.draft(tokens, trees.branching((2,)), log_probs=target)
    traced = trees.dynamic(jnp.asarray([[0, 1]], jnp.int32), 2)
    wide = [] if rule in kinds.ON_TREES else [tree, types.draft(tokens, traced, log_probs=target)]
    for draft in (deterministic, *wide):
        remedy = "match" if draft is deterministic else "multi_candidate.*match"
        with pytest.raises(ValueError, match=f"rule {rule!r}: .* use rule='{remedy}'"):
            kernel.verify(verification.get(rule), request_keys(0, 1), length, draft, target)
        kernel.verify(match.rule, request_keys(0, 1), length, draft, target)
    assert verification.default_rule(deterministic) is match.rule
    assert verification.default_rule(tree) is multi_candidate.rule


def test_coupled_takes_coupled_chains_alone():
    coupled = verification.get("coupled")
    chain, _ = chain_draft(jax.random.key(0), 1, 2, 4)
    with pytest.raises(ValueError, match=r"siblings='coupled'.* are independent; .*'match'"):
        verification.check(coupled, chain)
    tree = dataclasses.replace(chain, tree=trees.branching((2,)), siblings="coupled")
    with pytest.raises(ValueError, match="tree of 2 nodes; use rule='match'"):
        verification.check(coupled, tree)
    assert verification.default_rule(tree) is match.rule


@pytest.mark.parametrize("siblings, laws_of_siblings", [("distinct", 1), ("independent", 2)])
def test_k_seq_takes_independent_siblings_of_one_law(siblings, laws_of_siblings):
    chain, _ = chain_draft(jax.random.key(0), 1, 2, 4)
    draft = dataclasses.replace(chain, siblings=siblings, sibling_laws=laws_of_siblings)
    with pytest.raises(ValueError, match="rule 'k_seq': .* use rule='multi_candidate'"):
        verification.check(verification.get("k_seq"), draft)


@pytest.mark.parametrize("rule", _RATIO)
def test_drafts_coupled_to_the_target_are_refused(rule):
    draft = dataclasses.replace(chain_draft(jax.random.key(0))[0], siblings="coupled")
    with pytest.raises(ValueError, match=f"rule '{rule}': .* coupled .* rule='match'"):
        verification.check(verification.get(rule), draft)


@pytest.mark.parametrize("rule", ["multi_candidate", "traversal"])
def test_siblings_whose_laws_are_named_may_each_have_one_of_their_own(rule):
    """Of a union's draft nothing need be said but which node has which law."""
    laws = [_law(seed, 4) for seed in range(3)]
    tokens = jnp.asarray(np.stack(np.meshgrid(range(4), range(4)), -1).reshape(-1, 2), jnp.int32)
    log_probs = jnp.broadcast_to(jnp.stack(laws[:2])[None], (16, 2, 4))
    law = jnp.broadcast_to(jnp.asarray([[0, 1]], jnp.int32), (16, 2))
    draft = types.draft(tokens, trees.branching((2,)), log_probs=log_probs, law=law)
    target = jnp.broadcast_to(laws[2], (16, 3, 4))
    drawn = jnp.exp(jnp.sum(jnp.take_along_axis(log_probs, tokens[:, :, None], 2), axis=(1, 2)))
    made = drawn[:, None, None] * outcome_law(verification.get(rule), draft, target)
    first = jnp.sum(made[:, 0], axis=0)
    for node in range(2):
        first = first.at[tokens[:, node]].add(jnp.sum(made[:, node + 1], axis=-1))
    np.testing.assert_allclose(first, jnp.exp(laws[2]), atol=1e-6)
    with pytest.raises(verification.RefusedDraftError, match="from several laws"):
        verification.check(verification.get("k_seq"), draft)


def _law(seed, vocab_size):
    return jax.nn.log_softmax(jax.random.normal(jax.random.key(seed), (vocab_size,)))


def test_laws_of_less_than_single_precision_are_refused():
    with pytest.raises(ValueError, match="log_probs.* bfloat16.*cast them to float32"):
        types.draft(
            jnp.zeros((1, 1), jnp.int32),
            trees.chain(1),
            log_probs=jnp.zeros((1, 1, 1), jnp.bfloat16),
        )


def test_rules_by_name():
    chain = types.draft(
        jnp.zeros((1, 2), jnp.int32), trees.chain(2), log_probs=jnp.zeros((1, 3, 4))
    )
    assert verification.default_rule(chain) is block.rule
    assert verification.get("token") is token.rule
    assert verification.get(token.rule) is token.rule
    with pytest.raises(ValueError, match="'tokens'.*block, coupled, k_seq, match, .*traversal"):
        verification.get("tokens")


# Absent and deterministic nodes.


@pytest.mark.parametrize("rule", _RULES)
def test_a_shortened_chain_is_the_shorter_chain(rule):
    length = _LENGTH
    whole, target = chain_draft(jax.random.key(9), rule=rule)
    shown = jnp.arange(_BATCH) % (length + 1)
    draft = dataclasses.replace(whole, present=jnp.arange(length)[None] < shown[:, None])
    rule = verification.get(rule)
    law = outcome_law(rule, draft, target)
    for short in range(length + 1):
        rows = np.flatnonzero(np.asarray(shown) == short)
        assert jnp.all(law[rows, short + 1 :] == 0)
        if short == 0:
            np.testing.assert_allclose(law[rows, 0], jnp.exp(target[rows, 0]), atol=1e-6)
            continue
        tokens, laws = whole.tokens[:, :short], whole.log_probs[:, : short + 1]
        alone = types.draft(tokens, trees.chain(short), log_probs=laws, siblings=whole.siblings)
        expected = outcome_law(rule, alone, target[:, : short + 1])
        np.testing.assert_allclose(law[rows, : short + 1], expected[rows], atol=1e-6)


def law_of_texts(rule, draft, weight, target):
    """P(text of K + 1 tokens), summed draft by draft; target[d] has axes [V] * (d + 1)."""
    outcome = np.asarray(outcome_law(rule, draft, along_paths(draft.tokens, target)))
    tokens = np.asarray(draft.tokens)
    total = np.zeros(target[-1].shape)
    for row, stop in itertools.product(range(len(tokens)), range(outcome.shape[1])):
        for last in range(outcome.shape[2]):
            text = (*tokens[row, :stop], last)
            after = np.ones(())
            for level in range(stop + 1, len(target)):
                after = after[..., None] * np.exp(target[level][text])
            total[text] += weight[row] * outcome[row, stop, last] * after
    return total


def along_paths(tokens, target):
    """The target's law after each node of chains [A, K]: [A, K+1, V]."""
    rows = [[law[tuple(chain[:level])] for level, law in enumerate(target)] for chain in tokens]
    return jnp.asarray(np.asarray(rows))


@pytest.mark.parametrize("rule", _RULES)
@pytest.mark.parametrize(
    "certain", [(), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=lambda x: f"certain{x}"
)
def test_deterministic_nodes_in_a_sampled_chain_stay_exact(rule, certain):
    """By an enumeration of its own; the tokens of `certain` nodes follow from their prefix."""
    length, vocab_size = 3, 3
    random = np.random.default_rng(10)

    def random_laws(depth):
        shapes = [(vocab_size,) * level for level in range(depth)]
        return [np.log(random.dirichlet([0.7] * vocab_size, shape or None)) for shape in shapes]

    target, proposal = random_laws(length + 1), random_laws(length)
    habit = [random.integers(0, vocab_size, (vocab_size,) * level) for level in range(length)]
    drafts, weights = [], []
    for chain in itertools.product(range(vocab_size), repeat=length):
        if any(chain[node] != habit[node][chain[:node]] for node in certain):
            continue
        drafts.append(chain)
        sampled = [node for node in range(length) if node not in certain]
        weights.append(np.prod([np.exp(proposal[node][chain[: node + 1]]) for node in sampled]))
    law = np.asarray([-1 if node in certain else node for node in range(length)], np.int32)
    with jax.enable_x64(True):
        draft = types.draft(
            jnp.asarray(drafts, jnp.int32),
            trees.chain(length),
            log_probs=along_paths(np.asarray(drafts), proposal),
            law=jnp.broadcast_to(jnp.asarray(law), (len(drafts), length)),
            siblings=kinds.siblings(rule),
        )
        found = law_of_texts(verification.get(rule), draft, weights, target)
    wanted = np.ones(())
    for level in target:
        wanted = wanted[..., None] * np.exp(level)
    np.testing.assert_allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize("rule", _RULES)
def test_a_row_is_the_same_alone_and_in_a_batch(rule):
    draft, target = chain_draft(jax.random.key(13), rule=rule)
    length = jnp.arange(_BATCH, dtype=jnp.int32) % 11
    keys = request_keys(14, _BATCH)
    rule = verification.get(rule)
    whole = verify(rule, keys, length, draft, target)
    for row in range(8):
        one = slice(row, row + 1)
        few = dataclasses.replace(
            draft,
            tokens=draft.tokens[one],
            present=draft.present[one],
            log_probs=draft.log_probs[one],
            law=draft.law[one],
        )
        alone = verify(rule, keys[one], length[one], few, target[one])
        chex.assert_trees_all_equal(alone, jax.tree.map(lambda leaf, one=one: leaf[one], whole))
