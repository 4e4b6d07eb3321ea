"""The draft that comes with specjax, on the real target: its texts, its law, its acceptance."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import methods, prompt_files
from specjax import analysis, checkpoints, decoding, drafters, trees, types
from tests.cases import exhaustive

pytestmark = pytest.mark.optimised

# Nine tenths of what is measured: 1.88.
FLOOR = 1.7
PROMPTS = [one for one in prompt_files.read() if str(one.question).startswith("ordinary_")]
CARD = methods.SHIPPED.with_suffix(".json")


@pytest.fixture(scope="module")
def asked(smollm2):
    return [smollm2.chat(prompt.turns[0]) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def plain(smollm2, asked):
    return decoding.autoregressive(smollm2.target, asked, max_new_tokens=48).new_tokens


def drafter(bundle, **settings):
    return methods.build("draft", bundle, methods.Settings(**settings))


@pytest.mark.parametrize("rule", [exhaustive("token"), "block", exhaustive("match")])
def test_greedy_texts_are_the_targets_and_drafts_are_taken(smollm2, asked, plain, rule):
    result = decoding.generate(
        smollm2.target, drafter(smollm2, draft_length=5), asked, max_new_tokens=48, rule=rule
    )
    assert result.new_tokens == plain
    statistics = jax.device_get(result.statistics)
    new = sum(map(len, plain))
    # Features a token off, a head's rows in another order, or a draft that no longer copies would
    # fall under it.
    assert new / np.sum(statistics.target_steps) > FLOOR


@pytest.mark.parametrize("rule", ["match", exhaustive("coupled")])
def test_drawn_texts_are_those_of_plain_decoding(smollm2, asked, rule):
    options = {
        "key": jax.random.key(3),
        "sampling": types.Sampling(0.8),
        "max_new_tokens": 24,
    }
    draft_model = checkpoints.drafts.read(methods.SHIPPED, smollm2)
    coupled = drafters.model(draft_model, 4, coupled=True)
    result = decoding.generate(smollm2.target, coupled, asked, rule=rule, **options)
    wanted = decoding.autoregressive(smollm2.target, asked, **options)
    assert result.new_tokens == wanted.new_tokens


@pytest.mark.parametrize("rule", [exhaustive("token"), "block"])
def test_the_law_of_what_follows_a_prompt_is_the_targets(smollm2, asked, rule):
    """Exactly, by enumeration, over every text of three tokens from the six likeliest."""
    draft_model = checkpoints.drafts.read(methods.SHIPPED, smollm2)
    settings = types.Sampling(0.8)
    prompt = asked[0]
    root = _logits(smollm2.target, [prompt])[0, -1]
    # One that the draft cannot speak of is among them: there it has probability 0.
    inside = np.argsort(-root)[:5]
    silent = np.isneginf(_logits(draft_model, [prompt])[0, -1])
    foreign = max(np.flatnonzero(silent), key=lambda token: root[token])
    tokens = np.sort([*[t for t in inside if t != foreign], foreign])
    laws = [
        _conditional(model, prompt, tokens, settings) for model in (smollm2.target, draft_model)
    ]
    certificate = analysis.certify(rule, trees.chain(2), *laws)
    assert certificate.passed
    assert np.all(np.exp(laws[1][0][:, tokens == foreign]) == 0)
    assert 0 < certificate.expected_accepted <= certificate.bound


def test_what_it_says_that_it_drew_from_is_its_law(smollm2, asked):
    """In the loop, behind a cache, against a pass over the whole text; rows of two lengths."""
    settings = types.Sampling(0.8)
    made = drafter(smollm2, draft_length=3, stop="never")
    prompts = asked[:2]
    request, state = decoding.init(
        smollm2.target, made, prompts, sampling=settings, max_new_tokens=8
    )
    context = types.Context(
        *(state.tokens, state.length, state.length > 0, request.sampling, smollm2.target),
        *(state.cache, request.keys),
    )
    draft, _ = made.propose(made.params, state.drafter, context, request.keys)
    draft_model = checkpoints.drafts.read(methods.SHIPPED, smollm2)
    for row, prompt in enumerate(prompts):
        text = [*prompt, *draft.tokens[row].tolist()]
        law = jax.nn.log_softmax(jnp.asarray(_logits(draft_model, [text])[0, -4:-1]) / 0.8, axis=-1)
        np.testing.assert_array_equal(np.isneginf(draft.log_probs[row]), np.isneginf(law))
        finite = np.isfinite(law)
        np.testing.assert_allclose(
            np.asarray(draft.log_probs[row])[finite], np.asarray(law)[finite], atol=2e-3
        )
        assert all(np.isfinite(law[place, text[place - 3]]) for place in range(3))


def _logits(model, texts):
    cache = model.init_cache(len(texts), len(texts[0]) + 1)
    return np.asarray(
        model.apply(model.params, jnp.asarray(texts, jnp.int32), cache, None, ())[0].logits
    )


def _conditional(model, prompt, tokens, settings):
    """The model's law of the next three tokens, given that all are among `tokens`."""
    law = []
    for depth in range(3):
        texts = [[*prompt, *more] for more in itertools.product(tokens.tolist(), repeat=depth)]
        logits = _logits(model, texts)[:, -1, tokens].astype(np.float64)
        law.append(jax.nn.log_softmax(jnp.asarray(logits) / settings.temperature, axis=-1))
    return law


def test_the_card_tells_how_it_was_made():
    card = json.loads(CARD.read_text(encoding="utf-8"))
    assert card["command"].startswith("python -m experiments.distill ")
    assert card["bytes"] == methods.SHIPPED.stat().st_size <= 16e6
    assert card["held_out"]["tau"] > 2 and card["coverage"] > 0.9
    assert all(row["tau"] > 1.5 for row in card["acceptance"]["groups"].values())
    assert card["data"]["minutes"] + card["earlier"]["data"]["minutes"] <= 120
    assert card["training"]["minutes"] + card["earlier"]["training"]["minutes"] <= 120
