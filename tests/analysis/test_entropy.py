"""Acceptance by entropy: what counts as accepted, and rates over units, on sums made by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from specjax import trees, types
from specjax.analysis import entropy, scoring

FLOATS = np.full(4, 0.05, np.float32)


def scores_of(form, overlap, accepted, refused):
    """One text of four places, in the lowest bin."""
    column = [FLOATS]
    flags = [np.asarray(accepted)], [np.asarray(refused)]
    overlap = [np.asarray(overlap, np.float32)]
    return scoring.Scores(overlap, column, column, column, column, *flags, form, 0.0)


def test_any_guess_counts_of_a_tree_and_the_law_of_a_chain():
    """Of four places: the second guess is right, none is, nothing was drafted, and the last."""
    nan, nodes = np.nan, jnp.zeros((1, 2), jnp.int32)
    law = jnp.log(jnp.full((1, 2, 9), 1 / 9))
    seen = ([0.0, 0.0, nan, 1.0], [1, 0, 0, 1], [False, True, False, False])
    tree = types.draft(nodes, trees.from_parents((0, 0)), vocab_size=9)
    found = entropy.of_text(scores_of(tree, *seen), 0)
    assert found.keys() == {"target"}
    assert (found["target"][0][0], found["target"][1][0]) == (3, 2.0)
    chain = types.draft(nodes, trees.chain(2), log_probs=law)
    found = entropy.of_text(scores_of(chain, [0.5, 0.25, nan, 0.0], *seen[1:]), 0)
    assert found.keys() == {"target", "draft"}
    assert (found["draft"][0][0], found["draft"][1][0]) == (3, 0.75)


def test_rates_by_entropy_are_of_units():
    """Turns of one conversation are one unit; a copy has no law of its own."""

    def bins(places, accepted):
        rest = [0] * (len(entropy.EDGES) - 2)
        return ([places, *rest], [accepted, *map(float, rest)])

    turns = [{"target": bins(1, 1.0)}, {"target": bins(3, 1.0), "draft": bins(2, 1.0)}]
    found = entropy.rates([turns, [{"target": bins(4, 2.0)}], [{}]])
    assert found.keys() == {"target", "draft"}
    assert found["target"][0].estimate == pytest.approx(4 / 8)
    assert found["draft"][0].estimate == pytest.approx(1 / 2)
    assert np.isnan(found["target"][1].estimate)
    many = entropy.rates([[{"target": bins(1, rate)}] for rate in (0.0, 0.2, 0.4, 0.6, 0.8)])
    one = many["target"][0]
    assert one.estimate == pytest.approx(0.4)
    assert 0 < one.low < one.estimate < one.high < 0.8
    assert not entropy.rates([[{}]])
