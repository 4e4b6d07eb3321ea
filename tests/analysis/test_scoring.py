"""Scoring: laws at every place against enumeration, and counts against what decoding counts."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax
from specjax import drafters, models, sampling, trees, types, verification
from specjax.analysis import counts, scoring

VOCAB = 4
TARGET_TABLE = models.random_table(jax.random.key(3), VOCAB, 3, 2.0)
# Drafts that are often right.
DRAFT_TABLE = TARGET_TABLE + models.random_table(jax.random.key(4), VOCAB, 3, 1.0)
TARGET, DRAFT = models.tabular_model(TARGET_TABLE), models.tabular_model(DRAFT_TABLE)
# Greedy texts of a larger vocabulary do not soon repeat themselves.
_WIDE_TABLE = models.random_table(jax.random.key(5), 16, 3, 2.0)
WIDE = models.tabular_model(_WIDE_TABLE)
WIDE_DRAFT = models.tabular_model(_WIDE_TABLE + models.random_table(jax.random.key(6), 16, 3, 1.5))
TEXTS = [([1, 2], [0, 3, 3, 1, 2, 0, 1]), ([3], [2]), ([0, 1, 0, 1], [0, 1, 0, 1, 3, 3, 3, 3, 2])]
FIELDS = ("overlap", "entropy_p", "entropy_q", "log_p", "log_q", "accepted", "refused")


def law(table, text, temperature, penalty=1.0):
    """The law after a text, by hand: float64[V]."""
    order = table.ndim
    context = ([VOCAB] * order + list(text))[len(text) + 1 :]
    logits = np.asarray(table, np.float64)[tuple(context)]
    seen = np.isin(np.arange(VOCAB), text)
    logits = np.where(seen, np.where(logits < 0, logits * penalty, logits / penalty), logits)
    if temperature == 0:
        return np.eye(VOCAB)[np.argmax(logits)]
    weight = np.exp((logits - logits.max()) / temperature)
    return weight / weight.sum()


def entropy(law):
    return -np.sum(law[law > 0] * np.log(law[law > 0]))


def places(texts):
    """Index of the text, place, text before, token."""
    return [
        (index, place, [*prompt, *answer[:place]], token)
        for index, (prompt, answer) in enumerate(texts)
        for place, token in enumerate(answer)
    ]


# Laws.


@pytest.mark.parametrize("penalty", [None, 1.5])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_laws_are_those_of_the_models(temperature, penalty):
    asked = types.Sampling(temperature, repetition_penalty=penalty)
    found = scoring.score(TARGET, drafters.model(DRAFT, 2), TEXTS, asked)
    for index, place, before, token in places(TEXTS):
        options = temperature, penalty or 1.0
        p, q = (law(table, before, *options) for table in (TARGET_TABLE, DRAFT_TABLE))
        softer = temperature or 1.0, penalty or 1.0
        at = {name: getattr(found, name)[index][place] for name in FIELDS}
        assert at["overlap"] == pytest.approx(np.minimum(p, q).sum(), abs=1e-6)
        for name, table, of in (("p", TARGET_TABLE, p), ("q", DRAFT_TABLE, q)):
            assert at[f"entropy_{name}"] == pytest.approx(
                entropy(law(table, before, *softer)), abs=1e-6
            )
            with np.errstate(divide="ignore"):
                assert at[f"log_{name}"] == pytest.approx(np.log(of[token]), abs=1e-5)
    for name in FIELDS[:5]:
        assert all(row.dtype == np.float32 for row in getattr(found, name))
    assert [len(row) for row in found.overlap] == [len(answer) for _, answer in TEXTS]


def test_a_deterministic_draft_is_accepted_where_the_target_draws_it():
    """Prompt lookup at a temperature: what the target gives to the token that it copies."""
    texts, temperature = [([0, 1, 2, 0, 1, 2], [0, 3, 1, 1, 1, 3])], 0.8
    found = scoring.score(TARGET, drafters.prompt_lookup(3), texts, types.Sampling(temperature))
    copied = [0, 1, None, None, None, 1]
    for (_, place, before, token), draft in zip(places(texts), copied, strict=True):
        at = {name: getattr(found, name)[0][place] for name in FIELDS}
        p = law(TARGET_TABLE, before, temperature)
        assert at["log_p"] == pytest.approx(np.log(p[token]), abs=1e-5)
        assert at["entropy_p"] == pytest.approx(entropy(p), abs=1e-6)
        if draft is None:
            assert np.isnan([at["overlap"], at["entropy_q"], at["log_q"]]).all()
        else:
            assert at["overlap"] == pytest.approx(p[draft], abs=1e-6)
            assert at["entropy_q"] == 0
            assert at["log_q"] == (0 if draft == token else -np.inf)
    # The last place copies 1, 1, 3 …: 1 is refused, since the text has 3.
    assert found.accepted[0].tolist() == [1, 0, 0, 0, 0, 0]
    assert found.refused[0].tolist() == [True, True, False, False, False, True]


def test_agreement_ends_with_the_text():
    """Behind the text stands what no one wrote: here what the draft goes on with."""
    found = scoring.score(TARGET, drafters.prompt_lookup(3), [([0] * 4, [0] * 5)])
    assert found.accepted[0].tolist() == [3, 3, 3, 2, 1]
    assert not found.refused[0].any()


def test_where_a_draft_stops_there_is_no_law():
    drafter = drafters.model(DRAFT, 3, stop_below=0.6)
    found = scoring.score(TARGET, drafter, TEXTS, types.Sampling(0.7))
    absent = [law(DRAFT_TABLE, before, 1.0).max() < 0.6 for _, _, before, _ in places(TEXTS)]
    assert 0 < sum(absent) < len(absent)
    for name in ("overlap", "entropy_q", "log_q"):
        np.testing.assert_array_equal(np.isnan(np.concatenate(getattr(found, name))), absent)
    for name in ("entropy_p", "log_p"):
        assert np.isfinite(np.concatenate(getattr(found, name))).all()


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_chunks_are_invisible(temperature):
    texts = [(prompt, answer * 3) for prompt, answer in TEXTS]
    drafter, asked = drafters.model(DRAFT, 2), types.Sampling(temperature)
    whole = scoring.score(TARGET, drafter, texts, asked)
    for chunk in (1, 4, 9):
        parts = scoring.score(TARGET, drafter, texts, asked, chunk=chunk)
        for name in FIELDS:
            for one, other in zip(getattr(whole, name), getattr(parts, name), strict=True):
                np.testing.assert_array_equal(one, other)


# Drafters that read what a model's draft does not.


def _proposal(law, context):
    token = sampling.categorical(
        sampling.derive(context.keys, sampling.Stream.DRAFT, context.length), law
    )
    return types.draft(token[:, None], trees.chain(1), log_probs=law[:, None])


def _from_the_targets_cache(params, state, context, keys):
    root = jnp.take_along_axis(context.tokens, context.length[:, None] - 1, axis=1)
    target = context.target
    output, _ = target.apply(target.params, root, context.cache, None, ())
    return _proposal(jax.nn.log_softmax(output.logits[:, 0]), context), state


def _from_what_it_was_told(params, state, context, keys):
    return _proposal(jax.nn.log_softmax(state), context), state


def _told(params, state, text, start, count, output):
    last = jnp.maximum(count - 1, 0)[:, None, None]
    here = jnp.take_along_axis(output.features[:, :, 0], last, axis=1)[:, 0]
    return jnp.where(count[:, None] > 0, here, state)


def _reader(propose):
    return types.Drafter(
        params=(),
        init=lambda params, batch, capacity: jnp.zeros((batch, VOCAB)),
        prefill=_told,
        propose=propose,
        update=lambda params, state, context, draft, verdict, output: state,
        nodes=1,
        taps=(0,),
    )


@pytest.mark.parametrize("chunk", [3, 64])
def test_a_drafter_may_read_the_targets_cache_and_features(chunk):
    asked = types.Sampling(1.0)
    own = scoring.score(TARGET, _reader(_from_the_targets_cache), TEXTS, asked, chunk=chunk)
    np.testing.assert_allclose(np.concatenate(own.overlap), 1.0, atol=1e-6)
    # Features of a tabular model are its logits: those at the token before the root.
    late = scoring.score(TARGET, _reader(_from_what_it_was_told), TEXTS, asked, chunk=chunk)
    for index, place, before, _ in places(TEXTS):
        if len(before) > 1:
            p, q = law(TARGET_TABLE, before, 1.0), law(TARGET_TABLE, before[:-1], 1.0)
            assert late.overlap[index][place] == pytest.approx(np.minimum(p, q).sum(), abs=1e-6)


# Counts, against decoding of the same text.

_DETERMINISTIC = {
    "lookup": lambda draft, length: drafters.prompt_lookup(length, shortest=1),
    "greedy model": lambda draft, length: drafters.model(draft, length, greedy=True),
    "greedy tree": lambda draft, length: drafters.tree(draft, (2,) * length, greedy=True),
    "greedy union": lambda draft, length: drafters.union(
        drafters.prompt_lookup(length), drafters.model(draft, length, greedy=True)
    ),
}
_DRAWN = {
    "model": lambda draft, length: drafters.model(draft, length),
    "stopping model": lambda draft, length: drafters.model(draft, length, stop_below=0.6),
    "tree": lambda draft, length: drafters.tree(draft, (2,) * length),
}


PROMPTS = [[1, 2, 1, 2], [3], [0, 0]]


def check_counts(found, statistics):
    """To the last count, text by text; some drafts are accepted and some are not."""
    assert 0 < float(statistics.acceptance_rate) < 1
    np.testing.assert_array_equal(found.tokens, statistics.emitted)
    np.testing.assert_array_equal(found.steps, statistics.target_steps)
    np.testing.assert_array_equal(found.tested, statistics.tested)
    np.testing.assert_array_equal(found.accepted, statistics.accepted)
    assert found.tau.estimate == pytest.approx(float(statistics.tau), abs=1e-12)
    assert found.acceptance_rate.estimate == pytest.approx(float(statistics.acceptance_rate))


@pytest.mark.parametrize(
    "kind, temperature",
    [
        *((kind, 0.0) for kind in (*_DETERMINISTIC, *_DRAWN)),
        *((kind, 0.8) for kind in ("lookup", "greedy union")),
    ],
)
def test_agreement_is_counted_as_decoding_counts(kind, temperature):
    """Texts that a limit ends and texts that end themselves; for shorter drafts too."""
    build = functools.partial((_DETERMINISTIC | _DRAWN)[kind], WIDE_DRAFT)
    options = {
        "key": jax.random.key(5),
        "sampling": types.Sampling(temperature),
        "max_new_tokens": 30,
        "eos": [(), (), (2,)],
    }
    results = {
        length: specjax.generate(
            WIDE, build(length), PROMPTS, **options, rule=None if temperature == 0 else "match"
        )
        for length in (1, 3)
    }
    answers = results[3].new_tokens
    assert answers == results[1].new_tokens
    texts = list(zip(PROMPTS, answers, strict=True))
    scores = scoring.score(WIDE, build(3), texts, options["sampling"])
    for length, result in results.items():
        check_counts(scores.counts(length), result.statistics)


@pytest.mark.parametrize("kind", ["model", "stopping model"])
def test_one_drafted_token_tells_all_greedy_lengths(kind):
    build = functools.partial(_DRAWN[kind], WIDE_DRAFT)
    options = {"max_new_tokens": 30, "eos": ()}
    answers = specjax.autoregressive(WIDE, PROMPTS, **options).new_tokens
    scores = scoring.score(WIDE, build(1), list(zip(PROMPTS, answers, strict=True)))
    absent = np.isnan(np.concatenate(scores.overlap))
    assert absent.any() == (kind == "stopping model") and not absent.all()
    for length in (1, 2, 5):
        result = specjax.generate(WIDE, build(length), PROMPTS, **options)
        assert result.new_tokens == answers
        check_counts(scores.counts(length), result.statistics)


def test_both_ways_agree_on_text_that_the_target_would_not_write():
    laws, agreement = (scoring.score(TARGET, drafters.model(DRAFT, k), TEXTS) for k in (1, 3))
    assert any((row == -np.inf).any() for row in laws.log_p)
    for length in (2, 3):
        for one, other in zip(
            dataclasses.astuple(laws.counts(length)),
            dataclasses.astuple(agreement.counts(length)),
            strict=True,
        ):
            np.testing.assert_array_equal(one, other)


_ENDING, _LONGEST = 3, 4
# Every answer of at most four tokens that a 3 ends, or the limit.
_ANSWERS = [
    answer
    for length in range(1, _LONGEST + 1)
    for answer in itertools.product(range(VOCAB), repeat=length)
    if _ENDING not in answer[:-1] and (answer[-1] == _ENDING or length == _LONGEST)
]


@functools.cache
def scores_of_all(kind):
    texts = [([1, 2], answer) for answer in _ANSWERS]
    return scoring.score(TARGET, _DRAWN[kind](DRAFT, 1), texts, types.Sampling(0.9))


@pytest.mark.parametrize("rule", ["token", "block", "match"])
@pytest.mark.parametrize("kind", ["model", "stopping model"])
def test_drawn_drafts_are_counted_in_the_mean_given_the_text(kind, rule):
    """Many decodes of few texts: the difference to every text's own expectation has mean 0."""
    rows, length = 10_000, 3
    result = specjax.generate(
        TARGET,
        _DRAWN[kind](DRAFT, length),
        [[1, 2]] * rows,
        rule=rule,
        key=jax.random.key(7),
        sampling=types.Sampling(0.9),
        max_new_tokens=_LONGEST,
        eos=(_ENDING,),
    )
    index = np.asarray([_ANSWERS.index(tuple(answer)) for answer in result.new_tokens])
    expected, counted = scores_of_all(kind).counts(length, rule), result.statistics
    for found, of_text in (
        (counted.target_steps[:, None], expected.steps[:, None]),
        (counted.tested, expected.tested),
        (counted.accepted, expected.accepted),
    ):
        wanted = of_text[index]
        gap = np.asarray(found, np.float64) - wanted
        # Of what the text tells nothing is left, neither in the mean nor along it.
        for weight in (np.ones_like(gap), wanted - wanted.mean(axis=0)):
            weighted = gap * weight
            error = weighted.std(axis=0) / np.sqrt(rows)
            assert (np.abs(weighted.mean(axis=0)) <= 4.5 * error + 1e-6).all()
            assert (error < 0.01).all()


