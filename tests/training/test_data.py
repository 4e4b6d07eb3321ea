"""Data from the target: determinism, resuming, what was recorded, and every bad input."""

import copy
import dataclasses
import errno
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import checkpoints, decoding, models, native, types
from specjax.models import policy as policies
from specjax.training import batches, data, prompts, recording, shards
from tests.training import tasks


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return tasks.make(folder, 800)


def contents(held):
    return [{name: np.asarray(getattr(shard, name)) for name in shards.ARRAYS} for shard in held]


def same(one, other):
    for first, second in zip(contents(one), contents(other), strict=True):
        for name in first:
            np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def test_a_run_that_was_killed_ends_with_the_same_shards(held, tmp_path):
    def stop(progress):
        if progress.shards == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.generate(tasks.bundle(), tmp_path, 800, tasks.SETTINGS, report=stop)
    # What a kill in the middle of writing leaves.
    shutil.copytree(tmp_path / "shard-00000", tmp_path / "shard-00002.part")
    same(tasks.make(tmp_path, 800), held)
    assert not list(tmp_path.glob("*.part"))


def test_more_tokens_keep_the_shards_that_are_there(held, tmp_path):
    kept = len(tasks.make(tmp_path, 200))
    told: list[data.Progress] = []
    made = data.generate(tasks.bundle(), tmp_path, 800, tasks.SETTINGS, report=told.append)
    same(made, held)
    # Before the first that is new there is no pace to tell, and then one after every shard.
    assert [progress.shards for progress in told] == list(range(kept, len(held) + 1))
    assert told[0].tokens_per_second == 0 and np.isnan(told[0].seconds_left)
    assert all(progress.tokens_per_second > 0 for progress in told[1:])


def test_another_seed_gives_other_text(held, tmp_path):
    other = tasks.make(tmp_path, 100, seed=1)
    assert not np.array_equal(other[0].tokens[: len(held[0].tokens)], held[0].tokens)


def test_answers_are_those_of_plain_decoding(held):
    """A prompt with its key gives the answer that it would have alone."""
    bundle = tasks.bundle()
    for index, row in ((0, 0), (0, 1), (0, 5), (3, 1)):
        shard = held[index]
        prompt, answer = shard.text(row)
        key = jax.random.fold_in(jax.random.key(0), index * len(shard) + row)
        result = decoding.autoregressive(
            bundle.target,
            [prompt.tolist()],
            keys=key[None],
            max_new_tokens=tasks.SETTINGS.max_new_tokens,
            sampling=types.Sampling(float(shard.temperature[row])),
        )
        # A batch may stop before its last rows have ended.
        assert result.new_tokens[0][: len(answer)] == answer.tolist()
        assert len(answer) >= 1


def test_two_answers_share_a_prompt_and_temperatures_take_turns(held):
    shard = held[0]
    assert shard.temperature[:4].tolist() == pytest.approx([0, 0.8, 0, 1.0])
    np.testing.assert_array_equal(shard.text(0)[0], shard.text(1)[0])
    assert not np.array_equal(shard.text(1)[0], shard.text(2)[0])


def test_what_is_recorded_is_the_law_that_each_token_was_drawn_from(held):
    bundle = tasks.bundle()
    for shard in held:
        offsets = shard.answer_offsets
        for row in (0, len(shard) - 1):
            prompt, answer = shard.text(row)
            tokens = jnp.asarray(np.concatenate([prompt, answer]))[None]
            cache = bundle.target.init_cache(1, tokens.shape[1])
            output, _ = bundle.target.apply(
                bundle.target.params, tokens, cache, None, tasks.SETTINGS.taps
            )
            here = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
            law = jax.nn.log_softmax(output.logits[0, here])
            rows = slice(offsets[row], offsets[row + 1])
            np.testing.assert_allclose(
                shard.features[rows], output.features[0, here], rtol=2e-3, atol=2e-3
            )
            top, tokens_of_top = jax.lax.top_k(law, 4)
            np.testing.assert_allclose(shard.top_log_probs[rows], top, atol=1e-4)
            np.testing.assert_array_equal(shard.top_tokens[rows], tokens_of_top)
            normalizer = jax.nn.logsumexp(output.logits[0, here], axis=-1)
            np.testing.assert_allclose(shard.normalizer[rows], normalizer, atol=1e-4)


