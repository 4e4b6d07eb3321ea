"""Every drafter against the contract, and the contract's checker against drafters that break it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest
from flax import struct

from specjax import decoding, drafters, models, sampling, testing, trees, types
from specjax.models import recurrent

VOCABULARY = 6
CONFIG = models.TransformerConfig(VOCABULARY, 16, 24, 1, 2, 1, 8, 128)
PROMPTS = [[1, 2, 3, 1, 2], [4], [0, 3, 0, 3, 0, 1, 5], [2, 2, 1]]


def tabular(seed, order=3):
    return models.tabular_model(models.random_table(jax.random.key(seed), VOCABULARY, order, 1.5))


def state_space(seed):
    return models.recurrent_model(recurrent.init_params(jax.random.key(seed), VOCABULARY, 8))


def transformer(seed):
    return models.language_model(CONFIG, models.init_params(CONFIG, jax.random.key(seed), 2.0))


DRAFTERS = {
    "lookup": lambda: (drafters.prompt_lookup(4, shortest=1), tabular(0)),
    "lookup of short matches": lambda: (
        drafters.prompt_lookup(3, shortest=2, longest=3),
        state_space(0),
    ),
    "model": lambda: (drafters.model(tabular(1), 3), transformer(0)),
    "recurrent model, stopping": lambda: (
        drafters.model(state_space(1), 3, stop_below=0.4),
        tabular(0),
    ),
    "greedy model": lambda: (drafters.model(tabular(1), 2, greedy=True), state_space(0)),
    "transformer": lambda: (drafters.model(transformer(1), 2), tabular(0)),
    "siblings": lambda: (pair("independent"), tabular(0)),
    "distinct siblings": lambda: (pair("distinct"), tabular(0)),
    "dynamic trees": lambda: (grown(), tabular(0)),
    "reader of features": lambda: (reader(), transformer(0)),
}


@pytest.mark.parametrize("name", DRAFTERS)
def test_drafter_keeps_the_contract(name):
    drafter, target = DRAFTERS[name]()
    testing.check_drafter(drafter, target, jax.random.key(20), prompts=PROMPTS)


def test_prompts_are_made_up_where_none_are_given():
    testing.check_drafter(drafters.prompt_lookup(3, shortest=1), tabular(0), jax.random.key(21))


# Drafters of kinds that are yet to come: trees, siblings, readers of features.


@dataclasses.dataclass(frozen=True)
class Siblings:
    """Two siblings drawn one after the other from one law, with replacement or without."""

    kind: str
    is_sorted: bool = False
    says: str = ""

    def __call__(self, params, state, context, keys):
        step_keys = sampling.derive(keys, sampling.Stream.DRAFT, context.length)
        last = jnp.take_along_axis(context.tokens, context.length[:, None] - 1, axis=1)[:, 0]
        law, left, tokens = params[last], params[last], []
        for draw in range(2):
            draw_keys = jax.vmap(jax.random.fold_in, (0, None))(step_keys, draw)
            tokens.append(sampling.categorical(draw_keys, left))
            if self.kind == "distinct":
                taken = jax.nn.one_hot(tokens[-1], VOCABULARY) > 0
                left = jax.nn.log_softmax(jnp.where(taken, -jnp.inf, left), axis=-1)
        tokens = jnp.stack(tokens, axis=1)
        if self.is_sorted:
            order = jnp.argsort(-jnp.take_along_axis(law, tokens, axis=1), axis=1)
            tokens = jnp.take_along_axis(tokens, order, axis=1)
        siblings = self.says or self.kind
        tree = trees.from_parents((0, 0))
        return types.draft(tokens, tree, log_probs=law[:, None], siblings=siblings), state


def pair(*how):
    """Drafts of two siblings; in their table every token has three that may follow it."""
    places = jnp.arange(VOCABULARY)
    offset = (places[None] - places[:, None]) % VOCABULARY
    table = sum(jnp.where(offset == at, part, 0.0) for at, part in ((0, 0.3), (2, 0.5), (3, 0.2)))
    params = jnp.log(jnp.asarray(table, jnp.float32))
    return dataclasses.replace(
        decoding.NOTHING, params=params, propose=Siblings(*how), nodes=2, name="pair"
    )


@dataclasses.dataclass(frozen=True)
class Grown:
    """A tree whose shape follows from the last token."""

    def __call__(self, params, state, context, keys):
        del params, keys
        last = jnp.take_along_axis(context.tokens, context.length[:, None] - 1, axis=1)
        shapes = jnp.asarray([[0, 0, 1, 2], [0, 1, 2, 0]], jnp.int32)
        tokens = (last + jnp.arange(1, 5, dtype=jnp.int32)[None]) % VOCABULARY
        tree = trees.dynamic(shapes[last[:, 0] % 2], 3)
        return types.draft(tokens, tree, vocab_size=VOCABULARY), state


def grown():
    return dataclasses.replace(decoding.NOTHING, propose=Grown(), nodes=4, name="grown")


@struct.dataclass
class Read:
    """Features of the token before the root, and whether there is one."""

    features: jax.Array
    known: jax.Array


def read_nothing(params, batch, capacity):
    del capacity
    return Read(jnp.zeros((batch, params.shape[0])), jnp.zeros((batch,), bool))


def read_chunk(params, state, text, start, count, output):
    del params, text, start
    row = jnp.arange(count.shape[0], dtype=jnp.int32)
    last = output.features[row, jnp.maximum(count - 1, 0)].reshape(*state.features.shape)
    features = jnp.where((count > 0)[:, None], last, state.features)
    return Read(features, state.known | (count > 0))


def read_accepted(params, state, context, draft, verdict, output):
    del params, draft
    row = jnp.arange(verdict.count.shape[0], dtype=jnp.int32)
    nodes = jnp.pad(verdict.path, ((0, 0), (1, 0)))
    features = output.features[row, nodes[row, verdict.count]].reshape(*state.features.shape)
    active = context.active
    return Read(jnp.where(active[:, None], features, state.features), state.known | active)


def read_root(params, state, context, draft, verdict, output):
    nothing = dataclasses.replace(verdict, count=jnp.zeros_like(verdict.count))
    return read_accepted(params, state, context, draft, nothing, output)


def draft_from_features(params, state, context, keys):
    del keys
    last = jnp.take_along_axis(context.tokens, context.length[:, None] - 1, axis=1)
    best = jnp.argsort(state.features @ params, axis=1)[:, :2].astype(jnp.int32)
    tokens = jnp.concatenate([best, (best[:, :1] + last) % VOCABULARY], axis=1)
    present = jnp.broadcast_to(state.known[:, None], tokens.shape)
    tree = trees.from_parents((0, 0, 2))
    return types.draft(tokens, tree, present=present, vocab_size=VOCABULARY), state


def reader(update=read_accepted):
    """Reads the inputs of the first layer and the last norm, as EAGLE does."""
    head = jax.random.normal(jax.random.key(9), (2 * CONFIG.hidden_size, VOCABULARY))
    return types.Drafter(
        params=head,
        init=read_nothing,
        prefill=read_chunk,
        propose=draft_from_features,
        update=update,
        nodes=3,
        taps=(0, CONFIG.num_layers),
        name="reader",
    )


# What breaks the contract.


WHOLE = drafters.model(tabular(1), 2)


def check(drafter, **options):
    testing.check_drafter(
        drafter, tabular(0, order=2), jax.random.key(22), prompts=PROMPTS, **options
    )


def test_the_whole_of_the_broken_ones_passes():
    check(WHOLE)


def kept(state, model, count):
    """The state of a model drafter that keeps this many of the entries it fed."""
    return dataclasses.replace(
        state,
        cache=model.commit(state.cache, None, count),
        seen=state.seen + count,
        fed=jnp.zeros_like(state.fed),
    )


def keep_rejected(params, state, context, draft, verdict, output):
    del draft, verdict, output
    count = jnp.where(context.active, state.fed, 0)
    after = kept(state, params.model, count)
    # It believes that it holds the text, and what it holds is something else.
    return dataclasses.replace(after, seen=jnp.minimum(after.seen, context.length - 1))


def keep_one_too_few(params, state, context, draft, verdict, output):
    del draft, output
    count = jnp.where(context.active, jnp.minimum(verdict.count, state.fed), 0)
    after = kept(state, params.model, jnp.maximum(count - 1, 0))
    return dataclasses.replace(after, seen=state.seen + count)


def keep_accepted_of_row_zero(params, state, context, draft, verdict, output):
    del draft, output
    count = jnp.where(context.active, jnp.minimum(verdict.count, state.fed), 0)
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


@dataclasses.dataclass(frozen=True)
class Sampled:
    """Chains of two, each token drawn from a table's law after the token before; maybe damaged."""

    damage: str

    def __call__(self, params, state, context, keys):
        step_keys = sampling.derive(keys, sampling.Stream.DRAFT, context.length)
        token = jnp.take_along_axis(context.tokens, context.length[:, None] - 1, axis=1)[:, 0]
        tokens, laws = [], []
        for depth in range(2):
            depth_keys = jax.vmap(jax.random.fold_in, (0, None))(step_keys, depth)
            laws.append(params[token])
            token = sampling.categorical(depth_keys, laws[-1])
            tokens.append(token)
        draft = types.draft(
            jnp.stack(tokens, axis=1), trees.chain(2), log_probs=jnp.stack(laws, axis=1)
        )
        return dataclasses.replace(draft, **self.changes(draft)), state

    def changes(self, draft):
        row = jnp.arange(draft.tokens.shape[0], dtype=jnp.int32)[:, None]
        own = draft.log_probs[row, draft.law, draft.tokens]
        likely = jnp.argmax(draft.log_probs, axis=-1).astype(jnp.int32)

        def tree(parents, depth):
            wide = jnp.broadcast_to(jnp.asarray(parents, jnp.int32), draft.law.shape)
            return trees.dynamic(wide, depth)

        return {
            "": {},
            "dropped": {"present": jnp.cumprod((own > -1.0).astype(jnp.int32), axis=1) > 0},
            "greedy": {"tokens": draft.tokens.at[:, 1].set(likely[:, 1])},
            "unnormalised": {"log_probs": draft.log_probs - 0.5},
            "not a number": {"log_probs": draft.log_probs.at[:, 1, 0].set(jnp.nan)},
            "impossible": {"log_probs": jnp.roll(draft.log_probs, 1, axis=2)},
            "beyond": {"tokens": draft.tokens + VOCABULARY},
            "unlawful": {"law": draft.law + 1},
            "orphan": {"present": draft.present.at[:, 0].set(False)},
            "upside down": {"tree": tree([2, 0], 2)},
            "deeper than it says": {"tree": tree([0, 1], 1)},
            "absent": {"present": jnp.zeros_like(draft.present)},
            "longer": {"log_probs": jnp.pad(draft.log_probs, ((0, 0), (0, 0), (0, 1)))},
            "strange siblings": {"siblings": "cousins"},
            "twins": {"siblings": "distinct", "tree": tree([0, 0], 1)},
        }[self.damage]


