"""Exact certificates of losslessness, by enumeration through the code that decodes.

`certify` enumerates every acceptance flag (or every draw of the target) through the very `resolve`
that decoding uses, demands the law that acceptances and residuals multiply to, then sums over every
draft the proposal can make and holds the emitted text's law against the target's. Laws are
conditional laws, as `specjax.analysis.laws` tells.
"""

import collections
import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from specjax import trees, types, verification
from specjax.analysis import laws as laws_of_texts
from specjax.analysis import outcomes
from specjax.verification import kernel

__all__ = ["Certificate", "Kind", "certify", "certify_many", "every_draft"]


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What enumeration found.

    Attributes:
      rule: its name.
      nodes: N.
      vocab_size: V.
      dtype: of the probabilities.
      error: largest |P(text) − target's P(text)| over all texts of D + 1 tokens.
      total_variation: half the sum of those differences.
      walk_error: largest difference between the product form and the enumeration of flags or draws.
      expected_accepted: mean number of accepted drafts.
      bound: what no lossless rule exceeds in the mean: the sum, over texts of up to D tokens, of
        min(P(the draft holds the text), target's P(text)). Deterministic drafts are averaged.
    """

    rule: str
    nodes: int
    vocab_size: int
    dtype: str
    error: float
    total_variation: float
    walk_error: float
    expected_accepted: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether both errors are within 1e-12 (float64) or 1e-6 (float32)."""
        bound = 1e-12 if self.dtype == "float64" else 1e-6
        return self.error <= bound and self.walk_error <= bound


def certify(
    rule: str | types.VerificationRule,
    tree: trees.Tree,
    target: Sequence[jax.Array],
    *proposals: Sequence[jax.Array],
    sources: Sequence[int] | None = None,
    siblings: str = "independent",
    absent: Sequence[np.ndarray] | None = None,
    traced: bool = False,
) -> Certificate:
    """Certifies a rule on a tree: every draft, every flag, every text.

    Args:
      rule: the rule or its name.
      tree: static; N up to 6 or so, since V^N drafts are enumerated.
      target: a conditional law of D + 1 entries.
      *proposals: conditional laws of at least D entries, in the same dtype; none certifies
        deterministic drafts, every one of them by itself.
      sources: the proposal that each node was drawn from, −1 for a deterministic node; by default
        all nodes are drawn from the only one.
      siblings: `independent`, `distinct` (beyond the law's support a node is absent) or `coupled`.
      absent: bool[V^d] for d < D, whether drafting stops after that path (what a confidence stop
        may do).
      traced: whether the rule is shown the topology as traced parents, as a dynamic tree's are.

    Raises:
      RefusedDraftError: the rule cannot take such a draft.
      ValueError: a dynamic tree, or laws or sources that do not agree with the tree.
    """
    return certify_many(
        rule,
        tree,
        [jnp.asarray(level)[None] for level in target],
        *[[jnp.asarray(level)[None] for level in proposal] for proposal in proposals],
        sources=sources,
        siblings=siblings,
        absent=absent,
        traced=traced,
    )[0]


def certify_many(
    rule: str | types.VerificationRule,
    tree: trees.Tree,
    target: Sequence[jax.Array],
    *proposals: Sequence[jax.Array],
    sources: Sequence[int] | None = None,
    siblings: str = "independent",
    absent: Sequence[np.ndarray] | None = None,
    traced: bool = False,
) -> list[Certificate]:
    """`certify` for many laws in one program: every entry of every law has a leading axis."""
    rule = verification.get(rule)
    depth = tree.max_depth
    if tree.static_parents is None:
        raise ValueError("certify enumerates the drafts of a static tree, and this one is dynamic")
    if len(target) != depth + 1 or any(len(proposal) < depth for proposal in proposals):
        raise ValueError(
            f"a tree of depth D={depth} needs a target law of {depth + 1} entries and proposals of "
            f"{depth}, got {len(target)} and {[len(proposal) for proposal in proposals]}"
        )
    if sources is None:
        if len(proposals) > 1:
            raise ValueError(f"with {len(proposals)} proposals, sources must say whose a node is")
        sources = (len(proposals) - 1,) * tree.size
    if len(sources) != tree.size or not all(-1 <= source < len(proposals) for source in sources):
        raise ValueError(
            f"sources={tuple(sources)} must name, for each of {tree.size} nodes, one of "
            f"{len(proposals)} proposals, or −1"
        )
    if siblings == "distinct" and min(sources, default=0) < 0:
        raise ValueError(
            f"sources={tuple(sources)}: distinct siblings are drawn from one law, none of them is "
            "deterministic (−1)"
        )
    if siblings == "coupled" and rule.draw is not None and rule.draw_law is None:
        raise kernel.RefusedDraftError(
            f"rule {rule.name!r} takes the target's draws for independent of the draft, and those "
            "of a coupled draft are not; certify rule='coupled'"
        )
    kind = Kind(tuple(sources), siblings)
    laws = (tuple(target), tuple(tuple(proposal[:depth]) for proposal in proposals))
    # Three programs, of which the first and the last serve every rule.
    drafts, weight, after = _every_draft(
        kind, tree, laws, None if absent is None else tuple(absent)
    )
    shown = drafts
    if traced:
        rows = jnp.broadcast_to(trees.parents(tree), drafts.tokens.shape)
        shown = dataclasses.replace(drafts, tree=trees.dynamic(rows, depth))
    stop, law, walk_error = _outcomes(rule, shown, after)
    error, variation, accepted, bound = _texts(kind, laws[0], drafts, weight, stop, law)
    numbers = jax.device_get((error, variation, walk_error, accepted, bound))
    return [
        Certificate(
            rule.name, tree.size, target[0].shape[2], str(target[0].dtype), *map(float, found)
        )
        for found in zip(*numbers, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class Kind:
    """How the nodes of a draft are drawn.

    Attributes:
      sources, siblings: as `certify` takes them.
    """

    sources: tuple[int, ...]
    siblings: str = "independent"


@functools.partial(jax.jit, static_argnames=("kind",))
def _every_draft(kind, tree, laws, absent):
    """`every_draft` for every pair of laws, one after another."""
    return jax.lax.map(lambda pair: every_draft(kind, tree, pair[0], pair[1], absent), laws)


@functools.partial(jax.jit, static_argnames=("rule",))
def _outcomes(rule, drafts, after):
    """What `verify` makes of every draft: stops, outcomes, and how the walk differs from them."""

    def one(pair):
        draft, after = pair
        kernel.check(rule, draft)
        accept, residual = kernel.judge(rule, draft, after)
        stop = outcomes.stops(draft, accept)
        law = stop[:, :, None] * outcomes.residuals(draft, residual)
        walked = law
        if rule.draw is None:
            walked_stop = outcomes.stops_of_flags(draft, accept)
        else:
            walked, walked_stop = outcomes.law_of_draws(rule, draft, after)
        walk_error = jnp.maximum(
            jnp.max(jnp.abs(law - walked)), jnp.max(jnp.abs(stop - walked_stop))
        )
        return stop, law, walk_error

    return jax.lax.map(one, (drafts, after))


@functools.partial(jax.jit, static_argnames=("kind",))
def _texts(kind, targets, drafts, weights, stops, laws):
    """Errors, total variations, means accepted and bounds, of every pair of laws: [L] each."""
    return jax.lax.map(
        lambda given: _law_of_texts(kind, *given), (targets, drafts, weights, stops, laws)
    )


def every_draft(
    kind: Kind,
    tree: trees.Tree,
    target: Sequence[jax.Array],
    proposals: Sequence[Sequence[jax.Array]],
    absent: Sequence[np.ndarray] | None = None,
) -> tuple[types.Draft, jax.Array, jax.Array]:
    """Every draft of a tree, its probability [A], and the target's law after its nodes.

    Args:
      kind: how nodes are drawn.
      tree, target, proposals, absent: as `certify` takes them.

    Returns:
      A draft of A = V^N rows; [A]; [A, N+1, V], natural logs.
    """
    assert tree.static_parents is not None
    vocab_size, dtype = target[0].shape[1], target[0].dtype
    if absent is None:
        absent = [np.zeros(vocab_size**level, bool) for level in range(tree.max_depth)]
    drafted = jnp.asarray(laws_of_texts.digits(vocab_size, tree.size))
    index = laws_of_texts.path_index(tree, drafted, vocab_size)
    depths = trees.depths(tree)[0]
    parent = jnp.broadcast_to(trees.parents(tree), drafted.shape)
    parent_depth = depths[parent[0]]
    stopped = laws_of_texts.at_nodes(
        [jnp.asarray(level)[:, None] for level in absent],
        parent_depth,
        jnp.take_along_axis(index, parent, 1),
    )
    present = ~stopped[:, :, 0]
    sources = jnp.asarray(kind.sources, jnp.int32)[None]
    log_probs = None
    if proposals:
        # Nodes of full depth propose nothing; they repeat a law that no node names.
        nothing = jnp.zeros((vocab_size**tree.max_depth, vocab_size), dtype)
        log_probs = jnp.concatenate(
            [laws_of_texts.at_nodes([*proposal, nothing], depths, index) for proposal in proposals],
            axis=1,
        )
    law = jnp.where(sources < 0, -1, sources * (tree.size + 1) + parent)
    left = jnp.ones(drafted.shape, dtype)
    if kind.siblings == "distinct":
        assert log_probs is not None
        row = jnp.arange(drafted.shape[0], dtype=jnp.int32)[:, None]
        drawn = (
            drafted[:, None, :, None] == jnp.arange(vocab_size, dtype=jnp.int32)[None, None, None]
        )
        earlier = trees.earlier_siblings(tree) & present[:, None, :]
        gone = jnp.any(earlier[:, :, :, None] & drawn, axis=2)
        left = jnp.sum(jnp.where(gone, 0.0, jnp.exp(log_probs[row, law])), axis=-1)
        present = present & (left > 0)
        # Before the division, or a gradient would be NaN.
        left = jnp.where(left > 0, left, 1.0)
        left = jnp.where(jnp.take_along_axis(gone, drafted[:, :, None], 2)[:, :, 0], jnp.inf, left)
    # Every deterministic child is a law of its own.
    laws_of = collections.defaultdict(list)
    for node, (parent_of, source) in enumerate(zip(tree.static_parents, kind.sources, strict=True)):
        laws_of[parent_of].append(source if source >= 0 else -1 - node)
    most = max((len(set(found)) for found in laws_of.values()), default=1)
    draft = types.draft(
        drafted,
        tree,
        log_probs=log_probs,
        law=law,
        present=present,
        vocab_size=vocab_size,
        siblings=kind.siblings,
        sibling_laws=most,
    )
    # A deterministic node is what it is; an absent one was never drawn: each of its tokens stands
    # for 1/V of the same draft.
    chance = jnp.exp(kernel.node_log_probs(draft)).astype(dtype) / left
    chance = jnp.where(draft.present | (sources < 0), chance, 1 / vocab_size)
    return draft, jnp.prod(chance, axis=1), laws_of_texts.at_nodes(target, depths, index)


def _law_of_texts(kind, target, draft, weight, stop, law):
    """The law of texts of D + 1 tokens, the target's own law finishing what is shorter."""
    vocab_size = target[0].shape[1]
    depths = trees.depths(draft.tree)[0]
    index = laws_of_texts.path_index(draft.tree, draft.tokens, vocab_size)
    stop = stop * weight[:, None]
    accepted = jnp.sum(stop * depths[None].astype(law.dtype)) / jnp.sum(weight)

    # Drafts that agree in their deterministic nodes make up one law; every such law is certified.
    certain = [node for node, source in enumerate(kind.sources) if source < 0]
    groups = vocab_size ** len(certain)
    group = jnp.zeros(weight.shape, jnp.int32)
    for node in certain:
        group = group * vocab_size + draft.tokens[:, node]

    def by_text(values, text, here, width):
        """Sums the values of nodes that are `here` by draft group and text: [groups, width]."""
        here = here.reshape(1, -1, *[1] * (text.ndim - 2))
        rows = jnp.broadcast_to(group.reshape(-1, *[1] * (text.ndim - 1)), text.shape)
        total = jnp.zeros((groups, width), values.dtype)
        return total.at[rows, jnp.where(here, text, 0)].add(jnp.where(here, values, 0.0))

    law = law * weight[:, None, None]
    tokens = jnp.arange(vocab_size, dtype=jnp.int32)[None, None]
    law_of_text, wanted = jnp.zeros((groups, 1), law.dtype), jnp.ones((1, 1), law.dtype)
    gaps, bound = [], jnp.zeros((), law.dtype)
    for level, conditional in enumerate(target):
        here, width = depths == level, vocab_size**level
        if level:
            held = _held(draft, here, index, width).astype(law.dtype) * weight[:, None]
            held = jnp.zeros((groups, width), law.dtype).at[group].add(held)
            bound = bound + jnp.sum(jnp.minimum(held, wanted)) / groups
        # At a dead end a text ends: one that has come this far, or a walk that stops there.
        ended = law_of_text + by_text(stop, index, here, width)
        dead = jnp.max(conditional, axis=-1) == -jnp.inf
        gaps.append(jnp.where(dead[None], jnp.abs(ended - wanted), 0.0))
        # Other texts go on by the target's law; outcomes of this length join them.
        probability = jnp.exp(conditional)[None]
        wanted = (wanted[:, :, None] * probability).reshape(1, -1)
        longer = (law_of_text[:, :, None] * probability).reshape(groups, -1)
        text = index[:, :, None] * vocab_size + tokens
        law_of_text = longer + by_text(law, text, here, width * vocab_size)
    gaps.append(jnp.abs(law_of_text - wanted))
    gap = jnp.concatenate(gaps, axis=1)
    return jnp.max(gap), jnp.max(jnp.sum(gap, axis=1)) / 2, accepted, bound


def _held(draft, here, index, width: int):
    """Which texts are paths of a draft to a present node that is `here`: bool[A, width]."""
    row = jnp.arange(index.shape[0], dtype=jnp.int32)[:, None]
    present = jnp.pad(draft.present, ((0, 0), (1, 0)), constant_values=True) & here[None]
    place = jnp.where(here[None], index, 0)
    return jnp.zeros((index.shape[0], width), bool).at[row, place].max(present)
