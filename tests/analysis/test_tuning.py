"""Predicted speedups against hand arithmetic, on scores that are known."""

import jax.numpy as jnp
import numpy as np
import pytest

from specjax import decoding, trees, types
from specjax.analysis import scoring, tuning


def scores_of(accepted, refused, tree):
    """One text of deterministic drafts, of which so many levels agree from each place on."""
    count = len(accepted)
    form = types.draft(jnp.zeros((1, tree.size), jnp.int32), tree, vocab_size=9)
    column = [np.zeros(count, np.float32)]
    accepted, refused = [np.asarray(accepted)], [np.asarray(refused)]
    return scoring.Scores(column, column, column, column, column, accepted, refused, form, 0.0)


COST = decoding.Cost(0.1, ((1, 0.9), (2, 1.2), (3, 1.4), (4, 1.9)), overhead=0.05)


def test_steps_without_a_draft_are_plain_ones():
    """Six tokens: a draft of which two are right, then three places where nothing is found."""
    scores = scores_of([2, 1, 0, 0, 0, 0], [True, True, True, False, False, False], trees.chain(3))
    found = {option.length: option for option in tuning.options(scores, COST, (1, 2, 3, 9))}
    assert found.keys() == {1, 2, 3}
    # K = 2: tokens 0, 1, 2 in one wide step, then 3, 4, 5 in narrow ones; all of them look.
    took = 4 * 2 * 0.1 + (1.4 + 2 * 0.05) + 3 * 1.0
    assert found[2].tau == pytest.approx(6 / 4)
    assert found[2].acceptance_rate == 1
    assert found[2].speedup == pytest.approx(6 / took)
    # K = 3: the third draft is tested and refused.
    assert found[3].acceptance_rate == pytest.approx(2 / 3)
    assert found[3].speedup == pytest.approx(6 / (4 * 0.3 + (1.9 + 3 * 0.05) + 3.0))
    # K = 1: tokens 0 and 1, then the draft of token 2 is refused, then narrow steps.
    assert found[1].speedup == pytest.approx(6 / (5 * 0.1 + 2 * 1.25 + 3 * 1.0))
    # Of two rows both must miss: 9 of 16 steps instead of 3 of 4.
    (two,) = tuning.options(scores, COST, (2,), batch=2)
    narrow = 4 * (3 / 4) ** 2
    assert two.speedup == pytest.approx(6 / (4 * 0.2 + (4 - narrow) * 1.5 + narrow * 1.0))


def test_a_tree_has_one_depth_and_its_width():
    tree = trees.from_parents((0, 0, 1))
    (option,) = tuning.options(scores_of([2, 0, 0], [True] * 3, tree), COST, (1, 2, 3))
    assert option.length == 2
    assert option.speedup == pytest.approx(3 / (0.2 + 1.9 + 3 * 0.05))
