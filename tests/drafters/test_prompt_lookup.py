"""Prompt lookup, against a slow search with plain lists."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specjax import drafters, models, types

_CAPACITY = 20
_LENGTH = 5
_TARGET = models.tabular_model(jnp.zeros((4,)))


def slow_lookup(text, length, shortest, longest):
    """The draft of one text, or None."""
    best, where = 0, None
    for end in range(len(text) - 1):
        matched = 0
        while matched < min(longest, end + 1) and text[end - matched] == text[-1 - matched]:
            matched += 1
        # Later ones win among equals.
        if matched >= max(best, 1):
            best, where = matched, end
    if where is None or best < shortest:
        return None
    after = text[where + 1 :]
    return [after[index % len(after)] for index in range(length)]


@jax.jit
def propose(drafter, tokens, length):
    active = jnp.ones(length.shape, bool)
    keys = jax.random.split(jax.random.key(0), length.shape[0])
    context = types.Context(tokens, length, active, types.Sampling(), _TARGET, None, keys)
    return drafter.propose(drafter.params, (), context, keys)[0]


def lookup(texts, garbage=0, *, length=_LENGTH, **options):
    """Drafts for texts of unequal lengths, with garbage behind each."""
    padded = np.broadcast_to(np.asarray(garbage, np.int32), (len(texts), _CAPACITY)).copy()
    for row, text in enumerate(texts):
        padded[row, : len(text)] = text
    drafter = drafters.prompt_lookup(length, **options)
    lengths = jnp.asarray([len(text) for text in texts], jnp.int32)
    return propose(drafter, jnp.asarray(padded), lengths)


def check(draft, texts, *, length=_LENGTH, shortest=2, longest=16):
    for row, text in enumerate(texts):
        expected = slow_lookup(text, length, shortest, longest)
        np.testing.assert_array_equal(draft.present[row], [expected is not None] * length)
        if expected is not None:
            assert draft.tokens[row].tolist() == expected


text = st.lists(st.integers(0, 2), min_size=1, max_size=_CAPACITY)


@settings(max_examples=150)
@given(
    texts=st.tuples(text, text, text),
    garbage=st.lists(st.integers(0, 2), min_size=_CAPACITY, max_size=_CAPACITY),
    longest=st.sampled_from([3, 16]),
    data=st.data(),
)
def test_the_slow_search_agrees(texts, garbage, longest, data):
    """Rows of unequal length; what stands behind them does not matter."""
    shortest = data.draw(st.integers(1, 3))
    draft = lookup(texts, garbage, shortest=shortest, longest=longest)
    check(draft, texts, shortest=shortest, longest=longest)


def test_padding_is_no_text():
    """The text's 0 matches no padding, neither its own nor what stands behind shorter rows."""
    texts = [[3, 1, 0], [1, 0, 0], [0], [2, 0, 3, 2, 0], [1, 2, 3, 0, 0, 0]]
    draft = lookup(texts, shortest=1)
    check(draft, texts, shortest=1)
    np.testing.assert_array_equal(draft.present[:, 0], [False, True, False, True, True])
    assert draft.tokens[3].tolist() == [3, 2, 0, 3, 2]


def test_the_longest_match_wins_and_the_latest_among_equals():
    texts = [
        [1, 2, 3, 9, 2, 3, 7, 1, 2, 3],  # three tokens match at the start, two later
        [2, 3, 9, 2, 3, 7, 1, 2, 3],  # two tokens match twice
        [5, 2, 3, 9, 4, 2, 3, 7, 4, 5, 2, 3],
    ]
    draft = lookup(texts)
    np.testing.assert_array_equal(draft.tokens[:, 0], [9, 7, 9])
    # A match longer than `longest` counts no more than that.
    assert lookup(texts[:1], longest=2).tokens[0, 0] == 7


def test_a_continuation_that_runs_into_the_end_is_periodic():
    draft = lookup([[7, 1, 2, 3, 1, 2, 3], [4, 4, 4], [9, 5, 6, 5, 6]])
    assert draft.tokens.tolist() == [[1, 2, 3, 1, 2], [4] * 5, [5, 6, 5, 6, 5]]
    assert jnp.all(draft.present)


def test_without_a_hit_the_draft_is_absent():
    texts = [[1, 2, 3, 4], [1], [5, 1, 7, 1], [5, 6, 1, 5, 6]]
    draft = lookup(texts)
    np.testing.assert_array_equal(draft.present[:, 0], [False, False, False, True])
    assert draft.is_deterministic
    assert draft.tree.is_chain
    assert jnp.all(draft.law == -1)


def test_the_threshold_is_traced():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def present(drafter, tokens, length):
        return propose(drafter, tokens, length).present

    tokens, length = jnp.asarray([[1, 2, 3, 1, 2, 0]], jnp.int32), jnp.asarray([5], jnp.int32)
    for shortest, expected in ((1, True), (2, True), (3, False)):
        found = present(drafters.prompt_lookup(4, shortest=shortest), tokens, length)
        np.testing.assert_array_equal(found, [[expected] * 4])


def test_a_row_is_the_same_alone_and_in_a_batch():
    texts = [[1, 2, 3, 1, 2], [0, 0, 0, 0], [3, 1, 2, 2, 3, 1, 2, 2, 3]]
    whole = lookup(texts)
    for row, one in enumerate(texts):
        alone = lookup([one])
        np.testing.assert_array_equal(alone.tokens[0], whole.tokens[row])
        np.testing.assert_array_equal(alone.present[0], whole.present[row])


def test_bad_settings_print_their_values():
    with pytest.raises(ValueError, match="length=0"):
        drafters.prompt_lookup(0)
    with pytest.raises(ValueError, match="shortest=0 must be whole and at least 1"):
        drafters.prompt_lookup(4, shortest=0)
    with pytest.raises(ValueError, match="longest=4 must be whole and at least 5"):
        drafters.prompt_lookup(4, shortest=5, longest=4)
