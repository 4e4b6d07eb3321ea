"""The rules: solvable oracles, limits, gradients, edges of probability 0, and what is drawn."""

import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import analysis, sampling, trees, types, verification
from specjax.verification import block, kernel, match, token

_RULES = sorted(verification.RULES)
_RATIO = ["block", "token"]
# One shape for most tests: they share compiled programs.
_BATCH, _LENGTH, _VOCABULARY = 256, 4, 4

verify = jax.jit(kernel.verify, static_argnums=0)
outcome_law = jax.jit(analysis.outcome_law, static_argnums=0)
draw_target = jax.jit(sampling.draw_target)


def context_free(law, depth):
    """The conditional law of independent tokens."""
    law = jnp.log(jnp.asarray(law, jnp.float32))
    return [jnp.broadcast_to(law, (law.shape[0] ** level, law.shape[0])) for level in range(depth)]


def accepted(rule, target, proposal, length):
    tree = trees.chain(length)
    certificate = analysis.certify(rule, tree, target, proposal)
    assert certificate.passed, certificate
    return certificate.expected_accepted


def laws(key, shape, sharpness=2.0):
    """Random laws with some tokens impossible."""
    values, mask = jax.random.split(key)
    logits = sharpness * jax.random.normal(values, shape)
    possible = jax.random.bernoulli(mask, 0.7, shape).at[..., 0].set(True)
    return jax.nn.log_softmax(jnp.where(possible, logits, -jnp.inf), axis=-1)


def chain_draft(key, batch=_BATCH, length=_LENGTH, vocab_size=_VOCABULARY):
    """A chain whose tokens are drawn from random laws, and a random target."""
    first, second, third = jax.random.split(key, 3)
    log_probs = laws(first, (batch, length + 1, vocab_size))
    target = laws(second, (batch, length + 1, vocab_size))
    tokens = jax.random.categorical(third, log_probs[:, :length]).astype(jnp.int32)
    return types.draft(tokens, trees.chain(length), log_probs=log_probs), target


def request_keys(seed, batch):
    return jax.random.split(jax.random.key(seed), batch)


# Oracles.


@pytest.mark.parametrize(
    "rule, expected", [("token", 10 / 9), ("block", 11 / 9), ("match", 52 / 81)]
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
        jnp.full((1, 2), 2, jnp.int32), trees.chain(2), log_probs=jnp.stack([proposal[0]] * 3, 1)
    )
    law = outcome_law(verification.get(rule), draft, jnp.stack([target[0]] * 3, axis=1))
    np.testing.assert_allclose(law[0], [[0.3, 0.7, 0], [0, 0, 0], [0, 0, 0]], atol=1e-6)


def test_block_is_token_for_one_draft():
    draft, target = chain_draft(jax.random.key(1), 64, 1, 5)
    chex.assert_trees_all_close(
        outcome_law(block.rule, draft, target),
        outcome_law(token.rule, draft, target),
        atol=1e-6,
    )


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


@pytest.mark.parametrize("rule", _RULES)
def test_at_temperature_0_the_text_is_greedy(rule):
    draft, target = chain_draft(jax.random.key(2))
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
    draft, target = chain_draft(jax.random.key(4), 32, 3, 4)
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
            draft = types.draft(tokens, trees.chain(3), log_probs=log_probs)
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
    draft, target = chain_draft(jax.random.key(7))
    present = jnp.arange(_LENGTH)[None] < jnp.arange(_BATCH)[:, None] % 5
    draft = types.draft(draft.tokens, draft.tree, log_probs=draft.log_probs, present=present)
    rule = verification.get(rule)
    # Nearly equal laws too: rounding must not take an acceptance beyond 1.
    noise = 1e-6 * jax.random.normal(jax.random.key(19), target.shape)
    near = jax.nn.log_softmax(draft.log_probs + noise, axis=-1)
    target = jnp.where(jnp.arange(_BATCH)[:, None, None] % 2 == 0, target, near)
    accept = jax.jit(rule.accept)(draft, target)
    assert accept.shape == draft.tokens.shape
    assert jnp.all((accept >= 0) & (accept <= 1))
    assert jnp.all(jnp.where(draft.present, 0.0, accept) == 0)
    total = jnp.sum(outcome_law(rule, draft, target), axis=(1, 2))
    np.testing.assert_allclose(total, np.ones(_BATCH), atol=1e-5)
    for node in range(_LENGTH + 1):
        residual = jax.jit(rule.residual)(draft, target, jnp.full((_BATCH,), node, jnp.int32))
        np.testing.assert_allclose(jnp.sum(jnp.exp(residual), axis=-1), np.ones(_BATCH), atol=1e-5)


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
    accept = rule.accept(draft, jnp.repeat(p, 2, axis=1))
    np.testing.assert_allclose(accept, [[expected]], rtol=1e-6)
    residual = rule.residual(draft, jnp.repeat(p, 2, axis=1), jnp.zeros((1,), jnp.int32))
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
        verdict = patched(request_keys(8, len(cases)), length, draft, rows[0])
        np.testing.assert_array_equal(verdict.count, np.zeros(len(cases)))
        chosen = jnp.take_along_axis(p, verdict.next_token[:, None], axis=1)
        assert jnp.all(chosen > -jnp.inf)


