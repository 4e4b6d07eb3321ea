"""The law of the whole loop: decodes of several steps against the enumerated law.

A batch of them finds the mistakes below; SPECJAX_TEST_DECODES asks for more, such as 1000000.
"""

import dataclasses
import functools
import itertools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import specjax
from specjax import decoding, drafters, models, types, verification
from specjax.decoding import automatic
from specjax.models import recurrent

pytestmark = pytest.mark.optimised

VOCAB, EOS, LENGTH = 3, 2, 5
BATCH = 40_000
DECODES = int(os.environ.get("SPECJAX_TEST_DECODES", BATCH))
PROMPTS = [[0], [1, 0, 1], [0, 1]]
# Sampling options, one value a prompt: a single one for all would let a warper hide another.
PLAIN: dict[str, Any] = {"temperature": [0.8, 0.8, 0.8]}
WARPED: dict[str, Any] = {
    "temperature": [2.0, 1.8, 1.8],
    "top_k": [0, 2, 2],
    "top_p": [0.75, 0.95, 0.95],
    "min_p": [0.4, 0.5, 0.4],
    "repetition_penalty": [0.8, 0.7, 1.5],
    "logit_bias": [[0.0, 0.5, -0.5], [-1.0, -0.5, -1.0], [1.0, 0.5, 0.0]],
}


def tabular(seed, sharpness=1.2):
    return models.tabular_model(models.random_table(jax.random.key(seed), VOCAB, 3, sharpness))


def state_space(seed):
    return models.recurrent_model(recurrent.init_params(jax.random.key(seed), VOCAB, 8))


@dataclasses.dataclass(frozen=True)
class _Without:
    """A model whose head has no row for the token 1."""

    apply: Any

    def __call__(self, *given):
        output, entries = self.apply(*given)
        return dataclasses.replace(output, logits=output.logits[:, :, ::2]), entries


def speaking_of_fewer(model):
    fewer = dataclasses.replace(model, apply=_Without(model.apply), resume=None, vocab_size=2)
    return models.reduced_vocabulary(fewer, np.asarray([0, 2]), VOCAB)


MODELS = {"tabular": (tabular(1), tabular(2)), "recurrent": (state_space(3), state_space(4))}
SPECULATION = {
    "token": ("token", lambda draft: drafters.model(draft, 3)),
    "block": ("block", lambda draft: drafters.model(draft, 3)),
    "block-stopping": ("block", lambda draft: drafters.model(draft, 3, stop_below=0.45)),
    "block-unsure": ("block", lambda draft: drafters.model(draft, 3, stop_above=1.0)),
    "block-reduced": ("block", lambda draft: drafters.model(speaking_of_fewer(draft), 3)),
    "token-reduced": ("token", lambda draft: drafters.model(speaking_of_fewer(draft), 3)),
    "match": ("match", lambda draft: drafters.prompt_lookup(3, shortest=1)),
}


def warped(logits, seen, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, **before):
    """The laws [..., V] after texts in which the tokens `seen` stand, without a sort."""
    scores = logits + np.asarray(before.get("logit_bias", 0.0))
    penalty = before.get("repetition_penalty", 1.0)
    penalised = np.where(scores < 0, scores * penalty, scores / penalty)
    law = np.exp(np.where(seen, penalised, scores) / temperature)
    higher = law[..., None, :] > law[..., :, None]
    law = np.where((higher.sum(-1) < top_k) | (top_k == 0), law, 0.0)
    law = law / law.sum(-1, keepdims=True)
    law = np.where((higher * law[..., None, :]).sum(-1) < top_p, law, 0.0)
    law = np.where(law >= min_p * law.max(-1, keepdims=True), law, 0.0)
    return law / law.sum(-1, keepdims=True)


