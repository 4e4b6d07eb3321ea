"""The certificate passes for lossless rules and fails for the mistakes that others have made."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import analysis, trees, types, verification
from specjax.verification import block, k_seq, kernel, match, multi_candidate, token
from specjax.verification.rounds import reject
from tests.verification import kinds

_RULES = sorted(verification.RULES)
# Three siblings, of which the first two may be alike.
_RAGGED = trees.from_parents((0, 0, 1, 1, 1, 5))


def random_laws(seed, depth, concentration=1.0, vocab_size=3, dtype=jnp.float32):
    """A target of depth + 1 entries and a proposal of depth."""
    first, second = jax.random.split(jax.random.key(seed))
    return (
        analysis.random_law(first, vocab_size, depth + 1, concentration, dtype),
        analysis.random_law(second, vocab_size, depth, concentration, dtype),
    )


# Passes.


@pytest.mark.parametrize(
    "vocab_size, length, dtype",
    [
        (2, 1, "float32"),
        (3, 2, "float32"),
        (3, 3, "float32"),
        (2, 3, "float64"),
        (3, 3, "float64"),
    ],
)
@pytest.mark.parametrize("rule", _RULES)
def test_rules_are_exact_on_chains(rule, vocab_size, length, dtype):
    with jax.enable_x64(dtype == "float64"):
        for seed, concentration in enumerate((0.2, 1.0, 5.0)):
            laws = random_laws(seed, length, concentration, vocab_size, dtype)
            siblings = kinds.siblings(rule)
            certificate = analysis.certify(rule, trees.chain(length), *laws, siblings=siblings)
            assert certificate.passed, certificate
            assert certificate.expected_accepted <= certificate.bound + 1e-6
            assert certificate.dtype == dtype
            assert max(certificate.error, certificate.walk_error) < {"float32": 1e-6}.get(
                dtype, 1e-12
            )
            assert (certificate.nodes, certificate.vocab_size) == (length, vocab_size)
            assert 0 < certificate.expected_accepted < length


@pytest.mark.parametrize("rule", _RULES)
def test_stopping_early_by_the_prefix_is_exact(rule):
    """Every pattern of stops at the root and after one token, some after two."""
    laws = random_laws(3, 3)
    random = np.random.default_rng(0)
    accepted = []
    for after_one in itertools.product([False, True], repeat=3):
        absent = [np.zeros(1, bool), np.asarray(after_one), random.random(9) < 0.5]
        siblings = kinds.siblings(rule)
        certificate = analysis.certify(
            rule, trees.chain(3), *laws, siblings=siblings, absent=absent
        )
        assert certificate.passed, certificate
        accepted.append(certificate.expected_accepted)
    assert np.argmin(accepted) == 7
    nothing = [np.ones(1, bool), np.zeros(3, bool), np.zeros(9, bool)]
    certificate = analysis.certify(
        rule, trees.chain(3), *laws, siblings=kinds.siblings(rule), absent=nothing
    )
    assert certificate.passed and certificate.expected_accepted == 0


@pytest.mark.parametrize("tree", [trees.branching((2, 2)), _RAGGED], ids=["branching", "ragged"])
@pytest.mark.parametrize("kind", ["sampled", "deterministic"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_match_is_exact_on_trees(tree, kind, dtype):
    with jax.enable_x64(dtype == "float64"):
        for seed, concentration in enumerate((0.2, 1.0, 5.0)):
            laws = random_laws(seed, tree.max_depth, concentration, dtype=dtype)
            proposals = [laws[1]] if kind == "sampled" else []
            certificate = analysis.certify("match", tree, laws[0], *proposals)
            assert certificate.passed, certificate
            assert certificate.dtype == dtype
            assert (certificate.nodes, certificate.vocab_size) == (6, 3)
            assert certificate.expected_accepted > 0


def test_match_is_exact_for_each_deterministic_draft():
    laws = random_laws(6, 3)
    certificate = analysis.certify("match", trees.chain(3), laws[0])
    assert certificate.passed, certificate


def test_a_dynamic_tree_and_laws_of_the_wrong_length_are_refused():
    laws = random_laws(7, 2)
    traced = trees.dynamic(jnp.asarray([[0, 1]], jnp.int32), 2)
    with pytest.raises(ValueError, match="static tree"):
        analysis.certify("match", traced, *laws)
    with pytest.raises(ValueError, match="3 entries and proposals of 2, got 2 and .2"):
        analysis.certify("match", trees.chain(2), laws[0][:2], laws[1])
    with pytest.raises(ValueError, match="got 3 and .1"):
        analysis.certify("match", trees.chain(2), laws[0], laws[1][:1])
    with pytest.raises(ValueError, match="rule='match'"):
        analysis.certify("token", trees.chain(2), laws[0])
    with pytest.raises(verification.RefusedDraftError, match="from several laws"):
        # Two certain siblings and a drawn one: three laws, none of them k_seq's.
        tree = trees.from_parents((0, 0, 0))
        analysis.certify("k_seq", tree, laws[0][:2], laws[1][:1], sources=[-1, -1, 0])
    with pytest.raises(ValueError, match="none of them is deterministic"):
        analysis.certify(
            "match", trees.branching((2, 1)), *laws, sources=[-1, 0, 0, 0], siblings="distinct"
        )
    with pytest.raises(ValueError, match="unknown rule 'tokn'"):
        analysis.certify("tokn", trees.chain(2), *laws)


def test_a_certificate_of_nan_has_not_passed():
    nan = float("nan")
    good = analysis.Certificate("token", 1, 2, "float32", 0.0, 0.0, 0.0, 0.0, 0.0)
    assert good.passed
    assert not dataclasses.replace(good, error=nan).passed
    assert not dataclasses.replace(good, walk_error=nan).passed


@pytest.mark.parametrize("rule", ["match", "multi_candidate", "k_seq", "traversal"])
def test_rules_are_exact_on_dynamic_trees(rule):
    laws = random_laws(8, 2)
    certificate = analysis.certify(rule, trees.from_parents((0, 0, 1)), *laws, traced=True)
    assert certificate.passed, certificate


def test_a_number_for_drafts_that_a_rule_refuses_is_none():
    tree, laws = trees.branching((2,)), random_laws(9, 1)
    with pytest.raises(verification.RefusedDraftError, match="verifies chains"):
        analysis.expected_accepted("block", tree, *laws)


# Planted mistakes.


def mistaken(right, *, accept=None, residual=None):
    return types.VerificationRule(
        "mistaken", right.check, accept or right.accept, residual or right.residual
    )


def fails(rule, tree, several, least, most=1.0, **options):
    """The certificate fails, and the worst law is wrong by at least this much."""
    certificates = [analysis.certify(rule, tree, *laws, **options) for laws in several]
    worst = max(certificates, key=lambda certificate: certificate.total_variation)
    assert not worst.passed
    assert least < worst.total_variation < most, worst


def several(depth, count=4):
    return [random_laws(seed, depth) for seed in range(count)]


def test_block_with_the_residual_of_token_fails():
    wrong = mistaken(block.rule, residual=token.residual)
    fails(wrong, trees.chain(2), several(2, 12), 0.005)


def test_the_criterion_of_token_with_the_residual_of_block_fails():
    wrong = mistaken(token.rule, residual=block.residual)
    fails(wrong, trees.chain(2), several(2), 0.005)


def test_both_agree_where_there_is_one_draft():
    laws = random_laws(0, 1)
    assert analysis.certify(
        mistaken(block.rule, residual=token.residual), trees.chain(1), *laws
    ).passed


@pytest.mark.parametrize("right", [token.rule, block.rule], ids=["token", "block"])
def test_a_bonus_token_from_the_unwarped_law_fails(right):
    """After full acceptance the law must be warped too: here the temperature is missing."""

    def residual(draft, target, node):
        last = node[:, None] == draft.tree.size
        unwarped = jax.nn.log_softmax(0.6 * target[:, -1], axis=-1)
        return jnp.where(last, unwarped, right.residual(draft, target, node))

    fails(mistaken(right, residual=residual), trees.chain(2), several(2), 0.02)


def test_an_argmax_draft_read_as_a_sample_of_its_softmax_fails():
    """The drafts are certain, yet accepted by the law that their argmax was taken from."""
    softmax = jnp.log(jnp.asarray([0.2, 0.5, 0.3]))
    target = jnp.log(jnp.asarray([0.4, 0.35, 0.25]))
    argmax = jnp.log(jnp.asarray([0.0, 1.0, 0.0]))

    def confused(draft):
        laws = jnp.broadcast_to(softmax[None, None], draft.log_probs.shape)
        return draft.replace(log_probs=laws)

    wrong = mistaken(
        token.rule,
        accept=lambda draft, target: token.accept(confused(draft), target),
        residual=lambda draft, target, node: token.residual(confused(draft), target, node),
    )
    laws = [[target[None], jnp.repeat(target[None], 3, axis=0)], [argmax[None]]]
    assert analysis.certify("token", trees.chain(1), *laws).passed
    fails(wrong, trees.chain(1), [laws], 0.1)


@pytest.mark.parametrize("kind", ["signed", "absolute", "target"])
def test_a_residual_that_is_not_the_clipped_difference_fails(kind):
    def residual(draft, target, node):
        law = jnp.exp(jnp.take_along_axis(target, node[:, None, None], axis=1)[:, 0])
        proposal = jnp.exp(kernel.draft_law(draft, jnp.minimum(node + 1, draft.tree.size)))
        if kind == "signed":
            left = law - proposal
        elif kind == "absolute":
            left = jnp.abs(law - proposal)
        else:
            left = law
        left = jnp.log(left / jnp.sum(left, axis=-1, keepdims=True))
        return jnp.where(node[:, None] == draft.tree.size, jnp.log(law), left)

    certificate = analysis.certify(
        mistaken(token.rule, residual=residual), trees.chain(1), *random_laws(2, 1)
    )
    assert not certificate.passed
    # The logarithm of a negative share is not a number, and no certificate either.
    assert np.isnan(certificate.error) if kind == "signed" else certificate.total_variation > 0.02


def test_accepting_by_the_inverse_ratio_fails():
    def accept(draft, target):
        return jnp.exp(jnp.minimum(-token.log_ratio(draft, target), 0.0))

    fails(mistaken(token.rule, accept=accept), trees.chain(1), several(1), 0.05)


@pytest.mark.parametrize("right", [token.rule, block.rule], ids=["token", "block"])
def test_dropping_a_drawn_token_by_its_own_probability_fails(right):
    def dropped(draft):
        confident = kernel.node_log_probs(draft) > np.log(0.3)
        present = jnp.cumprod((draft.present & confident).astype(jnp.int32), axis=1) > 0
        return draft.replace(present=present)

    wrong = mistaken(
        right,
        accept=lambda draft, target: right.accept(dropped(draft), target),
        residual=lambda draft, target, node: right.residual(dropped(draft), target, node),
    )
    fails(wrong, trees.chain(2), several(2), 0.04, 0.3)


def test_pruning_drawn_siblings_by_confidence_fails():
    right = multi_candidate.rule

    def pruned(draft):
        confident = kernel.node_log_probs(draft) > np.log(0.3)
        return draft.replace(present=draft.present & confident)

    wrong = dataclasses.replace(
        right,
        accept=lambda draft, target, state: right.accept(pruned(draft), target, state),
        residual=lambda draft, target, *given: right.residual(pruned(draft), target, *given),
        prepare=lambda draft, target: reject(pruned(draft), target),
    )
    fails(wrong, trees.branching((2,)), several(1), 0.04)


def test_k_seq_over_distinct_siblings_fails():
    """Its factor ρ is that of independent draws; the rule refuses such drafts."""
    unchecked = dataclasses.replace(k_seq.rule, check=lambda draft: None)
    fails(unchecked, trees.branching((2,)), several(1), 0.01, siblings="distinct")
    with pytest.raises(ValueError, match="this draft's are distinct"):
        analysis.certify("k_seq", trees.branching((2,)), *random_laws(0, 1), siblings="distinct")


def rounds(draft, target):
    """SpecInfer's rounds for two siblings: what is left of the target's law after each, and q."""
    p = jnp.exp(target[:, 0])
    q = jnp.exp(draft.log_probs[:, 0])
    left = [p]
    for _ in range(2):
        gap = jnp.maximum(left[-1] - q, 0.0)
        left.append(gap / jnp.sum(gap, axis=-1, keepdims=True))
    return left, q


def ratios(draft, target):
    left, q = rounds(draft, target)

    def ratio(law, drafted):
        both = [jnp.take_along_axis(x, drafted[:, None], axis=1)[:, 0] for x in (law, q)]
        return jnp.minimum(both[0] / both[1], 1.0)

    return [
        [ratio(left[number], draft.tokens[:, node]) for node in range(2)] for number in range(2)
    ]


def siblings_accept(draft, target):
    table = ratios(draft, target)
    return jnp.stack([table[0][0], table[1][1]], axis=1)


def siblings_residual(draft, target, node):
    last = jnp.log(rounds(draft, target)[0][2])
    here = jnp.take_along_axis(target, node[:, None, None], axis=1)[:, 0]
    return jnp.where(node[:, None] == 0, last, here)


def skipping_accept(draft, target):
    accept = siblings_accept(draft, target)
    again = draft.tokens[:, 0] == draft.tokens[:, 1]
    return accept.at[:, 1].set(jnp.where(again, 0.0, accept[:, 1]))


def skipping_residual(draft, target, node):
    again = (draft.tokens[:, 0] == draft.tokens[:, 1])[:, None] & (node[:, None] == 0)
    once = jnp.log(rounds(draft, target)[0][1])
    return jnp.where(again, once, siblings_residual(draft, target, node))


def sorted_accept(draft, target):
    """The likelier sibling is tried first; conditional on index order, as a rule must give it."""
    table = ratios(draft, target)
    q = kernel.node_log_probs(draft)
    in_order = q[:, 0] >= q[:, 1]
    first = jnp.where(in_order, table[0][0], (1 - table[0][1]) * table[1][0])
    second = jnp.where(in_order, (1 - table[0][0]) * table[1][1], table[0][1])
    return jnp.stack(
        [first, jnp.where(first < 1, second / jnp.where(first < 1, 1 - first, 1), 0)], 1
    )


_SIBLINGS = types.VerificationRule(
    "siblings", lambda draft: None, siblings_accept, siblings_residual
)


def test_rounds_over_independent_siblings_are_exact():
    for seed in range(3):
        certificate = analysis.certify(_SIBLINGS, trees.branching((2,)), *random_laws(seed, 1))
        assert certificate.passed, certificate


def test_skipping_a_duplicate_among_siblings_fails():
    wrong = mistaken(_SIBLINGS, accept=skipping_accept, residual=skipping_residual)
    fails(wrong, trees.branching((2,)), several(1), 0.005)


def test_trying_siblings_in_sorted_order_fails():
    wrong = mistaken(_SIBLINGS, accept=sorted_accept)
    fails(wrong, trees.branching((2,)), several(1), 0.02)


def test_independent_draws_for_one_shared_node_fail():
    """Each sibling meets a draw of its own, as if its parent were drawn twice."""

    def accept(draft, target):
        return jnp.where(draft.present, jnp.exp(kernel.parent_laws(draft, target)), 0.0)

    fails(mistaken(match.rule, accept=accept), trees.branching((2,)), several(1), 0.02)


def test_an_acceptance_that_is_not_that_of_the_draws_is_seen_in_the_walk():
    """The draws are right, the stated probability is not: duplicates counted twice."""

    def accept(draft, target):
        probability = jnp.exp(kernel.parent_laws(draft, target))
        taken = jnp.pad(probability[:, :1], ((0, 0), (1, 0)))
        return probability / jnp.maximum(1 - taken, probability)

    wrong = dataclasses.replace(match.rule, accept=accept)
    certificate = analysis.certify(wrong, trees.branching((2,)), *random_laws(0, 1))
    assert not certificate.passed
    assert certificate.walk_error > 0.02
