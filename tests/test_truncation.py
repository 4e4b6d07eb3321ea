"""Thresholds on vocabularies that the leading scores do not exhaust, whichever way they are found.

`test_sampling.py` holds the warper as a whole to sorting, on vocabularies that they do exhaust.
"""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from specjax import sampling, trees, truncation, types

VOCAB = 300
KINDS = ("peaked", "normal", "flat", "tied", "equal")


def some_scores(kind, seed, dtype: type = np.float32):
    """Scores [VOCAB] of a row, the best 0: few tokens hold the mass, or many, or many tie."""
    generator = np.random.default_rng(seed)
    scores = generator.standard_normal(VOCAB)
    if kind == "peaked":
        scores = 4 * scores + 12 * (generator.random(VOCAB) < 0.02)
    elif kind == "flat":
        scores *= 1e-2
    elif kind == "tied":
        scores = np.round(scores)
    elif kind == "equal":
        scores[:] = 0
    scores[generator.random(VOCAB) < 0.1] = -np.inf
    return (scores - scores.max()).astype(dtype)


def least_kept(scores, **fields):
    """The threshold of every row [B, T] as a program of its own; fields by row."""

    def spread(name):
        return None if name not in fields else jnp.asarray(fields[name])[:, None, None]

    needed = jnp.ones((len(scores), 1, 1), bool)
    # A lambda, so that nothing compiled under another `_LEADING` is taken for this.
    program = jax.jit(lambda *given: truncation.least_kept(*given))
    given = [spread(name) for name in ("top_k", "top_p", "min_p")]
    return np.asarray(program(jnp.asarray(scores), needed, *given))[:, :, 0]


def sorted_least(scores, *, top_k=0, top_p=1.0, min_p=0.0):
    """The threshold of a row by sorting, in float64, and the nearest that top-p came to another."""
    falling = np.sort(scores.astype(np.float64))[::-1]
    least = falling[min(top_k, VOCAB) - 1] if top_k else -np.inf
    gap = np.inf
    if top_p < 1:
        mass = np.where(falling >= least, np.exp(falling), 0)
        # Of tied tokens all count.
        up_to = np.asarray([mass[falling >= score].sum() for score in falling]) / mass.sum()
        gap = np.abs(up_to - top_p).min()
        least = max(least, falling[np.argmax(up_to >= top_p)])
    with np.errstate(divide="ignore"):
        return max(least, np.log(min_p)), gap


@hypothesis.given(
    strategies.sampled_from(KINDS),
    strategies.integers(0, 2**20),
    strategies.sampled_from([0, 1, 2, 40, 127, 128, 129, 200, 299, 300, 5000]),
    strategies.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.99, 1.0]),
    strategies.sampled_from([0.0, 0.02, 1.0]),
)
def test_thresholds_agree_with_sorting(kind, seed, top_k, top_p, min_p):
    scores = some_scores(kind, seed)
    wanted, gap = sorted_least(scores, top_k=top_k, top_p=top_p, min_p=min_p)
    hypothesis.assume(gap > 1e-6)
    fields = {"top_k": [top_k], "top_p": [top_p], "min_p": [min_p]}
    found = least_kept(scores[None, None], **fields)[0, 0]
    np.testing.assert_array_equal(scores >= found, scores >= np.float32(wanted))


@pytest.mark.parametrize("fields", [{"top_k": 50}, {"top_k": 250}, {"top_p": 0.5}, {"top_p": 0.98}])
def test_wider_floats_agree_with_sorting(fields):
    with jax.enable_x64(True):
        for kind in KINDS:
            scores = some_scores(kind, 5, np.float64)
            given = {name: [value] for name, value in fields.items()}
            found = least_kept(scores[None, None], **given)
            assert found.dtype == np.float64
            np.testing.assert_array_equal(found[0, 0], sorted_least(scores, **fields)[0])


