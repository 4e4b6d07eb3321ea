"""What the loop owes a drafter: features, outputs and draws, against passes over whole texts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax import decoding, models, sampling, trees, types
from tests.drafters import recording

VOCABULARY, CAPACITY, TEMPERATURE = 7, 64, 0.9
CONFIG = models.TransformerConfig(VOCABULARY, 16, 24, 2, 2, 1, 8, 256)
TARGET = models.language_model(CONFIG, models.init_params(CONFIG, jax.random.key(1), 2.0))
TAPS = (0, CONFIG.num_layers)
PROMPTS = [[1, 2, 3, 1, 2], [4], [0, 3, 0, 3, 0, 1, 5, 2, 2], [2, 2, 1]]
SECOND = [[1, 0, 3], [], [2], [5, 5, 4, 1, 0, 2]]
LIMITS = ([14, 19, 9, 24], [11, 13, 16, 8])
KEYS = jax.random.split(jax.random.key(2), len(PROMPTS))
TOLERANCE = 2e-4


# Trees of five nodes with a path on which the right tokens are drafted, not of first siblings only.
SHAPES = {
    "static tree": [((0, 0, 2, 2, 4), (2, 4, 5))],
    "dynamic trees": [
        ((0, 0, 2, 2, 4), (2, 4, 5)),
        ((0, 1, 1, 3, 0), (1, 3, 4)),
        ((0, 1, 2, 0, 4), (1, 2, 3)),
    ],
    "chain": [((0, 1, 2), (1, 2, 3))],
    "chain, absent every other step": [((0, 1, 2), (1, 2, 3))],
}
DEPTH = 3


def topology(kind, batch):
    shapes = SHAPES[kind]
    if len(shapes) == 1:
        return trees.from_parents(shapes[0][0])
    rows = [shapes[row % len(shapes)][0] for row in range(batch)]
    return trees.dynamic(jnp.asarray(rows, jnp.int32), DEPTH)


def wish(length, row):
    """How many right tokens are drafted: none, some or all, unequally among rows."""
    return (length * 7 // 3 + row) % (DEPTH + 1)


@dataclasses.dataclass(frozen=True)
class Propose:
    """Drafts what the text will be, from params int32[B, S], down to a depth; then something else.

    The other nodes are wrong, each by another token.
    """

    kind: str

    def __call__(self, params, state, context, keys):
        del keys
        batch = context.length.shape[0]
        row = jnp.arange(batch, dtype=jnp.int32)
        shapes = SHAPES[self.kind]
        size = len(shapes[0][0])
        tree = topology(self.kind, batch)
        right_path = np.zeros((len(shapes), size), bool)
        for shape, (_, path) in enumerate(shapes):
            right_path[shape, np.asarray(path) - 1] = True
        on_path = jnp.asarray(right_path)[row % len(shapes)]
        node = jnp.arange(1, size + 1, dtype=jnp.int32)[None]
        depth = jnp.broadcast_to(trees.depths(tree)[:, 1:], (batch, size))
        place = jnp.minimum(context.length[:, None] + depth - 1, params.shape[1] - 1)
        right = jnp.take_along_axis(params, place, axis=1)
        is_right = on_path & (depth <= wish(context.length, row)[:, None])
        tokens = jnp.where(is_right, right, (right + 1 + node % (VOCABULARY - 1)) % VOCABULARY)
        present = jnp.ones((batch, size), bool)
        if "absent" in self.kind:
            present = present & (state.steps % 2 == 0)
        return types.draft(tokens, tree, present=present, vocab_size=VOCABULARY), state


def options(turn, **more):
    more = {"keys": KEYS, "max_new_tokens": LIMITS[turn], "chunk": 4, **more}
    return {"sampling": types.Sampling(temperature=TEMPERATURE), "eos": ends(), **more}


@functools.cache
def ends():
    """Ends of sequence that some rows run into: tokens from the middle of their plain texts."""
    free = decoding.autoregressive(
        TARGET,
        PROMPTS,
        keys=KEYS,
        max_new_tokens=LIMITS[0],
        sampling=types.Sampling(temperature=TEMPERATURE),
        eos=(),
    )
    return [(), (free.new_tokens[1][9],), (), (free.new_tokens[3][6],)]


@functools.cache
def plain():
    """The plain texts of two turns, int32[B, S], and their lengths after each."""
    first = decoding.autoregressive(TARGET, PROMPTS, **options(0, capacity=CAPACITY))
    length = np.asarray(first.length)
    second = decoding.autoregressive(TARGET, SECOND, **options(1), state=first.state)
    return second.tokens, [length, np.asarray(second.length)]


@dataclasses.dataclass
class Moment:
    """A state, and the step that led to it from texts of lengths `before`, if one did."""

    turn: int
    state: decoding.DecodeState
    before: np.ndarray
    info: decoding.StepInfo | None


@functools.cache
def history(kind):
    """Every state of two turns under `match`, copied before it is consumed."""
    oracle, _ = plain()
    size = len(SHAPES[kind][0][0])
    drafter = recording.recorder(TARGET, Propose(kind), size, DEPTH, TAPS, oracle)
    step = jax.jit(decoding.step, static_argnames="rule")
    moments, state = [], None
    for turn, prompts in enumerate((PROMPTS, SECOND)):
        begin = {"capacity": CAPACITY} if state is None else {"state": state}
        request, state = decoding.init(TARGET, drafter, prompts, **options(turn, **begin))
        moments.append(Moment(turn, jax.tree.map(jnp.copy, state), np.asarray(state.length), None))
        while np.any(np.asarray(state.finish) == decoding.FinishReason.RUNNING):
            before = np.asarray(state.length)
            state, info = step(TARGET, drafter, request, state, rule="match")
            moments.append(Moment(turn, jax.tree.map(jnp.copy, state), before, info))
    return moments


@jax.jit
def whole(texts):
    """Logits and features of whole texts[M, S], each from one pass over an empty cache."""
    output, _ = TARGET.apply(TARGET.params, texts, TARGET.init_cache(*texts.shape), None, TAPS)
    return output


def at_nodes(state, before, tokens, tree):
    """The output at root and nodes, each from a pass over the text and its path alone."""
    batch, size = tokens.shape
    texts = np.repeat(np.asarray(state.tokens)[:, None], size + 1, axis=1)
    depths = np.broadcast_to(np.asarray(trees.depths(tree)), (batch, size + 1))
    paths = np.broadcast_to(np.asarray(trees.paths(tree)), (batch, size + 1, DEPTH))
    for row in range(batch):
        for node in range(size + 1):
            path = paths[row, node, : depths[row, node]]
            end = before[row] + len(path)
            texts[row, node, before[row] : end] = np.asarray(tokens)[row, path - 1]
    output = whole(jnp.asarray(texts.reshape(batch * (size + 1), -1)))
    place = (before[:, None] + depths - 1).reshape(-1)
    return jax.tree.map(
        lambda leaf: np.asarray(leaf)[np.arange(len(place)), place].reshape(
            batch, size + 1, *leaf.shape[2:]
        ),
        output,
    )


def assert_close(found, wanted):
    np.testing.assert_allclose(found, wanted, atol=TOLERANCE)


@pytest.mark.parametrize("kind", SHAPES)
def test_what_is_heard_of_committed_tokens_is_a_whole_texts(kind):
    """Through prefills and updates: after every step each token but the last has been heard of."""
    for moment in history(kind):
        output = whole(moment.state.tokens)
        memory = moment.state.drafter
        for row, length in enumerate(np.asarray(moment.state.length)):
            known = slice(0, length - 1)
            assert_close(memory.features[row, known], output.features[row, known])
            assert_close(memory.logits[row, known], output.logits[row, known])


@pytest.mark.parametrize("kind", ["chain", "static tree", "dynamic trees"])
def test_update_hears_the_output_at_every_node(kind):
    """Of accepted and rejected nodes alike."""
    for moment in history(kind):
        if moment.info is None:
            continue
        last = moment.state.drafter.last
        wanted = at_nodes(moment.state, moment.before, last.tokens, topology(kind, len(PROMPTS)))
        for row in np.flatnonzero(np.asarray(last.active)):
            assert_close(last.output.logits[row], wanted.logits[row])
            assert_close(last.output.features[row], wanted.features[row])


@pytest.mark.parametrize("kind", SHAPES)
def test_the_verdict_is_that_of_the_text(kind):
    """Its path and next token are what the text got, cut where the text ended."""
    oracle, lengths = plain()
    for moment in history(kind):
        state = moment.state
        if moment.info is None:
            continue
        last, emitted = state.drafter.last, np.asarray(moment.info.emitted)
        np.testing.assert_array_equal(last.active, emitted > 0)
        np.testing.assert_array_equal(last.length, state.length)
        for row in np.flatnonzero(emitted):
            count = int(last.verdict.count[row])
            assert count + 1 == emitted[row]
            path = np.asarray(last.verdict.path[row, :count])
            told = [*np.asarray(last.tokens)[row, path - 1], int(last.verdict.next_token[row])]
            new = slice(moment.before[row], moment.before[row] + emitted[row])
            assert told == np.asarray(state.tokens)[row, new].tolist()
    for turn in range(2):
        state = [moment.state for moment in history(kind) if moment.turn == turn][-1]
        np.testing.assert_array_equal(state.length, lengths[turn])
        for row, length in enumerate(lengths[turn]):
            np.testing.assert_array_equal(state.tokens[row, :length], oracle[row, :length])


@pytest.mark.parametrize("kind", ["chain", "static tree", "dynamic trees"])
def test_the_history_has_every_kind_of_step(kind):
    """No, partial and full acceptance, unequal rows, ends inside a block, a row that rests."""
    accepted, unequal, cut, rested = set(), False, set(), False
    for moment in history(kind):
        if moment.info is None:
            continue
        emitted, active = np.asarray(moment.info.emitted), np.asarray(moment.info.active)
        count = np.where(active, emitted - 1, -1)
        accepted |= set(count.tolist())
        unequal |= len(set(count[active].tolist())) > 2
        rested |= bool(np.any(~active) and np.any(active))
        wanted = wish(moment.before, np.arange(len(PROMPTS))) + 1
        ended = active & (emitted < wanted)
        cut |= {decoding.FinishReason(int(reason)) for reason in moment.state.finish[ended]}
    assert accepted >= set(range(DEPTH + 1))
    assert unequal and rested
    assert cut >= {decoding.FinishReason.EOS, decoding.FinishReason.LENGTH}


# Passengers.


PASSENGERS = (0, 1, 0, 3, 4, 3)


@dataclasses.dataclass(frozen=True)
class Passengers:
    """Nodes that ride along; with `drafts` the first two are a chain to be verified."""

    drafts: bool

    def __call__(self, params, state, context, keys):
        del params, keys
        tree = trees.from_parents(PASSENGERS)
        node = jnp.arange(1, tree.size + 1, dtype=jnp.int32)[None]
        last = jnp.take_along_axis(context.tokens, context.length[:, None] - 1, axis=1)
        tokens = (last * 3 + node) % VOCABULARY
        present = jnp.broadcast_to((node <= 2) & self.drafts, tokens.shape)
        draft = types.draft(tokens, tree, present=present, vocab_size=VOCABULARY, passengers=True)
        return draft, state


@pytest.mark.parametrize("drafts", [False, True], ids=["alone", "beside drafts"])
def test_passengers_come_back_with_the_targets_draws(drafts):
    drafter = recording.recorder(TARGET, Passengers(drafts), len(PASSENGERS), DEPTH, TAPS)
    tree = trees.from_parents(PASSENGERS)
    oracle, lengths = plain()
    request, state = decoding.init(TARGET, drafter, PROMPTS, **options(0, capacity=CAPACITY))
    step = jax.jit(decoding.step, static_argnames="rule")
    steps = 0
    while np.any(np.asarray(state.finish) == decoding.FinishReason.RUNNING):
        before = np.asarray(state.length)
        state, info = step(TARGET, drafter, request, state, rule="match")
        steps += 1
        last = state.drafter.last
        wanted = at_nodes(state, before, last.tokens, tree)
        laws = jax.nn.log_softmax(jnp.asarray(wanted.logits) / TEMPERATURE)
        position = jnp.asarray(before)[:, None] + trees.depths(tree)
        draws = sampling.draw_target(request.keys, position, laws)
        for row in np.flatnonzero(np.asarray(info.active)):
            assert_close(last.output.logits[row], wanted.logits[row])
            assert_close(last.output.features[row], wanted.features[row])
            np.testing.assert_array_equal(last.verdict.draws[row], draws[row])
        assert drafts or np.all(np.asarray(info.emitted) <= 1)
        assert np.all(np.asarray(info.drafted) == np.where(info.active, 2 * drafts, 0))
    np.testing.assert_array_equal(state.length, lengths[0])
    for row, length in enumerate(lengths[0]):
        np.testing.assert_array_equal(state.tokens[row, :length], oracle[row, :length])
    longest = int(np.max(lengths[0] - [len(prompt) for prompt in PROMPTS]))
    assert steps < longest if drafts else steps == longest
