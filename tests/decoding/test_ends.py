"""Where texts end, and that nothing past the end is returned or counted."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax
from specjax import decoding, drafters, models, trees, types

VOCAB = 8


def cycle_model():
    """Greedy, token t is followed by t + 1, and the last by 0."""
    logits = jnp.full((VOCAB + 1, VOCAB), -5.0)
    following = (jnp.arange(VOCAB) + 1) % VOCAB
    return models.tabular_model(logits.at[jnp.arange(VOCAB), following].set(5.0).at[-1, 0].set(5.0))


TARGET = cycle_model()
PERFECT = drafters.model(TARGET, 4)
PLAIN = decoding.NOTHING
DRAFTERS = {
    "plain": PLAIN,
    "perfect": PERFECT,
    "wrong": drafters.model(models.tabular_model(jnp.zeros((VOCAB,))), 4),
}


def run(drafter, prompts, **options):
    return specjax.generate(TARGET, drafter, prompts, **options)


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("end", range(1, 8))
def test_eos_anywhere_in_an_accepted_block(name, end):
    result = run(DRAFTERS[name], [[0], [0, 1]], eos=(end,), max_new_tokens=20)
    for answer, last in zip(result.new_tokens, (0, 1), strict=True):
        length = (end - last - 1) % VOCAB + 1
        assert answer == [(last + 1 + i) % VOCAB for i in range(length)]
    assert result.finish_reasons == ["eos", "eos"]
    emitted = np.asarray(result.statistics.emitted)
    assert emitted.tolist() == [len(answer) for answer in result.new_tokens]


def test_eos_sets_differ_by_row():
    result = run(PERFECT, [[0], [0], [0]], eos=[[3], [2, 5], []], max_new_tokens=6)
    assert result.new_tokens == [[1, 2, 3], [1, 2], [1, 2, 3, 4, 5, 6]]
    assert result.finish_reasons == ["eos", "eos", "length"]


@pytest.mark.parametrize("name", DRAFTERS)
def test_the_limit_is_never_overshot(name):
    limits = [1, 2, 3, 4, 5, 6, 7]
    result = run(DRAFTERS[name], [[0]] * 7, eos=(), max_new_tokens=limits)
    assert [len(answer) for answer in result.new_tokens] == limits
    assert result.finish_reasons == ["length"] * 7


@pytest.mark.parametrize("name", DRAFTERS)
def test_stop_sequences_span_steps_and_are_kept(name):
    stops = [[[2, 3, 4, 5, 6, 7]], [[3, 4], [7]], [[6, 5]], []]
    result = run(DRAFTERS[name], [[0]] * 4, eos=(), stop=stops, max_new_tokens=12)
    one, two, three, four = result.new_tokens
    assert one == [1, 2, 3, 4, 5, 6, 7]
    assert two == [1, 2, 3, 4]
    assert three == four == [(1 + i) % VOCAB for i in range(12)]
    assert result.finish_reasons == ["stop", "stop", "length", "length"]


def test_a_stop_sequence_may_not_begin_in_the_prompt():
    result = run(PERFECT, [[0, 1, 2]], eos=(), stop=[[2, 3]], max_new_tokens=10)
    assert result.new_tokens == [[3, 4, 5, 6, 7, 0, 1, 2, 3]]


def test_an_end_beats_the_limit_at_the_same_token():
    result = run(PERFECT, [[0]] * 2, eos=[[3], []], stop=[[], [[2, 3]]], max_new_tokens=3)
    assert result.finish_reasons == ["eos", "stop"]


def test_nothing_past_the_end_is_counted():
    """EOS is the second of four accepted drafts: two tokens in one step, two drafts accepted."""
    result = run(PERFECT, [[0]], rule="match", eos=(2,), max_new_tokens=20)
    counts = result.statistics
    assert result.new_tokens == [[1, 2]]
    assert counts.tau == 2.0
    assert counts.acceptance_rate == 1.0
    assert np.asarray(counts.tested[0]).tolist() == [1, 1, 0, 0]
    assert np.asarray(counts.histogram[0]).tolist() == [0, 0, 1, 0, 0]


def test_tau_and_acceptance_of_a_perfect_draft():
    result = run(PERFECT, [[0], [3, 4]], eos=(), max_new_tokens=[20, 10])
    assert result.statistics.tau == 5.0
    assert result.statistics.acceptance_rate == 1.0
    assert np.asarray(result.statistics.target_steps).tolist() == [4, 2]


def test_first_rejection_is_tested_and_the_rest_is_not():
    """A draft wrong at its third token: three tested, two accepted, at every step."""

    def propose(params, state, context, keys):
        del params, keys
        last = jnp.take_along_axis(context.tokens, context.length[:, None] - 1, axis=1)
        tokens = (last + jnp.asarray([[1, 2, 4, 5]])) % VOCAB
        return types.draft(tokens, trees.chain(4), vocab_size=VOCAB), state

    drafter = dataclasses.replace(PLAIN, propose=propose, nodes=4)
    result = run(drafter, [[0]], eos=(), max_new_tokens=9)
    counts = result.statistics
    assert result.new_tokens == [[(1 + i) % VOCAB for i in range(9)]]
    assert counts.tau == 3.0
    assert np.asarray(counts.tested[0]).tolist() == [3, 3, 3, 0]
    assert np.asarray(counts.accepted[0]).tolist() == [3, 3, 0, 0]
    assert counts.acceptance_rate == pytest.approx(2 / 3)


def test_levels_of_a_tree_are_draft_steps():
    """Nodes of one level are drafted together; one that is absent takes no step."""

    def propose(params, state, context, keys):
        del params, keys
        tokens = jnp.zeros((len(context.length), 5), jnp.int32)
        present = jnp.asarray([[True, True, True, False, False]])
        tree = trees.from_parents((0, 0, 1, 2, 3))
        return types.draft(tokens, tree, present=present, vocab_size=VOCAB), state

    drafter = dataclasses.replace(PLAIN, propose=propose, nodes=5)
    counts = run(drafter, [[0]], eos=(), max_new_tokens=4).statistics
    steps = int(counts.target_steps[0])
    assert (int(counts.nodes_drafted[0]), int(counts.draft_steps[0])) == (3 * steps, 2 * steps)


def test_a_full_capacity_is_a_finish_reason():
    request, state = decoding.init(TARGET, PERFECT, [[0], [0, 1, 2]], eos=(), max_new_tokens=5)
    capacity = state.tokens.shape[1]
    request = dataclasses.replace(request, limit=jnp.full((2,), 10 * capacity))
    result = decoding.decode(TARGET, PERFECT, request, state)
    assert result.finish_reasons == ["cache_full", "cache_full"]
    assert np.asarray(result.length).tolist() == [capacity, capacity]
    assert result.new_tokens[0] == [(1 + i) % VOCAB for i in range(capacity - 1)]
    assert result.new_tokens[1] == [(3 + i) % VOCAB for i in range(capacity - 3)]


def test_a_finished_row_stays_as_it_is():
    request, state = decoding.init(TARGET, PERFECT, [[0], [0]], eos=[[1], []], max_new_tokens=9)
    state, info = decoding.step(TARGET, PERFECT, request, state)
    assert np.asarray(info.emitted).tolist() == [1, 5]
    after, info = decoding.step(TARGET, PERFECT, request, state)
    assert np.asarray(info.emitted).tolist() == [0, 4]
    assert np.asarray(info.drafted).tolist() == [0, 4]
    assert np.asarray(info.draft_steps).tolist() == [0, 4]
    for before, now in (
        (state.tokens, after.tokens),
        (state.length, after.length),
        (state.cache.length, after.cache.length),
        (state.drafter.seen, after.drafter.seen),
        (state.finish, after.finish),
    ):
        np.testing.assert_array_equal(np.asarray(before)[0], np.asarray(now)[0])


def test_the_invariant_holds_after_every_step():
    """The target's cache holds every committed token but the last, whatever was accepted."""
    weak = drafters.model(models.tabular_model(models.random_table(jax.random.key(4), VOCAB, 2)), 3)
    request, state = decoding.init(TARGET, weak, [[0], [1, 2, 3]], eos=(4,), max_new_tokens=[9, 20])
    while np.any(np.asarray(state.finish) == decoding.FinishReason.RUNNING):
        state, _ = decoding.step(TARGET, weak, request, state)
        np.testing.assert_array_equal(state.cache.length, state.length - 1)
        for row, length in enumerate(np.asarray(state.length)):
            np.testing.assert_array_equal(
                state.cache.tokens[row, : length - 1], state.tokens[row, : length - 1]
            )


def test_nothing_is_written_past_the_end():
    """Texts that are equal are equal as arrays too."""
    options = {"eos": (3,), "max_new_tokens": [20, 2]}
    plain = specjax.autoregressive(TARGET, [[0], [0, 1]], **options)
    result = run(PERFECT, [[0], [0, 1]], **options)
    np.testing.assert_array_equal(result.tokens, plain.tokens)


def test_a_stop_sequence_spans_a_pause():
    options = {"eos": (), "stop": [[3, 4]]}
    first = run(PERFECT, [[0], [0]], max_new_tokens=3, capacity=64, **options)
    rest = run(PERFECT, [[], [4]], state=first.state, max_new_tokens=7, **options)
    assert rest.new_tokens == [[4], [5, 6, 7, 0, 1, 2, 3]]
    assert rest.finish_reasons == ["stop", "length"]


def test_a_row_may_sit_a_turn_out():
    first = run(PERFECT, [[0], [0, 1]], eos=(), max_new_tokens=[15, 2], capacity=16)
    rest = run(PERFECT, [[], [4]], state=first.state, eos=(), max_new_tokens=[0, 3])
    assert rest.new_tokens == [[], [5, 6, 7]]
    assert rest.finish_reasons == ["length", "length"]
