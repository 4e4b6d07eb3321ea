"""Exact certificates of losslessness, by enumeration through the code that decodes.

`outcome_law` gives the probability of every outcome of one verification as a product of conditional
acceptances and a residual. `certify` enumerates every acceptance flag (or every draw of the target)
through the very `resolve` that decoding uses, demands the same law, then sums over every draft the
proposal can make and holds the emitted text's law against the target's.

A *conditional law* over texts of up to D + 1 tokens is a list of D + 1 arrays: entry d is [V^d, V],
natural logs of the next token's law after each of the V^d paths of d tokens, a path's index having
its first token as the highest digit. A path whose law is −inf everywhere is a dead end: its text
ends there, and that end is an outcome like any token.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from specjax import trees, types, verification
from specjax.verification import kernel

__all__ = ["Certificate", "certify", "enumerated_law", "outcome_law", "random_law"]


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
    """

    rule: str
    nodes: int
    vocab_size: int
    dtype: str
    error: float
    total_variation: float
    walk_error: float
    expected_accepted: float

    @property
    def passed(self) -> bool:
        """Whether both errors are within 1e-12 (float64) or 1e-6 (float32)."""
        bound = 1e-12 if self.dtype == "float64" else 1e-6
        return self.error <= bound and self.walk_error <= bound


def outcome_law(
    rule: types.VerificationRule, draft: types.Draft, target_log_probs: jax.Array
) -> jax.Array:
    """P(the walk stops at this node, the next token is this one): [B, N+1, V].

    Reach times residual; differentiable in both laws. Where the target's law is a dead end nothing
    follows, and the outcomes lack what stops there.

    Args:
      rule: the rule.
      draft: the proposal.
      target_log_probs: [B, N+1, V], natural logs.
    """
    stop = _stops(rule, draft, target_log_probs)
    return stop[:, :, None] * _residuals(rule, draft, target_log_probs)


def _stops(
    rule: types.VerificationRule, draft: types.Draft, target_log_probs: jax.Array
) -> jax.Array:
    """P(the walk stops at this node): [B, N+1]."""
    accept = rule.accept(draft, target_log_probs)
    earlier = trees.earlier_siblings(draft.tree)
    chosen = accept * jnp.prod(jnp.where(earlier, 1 - accept[:, None, :], 1.0), axis=-1)
    on_path = trees.ancestors(draft.tree)[:, :, 1:]
    reach = jnp.prod(jnp.where(on_path, chosen[:, None, :], 1.0), axis=-1)
    node = jnp.arange(draft.tree.size + 1, dtype=jnp.int32)
    is_child = trees.parents(draft.tree)[:, None, :] == node[None, :, None]
    return reach * jnp.prod(jnp.where(is_child, 1 - accept[:, None, :], 1.0), axis=-1)


def enumerated_law(
    rule: types.VerificationRule, draft: types.Draft, target_log_probs: jax.Array
) -> jax.Array:
    """`outcome_law`, summed over all 2^N flags or all V^(N+1) draws through `resolve`."""
    return _enumerated(rule, draft, target_log_probs)[0]