def sampled(damage=""):
    # In this table every token has two that may follow it.
    places = jnp.arange(VOCABULARY)
    offset = (places[None] - places[:, None]) % VOCABULARY
    table = jnp.where(offset == 0, 0.3, jnp.where(offset == 2, 0.7, 0.0))
    return dataclasses.replace(
        decoding.NOTHING,
        params=jnp.log(table.astype(jnp.float32)),
        propose=Sampled(damage),
        nodes=2,
        name="sampled",
    )


def test_a_sampled_drafter_passes():
    check(sampled())


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
        ("strange siblings", "siblings='cousins' is unknown"),
        ("absent", "no node was present"),
        ("longer", "over 7 tokens, the target's over 6"),
    ],
)
def test_a_broken_draft_is_found(damage, complaint):
    with pytest.raises(AssertionError, match=f"drafter 'sampled': .*{complaint}"):
        check(sampled(damage))


@pytest.mark.parametrize(
    "how",
    [("distinct", True), ("distinct", False, "independent")],
    ids=["sorted", "called independent"],
)
def test_siblings_in_another_order_or_by_another_law_are_found(how):
    with pytest.raises(AssertionError, match="drafter 'pair': .* drafts, where by its laws"):
        check(pair(*how))


def test_features_of_the_wrong_node_are_found():
    with pytest.raises(AssertionError, match="[12] accepted in the last: .* fresh prefill"):
        testing.check_drafter(
            reader(read_root), transformer(0), jax.random.key(24), prompts=PROMPTS
        )


