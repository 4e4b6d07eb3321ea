"""The warper against an independent one with sorts."""

import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from specjax import decoding, models, sampling, trees, types

VOCAB = 40
# Untyped in chex.
all_variants: Any = chex.all_variants
# One row for each value; a greedy row and rows that switch a warper off stand among the others.
FIELDS = {
    "temperature": [0.7, 0.0, 1.0, 2.5, 2e-6, 1e6],
    "top_k": [5, 3, 0, 1, 12, 100],
    "top_p": [0.9, 0.4, 1.0, 0.55, 0.2, 0.99],
    "min_p": [0.05, 0.3, 0.0, 0.1, 1.0, 0.02],
    "repetition_penalty": [1.3, 2.0, 1.0, 0.6, 1.1, 5.0],
}
ROWS = len(FIELDS["temperature"])


@struct.dataclass
class NoRepeats:
    """A constraint: neither the node's last token (the text's last, at the root) nor `banned`."""

    banned: jax.Array

    def __call__(self, past):
        row = jnp.arange(past.tokens.shape[0])
        last = jnp.broadcast_to(past.tokens[row, past.length - 1][:, None], past.depth.shape)
        if past.path.shape[2]:
            index = jnp.maximum(past.depth - 1, 0)[:, :, None]
            drafted = jnp.take_along_axis(past.path, index, axis=2)[:, :, 0]
            last = jnp.where(past.depth > 0, drafted, last)
        tokens = jnp.arange(VOCAB, dtype=jnp.int32)[None, None]
        return (tokens != last[:, :, None]) & (tokens != self.banned)


def reference(logits, text, *, temperature, bias=None, penalty=None, banned=(), k=0, p=1.0, m=0.0):
    """The law after one text in float64, with sorts: natural logs [V]."""
    scores = np.asarray(logits, np.float64) + (0 if bias is None else np.asarray(bias, np.float64))
    if penalty is not None:
        for token in set(text):
            score = scores[token]
            scores[token] = score * penalty if score < 0 else score / penalty
    scores[list(banned)] = -np.inf
    if temperature == 0:
        law = np.full(len(scores), -np.inf)
        law[np.flatnonzero(scores == scores.max())[0]] = 0.0
        return law
    scores = scores / temperature
    if k:
        scores[scores < np.sort(scores)[::-1][: int(k)][-1]] = -np.inf
    if p < 1:
        order = np.argsort(scores)
        weights = np.exp(scores[order] - scores.max())
        removed = np.cumsum(weights / weights.sum()) <= 1 - p
        removed[-1] = False
        scores[order[removed]] = -np.inf
    weights = np.exp(scores - scores.max())
    scores[weights < m] = -np.inf
    weights = np.exp(scores - scores.max())
    with np.errstate(divide="ignore"):
        return np.log(weights / weights.sum())


def problem(seed=0, topology=(0, 1, 0)):
    """Logits [B, N+1, V], committed text of unequal lengths and a drafted tree."""
    generator = np.random.default_rng(seed)
    logits = (3 * generator.standard_normal((ROWS, len(topology) + 1, VOCAB))).astype(np.float32)
    tokens = generator.integers(0, VOCAB, (ROWS, 9)).astype(np.int32)
    length = generator.integers(1, 10, ROWS).astype(np.int32)
    drafted = generator.integers(0, VOCAB, (ROWS, len(topology))).astype(np.int32)
    past = sampling.history(
        jnp.asarray(tokens),
        jnp.asarray(length),
        trees.from_parents(topology),
        jnp.asarray(drafted),
    )
    texts = []
    for row in range(ROWS):
        texts.append([list(tokens[row, : length[row]])])
        for node, parent in enumerate(topology, start=1):
            texts[row].append([*texts[row][parent], drafted[row, node - 1]])
    return jnp.asarray(logits), past, texts


def laws(found):
    """Probabilities in float64, for comparing laws whose far tails may underflow."""
    return np.exp(np.asarray(found, np.float64))


warp = jax.jit(sampling.warp)


