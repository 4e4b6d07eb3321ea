"""Drafters that break the contract, each in one way, and what the suite says of them."""

import dataclasses
import functools
import unittest.mock

import jax
import jax.numpy as jnp
import pytest

from specjax import decoding, drafters, sampling, testing, trees, types
from tests.testing import toys

WHOLE = drafters.model(toys.tabular(1), 2)
COUPLED = drafters.model(toys.tabular(1), 2, coupled=True)


def check(drafter, **options):
    testing.check_drafter(
        drafter, toys.tabular(0, order=2), jax.random.key(22), prompts=toys.PROMPTS, **options
    )


def test_the_whole_of_the_broken_ones_passes():
    check(WHOLE)


def kept(state, model, count):
    """The state of a model drafter that keeps this many entries: the root's, and those it fed."""
    return dataclasses.replace(
        state,
        cache=model.commit(state.cache, None, count),
        seen=state.seen + count,
        fed=jnp.zeros_like(state.fed),
    )


def keep_rejected(params, state, context, draft, verdict, output):
    del draft, verdict, output
    count = jnp.where(context.active, 1 + state.fed, 0)
    after = kept(state, params.model, count)
    # It believes that it holds the text, and what it holds is something else.
    return dataclasses.replace(after, seen=jnp.minimum(after.seen, context.length - 1))


def keep_one_too_few(params, state, context, draft, verdict, output):
    del draft, output
    count = jnp.where(context.active, 1 + jnp.minimum(verdict.count, state.fed), 0)
    after = kept(state, params.model, jnp.maximum(count - 1, 0))
    return dataclasses.replace(after, seen=state.seen + count)


def keep_accepted_of_row_zero(params, state, context, draft, verdict, output):
    del draft, output
    count = jnp.where(context.active, 1 + jnp.minimum(verdict.count, state.fed), 0)
    after = kept(state, params.model, jnp.where(count > 0, count[0], 0))
    return dataclasses.replace(after, seen=state.seen + count)


def forget_who_is_inactive(params, state, context, draft, verdict, output):
    after = WHOLE.update(params, state, context, draft, verdict, output)
    return dataclasses.replace(after, seen=after.seen - jnp.where(context.active, 0, 1))


def another_type(params, state, context, draft, verdict, output):
    after = WHOLE.update(params, state, context, draft, verdict, output)
    return dataclasses.replace(after, seen=after.seen.astype(jnp.float32))


@pytest.mark.parametrize(
    "update, complaint",
    [
        (keep_rejected, "accepted in the last: .* as after a fresh prefill"),
        (keep_one_too_few, "accepted in the last: .* as after a fresh prefill"),
        (keep_accepted_of_row_zero, "row [1-3], [12] accepted in the last: .* fresh prefill"),
        (forget_who_is_inactive, r"inactive in the last: its state\.seen was"),
        (another_type, r"another form after a step: .* int32\[4\].* became .* float32\[4\]"),
    ],
)
def test_a_broken_memory_is_found(update, complaint):
    with pytest.raises(AssertionError, match=f"drafter 'model': .*{complaint}"):
        check(dataclasses.replace(WHOLE, update=update), remembers=update is forget_who_is_inactive)


def test_a_sampled_drafter_passes():
    check(toys.sampled())


@pytest.mark.parametrize(
    "damage, complaint",
    [
        ("dropped", "node 1 is present as token . and absent as token .; presence may depend"),
        (
            "greedy",
            "node 2 is the likeliest token of its law in .* of 1024 drafts, where by its laws",
        ),
        ("unnormalised", "row 0, node 1: law 0 has mass 0.606531, not 1"),
        ("impossible", "row 0, node .: token . was drawn, and has probability 0 under law"),
        ("beyond", "is none of the vocabulary 0…5"),
        ("unlawful", "node 2: law 2 is none of the 2 in log_probs"),
        ("orphan", "node 2 is present, and its parent 1 is not"),
        ("upside down", "node 1: the parent is 2, not in 0…0"),
        ("deeper than it says", "node 2: depth 2, and the tree's is 1"),
        ("not a number", "row 0, node 2: law 1 has mass nan, not 1"),
        ("twins", "is also that of its sibling 1, drawn without replacement"),
        ("two laws", r"children of node 0: drawn from 2 laws .*, and sibling_laws=1"),
        ("strange siblings", "siblings='cousins' is unknown"),
        ("absent", "no node was present"),
        ("longer", "over 7 tokens, the target's over 6"),
    ],
)
def test_a_broken_draft_is_found(damage, complaint):
    with pytest.raises(AssertionError, match=f"drafter 'sampled': .*{complaint}"):
        check(toys.sampled(damage))