def test_domains_follow_the_settings_and_work_on_earlier_answers(held):
    assert [shard.domain for shard in held[:5]] == list(tasks.SETTINGS.domains)
    bundle = tasks.bundle()
    begin = len(bundle.chat("A")) - 2
    turns = []
    for row in range(8):
        prompt, answer = held[1].text(row)
        assert prompt[:begin].tolist() == bundle.chat("A")[:begin]
        # What the turn was opened with belongs to it.
        whole = np.concatenate([prompt[begin:], answer])
        turns.append(bundle.tokenizer.decode(whole).strip() or " ")
    asked = [bundle.tokenizer.decode(held[2].text(row)[0]) for row in range(8)]
    # Each is answered once, in order, or text held out would be trained on.
    for index in range(4):
        assert all(turns[index] in text for text in asked[2 * index : 2 * index + 2])
    assert len(set(turns[:4])) > 1


def test_users_begin_in_many_ways():
    generator = np.random.default_rng(0)
    made = [prompts.opening(generator) for _ in range(600)]
    assert len(set(made)) > 80 and "" in made
    assert all(text == text.rstrip(" ") for text in made)


@pytest.mark.skipif(not native.multiplies_bfloat16(), reason="the CPU does not multiply bfloat16")
def test_rounded_text_is_that_of_a_target_whose_products_are_rounded(tmp_path):
    """Its laws are recorded with it, near those of the target itself and not the same."""
    bundle = tasks.bundle()
    (shard, *_) = tasks.make(tmp_path, 50, is_rounded=True)
    policy = policies.Policy(rounded=True)
    rounded = models.language_model(bundle.config, bundle.target.params, policy)
    prompt, answer = shard.text(0)
    tokens = jnp.asarray(np.concatenate([prompt, answer]))[None]
    here = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)

    def normalizer(model):
        cache = model.init_cache(1, tokens.shape[1])
        output, _ = model.apply(model.params, tokens, cache, None, ())
        return np.asarray(jax.nn.logsumexp(output.logits[0, here], axis=-1))

    recorded = shard.normalizer[: len(answer)]
    own, exact = (np.abs(normalizer(m) - recorded) for m in (rounded, bundle.target))
    # Sums of other sizes round a few products to the other side, so not all are the same.
    assert own.mean() < exact.mean() / 4 and exact.max() < 0.3, (own, exact)
    with pytest.raises(ValueError, match="is_rounded"):
        tasks.make(tmp_path, 50)


@pytest.mark.parametrize("domain", prompts.DOMAINS)
def test_every_template_gives_many_prompts(domain):
    generator = np.random.default_rng(0)
    made = [prompts.make(domain, generator, ["First text.", "Second."]) for _ in range(200)]
    assert len(set(made)) > (12 if domain in prompts.NEEDS_PASSAGES else 120)
    assert all(text.strip() and "{" not in text.replace("{'", "") for text in made)


def test_files_are_continued(tmp_path):
    text = tmp_path / "own.txt"
    text.write_text("What the user names is continued by the target. " * 20)
    held = tasks.make(tmp_path / "data", 50, domains=("files",), files=(str(text),))
    prompt, _ = held[0].text(0)
    assert tasks.bundle().tokenizer.decode(prompt) in text.read_text()


