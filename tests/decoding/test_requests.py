"""Bad input: each a ValueError that names the value."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

import specjax
from specjax import decoding, drafters, models, trees, types

VOCAB = 4
TARGET = models.tabular_model(jnp.zeros((VOCAB,)))
SMALL = models.TransformerConfig(VOCAB, 8, 8, 1, 1, 1, 8, 32)


@struct.dataclass
class Allows:
    """A constraint of a given shape and dtype."""

    shape: tuple[int, ...] = struct.field(pytree_node=False)
    dtype: str = struct.field(pytree_node=False, default="bool")

    def __call__(self, history):
        del history
        return jnp.ones(self.shape, self.dtype)


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
        (
            [[1]],
            {"sampling": types.Sampling(constraint=Allows((1, 1, VOCAB)))},
            r"constraint gave bool\[1, 1, 4\]; .* must give bool\[B, T, V\] = bool\[1, 3, 4\]",
        ),
        (
            [[1]],
            {"sampling": types.Sampling(constraint=Allows((1, 3, VOCAB), "float32"))},
            "constraint gave float32",
        ),
        ([[1]], {"sampling": types.Sampling(True)}, "temperature=True is no number"),
        ([[1]], {"key": jax.random.key(0, impl="rbg")}, "impl='threefry2x32'"),
        ([[1]], {"key": jax.random.key(0, impl="unsafe_rbg")}, "kind 'unsafe_rbg'"),
        ([[1]], {"eos": [[np.asarray([9])]]}, "eos="),
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
        (
            [[1]],
            {"rule": "tokn"},
            "unknown rule 'tokn'; known: block, coupled, k_seq, match, multi_candidate, token",
        ),
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
    strange = types.Sampling(constraint=Allows((1, 1, VOCAB)))
    cases: list[tuple[types.Drafter, dict[str, Any], str]] = [
        (lookup, {"rule": "token"}, "use rule='match'"),
        (lookup, {"sampling": strange}, "constraint gave bool"),
        (lookup, {"chunk": 33}, "chunk=33 is more than the room=32"),
        (drafters.prompt_lookup(60), {}, "room=61"),
        (drafters.model(TARGET, 2), {}, "started with another drafter than 'model'"),
    ]
    for drafter, options, message in cases:
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


def test_a_draft_longer_than_the_context():
    target = models.language_model(SMALL, models.init_params(SMALL, jax.random.key(0)))
    with pytest.raises(ValueError, match="1000000 nodes .* context of 32"):
        specjax.generate(target, drafters.prompt_lookup(10**6), [[1, 2]])


def test_a_drafter_that_drafts_other_than_it_says():
    lying = dataclasses.replace(drafters.prompt_lookup(4), nodes=3)
    with pytest.raises(ValueError, match="nodes=3, but drafted N=4"):
        specjax.generate(TARGET, lying, [[1]])


@pytest.mark.parametrize("steps", [0, -1, 1.5])
def test_streams_of_no_steps(steps):
    with pytest.raises(ValueError, match=f"steps={steps}"):
        specjax.stream(TARGET, decoding.NOTHING, [[1]], steps=steps)


def test_a_bundle_is_no_model():
    cases: list[tuple[Any, Any, str]] = [
        (object(), drafters.prompt_lookup(2), "target is of type object.*give bundle.target"),
        (TARGET, None, "drafter is of type NoneType"),
    ]
    for target, drafter, message in cases:
        with pytest.raises(ValueError, match=message):
            specjax.generate(target, drafter, [[1]])
    strange: Any = 3
    with pytest.raises(ValueError, match="draft_model is of type int"):
        drafters.model(strange)


def test_a_stream_whose_state_went_on_elsewhere():
    stream = specjax.stream(TARGET, decoding.NOTHING, [[1]], max_new_tokens=4)
    next(stream)
    specjax.autoregressive(TARGET, [[]], state=stream.result.state, max_new_tokens=2)
    with pytest.raises(ValueError, match="has been consumed"):
        next(stream)


def test_a_row_without_room_sits_out_while_others_go_on():
    model = transformer()
    result = specjax.autoregressive(model, [[1] * 28, [2]], max_new_tokens=[4, 4], capacity=32)
    assert int(result.length[0]) == 32
    rest = specjax.autoregressive(model, [[], [3]], state=result.state, max_new_tokens=[0, 4])
    assert [len(answer) for answer in rest.new_tokens] == [0, 4]


def test_rows_that_a_trace_hides_end_with_a_reason():
    """Lengths and limits that a caller's own jit makes invisible: nothing overruns the text."""

    @jax.jit
    def decode(lengths, most):
        prompts = jnp.ones((5, 20), jnp.int32)
        result = specjax.autoregressive(
            TARGET, prompts, lengths=lengths, max_new_tokens=most, capacity=16, eos=()
        )
        return result.length, result.finish, result.statistics.emitted

    lengths, most = jnp.asarray([16, 20, 3, 3, 0]), jnp.asarray([4, 4, 0, -3, 2])
    length, finish, emitted = decode(lengths, most)
    assert length.tolist() == [16, 16, 3, 3, 0]
    assert emitted.tolist() == [0] * 5
    reasons = [decoding.FinishReason(code).name for code in finish.tolist()]
    assert reasons == ["CACHE_FULL", "CACHE_FULL", "LENGTH", "LENGTH", "EMPTY"]

    @jax.jit
    def two_turns(prompts):
        options = {"eos": (), "capacity": 8}
        first = specjax.autoregressive(TARGET, prompts, max_new_tokens=4, **options)
        more = jnp.ones((1, 4), jnp.int32)
        return specjax.autoregressive(TARGET, more, state=first.state, max_new_tokens=4, eos=())

    second = two_turns(jnp.ones((1, 2), jnp.int32))
    assert second.length.tolist() == [8] and second.finish_reasons == ["cache_full"]


def test_the_token_of_an_absent_node_means_nothing():
    model = transformer()
    plain = specjax.autoregressive(model, [[1, 2], [3]], max_new_tokens=8)

    def propose(params, state, context, keys):
        del params, keys
        tokens = jnp.full((2, 3), VOCAB + 7, jnp.int32)
        present = jnp.zeros((2, 3), bool).at[0].set(context.length[0] % 2 == 0)
        tokens = jnp.where(present, 1, tokens)
        return types.draft(tokens, trees.chain(3), present=present, vocab_size=VOCAB), state

    drafter = dataclasses.replace(decoding.NOTHING, propose=propose, nodes=3)
    result = specjax.generate(model, drafter, [[1, 2], [3]], max_new_tokens=8)
    assert result.new_tokens == plain.new_tokens


def test_sampling_that_float32_cannot_hold():
    for field, value in (
        ("top_p", 1e-50),
        ("temperature", 1e300),
        ("temperature", 1e-30),
        ("repetition_penalty", 1e39),
        ("repetition_penalty", 1e-50),
    ):
        with pytest.raises(ValueError, match=re.escape(f"{field}={value}")):
            types.Sampling(**{field: value})
    # What tree transformations put in place of numbers is left alone.
    flags = jax.tree.map(lambda _: True, types.Sampling(0.5, top_p=0.9))
    assert flags.temperature is True and flags.top_p is True