@pytest.mark.parametrize("rule", _RATIO)
def test_a_draft_that_a_rule_cannot_take_is_refused_with_a_remedy(rule):
    tokens = jnp.zeros((1, 2), jnp.int32)
    target = jnp.full((1, 3, 4), -jnp.log(4.0))
    length = jnp.ones((1,), jnp.int32)
    deterministic = types.draft(tokens, trees.chain(2), vocab_size=4)
    tree = types.draft(tokens, trees.branching((2,)), log_probs=target)
    traced = trees.dynamic(jnp.asarray([[0, 1]], jnp.int32), 2)
    for draft in (deterministic, tree, types.draft(tokens, traced, log_probs=target)):
        with pytest.raises(ValueError, match="use rule='match'"):
            kernel.verify(verification.get(rule), request_keys(0, 1), length, draft, target)
        assert verification.default_rule(draft) is match.rule
        kernel.verify(match.rule, request_keys(0, 1), length, draft, target)


@pytest.mark.parametrize("rule", ["token", "block"])
def test_drafts_coupled_to_the_target_are_refused(rule):
    draft = dataclasses.replace(chain_draft(jax.random.key(0))[0], siblings="coupled")
    with pytest.raises(ValueError, match=f"rule '{rule}': .* coupled .* rule='match'"):
        verification.check(verification.get(rule), draft)


def test_rules_by_name():
    chain = types.draft(
        jnp.zeros((1, 2), jnp.int32), trees.chain(2), log_probs=jnp.zeros((1, 3, 4))
    )
    assert verification.default_rule(chain) is block.rule
    assert verification.get("token") is token.rule
    assert verification.get(token.rule) is token.rule
    with pytest.raises(ValueError, match="'tokens'.*block, match, token"):
        verification.get("tokens")


# Absent and deterministic nodes.


@pytest.mark.parametrize("rule", _RULES)
def test_a_shortened_chain_is_the_shorter_chain(rule):
    length = _LENGTH
    whole, target = chain_draft(jax.random.key(9))
    shown = jnp.arange(_BATCH) % (length + 1)
    draft = types.draft(
        whole.tokens,
        whole.tree,
        log_probs=whole.log_probs,
        present=jnp.arange(length)[None] < shown[:, None],
    )
    rule = verification.get(rule)
    law = outcome_law(rule, draft, target)
    for short in range(length + 1):
        rows = np.flatnonzero(np.asarray(shown) == short)
        assert jnp.all(law[rows, short + 1 :] == 0)
        if short == 0:
            np.testing.assert_allclose(law[rows, 0], jnp.exp(target[rows, 0]), atol=1e-6)
            continue
        tokens, laws = whole.tokens[:, :short], whole.log_probs[:, : short + 1]
        alone = types.draft(tokens, trees.chain(short), log_probs=laws)
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
        )
        found = law_of_texts(verification.get(rule), draft, weights, target)
    wanted = np.ones(())
    for level in target:
        wanted = wanted[..., None] * np.exp(level)
    np.testing.assert_allclose(found, wanted, atol=1e-12)


# Programs.


class VerifyTest(chex.TestCase):
    """`verify` as every kind of program."""

    @chex.all_variants
    def test_every_program_gives_the_same_verdict(self):
        draft, target = chain_draft(jax.random.key(11))
        length = jnp.arange(_BATCH, dtype=jnp.int32)
        keys = request_keys(12, _BATCH)
        for name in _RULES:

            def verdict(keys, length, draft, target, name=name):
                return kernel.verify(verification.get(name), keys, length, draft, target)

            expected = verify(verification.get(name), keys, length, draft, target)
            found = self.variant(verdict)(keys, length, draft, target)
            chex.assert_trees_all_equal(found, expected)


@pytest.mark.parametrize("rule", _RULES)
def test_values_do_not_recompile(rule):
    @jax.jit
    @chex.assert_max_traces(n=1)
    def verdict(keys, length, draft, target):
        return kernel.verify(verification.get(rule), keys, length, draft, target)

    for seed in range(3):
        draft, target = chain_draft(jax.random.key(seed), 4, 2, 3)
        draft = dataclasses.replace(draft, present=draft.present.at[seed].set(False))
        verdict(request_keys(seed, 4), jnp.full((4,), seed, jnp.int32), draft, target)


@pytest.mark.parametrize("rule", _RULES)
def test_a_row_is_the_same_alone_and_in_a_batch(rule):
    draft, target = chain_draft(jax.random.key(13))
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


# Draws.


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
        total += np.asarray(counts(request_keys(seed, batch)))
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
    keys = request_keys(16, batch)
    length = jnp.asarray([3, 1, 4, 1, 5, 9], jnp.int32)
    target = laws(jax.random.key(17), (batch, tree.size + 1, vocab_size), sharpness=1.0)
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