def enumerated_law(target, index, options):
    """Every possible text of up to five tokens, through its end of sequence, with its probability.

    They follow prompt `index`, which has its own value of every option.
    """
    prompt = PROMPTS[index]
    texts = np.asarray(list(itertools.product(range(VOCAB), repeat=LENGTH)), np.int32)
    rows = np.concatenate([np.tile(prompt, (len(texts), 1)), texts], axis=1)
    cache = target.init_cache(len(rows), rows.shape[1] + 1)
    output, _ = target.apply(target.params, jnp.asarray(rows, jnp.int32), cache, None, ())
    logits = np.asarray(output.logits, np.float64)
    seen = np.logical_or.accumulate(rows[:, :, None] == np.arange(VOCAB), axis=1)
    laws = warped(logits, seen, **{name: values[index] for name, values in options.items()})
    laws = laws[:, len(prompt) - 1 : -1]
    chosen = np.take_along_axis(laws, texts[:, :, None], axis=2)[:, :, 0]
    law = {}
    for text, steps in zip(texts, chosen, strict=True):
        ends = np.flatnonzero(text == EOS)
        length = ends[0] + 1 if len(ends) else LENGTH
        law[tuple(text[:length])] = float(np.prod(steps[:length]))
    assert abs(sum(law.values()) - 1) < 1e-6
    return {text: probability for text, probability in law.items() if probability > 0}


@functools.cache
def prompts_of(batch):
    lengths = np.asarray([len(PROMPTS[row % len(PROMPTS)]) for row in range(batch)], np.int32)
    tokens = np.zeros((batch, max(lengths)), np.int32)
    for row in range(batch):
        tokens[row, : lengths[row]] = PROMPTS[row % len(PROMPTS)]
    return tokens, lengths