@pytest.mark.parametrize("given", list(itertools.product([False, True], repeat=len(FIELDS) - 1)))
@pytest.mark.parametrize("others", [False, True])
def test_warp_agrees_with_sorting(given, others):
    names = ["temperature", *itertools.compress(list(FIELDS)[1:], given)]
    generator = np.random.default_rng(1)
    bias = None
    if others:
        bias = generator.standard_normal((ROWS, VOCAB)).astype(np.float32)
        bias[:, 7] = -np.inf
    constraint = NoRepeats(jnp.int32(11)) if others else None
    logits, past, texts = problem()
    fields = {name: FIELDS[name] for name in names}
    found = warp(
        types.Sampling(**fields, logit_bias=bias, constraint=constraint),  # pyright: ignore[reportArgumentType]
        logits,
        past,
    )
    for row, node in np.ndindex(logits.shape[:2]):
        text = texts[row][node]
        wanted = reference(
            logits[row, node],
            text,
            temperature=FIELDS["temperature"][row],
            bias=None if bias is None else bias[row],
            penalty=FIELDS["repetition_penalty"][row] if "repetition_penalty" in names else None,
            banned={11, text[-1]} if others else (),
            k=FIELDS["top_k"][row] if "top_k" in names else 0,
            p=FIELDS["top_p"][row] if "top_p" in names else 1.0,
            m=FIELDS["min_p"][row] if "min_p" in names else 0.0,
        )
        np.testing.assert_allclose(laws(found[row, node]), np.exp(wanted), atol=2e-6)
        if 1e-3 < FIELDS["temperature"][row]:
            np.testing.assert_array_equal(np.isfinite(found[row, node]), np.isfinite(wanted))


@pytest.mark.parametrize("row", [row for row in range(ROWS) if FIELDS["temperature"][row]])
def test_warp_agrees_with_hugging_face(row):
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers.generation.logits_process")
    values = {name: FIELDS[name][row] for name in FIELDS}
    logits, past, texts = problem(seed=2)
    found = sampling.warp(types.Sampling(**values), logits, past)
    chain = [
        processors.RepetitionPenaltyLogitsProcessor(float(values["repetition_penalty"])),
        processors.TemperatureLogitsWarper(values["temperature"]),
    ]
    if values["top_k"]:
        chain.append(processors.TopKLogitsWarper(values["top_k"]))
    chain.append(processors.TopPLogitsWarper(float(values["top_p"])))
    chain.append(processors.MinPLogitsWarper(float(values["min_p"])))
    for node in range(logits.shape[1]):
        scores = torch.tensor(np.asarray(logits[row, node : node + 1]))
        for processor in chain:
            scores = processor(torch.tensor([[int(t) for t in texts[row][node]]]), scores)
        wanted = torch.softmax(scores.double(), dim=-1)[0].numpy()
        np.testing.assert_allclose(laws(found[row, node]), wanted, atol=2e-6)


def root_only(logits):
    """A `History` for laws that read none: one law a row."""
    batch = logits.shape[0]
    tokens = jnp.zeros((batch, 1), jnp.int32)
    return sampling.history(
        tokens, jnp.ones((batch,), jnp.int32), trees.chain(0), jnp.zeros((batch, 0), jnp.int32)
    )


def warp_row(values, **fields):
    logits = jnp.asarray(values, jnp.float32)[None, None]
    return laws(sampling.warp(types.Sampling(**fields), logits, root_only(logits))[0, 0])


def test_ties():
    np.testing.assert_array_equal(warp_row([1, 3, 3, 0]), [0, 1, 0, 0])
    np.testing.assert_allclose(
        warp_row([1, 3, 3, 0], temperature=1.0, top_k=1), [0, 0.5, 0.5, 0], atol=1e-6
    )
    np.testing.assert_allclose(
        warp_row([1, 3, 3, 0], temperature=1.0, top_p=0.1), [0, 0.5, 0.5, 0], atol=1e-6
    )
    np.testing.assert_allclose(
        warp_row([0, 0, 0, 0], temperature=1.0, top_k=3, top_p=0.5, min_p=1.0), 0.25, atol=1e-6
    )


