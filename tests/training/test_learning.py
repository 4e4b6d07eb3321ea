"""A draft learns what it is taught: one batch is overfitted, by every loss."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.training import batches, core, losses
from tests.training import tasks

pytestmark = pytest.mark.optimised


@pytest.mark.parametrize("loss", losses.LOSSES)
def test_one_batch_is_overfitted(held, tokens, loss):
    """The loss falls to nearly what the cut vocabulary leaves."""
    objective, params, frozen = tasks.begun(tokens, loss=losses.LOSSES[loss])
    batch = jax.tree.map(lambda leaf: leaf[:2], batches.Batches(held, 1024, 0)(0))
    schedule = core.Schedule(200, 1e-2, warmup=10)
    state = core.init(params)
    values = []
    for number in range(schedule.steps):
        state, told = core.step(
            state, frozen, batch, jax.random.key(0), schedule.at(number), objective
        )
        values.append(float(told["loss"]))
    present = np.asarray(objective.laws(state.params, frozen, batch)["present"])
    log_p = np.asarray(objective.laws(state.params, frozen, batch)["log_p"])[present]
    # With q proportional to p on the head's tokens.
    best = log_p - np.logaddexp.reduce(log_p, axis=-1, keepdims=True)
    floor = float(np.mean(losses.LOSSES[loss](jnp.asarray(log_p), jnp.asarray(best))))
    assert values[-1] - floor < 0.01 * (values[0] - floor), (values[0], values[-1], floor)


def test_accepted_length_is_trained(held, tokens):
    """Its gradient raises the acceptance that decoding counts."""
    objective, params, frozen = tasks.begun(tokens, length=3, share=1.0)
    batch = jax.tree.map(lambda leaf: leaf[:2], batches.Batches(held, 1024, 0)(0))
    batch = dataclasses.replace(batch, temperature=np.ones(2, np.float32))
    state, schedule, values = core.init(params), core.Schedule(150, 3e-3, warmup=10), []
    for number in range(schedule.steps):
        state, told = core.step(
            state, frozen, batch, jax.random.key(0), schedule.at(number), objective
        )
        values.append(float(told["loss"]))
    assert -3 <= values[-1] < values[0] - 0.3
