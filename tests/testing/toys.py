"""Small models and drafters, sound ones and damaged ones, for the tests of the suite."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from specjax import decoding, models, sampling, trees, types
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
            "two laws": {
                "tree": tree([0, 0], 1),
                "law": jnp.broadcast_to(jnp.arange(2, dtype=jnp.int32), draft.law.shape),
            },
            "twins": {
                "siblings": "distinct",
                "tree": tree([0, 0], 1),
                "law": jnp.zeros_like(draft.law),
                "tokens": jnp.broadcast_to(draft.tokens[:, :1], draft.tokens.shape),
            },
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
        if self.damage == "active rows":
            offset = offset + jnp.sum(context.active)
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
