"""Distilling: the law that is learnt, reduced vocabularies, steps shared by devices."""

import dataclasses
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax
from experiments import compilation
from specjax import checkpoints, decoding, drafters, models
from specjax.models import policy as policies
from specjax.training import batches, core, distillation, held_out, losses, shapes
from tests.training import tasks


def test_the_whole_target_as_a_draft_agrees_with_it(held):
    """All layers, all neurons, all tokens: nothing to learn, by every loss."""
    config = tasks.bundle().config
    shape = shapes.Shape(tuple(range(config.num_layers)), 128, config.vocab_size)
    everything = np.arange(config.vocab_size)
    batch = batches.Batches(held, 1024, 0)(0)
    objective, params, frozen = tasks.begun(everything, shape, policy=policies.Policy())
    for name, loss in losses.LOSSES.items():
        objective = dataclasses.replace(objective, loss=loss, features=1.0)
        total, weight, _ = objective(params, frozen, batch, jax.random.key(0))
        # Features are stored in half precision.
        assert abs(total / weight) < 2e-3, name
        assert int(weight) == int(np.sum(batch.length))
    order = batches.Batches(held, 1024, 0)
    everything_held = [order(step) for step in range(order.per_epoch)]
    measured = held_out.measure(objective, params, frozen, everything_held, 5)
    assert measured["agreement"] > 0.98 and measured["overlap"] > 0.995


def test_accepted_length_is_of_answers_drawn_from_the_law_itself(held, tokens):
    """On others, greedy ones too, it would count what no draw would have given."""
    objective, params, frozen = tasks.begun(tokens, length=3, share=0.5)
    without = dataclasses.replace(objective, length=0)
    batch = batches.Batches(held, 1024, 0)(0)

    def value(objective, temperature):
        rows = np.full_like(batch.temperature, temperature)
        changed = dataclasses.replace(batch, temperature=rows)
        return objective(params, frozen, changed, jax.random.key(0))[0]

    for temperature in (0.0, 0.8, np.nan):
        assert value(objective, temperature) == value(without, temperature)
    assert value(objective, 1.0) < value(without, 1.0)


def test_a_sweep_of_weights_compiles_once(held, tokens):
    objective, params, frozen = tasks.begun(tokens, loss=losses.JensenShannon(0.1), length=2)
    batch, numbers = batches.Batches(held, 256, 0)(0), core.Schedule(5).at(0)

    def update(**changes):
        changed = dataclasses.replace(objective, **changes)
        core.step(core.init(params), frozen, batch, jax.random.key(0), numbers, changed)

    update()
    with compilation.CompilationClock() as clock:
        update(features=0.5, share=0.1)
        update(features=0.0, share=1.0, loss=losses.JensenShannon(0.9))
    assert clock.programs == 0


@pytest.mark.parametrize("name", tasks.SHAPES)
def test_laws_are_what_decoding_will_propose(held, tokens, name):
    """The training pass and the model of the finished draft say the same of a text."""
    objective, params, frozen = tasks.begun(tokens, tasks.SHAPES[name], policy=policies.Policy())
    model = shapes.draft_model(objective.config, params, frozen)
    batch = batches.Batches(held, 1024, 0)(0)
    made = objective.laws(params, frozen, batch)
    row = 1
    text = batch.tokens[row, : batch.start[row] + batch.length[row]][None]
    cache = model.init_cache(1, text.shape[1])
    logits = model.apply(model.params, jnp.asarray(text), cache, None, ())[0].logits
    law = jax.nn.log_softmax(logits[0, batch.start[row] - 1 : -1])
    assert np.all(np.delete(np.asarray(law), tokens, axis=1) == -np.inf)
    np.testing.assert_allclose(
        made["log_q"][row, : batch.length[row]], law[:, tokens], rtol=1e-4, atol=1e-4
    )
    rounded = dataclasses.replace(objective, policy=policies.for_training())
    log_q = rounded.laws(params, frozen, batch)["log_q"][row, : batch.length[row]]
    assert np.max(losses.forward_kl(law[:, tokens], log_q)) < 0.01


