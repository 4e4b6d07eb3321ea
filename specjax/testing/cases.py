"""Drafts of every kind with a target's laws, all random: what a verification rule may be given."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from specjax import trees, types

__all__ = ["GENERIC", "Case", "every_kind"]

# A row whose laws differ, whose tokens were drawn from them, and that is all present.
GENERIC = 2


@dataclasses.dataclass(frozen=True)
class Case:
    """A kind of draft.

    Attributes:
      name: for complaints.
      draft: B rows.
      target: [B, N+1, V], the target's laws, natural logs.
      topology: the static tree of which `analysis.certify` can enumerate such drafts.
      sources: as `certify` takes them; −1 for a deterministic node, otherwise 0.
    """

    name: str
    draft: types.Draft
    target: jax.Array
    topology: trees.Tree
    sources: tuple[int, ...]


def every_kind(
    random: np.random.Generator, given: Sequence[trees.Tree], vocab_size: int, batch: int
) -> Iterator[Case]:
    """Drafts of every kind on these static trees and on dynamic ones of their sizes.

    By its number modulo 4 a row has p = q (0), p = q but for rounding (1), laws that differ (2) or
    a one-hot p (3). Tokens are drawn from q, save in rows 6 modulo 8, whose tokens may have
    probability 0. Odd rows lack some nodes.
    """
    for tree in given:
        name = f"a chain of {tree.size}" if tree.is_chain else f"tree {tree.static_parents}"
        kinds = ["sampled", "deterministic", "partly deterministic"]
        for kind in [*kinds, "coupled" if tree.is_chain else "distinct"]:
            drafted = f"{kind} drafts on {name}"
            yield _case(random, drafted, kind, tree, tree, vocab_size, batch)
        if not tree.is_chain:
            rows = np.tile(np.asarray(tree.static_parents, np.int32), (batch, 1))
            # Every other row is a chain, as far as the depth allows.
            rows[1::2] = np.minimum(np.arange(tree.size), tree.max_depth - 1)
            traced = trees.dynamic(jnp.asarray(rows), tree.max_depth)
            name = f"sampled drafts on dynamic trees of {tree.size}"
            yield _case(random, name, "sampled", traced, tree, vocab_size, batch)


def _case(random, name, kind, tree, topology, vocab_size: int, batch: int) -> Case:
    size = tree.size
    target, proposal = (_laws(random, (batch, size + 1, vocab_size)) for _ in range(2))
    rows = np.arange(batch)
    target[rows % 4 == 3] = np.where(target.max(-1, keepdims=True) == target, 0, -np.inf)[
        rows % 4 == 3
    ]
    proposal[rows % 4 == 0] = target[rows % 4 == 0]
    near = target + 1e-6 * random.standard_normal(target.shape)
    proposal[rows % 4 == 1] = _normalised(near)[rows % 4 == 1]
    parents = np.broadcast_to(np.asarray(trees.parents(tree)), (batch, size))
    present = (random.random((batch, size)) < 0.8) | (rows % 2 == 0)[:, None]
    tokens = np.zeros((batch, size), np.int32)
    for row in rows:
        for node in range(size):
            law = np.exp(proposal[row, parents[row, node]].astype(np.float64))
            if kind == "distinct":
                earlier = (parents[row, :node] == parents[row, node]) & present[row, :node]
                law[tokens[row, :node][earlier]] = 0
                present[row, node] &= law.sum() > 0
            if row % 8 == 6 and kind != "distinct" or law.sum() == 0:
                law[:] = 1
            tokens[row, node] = random.choice(vocab_size, p=law / law.sum())
    sources = np.zeros(size, int)
    if kind == "partly deterministic":
        sources[::2] = -1
    elif kind == "deterministic":
        sources[:] = -1
    law = np.where(sources < 0, -1, parents)
    is_drawn = kind != "deterministic"
    draft = types.draft(
        jnp.asarray(tokens),
        tree,
        log_probs=jnp.asarray(proposal) if is_drawn else None,
        law=jnp.asarray(law) if is_drawn else None,
        present=jnp.asarray(present),
        vocab_size=vocab_size,
        siblings=kind if kind in ("distinct", "coupled") else "independent",
        sibling_laws=_laws_of_siblings(topology, sources),
    )
    return Case(name, draft, jnp.asarray(target), topology, tuple(sources.tolist()))


def _laws_of_siblings(topology: trees.Tree, sources: np.ndarray) -> int:
    """The most laws among the children of one node; every deterministic child has its own."""
    assert topology.static_parents is not None
    parents = np.asarray(topology.static_parents)
    counts = [
        np.sum(sources[parents == parent] < 0) + np.any(sources[parents == parent] >= 0)
        for parent in set(topology.static_parents)
    ]
    return int(max(counts))


def _laws(random, shape) -> np.ndarray:
    """Random laws, natural logs, in which three tokens of ten are impossible."""
    logits = 2 * random.standard_normal(shape)
    possible = random.random(shape) < 0.7
    possible |= logits == logits.max(axis=-1, keepdims=True)
    return _normalised(np.where(possible, logits, -np.inf))


def _normalised(logits: np.ndarray) -> np.ndarray:
    highest = logits.max(axis=-1, keepdims=True)
    total = np.log(np.exp(logits - highest).sum(axis=-1, keepdims=True))
    return (logits - highest - total).astype(np.float32)
