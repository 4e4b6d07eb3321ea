"""Lessons in copying: what is drawn, that drafts learn from it, and what they leave alone."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import distill_config
from specjax.models import policy as policies
from specjax.training import batches, copying, core, shapes
from tests.training import tasks

POLICY = policies.Policy()


@pytest.mark.parametrize("size", [2, 7, 64, 513])
def test_copies_follow_what_stood_before(size):
    """Every token that is called a copy stands where its predecessor's source says."""
    tokens = jnp.arange(100, 100 + size, dtype=jnp.int32)
    for seed in range(5):
        text, is_copy = map(np.asarray, copying.draw(jax.random.key(seed), tokens, size))
        assert text.shape == is_copy.shape == (size,)
        half = size // 2
        assert np.isin(text, tokens).all() and np.isin(text[half:], text[:half]).all()
        assert not is_copy[: half + 1].any()
        for place in np.flatnonzero(is_copy):
            pairs = set(zip(text[:half], text[1:half], strict=False))
            assert (text[place - 1], text[place]) in pairs
        if size > 500:
            assert 0.4 < is_copy.mean() < 0.5


def test_lessons_teach_to_copy_what_was_never_seen():
    """A draft taught alone by random text continues new random text from where it stood before."""
    tokens = np.arange(24, dtype=np.int32)
    objective, params, frozen = tasks.begun(tokens, shapes.Shape((0, 3), 96, len(tokens)))
    lessons = copying.Copying(None, objective.config, 1.0, 8, 64, POLICY)
    state = core.init(params, core.MUON)
    schedule = core.Schedule(400, 2e-2, warmup=20)
    told = []
    for number in range(schedule.steps):
        state, line = core.step(
            state,
            frozen,
            {"row": np.zeros(1)},
            jax.random.key(0),
            schedule.at(number),
            lessons,
            optimizer=core.MUON,
        )
        told.append(float(line["copied"]))
    # One of 24 by chance; no text was there before.
    assert np.mean(told[:20]) < 0.1
    assert np.mean(told[-20:]) > 0.4
    unseen = lessons(state.params, frozen, None, jax.random.key(10**6))
    assert unseen[2]["copied"] > 0.25


def test_the_base_objective_is_left_as_it_is(held, tokens):
    """What is added is the weight times the lesson; without weight nothing is."""
    objective, params, frozen = tasks.begun(tokens, policy=POLICY)
    batch = batches.Batches(held, 1024, 0)(0)
    alone = objective(params, frozen, batch, jax.random.key(3))
    made = {
        weight: copying.Copying(objective, objective.config, weight, 1, 64, POLICY)(
            params, frozen, batch, jax.random.key(3)
        )
        for weight in (0.0, 1.0, 2.0)
    }
    chex.assert_trees_all_close(made[0.0][:2], alone[:2])
    first, second = (float(made[weight][0] - alone[0]) for weight in (1.0, 2.0))
    assert first > 0
    np.testing.assert_allclose(second, 2 * first, rtol=1e-4)


def test_every_step_has_a_lesson_of_its_own(tokens):
    text = [copying.draw(jax.random.key(seed), jnp.asarray(tokens), 64)[0] for seed in (0, 0, 1)]
    chex.assert_trees_all_equal(text[0], text[1])
    assert not np.array_equal(text[0], text[2])


def test_lessons_are_for_drafts_that_can_copy():
    config = distill_config.Config(folder="x")
    assert config.copying_weight(2) == 0.1 and config.copying_weight(1) == 0.0
    earlier = dataclasses.replace(config, start_from="draft.safetensors")
    assert earlier.copying_weight(2) == 0.0
    with pytest.raises(ValueError, match="--copying=1.0 needs a draft of two layers"):
        distill_config.Config(folder="x", copying=1.0).copying_weight(1)
    with pytest.raises(ValueError, match="--copying=-1"):
        distill_config.Config(folder="x", copying=-1.0)
