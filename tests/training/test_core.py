"""The training core: an update by hand, accumulation, averaging, faults, data parallelism."""

import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from specjax.training import core
from tests.training import tasks

FROZEN = {"weight": jnp.ones(())}


def params():
    return {"w": jnp.asarray([[0.5, -1.0], [0.25, 2.0]]), "b": jnp.zeros(2)}


def batch(rows=4, seed=0):
    keys = jax.random.split(jax.random.key(seed))
    return {name: jax.random.normal(key, (rows, 2)) for name, key in zip("xy", keys, strict=True)}


def advance(state, schedule, steps, **options):
    told = {}
    for number in range(steps):
        state, told = core.step(
            state,
            FROZEN,
            batch(seed=number),
            jax.random.key(0),
            schedule.at(number),
            tasks.regression,
            **options,
        )
    return state, told


def test_updates_are_those_of_adamw():
    """optax's own AdamW, clipping and schedule, composed by itself."""
    schedule = core.Schedule(6, 0.1, warmup=2, last=0.1, clip=0.5, decay=0.3, average=0.0)
    curve = optax.warmup_cosine_decay_schedule(0.05, 0.1, 2, 6, 0.01)
    own = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.adamw(curve, b1=0.9, b2=0.95, weight_decay=0.3, mask={"w": True, "b": False}),
    )
    wanted, memory = params(), own.init(params())
    for number in range(6):
        gradient = jax.grad(
            lambda p, n=number: tasks.regression(p, FROZEN, batch(seed=n), jax.random.key(0))[0] / 4
        )(wanted)
        with jax.numpy_dtype_promotion("standard"):
            update, memory = own.update(gradient, memory, wanted)
        wanted = optax.apply_updates(wanted, update)
    state, _ = advance(core.init(params()), schedule, 6)
    chex.assert_trees_all_close(state.params, wanted, rtol=1e-5)
    chex.assert_trees_all_close(state.average, wanted, rtol=1e-5)
    assert int(state.step) == 6


def test_parts_add_up_to_the_whole():
    schedule = core.Schedule(3, 0.1, warmup=0)
    whole, told = advance(core.init(params()), schedule, 3)
    parts, told_of_parts = advance(core.init(params()), schedule, 3, parts=4)
    chex.assert_trees_all_close(whole.params, parts.params, rtol=1e-5)
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose(told[name], told_of_parts[name], rtol=1e-5)
    # Each part draws from a key of its own.
    assert told["drawn"] != told_of_parts["drawn"]


def test_average_follows_the_parameters():
    schedule = core.Schedule(3, 0.1, warmup=0, average=0.5)
    state, kept = core.init(params()), params()
    for number in range(3):
        state, _ = core.step(
            state, FROZEN, batch(), jax.random.key(0), schedule.at(number), tasks.regression
        )
        keep = min(0.5, (1 + number) / (10 + number))
        kept = jax.tree.map(lambda old, new, k=keep: k * old + (1 - k) * new, kept, state.params)
    chex.assert_trees_all_close(state.average, kept, rtol=1e-5)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_what_is_not_finite_changes_nothing(bad):
    state, _ = advance(core.init(params()), core.Schedule(5), 2)
    before = jax.tree.map(np.asarray, state)
    state, told = core.step(
        state,
        {"weight": jnp.asarray(bad)},
        batch(),
        jax.random.key(0),
        core.Schedule(5).at(2),
        tasks.regression,
    )
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, state), before)
    assert told["finite"] == 0


def test_sweeps_compile_once():
    chex.clear_trace_counter()
    counted = jax.tree_util.Partial(chex.assert_max_traces(tasks.least_squares, n=1))
    state = core.init(params())
    for rate in (0.1, 0.01):
        for clip in (0.5, 2.0):
            schedule = core.Schedule(9, rate, clip=clip, decay=rate, average=0.9)
            state, _ = core.step(state, FROZEN, batch(), jax.random.key(0), schedule.at(1), counted)


def test_state_is_donated_and_parameters_are_not():
    given = params()
    state = core.init(given)
    core.step(state, FROZEN, batch(), jax.random.key(0), core.Schedule(5).at(0), tasks.regression)
    assert state.params["w"].is_deleted()
    assert not given["w"].is_deleted()


def test_lower_precision_computes_in_it_and_keeps_float32():
    seen = []

    @jax.tree_util.Partial
    def objective(params, frozen, batch, key):
        seen.append(params["w"].dtype)
        cast = jax.tree.map(lambda leaf: leaf.astype(params["w"].dtype), batch)
        return tasks.regression(params, frozen, cast, key)

    state = core.init(params())
    state, told = core.step(
        state,
        FROZEN,
        batch(),
        jax.random.key(0),
        core.Schedule(5).at(0),
        objective,
        dtype="bfloat16",
    )
    assert seen[0] == jnp.bfloat16
    assert state.params["w"].dtype == told["loss"].dtype == jnp.float32


def test_bad_values_are_named():
    with pytest.raises(ValueError, match="4 rows.*parts=3"):
        advance(core.init(params()), core.Schedule(5), 1, parts=3)
    with pytest.raises(ValueError, match="average=2"):
        core.Schedule(5, average=2)
    with pytest.raises(ValueError, match="steps=0"):
        core.Schedule(0)


def test_data_parallel_steps_are_those_of_one_device():
    """On eight virtual devices, in a process of its own."""
    script = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import chex, jax, numpy as np, pytest
from specjax.training import core
from tests.training import tasks, test_core as here
mesh = jax.make_mesh((8,), ("data",))
schedule = core.Schedule(3, 0.1, warmup=0)
alone, shared = core.init(here.params()), core.place(core.init(here.params()), mesh, rows=False)
frozen = core.place(here.FROZEN, mesh, rows=False)
for number in range(3):
    rows = here.batch(16, number)
    key, numbers = jax.random.key(0), schedule.at(number)
    alone, told = core.step(alone, here.FROZEN, rows, key, numbers, tasks.regression)
    placed = core.place(rows, mesh, rows=True)
    assert len(placed["x"].sharding.device_set) == 8
    shared, other = core.step(shared, frozen, placed, key, numbers, tasks.regression)
    np.testing.assert_allclose(told["loss"], other["loss"], rtol=1e-6)
chex.assert_trees_all_close(alone.params, jax.device_get(shared.params), rtol=1e-5)
with pytest.raises(ValueError, match="a batch of 12 rows does not divide among 8 devices"):
    core.place(here.batch(12), mesh, rows=True)
"""
    made = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