def _enumerated(
    rule: types.VerificationRule, draft: types.Draft, target_log_probs: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The law of outcomes [B, N+1, V], and that of the stopping node [B, N+1]."""
    if rule.draw is not None:
        return _law_of_draws(draft, target_log_probs)
    accept = rule.accept(draft, target_log_probs)

    def weigh(flag):
        weight = jnp.prod(jnp.where(flag[None] > 0, accept, 1 - accept), axis=-1)
        flags = jnp.broadcast_to(flag[None] > 0, accept.shape)
        stop = kernel.resolve(draft, flags)[2]
        here = jnp.arange(draft.tree.size + 1, dtype=jnp.int32)[None] == stop[:, None]
        return jnp.where(here, weight[:, None], 0.0)

    stop = _sum_over(weigh, 2, draft.tree.size)
    return stop[:, :, None] * _residuals(rule, draft, target_log_probs), stop


def _law_of_draws(draft: types.Draft, target_log_probs: jax.Array) -> tuple[jax.Array, jax.Array]:
    batch, rows, vocab_size = target_log_probs.shape
    # A dead end draws −1 with certainty; token 0 stands in for it until the end.
    dead = jnp.max(target_log_probs, axis=-1) == -jnp.inf
    certain = jax.nn.one_hot(0, vocab_size, dtype=target_log_probs.dtype)
    probabilities = jnp.where(dead[:, :, None], certain[None, None], jnp.exp(target_log_probs))

    def weigh(draw):
        own = jnp.take_along_axis(probabilities, draw[None, :, None], axis=2)[:, :, 0]
        draws = jnp.where(dead, -1, draw[None])
        stop = kernel.resolve(draft, kernel.matches(draft, draws))[2]
        row = jnp.arange(batch, dtype=jnp.int32)
        return jnp.zeros_like(probabilities).at[row, stop, draw[stop]].set(jnp.prod(own, axis=1))

    law = _sum_over(weigh, vocab_size, rows)
    return jnp.where(dead[:, :, None], 0.0, law), jnp.sum(law, axis=2)


def _sum_over(weigh: Callable[[jax.Array], jax.Array], base: int, count: int) -> jax.Array:
    """Σ `weigh` over all numbers of `count` digits, in blocks: a long float32 sum loses digits."""
    block = base ** min(count, 4)
    numbers = jnp.asarray(_digits(base, count)).reshape(-1, block, count)
    return jnp.sum(
        jax.lax.map(lambda some: jnp.sum(jax.vmap(weigh)(some), axis=0), numbers), axis=0
    )


def _residuals(
    rule: types.VerificationRule, draft: types.Draft, target_log_probs: jax.Array
) -> jax.Array:
    batch = draft.tokens.shape[0]
    each = [
        rule.residual(draft, target_log_probs, jnp.full((batch,), node, jnp.int32))
        for node in range(draft.tree.size + 1)
    ]
    return jnp.exp(jnp.stack(each, axis=1))


def certify(
    rule: str | types.VerificationRule,
    tree: trees.Tree,
    target: Sequence[jax.Array],
    proposal: Sequence[jax.Array] | None,
    *,
    absent: Sequence[np.ndarray] | None = None,
) -> Certificate:
    """Certifies a rule on a static tree: every draft, every flag, every text.

    Args:
      rule: the rule or its name.
      tree: static, with independent siblings; N up to 6 or so, since V^N drafts are enumerated.
      target: a conditional law of D + 1 entries.
      proposal: a conditional law of at least D entries, in the same dtype; None certifies
        deterministic drafts, every one of them by itself.
      absent: bool[V^d] for d < D, whether drafting stops after that path (what a confidence stop
        may do).

    Raises:
      ValueError: a dynamic tree, laws of the wrong length, or a rule that cannot take such a draft.
    """
    rule = verification.get(rule)
    depth = tree.max_depth
    if tree.static_parents is None:
        raise ValueError("certify enumerates the drafts of a static tree, and this one is dynamic")
    if len(target) != depth + 1 or (proposal is not None and len(proposal) < depth):
        raise ValueError(
            f"a tree of depth D={depth} needs a target law of {depth + 1} entries and a "
            f"proposal of {depth}, got {len(target)} and "
            f"{None if proposal is None else len(proposal)}"
        )
    vocab_size = target[0].shape[1]
    if absent is None:
        absent = [np.zeros(vocab_size**level, bool) for level in range(depth)]
    numbers = _certify(
        rule,
        tree,
        tuple(target),
        None if proposal is None else tuple(proposal[:depth]),
        tuple(absent),
    )
    error, total_variation, walk_error, accepted = map(float, numbers)
    return Certificate(
        rule.name,
        tree.size,
        vocab_size,
        str(target[0].dtype),
        error,
        total_variation,
        walk_error,
        accepted,
    )


@functools.partial(jax.jit, static_argnames=("rule",))
def _certify(rule, tree, target, proposal, absent):
    vocab_size = target[0].shape[1]
    depths = trees.depths(tree)[0]
    drafted = jnp.asarray(_digits(vocab_size, tree.size))
    index = _path_index(tree, drafted, vocab_size)
    target_log_probs = _at_nodes(target, depths, index)
    parent = jnp.broadcast_to(trees.parents(tree), drafted.shape)
    parent_depth = jnp.asarray(trees.depths(tree))[0][parent[0]]
    stopped = _at_nodes(
        [level[:, None] for level in absent], parent_depth, jnp.take_along_axis(index, parent, 1)
    )
    log_probs = None
    weight = jnp.ones((drafted.shape[0],), target[0].dtype)
    if proposal is not None:
        # Nodes of full depth propose nothing; they repeat a law that no node names.
        padded = [
            *proposal,
            jnp.zeros((vocab_size ** len(proposal), vocab_size), proposal[0].dtype),
        ]
        log_probs = _at_nodes(padded, depths, index)
    draft = types.draft(
        drafted, tree, log_probs=log_probs, present=~stopped[:, :, 0], vocab_size=vocab_size
    )
    kernel.check(rule, draft)
    if proposal is not None:
        # An absent node was never drawn: each of its tokens stands for 1/V of the same draft.
        drawn = jnp.where(draft.present, jnp.exp(kernel.node_log_probs(draft)), 1 / vocab_size)
        weight = jnp.prod(drawn, axis=1)
    stop = _stops(rule, draft, target_log_probs)
    law = stop[:, :, None] * _residuals(rule, draft, target_log_probs)
    enumerated, enumerated_stop = _enumerated(rule, draft, target_log_probs)
    walk_error = jnp.maximum(
        jnp.max(jnp.abs(law - enumerated)), jnp.max(jnp.abs(stop - enumerated_stop))
    )
    stop = stop * weight[:, None]
    accepted = jnp.sum(stop * depths[None].astype(law.dtype)) / jnp.sum(weight)

    # Deterministic drafts are certified one by one, sampled ones as the one law they make up.
    count = drafted.shape[0]
    order = jnp.arange(count, dtype=jnp.int32)
    groups, group = (count, order) if proposal is None else (1, jnp.zeros_like(order))

    def by_text(values, text, here, width):
        """Sums the values of nodes that are `here` by draft group and text: [groups, width]."""
        here = here.reshape(1, -1, *[1] * (text.ndim - 2))
        rows = jnp.broadcast_to(group.reshape(-1, *[1] * (text.ndim - 1)), text.shape)
        total = jnp.zeros((groups, width), values.dtype)
        return total.at[rows, jnp.where(here, text, 0)].add(jnp.where(here, values, 0.0))

    law = law * weight[:, None, None]
    tokens = jnp.arange(vocab_size, dtype=jnp.int32)[None, None]
    law_of_text, wanted = jnp.zeros((groups, 1), law.dtype), jnp.ones((1, 1), law.dtype)
    gaps = []
    for level, conditional in enumerate(target):
        here, width = depths == level, vocab_size**level
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
    return jnp.max(gap), jnp.max(jnp.sum(gap, axis=1)) / 2, walk_error, accepted


def _path_index(tree: trees.Tree, drafted: jax.Array, vocab_size: int) -> jax.Array:
    """The base-V index of every node's path: int32[A, N+1]."""
    index = [jnp.zeros(drafted.shape[:1], jnp.int32)]
    assert tree.static_parents is not None
    for node, parent in enumerate(tree.static_parents):
        index.append(index[parent] * vocab_size + drafted[:, node])
    return jnp.stack(index, axis=1)


def _at_nodes(laws: Sequence[jax.Array], depths: jax.Array, index: jax.Array) -> jax.Array:
    """The entry of every node by its depth and path: [A, nodes, …]."""
    count = depths.shape[0]
    width = laws[0].shape[1]
    result = jnp.zeros((*index.shape, width), laws[0].dtype)
    for level, law in enumerate(laws):
        here = (depths == level).reshape(1, count, 1)
        result = jnp.where(here, jnp.asarray(law)[jnp.minimum(index, law.shape[0] - 1)], result)
    return result


@functools.lru_cache(maxsize=64)
def _digits(base: int, count: int) -> np.ndarray:
    """All numbers of `count` digits, one a row: int32[base^count, count]."""
    grid = np.meshgrid(*[np.arange(base, dtype=np.int32)] * count, indexing="ij")
    return (
        np.stack([axis.reshape(-1) for axis in grid], axis=1)
        if count
        else np.zeros((1, 0), np.int32)
    )


def random_law(
    key: jax.Array, vocab_size: int, depth: int, concentration: float = 1.0, dtype=jnp.float32
) -> list[jax.Array]:
    """A conditional law of `depth` entries, each row from a Dirichlet.

    Args:
      key: a typed key, consumed.
      vocab_size: V.
      depth: entries.
      concentration: of the Dirichlet; small values give sharp laws.
      dtype: of the natural logs.
    """
    keys = jax.random.split(key, depth)
    alpha = jnp.full((vocab_size,), concentration, dtype)
    return [
        jax.nn.log_softmax(
            jnp.log(
                jnp.maximum(
                    jax.random.dirichlet(keys[level], alpha, (vocab_size**level,), dtype), 1e-30
                )
            ),
            axis=-1,
        )
        for level in range(depth)
    ]
