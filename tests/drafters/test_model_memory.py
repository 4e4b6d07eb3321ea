"""The draft model's memory: that of a fresh prefill, in laws, tokens and accepted lengths."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import decoding, drafters, models, sampling, trees, types
from specjax.models import recurrent
from tests.drafters import driving


@pytest.fixture(params=["tabular", "recurrent", "transformer"])
def draft_model(request):
    return driving.build(request.param)


@pytest.mark.parametrize("lag", [False, True], ids=["steady", "lagging"])
def test_the_memory_is_that_of_a_fresh_prefill(draft_model, lag):
    """After full, partial and no acceptance, unequal among rows, and behind other drafters."""
    decode = driving.Decode(drafters.model(draft_model, 3), driving.TEXTS)
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
    decode = driving.Decode(drafters.model(draft_model, 3), driving.TEXTS)
    decode.commit(decode.propose(), [3, 0, 2, 1])
    decode.advance([20, 0, 33, 8])
    draft = decode.propose()
    decode.check(draft)
    decode.commit(draft, [1, 3, 3, 0])
    decode.check(decode.propose())


def test_inactive_rows_stay_as_they_are(draft_model):
    decode = driving.Decode(drafters.model(draft_model, 3), driving.TEXTS)
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


def test_stopping_early_leaves_the_memory_right(draft_model):
    decode = driving.Decode(drafters.model(draft_model, 3, stop_below=0.5), driving.TEXTS)
    shown = set()
    for _ in range(6):
        draft = decode.propose()
        decode.check(draft)
        present = np.asarray(jnp.sum(draft.present, axis=1))
        shown |= set(present.tolist())
        decode.commit(draft, present)
    assert len(shown) >= 3


def decode(target, drafter, rule, tokens=(5, 3, 8, 6)):
    """Rows of unequal prompts, each to a number of tokens of its own."""
    return decoding.generate(
        target,
        drafter,
        driving.TEXTS,
        rule=rule,
        key=jax.random.key(3),
        sampling=types.Sampling(temperature=1.0),
        max_new_tokens=np.asarray(tokens),
        eos=(),
    )


@pytest.mark.parametrize(
    "kind, rule",
    [("tabular", "token"), ("tabular", "block"), ("recurrent", "block"), ("transformer", "token")],
)
def test_a_model_that_drafts_for_itself_is_accepted_whole(kind, rule):
    """p = q, so that one token lost or fed twice shows; nothing is rejected, so rollback does not.

    What rejection leaves behind shows in the accepted lengths below.
    """
    draft_model = driving.build(kind)
    size, steps = 3, [5, 3, 8, 6]
    drafter = drafters.model(draft_model, size)
    result = decode(draft_model, drafter, rule, np.asarray(steps) * (size + 1))
    assert result.statistics.tau == size + 1
    np.testing.assert_array_equal(result.statistics.target_steps, steps)
    assert result.statistics.acceptance_rate == 1


@dataclasses.dataclass(frozen=True)
class Rereading:
    """Proposes by the same draws as `drafters.model`, and reads the whole text for every token."""

    length: int

    def __call__(self, params, state, context, keys):
        batch, slots = context.tokens.shape
        row = jnp.arange(batch, dtype=jnp.int32)
        step_keys = sampling.derive(keys, sampling.Stream.DRAFT, context.length)
        text = jnp.pad(context.tokens, ((0, 0), (0, self.length)))
        laws = []
        for depth in range(self.length):
            laws.append(driving.fresh_law(params, context.sampling, text, context.length + depth))
            depth_keys = jax.vmap(jax.random.fold_in, (0, None))(step_keys, depth)
            token = sampling.categorical(depth_keys, laws[-1])
            text = text.at[row, context.length + depth].set(token)
        place = context.length[:, None] + jnp.arange(self.length, dtype=jnp.int32)[None]
        tokens = jnp.take_along_axis(text, place, axis=1)
        tree = trees.chain(self.length)
        return types.draft(tokens, tree, log_probs=jnp.stack(laws, axis=1)), state


def rereading(draft_model, length):
    return dataclasses.replace(
        decoding.NOTHING, params=draft_model, propose=Rereading(length), nodes=length
    )


def drifted(model):
    """A target of like laws."""
    leaves, structure = jax.tree.flatten(model.params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    moved = [
        leaf + 0.3 * jnp.std(leaf) * jax.random.normal(key, leaf.shape)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return dataclasses.replace(model, params=jax.tree.unflatten(structure, moved))


def keep_everything(params, state, context, draft, verdict, output):
    """What would keep the text right, and let the accepted length fall."""
    fed = types.Verdict(verdict.path, jnp.full_like(verdict.count, 99), verdict.next_token)
    state = drafters.model(params.model).update(params, state, context, draft, fed, output)
    return dataclasses.replace(state, seen=jnp.minimum(state.seen, context.length - 1))


@pytest.mark.parametrize(
    "kind, rule",
    [
        ("tabular", "token"),
        ("tabular", "block"),
        ("tabular", "match"),
        ("recurrent", "block"),
        ("transformer", "token"),
    ],
)
def test_accepted_lengths_are_those_of_a_draft_model_without_memory(kind, rule):
    """q ≠ p, so that steps reject: what stays behind of the rejected would change later drafts."""
    draft_model, size, tokens = driving.build(kind), 3, (40, 25, 60, 33)
    target = drifted(draft_model)
    drafter = drafters.model(draft_model, size)
    found = decode(target, drafter, rule, tokens)
    wanted = decode(target, rereading(draft_model, size), rule, tokens)
    assert found.new_tokens == wanted.new_tokens
    np.testing.assert_array_equal(found.statistics.histogram, wanted.statistics.histogram)
    assert found.statistics.tau == wanted.statistics.tau
    assert np.all(np.sum(found.statistics.histogram, axis=0) > 0)


def test_entries_that_stay_behind_would_be_seen():
    draft_model = driving.build("tabular")
    drafter = drafters.model(draft_model, 3)
    broken = dataclasses.replace(drafter, update=keep_everything)
    taus = [
        decode(drifted(draft_model), each, "block", (90, 70, 80, 99)).statistics.tau
        for each in (drafter, broken)
    ]
    assert taus[1] < taus[0] - 0.2


def test_matching_itself_greedily_is_accepted_whole():
    model = driving.build("tabular")
    options = {"max_new_tokens": 20, "eos": ()}
    result = decoding.generate(
        model, drafters.model(model, 4, greedy=True), driving.TEXTS, **options
    )
    assert result.statistics.tau == 5
    assert result.new_tokens == decoding.autoregressive(model, driving.TEXTS, **options).new_tokens


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
    none = jnp.zeros((1,), jnp.int32)
    fed = jnp.asarray([prompt[:12]])
    behind = driving.prefill(drafter, behind, fed, none, jnp.asarray([12]), 12)
    state = dataclasses.replace(state, drafter=behind)
    state, info = decoding.step(model, drafter, request, state, "block")
    fresh = drafter.init(drafter.params, 1, 40)
    text = state.tokens[:, :15]
    fresh = driving.prefill(drafter, fresh, text, none, jnp.asarray([14]), 15)
    for kept, expected in zip(state.drafter.cache.keys, fresh.cache.keys, strict=True):
        np.testing.assert_allclose(kept[:, :, :14], expected[:, :, :14], atol=1e-5)
    assert int(info.emitted[0]) == 1