@pytest.mark.parametrize("optimizer", [core.ADAM, core.MUON], ids=["adam", "muon"])
def test_a_draft_of_its_own_sizes_learns_all_of_itself(held, tokens, optimizer):
    objective, params, frozen = tasks.begun(tokens, tasks.OWN)
    assert params.keys() == {"layers", "norm", "inward", "outward"}
    batch = batches.Batches(held, 1024, 0)(0)
    schedule = core.Schedule(60, 5e-3, warmup=2, decay=0.0)
    state, told = core.init(params, optimizer), []
    for index in range(60):
        state, line = core.step(
            *(state, frozen, batch, jax.random.key(0), schedule.at(index), objective),
            optimizer=optimizer,
        )
        told.append(float(line["loss"]))
    assert told[-1] < 0.5 * told[0]
    moved = jax.tree.map(lambda new, old: float(jnp.max(jnp.abs(new - old))), state.params, params)
    assert min(jax.tree.leaves(moved)) > 0


def test_a_draft_of_its_own_sizes_begins_with_what_says_most(tokens):
    """No other directions, as many, hold more of the embedding and of the head as it is applied."""
    # A target that has learnt scales its head, each direction otherwise.
    whole, config = tasks.bundle(), tasks.bundle().config
    scale = np.random.default_rng(0).uniform(-1, 3, config.hidden_size).astype(np.float32)
    learnt = {**whole.target.params, "norm": {"scale": jnp.asarray(scale)}}
    bundle = checkpoints.assemble("learnt", config, learnt, whole.tokenizer)
    params, frozen = shapes.begin(bundle, tasks.OWN, tokens, jax.random.key(1))
    parts = [np.asarray(frozen["embed"]["embedding"]), frozen["head"]["kernel"] * scale[None]]
    both = np.concatenate([part / np.linalg.norm(part) for part in parts])
    best = np.linalg.svd(both, compute_uv=False)[:32]
    np.testing.assert_allclose(np.sum((both @ params["inward"]) ** 2), np.sum(best**2), rtol=1e-4)
    np.testing.assert_allclose(params["outward"], params["inward"] * scale[:, None], rtol=1e-6)
    # Layers add nothing yet: what comes in goes out.
    weights = shapes.weights(params, frozen)
    model = draft_of(weights, tasks.OWN)
    cache = model.init_cache(1, 4)
    output, _ = model.apply(weights, jnp.asarray([[5, 6, 7]], jnp.int32), cache, None, (0, 2))
    first, last = output.features[0, :, 0], output.features[0, :, 1]
    np.testing.assert_allclose(
        last, first / jnp.sqrt(jnp.mean(first**2, axis=-1, keepdims=True) + 1e-5), rtol=1e-3
    )


def draft_of(whole, shape):
    return models.language_model(shapes.configure(tasks.bundle().config, shape), whole)


def test_half_precision_is_the_drafts_and_not_the_targets(held, tokens):
    objective, params, frozen = tasks.begun(tokens, features=0.5, policy=policies.Policy())
    batch, schedule = batches.Batches(held, 1024, 0)(0), core.Schedule(20, 1e-3, warmup=2)
    lower = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    exact, half = (objective.laws(some, frozen, batch) for some in (params, lower))
    np.testing.assert_array_equal(exact["log_p"], half["log_p"])
    assert half["log_q"].dtype == jnp.float32
    gap = np.abs(np.where(exact["present"][:, :, None], exact["log_q"] - half["log_q"], 0))
    assert 0 < gap.mean() < 0.1
    ends = {}
    for dtype in ("float32", "bfloat16"):
        state, told = core.init(params), {}
        for index in range(20):
            numbers = schedule.at(index)
            state, told = core.step(
                state, frozen, batch, jax.random.key(0), numbers, objective, dtype=dtype
            )
        ends[dtype] = float(told["loss"])
    total, weight, _ = objective(params, frozen, batch, jax.random.key(0))
    learnt = float(total) / float(weight) - ends["float32"]
    assert learnt > 0.1 and abs(ends["bfloat16"] - ends["float32"]) < 0.1 * learnt


