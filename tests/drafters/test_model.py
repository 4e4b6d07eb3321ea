"""The draft model: its laws and draws against the model itself, and where it stops."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import decoding, drafters, models, types
from tests.drafters import driving


@pytest.fixture(params=["tabular", "recurrent", "transformer"])
def draft_model(request):
    return driving.build(request.param)


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
    decode = driving.Decode(drafters.model(draft_model, 4), driving.TEXTS, settings)
    draft = decode.propose()
    assert draft.tree.is_chain and draft.tree.size == 4
    assert jnp.all(draft.present)
    np.testing.assert_array_equal(draft.law, np.tile(np.arange(4), (4, 1)))
    drawn = jnp.take_along_axis(draft.log_probs, draft.tokens[:, :, None], axis=2)
    assert jnp.all(drawn > -jnp.inf)
    decode.check(draft)


def test_the_penalty_test_would_see_a_penalty_that_ignores_drafts():
    settings = types.Sampling(temperature=1.0, repetition_penalty=3.0)
    decode = driving.Decode(drafters.model(driving.build("tabular"), 4), driving.TEXTS, settings)
    draft = decode.propose()
    decode.settings = types.Sampling(temperature=1.0)
    with pytest.raises(AssertionError):
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
        jax.random.split(jax.random.key(2), batch),
    )
    state = drafter.init(drafter.params, batch, 8)
    draft, _ = driving.propose(drafter, state, context, context.keys)
    pair = np.asarray(draft.tokens[:, 0] * vocab_size + draft.tokens[:, 1])
    counts = np.bincount(pair, minlength=vocab_size**2)
    table = jax.nn.softmax(model.params / 0.7, axis=-1)
    law = np.asarray(table[0][:, None] * table[:vocab_size], np.float64).reshape(-1)
    statistic = np.sum((counts - batch * law) ** 2 / (batch * law))
    freedom = jnp.float32((vocab_size**2 - 1) / 2)
    assert jax.scipy.special.gammaincc(freedom, jnp.float32(statistic / 2)) > 1e-9


def test_draws_depend_on_key_and_length_alone():
    decode = driving.Decode(
        drafters.model(driving.build("tabular"), 3), [[2, 1, 3], [2, 1, 3], [2, 1, 3], [0, 2, 1, 3]]
    )
    decode.keys = decode.keys[jnp.asarray([0, 1, 0, 0])]
    draft = decode.propose()
    np.testing.assert_array_equal(draft.tokens[0], draft.tokens[2])
    # Another key or another length draws anew; over several steps they differ.
    alone = driving.Decode(drafters.model(driving.build("tabular"), 3), [[2, 1, 3]])
    alone.keys = decode.keys[:1]
    np.testing.assert_array_equal(alone.propose().tokens[0], draft.tokens[0])


def test_a_greedy_draft_is_deterministic(draft_model):
    settings = types.Sampling(temperature=np.asarray([0.0, 0.7, 1.0, 2.0]), repetition_penalty=1.3)
    drafts = []
    for seed in (0, 1):
        decode = driving.Decode(
            drafters.model(draft_model, 3, greedy=True), driving.TEXTS, settings
        )
        decode.keys = jax.random.split(jax.random.key(seed), 4)
        drafts.append(decode.propose())
    draft = drafts[0]
    chex.assert_trees_all_equal(*drafts)
    assert draft.is_deterministic
    assert jnp.all(draft.law == -1)
    tokens, length = decode.tokens.copy(), decode.length.copy()
    for depth in range(3):
        law = driving.fresh_law(draft_model, settings, jnp.asarray(tokens), jnp.asarray(length))
        np.testing.assert_array_equal(draft.tokens[:, depth], jnp.argmax(law, axis=-1))
        tokens[np.arange(4), length] = np.asarray(draft.tokens)[:, depth]
        length += 1


@pytest.mark.parametrize("greedy", [False, True], ids=["sampled", "greedy"])
@pytest.mark.parametrize("stop", [{"stop_below": 0.45}, {"stop_above": 1.35}], ids=list)
def test_stopping_is_decided_before_the_token_is_drawn(greedy, stop):
    """Presence is a function of the prefix: by the model's own law, whatever was drawn next."""
    batch, size = 256, 3
    model = driving.build("tabular")
    decode = driving.Decode(drafters.model(model, size, greedy=greedy, **stop), [[1, 3]] * batch)
    # Confidence is taken at temperature 1, whatever the request's.
    decode.settings = types.Sampling(temperature=1.5)
    draft = decode.propose()
    tokens, length = decode.tokens.copy(), decode.length.copy()
    going = np.ones(batch, bool)
    by_prefix = {}
    for depth in range(size):
        logits = driving.fresh_logits(model, jnp.asarray(tokens), jnp.asarray(length))
        law = np.asarray(jax.nn.softmax(logits, axis=-1), np.float64)
        if "stop_below" in stop:
            going &= law.max(axis=-1) >= stop["stop_below"]
        else:
            going &= -np.sum(law * np.log(law), axis=-1) <= stop["stop_above"]
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


def test_stop_below_is_traced():
    model = driving.build("tabular")
    decode = driving.Decode(drafters.model(model, 3), driving.TEXTS)

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


def test_stopping_never_where_nothing_asks_for_it():
    """Stops left out are no part of the program; stops that always allow draft the same."""
    model = driving.build("tabular")
    found = [
        driving.Decode(drafter, driving.TEXTS).propose()
        for drafter in (
            drafters.model(model, 3),
            drafters.model(model, 3, stop_below=0.0, stop_above=99.0),
        )
    ]
    chex.assert_trees_all_equal(found[0].tokens, found[1].tokens)
    assert np.all(found[0].present) and np.all(found[1].present)


def test_a_draft_model_of_another_vocabulary_is_refused():
    other = models.tabular_model(jnp.zeros((7,)))
    with pytest.raises(ValueError, match="has 7 tokens and the target's 6"):
        decoding.generate(
            driving.build("tabular"), drafters.model(other, 2), [[1, 2]], max_new_tokens=4
        )


def test_bad_settings_print_their_values():
    with pytest.raises(ValueError, match="length=0"):
        drafters.model(driving.build("tabular"), 0)
    for stop in (-0.1, float("nan")):
        with pytest.raises(ValueError, match=f"stop_above={stop}"):
            drafters.model(driving.build("tabular"), 3, stop_above=stop)
    for stop in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"stop_below={stop}"):
            drafters.model(driving.build("tabular"), 3, stop_below=stop)
