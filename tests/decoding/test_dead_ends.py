"""Texts after which a constraint allows no token end there, whatever drafts and verifies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

import specjax
from specjax import decoding, drafters, models, sampling, trees, types

VOCAB = 6
TARGET = models.tabular_model(models.random_table(jax.random.key(1), VOCAB, 2))
DRAFT = models.tabular_model(models.random_table(jax.random.key(2), VOCAB, 2))
LAST = 4


@struct.dataclass
class Follows:
    """A token may stand after another where `table[V, V]` says so."""

    table: jax.Array

    def __call__(self, history):
        last = jnp.take_along_axis(history.tokens, history.length[:, None] - 1, axis=1)
        batch, count, depth = history.path.shape
        before = jnp.broadcast_to(last, (batch, count))
        if depth:
            index = jnp.maximum(history.depth - 1, 0)[:, :, None]
            drafted = jnp.take_along_axis(history.path, index, axis=2)[:, :, 0]
            before = jnp.where(history.depth > 0, drafted, before)
        return self.table[before]


# Tokens only grow, by three at the most, and nothing follows the fourth or the fifth.
GROWING = np.asarray([[a < b <= a + 3 and a < LAST for b in range(VOCAB)] for a in range(VOCAB)])
PROMPTS = [[0], [2, 3], [1, 1, 0], [5]]


def options(temperature, **more):
    constraint = Follows(jnp.asarray(GROWING))
    law = types.Sampling(temperature=temperature, constraint=constraint)
    return {"sampling": law, "eos": (), "max_new_tokens": 9, "key": jax.random.key(4), **more}


CHAINS = {
    "model": drafters.model(DRAFT, 3),
    "target itself": drafters.model(TARGET, 4),
    "greedy": drafters.model(DRAFT, 3, greedy=True),
    "prompt_lookup": drafters.prompt_lookup(3, shortest=1),
}


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("temperature", [0.0, 1.2])
def test_match_ends_where_plain_decoding_ends(name, temperature):
    plain = specjax.autoregressive(TARGET, PROMPTS, **options(temperature))
    assert plain.finish_reasons == ["dead_end"] * len(PROMPTS)
    assert plain.new_tokens[3] == []
    for prompt, answer in zip(PROMPTS, plain.new_tokens, strict=True):
        text = prompt[-1:] + answer
        assert text[-1] >= LAST
        assert all(GROWING[a, b] for a, b in zip(text, text[1:], strict=False))
    drafted = specjax.generate(TARGET, CHAINS[name], PROMPTS, rule="match", **options(temperature))
    assert drafted.new_tokens == plain.new_tokens
    assert drafted.finish_reasons == plain.finish_reasons


@pytest.mark.parametrize("rule", ["token", "block"])
def test_ratio_rules_end_there_with_the_right_law(rule):
    rows = 4096
    drafted = specjax.generate(
        TARGET,
        CHAINS["model"],
        [[0]] * rows,
        rule=rule,
        keys=jax.random.split(jax.random.key(0), rows),
        **options(1.0, key=None),
    )
    assert set(drafted.finish_reasons) == {"dead_end"}
    plain = specjax.autoregressive(
        TARGET,
        [[0]] * rows,
        keys=jax.random.split(jax.random.key(1), rows),
        **options(1.0, key=None),
    )

    def shares(result):
        texts, counts = np.unique([str(text) for text in result.new_tokens], return_counts=True)
        return dict(zip(texts.tolist(), (counts / rows).tolist(), strict=True))

    ours, theirs = shares(drafted), shares(plain)
    assert set(ours) == set(theirs)
    # Three standard deviations of a difference of two shares, for a dozen texts.
    assert all(abs(ours[text] - theirs[text]) < 0.04 for text in ours)


def test_an_end_of_sequence_at_a_dead_end_is_an_end_of_sequence():
    ended = specjax.generate(
        TARGET, CHAINS["target itself"], PROMPTS, **options(0.0, eos=(LAST, LAST + 1))
    )
    assert ended.finish_reasons == ["eos", "eos", "eos", "dead_end"]


def test_a_dead_end_goes_on_with_new_tokens_only():
    drafter = CHAINS["target itself"]
    first = specjax.generate(TARGET, drafter, PROMPTS, rule="block", **options(0.7, capacity=40))
    stays = specjax.generate(
        TARGET, drafter, [[], [1, 0], [], [0]], rule="block", state=first.state, **options(0.7)
    )
    assert stays.finish_reasons == ["dead_end"] * 4
    assert [bool(answer) for answer in stays.new_tokens] == [False, True, False, True]
    # The draft model is the target, so a token lost from its memory would show as a rejection.
    freed = options(0.7, sampling=types.Sampling(0.7), max_new_tokens=8)
    again = specjax.generate(
        TARGET, drafter, [[1], [2], [3], [1, 2]], rule="block", state=stays.state, **freed
    )
    assert [len(answer) for answer in again.new_tokens] == [8] * 4
    assert again.statistics.acceptance_rate == 1.0


def test_a_draft_stops_before_a_dead_end():
    request, state = decoding.init(TARGET, CHAINS["target itself"], [[3], [0]], **options(0.0))
    state, info = decoding.step(TARGET, CHAINS["target itself"], request, state, "match")
    assert int(info.drafted[0]) == 1
    assert int(info.emitted[0]) == int(info.accepted[0]) == 1
    np.testing.assert_array_equal(state.finish[0], decoding.FinishReason.DEAD_END)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_laws_and_draws_of_a_dead_end(temperature):
    past = sampling.history(
        jnp.asarray([[LAST], [0]]),
        jnp.asarray([1, 1]),
        trees.chain(0),
        jnp.zeros((2, 0), jnp.int32),
    )
    law = types.Sampling(
        temperature=temperature,
        top_k=3,
        top_p=0.9,
        min_p=0.01,
        constraint=Follows(jnp.asarray(GROWING)),
    )
    logits = jax.random.normal(jax.random.key(0), (2, 1, VOCAB))
    log_probs = sampling.warp(law, logits, past)
    assert np.all(np.asarray(log_probs[0]) == -np.inf)
    np.testing.assert_allclose(np.exp(log_probs[1]).sum(), 1, rtol=1e-6)
    keys = jax.random.split(jax.random.key(1), 2)
    drawn = sampling.draw_target(keys, jnp.ones((2, 1), jnp.int32), log_probs)
    assert drawn[0, 0] == -1 and 1 <= drawn[1, 0] <= 3
    drawn = sampling.categorical(keys, log_probs[:, 0])
    assert drawn[0] == -1 and 1 <= drawn[1] <= 3