@pytest.mark.parametrize(
    "how",
    [("distinct", True), ("distinct", False, "independent")],
    ids=["sorted", "called independent"],
)
def test_siblings_in_another_order_or_by_another_law_are_found(how):
    with pytest.raises(AssertionError, match="drafter 'pair': .* drafts, where by its laws"):
        check(toys.pair(*how))


@dataclasses.dataclass(frozen=True)
class SharpLaws:
    """Draws from its laws, and says that they are sharper."""

    def __call__(self, params, state, context, keys):
        draft, state = WHOLE.propose(params, state, context, keys)
        return dataclasses.replace(
            draft, log_probs=jax.nn.log_softmax(1.35 * draft.log_probs, axis=-1)
        ), state


@dataclasses.dataclass(frozen=True)
class SameDraws:
    """Derives its keys as if every text had one length; or from the target's own noise."""

    coupled: bool

    def __call__(self, params, state, context, keys):
        if self.coupled:
            draft, state = COUPLED.propose(params, state, context, keys)
            return dataclasses.replace(draft, siblings="independent"), state
        with unittest.mock.patch.object(sampling, "derive", _at_one_length):
            return WHOLE.propose(params, state, context, keys)


def _at_one_length(keys, stream, position, derive=sampling.derive):
    return derive(keys, stream, jnp.zeros_like(position))


@pytest.mark.parametrize(
    "propose, complaint",
    [
        (SharpLaws(), "drew has 0.* of its law's largest probability in the mean"),
        (SameDraws(False), "the token that node . was a step before in .* the same noise serves"),
        (SameDraws(True), "the token that node 2 was a step before in .* the same noise serves"),
    ],
)
def test_draws_that_only_look_right_are_found(propose, complaint):
    with pytest.raises(AssertionError, match=f"drafter 'model': .*{complaint}"):
        check(dataclasses.replace(WHOLE, propose=propose))


def test_features_of_the_wrong_node_are_found():
    with pytest.raises(AssertionError, match="[12] accepted in the last: .* fresh prefill"):
        testing.check_drafter(
            toys.reader(toys.read_root),
            toys.transformer(0),
            jax.random.key(24),
            prompts=toys.PROMPTS,
        )


def test_a_simple_drafter_passes():
    check(toys.simple())


@pytest.mark.parametrize(
    "damage, complaint",
    [
        ("batch index", "row 1 as row 0 of another batch: node 1 is token"),
        ("others", "node 1 is token"),
        ("active rows", "turn 1, .*: node 1 is token ., not ., as in a step of all rows"),
        ("batch size", "turn 1, after 0 steps, row 3 as row 0 alone: node 1 is token"),
    ],
)
def test_a_row_that_depends_on_the_others_is_found(damage, complaint):
    with pytest.raises(AssertionError, match=f"drafter 'simple': .*{complaint}"):
        check(toys.simple(damage), remembers=True)


def test_wrong_nodes_are_found():
    with pytest.raises(AssertionError, match="nodes=3, but its drafts have N=2"):
        check(dataclasses.replace(toys.simple(), nodes=3))


def count_all_rows(params, state, context, draft, verdict, output):
    del params, context, draft, verdict, output
    return state + 1


def zeros(params, batch, capacity):
    del params, capacity
    return jnp.zeros((batch,), jnp.int32)