def counted(target, drafter, rule, decodes, options, generate=specjax.generate):
    """How often each text followed each prompt, and the statistics of the last batch."""
    tokens, lengths = prompts_of(BATCH)
    prompt = np.arange(BATCH) % len(PROMPTS)
    sampling = types.Sampling(
        **{name: np.asarray(values)[prompt] for name, values in options.items()}
    )
    counts, statistics = [{} for _ in PROMPTS], None
    for run in range(decodes // BATCH):
        result = generate(
            target,
            drafter,
            tokens,
            lengths=lengths,
            rule=rule,
            keys=jax.random.split(jax.random.key(run), BATCH),
            sampling=sampling,
            eos=(EOS,),
            max_new_tokens=LENGTH,
            capacity=8,
            chunk=2,
        )
        statistics = result.statistics
        text, start, end = (np.asarray(x) for x in (result.tokens, result.start, result.length))
        place = start[:, None] + np.arange(LENGTH)[None]
        answers = np.take_along_axis(text, np.minimum(place, text.shape[1] - 1), axis=1)
        answers = np.where(place < end[:, None], answers, -1)
        for index, count in enumerate(counts):
            rows, times = np.unique(answers[index :: len(PROMPTS)], axis=0, return_counts=True)
            for row, time in zip(rows, times, strict=True):
                text_of_row = tuple(int(token) for token in row if token >= 0)
                count[text_of_row] = count.get(text_of_row, 0) + int(time)
    return counts, statistics


def p_value(counts, law):
    """Pearson's test; texts expected fewer than five times are taken together."""
    assert set(counts) <= set(law)
    total = sum(counts.values())
    seen = np.asarray([counts.get(text, 0) for text in law], np.float64)
    wanted = np.asarray([law[text] * total for text in law])
    small = wanted < 5
    seen = np.append(seen[~small], seen[small].sum())
    wanted = np.append(wanted[~small], wanted[small].sum())
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    return stats.chi2.sf(np.sum((seen - wanted) ** 2 / wanted), len(wanted) - 1)


def checked(target, drafter, rule, decodes, options, **others):
    """Holds the decodes to the law; the statistics of the last batch."""
    counts, statistics = counted(target, drafter, rule, decodes, options, **others)
    for index, count in enumerate(counts):
        assert p_value(count, enumerated_law(target, index, options)) > 1e-9
    assert statistics is not None
    return statistics


def assert_unequal_acceptance(statistics):
    """Several steps and unequal acceptance, or the test would say little."""
    assert 1.05 < statistics.tau < LENGTH - 1
    assert len(np.unique(np.asarray(statistics.target_steps))) > 2


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", SPECULATION)
def test_decodes_have_the_law_of_the_target(kind, name):
    target, draft = MODELS[kind]
    rule, make = SPECULATION[name]
    assert_unequal_acceptance(checked(target, make(draft), rule, DECODES, PLAIN))


@pytest.mark.parametrize("name", ["token", "block", "match"])
def test_warped_decodes_have_the_warped_law_of_the_target(name):
    target, draft = MODELS["tabular"]
    rule, make = SPECULATION[name]
    assert_unequal_acceptance(checked(target, make(draft), rule, DECODES, WARPED))


@pytest.mark.parametrize("rule", ["token", "block"])
def test_lengths_chosen_on_the_way_keep_the_law(rule, monkeypatch):
    """Whatever the choice makes of what all rows accepted."""
    target, draft = MODELS["tabular"]
    choices = {length: drafters.model(draft, length) for length in (1, 3)}
    chosen = []

    def best_length(cost, tested, accepted, lengths):
        chosen.append(lengths[(len(chosen) + int(np.sum(accepted))) % 2])
        return chosen[-1]

    monkeypatch.setattr(automatic, "best_length", best_length)
    generate = functools.partial(
        decoding.generate_automatically, cost=decoding.Cost(0.1, ((1, 1.0),)), steps=1
    )
    # Other keys, so that both lengths come first in some batch.
    checked(target, choices, rule, 2 * BATCH, PLAIN, generate=generate)
    assert {1, 3} == set(chosen)


@pytest.mark.parametrize("rule", ["token", "block"])
def test_the_bonus_of_a_target_that_drafts_for_itself_has_its_law(rule):
    target, _ = MODELS["tabular"]
    options = {"temperature": [0.6, 0.6, 0.6]}
    statistics = checked(target, drafters.model(target, 3), rule, BATCH, options)
    np.testing.assert_array_equal(statistics.accepted, statistics.tested)


def test_every_warper_moves_the_warped_law():
    """By 0.2 of the probability when one is left out, by 0.7 when temperature stands alone."""
    target, _ = MODELS["tabular"]

    def moved(options):
        for index in range(len(PROMPTS)):
            law = enumerated_law(target, index, WARPED)
            other = enumerated_law(target, index, options)
            yield sum(max(law[text] - other.get(text, 0.0), 0.0) for text in law)

    assert min(moved({"temperature": WARPED["temperature"]})) > 0.7
    for name in WARPED:
        others = {other: values for other, values in WARPED.items() if other != name}
        assert max(moved(others)) > 0.2, name


def test_the_test_sees_a_wrong_residual():
    """Tokens after a rejection drawn from p instead of norm(max(p − q, 0))."""
    wrong = dataclasses.replace(verification.token.rule, residual=_law_at_node)
    target, draft = MODELS["tabular"]
    counts, _ = counted(target, drafters.model(draft, 3), wrong, BATCH, PLAIN)
    assert p_value(counts[0], enumerated_law(target, 0, PLAIN)) < 1e-9


def test_block_over_drafts_of_position_keyed_noise_is_refused_for_it_is_wrong():
    """After a rejection the same noise drafts again, and `block` has looked at those drafts."""
    target, _ = MODELS["tabular"]
    # A draft without memory drafts the very same tokens again.
    forgetful = models.tabular_model(jnp.asarray([1.0, 0.0, -0.5]))
    coupled = drafters.model(forgetful, 3, coupled=True)
    with pytest.raises(ValueError, match="coupled"):
        specjax.generate(target, coupled, [[0]], rule="block")
    unchecked = dataclasses.replace(verification.block.rule, check=lambda draft: None)
    counts, _ = counted(target, coupled, unchecked, BATCH, PLAIN)
    assert p_value(counts[0], enumerated_law(target, 0, PLAIN)) < 1e-9


def _law_at_node(draft, target_log_probs, node):
    del draft
    return jnp.take_along_axis(target_log_probs, node[:, None, None], axis=1)[:, 0]