def test_what_lies_behind_an_answer_is_not_read(held, tokens):
    objective, params, frozen = tasks.begun(tokens, features=0.5, length=2, share=0.5)
    batch = batches.Batches(held, 1024, 0)(0)
    shorter = np.arange(len(batch.length)) % 7
    batch = dataclasses.replace(batch, length=np.maximum(batch.length - shorter, 1))
    end = (batch.start + batch.length)[:, None]
    slot = np.arange(batch.tokens.shape[1])[None]
    after = np.arange(batch.normalizer.shape[1])[None] >= batch.length[:, None]
    other = dataclasses.replace(
        batch,
        tokens=np.where(slot < end, batch.tokens, 7),
        features=np.where(after[:, :, None], np.float16(np.nan), batch.features),
        normalizer=np.where(after, np.float32(np.nan), batch.normalizer),
    )
    run = jax.jit(jax.value_and_grad(lambda p, b: objective(p, frozen, b, jax.random.key(0))[0]))
    for one, two in zip(
        jax.tree.leaves(run(params, batch)), jax.tree.leaves(run(params, other)), strict=True
    ):
        np.testing.assert_array_equal(one, two)


def test_greedy_replay_counts_what_decoding_does(held, tokens):
    """τ on text held out is that of decoding the same prompts."""
    bundle = tasks.bundle()
    objective, params, frozen = tasks.begun(tokens)
    drafter = drafters.model(shapes.draft_model(objective.config, params, frozen), 3)
    greedy = [
        (prompt.tolist(), answer)
        for shard in held
        for row in shard.rows(unseen=False)
        for prompt, answer in [shard.text(row)]
        if shard.temperature[row] == 0 and len(answer) == tasks.SETTINGS.max_new_tokens
    ][:8]
    order = batches.Batches(held, 128, 0)
    wanted = {tuple(prompt) + tuple(answer.tolist()) for prompt, answer in greedy}
    chosen = []
    for step in range(order.per_epoch):
        batch = order(step)
        rows = [
            row
            for row in range(len(batch.length))
            if tuple(batch.tokens[row, : batch.start[row] + batch.length[row]].tolist()) in wanted
            and batch.temperature[row] == 0
        ]
        if rows:
            chosen.append(jax.tree.map(lambda leaf, rows=rows: leaf[rows], batch))
    count = sum(len(batch.length) for batch in chosen)
    measured = held_out.measure(objective, params, frozen, chosen, 3)
    result = specjax.generate(
        bundle.target,
        drafter,
        [prompt for prompt, _ in greedy],
        max_new_tokens=tasks.SETTINGS.max_new_tokens,
    )
    assert count >= len(wanted)
    assert measured["tau"] == pytest.approx(result.statistics.tau, rel=0.02)


def test_vocabulary_takes_what_is_written_most_and_what_must_be(held):
    bundle = tasks.bundle()
    counts = np.zeros(bundle.config.vocab_size, int)
    for shard in held:
        for row in shard.rows(unseen=False):
            np.add.at(counts, shard.text(row)[1], 1)
    keep = int(np.argmin(counts))
    chosen = shapes.vocabulary(held, 20, [keep], bundle.config.vocab_size)
    assert keep in chosen and len(set(chosen.tolist())) == 20 and np.all(np.diff(chosen) > 0)
    assert np.min(np.delete(counts[chosen], np.searchsorted(chosen, keep))) >= np.sort(counts)[-20]


@pytest.mark.parametrize("rule, temperature", [("match", 1.0), ("block", 0.0), ("token", 0.0)])
def test_a_reduced_draft_keeps_the_targets_text(tokens, rule, temperature):
    bundle = tasks.bundle()
    objective, params, frozen = tasks.begun(tokens)
    drafter = drafters.model(shapes.draft_model(objective.config, params, frozen), 4)
    prompts = [bundle.chat("abc"), bundle.chat("What is that?"), bundle.chat("7 + 4")]
    options = {
        "key": jax.random.key(3),
        "max_new_tokens": 40,
        "sampling": specjax.Sampling(temperature),
    }
    plain = decoding.autoregressive(bundle.target, prompts, **options)
    result = specjax.generate(bundle.target, drafter, prompts, rule=rule, **options)
    assert result.new_tokens == plain.new_tokens


