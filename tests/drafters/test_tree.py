"""The draft model's tree: its laws, how siblings are drawn, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import specjax
from specjax import drafters, models, trees, types
from tests.drafters import driving

LENGTHS = np.asarray([5, 1, 9, 2], np.int32)
SETTINGS = types.Sampling(temperature=0.8, repetition_penalty=1.4)


def proposed(drafter, settings=SETTINGS, active=None, seed=0):
    """A draft after four texts, fresh from a prefill."""
    tokens = np.random.default_rng(seed).integers(0, driving.VOCABULARY, (4, 32), np.int32)
    length = jnp.asarray(LENGTHS)
    keys = jax.random.split(jax.random.key(seed), 4)
    context = types.Context(
        jnp.asarray(tokens),
        length,
        jnp.ones((4,), bool) if active is None else jnp.asarray(active),
        settings,
        drafter.params,
        None,
        keys,
    )
    state = drafter.init(drafter.params, 4, 64)
    state = driving.prefill(drafter, state, context.tokens, 0 * length, length - 1, 16)
    return driving.propose(drafter, state, context, keys)[0], tokens


@pytest.mark.parametrize("kind", ["tabular", "recurrent", "transformer"])
@pytest.mark.parametrize("replacement", [False, True])
def test_a_node_is_drawn_from_the_law_after_its_path(kind, replacement):
    model = driving.build(kind)
    draft, texts = proposed(drafters.tree(model, (3, 2, 1), replacement=replacement))
    assert draft.siblings == ("independent" if replacement else "distinct")
    paths = np.asarray(trees.paths(draft.tree))[0]
    depths = np.asarray(trees.depths(draft.tree))[0]
    for node in range(draft.log_probs.shape[1]):
        depth = depths[node]
        tokens, length = texts.copy(), LENGTHS + depth
        for row in range(4):
            path = np.asarray(draft.tokens)[row, paths[node, :depth] - 1]
            tokens[row, LENGTHS[row] : length[row]] = path
        law = driving.fresh_law(model, SETTINGS, jnp.asarray(tokens), jnp.asarray(length))
        np.testing.assert_allclose(
            np.exp(draft.log_probs[:, node]), np.exp(law), atol=2e-5, err_msg=f"node {node}"
        )
    np.testing.assert_array_equal(draft.law, np.tile(trees.parents(draft.tree), (4, 1)))
    own = np.take_along_axis(
        np.asarray(draft.log_probs)[np.arange(4)[:, None], np.asarray(draft.law)],
        np.asarray(draft.tokens)[:, :, None],
        axis=2,
    )
    assert np.all(own > -np.inf)


def test_siblings_without_replacement_are_distinct_and_end_with_the_support():
    draft, _ = proposed(
        drafters.tree(driving.build("tabular"), (4, 2)), types.Sampling(temperature=1.0, top_k=3)
    )
    assert np.all(np.sum(np.asarray(draft.present)[:, :4], axis=1) == 3)
    for row in range(4):
        tokens = np.asarray(draft.tokens)[row, :3]
        assert len(set(tokens.tolist())) == 3
    # An absent node has no children.
    parents = np.asarray(trees.parents(draft.tree))[0]
    below = np.flatnonzero(parents == 4)
    assert not np.any(np.asarray(draft.present)[:, below])


def test_the_most_probable_tokens():
    model = driving.build("transformer")
    draft, texts = proposed(
        drafters.tree(model, (3, 2), greedy=True), types.Sampling(temperature=0.0)
    )
    assert draft.is_deterministic and np.all(draft.present)
    logits = driving.fresh_logits(model, jnp.asarray(texts), jnp.asarray(LENGTHS))
    best = np.argsort(-np.asarray(logits), axis=1)[:, :3]
    np.testing.assert_array_equal(np.asarray(draft.tokens)[:, :3], best)


@pytest.mark.parametrize("replacement", [False, True])
def test_a_pair_of_siblings_has_its_law(replacement):
    """Two draws from one law, over a hundred thousand keys."""
    batch = 100_000
    law = np.asarray([0.5, 0.3, 0.2])
    model = models.tabular_model(jnp.log(jnp.asarray(law, jnp.float32)))
    drafter = drafters.tree(model, (2,), replacement=replacement)
    length = jnp.ones((batch,), jnp.int32)
    keys = jax.random.split(jax.random.key(1), batch)
    context = types.Context(
        jnp.zeros((batch, 4), jnp.int32),
        length,
        length > 0,
        types.Sampling(temperature=1.0),
        model,
        None,
        keys,
    )
    draft, _ = driving.propose(drafter, drafter.init(model, batch, 8), context, keys)
    pair = np.asarray(draft.tokens[:, 0] * 3 + draft.tokens[:, 1])
    counts = np.bincount(pair, minlength=9).reshape(3, 3)
    second = np.tile(law, (3, 1))
    if not replacement:
        second = second * (1 - np.eye(3))
    joint = law[:, None] * second / second.sum(axis=1, keepdims=True)
    possible = joint > 0
    assert counts[~possible].sum() == 0
    wanted = joint[possible] * batch
    statistic = np.sum((counts[possible] - wanted) ** 2 / wanted)
    assert stats.chi2.sf(statistic, possible.sum() - 1) > 1e-6


def test_inactive_rows_draft_nothing():
    draft, _ = proposed(
        drafters.tree(driving.build("tabular"), (2, 1)), active=[True, False, True, False]
    )
    np.testing.assert_array_equal(
        np.any(np.asarray(draft.present), axis=1), [True, False, True, False]
    )


def test_nothing_is_drafted_beyond_the_context_of_the_draft_model():
    config = models.TransformerConfig(driving.VOCABULARY, 8, 8, 1, 1, 1, 8, context_length=10)
    model = models.language_model(config, models.init_params(config, jax.random.key(0)))
    draft, _ = proposed(drafters.tree(model, (2, 1, 1)))
    # The third text has nine tokens: one level fits, and then there is no tenth to read.
    np.testing.assert_array_equal(np.sum(np.asarray(draft.present), axis=1), [6, 6, 4, 6])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"expansion": ()}, "expansion=\\(\\)"),
        ({"expansion": (2, 0)}, "expansion factor=0"),
        ({"expansion": (2,), "greedy": True, "replacement": True}, "exclude each other"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        drafters.tree(driving.build("tabular"), **options)


def test_no_model():
    with pytest.raises(ValueError, match="no LanguageModel"):
        drafters.tree(None)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("second, third", [(-9.5, -12.0), (-8.75, -8.72)])
def test_at_a_low_temperature_a_second_sibling_is_not_drawn_from_what_rounds_to_nothing(
    second, third
):
    """After the first token the draft's law holds e⁻⁹⁵, or e⁻⁸⁷·²; the target's law is kept."""
    target = models.tabular_model(0.1 * jnp.log(jnp.asarray([1e-9, 0.9, 0.1, 1e-9])))
    drafter = drafters.tree(models.tabular_model(jnp.asarray([0.0, second, third, -30.0])), (2,))
    rows = 2000
    for rule in ("multi_candidate", "traversal", "match"):
        result = specjax.generate(
            target,
            drafter,
            np.zeros((rows, 1), np.int32),
            lengths=np.ones(rows, np.int32),
            keys=jax.random.split(jax.random.key(0), rows),
            rule=rule,
            sampling=types.Sampling(0.1),
            max_new_tokens=1,
        )
        counts = np.bincount(np.asarray(result.new_tokens)[:, 0], minlength=4)
        assert abs(counts[1] / rows - 0.9) < 0.05 and counts[1] + counts[2] == rows, rule
