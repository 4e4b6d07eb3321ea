"""Replay: answers from a record against decodes and enumeration, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax
from specjax import analysis, drafters, models, trees, types
from specjax.analysis import replay

VOCAB = 4
P, Q = jnp.asarray([1.0, 0.2, -0.5, 0.0]), jnp.asarray([0.1, 0.8, 0.0, -1.0])
# Laws without context, so that every place of a text is alike.
TARGET, DRAFT = models.tabular_model(P), models.tabular_model(Q)
TEMPERATURES = (0.7, 1.0, 1.5)


def written(target, temperature, count=64, length=48, seed=0):
    """Texts that the target wrote."""
    result = specjax.autoregressive(
        target,
        [[1]] * count,
        key=jax.random.key(seed),
        sampling=types.Sampling(temperature),
        max_new_tokens=length,
        eos=(),
    )
    return [([1], answer) for answer in result.new_tokens]


@pytest.fixture(scope="module")
def record():
    return replay.record(
        TARGET,
        DRAFT,
        written(TARGET, 1.0),
        types.Sampling(1.0),
        target_temperatures=TEMPERATURES,
        draft_temperatures=TEMPERATURES,
    )


def enumerated(rule, length, target_temperature, draft_temperature):
    def law(logits, temperature, depth):
        row = jax.nn.log_softmax(logits / temperature)
        return [jnp.broadcast_to(row, (VOCAB**level, VOCAB)) for level in range(depth)]

    return analysis.certify(
        rule,
        trees.chain(length),
        law(P, target_temperature, length + 1),
        law(Q, draft_temperature, length),
    ).expected_accepted


@pytest.mark.parametrize("rule", ["token", "block"])
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("draft_temperature", TEMPERATURES)
def test_lengths_rules_and_temperatures_of_the_draft(record, rule, length, draft_temperature):
    found = record.expected_accepted(rule, length, draft_temperature=draft_temperature)
    wanted = enumerated(rule, length, 1.0, draft_temperature)
    assert abs(found.mean - wanted) < 4.5 * found.standard_error
    assert 0 < found.standard_error < 0.05 and found.effective_texts == 64


def test_another_temperature_of_the_target_by_importance_weights():
    """Over short texts: weights multiply up, and say so."""
    short = replay.record(
        TARGET,
        DRAFT,
        written(TARGET, 1.0, count=256, length=4),
        types.Sampling(1.0),
        target_temperatures=(1.5,),
    )
    found = short.expected_accepted("token", 2, target_temperature=1.5, draft_temperature=1.0)
    assert abs(found.mean - enumerated("token", 2, 1.5, 1.0)) < 4.5 * found.standard_error
    assert 1 < found.effective_texts < 256


@pytest.mark.parametrize(
    "rule, options, message",
    [
        ("token", {"draft_temperature": 0.9}, "draft_temperature=0.9 was not recorded"),
        ("token", {"target_temperature": 2.0}, "target_temperature=2.0 was not recorded"),
        ("match", {}, "'match' cannot be estimated"),
    ],
)
def test_what_the_record_cannot_answer(record, rule, options, message):
    with pytest.raises(ValueError, match=message):
        record.expected_accepted(rule, 2, **options)
    with pytest.raises(ValueError, match="no text is as long"):
        record.expected_accepted("token", 100)


def test_a_temperature_is_known_by_the_number_that_was_given():
    """0.8 is no number of single precision, which `Sampling` holds."""
    texts = written(TARGET, 0.8, count=2, length=8)
    held = replay.record(TARGET, DRAFT, texts, types.Sampling(0.8), target_temperatures=(0.8,))
    assert list(held.target) == list(held.draft) == [0.8]
    estimate = held.expected_accepted("token", 2, target_temperature=0.8)
    assert estimate == held.expected_accepted("token", 2)


def test_greedy_text_tells_no_ratio():
    with pytest.raises(ValueError, match="record_agreement"):
        replay.record(TARGET, DRAFT, [([1], [2])], types.Sampling(0.0))


@pytest.mark.parametrize("kind", ["lookup", "greedy model", "greedy tree"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_agreement_is_that_of_the_decode(kind, temperature):
    """Exact: the very τ, for the drafts that were made and for shorter ones."""
    table = models.random_table(jax.random.key(3), VOCAB, 3, 2.0)
    target = models.tabular_model(table)
    other = models.tabular_model(models.random_table(jax.random.key(4), VOCAB, 2, 1.0))
    makers = {
        "lookup": lambda length: drafters.prompt_lookup(length, shortest=1),
        "greedy model": lambda length: drafters.model(other, length, greedy=True),
        "greedy tree": lambda length: drafters.tree(other, (2,) * length, greedy=True),
    }
    prompts = [[1, 2, 1, 2], [3]]
    options = {
        "key": jax.random.key(5),
        "sampling": types.Sampling(temperature),
        "max_new_tokens": 40,
        "eos": (),
    }
    plain = specjax.autoregressive(target, prompts, **options)
    texts = list(zip(prompts, plain.new_tokens, strict=True))
    agreement = replay.record_agreement(target, makers[kind](3), texts, types.Sampling(temperature))
    for length in (1, 2, 3):
        result = specjax.generate(target, makers[kind](length), prompts, rule="match", **options)
        assert result.new_tokens == plain.new_tokens
        assert agreement.tau(length) == pytest.approx(float(result.statistics.tau), abs=1e-6)
    with pytest.raises(ValueError, match="length=4 cannot be told from drafts of 3"):
        agreement.tau(4)


def test_a_drafter_that_draws_is_refused():
    with pytest.raises(ValueError, match="draws its drafts"):
        replay.record_agreement(TARGET, drafters.model(DRAFT, 2), [([1], [2, 3])])


def test_of_a_single_text_there_is_no_spread():
    record = replay.record(TARGET, DRAFT, written(TARGET, 1.0, count=1), types.Sampling(1.0))
    assert np.isnan(record.expected_accepted("token", 2).standard_error)