@dataclasses.dataclass(frozen=True)
class Simple:
    """Deterministic chains of two that follow from the text's last token, or fail to."""

    damage: str

    def __call__(self, params, state, context, keys):
        del keys
        last = jnp.take_along_axis(context.tokens, context.length[:, None] - 1, axis=1)
        batch = last.shape[0]
        offset = jnp.asarray([[1, 2]], jnp.int32)
        if self.damage == "batch index":
            offset = offset + jnp.arange(batch, dtype=jnp.int32)[:, None]
        if self.damage == "others":
            offset = offset + jnp.sum(context.length)
        if self.damage == "batch size":
            offset = offset + batch
        if self.damage == "state":
            # A row of the state may be a number or slots of a text.
            offset = offset + state.reshape(batch, -1)[:, :1]
        tokens = (last + offset + params.astype(jnp.int32)) % VOCABULARY
        return types.draft(tokens, trees.chain(2), vocab_size=VOCABULARY), state


def simple(damage=""):
    return dataclasses.replace(
        decoding.NOTHING,
        params=jnp.ones((), jnp.int32),
        propose=Simple(damage),
        nodes=2,
        name="simple",
    )


def test_a_simple_drafter_passes():
    check(simple())


@pytest.mark.parametrize(
    "damage, complaint",
    [
        ("batch index", "row 1 as row 0 of another batch: node 1 is token"),
        ("others", "node 1 is token"),
        ("batch size", "turn 1, after 0 steps, row 3 as row 0 alone: node 1 is token"),
    ],
)
def test_a_row_that_depends_on_the_others_is_found(damage, complaint):
    with pytest.raises(AssertionError, match=f"drafter 'simple': .*{complaint}"):
        check(simple(damage), remembers=True)