def test_the_overlap_is_the_acceptance_rate_of_drafts_of_one_token():
    """Over laws without context, where every place of every text is alike; within 0.01."""
    p, q = jnp.asarray([1.0, 0.2, -0.5, 0.0]), jnp.asarray([0.1, 0.8, 0.0, -1.0])
    target, drafter = models.tabular_model(p), drafters.model(models.tabular_model(q), 1)
    prompts, asked = [[1]] * 256, types.Sampling(0.8)
    options = {"key": jax.random.key(9), "sampling": asked, "max_new_tokens": 64, "eos": ()}
    result = specjax.generate(target, drafter, prompts, rule="token", **options)
    texts = [([1], answer) for answer in result.new_tokens[:4]]
    overlap = np.mean(np.concatenate(scoring.score(target, drafter, texts, asked).overlap))
    assert overlap == pytest.approx(float(result.statistics.acceptance_rate), abs=0.01)


# The sums themselves.


def test_where_steps_begin():
    survival = np.asarray([[0.5, 0.2], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    # From 0: to 1 with 0.5, to 2 with 0.3, to 3 with 0.2; from 1 to 3; from 2 to 3.
    np.testing.assert_allclose(counts.begins(survival), [1, 0.5, 0.3, 0.2 + 0.5 + 0.3])
    assert counts.begins(np.zeros((3, 0))).tolist() == [1, 1, 1]


def test_a_draft_that_the_target_never_writes_is_refused():
    log_p, log_q = np.log([0.5, 1.0]), np.log([0.5, 1.0])
    steps, tested, accepted = counts.by_laws("token", log_p, log_q, 1)
    assert (steps, tested.tolist(), accepted.tolist()) == (1, [1], [1])
    log_p = np.asarray([-np.inf, 0.0])
    steps, tested, accepted = counts.by_laws("token", log_p, log_q, 1)
    assert (steps, tested.tolist(), accepted.tolist()) == (2, [2], [1])


def test_rates_are_ratios_of_sums_with_intervals_over_texts():
    found = counts.Counts(
        tokens=np.asarray([8, 4] * 3),
        steps=np.asarray([2.0, 4.0] * 3),
        tested=np.asarray([[2.0, 1.0], [2.0, 0.0]] * 3),
        accepted=np.asarray([[2.0, 0.5], [1.0, 0.0]] * 3),
    )
    # Texts of four tokens a step and of one.
    assert found.tau.estimate == 2
    assert 1 <= found.tau.low < 2 < found.tau.high <= 4
    assert found.accepted_length.estimate == pytest.approx(3.5 / 6)
    assert found.acceptance_rate.estimate == pytest.approx(3.5 / 5)
    assert [rate.estimate for rate in found.by_position] == [0.75, 0.5]


# What is refused.


def test_what_cannot_be_scored():
    drafter = drafters.model(DRAFT, 2)
    with pytest.raises(ValueError, match="no texts"):
        scoring.score(TARGET, drafter, [])
    with pytest.raises(ValueError, match="at least one token each"):
        scoring.score(TARGET, drafter, [([1], [])])
    with pytest.raises(ValueError, match="drafts nothing"):
        scoring.score(TARGET, specjax.decoding.NOTHING, TEXTS)
    short = dataclasses.replace(TARGET, context_length=8)
    with pytest.raises(ValueError, match="context holds 8"):
        scoring.score(short, drafter, TEXTS)


def test_what_scores_do_not_tell():
    asked = types.Sampling(0.7)
    lookup = scoring.score(TARGET, drafters.prompt_lookup(2), TEXTS, asked)
    with pytest.raises(ValueError, match="length=3 cannot be told from drafts of 2"):
        lookup.counts(3)
    with pytest.raises(verification.RefusedDraftError, match="deterministic"):
        lookup.counts(2, "token")
    for drafter in (drafters.tree(DRAFT, (2, 1)), drafters.model(DRAFT, 2, coupled=True)):
        scores = scoring.score(TARGET, drafter, TEXTS, asked)
        assert np.isfinite(np.concatenate(scores.overlap)).all()
        with pytest.raises(ValueError, match="in a tree, or coupled"):
            scores.counts()
    drawn = scoring.score(TARGET, drafters.model(DRAFT, 2), TEXTS, asked)
    with pytest.raises(ValueError, match="length=0"):
        drawn.counts(0)
    with pytest.raises(ValueError, match="'k_seq' cannot be estimated"):
        drawn.counts(2, "k_seq")
    assert drawn.counts(2).steps.tolist() == drawn.counts(2, "block").steps.tolist()
