"""The cost model against enumeration on tabular laws, closed forms, and limits that must agree."""

import jax.numpy as jnp
import numpy as np
import pytest

from specjax import analysis, decoding, trees
from specjax.analysis import cost_model, practice


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
    low, high = rows["acceptance of 80 %"]["ideal"]
    np.testing.assert_allclose([low, high], [1.9, 3.1], atol=0.06)
    low, high = code["machine"]
    assert low == cost_model.best(0.75, cost).speedup < high == cost_model.best(0.85, cost).speedup
    assert all(row["machine"] is None for row in practice.compare(None, {}))
    text = practice.markdown(list(rows.values()))
    assert "| code completion | practitioners' guides | 0.75 … 0.85 | 2.50 … 3.50 |" in text
    assert "code α 0.80: 1.90×" in text