def test_off_values_keep_everything():
    plain = warp_row([1, 3, 2, -50], temperature=1.0)
    off = warp_row(
        [1, 3, 2, -50],
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        repetition_penalty=1.0,
        logit_bias=np.zeros(4),
    )
    np.testing.assert_array_equal(plain, off)
    assert plain[3] > 0


def test_extreme_temperatures_and_logits():
    huge = [3e38, 2e38, -3e38, 1e38]
    np.testing.assert_array_equal(warp_row(huge, temperature=1e-6), [1, 0, 0, 0])
    np.testing.assert_array_equal(warp_row(huge), [1, 0, 0, 0])
    np.testing.assert_allclose(warp_row([1, 3, 2, 0], temperature=1e6), 0.25, atol=1e-6)
    np.testing.assert_array_equal(warp_row([1, 3, 2, 0], temperature=1e-6), [0, 1, 0, 0])


def test_a_forbidden_token_is_never_possible():
    bias = np.zeros(4, np.float32)
    bias[1] = -np.inf
    np.testing.assert_array_equal(warp_row([1, 9, 2, 0], logit_bias=bias), [0, 0, 1, 0])
    law = warp_row([1, 9, 2, 0], temperature=1.0, logit_bias=bias, top_k=4, top_p=0.999, min_p=0.01)
    assert law[1] == 0 and abs(law.sum() - 1) < 1e-6
    alone = np.full(4, -np.inf, np.float32)
    alone[2] = 0
    for temperature in (0.0, 0.5, 1e6):
        law = warp_row([1, 9, 2, 0], temperature=temperature, logit_bias=alone, top_p=0.5, top_k=2)
        np.testing.assert_array_equal(law, [0, 0, 1, 0])


@pytest.mark.parametrize("topology", [(), (0, 1, 2, 3), (0, 0, 1, 2, 1), (0, 0, 0)])
@pytest.mark.parametrize("is_dynamic", [False, True])
def test_each_node_sees_the_text_and_its_own_path(topology, is_dynamic):
    if is_dynamic and not topology:
        pytest.skip("a dynamic tree has nodes")
    tokens = jnp.asarray([[1, 2, 30, 30], [3, 30, 30, 30]], jnp.int32)
    length = jnp.asarray([2, 1], jnp.int32)
    drafted = np.asarray([np.arange(10, 10 + len(topology)), np.arange(20, 20 + len(topology))])
    tree = trees.from_parents(topology)
    if is_dynamic:
        tree = trees.dynamic(jnp.asarray([topology] * 2, jnp.int32), tree.max_depth + 1)
    past = sampling.history(tokens, length, tree, jnp.asarray(drafted, jnp.int32))
    logits = jnp.ones((2, len(topology) + 1, VOCAB))
    found = sampling.warp(types.Sampling(temperature=1.0, repetition_penalty=2.0), logits, past)
    lawful = sampling.warp(types.Sampling(constraint=_Seen()), logits, past)
    for row, prefix in enumerate([{1, 2}, {3}]):
        seen = [prefix]
        for node, parent in enumerate(topology, start=1):
            seen.append(seen[parent] | {int(drafted[row, node - 1])})
        for node, tokens_seen in enumerate(seen):
            law = np.asarray(found[row, node])
            assert set(np.flatnonzero(law < law.max() - 0.1)) == tokens_seen
            assert int(np.argmax(lawful[row, node])) == min(tokens_seen)


@struct.dataclass
class _Seen:
    """A constraint that allows only tokens in the text before a node."""

    def __call__(self, past):
        vocab = jnp.arange(VOCAB, dtype=jnp.int32)[None, None, None]
        place = jnp.arange(past.tokens.shape[1])[None]
        text = jnp.where(place < past.length[:, None], past.tokens, -1)[:, None, :, None]
        step = jnp.arange(past.path.shape[2])[None, None]
        path = jnp.where(step < past.depth[:, :, None], past.path, -1)[..., None]
        return jnp.any(text == vocab, axis=2) | jnp.any(path == vocab, axis=2)


