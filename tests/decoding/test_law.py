"""The law of the whole loop: a million decodes of several steps against the enumerated law."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import specjax
from specjax import drafters, models, types, verification
from specjax.models import recurrent

VOCAB, EOS, LENGTH = 3, 2, 5
DECODES, BATCH = 1_000_000, 125_000
PROMPTS = [[0], [1, 0, 1], [0, 1]]
SAMPLING = types.Sampling(temperature=0.8)


def tabular(seed, sharpness=1.2):
    return models.tabular_model(models.random_table(jax.random.key(seed), VOCAB, 3, sharpness))


def state_space(seed):
    return models.recurrent_model(recurrent.init_params(jax.random.key(seed), VOCAB, 8))


MODELS = {"tabular": (tabular(1), tabular(2)), "recurrent": (state_space(3), state_space(4))}


def enumerated_law(target, prompt):
    """Every text of up to five tokens, through its end of sequence, with its probability."""
    texts = np.asarray(list(itertools.product(range(VOCAB), repeat=LENGTH)), np.int32)
    rows = np.concatenate([np.tile(prompt, (len(texts), 1)), texts], axis=1)
    cache = target.init_cache(len(rows), rows.shape[1] + 1)
    output, _ = target.apply(target.params, jnp.asarray(rows, jnp.int32), cache, None, ())
    logits = np.asarray(output.logits, np.float64)[:, len(prompt) - 1 : -1] / 0.8
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    chosen = np.take_along_axis(log_probs, texts[:, :, None], axis=2)[:, :, 0]
    law = {}
    for text, steps in zip(texts, chosen, strict=True):
        ends = np.flatnonzero(text == EOS)
        length = ends[0] + 1 if len(ends) else LENGTH
        law[tuple(text[:length])] = float(np.exp(steps[:length].sum()))
    assert abs(sum(law.values()) - 1) < 1e-6
    return law


@functools.cache
def prompts_of(batch):
    lengths = np.asarray([len(PROMPTS[row % len(PROMPTS)]) for row in range(batch)], np.int32)
    tokens = np.zeros((batch, max(lengths)), np.int32)
    for row in range(batch):
        tokens[row, : lengths[row]] = PROMPTS[row % len(PROMPTS)]
    return tokens, lengths


def counted(target, drafter, rule, decodes):
    """How often each text followed each prompt, and the accepted length."""
    tokens, lengths = prompts_of(BATCH)
    counts, statistics = [{} for _ in PROMPTS], None
    for run in range(decodes // BATCH):
        result = specjax.generate(
            target,
            drafter,
            tokens,
            lengths=lengths,
            rule=rule,
            keys=jax.random.split(jax.random.key(run), BATCH),
            sampling=SAMPLING,
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


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("rule", "make"),
    [
        ("token", lambda draft: drafters.model(draft, 3)),
        ("block", lambda draft: drafters.model(draft, 3)),
        ("block", lambda draft: drafters.model(draft, 3, stop_below=0.45)),
        ("match", lambda draft: drafters.prompt_lookup(3, shortest=1)),
    ],
    ids=["token", "block", "block-stopping", "match"],
)
def test_a_million_decodes_have_the_law_of_the_target(kind, rule, make):
    target, draft = MODELS[kind]
    counts, statistics = counted(target, make(draft), rule, DECODES)
    for prompt, count in zip(PROMPTS, counts, strict=True):
        assert p_value(count, enumerated_law(target, prompt)) > 1e-9
    # Several steps and unequal acceptance, or the test would say little.
    assert statistics is not None
    assert 1.05 < statistics.tau < LENGTH - 1
    assert len(np.unique(np.asarray(statistics.target_steps))) > 2


def test_the_test_sees_a_wrong_residual():
    """Tokens after a rejection drawn from p instead of norm(max(p − q, 0))."""
    wrong = dataclasses.replace(verification.token.rule, residual=_law_at_node)
    target, draft = MODELS["tabular"]
    counts, _ = counted(target, drafters.model(draft, 3), wrong, BATCH)
    law = enumerated_law(target, PROMPTS[0])
    assert p_value(counts[0], law) < 1e-9


def _law_at_node(draft, target_log_probs, node):
    del draft
    return jnp.take_along_axis(target_log_probs, node[:, None, None], axis=1)[:, 0]
