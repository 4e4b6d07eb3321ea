"""Replaying greedy decoding: by hand, and the line that pays."""

import numpy as np
import pytest

from specjax import decoding
from specjax.training import stopping

COST = decoding.Cost(0.1, ((1, 1.0), (2, 1.2), (9, 1.9)))


def guesses(right, maximum=None, entropy=None):
    count = len(right)
    return stopping.Guesses(
        np.asarray(right, bool),
        np.asarray(np.ones(count) if maximum is None else maximum, np.float32),
        np.asarray(np.zeros(count) if entropy is None else entropy, np.float32),
    )


def test_by_hand():
    """1 1 0 | 1 1 1 1 | 0 | 1 by drafts of three, and the last token of a text."""
    text = guesses([1, 1, 0, 1, 1, 1, 1, 0, 1])
    counts = stopping.replay([text], 3)
    assert (counts.emitted, counts.drafted, counts.draft_steps) == (9, (0, 0, 0, 4), 12)
    assert counts.tau == 9 / 4
    assert counts.speedup(COST) == pytest.approx(9 / (4 * COST.of_pass(4) + 12 * 0.1))


def test_stopping_by_hand():
    """Sure of 2, then not: two drafts and three passes of the draft; not sure at once: none."""
    text = guesses([1, 1, 1, 0, 1], maximum=[0.9, 0.8, 0.3, 0.2, 0.9])
    counts = stopping.replay([text], 3, stop_below=0.5)
    # Two accepted and one more, by three passes; unsure after one: one token; the last, by three.
    assert (counts.emitted, counts.drafted, counts.draft_steps) == (5, (1, 0, 1, 1), 7)
    same = stopping.replay([guesses(text.right, entropy=1 - text.maximum)], 3, stop_above=0.5)
    assert same == counts


def test_short_drafts_take_narrow_passes():
    """Drafts of 5 are verified in passes of 1, 3 or 6 tokens."""
    counts = stopping.Counts(emitted=9, drafted=(1, 2, 3, 4, 5, 6), draft_steps=20)
    wide, half = COST.of_pass(6), COST.of_pass(3)
    assert counts.speedup(COST) == pytest.approx(9 / (20 * 0.1 + 1 + 5 * half + 15 * wide))
    assert counts.tau == pytest.approx(9 / 21)


def test_a_draft_that_knows_when_it_is_wrong_is_stopped_there():
    generator = np.random.default_rng(0)
    right = generator.random(4000) < 0.6
    knowing = guesses(right, np.where(right, 0.9, 0.3) + 0.05 * generator.random(4000))
    best, tried = stopping.choose([knowing], COST, (1, 4, 8))
    assert best.stop_below is not None and 0.35 < best.stop_below < 0.95
    never = max(c.speedup for c in tried if c.stop_below is None and c.stop_above is None)
    assert best.speedup > 1.1 * never
    # A draft that knows nothing gains nothing by stopping.
    ignorant = guesses(right, generator.random(4000))
    best, tried = stopping.choose([ignorant], COST, (1, 4, 8))
    never = max(c.speedup for c in tried if c.stop_below is None and c.stop_above is None)
    assert best.speedup < 1.02 * never


def test_no_texts_is_an_error():
    with pytest.raises(ValueError, match="no greedy answers"):
        stopping.choose([], COST, (1,))
