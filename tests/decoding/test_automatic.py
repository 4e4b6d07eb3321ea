"""Draft lengths chosen on the way: the choice, and the text it must not change."""

import jax
import numpy as np
import pytest

import specjax
from specjax import decoding, drafters
from specjax.decoding import generation
from tests.drafters import driving

COST = decoding.Cost(0.1, ((1, 1.0), (2, 1.1), (4, 1.2), (8, 1.4)))


def choices(draft, lengths=(1, 3, 6), **options):
    return {length: drafters.model(draft, length, **options) for length in lengths}


def test_cost_is_a_line_between_what_was_measured_and_beyond():
    assert [COST.of_pass(width) for width in (1, 2, 3, 6, 8, 12)] == pytest.approx(
        [1.0, 1.1, 1.15, 1.3, 1.4, 1.6]
    )
    assert decoding.Cost(0.1, ((1, 1.0),)).of_pass(5) == 1.0


def test_speedup_is_the_formula_of_leviathan():
    """Theorem 3.8: (1 − α^{K+1}) / ((1 − α)(K c + v))."""
    alpha, length = 0.7, 4
    expected = (1 - alpha**5) / (1 - alpha) / (4 * 0.1 + COST.of_pass(5))
    assert COST.speedup([alpha], length) == pytest.approx(expected)
    assert COST.speedup([alpha], 0) == 1


@pytest.mark.parametrize("rate, expected", [(0.02, 1), (0.6, 3), (0.95, 6)])
def test_best_length_follows_acceptance(rate, expected):
    tested = np.full(6, 1000)
    assert decoding.best_length(COST, tested, (rate * tested).astype(int), (1, 3, 6)) == expected


def test_positions_never_tried_are_judged_by_the_one_before():
    tested, accepted = np.asarray([500, 0, 0, 0, 0, 0]), np.asarray([490, 0, 0, 0, 0, 0])
    assert decoding.best_length(COST, tested, accepted, (1, 3, 6)) == 6


@pytest.mark.parametrize("temperature, rule", [(0.0, None), (0.0, "token"), (0.9, "match")])
@pytest.mark.parametrize("steps", [1, 3])
def test_the_text_is_that_of_plain_decoding(temperature, rule, steps):
    target, draft = driving.build("tabular"), driving.build("tabular", 1)
    options = {
        "key": jax.random.key(5),
        "max_new_tokens": [30, 1, 17],
        "sampling": specjax.Sampling(temperature),
        "eos": (),
    }
    prompts = [[1, 2], [3], [4, 5, 1, 2]]
    plain = decoding.autoregressive(target, prompts, **options)
    result = decoding.generate_automatically(
        target, choices(draft), prompts, COST, rule=rule, steps=steps, **options
    )
    assert result.new_tokens == plain.new_tokens
    counts = result.statistics
    assert counts.tested.shape == (3, 6)
    np.testing.assert_array_equal(counts.emitted, [30, 1, 17])
    np.testing.assert_array_equal(np.sum(counts.histogram, axis=1), counts.target_steps)


def test_a_draft_that_agrees_is_given_more_length_and_a_stranger_less():
    target = driving.build("tabular")
    drafted = {}
    for name, draft in (("itself", target), ("stranger", driving.build("tabular", 3))):
        result = decoding.generate_automatically(
            target,
            choices(draft, coupled=False),
            [[1, 2]],
            COST,
            steps=2,
            max_new_tokens=100,
            sampling=specjax.Sampling(1.0),
            eos=(),
        )
        counts = result.statistics
        drafted[name] = int(counts.nodes_drafted.sum()) / int(counts.target_steps.sum())
    assert drafted["itself"] > 5 > 3 > drafted["stranger"]


def test_lengths_compile_once_each():
    target, draft = driving.build("tabular"), driving.build("tabular", 1)
    programs = getattr(generation._run, "_cache_size")  # noqa: B009

    def run(seed):
        key = jax.random.key(seed)
        decoding.generate_automatically(
            target, choices(draft), [[1, 2]], COST, key=key, max_new_tokens=40
        )

    jax.clear_caches()
    for seed in range(4):
        run(seed)
    compiled = programs()
    assert 1 <= compiled <= 3
    for seed in range(4):
        run(seed)
    assert programs() == compiled


def test_bad_choices_are_named():
    target, draft = driving.build("tabular"), driving.build("tabular", 1)
    with pytest.raises(ValueError, match="some draft lengths"):
        decoding.generate_automatically(target, {}, [[1]], COST)
    with pytest.raises(ValueError, match=r"choices\[2\] drafts 3 tokens"):
        decoding.generate_automatically(target, {2: drafters.model(draft, 3)}, [[1]], COST)
    with pytest.raises(ValueError, match="started with another drafter"):
        mixed = {2: drafters.model(draft, 2), 3: drafters.prompt_lookup(3)}
        decoding.generate_automatically(target, mixed, [[1, 2]], COST)
    for branching, length in (
        ({6: drafters.tree(draft, (2, 2))}, 6),
        ({2: drafters.tree(draft, (2,)), 3: drafters.model(draft, 3)}, 2),
    ):
        complaint = rf"choices\[{length}\] drafts a tree of depth {2 if length == 6 else 1}"
        with pytest.raises(ValueError, match=complaint):
            decoding.generate_automatically(target, branching, [[1, 2]], COST)
    for passes in ((), ((2, 1.0),), ((1, 1.0), (1, 2.0)), ((1, -1.0),)):
        with pytest.raises(ValueError):
            decoding.Cost(0.1, passes)
