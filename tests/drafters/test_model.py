"""The draft model: its laws against the model itself, its memory against a fresh prefill."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import decoding, drafters, models, sampling, trees, types
from specjax.models import recurrent, transformer

_CAPACITY = 64
_ROOM = 8
_VOCABULARY = 6


def build(kind, seed=0):
    key = jax.random.key(seed)
    if kind == "tabular":
        return models.tabular_model(models.random_table(key, _VOCABULARY, 3, 1.5))
    if kind == "recurrent":
        return models.recurrent_model(recurrent.init_params(key, _VOCABULARY, 8))
    config = models.TransformerConfig(
        vocab_size=_VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_size=8,
        context_length=2 * _CAPACITY,
    )
    return models.language_model(config, transformer.init_params(config, key, 2.0))


@pytest.fixture(params=["tabular", "recurrent", "transformer"])
def draft_model(request):
    return build(request.param)


@jax.jit
def fresh_logits(model, tokens, length):
    """Logits after the text, from an empty cache in one pass: [B, V]."""
    output, _ = model.apply(model.params, tokens, model.init_cache(*tokens.shape), None, ())
    return jnp.take_along_axis(output.logits, length[:, None, None] - 1, axis=1)[:, 0]


@jax.jit
def fresh_law(model, settings, tokens, length):
    """The warped law after the text: [B, V]."""
    nothing = jnp.zeros((tokens.shape[0], 0), jnp.int32)
    past = sampling.history(tokens, length, trees.chain(0), nothing)
    return sampling.warp(settings, fresh_logits(model, tokens, length)[:, None], past)[:, 0]


@jax.jit
def prefill(drafter, state, tokens, count):
    logits = jnp.zeros((*tokens.shape, 1))
    output = types.ModelOutput(logits, logits[:, :, None])
    return drafter.prefill(drafter.params, state, tokens, jnp.zeros_like(count), count, output)


@jax.jit
def propose(drafter, state, context, keys):
    return drafter.propose(drafter.params, state, context, keys)


@jax.jit
def update(drafter, state, context, draft, verdict):
    return drafter.update(drafter.params, state, context, draft, verdict, None)


class Decode:
    """A decode whose verdicts the test decides; rows of unequal length."""

    def __init__(self, drafter, texts, settings=None, seed=0):
        self.drafter = drafter
        self.model = drafter.params.model
        self.settings = types.Sampling(temperature=1.0) if settings is None else settings
        self.random = np.random.default_rng(seed)
        batch = len(texts)
        self.keys = jax.random.split(jax.random.key(seed), batch)
        self.length = np.asarray([len(text) for text in texts], np.int32)
        # Garbage stands behind the text.
        self.tokens = self.random.integers(0, _VOCABULARY, (batch, _CAPACITY), np.int32)
        for row, text in enumerate(texts):
            self.tokens[row, : len(text)] = text
        self.state = drafter.init(drafter.params, batch, _CAPACITY + _ROOM)
        self._prefill(chunk=4)

    def _prefill(self, chunk):
        for start in range(0, int(self.length.max()) - 1, chunk):
            count = jnp.asarray(np.clip(self.length - 1 - start, 0, chunk), jnp.int32)
            tokens = jnp.asarray(self.tokens[:, start : start + chunk])
            self.state = prefill(self.drafter, self.state, tokens, count)

    def context(self, active=None):
        active = np.ones(len(self.length), bool) if active is None else np.asarray(active)
        return types.Context(
            jnp.asarray(self.tokens),
            jnp.asarray(self.length),
            jnp.asarray(active),
            self.settings,
            self.model,
            None,
        )

    def propose(self, active=None):
        draft, self.state = propose(self.drafter, self.state, self.context(active), self.keys)
        return draft

    def commit(self, draft, count, active=None):
        """Accepts `count` drafts a row and a random token after them."""
        active = np.ones(len(self.length), bool) if active is None else np.asarray(active)
        count = np.where(active, count, 0).astype(np.int32)
        path = np.tile(np.arange(1, draft.tree.size + 1, dtype=np.int32), (len(count), 1))
        last = self.random.integers(0, _VOCABULARY, len(count), np.int32)
        for row in np.flatnonzero(active):
            assert count[row] <= int(jnp.sum(draft.present[row]))
            start, end = self.length[row], self.length[row] + count[row]
            self.tokens[row, start:end] = np.asarray(draft.tokens)[row, : count[row]]
            self.tokens[row, end] = last[row]
            self.length[row] = end + 1
        verdict = types.Verdict(jnp.asarray(path), jnp.asarray(count), jnp.asarray(last))
        self.state = update(self.drafter, self.state, self.context(active), draft, verdict)

    def advance(self, steps):
        """Another drafter's steps: the text grows, and this one hears of nothing."""
        for row, more in enumerate(steps):
            new = self.random.integers(0, _VOCABULARY, more, np.int32)
            self.tokens[row, self.length[row] : self.length[row] + more] = new
            self.length[row] += more

    def check(self, draft, rows=None):
        """The draft's laws are those of a model that reads the text and the path afresh."""
        rows = range(len(self.length)) if rows is None else rows
        tokens, length = self.tokens.copy(), self.length.copy()
        for depth in range(draft.tree.size):
            law = fresh_law(self.model, self.settings, jnp.asarray(tokens), jnp.asarray(length))
            for row in rows:
                if draft.present[row, depth]:
                    found, expected = jnp.exp(draft.log_probs[row, depth]), jnp.exp(law[row])
                    np.testing.assert_allclose(found, expected, atol=2e-5)
                    np.testing.assert_array_equal(found > 0, expected > 0)
            tokens[np.arange(len(length)), length] = np.asarray(draft.tokens)[:, depth]
            length += 1


