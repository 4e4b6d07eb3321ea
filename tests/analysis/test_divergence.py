"""Where two decodes part, and by which gap of the logits."""

import jax
import jax.numpy as jnp
import pytest

from specjax import analysis, models
from specjax.models import recurrent


def table_model():
    return models.tabular_model(models.random_table(jax.random.key(8), 4, 2))


def test_equal_answers_do_not_diverge():
    assert analysis.first_divergence(table_model(), [1, 2], [3, 0, 1], (3, 0, 1)) is None


@pytest.mark.parametrize(
    "first, second, tokens",
    [
        ([3, 0], [3, 0, 2], (None, 2)),
        ([3, 0, 2], [3, 0], (2, None)),
    ],
)
def test_an_answer_that_ended_has_no_gap(first, second, tokens):
    found = analysis.first_divergence(table_model(), [1], first, second)
    assert found == analysis.Divergence(2, tokens, 0.0)


@pytest.mark.parametrize("prompt", [[1], [1, 2], [0, 3] * 70], ids=len)
def test_the_gap_is_that_of_the_logits_after_the_common_text(prompt):
    model = table_model()
    for first, second, position, last in (
        ([2, 0, 1], [2, 3, 1], 1, 2),
        ([0, 1], [1, 1], 0, prompt[-1]),
    ):
        found = analysis.first_divergence(model, prompt, first, second)
        assert found is not None
        assert (found.position, found.tokens) == (position, (first[position], second[position]))
        row = model.params[last]
        gap = abs(float(row[first[position]] - row[second[position]]))
        assert gap > 0.01
        assert found.logit_gap == pytest.approx(gap, rel=1e-6)


def test_the_gap_of_a_model_without_attention():
    params = recurrent.init_params(jax.random.key(9), 4, 5)
    model = recurrent.recurrent_model(params)
    text = [1, 0, 2, 3, 3, 1]
    state = jnp.zeros((1, 5))
    for one in text:
        state = jnp.tanh(state @ params["recurrence"] + params["embedding"][one][None])
    logits = (state @ params["head"])[0]
    found = analysis.first_divergence(model, text[:2], [*text[2:], 0], [*text[2:], 2])
    assert found is not None and found.position == 4
    assert found.logit_gap == pytest.approx(abs(float(logits[0] - logits[2])), rel=1e-5)
