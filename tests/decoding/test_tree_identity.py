"""One key gives one text, over trees too: of one draft model, and of several drafters."""

import numpy as np
import pytest

import specjax
from specjax import drafters
from tests.decoding.test_identity import PROMPTS, make, options

DRAFTERS = {
    "coupled model": drafters.model(make("recurrent", 5), 3, coupled=True),
    "tree": drafters.tree(make("transformer", 4), (3, 2, 1)),
    "tree with replacement": drafters.tree(make("recurrent", 5), (2, 2), replacement=True),
    "greedy tree": drafters.tree(make("tabular", 9), (2, 2), greedy=True),
    "union": drafters.union(
        drafters.prompt_lookup(3, shortest=1),
        drafters.tree(make("tabular", 9), (2, 1), replacement=True),
        drafters.model(make("recurrent", 5), 2, greedy=True),
    ),
}
RATIO = {
    "multi_candidate": ("tree", "tree with replacement", "union"),
    "traversal": ("tree", "tree with replacement", "union"),
    "k_seq": ("tree with replacement",),
}


@pytest.mark.parametrize("kind", ["tabular", "transformer"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_match_writes_the_text_of_plain_decoding(kind, temperature):
    target = make(kind)
    plain = specjax.autoregressive(target, PROMPTS, **options(temperature))
    accepted = 0
    for name, drafter in DRAFTERS.items():
        result = specjax.generate(target, drafter, PROMPTS, rule="match", **options(temperature))
        assert result.new_tokens == plain.new_tokens, name
        assert result.finish_reasons == plain.finish_reasons, name
        accepted += int(np.sum(result.statistics.accepted))
    assert accepted > 0


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_coupled_writes_the_text_of_plain_decoding(temperature):
    target = make("tabular")
    plain = specjax.autoregressive(target, PROMPTS, **options(temperature))
    drafter = DRAFTERS["coupled model"]
    result = specjax.generate(target, drafter, PROMPTS, rule="coupled", **options(temperature))
    assert result.new_tokens == plain.new_tokens


@pytest.mark.parametrize("rule", RATIO)
def test_ratio_rules_at_temperature_zero_write_the_greedy_text(rule):
    target = make("tabular")
    plain = specjax.autoregressive(target, PROMPTS, **options(0.0))
    for name in RATIO[rule]:
        result = specjax.generate(target, DRAFTERS[name], PROMPTS, rule=rule, **options(0.0))
        assert result.new_tokens == plain.new_tokens, name