_TEXTS = [[3, 1, 4, 1, 5], [2], [0, 5, 3, 5, 0, 2, 4, 1, 3], [1, 1]]


@pytest.mark.parametrize(
    "settings",
    [
        types.Sampling(
            temperature=np.asarray([0.6, 1.0, 1.7, 0.0]), top_p=np.asarray([0.5, 1.0, 0.7, 0.9])
        ),
        types.Sampling(temperature=1.0, repetition_penalty=np.asarray([1.0, 1.5, 3.0, 0.5])),
    ],
    ids=["top_p", "repetition_penalty"],
)
def test_laws_are_the_draft_models_own(draft_model, settings):
    """Position by position: a penalty sees the drafted tokens before it too."""
    decode = Decode(drafters.model(draft_model, 4), _TEXTS, settings)
    draft = decode.propose()
    assert draft.tree.is_chain and draft.tree.size == 4
    assert jnp.all(draft.present)
    np.testing.assert_array_equal(draft.law, np.tile(np.arange(4), (4, 1)))
    drawn = jnp.take_along_axis(draft.log_probs, draft.tokens[:, :, None], axis=2)
    assert jnp.all(drawn > -jnp.inf)
    decode.check(draft)


def test_the_penalty_test_would_see_a_penalty_that_ignores_drafts():
    settings = types.Sampling(temperature=1.0, repetition_penalty=3.0)
    decode = Decode(drafters.model(build("tabular"), 4), _TEXTS, settings)
    draft = decode.propose()
    decode.settings = types.Sampling(temperature=1.0)
    with pytest.raises(AssertionError):
        decode.check(draft)


@pytest.mark.parametrize("lag", [False, True], ids=["steady", "lagging"])
def test_the_memory_is_that_of_a_fresh_prefill(draft_model, lag):
    """After full, partial and no acceptance, unequal among rows, and behind other drafters."""
    decode = Decode(drafters.model(draft_model, 3), _TEXTS)
    for count in ([3, 0, 1, 2], [3, 3, 3, 3], [0, 0, 0, 0], [2, 3, 0, 1], [1, 2, 3, 0]):
        draft = decode.propose()
        decode.check(draft)
        decode.commit(draft, count)
        # What it holds is committed text, and all of it that it was fed.
        behind = decode.length - np.asarray(decode.state.seen)
        np.testing.assert_array_equal(behind, np.where(np.asarray(count) == 3, 2, 1))
        if lag:
            decode.advance([0, 1, 9, 2] if count[0] == 3 else [1, 0, 0, 7])
    decode.check(decode.propose())


def test_a_long_lag_is_caught_up(draft_model):
    decode = Decode(drafters.model(draft_model, 3), _TEXTS)
    decode.commit(decode.propose(), [3, 0, 2, 1])
    decode.advance([20, 0, 33, 8])
    draft = decode.propose()
    decode.check(draft)
    decode.commit(draft, [1, 3, 3, 0])
    decode.check(decode.propose())


def test_inactive_rows_stay_as_they_are(draft_model):
    decode = Decode(drafters.model(draft_model, 3), _TEXTS)
    decode.commit(decode.propose(), [3, 1, 0, 2])
    # Also a row that has tokens to catch up with, but not while it is inactive.
    decode.advance([0, 12, 0, 0])
    before = decode.state
    active = [True, False, True, False]
    for count in ([3, 0, 1, 0], [0, 0, 3, 0]):
        draft = decode.propose(active)
        np.testing.assert_array_equal(jnp.any(draft.present, axis=1), active)
        decode.check(draft)
        decode.commit(draft, count, active)
    for row in (1, 3):
        seen = int(before.seen[row])
        assert decode.state.seen[row] == seen

        def committed(state, row=row, seen=seen):
            """The row's leaves, text slots beyond the committed ones left out."""
            rows = [leaf[row] for leaf in jax.tree.leaves(state.cache) if leaf.ndim]
            slots = max(size for leaf in rows for size in leaf.shape)
            return [
                jnp.moveaxis(leaf, leaf.shape.index(slots), 0)[:seen]
                if slots in leaf.shape
                else leaf
                for leaf in rows
            ]

        if not isinstance(before.cache, recurrent.RecurrentCache):
            chex.assert_trees_all_equal(committed(decode.state), committed(before))
        else:
            np.testing.assert_array_equal(decode.state.cache.state[row], before.cache.state[row])
    draft = decode.propose()
    assert jnp.all(draft.present)
    decode.check(draft)


