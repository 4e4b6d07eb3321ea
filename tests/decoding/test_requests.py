"""Bad input: each a ValueError that names the value."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax
from specjax import decoding, drafters, models, trees, types

VOCAB = 4
TARGET = models.tabular_model(jnp.zeros((VOCAB,)))
SMALL = models.TransformerConfig(VOCAB, 8, 8, 1, 1, 1, 8, 32)


def transformer():
    return models.language_model(SMALL, models.init_params(SMALL, jax.random.key(0)))


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "at least one row"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 4]], {}, "token 4, outside the vocabulary 0…3"),
        ([[-1]], {}, "token -1"),
        (["text"], {}, "lists of token ids"),
        ("text", {}, "lists of token ids"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[1]], {"max_new_tokens": 2.5}, "max_new_tokens=2.5"),
        ([[1]], {"max_new_tokens": [1, 2]}, "one value or 1"),
        ([[1]], {"capacity": 8, "max_new_tokens": 8}, "capacity=8 is too small"),
        ([[1]], {"chunk": 0}, "chunk=0"),
        ([[1]], {"chunk": 2.5}, "chunk=2.5 must be whole"),
        ([[1]], {"capacity": 40.5, "max_new_tokens": 8}, "capacity=40.5 must be whole"),
        (
            [[1]],
            {"sampling": types.Sampling(constraint=lambda history: history)},
            "constraint=<function .* is no pytree of arrays",
        ),
        ([[1]], {"eos": (7,)}, "holds 7"),
        ([[1]], {"stop": [[1], []]}, "stop sequence is empty"),
        ([[1]], {"stop": [[9]]}, "stop=.* holds 9"),
        ([[1]], {"eos": (-7,)}, "eos=.* holds -7"),
        ([[1]], {"eos": (2.7,)}, "holds 2.7"),
        ([[1]], {"eos": 2}, "must be a list"),
        ([1, 2, 3], {}, r"wrap a single prompt as \[prompt\]"),
        ([[1.5]], {}, "token ids are integers"),
        (np.asarray([[1.0]]), {}, "token ids are integers"),
        ([[1]], {"key": 0}, "jax.random.key"),
        ([[1]], {"sampling": 0.7}, "no specjax.Sampling"),
        ([[1]], {"sampling": types.Sampling(logit_bias=jnp.full(4, -jnp.inf))}, "leave a token"),
        (np.asarray([[1, 2]]), {"lengths": [1, 2]}, r"lengths has shape \(2,\)"),
        ([[1]], {"stop": [[[1]], [[2]]]}, "neither one list"),
        ([[1]], {"key": jnp.zeros((2,), jnp.uint32)}, "jax.random.key"),
        ([[1]], {"keys": jax.random.split(jax.random.key(0), 3)}, r"need \(1,\)"),
        ([[1]], {"sampling": types.Sampling(jnp.asarray(-1.0))}, "temperature=-1"),
        ([[1]], {"sampling": types.Sampling([0.1, 0.2])}, r"shape \(2,\)"),
        (
            [[1]],
            {"sampling": types.Sampling(logit_bias=np.zeros(3))},
            r"logit_bias has shape \(3,\)",
        ),
        ([[1]], {"rule": "tokn"}, "unknown rule 'tokn'; known: block, match, token"),
        ([[1]], {"rule": "token"}, "use rule='match'"),
        (np.asarray([[1, 2]]), {"lengths": [3]}, r"lengths\[0\]=3"),
        ([[1]], {"lengths": [1]}, "lengths belong to an array"),
    ],
)
def test_bad_requests_are_named(prompts, options, message):
    with pytest.raises(ValueError, match=message):
        specjax.generate(TARGET, drafters.prompt_lookup(2), prompts, **options)


def test_key_and_keys_together():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="not both"):
        specjax.autoregressive(TARGET, [[1]], key=key, keys=key[None])


@pytest.mark.parametrize(
    ("prompt", "new_tokens", "message"),
    [
        ([1] * 32, 1, "a prompt of 32 tokens leaves no room in the model's context of 32"),
        ([1] * 30, 3, "come to 33, and the model's context holds 32; ask for at most 2"),
    ],
)
def test_texts_beyond_the_context(prompt, new_tokens, message):
    with pytest.raises(ValueError, match=message):
        specjax.autoregressive(transformer(), [prompt], max_new_tokens=new_tokens)


def test_the_whole_context_can_be_used():
    result = specjax.autoregressive(transformer(), [[1] * 30], max_new_tokens=2)
    assert len(result.new_tokens[0]) == 2


def test_vocabularies_that_differ():
    other = drafters.model(models.tabular_model(jnp.zeros((5,))), 2)
    with pytest.raises(ValueError, match="has 5 tokens and the target's 4"):
        specjax.generate(TARGET, other, [[1]])


def test_going_on_with_too_little_room():
    result = specjax.autoregressive(TARGET, [[1]], capacity=16, max_new_tokens=8)
    with pytest.raises(ValueError, match="capacity=16 is too small.*capacity=18"):
        specjax.autoregressive(TARGET, [[2]], state=result.state, max_new_tokens=8)
    with pytest.raises(ValueError, match="has 1 rows, and 2 prompts"):
        specjax.autoregressive(TARGET, [[2], [3]], state=result.state, max_new_tokens=2)
    with pytest.raises(ValueError, match="cannot be changed on the way"):
        specjax.autoregressive(TARGET, [[2]], state=result.state, capacity=99)


def test_a_refused_turn_leaves_the_state_as_it_was():
    lookup = drafters.prompt_lookup(2)
    result = specjax.generate(TARGET, lookup, [[1]], max_new_tokens=3)
    for drafter, options, message in (
        (lookup, {"rule": "token"}, "use rule='match'"),
        (drafters.prompt_lookup(60), {}, "room=61"),
        (drafters.model(TARGET, 2), {}, "started with another drafter than 'model'"),
    ):
        with pytest.raises(ValueError, match=message):
            specjax.generate(
                TARGET, drafter, [[1]], state=result.state, max_new_tokens=2, **options
            )
        assert not result.state.tokens.is_deleted()
    specjax.generate(TARGET, lookup, [[1]], state=result.state, max_new_tokens=2)
    with pytest.raises(ValueError, match="has been consumed"):
        specjax.generate(TARGET, lookup, [[1]], state=result.state, max_new_tokens=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"law": jnp.zeros((1, 2), jnp.int32)}, r"law\[B, N\] has shape \(1, 2\)"),
        ({"present": jnp.ones((2, 3), bool)}, r"present\[B, N\] has shape \(2, 3\)"),
        ({"log_probs": jnp.zeros((1, 1, VOCAB))}, "R=1, but nodes draw from"),
        ({"log_probs": jnp.zeros((2, 3, VOCAB))}, "have B=1"),
        ({"tokens": jnp.zeros((1, 3))}, "dtype float32"),
        ({"tree": trees.chain(2)}, "N=3 but the tree has 2"),
    ],
)
def test_drafts_that_do_not_fit_together(change, message):
    parts = {"tokens": jnp.zeros((1, 3), jnp.int32), "tree": trees.chain(3), "vocab_size": VOCAB}
    with pytest.raises(ValueError, match=message):
        types.draft(**{**parts, **change})


def test_a_drafter_wider_than_the_state_has_room_for():
    wide = drafters.prompt_lookup(40)
    request, state = decoding.init(TARGET, decoding.NOTHING, [[1]], max_new_tokens=4)
    with pytest.raises(ValueError, match="room=41"):
        decoding.step(TARGET, wide, request, state)


def test_a_drafter_that_drafts_other_than_it_says():
    lying = dataclasses.replace(drafters.prompt_lookup(4), nodes=3)
    with pytest.raises(ValueError, match="nodes=3, but drafted N=4"):
        specjax.generate(TARGET, lying, [[1]])


@pytest.mark.parametrize("steps", [0, -1, 1.5])
def test_streams_of_no_steps(steps):
    with pytest.raises(ValueError, match=f"steps={steps}"):
        specjax.stream(TARGET, decoding.NOTHING, [[1]], steps=steps)