def slots(params, batch, capacity):
    del params
    return jnp.zeros((batch, capacity), jnp.int32)


def count_chunks(params, state, text, start, count, output):
    del params, text, start, count, output
    return state + 1


@pytest.mark.parametrize(
    "changes, complaint",
    [
        # No draft shows it.
        (
            {"propose": toys.Simple(""), "init": zeros, "update": count_all_rows},
            "row ., inactive in the last: its state was . and became",
        ),
        # The state may differ, since slots may hold what does not count; the draft does.
        ({"init": slots, "update": count_all_rows}, "row ., inactive in the last: node 1 is token"),
        (
            {"init": zeros, "prefill": count_chunks},
            "turn 2, .* row [12], given no new tokens: node",
        ),
    ],
)
def test_a_state_that_changes_for_rows_at_rest_is_found(changes, complaint):
    with pytest.raises(AssertionError, match=f"drafter 'simple': .*{complaint}"):
        check(dataclasses.replace(toys.simple("state"), **changes), remembers=True)


# Jacobi decoding remembers the target's draws: its drafts follow from how a text came about.


def guess(params, batch, capacity):
    del params, capacity
    return jnp.zeros((batch, 3), jnp.int32)


def draft_guess(params, state, context, keys):
    del params, context, keys
    return types.draft(state[:, :2], trees.chain(2), vocab_size=toys.VOCABULARY), state


def take_draws(params, state, context, draft, verdict, output):
    del params, draft, output
    later = jnp.roll(verdict.draws, -1, axis=1)
    return jnp.where(context.active[:, None], later, state)


def test_a_drafter_may_remember_more_than_its_text():
    jacobi = dataclasses.replace(
        toys.simple(), init=guess, propose=draft_guess, update=take_draws, name="jacobi"
    )
    check(jacobi, remembers=True)
    with pytest.raises(AssertionError, match="as after a fresh prefill"):
        check(jacobi)


# What compiles.


def local():
    def init(params, batch, capacity):
        return decoding.NOTHING.init(params, batch, capacity)

    return init


class ByIdentity:
    def __call__(self, params, batch, capacity):
        del params, batch, capacity
        return ()


class Unhashable(ByIdentity):
    __hash__ = None  # pyright: ignore[reportAssignmentType]


@pytest.mark.parametrize(
    "init, complaint",
    [
        (local(), "init is <function local.<locals>.init.*: neither a function of a module nor"),
        (
            functools.partial(decoding.NOTHING.init),
            "init is functools.partial.*: neither a function",
        ),
        (ByIdentity().__call__, "init is <bound method.*: neither a function of a module nor"),
        (ByIdentity(), "init is <.*ByIdentity.*: neither a function of a module nor"),
        (Unhashable(), "init is not hashable .*, so it cannot be static"),
    ],
)
def test_functions_that_cannot_be_static_are_found(init, complaint):
    with pytest.raises(AssertionError, match=f"drafter 'simple': {complaint}"):
        check(dataclasses.replace(toys.simple(), init=init))


def test_params_that_are_no_arrays_are_found():
    with pytest.raises(AssertionError, match="params hold 1, not an array"):
        check(dataclasses.replace(toys.simple(), params=1))


def test_a_program_that_is_traced_again_is_found():
    # A number made an array without a dtype is weakly typed, and weights given later are not.
    weak = jnp.asarray(1.0)
    with pytest.raises(AssertionError, match="a step of 4 rows was traced 2 times"):
        check(dataclasses.replace(toys.simple(), params=weak))


@pytest.mark.parametrize("prompts", [[[1, 2], [3]], [[1], [2], [3]], [[1, 2], [], [3]]])
def test_prompts_that_check_nothing_are_refused(prompts):
    with pytest.raises(ValueError, match="3 prompts of unequal lengths"):
        testing.check_drafter(toys.simple(), toys.tabular(0), jax.random.key(23), prompts=prompts)


def test_a_drafter_without_nodes_is_refused():
    with pytest.raises(ValueError, match="nodes=0"):
        check(decoding.NOTHING)