@pytest.mark.parametrize("leading", [1, 7, 64, 299, 300, 1000])
def test_however_many_scores_lead_the_thresholds_are_the_same(monkeypatch, leading):
    scores = np.stack([[some_scores(kind, seed) for seed in range(6)] for kind in KINDS])
    for fields in (
        {"top_k": [3, 60, 150, 64, 65]},
        {"top_p": [0.9, 0.5, 0.3, 0.8, 0.999]},
        {"top_k": [5, 100, 0, 250, 20], "top_p": [0.7, 0.95, 0.6, 1.0, 0.4]},
    ):
        with monkeypatch.context() as patch:
            wanted = least_kept(scores, **fields)
            patch.setattr(truncation, "_LEADING", leading)
            np.testing.assert_array_equal(least_kept(scores, **fields), wanted)


def test_all_ties_of_the_last_kept_are_kept_beyond_the_leading_scores():
    scores = np.zeros((1, 1, VOCAB), np.float32)
    scores[..., 50:250] = -1
    scores[..., 250:] = -2
    for top_k, kept in ((20, 50), (60, 250), (200, 250), (260, 300)):
        assert (scores >= least_kept(scores, top_k=[top_k])).sum() == kept
    for top_p, kept in ((0.2, 50), (0.6, 250), (0.99, 300)):
        assert (scores >= least_kept(scores, top_p=[top_p])).sum() == kept


def warped(scores, fields):
    """The laws of logits [B, T, V] under fields by row."""
    batch, count = scores.shape[:2]
    past = sampling.history(
        jnp.zeros((batch, 1), jnp.int32),
        jnp.ones((batch,), jnp.int32),
        trees.chain(count - 1),
        jnp.zeros((batch, count - 1), jnp.int32),
    )
    return np.asarray(jax.jit(sampling.warp)(types.Sampling(**fields), jnp.asarray(scores), past))


def test_a_row_has_the_same_law_alone_and_beside_rows_that_search():
    scores = np.stack([[some_scores(kind, seed) for seed in range(3)] for kind in KINDS])
    for fields in (
        {"temperature": [0.8, 1.0, 0.7, 0.0, 1.3], "top_p": [0.9, 0.9, 0.9, 0.9, 0.1]},
        {"temperature": [0.8, 0.0, 0.7, 1.0, 1.3], "top_k": [9, 0, 200, 5, 1]},
        {
            "temperature": [1.0, 0.6, 0.7, 1.0, 0.0],
            "top_k": [200, 40, 150, 0, 9],
            "top_p": [0.99, 1.0, 0.9, 0.4, 0.5],
        },
    ):
        together = warped(scores, fields)
        for row, law in enumerate(together):
            own = {name: values[row : row + 1] for name, values in fields.items()}
            alone = warped(scores[row : row + 1], own)[0]
            np.testing.assert_array_equal(np.isfinite(alone), np.isfinite(law))
            np.testing.assert_allclose(np.exp(alone), np.exp(law), rtol=2e-6)
            np.testing.assert_allclose(np.exp(law.astype(np.float64)).sum(-1), 1, rtol=1e-5)


def test_a_vmapped_warp_is_the_same():
    scores = np.stack([[some_scores(kind, 1)] for kind in KINDS])
    past = sampling.history(
        jnp.zeros((1, 1), jnp.int32), jnp.ones((1,), jnp.int32), trees.chain(0),
        jnp.zeros((1, 0), jnp.int32),
    )  # fmt: skip
    settings = types.Sampling(temperature=0.9, top_k=200, top_p=0.8)
    mapped = jax.vmap(lambda row: sampling.warp(settings, row[None], past)[0])(jnp.asarray(scores))
    fields = {"temperature": [0.9] * 5, "top_k": [200] * 5, "top_p": [0.8] * 5}
    wanted = warped(scores, fields)
    np.testing.assert_array_equal(np.isfinite(mapped), np.isfinite(wanted))
    np.testing.assert_allclose(np.exp(mapped), np.exp(wanted), rtol=2e-6)


@pytest.mark.parametrize("fields", [{}, {"top_k": [5]}, {"top_p": [0.9]}, {"min_p": [0.1]}])
def test_a_fault_does_not_look_like_a_dead_end(fields):
    scores = some_scores("normal", 0)[None, None]
    scores[..., 17] = np.nan
    law = warped(scores, {"temperature": [1.0], **fields})
    assert np.isnan(law).any()
    keys = jax.random.split(jax.random.key(0), 1)
    assert sampling.draw_target(keys, jnp.zeros((1, 1), jnp.int32), jnp.asarray(law))[0, 0] >= 0
