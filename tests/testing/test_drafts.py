"""Complaints about drafts on the host, and how sure they are."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from specjax import trees, types
from specjax.testing import chance, drafts


def draft():
    """Two rows of two siblings and a grandchild; numpy's leaves."""
    laws = jnp.log(jnp.asarray([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5], [1.0, 0.0, 0.0]], jnp.float32))
    made = types.draft(
        jnp.asarray([[0, 1, 2], [1, 1, 0]], jnp.int32),
        trees.from_parents((0, 0, 1)),
        log_probs=jnp.stack([laws, laws]),
        present=jnp.asarray([[True, True, True], [True, False, True]]),
    )
    arrays = ("tokens", "present", "log_probs", "law")
    return dataclasses.replace(made, **{name: np.asarray(getattr(made, name)) for name in arrays})


def test_a_sound_draft_has_no_fault():
    assert drafts.fault(draft(), 3, 1e-5) is None


@pytest.mark.parametrize(
    "name, changed, complaint",
    [
        ("tokens", np.zeros((2, 3), np.int64), "tokens are int64[2, 3], not int32[2, 3]"),
        ("present", np.ones((2, 3), np.int32), "present are int32[2, 3], not bool[2, 3]"),
        ("law", np.zeros((1, 3), np.int32), "law are int32[1, 3], not int32[2, 3]"),
        ("log_probs", np.zeros((2, 3, 4)), "shape (2, 3, 4), not [B, R, V] with V=3"),
    ],
)
def test_wrong_forms_are_named(name, changed, complaint):
    found = drafts.fault(dataclasses.replace(draft(), **{name: changed}), 3, 1e-5)
    assert found is not None and complaint in found


@pytest.mark.parametrize(
    "name, place, value, complaint",
    [
        ("tokens", (0, 1), 0, "node 2 is token 0, not 1"),
        ("tokens", (1, 1), 0, None),  # an absent node
        ("present", (0, 2), False, "node 3 is absent, not present"),
        ("law", (0, 2), -1, "node 3 is deterministic, not drawn from a law"),
        ("log_probs", (0, 1, 0), np.log(0.6), "the law of node 3 differs by 0.4 (tolerance 0.1)"),
        ("log_probs", (0, 1, 0), np.log(0.25), None),
        ("log_probs", (0, 2, 0), -1.0, None),  # a law that no node names
    ],
)
def test_differences_are_told(name, place, value, complaint):
    changed = getattr(draft(), name).copy()
    changed[place] = value
    found = dataclasses.replace(draft(), **{name: changed})
    row = place[0]
    assert drafts.difference(found, row, draft(), row, 0.1) == complaint
    assert drafts.difference(found, 1 - row, draft(), 1 - row, 0.1) is None


def test_a_sibling_may_decide_only_where_siblings_are_distinct():
    """Node 2 is present in the first row alone, after another first sibling."""
    rows = dataclasses.replace(
        draft(),
        tokens=np.asarray([[0, 1, 2], [1, 2, 0]], np.int32),
        present=np.asarray([[True, True, False], [True, False, False]]),
    )
    found = drafts.hidden_choice(rows, 1)
    assert found is not None and "node 2 is present as token 1 and absent as token 2" in found
    assert drafts.hidden_choice(dataclasses.replace(rows, siblings="distinct"), 1) is None


def test_what_cannot_happen_is_an_infinite_surprise():
    counts, expected = np.asarray([1, 0]), np.zeros(2)
    np.testing.assert_array_equal(chance.surprise(counts, expected, expected), [np.inf, 0])


def test_other_parents_are_a_difference():
    other = dataclasses.replace(draft(), tree=trees.from_parents((0, 0, 2)))
    assert drafts.difference(other, 0, draft(), 0, 0.1) == "node 3 has parent 2, not 1"


@pytest.mark.parametrize("probability", [0.01, 0.3, 0.9])
def test_surprise_is_never_more_than_the_tail_allows(probability):
    """By the exact tails of a binomial; and counts far off are beyond the limit."""
    draws = 1024
    counts = np.arange(draws + 1)
    expected = np.full(counts.shape, draws * probability)
    surprise = chance.surprise(counts, expected, expected * (1 - probability))
    law = stats.binom(draws, probability)
    tail = np.where(counts < expected, law.cdf(counts), law.sf(counts - 1))
    with np.errstate(divide="ignore"):
        assert np.all(surprise <= -np.log(tail) + 1e-6)
    assert np.all(surprise[np.abs(counts - expected) > 0.2 * draws] > chance.LIMIT)