def test_recorder_refuses_what_the_target_does_not_have():
    target = tasks.bundle().target
    with pytest.raises(ValueError, match="5 is none of the layers"):
        recording.recorder(target, (5,))
    with pytest.raises(ValueError, match="top=9999"):
        recording.recorder(target, (), 9999)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"domains": ()}, "domains=()"),
        ({"domains": ("cooking",)}, "unknown domain 'cooking'"),
        ({"domains": ("editing", "passage")}, "'editing' works on what 'passage' gives"),
        ({"domains": ("open",)}, "'open' works on what 'user_turn' gives"),
        ({"domains": ("files",)}, "name some"),
        ({"files": ("own.txt",)}, "not among domains="),
        ({"temperatures": (-1.0,)}, "temperatures"),
        ({"batch": 0}, "batch=0"),
        ({"batch": 7}, "no multiple of answers=2"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        dataclasses.replace(tasks.SETTINGS, **changes)


def test_bad_files_are_named(tmp_path):
    for name, content in (("short.txt", b"."), ("binary.txt", b"\xff\xfe\x00")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            tasks.make(tmp_path / "data", 9, domains=("files",), files=(str(tmp_path / name),))


def test_other_settings_are_refused(held, tmp_path):
    tasks.make(tmp_path, 10)
    with pytest.raises(ValueError, match="batch=8, and 4 is asked for"):
        tasks.make(tmp_path, 10, batch=4)
    bundle = tasks.bundle()
    tokenizer = copy.copy(bundle.tokenizer)
    tokenizer.chat_template = f"{tokenizer.chat_template} "
    with pytest.raises(ValueError, match="was made with chat_template="):
        other = dataclasses.replace(bundle, tokenizer=tokenizer)
        data.generate(other, tmp_path, 10, tasks.SETTINGS)


def test_more_than_the_budget_allows_says_how_long_it_would_take(tmp_path):
    with pytest.raises(ValueError, match=r"1000000000 tokens do not fit.*minutes.*ask for \d+"):
        data.generate(tasks.bundle(), tmp_path, 10**9, tasks.SETTINGS, budget_seconds=60)


def test_a_budget_is_for_what_is_still_to_be_made(tmp_path, monkeypatch):
    """What is there costs nothing, and the last shard is not refused for being the last."""
    tasks.make(tmp_path, 300)
    seconds = iter(range(0, 10**6, 100))
    monkeypatch.setattr(data.time, "monotonic", lambda: float(next(seconds)))
    held = data.read(tmp_path, tasks.bundle())
    count = sum(shard.answer_tokens for shard in held)
    options = {"settings": tasks.SETTINGS, "budget_seconds": 1}
    assert len(data.generate(tasks.bundle(), tmp_path, count, **options)) == len(held)
    two = held[0].answer_tokens + 1
    assert len(data.generate(tasks.bundle(), tmp_path / "new", two, **options)) == 2
    with pytest.raises(ValueError, match="do not fit the budget"):
        data.generate(tasks.bundle(), tmp_path, 10 * count, **options)


def test_one_slow_domain_does_not_speak_for_all(tmp_path, monkeypatch):
    """What fits is not refused because the first domain after the compilation is a slow one."""
    clock = [0.0]
    monkeypatch.setattr(data.time, "monotonic", lambda: clock[0])
    seconds = {"passage": 10.0, "user_turn": 100.0, "open": 10.0, "code": 10.0, "editing": 10.0}
    write = data.shards.write

    def timed(path, domain, arrays):
        clock[0] += seconds[domain]
        write(path, domain, arrays)

    monkeypatch.setattr(data.shards, "write", timed)
    made = tasks.make(tmp_path / "free", 1300)
    needed, clock[0] = clock[0], 0.0
    options = {"settings": tasks.SETTINGS, "budget_seconds": 1.2 * needed}
    assert len(data.generate(tasks.bundle(), tmp_path / "held", 1300, **options)) == len(made) > 6
    with pytest.raises(ValueError, match="do not fit the budget"):
        options["budget_seconds"] = 0.3 * needed
        data.generate(tasks.bundle(), tmp_path / "tight", 1300, **options)


@pytest.mark.parametrize("name", ["tokens.npy", "features.npy", "shard.json"])
@pytest.mark.parametrize("damage", ["changed", "short", "gone"])
def test_damaged_shards_are_named(tmp_path, name, damage):
    tasks.make(tmp_path, 10)
    path = tmp_path / "shard-00000" / name
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        half = len(content) // 2
        path.write_bytes(
            content[:half] + (b"" if damage == "short" else b"!" + content[half + 1 :])
        )
    with pytest.raises(shards.ShardError, match="shard-00000.*remove the folder"):
        tasks.make(tmp_path, 600)


def test_a_damaged_shard_that_was_removed_is_made_again(held, tmp_path):
    tasks.make(tmp_path, 800)
    shutil.rmtree(tmp_path / "shard-00001")
    same(tasks.make(tmp_path, 800), held)


def test_shards_of_another_target_are_refused(tmp_path):
    tasks.make(tmp_path, 10)
    bundle = tasks.bundle()
    params = models.init_params(bundle.config, jax.random.key(9))
    other = checkpoints.assemble("tiny", bundle.config, params, bundle.tokenizer)
    with pytest.raises(ValueError, match="made with target="):
        data.generate(other, tmp_path, 10, tasks.SETTINGS)


def test_full_disk_leaves_nothing_half_done(tmp_path, monkeypatch):
    tasks.make(tmp_path, 10)
    count = len(data.read(tmp_path, tasks.bundle()))
    save = np.save

    def full(file, array):
        if array.ndim == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(file, array)

    monkeypatch.setattr(shards.np, "save", full)
    with pytest.raises(
        shards.ShardError, match="MB could not be written.*No space left.*make room"
    ):
        tasks.make(tmp_path, 600)
    monkeypatch.undo()
    assert len(data.read(tmp_path, tasks.bundle())) == count
    assert not list(tmp_path.glob("*.part"))


def test_shards_keep_no_file_open(held):
    count = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    kept = [data.read(held[0].folder.parent, tasks.bundle()) for _ in range(5)]
    order = [batches.Batches(one, 256, 0) for one in kept]
    first = [batch(0) for batch in order]
    assert len(first) == 5
    if count is not None:
        assert len(os.listdir("/proc/self/fd")) <= count + 3
