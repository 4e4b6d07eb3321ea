"""One key gives one text in programs compiled as users' are, where fusions may round otherwise."""

import pytest

import specjax
from specjax import types
from tests.decoding import test_identity as identity

pytestmark = pytest.mark.optimised


@pytest.mark.parametrize("prompts", [identity.PROMPTS, identity.PROMPTS[2:3]], ids=["four", "one"])
def test_match_writes_the_warped_text_of_plain_decoding(prompts):
    """Alone a row's own draft decides how wide a pass is; beside others the longest does."""
    target, drafters = identity.make("transformer"), identity.make_drafters("transformer")
    warpers = {name: values[: len(prompts)] for name, values in identity.WARPERS.items()}
    options = identity.options(
        0.0, sampling=types.Sampling(**warpers), max_new_tokens=19, capacity=64
    )
    plain = specjax.autoregressive(target, prompts, **options)
    for name in ("other model", "greedy, stopping", "static tree", "dynamic tree"):
        result = specjax.generate(target, drafters[name], prompts, rule="match", **options)
        assert result.new_tokens == plain.new_tokens, name
        assert result.finish_reasons == plain.finish_reasons, name
