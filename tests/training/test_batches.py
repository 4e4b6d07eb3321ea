"""Batches of recorded text, and of what the draft writes itself."""

import collections
import dataclasses
import inspect

import numpy as np
import pytest

from specjax.models import policy as policies
from specjax.models import transformer
from specjax.training import batches, core, fitting, on_policy
from tests.training import tasks


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


def test_few_conversations_of_a_width_join_the_next(held):
    order = batches.Batches(held, 1024, 0)
    for width, places in list(order._groups.items())[:-1]:
        assert len(places) >= order._rows[width]
    widest = max(order._groups)
    count = sum(len(places) for width, places in order._groups.items() if width < widest)
    assert count + len(order._groups[widest]) == sum(len(s.rows(unseen=False)) for s in held)


def test_the_few_longest_texts_are_trained_on(held, monkeypatch):
    """They have no wider ones to join."""
    lengths = [40] * 80 + [300] * 6
    shard = dataclasses.replace(
        held[0],
        offsets=np.cumsum([0, *lengths]),
        prompts=np.full(len(lengths), 8),
        temperature=np.zeros(len(lengths), np.float32),
    )
    for multiple, kept in ((1, 6), (4, 4)):
        order = batches.Batches([shard], 4096, 0, multiple=multiple)
        sizes = {width: order._rows[width] for width in order._groups}
        assert sizes[max(sizes)] == kept
        drawn = [place.row for _, places in order._shuffled(0) for place in places]
        assert sum(row >= 80 for row in drawn) == kept


def test_rows_divide_among_parts_and_devices(held):
    order = batches.Batches(held, 1024, 0, multiple=4)
    for step in range(order.per_epoch):
        assert len(order(step).length) % 4 == 0


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
    with pytest.raises(ValueError, match=r"\d+ conversations make no batch of 1000 rows"):
        batches.Batches(held[:1], 100_000, 0, multiple=1000)
    bare = tasks.make(tmp_path, 10, taps=())
    with pytest.raises(ValueError, match="holds no features"):
        batches.Batches(bare, 128, 0)


def test_judged_text_has_the_laws_that_recording_gives(held):
    batch = batches.Batches(held, 1024, 0)(0)
    bundle = tasks.bundle()
    judged = on_policy.judge(
        bundle.target,
        batch.tokens,
        batch.start,
        batch.length,
        batch.normalizer.shape[1],
        policies.for_backend(),
    )
    for row, length in enumerate(batch.length):
        for name in ("features", "normalizer"):
            np.testing.assert_allclose(
                np.asarray(getattr(judged, name)[row, :length], np.float32),
                np.asarray(getattr(batch, name)[row, :length], np.float32),
                rtol=2e-3,
                atol=2e-3,
            )


def test_judged_text_has_nearly_those_laws_where_products_are_rounded(held):
    batch = batches.Batches(held, 1024, 0)(0)
    target = tasks.bundle().target
    policy = policies.for_training()
    rounding = transformer.language_model(tasks.bundle().config, target.params, policy)
    judged = on_policy.judge(
        rounding, batch.tokens, batch.start, batch.length, batch.normalizer.shape[1], policy
    )
    present = np.arange(batch.normalizer.shape[1])[None] < batch.length[:, None]
    head = np.asarray(transformer.head_kernel(target.params), np.float32)

    def law(of):
        features = np.asarray(of.features, np.float32)[present]
        return features @ head.T - np.asarray(of.normalizer)[present][:, None]

    exact = law(batch)
    divergence = np.sum(np.exp(exact) * (exact - law(judged)), axis=-1)
    # Two thousandths of a nat are seen; a place off by one would be hundreds of times that.
    assert np.mean(divergence) < 5e-3 and np.max(divergence) < 0.05


def test_a_draft_trains_on_what_it_writes_and_resumes_to_the_bit(held, tokens, tmp_path):
    objective, params, frozen = tasks.begun(tokens)
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
    # As it is where nobody says otherwise, a checkpoint never falls into a block either.
    block = inspect.signature(on_policy.OnPolicy).parameters["every"].default
    assert inspect.signature(fitting.fit).parameters["save_every"].default % block == 0
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
    with pytest.raises(ValueError, match="share=0.02 of 20 steps is none"):
        on_policy.OnPolicy(bundle, objective, frozen, recorded, share=0.02, every=20)
