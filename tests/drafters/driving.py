"""Draft models to test, and decodes whose verdicts the test decides."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from specjax import models, sampling, trees, types
from specjax.models import recurrent, transformer

CAPACITY = 64
ROOM = 8
VOCABULARY = 6
TEXTS = [[3, 1, 4, 1, 5], [2], [0, 5, 3, 5, 0, 2, 4, 1, 3], [1, 1]]


def build(kind, seed=0):
    key = jax.random.key(seed)
    if kind == "tabular":
        return models.tabular_model(models.random_table(key, VOCABULARY, 3, 1.5))
    if kind == "recurrent":
        return models.recurrent_model(recurrent.init_params(key, VOCABULARY, 8))
    config = models.TransformerConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_size=8,
        context_length=2 * CAPACITY,
    )
    return models.language_model(config, transformer.init_params(config, key, 2.0))


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


@functools.partial(jax.jit, static_argnames="width")
def prefill(drafter, state, text, start, count, width):
    """A chunk of `width` tokens from `start` on, of which `count` count."""
    logits = jnp.zeros((text.shape[0], width, 1))
    output = types.ModelOutput(logits, logits[:, :, None])
    return drafter.prefill(drafter.params, state, text, start, count, output)


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
        self.tokens = self.random.integers(0, VOCABULARY, (batch, CAPACITY), np.int32)
        for row, text in enumerate(texts):
            self.tokens[row, : len(text)] = text
        self.state = drafter.init(drafter.params, batch, CAPACITY + ROOM)
        self._prefill(chunk=4)

    def _prefill(self, chunk):
        text, last = jnp.asarray(self.tokens), self.length - 1
        for begin in range(0, int(last.max()), chunk):
            start = np.minimum(begin, last)
            count = np.minimum(last - start, chunk)
            self.state = prefill(
                self.drafter, self.state, text, jnp.asarray(start), jnp.asarray(count), chunk
            )
        np.testing.assert_array_equal(self.state.seen, last)

    def context(self, active=None):
        active = np.ones(len(self.length), bool) if active is None else np.asarray(active)
        return types.Context(
            jnp.asarray(self.tokens),
            jnp.asarray(self.length),
            jnp.asarray(active),
            self.settings,
            self.model,
            None,
            self.keys,
        )

    def propose(self, active=None):
        draft, self.state = propose(self.drafter, self.state, self.context(active), self.keys)
        return draft

    def commit(self, draft, count, active=None):
        """Accepts `count` drafts a row and a random token after them."""
        active = np.ones(len(self.length), bool) if active is None else np.asarray(active)
        count = np.where(active, count, 0).astype(np.int32)
        path = np.tile(np.arange(1, draft.tree.size + 1, dtype=np.int32), (len(count), 1))
        last = self.random.integers(0, VOCABULARY, len(count), np.int32)
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
            new = self.random.integers(0, VOCABULARY, more, np.int32)
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
