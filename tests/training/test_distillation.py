"""Distilling: overfitting, the law that is learnt, reduced vocabularies, drafts as files."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax
from specjax import checkpoints, decoding, drafters, models
from specjax.checkpoints import huggingface
from specjax.training import batches, core, distillation, fitting, held_out, losses, on_policy
from tests.training import tasks

SHAPE = distillation.Shape((0, 3), 96, 120)


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    return tasks.make(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def tokens(held):
    bundle = tasks.bundle()
    return distillation.vocabulary(held, 120, bundle.target.eos_ids, bundle.config.vocab_size)


def begun(tokens, shape=SHAPE, **options):
    bundle = tasks.bundle()
    params, frozen = distillation.begin(bundle, shape, tokens)
    objective = distillation.Distillation(distillation.configure(bundle.config, shape), **options)
    return objective, params, frozen


def test_the_whole_target_as_a_draft_agrees_with_it(held):
    """All layers, all neurons, all tokens: nothing to learn, by every loss."""
    config = tasks.bundle().config
    shape = distillation.Shape(tuple(range(config.num_layers)), 128, config.vocab_size)
    everything = np.arange(config.vocab_size)
    batch = batches.Batches(held, 1024, 0)(0)
    objective, params, frozen = begun(everything, shape)
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


@pytest.mark.parametrize("loss", losses.LOSSES)
def test_one_batch_is_overfitted(held, tokens, loss):
    """The loss falls to nearly what the cut vocabulary leaves."""
    objective, params, frozen = begun(tokens, loss=losses.LOSSES[loss])
    batch = jax.tree.map(lambda leaf: leaf[:2], batches.Batches(held, 1024, 0)(0))
    schedule = core.Schedule(400, 5e-3, warmup=10)
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
    assert values[-1] - floor < 0.1 * (values[0] - floor), (values[0], values[-1], floor)


def test_accepted_length_is_trained(held, tokens):
    """Its gradient raises the acceptance that decoding counts."""
    objective, params, frozen = begun(tokens, length=3, share=1.0)
    batch = jax.tree.map(lambda leaf: leaf[:2], batches.Batches(held, 1024, 0)(0))
    state, schedule, values = core.init(params), core.Schedule(150, 3e-3, warmup=10), []
    for number in range(schedule.steps):
        state, told = core.step(
            state, frozen, batch, jax.random.key(0), schedule.at(number), objective
        )
        values.append(float(told["loss"]))
    assert -3 <= values[-1] < values[0] - 0.3


def test_laws_are_what_decoding_will_propose(held, tokens):
    """The training pass and the model of the finished draft say the same of a text."""
    objective, params, frozen = begun(tokens)
    model = distillation.draft_model(objective.config, params, frozen)
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


def test_what_lies_behind_an_answer_is_not_read(held, tokens):
    objective, params, frozen = begun(tokens, features=0.5, length=2, share=0.5)
    batch = batches.Batches(held, 1024, 0)(0)
    shorter = np.arange(len(batch.length)) % 7
    batch = dataclasses.replace(batch, length=np.maximum(batch.length - shorter, 1))
    end = (batch.start + batch.length)[:, None]
    slot = np.arange(batch.tokens.shape[1])[None]
    after = np.arange(batch.normalizer.shape[1])[None] >= batch.length[:, None]
    other = dataclasses.replace(
        batch,
        tokens=np.where(slot < end, batch.tokens, 7),
        features=np.where(after[:, :, None], np.float16(3), batch.features),
        normalizer=np.where(after, np.float32(9), batch.normalizer),
    )
    run = jax.jit(jax.value_and_grad(lambda p, b: objective(p, frozen, b, jax.random.key(0))[0]))
    for one, two in zip(
        jax.tree.leaves(run(params, batch)), jax.tree.leaves(run(params, other)), strict=True
    ):
        np.testing.assert_array_equal(one, two)


def test_batches_cover_conversations_once_an_epoch(held):
    """Whole batches are made, so what is left over of a width waits for another epoch."""
    order = batches.Batches(held, 128, 3)
    seen, left_over = [], 0
    for width, places in order._groups.items():
        left_over += len(places) % max(128 // width, 1)
    for step in range(order.per_epoch):
        batch = order(step)
        assert batch.tokens.shape[0] * batch.tokens.shape[1] <= 128 or len(batch.tokens) == 1
        for row in range(len(batch.length)):
            seen.append(batch.tokens[row, : batch.start[row] + batch.length[row]].tobytes())
    texts = [
        np.concatenate(shard.text(row)).tobytes()
        for shard in held
        for row in shard.rows(unseen=False)
    ]
    assert len(seen) == len(texts) - left_over and not collections.Counter(
        seen
    ) - collections.Counter(texts)
    later = set()
    for step in range(8 * order.per_epoch):
        batch = order(step)
        for row in range(len(batch.length)):
            later.add(batch.tokens[row, : batch.start[row] + batch.length[row]].tobytes())
    assert later == set(texts)
    first = [order(step).tokens.tobytes() for step in range(order.per_epoch)]
    again = [
        batches.Batches(held, 128, 3)(step).tokens.tobytes() for step in range(order.per_epoch)
    ]
    later = [order(order.per_epoch + step).tokens.tobytes() for step in range(order.per_epoch)]
    assert first == again and first != later


def test_what_is_held_out_is_never_trained_on(held):
    for shard in held:
        known, unseen = (set(shard.rows(unseen=which)) for which in (False, True))
        assert known and unseen and known | unseen == set(range(len(shard)))
        assert not known & unseen and len(unseen) % 2 == 0
    order = batches.Batches(held, 128, 3, unseen=True)
    seen = {
        (int(batch.start[row]), batch.tokens[row].tobytes())
        for batch in map(order, range(order.per_epoch))
        for row in range(len(batch.length))
    }
    order = batches.Batches(held, 128, 3)
    for batch in map(order, range(order.per_epoch)):
        for row in range(len(batch.length)):
            assert (int(batch.start[row]), batch.tokens[row].tobytes()) not in seen


def test_batches_refuse_what_makes_none(held, tmp_path):
    with pytest.raises(ValueError, match="conversations make no batch of 100000 tokens"):
        batches.Batches(held[:1], 100_000, 0)
    bare = tasks.make(tmp_path, 10, taps=())
    with pytest.raises(ValueError, match="holds no features"):
        batches.Batches(bare, 128, 0)


def test_greedy_replay_counts_what_decoding_does(held, tokens):
    """τ on text held out is that of decoding the same prompts."""
    bundle = tasks.bundle()
    objective, params, frozen = begun(tokens)
    drafter = drafters.model(distillation.draft_model(objective.config, params, frozen), 3)
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
            and batch.greedy[row]
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
    chosen = distillation.vocabulary(held, 20, [keep], bundle.config.vocab_size)
    assert keep in chosen and len(set(chosen.tolist())) == 20 and np.all(np.diff(chosen) > 0)
    assert np.min(np.delete(counts[chosen], np.searchsorted(chosen, keep))) >= np.sort(counts)[-20]


@pytest.mark.parametrize("rule, temperature", [("match", 1.0), ("block", 0.0), ("token", 0.0)])
def test_a_reduced_draft_keeps_the_targets_text(tokens, rule, temperature):
    bundle = tasks.bundle()
    objective, params, frozen = begun(tokens)
    drafter = drafters.model(distillation.draft_model(objective.config, params, frozen), 4)
    prompts = [bundle.chat("abc"), bundle.chat("What is that?"), bundle.chat("7 + 4")]
    options = {
        "key": jax.random.key(3),
        "max_new_tokens": 40,
        "sampling": specjax.Sampling(temperature),
    }
    plain = decoding.autoregressive(bundle.target, prompts, **options)
    result = specjax.generate(bundle.target, drafter, prompts, rule=rule, **options)
    assert result.new_tokens == plain.new_tokens


def test_drafts_survive_their_file(tokens, tmp_path):
    bundle = tasks.bundle()
    objective, params, frozen = begun(tokens)
    path = tmp_path / "draft.safetensors"
    checkpoints.drafts.write(path, bundle, objective.config, params, tokens)
    model = checkpoints.drafts.read(path, bundle)
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), params)
    own = distillation.draft_model(objective.config, rounded, frozen)
    text = jnp.asarray([bundle.chat("abc")])
    logits = [
        m.apply(m.params, text, m.init_cache(1, text.shape[1]), None, ())[0].logits
        for m in (model, own)
    ]
    np.testing.assert_array_equal(*logits)
    assert model.eos_ids == bundle.target.eos_ids
    # The embedding is the target's own array, not another copy.
    assert model.params.params["embed"]["embedding"] is bundle.target.params["embed"]["embedding"]


def test_exported_folder_is_the_draft_with_the_whole_vocabulary(tokens, tmp_path):
    bundle = tasks.bundle()
    objective, params, _ = begun(tokens)
    path = tmp_path / "draft.safetensors"
    checkpoints.drafts.write(path, bundle, objective.config, params, tokens)
    checkpoints.drafts.export(path, bundle, tmp_path / "folder")
    loaded = checkpoints.load(str(tmp_path / "folder"))
    draft = checkpoints.drafts.read(path, bundle)
    text = jnp.asarray([bundle.chat("abc")])
    whole, cut = (
        m.apply(m.params, text, m.init_cache(1, text.shape[1]), None, ())[0].logits
        for m in (loaded.target, draft)
    )
    # The folder's embedding is rounded to bfloat16 too.
    np.testing.assert_allclose(whole[:, :, tokens], cut[:, :, tokens], rtol=0.1, atol=0.1)
    assert loaded.tokenizer.fingerprint == bundle.tokenizer.fingerprint
    assert loaded.chat("abc") == bundle.chat("abc")
    with pytest.raises(ValueError, match="head_rows=120"):
        huggingface.write(tmp_path, objective.config, params, bundle.tokenizer)


def test_transformers_takes_the_folder_for_an_assistant(tokens, tmp_path):
    torch, transformers = map(pytest.importorskip, ("torch", "transformers"))
    bundle = tasks.bundle()
    objective, params, _ = begun(tokens)
    path = tmp_path / "draft.safetensors"
    checkpoints.drafts.write(path, bundle, objective.config, params, tokens)
    checkpoints.drafts.export(path, bundle, tmp_path / "draft")
    huggingface.write(tmp_path / "target", bundle.config, bundle.target.params, bundle.tokenizer)
    target, draft = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)
        for name in ("target", "draft")
    )
    prompt = torch.tensor([bundle.chat("abc")])
    options = {"max_new_tokens": 20, "do_sample": False}
    plain = target.generate(prompt, **options)
    assert torch.equal(target.generate(prompt, assistant_model=draft, **options), plain)


@pytest.fixture
def draft_file(tokens, tmp_path):
    objective, params, _ = begun(tokens)
    path = tmp_path / "draft.safetensors"
    checkpoints.drafts.write(path, tasks.bundle(), objective.config, params, tokens)
    return path


def test_bad_draft_files_are_named(draft_file, tokens, tmp_path):
    bundle = tasks.bundle()
    with pytest.raises(ValueError, match="nowhere.*no draft that can be read"):
        checkpoints.drafts.read(tmp_path / "nowhere", bundle)
    content = draft_file.read_bytes()
    (tmp_path / "short").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="short.*no draft that can be read"):
        checkpoints.drafts.read(tmp_path / "short", bundle)
    objective, params, _ = begun(tokens)
    strange = tokens.copy()
    strange[-1] = 4000
    checkpoints.drafts.write(tmp_path / "table", bundle, objective.config, params, strange)
    with pytest.raises(ValueError, match="token 4000, outside the vocabulary 0…258"):
        checkpoints.drafts.read(tmp_path / "table", bundle)
    fewer = {**params, "layers": {0: params["layers"][0]}}
    checkpoints.drafts.write(tmp_path / "fewer", bundle, objective.config, fewer, tokens)
    with pytest.raises(ValueError, match="lacks.*model.layers.1"):
        checkpoints.drafts.read(tmp_path / "fewer", bundle)


def test_a_draft_for_another_target_is_refused(draft_file, smollm2):
    with pytest.raises(ValueError, match="another tokenizer than that of 'smollm2-135m'"):
        checkpoints.drafts.read(draft_file, smollm2)
    bundle = tasks.bundle()
    wide = dataclasses.replace(bundle.config, hidden_size=128)
    params = models.init_params(wide, jax.random.key(0))
    other = checkpoints.assemble("wide", wide, params, bundle.tokenizer)
    with pytest.raises(ValueError, match="hidden_size=64, and 'wide' has 128"):
        checkpoints.drafts.read(draft_file, other)


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
    objective, params, frozen = begun(tokens)
    frozen = {**frozen, "tokens": jnp.asarray(table)}
    with pytest.raises(ValueError, match=message):
        distillation.draft_model(objective.config, params, frozen)


@pytest.mark.parametrize(
    "shape, message",
    [
        (distillation.Shape((), 96, 120), "at least one"),
        (distillation.Shape((0, 4), 96, 120), "the target has 4"),
        (distillation.Shape((0,), 129, 120), "intermediate_size=129"),
        (distillation.Shape((0,), 96, 0), "vocabulary=0"),
    ],
)
def test_bad_shapes_are_named(shape, message):
    with pytest.raises(ValueError, match=message):
        distillation.configure(tasks.bundle().config, shape)


def test_judged_text_has_the_laws_that_recording_gives(held):
    batch = batches.Batches(held, 1024, 0)(0)
    bundle = tasks.bundle()
    judged = on_policy.judge(
        bundle.target, batch.tokens, batch.start, batch.length, batch.normalizer.shape[1]
    )
    for row, length in enumerate(batch.length):
        for name in ("features", "normalizer"):
            np.testing.assert_allclose(
                np.asarray(getattr(judged, name)[row, :length], np.float32),
                np.asarray(getattr(batch, name)[row, :length], np.float32),
                rtol=2e-3,
                atol=2e-3,
            )


def test_a_draft_trains_on_what_it_writes_and_resumes_to_the_bit(held, tokens, tmp_path):
    objective, params, frozen = begun(tokens)
    bundle = tasks.bundle()
    recorded = batches.Batches(held, 1024, 0)

    def fit(folder, **options):
        own = on_policy.OnPolicy(bundle, objective, frozen, recorded, share=0.5, every=2)
        schedule = core.Schedule(8, 1e-3, warmup=1)
        return fitting.fit(
            objective, params, frozen, own, schedule, folder, save_every=2, **options
        )

    def stop(line):
        if line["step"] == 5:
            raise KeyboardInterrupt

    fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "parts", report=stop)
    fit(tmp_path / "parts")
    losses_of = [
        [line["loss"] for line in fitting.read_metrics(tmp_path / name)]
        for name in ("whole", "parts")
    ]
    assert losses_of[0] == losses_of[1]
    own = on_policy.OnPolicy(bundle, objective, frozen, recorded, share=0.5, every=2)
    first, second = own(0, params), own(1, params)
    np.testing.assert_array_equal(second.tokens, recorded(1).tokens)
    texts = {
        row[a : a + n].tobytes()
        for row, a, n in zip(first.tokens, first.start, first.length, strict=True)
    }
    assert not texts & {
        row[a : a + n].tobytes()
        for row, a, n in zip(recorded(0).tokens, recorded(0).start, recorded(0).length, strict=True)
    }
    with pytest.raises(ValueError, match="share=2"):
        on_policy.OnPolicy(bundle, objective, frozen, recorded, share=2)