def test_new_values_do_not_compile_again():
    logits, past, _ = problem()
    counted = jax.jit(chex.assert_max_traces(sampling.warp, n=1))
    for scale in (1.0, 0.5):
        fields = {name: scale * np.asarray(FIELDS[name]) for name in FIELDS if name != "top_k"}
        bias = np.full(VOCAB, scale)
        counted(
            types.Sampling(**fields, top_k=[int(scale * 8)] * ROWS, logit_bias=bias), logits, past
        )


@pytest.mark.parametrize("one", [1, 1.0, np.float64(1), np.int32(1), np.ones(())])
def test_a_number_of_any_kind_is_the_same_program(one):
    logits, past, _ = problem()
    counted = jax.jit(chex.assert_max_traces(sampling.warp, n=1))
    for temperature in (one, 0.3, jnp.asarray(0.3, jnp.float32)):
        counted(types.Sampling(temperature=temperature, top_k=one), logits, past)


@pytest.mark.parametrize(
    "field, value, shown",
    [
        ("temperature", float("nan"), "nan"),
        ("temperature", 1e-7, "1e-07"),
        ("temperature", 2e6, "2000000.0"),
        ("temperature", -0.5, "-0.5"),
        ("temperature", float("inf"), "inf"),
        ("temperature", [0.5, -2.0], "-2.0"),
        ("top_k", -1, "-1"),
        ("top_k", 2.5, "2.5"),
        ("top_k", float("inf"), "inf"),
        ("top_k", 2**40, str(2**40)),
        ("top_p", 0, "0"),
        ("top_p", 1e-7, "1e-07"),
        ("top_p", 1.5, "1.5"),
        ("top_p", float("nan"), "nan"),
        ("min_p", -0.1, "-0.1"),
        ("min_p", 1.01, "1.01"),
        ("repetition_penalty", 0.0, "0.0"),
        ("repetition_penalty", 1e-7, "1e-07"),
        ("repetition_penalty", float("inf"), "inf"),
        ("logit_bias", [0.0, float("nan")], "nan"),
        ("logit_bias", [0.0, float("inf")], "inf"),
    ],
)
def test_a_value_out_of_range_is_refused_and_shown(field, value, shown):
    with pytest.raises(ValueError, match=field) as error:
        types.Sampling(**{field: value})
    assert shown in str(error.value)


def test_a_flag_is_no_number():
    model = models.tabular_model(jnp.zeros((4,)))
    with pytest.raises(ValueError, match="temperature=True is no number"):
        decoding.autoregressive(model, [[1]], sampling=types.Sampling(temperature=True))


class Variants(chex.TestCase):
    """The same laws with and without jit, on host and device arrays."""

    @all_variants(with_pmap=False)
    def test_warp(self):
        logits, past, texts = problem(seed=3)
        bias = np.where(np.arange(VOCAB) == 7, -np.inf, 0.0)
        banned = NoRepeats(jnp.int32(11))
        for settings in (
            types.Sampling(**FIELDS),
            types.Sampling(**FIELDS, logit_bias=bias, constraint=banned),
        ):
            found = self.variant(sampling.warp)(settings, logits, past)
            wanted = sampling.warp(settings, logits, past)
            np.testing.assert_allclose(laws(found), laws(wanted), atol=2e-6)
            by_sorting = reference(
                logits[0, 2],
                texts[0][2],
                temperature=0.7,
                bias=settings.logit_bias,
                penalty=1.3,
                banned=() if settings.constraint is None else {11, texts[0][2][-1]},
                k=5,
                p=0.9,
                m=0.05,
            )
            np.testing.assert_allclose(laws(found[0, 2]), np.exp(by_sorting), atol=2e-6)

    @all_variants(with_pmap=False)
    def test_history(self):
        tokens, length = jnp.arange(8, dtype=jnp.int32).reshape(2, 4), jnp.asarray([3, 1])
        topologies = jnp.asarray([[0, 0, 1], [0, 1, 2]], jnp.int32)
        drafted = jnp.asarray([[5, 6, 7], [8, 9, 10]], jnp.int32)
        for tree in (trees.chain(3), trees.dynamic(topologies, 3)):
            given = tokens, length, tree, drafted
            found = self.variant(sampling.history)(*given)
            chex.assert_trees_all_equal(found, sampling.history(*given))
