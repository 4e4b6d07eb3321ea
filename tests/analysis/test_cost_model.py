"""The cost model against enumeration on tabular laws, closed forms, and limits that must agree."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from specjax import analysis, decoding, drafters, models, trees, types
from specjax.analysis import cost_model, practice, scoring, tuning

COST = decoding.Cost(0.1, ((1, 1.0), (2, 1.2), (4, 1.9)))


def everywhere(probabilities, depth):
    law = jnp.log(jnp.asarray(probabilities))
    return [jnp.tile(law, (len(probabilities) ** d, 1)) for d in range(depth)]


@pytest.mark.parametrize("length", [1, 2, 3])
def test_tokens_a_step_are_the_enumerated_expectation(length):
    """Laws without context at a total variation of 1 − α."""
    p, q = (0.5, 0.3, 0.2), (0.2, 0.3, 0.5)
    acceptance = sum(map(min, p, q))
    expected = analysis.expected_accepted(
        "token", trees.chain(length), everywhere(p, length + 1), everywhere(q, length)
    )
    found = cost_model.tokens_per_step(acceptance, length)
    assert found == pytest.approx(1 + float(expected), abs=1e-5)
    assert found == pytest.approx((1 - acceptance ** (length + 1)) / (1 - acceptance))


VOCAB, ENDING, LONGEST = 3, 2, 4
P, Q = np.random.default_rng(0).dirichlet([0.7] * VOCAB, (2, VOCAB + 1))


def is_over(answer):
    return len(answer) == LONGEST or ENDING in answer


def expected_steps(answer, length):
    """From here to the end, over every draft and every fate of it; the prompt ends in a 0."""
    if is_over(answer):
        return 0.0
    steps, accepted = 1.0, [(answer, 1.0)]
    for _ in range(length):
        longer = []
        for text, share in accepted:
            last = (0, *text)[-1]
            both = np.minimum(P[last], Q[last])
            # A refusal emits what is left of the target's law, and ends the step.
            for token, left in enumerate(P[last] - both):
                steps += share * left * expected_steps((*text, token), length)
            longer += [((*text, token), share * mass) for token, mass in enumerate(both)]
        accepted = [(text, share) for text, share in longer if not is_over(text)]
    for text, share in accepted:
        for token, mass in enumerate(P[(0, *text)[-1]]):
            steps += share * mass * expected_steps((*text, token), length)
    return steps


@pytest.mark.parametrize("length", [1, 2, 3])
def test_steps_of_texts_are_the_enumerated_expectation(length):
    """Laws that hang on the token before: every text of a decode, weighed by its law."""
    target, draft = (models.tabular_model(jnp.log(jnp.asarray(law))) for law in (P, Q))
    answers = [
        answer
        for size in range(1, LONGEST + 1)
        for answer in itertools.product(range(VOCAB), repeat=size)
        if is_over(answer) and not is_over(answer[:-1])
    ]
    weights = [np.prod([P[pair] for pair in itertools.pairwise((0, *a))]) for a in answers]
    texts = [([0], list(answer)) for answer in answers]
    scores = scoring.score(target, drafters.model(draft, 1), texts, types.Sampling(1.0))
    counts = scores.counts(length, "token")
    steps = expected_steps((), length)
    assert counts.steps @ weights == pytest.approx(steps, abs=1e-5)
    # And so is the speedup that the model makes of them.
    (option,) = tuning.options(scores, COST, (length,), "token")
    took = length * COST.draft + COST.of_pass(length + 1)
    assert option.speedup == pytest.approx(counts.tokens.sum() / (counts.steps.sum() * took))


def test_acceptance_by_position():
    assert cost_model.tokens_per_step([0.5, 0.2], 4) == pytest.approx(1 + 0.5 + 0.1 + 0.02 + 0.004)
    assert cost_model.tokens_per_step(0.7, 0) == 1
    assert cost_model.tokens_per_step(1.0, 5) == 6


def test_published_limits():
    """At v = 1: α = 0.8 gives 3.1 at c = 0.05, 1.9 at 0.2; α = 0.5 gives 1.6 at 0.05."""
    for acceptance, draft, speedup in ((0.8, 0.05, 3.1), (0.8, 0.2, 1.9), (0.5, 0.05, 1.6)):
        found = cost_model.best(acceptance, cost_model.free_width(draft))
        assert found.speedup == pytest.approx(speedup, abs=0.06)
        length = found.length
        tau = (1 - acceptance ** (length + 1)) / (1 - acceptance)
        assert found.speedup == pytest.approx(tau / (length * draft + 1))


def test_no_draft_where_none_pays():
    cost = decoding.Cost(0.5, ((1, 1.0), (2, 1.9), (4, 3.8)))
    assert cost_model.best(0.3, cost) == cost_model.Best(0, 1.0, 1.0)
    assert cost_model.best([0.9, 0.0], cost_model.free_width(0.05)).length == 1


def test_claims_beside_model_and_measurement():
    cost = decoding.Cost(0.1, ((1, 1.0), (9, 1.5)))
    points = {"code": (0.8, 1.9), "chat": (0.6, 1.6), "translation": (0.75, 3.5)}
    rows = {row["what"]: row for row in practice.compare(cost, points)}
    code = rows["code completion"]
    assert code["measured"] == {"code": [0.8, 1.9]}
    assert code["verdict"] == "acceptance holds, speedup lower here"
    assert rows["translation"]["verdict"] == "acceptance holds, speedup higher here"
    assert rows["open chat"]["verdict"] == "acceptance holds, speedup holds"
    assert rows["summarisation"]["verdict"] == "not measured"
    assert rows["in production"]["verdict"] == "speedup holds for 2 of 3"
    assert rows["acceptance of 80 %"]["measured"].keys() == {"code", "translation"}
    # 0.5 is not below 0.5 by as much as 0.05.
    points = {"qa": (0.52, 1.4)}
    (below,) = (
        row for row in practice.compare(None, points) if row["what"] == "acceptance below 50 %"
    )
    assert below["verdict"] == "not measured"
    low, high = rows["acceptance of 80 %"]["ideal"]
    np.testing.assert_allclose([low, high], [1.9, 3.1], atol=0.06)
    low, high = code["machine"]
    assert low == cost_model.best(0.75, cost).speedup < high == cost_model.best(0.85, cost).speedup
    assert all(row["machine"] is None for row in practice.compare(None, {}))
    text = practice.markdown(list(rows.values()))
    assert "| code completion | practitioners' guides | 0.75 … 0.85 | 2.50 … 3.50 |" in text
    assert "code α 0.80: 1.90×" in text