def test_tokens_are_drawn_from_the_law():
    """The joint law of two drafted tokens, over a hundred thousand request keys."""
    batch, vocab_size = 100_000, 3
    model = models.tabular_model(models.random_table(jax.random.key(1), vocab_size, 2))
    drafter = drafters.model(model, 2)
    length = jnp.ones((batch,), jnp.int32)
    context = types.Context(
        jnp.zeros((batch, 4), jnp.int32),
        length,
        jnp.ones((batch,), bool),
        types.Sampling(temperature=0.7),
        model,
        None,
    )
    state = drafter.init(drafter.params, batch, 8)
    draft, _ = propose(drafter, state, context, jax.random.split(jax.random.key(2), batch))
    pair = np.asarray(draft.tokens[:, 0] * vocab_size + draft.tokens[:, 1])
    counts = np.bincount(pair, minlength=vocab_size**2)
    table = jax.nn.softmax(model.params / 0.7, axis=-1)
    law = np.asarray(table[0][:, None] * table[:vocab_size], np.float64).reshape(-1)
    statistic = np.sum((counts - batch * law) ** 2 / (batch * law))
    freedom = jnp.float32((vocab_size**2 - 1) / 2)
    assert jax.scipy.special.gammaincc(freedom, jnp.float32(statistic / 2)) > 1e-9


def test_draws_depend_on_key_and_length_alone():
    decode = Decode(
        drafters.model(build("tabular"), 3), [[2, 1, 3], [2, 1, 3], [2, 1, 3], [0, 2, 1, 3]]
    )
    decode.keys = decode.keys[jnp.asarray([0, 1, 0, 0])]
    draft = decode.propose()
    np.testing.assert_array_equal(draft.tokens[0], draft.tokens[2])
    # Another key or another length draws anew; over several steps they differ.
    alone = Decode(drafters.model(build("tabular"), 3), [[2, 1, 3]])
    alone.keys = decode.keys[:1]
    np.testing.assert_array_equal(alone.propose().tokens[0], draft.tokens[0])


def test_a_greedy_draft_is_deterministic(draft_model):
    settings = types.Sampling(temperature=np.asarray([0.0, 0.7, 1.0, 2.0]), repetition_penalty=1.3)
    drafts = []
    for seed in (0, 1):
        decode = Decode(drafters.model(draft_model, 3, greedy=True), _TEXTS, settings)
        decode.keys = jax.random.split(jax.random.key(seed), 4)
        drafts.append(decode.propose())
    draft = drafts[0]
    chex.assert_trees_all_equal(*drafts)
    assert draft.is_deterministic
    assert jnp.all(draft.law == -1)
    tokens, length = decode.tokens.copy(), decode.length.copy()
    for depth in range(3):
        law = fresh_law(draft_model, settings, jnp.asarray(tokens), jnp.asarray(length))
        np.testing.assert_array_equal(draft.tokens[:, depth], jnp.argmax(law, axis=-1))
        tokens[np.arange(4), length] = np.asarray(draft.tokens)[:, depth]
        length += 1


@pytest.mark.parametrize("greedy", [False, True], ids=["sampled", "greedy"])
def test_stop_below_decides_before_the_token_is_drawn(greedy):
    """Presence is a function of the prefix: by the model's confidence, whatever was drawn next."""
    batch, size, threshold = 256, 3, 0.45
    model = build("tabular")
    decode = Decode(
        drafters.model(model, size, greedy=greedy, stop_below=threshold), [[1, 3]] * batch
    )
    # Confidence is taken at temperature 1, whatever the request's.
    decode.settings = types.Sampling(temperature=1.5)
    draft = decode.propose()
    tokens, length = decode.tokens.copy(), decode.length.copy()
    going = np.ones(batch, bool)
    by_prefix = {}
    for depth in range(size):
        logits = fresh_logits(model, jnp.asarray(tokens), jnp.asarray(length))
        going &= np.asarray(jnp.max(jax.nn.softmax(logits, axis=-1), axis=-1)) >= threshold
        np.testing.assert_array_equal(draft.present[:, depth], going)
        drafted = np.asarray(draft.tokens)
        for row in range(batch):
            prefix = (
                tuple(drafted[row, :depth]) if depth == 0 or draft.present[row, depth - 1] else None
            )
            by_prefix.setdefault((depth, prefix), set()).add(bool(going[row]))
        tokens[np.arange(batch), length] = drafted[:, depth]
        length += 1
    assert all(len(answers) == 1 for answers in by_prefix.values())
    if not greedy:
        assert len({answer for answers in by_prefix.values() for answer in answers}) == 2
        assert 0 < np.asarray(draft.present[:, -1]).mean() < 1


