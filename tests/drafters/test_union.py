"""Trees of several drafters under one root: whose node is whose, and what each hears of it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specjax
from specjax import drafters, sampling, trees, types
from specjax.drafters.union import _merge
from tests.drafters import driving, test_tree
from tests.testing import toys


def union_of_three():
    return drafters.union(
        drafters.prompt_lookup(3, shortest=1),
        drafters.tree(driving.build("transformer"), (2, 1), replacement=True),
        drafters.model(driving.build("tabular", 3), 2),
    )


def proposed(drafter):
    length = jnp.asarray(test_tree.LENGTHS)
    tokens = np.random.default_rng(0).integers(0, driving.VOCABULARY, (4, 32), np.int32)
    keys = jax.random.split(jax.random.key(0), 4)
    target = driving.build("tabular")
    context = types.Context(
        jnp.asarray(tokens), length, length > 0, test_tree.SETTINGS, target, None, keys
    )
    state = drafter.init(drafter.params, 4, 64)
    state = driving.prefill(drafter, state, context.tokens, 0 * length, length - 1, 16)
    return driving.propose(drafter, state, context, keys)[0], context


def test_the_parts_stand_side_by_side():
    draft, _ = proposed(union_of_three())
    assert draft.tree.static_parents == (0, 1, 2, 0, 0, 4, 5, 0, 8)
    assert draft.siblings == "independent" and draft.sibling_laws == 3
    law = np.asarray(draft.law)
    np.testing.assert_array_equal(law[:, :3], -1)
    # Three laws of the tree's root and nodes, then two of the chain's.
    np.testing.assert_array_equal(law[0, 3:], [0, 0, 1, 2, 3, 4])
    assert draft.log_probs.shape[1] == 5
    for parts in (draft.log_probs[:, :3], draft.log_probs[:, 3:]):
        np.testing.assert_allclose(np.exp(parts).sum(-1), 1, atol=1e-5)


def test_parts_draw_independently():
    """The same drafter twice drafts twice, not the same."""
    part = drafters.model(driving.build("tabular"), 3)
    draft, _ = proposed(drafters.union(part, part))
    first, second = np.asarray(draft.tokens)[:, :3], np.asarray(draft.tokens)[:, 3:]
    assert np.any(first != second)
    np.testing.assert_allclose(draft.log_probs[:, 0], draft.log_probs[:, 3])


def test_the_keys_of_parts_are_not_those_of_a_stream():
    """A part's key must not be one that acceptance or residuals fold further."""
    given = []

    def recording(params, state, context, keys):
        given.append(np.asarray(jax.random.key_data(keys)))
        return part.propose(params, state, context, keys)

    part = drafters.prompt_lookup(2)
    with jax.disable_jit():
        _, context = proposed(
            drafters.union(*[dataclasses.replace(part, propose=recording)] * len(sampling.Stream))
        )
    of_parts = {tuple(row) for keys in given for row in keys.tolist()}
    streams = {
        tuple(np.asarray(jax.random.key_data(jax.random.fold_in(key, int(stream)))).tolist())
        for key in context.keys
        for stream in sampling.Stream
    }
    assert len(of_parts) == 4 * len(sampling.Stream) and not of_parts & streams


def test_coupled_parts_share_the_targets_noise():
    """Both draw at each position with the noise of the request, whatever their place."""
    part = drafters.model(driving.build("tabular"), 3, coupled=True)
    draft, context = proposed(drafters.union(part, part))
    np.testing.assert_array_equal(draft.tokens[:, :3], draft.tokens[:, 3:])
    alone, _ = proposed(part)
    np.testing.assert_array_equal(draft.tokens[:, :3], alone.tokens)
    assert draft.siblings == "coupled"