@pytest.mark.parametrize(
    "table, message",
    [
        (np.arange(119), "119.*120 rows"),
        (np.append(np.arange(119), -1), "token -1, outside"),
        (np.append(np.arange(119), 259), "token 259, outside"),
        (np.append(np.arange(119), 5), "twice"),
    ],
)
def test_bad_vocabulary_tables_are_named(tokens, table, message):
    objective, params, frozen = tasks.begun(tokens)
    frozen = {**frozen, "tokens": jnp.asarray(table)}
    with pytest.raises(ValueError, match=message):
        shapes.draft_model(objective.config, params, frozen)


@pytest.mark.parametrize(
    "shape, message",
    [
        (shapes.Shape((), 96, 120), "at least one"),
        (shapes.Shape((0, 4), 96, 120), "the target has 4"),
        (shapes.Shape((0,), 129, 120), "intermediate_size=129"),
        (shapes.Shape((0,), 96, 0), "vocabulary=0"),
        (shapes.Shape(shapes.Own(0, 32), 96, 120), "layers=0x32: .*at least one"),
        (shapes.Shape(shapes.Own(2, 40), 96, 120), "layers=2x40: .*multiple of .*, 16"),
        (shapes.Shape(shapes.Own(2, 32), 0, 120), "intermediate_size=0"),
    ],
)
def test_bad_shapes_are_named(shape, message):
    with pytest.raises(ValueError, match=message):
        shapes.configure(tasks.bundle().config, shape)


@pytest.mark.parametrize(
    "part, name", [(1, "layers"), (7, "layers"), (64, "layers"), (10**6, "layers"), (7, "own")]
)
def test_laws_in_parts_are_those_of_the_whole(held, tokens, monkeypatch, part, name):
    """Values and gradients, whatever part of the tokens is gone through at a time."""
    objective, params, frozen = tasks.begun(
        tokens, tasks.SHAPES[name], length=3, share=0.5, policy=policies.Policy()
    )
    batch = batches.Batches(held, 512, 0)(0)
    share = jnp.where(batch.temperature == 1, 0.5, 0.0)[:, None]
    assert share.any()
    monkeypatch.setattr(distillation, "_PART", part)

    def whole(params, share):
        made = objective.laws(params, frozen, batch)
        own = objective._of_tokens(frozen, made["log_p"], made["log_q"], made["tokens"])
        accepted = losses.negative_accepted_length(*own, made["present"], 3, "block")
        value = (1 - share) * objective.loss(made["log_p"], made["log_q"]) + share * accepted
        return jnp.sum(jnp.where(made["present"], value, 0.0))

    for length, weight in ((0, jnp.zeros_like(share)), (3, share)):
        some = dataclasses.replace(objective, length=length)
        value, gradient = jax.value_and_grad(
            lambda params, some=some: some(params, frozen, batch, jax.random.key(0))[0]
        )(params)
        wanted, slope = jax.value_and_grad(whole)(params, weight)
        np.testing.assert_allclose(value, wanted, rtol=1e-5)
        chex.assert_trees_all_close(gradient, slope, rtol=1e-3, atol=1e-4)


def test_steps_shared_by_devices_are_those_of_one():
    """Distillation with lessons, on eight virtual devices, in a process of its own."""
    script = """
import os, pathlib, sys, tempfile
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import chex, jax, numpy as np
from experiments import distill_stages
from specjax.training import batches, copying, core, distillation
from tests.training import tasks
held = tasks.make(pathlib.Path(tempfile.mkdtemp()), 600)
tokens = np.arange(120)
objective, params, frozen = tasks.begun(tokens)
batch = batches.Batches(held, 1024, 0, multiple=8)(0)
mesh = distill_stages._mesh(8)
lessons = copying.Copying(objective, objective.config, 0.5, size=64)
numbers = core.Schedule(3, 1e-3).at(1)
made = []
for place in (False, True):
    state = core.init(params)
    given = (state, frozen, batch)
    if place:
        given = (
            *(core.place(tree, mesh, rows=False) for tree in given[:2]),
            core.place(batch, mesh, rows=True),
        )
    for number in range(2):
        state, told = core.step(*given, jax.random.key(0), numbers, lessons)
        given = (state, *given[1:])
    made.append((jax.device_get(state.params), float(told["loss"])))
np.testing.assert_allclose(made[0][1], made[1][1], rtol=1e-5)
chex.assert_trees_all_close(made[0][0], made[1][0], rtol=1e-3, atol=2e-4)
"""
    made = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