def test_wrong_nodes_are_found():
    with pytest.raises(AssertionError, match="nodes=3, but its drafts have N=2"):
        check(dataclasses.replace(simple(), nodes=3))


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
            {"propose": Simple(""), "init": zeros, "update": count_all_rows},
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
        check(dataclasses.replace(simple("state"), **changes), remembers=True)


# Jacobi decoding remembers the target's draws: its drafts follow from how a text came about.


def guess(params, batch, capacity):
    del params, capacity
    return jnp.zeros((batch, 3), jnp.int32)


def draft_guess(params, state, context, keys):
    del params, context, keys
    return types.draft(state[:, :2], trees.chain(2), vocab_size=VOCABULARY), state


def take_draws(params, state, context, draft, verdict, output):
    del params, draft, output
    later = jnp.roll(verdict.draws, -1, axis=1)
    return jnp.where(context.active[:, None], later, state)


def test_a_drafter_may_remember_more_than_its_text():
    jacobi = dataclasses.replace(
        simple(), init=guess, propose=draft_guess, update=take_draws, name="jacobi"
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
        check(dataclasses.replace(simple(), init=init))


def test_params_that_are_no_arrays_are_found():
    with pytest.raises(AssertionError, match="params hold 1, not an array"):
        check(dataclasses.replace(simple(), params=1))


def test_a_program_that_is_traced_again_is_found():
    # A number made an array without a dtype is weakly typed, and weights given later are not.
    weak = jnp.asarray(1.0)
    with pytest.raises(AssertionError, match="a step of 4 rows was traced 2 times"):
        check(dataclasses.replace(simple(), params=weak))


@pytest.mark.parametrize("prompts", [[[1, 2], [3]], [[1], [2], [3]], [[1, 2], [], [3]]])
def test_prompts_that_check_nothing_are_refused(prompts):
    with pytest.raises(ValueError, match="3 prompts of unequal lengths"):
        testing.check_drafter(simple(), tabular(0), jax.random.key(23), prompts=prompts)


def test_a_drafter_without_nodes_is_refused():
    with pytest.raises(ValueError, match="nodes=0"):
        check(decoding.NOTHING)