def test_every_part_hears_of_its_own_nodes():
    drafter = union_of_three()
    heard = []

    def recording(part):
        def update(params, state, context, draft, verdict, output):
            heard.append((draft, verdict, output))
            return part.update(params, state, context, draft, verdict, output)

        return dataclasses.replace(part, update=update)

    drafter = dataclasses.replace(drafter, params=tuple(recording(part) for part in drafter.params))
    draft, context = proposed(drafter)
    logits = jnp.broadcast_to(jnp.arange(10.0)[None, :, None], (4, 10, 2))
    output = types.ModelOutput(logits, logits[:, :, None])
    # Rows accept two nodes of the lookup, a sibling of the tree, the chain, and nothing.
    path = jnp.asarray([[1, 2, 0], [5, 7, 0], [8, 9, 0], [0, 0, 0]], jnp.int32)
    count = jnp.asarray([2, 1, 2, 0], jnp.int32)
    tokens = np.asarray(context.tokens).copy()
    for row in range(4):
        start = int(context.length[row])
        for order in range(int(count[row])):
            tokens[row, start + order] = int(draft.tokens[row, int(path[row, order]) - 1])
        tokens[row, start + int(count[row])] = 5
    after = dataclasses.replace(
        context, tokens=jnp.asarray(tokens), length=context.length + count + 1
    )
    verdict = types.Verdict(path, count, jnp.full((4,), 5, jnp.int32))
    state = drafter.init(drafter.params, 4, 64)
    drafter.update(drafter.params, state, after, draft, verdict, output)
    counts = np.stack([np.asarray(verdict.count) for _, verdict, _ in heard])
    np.testing.assert_array_equal(counts, [[2, 0, 0, 0], [0, 1, 0, 0], [0, 0, 2, 0]])
    (_, lookup, _), (tree, of_tree, tree_output), (chain, of_chain, _) = heard
    np.testing.assert_array_equal(lookup.path[0, :2], [1, 2])
    assert of_tree.path[1, 0] == 2 and tree.tree.static_parents == (0, 0, 1, 2)
    np.testing.assert_array_equal(of_chain.path[2, :2], [1, 2])
    assert chain.tree.is_chain
    np.testing.assert_array_equal(tree_output.logits[0, :, 0], [0, 4, 5, 6, 7])
    # The next token is the one that follows what is left of a part's path.
    first = np.asarray(draft.tokens)
    assert lookup.next_token[0] == 5 and lookup.next_token[1] == first[1, 4]
    assert of_chain.next_token[0] == first[0, 0]


def test_parts_that_lag_catch_up():
    """A part whose draft was never taken drafts as one that is fresh from a prefill."""
    target = driving.build("tabular", 1)
    parts = [drafters.model(driving.build("transformer"), 2), drafters.model(target, 3)]
    asked = types.Sampling(temperature=1.0)
    result = specjax.generate(
        target,
        drafters.union(*parts),
        [[1, 2, 3], [4]],
        rule="match",
        sampling=asked,
        max_new_tokens=24,
        eos=(),
    )
    alone = specjax.generate(
        target,
        parts[1],
        [[1, 2, 3], [4]],
        rule="match",
        sampling=asked,
        max_new_tokens=24,
        eos=(),
    )
    assert result.new_tokens == alone.new_tokens
    # The target's own guesses are right as often as they are alone, or oftener.
    assert result.statistics.tau > 1.2


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_parts(count):
    with pytest.raises(ValueError, match=f"union of {count} drafters"):
        drafters.union(*[drafters.prompt_lookup(3)] * count)


def test_a_reader_of_features_is_refused():
    with pytest.raises(ValueError, match="taps=.*leave it out"):
        drafters.union(drafters.prompt_lookup(3), toys.reader())


def test_a_union_of_unions_is_one_union():
    lookup, model = drafters.prompt_lookup(2), drafters.model(driving.build("tabular"), 2)
    nested = drafters.union(drafters.union(lookup, model), model)
    assert len(nested.params) == 3 and nested.nodes == 6


def test_siblings_that_do_not_go_together():
    model = driving.build("tabular")
    with pytest.raises(ValueError, match="coupled and independent.*replacement=True"):
        proposed(drafters.union(drafters.model(model, 2), drafters.model(model, 2, coupled=True)))
    with pytest.raises(ValueError, match="distinct"):
        proposed(drafters.union(drafters.model(model, 2), drafters.tree(model, (2,))))


def test_a_dynamic_part_makes_the_union_dynamic():
    static = trees.branching((2,))
    grown = trees.dynamic(jnp.asarray([[0, 1], [0, 0]], jnp.int32), 2)
    parts = [
        types.draft(jnp.zeros((2, 2), jnp.int32), tree, vocab_size=4) for tree in (static, grown)
    ]
    merged = _merge(parts)
    np.testing.assert_array_equal(trees.parents(merged.tree), [[0, 0, 0, 3], [0, 0, 0, 0]])
    assert merged.tree.max_depth == 2
