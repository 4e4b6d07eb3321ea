"""One key gives one text: every drafter under `match` writes what plain decoding writes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

import specjax
from specjax import decoding, drafters, models, trees, types
from specjax.models import recurrent
from tests.cases import exhaustive

VOCAB = 6
EOS = 5
PROMPTS = [[1, 2, 3], [4], [0, 0, 1, 2, 3, 4, 0, 1], [2, 1]]


# The table is also what whole decodes of every drafter are checked on.
TARGETS = [exhaustive("tabular"), "recurrent", "transformer"]
# One value a prompt: a greedy row, and rows that switch a warper off, stand among the others.
WARPERS: dict[str, Any] = {
    "temperature": [1.6, 0.0, 2.5, 2.0],
    "top_k": [2, 2, 0, 3],
    "top_p": [1.0, 0.5, 0.7, 0.6],
    "min_p": [0.6, 0.9, 0.3, 0.0],
    "repetition_penalty": [1.3, 1.7, 0.8, 2.0],
    "logit_bias": [
        [0.0, 1.0, -1.0, 0.5, 0.0, -3.0],
        [1.0, 0.0, 2.0, -1.0, 0.0, -4.0],
        [-0.5, 0.0, 0.5, 0.0, 1.0, -2.0],
        [0.0, -2.0, 0.0, 1.5, 0.5, -np.inf],
    ],
}


def make(kind, seed=1, sharpness=2.0):
    key = jax.random.key(seed)
    if kind == "tabular":
        return models.tabular_model(models.random_table(key, VOCAB, 3, sharpness))
    if kind == "recurrent":
        return models.recurrent_model(recurrent.init_params(key, VOCAB, 16, sharpness))
    config = models.TransformerConfig(VOCAB, 32, 64, 2, 4, 2, 8, 512)
    return models.language_model(config, models.init_params(config, key, sharpness))


@struct.dataclass
class TreeDrafter:
    """Every child of every node is a token in order: a tree with rows that differ by their text."""

    dynamic: bool = struct.field(pytree_node=False)

    def __call__(self, params, state, context, keys):
        del params, keys
        tree = trees.branching((3, 2))
        batch = context.length.shape[0]
        last = jnp.take_along_axis(context.tokens, context.length[:, None] - 1, axis=1)
        tokens = (last + jnp.arange(tree.size, dtype=jnp.int32)[None]) % VOCAB
        if self.dynamic:
            # Odd lengths draft a chain of two and then siblings; even ones the full tree.
            other = jnp.asarray([0, 1, 1, 0, 0, 5, 5, 5, 4], jnp.int32)
            parents = jnp.where(context.length[:, None] % 2 == 1, other[None], trees.parents(tree))
            tree = trees.dynamic(jnp.broadcast_to(parents, (batch, tree.size)), 3)
        return types.draft(tokens, tree, vocab_size=VOCAB), state


def tree_drafter(dynamic):
    return dataclasses.replace(decoding.NOTHING, propose=TreeDrafter(dynamic), nodes=9, name="tree")


def make_drafters(kind):
    return {
        "prompt_lookup": drafters.prompt_lookup(4, shortest=1),
        "own model": drafters.model(make(kind), 3),
        "other model": drafters.model(make("tabular", 9), 4),
        "recurrent model": drafters.model(make("recurrent", 5), 2),
        "greedy, stopping": drafters.model(make(kind, 2), 4, greedy=True, stop_below=0.5),
        "static tree": tree_drafter(False),
        "dynamic tree": tree_drafter(True),
    }


def options(temperature, **more):
    sampling = types.Sampling(temperature=temperature)
    more = {"max_new_tokens": [12, 19, 7, 15], "eos": (EOS,), "sampling": sampling, **more}
    return {"key": jax.random.key(1), **more}


def assert_rows_accept_unequally(result):
    """Rows that accept alike would hide a commit that reads one row for all."""
    accepted = np.sum(np.asarray(result.statistics.accepted), axis=1)
    assert len(np.unique(accepted / np.asarray(result.statistics.target_steps))) > 1


@pytest.mark.parametrize("kind", [exhaustive("tabular"), exhaustive("recurrent"), "transformer"])
def test_match_writes_the_text_of_plain_decoding(kind):
    target = make(kind)
    for temperature in (0.0, 0.7, 1.3):
        plain = specjax.autoregressive(target, PROMPTS, **options(temperature))
        for name, drafter in make_drafters(kind).items():
            result = specjax.generate(
                target, drafter, PROMPTS, rule="match", **options(temperature)
            )
            assert result.new_tokens == plain.new_tokens, (name, temperature)
            assert result.finish_reasons == plain.finish_reasons, (name, temperature)
            if temperature:
                assert_rows_accept_unequally(result)


@pytest.mark.parametrize("kind", TARGETS)
def test_match_writes_the_warped_text_of_plain_decoding(kind):
    target = make(kind)
    warped = options(0.0, sampling=types.Sampling(**WARPERS))
    plain = specjax.autoregressive(target, PROMPTS, **warped)
    for name, drafter in make_drafters(kind).items():
        result = specjax.generate(target, drafter, PROMPTS, rule="match", **warped)
        assert result.new_tokens == plain.new_tokens, name
        assert result.finish_reasons == plain.finish_reasons, name
        assert_rows_accept_unequally(result)


@pytest.mark.parametrize(
    "rule, kind",
    [
        ("token", "recurrent"),
        ("block", "transformer"),
        exhaustive("token", "transformer"),
        exhaustive("block", "recurrent"),
        exhaustive("token", "tabular"),
        exhaustive("block", "tabular"),
    ],
)
def test_ratio_rules_at_temperature_zero_write_the_greedy_text(kind, rule):
    target = make(kind)
    plain = specjax.autoregressive(target, PROMPTS, **options(0.0))
    for name in ("own model", "other model", "recurrent model"):
        drafter = make_drafters(kind)[name]
        result = specjax.generate(target, drafter, PROMPTS, rule=rule, **options(0.0))
        assert result.new_tokens == plain.new_tokens, name


@pytest.mark.parametrize("batch", [4, exhaustive(9)])
def test_where_whole_numbers_have_64_bits(batch):
    """Few rows are written one by one, many together."""
    with jax.enable_x64(True):
        target, prompts = make("transformer"), (3 * PROMPTS)[:batch]
        more: dict[str, Any] = {"max_new_tokens": 9, "sampling": types.Sampling(0.7)}
        plain = specjax.autoregressive(target, prompts, **more)
        for name in ("own model", "static tree"):
            drafter = make_drafters("transformer")[name]
            made = specjax.generate(target, drafter, prompts, rule="match", **more)
            assert made.new_tokens == plain.new_tokens, name


def test_greedy_and_sampled_rows_share_a_batch():
    target = make("tabular")
    mixed = options(jnp.asarray([0.0, 0.9, 0.0, 1.4]))
    plain = specjax.autoregressive(target, PROMPTS, **mixed)
    result = specjax.generate(target, drafters.model(target, 3), PROMPTS, rule="match", **mixed)
    greedy = specjax.autoregressive(target, PROMPTS, **options(0.0))
    assert result.new_tokens == plain.new_tokens
    assert_rows_accept_unequally(result)
    assert [plain.new_tokens[row] for row in (0, 2)] == [greedy.new_tokens[row] for row in (0, 2)]


@pytest.mark.parametrize("rule", ["match", "token", "block"])
def test_a_prompt_with_its_key_is_the_same_alone_and_in_any_slot(rule):
    target, drafter = make("transformer"), drafters.model(make("transformer", 2), 3)
    keys = jax.random.split(jax.random.key(3), len(PROMPTS))
    shared = {"sampling": types.Sampling(0.8), "eos": (EOS,), "capacity": 64}

    def texts(rows):
        result = specjax.generate(
            target,
            drafter,
            [PROMPTS[row] for row in rows],
            rule=rule,
            keys=keys[jnp.asarray(rows)],
            max_new_tokens=14,
            **shared,
        )
        if len(rows) > 1:
            assert_rows_accept_unequally(result)
        return dict(zip(rows, result.new_tokens, strict=True))

    together = texts([0, 1, 2, 3])
    assert texts([3, 1, 0, 2]) == together
    for row in range(len(PROMPTS)):
        assert texts([row]) == {row: together[row]}


def test_key_and_keys_agree():
    target = make("tabular")
    key = jax.random.key(11)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(PROMPTS)))
    shared = {"sampling": types.Sampling(1.0), "max_new_tokens": 9}
    one = specjax.autoregressive(target, PROMPTS, key=key, **shared)
    other = specjax.autoregressive(target, PROMPTS, keys=keys, **shared)
    assert one.new_tokens == other.new_tokens


position_noise = jax.jit(specjax.sampling.position_noise)


@jax.jit
def whole_text_logits(target, text):
    """The logits after every token of text[1, S], from one pass."""
    cache = target.init_cache(1, text.shape[1])
    output, _ = target.apply(target.params, text, cache, None, ())
    return output.logits[0]


def next_token(logits, text, noise, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, **before):
    """The argmax of what the warpers leave, `noise` added unless greedy; all by sorting."""
    scores = np.asarray(logits, np.float64) + np.asarray(before.get("logit_bias", 0.0))
    penalty = before.get("repetition_penalty", 1.0)
    for token in set(text):
        scores[token] *= penalty if scores[token] < 0 else 1 / penalty
    if temperature == 0:
        return int(np.argmax(scores))
    scores = scores / temperature
    kept = np.argsort(-scores)[: top_k or None]
    mass = np.exp(scores[kept]) / np.sum(np.exp(scores[kept]))
    kept = kept[: np.searchsorted(np.cumsum(mass), top_p) + 1]
    kept = kept[np.exp(scores[kept] - scores[kept[0]]) >= min_p]
    return int(kept[np.argmax(scores[kept] + noise[kept])])


def plain_text(target, prompt, key, count, **sampling):
    """Plain decoding of one prompt as a loop of Python over whole-text passes."""
    text = list(prompt)
    vocabulary = jnp.arange(VOCAB, dtype=jnp.int32)
    while len(text) < len(prompt) + count and text[-1] != EOS:
        padded = jnp.asarray([text + [0] * (32 - len(text))], jnp.int32)
        logits = whole_text_logits(target, padded)[len(text) - 1]
        noise = position_noise(key[None], jnp.asarray([[len(text)]], jnp.int32), vocabulary)
        text.append(next_token(logits, text, np.asarray(noise)[0, 0], **sampling))
    return text[len(prompt) :]


@pytest.mark.parametrize("kind", TARGETS)
def test_plain_decoding_is_argmax_and_keyed_draws_by_hand(kind):
    """The baseline itself, at temperatures alone and under every warper, each of which matters."""
    target, key = make(kind), jax.random.key(5)

    def by_hand(key, values):
        for row, prompt in enumerate(PROMPTS):
            own = {name: value[row] for name, value in values.items()}
            yield plain_text(target, prompt, jax.random.fold_in(key, row), 12, **own)

    def decoded(key, values):
        sampling = types.Sampling(**values)
        return specjax.autoregressive(
            target, PROMPTS, key=key, max_new_tokens=12, sampling=sampling, eos=(EOS,)
        ).new_tokens

    temperatures = {"temperature": [0.0, 0.9, 0.0, 1.4]}
    assert decoded(key, temperatures) == list(by_hand(key, temperatures))
    # One key's texts seldom meet every warper; a few keys' do.
    idle = set(WARPERS)
    for seed in range(12):
        key = jax.random.key(seed)
        texts = list(by_hand(key, WARPERS))
        assert decoded(key, WARPERS) == texts
        for left_out in sorted(idle):
            others = {name: value for name, value in WARPERS.items() if name != left_out}
            if list(by_hand(key, others)) != texts:
                idle.remove(left_out)
        if not idle:
            break
    assert not idle


def test_going_on_equals_never_having_stopped():
    target = make("transformer")
    drafter = drafters.model(make("recurrent", 5), 3)
    whole = options(0.9, max_new_tokens=24, eos=(), capacity=64)
    expected = specjax.generate(target, drafter, PROMPTS, rule="match", **whole)
    first = options(0.9, max_new_tokens=10, eos=(), capacity=64)
    result = specjax.generate(target, drafter, PROMPTS, rule="match", **first)
    begun = result.new_tokens
    more = options(0.9, max_new_tokens=14, eos=())
    rest = specjax.generate(target, drafter, [[]] * 4, rule="match", state=result.state, **more)
    joined = [a + b for a, b in zip(begun, rest.new_tokens, strict=True)]
    assert joined == expected.new_tokens
    assert_rows_accept_unequally(expected)


@pytest.mark.parametrize("kind", TARGETS)
def test_a_second_turn_equals_a_prompt_of_the_whole_talk(kind):
    target, drafter = make(kind), drafters.model(make("tabular", 9), 3)
    first = specjax.generate(
        target, drafter, PROMPTS, rule="match", **options(0.8, capacity=96, max_new_tokens=9)
    )
    turns = [[1], [2, 3, 4, 0, 1], [], [3, 3]]
    texts = [
        prompt + answer + turn
        for prompt, answer, turn in zip(PROMPTS, first.new_tokens, turns, strict=True)
    ]
    second = specjax.generate(
        target,
        drafter,
        turns,
        rule="match",
        state=first.state,
        **options(0.8, max_new_tokens=[6, 9, 4, 8]),
    )
    fresh = specjax.autoregressive(target, texts, **options(0.8, max_new_tokens=[6, 9, 4, 8]))
    assert second.new_tokens == fresh.new_tokens


def test_streaming_yields_the_text_of_generate():
    target, drafter = make("tabular"), drafters.prompt_lookup(3, shortest=1)
    expected = specjax.generate(target, drafter, PROMPTS, **options(0.7))
    for steps in (1, 3):
        stream = specjax.stream(target, drafter, PROMPTS, steps=steps, **options(0.7))
        texts = [[], [], [], []]
        for step in stream:
            for text, new in zip(texts, step, strict=True):
                text.extend(new)
        assert texts == expected.new_tokens == stream.result.new_tokens
        assert stream.result.statistics.tau == expected.statistics.tau


def test_a_stream_left_early_goes_on():
    target, drafter = make("tabular"), drafters.prompt_lookup(3, shortest=1)
    limits = {"max_new_tokens": 12, "eos": ()}
    expected = specjax.generate(target, drafter, PROMPTS, **options(0.7, **limits))
    stream = specjax.stream(target, drafter, PROMPTS, **options(0.7, **limits))
    next(stream)
    texts = [a + b for a, b in zip(next(stream), next(stream), strict=True)]
    left = stream.result
    assert left.finish_reasons == ["running"] * 4
    assert [answer[-len(text) :] for answer, text in zip(left.new_tokens, texts, strict=True)] == (
        texts
    )
    begun, counted = left.new_tokens, left.statistics
    limits["max_new_tokens"] = [12 - len(text) for text in begun]
    rest = specjax.generate(target, drafter, [[]] * 4, state=left.state, **options(0.7, **limits))
    joined = [a + b for a, b in zip(begun, rest.new_tokens, strict=True)]
    assert joined == expected.new_tokens
    assert int(jnp.sum(counted.emitted)) == sum(map(len, begun))


@pytest.mark.parametrize("name", ["own model", "static tree", "dynamic tree"])
def test_a_step_tells_the_laws_of_its_tokens(name):
    """They are the target's own laws after the text so far, which a larger target would verify."""
    target, drafter = make("transformer"), make_drafters("transformer")[name]
    request, state = decoding.init(target, drafter, PROMPTS, **options(0.7, eos=()))
    step = jax.jit(decoding.step, static_argnames=("rule", "laws"))
    for _ in range(3):
        before = np.asarray(state.length)
        state, info = step(target, drafter, request, state, rule="match", laws=True)
        assert info.log_probs is not None
        for row in range(len(PROMPTS)):
            law = jax.nn.log_softmax(whole_text_logits(target, state.tokens[row][None]) / 0.7)
            told = info.log_probs[row, : info.emitted[row]]
            last = np.asarray(state.length)[row] - 1
            np.testing.assert_allclose(told, law[before[row] - 1 : last], atol=2e-4)
    assert step(target, drafter, request, state, rule="match")[1].log_probs is None


@pytest.mark.parametrize("kind", TARGETS)
def test_a_draft_model_remembers_every_turn(kind):
    """The target drafts for itself: a token lost or fed twice between turns would show in τ."""
    target = make(kind)
    drafter = drafters.model(target, 3)
    shared = {"sampling": types.Sampling(0.9), "eos": (), "rule": "block"}
    result = specjax.generate(
        target, drafter, [[1, 2], [3]], max_new_tokens=[4, 7], capacity=96, **shared
    )
    for turn in range(3):
        result = specjax.generate(
            target,
            drafter,
            [[3, 4, 0][: turn + 1], [] if turn == 1 else [2] * 9],
            state=result.state,
            key=jax.random.key(turn),
            max_new_tokens=[16, 8],
            **shared,
        )
        assert result.statistics.tau == 4.0