def test_stopping_early_leaves_the_memory_right(draft_model):
    decode = Decode(drafters.model(draft_model, 3, stop_below=0.5), _TEXTS)
    shown = set()
    for _ in range(6):
        draft = decode.propose()
        decode.check(draft)
        present = np.asarray(jnp.sum(draft.present, axis=1))
        shown |= set(present.tolist())
        decode.commit(draft, present)
    assert len(shown) >= 3


def test_stop_below_is_traced():
    model = build("tabular")
    decode = Decode(drafters.model(model, 3), _TEXTS)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def present(drafter, state, context, keys):
        return jnp.sum(drafter.propose(drafter.params, state, context, keys)[0].present)

    found = [
        int(
            present(
                drafters.model(model, 3, stop_below=stop),
                decode.state,
                decode.context(),
                decode.keys,
            )
        )
        for stop in (0.0, 0.45, 1.0)
    ]
    assert found[0] == 12 and found[2] == 0 and 0 < found[1] < 12


@pytest.mark.parametrize(
    "kind, rule",
    [("tabular", "token"), ("tabular", "block"), ("recurrent", "block"), ("transformer", "token")],
)
def test_a_model_that_drafts_for_itself_is_accepted_whole(kind, rule):
    """Rejected entries left in its cache would keep the text right and let τ fall."""
    draft_model = build(kind)
    size = 3
    result = decoding.generate(
        draft_model,
        drafters.model(draft_model, size),
        _TEXTS,
        rule=rule,
        key=jax.random.key(3),
        sampling=types.Sampling(temperature=1.0),
        max_new_tokens=np.asarray([5, 3, 8, 6]) * (size + 1),
        eos=(),
    )
    assert result.statistics.tau == size + 1
    np.testing.assert_array_equal(result.statistics.target_steps, [5, 3, 8, 6])
    assert result.statistics.acceptance_rate == 1


def test_matching_itself_greedily_is_accepted_whole():
    model = build("tabular")
    options = {"max_new_tokens": 20, "eos": ()}
    result = decoding.generate(model, drafters.model(model, 4, greedy=True), _TEXTS, **options)
    assert result.statistics.tau == 5
    assert result.new_tokens == decoding.autoregressive(model, _TEXTS, **options).new_tokens


def test_a_draft_model_of_another_vocabulary_is_refused():
    other = models.tabular_model(jnp.zeros((7,)))
    with pytest.raises(ValueError, match="has 7 tokens and the target's 6"):
        decoding.generate(build("tabular"), drafters.model(other, 2), [[1, 2]], max_new_tokens=4)


def test_bad_settings_print_their_values():
    with pytest.raises(ValueError, match="length=0"):
        drafters.model(build("tabular"), 0)
    for stop in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"stop_below={stop}"):
            drafters.model(build("tabular"), 3, stop_below=stop)


def test_catching_up_at_the_end_of_the_capacity():
    # The window reaches past the text; clamped, it would overwrite the text's own entries.
    config = models.TransformerConfig(5, 16, 32, 2, 2, 1, 8, 64)
    model = models.language_model(config, models.init_params(config, jax.random.key(2), 3.0))
    drafter = drafters.model(model, 1)
    prompt = [0, 1, 2, 3, 4, 0, 2, 4, 1, 3, 0, 1, 1, 2, 4]
    request, state = decoding.init(
        model, drafter, [prompt], max_new_tokens=1, capacity=16, chunk=1, eos=()
    )
    behind = drafter.init(drafter.params, 1, 16 + state.room)
    fed = jnp.asarray([prompt[:12]])
    behind = prefill(drafter, behind, fed, jnp.asarray([12]))
    state = dataclasses.replace(state, drafter=behind)
    state, info = decoding.step(model, drafter, request, state, "block")
    fresh = drafter.init(drafter.params, 1, 40)
    text = state.tokens[:, :15]
    fresh = prefill(drafter, fresh, text, jnp.asarray([14]))
    for kept, expected in zip(state.drafter.cache.keys, fresh.cache.keys, strict=True):
        np.testing.assert_allclose(kept[:, :, :14], expected[:, :, :14], atol=1e-5)
    assert int(info.emitted[0]) == 1
