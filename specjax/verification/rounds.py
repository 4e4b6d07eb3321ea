"""Rejecting the children of a node one after another: what every rule on sampled trees shares.

A node v is entered with a weight a and holds the target's law p. Its children are taken in the
order in which they were drawn, each from a law q_j. What is left before child j is

    left_j(y) = max(a·p(y) − Σ_{i<j} c_i·q_i(y), 0),   0 for the tokens of earlier children,
    c_j = Σ_y left_j(y) + 1 − a,

and the child's own weight is min(1, left_j(x) / (c_j·q_j(x))). With a = 1 this is recursive
rejection, p ← norm(max(p − q, 0)) in every round (SpecInfer, Miao et al. 2024, arXiv 2305.09781;
Sequoia, Chen et al. 2024, arXiv 2402.12374, for siblings drawn without replacement, where q_j is q
without the earlier tokens, renormalised); with the weight handed down it is traversal verification.
The law that is left is never written down: a round is one sum over the vocabulary, and a node keeps
a coefficient for each law that its children were drawn from.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from specjax import trees, types
from specjax.verification import kernel

__all__ = ["Rounds", "reject", "remaining"]


@struct.dataclass
class Rounds:
    """What the rounds left; N nodes, and W laws at the most among the children of one parent.

    Attributes:
      weight: [B, N+1], a of every node; 1 throughout unless it is handed down.
      accept: [B, N], min(1, left(x)/(c·q(x))); 0 for an absent node.
      laws: int32[B, N+1, W], rows of the draft's `log_probs` that a node's children were drawn
        from; −1 where there are fewer.
      taken: [B, N+1, W], the sum of c over the children of each law.
      total: [B, N+1], the sum of what is left, after the last child for which anyone asks.
      mass: [B, N+1], of the law of distinct siblings, what the children drawn so far left.
      tried: bool[B, N], the present nodes for which a law had mass left. Of a distinct sibling
        beyond it nothing can be said, and by what came before it it is as good as absent.
    """

    weight: jax.Array
    accept: jax.Array
    laws: jax.Array
    taken: jax.Array
    total: jax.Array
    mass: jax.Array
    tried: jax.Array


def reject(draft: types.Draft, target_log_probs: jax.Array, hand_down: bool = False) -> Rounds:
    """Takes all children of all nodes as if each were rejected.

    Nodes that do not wait for each other go together: in a static tree all first siblings, then all
    second ones … (by depth too when weights are handed down); in a dynamic tree one by one.

    Args:
      draft: a sampled tree; single nodes may be deterministic.
      target_log_probs: [B, N+1, V].
      hand_down: whether a child's weight is its acceptance; otherwise all weights are 1.
    """
    batch, rows, _ = target_log_probs.shape
    dtype = target_log_probs.dtype
    size = rows - 1
    ones, width = jnp.ones((batch, rows), dtype), draft.sibling_laws
    state = Rounds(
        weight=ones,
        accept=jnp.zeros((batch, size), dtype),
        laws=jnp.full((batch, rows, width), -1, jnp.int32),
        taken=jnp.zeros((batch, rows, width), dtype),
        total=ones,
        mass=ones,
        tried=jnp.zeros((batch, size), bool),
    )
    if size == 0:
        return state
    draft, target_log_probs = jax.tree.map(jnp.asarray, (draft, target_log_probs))
    topology = draft.tree.static_parents
    if topology is not None:
        for nodes in _stages(topology, hand_down):
            asked = _asked(topology, nodes, hand_down)
            state = _round(draft, target_log_probs, state, nodes[~asked], hand_down, False)
            state = _round(draft, target_log_probs, state, nodes[asked], hand_down, True)
        return state

    def one(state, node):
        return _round(draft, target_log_probs, state, node[None], hand_down, True), None

    return jax.lax.scan(one, state, jnp.arange(1, size + 1, dtype=jnp.int32))[0]


def _stages(topology: tuple[int, ...], hand_down: bool) -> list[np.ndarray]:
    """Nodes that can be taken together: after their earlier siblings, and parents if need be."""
    stage = [0]
    last: dict[int, int] = {}
    for node, parent in enumerate(topology, start=1):
        stage.append(1 + max(last.get(parent, 0), stage[parent] if hand_down else 0))
        last[parent] = stage[node]
    return [np.flatnonzero(np.asarray(stage) == level) for level in range(1, max(stage) + 1)]


def _asked(topology: tuple[int, ...], nodes: np.ndarray, hand_down: bool) -> np.ndarray:
    """Whether anyone asks for what is left after a node: a later sibling, or its parent's end."""
    return np.asarray(
        [
            topology[node - 1] in topology[node:] or (hand_down and topology[node - 1] > 0)
            for node in nodes
        ],
        bool,
    )


def _round(draft, target_log_probs, state, nodes, hand_down: bool, asked: bool) -> Rounds:
    """Takes nodes int32[n] of different parents; sums what they leave only if `asked`."""
    if nodes.shape[0] == 0:
        return state
    batch = draft.tokens.shape[0]
    row = jnp.arange(batch, dtype=jnp.int32)[:, None]
    index = nodes - 1
    parent = trees.parents(draft.tree)[:, index]
    token, law, present = (array[:, index] for array in (draft.tokens, draft.law, draft.present))
    weight, total, mass = (array[row, parent] for array in (state.weight, state.total, state.mass))
    laws, taken = state.laws[row, parent], state.taken[row, parent]
    present = present & (mass > 0)
    before = trees.earlier_siblings(draft.tree)[:, index] & draft.present[:, None, :]
    repeated = jnp.any(before & (draft.tokens[:, None, :] == token[:, :, None]), axis=-1)

    left = weight * jnp.exp(target_log_probs[row, parent, token])
    drawn = jnp.where(law < 0, 1.0, _probability(draft, row, law, token))
    for slot in range(draft.sibling_laws):
        left = left - taken[:, :, slot] * _probability(draft, row, laws[:, :, slot], token)
    left = jnp.where(repeated, 0.0, jnp.maximum(left, 0.0))
    cost = total + (1 - weight)
    price = jnp.where(present, cost / jnp.where(present, mass, 1.0), 0.0)
    # The chance of the token among those not drawn before, times the cost of a round.
    offered = price * drawn
    possible = present & (left > 0) & (offered > 0)
    accept = jnp.where(possible, jnp.minimum(left / jnp.where(possible, offered, 1.0), 1.0), 0.0)

    # The slot of this law: the one that holds it, or else the first free one.
    holds = (laws == law[:, :, None]) | (laws < 0)
    slot = jnp.argmax(holds, axis=-1).astype(jnp.int32)
    mine = jnp.arange(draft.sibling_laws, dtype=jnp.int32)[None, None] == slot[:, :, None]
    mine = mine & (law >= 0)[:, :, None]
    laws = jnp.where(mine, law[:, :, None], laws)
    taken = taken + jnp.where(mine, price[:, :, None], 0.0)
    state = dataclasses.replace(
        state,
        accept=state.accept.at[:, index].set(accept),
        laws=state.laws.at[row, parent].set(laws),
        taken=state.taken.at[row, parent].set(taken),
        tried=state.tried.at[:, index].set(present),
    )
    if hand_down:
        weights = jnp.broadcast_to(jnp.asarray(nodes, jnp.int32)[None], (batch, nodes.shape[0]))
        state = dataclasses.replace(
            state,
            weight=state.weight.at[row, weights].set(accept),
            total=state.total.at[row, weights].set(accept),
        )
    if not asked:
        return state
    gone = _drawn(draft, nodes, before)
    left, rest = _sums(draft, target_log_probs, row, parent, weight, laws, taken, gone)
    return dataclasses.replace(
        state,
        total=state.total.at[row, parent].set(jnp.where(present, left, total)),
        mass=state.mass.at[row, parent].set(jnp.where(present, rest, mass)),
    )


def _drawn(draft, nodes, before):
    """Tokens of the nodes int32[n] and of their earlier siblings: int32[B, n, M], −1 for fewer."""
    place = jnp.arange(draft.tree.size, dtype=jnp.int32)[None, None]
    drawn = before | (jnp.asarray(nodes, jnp.int32)[None, :, None] - 1 == place)
    tokens = jnp.where(drawn & draft.present[:, None, :], draft.tokens[:, None, :], -1)
    if draft.tree.static_parents is None:
        return tokens
    # Few of all nodes are siblings, and which, is known.
    parent = np.asarray(draft.tree.static_parents)
    siblings = [np.flatnonzero(parent[:node] == parent[node - 1]) for node in nodes]
    most = max(map(len, siblings))
    chosen = np.asarray([np.resize(some, most) for some in siblings])
    return jnp.take_along_axis(tokens, jnp.asarray(chosen)[None], axis=2)


def _sums(draft, target_log_probs, row, parent, weight, laws, taken, gone):
    """Σ left and, of distinct siblings, Σ q, both without the tokens that are gone: [B, n] each.

    Independent siblings are all drawn from the whole law: 1.

    Both are one pass over the laws of the parents; nothing of their size is kept.
    """
    vocab_size = target_log_probs.shape[2]
    vocabulary = jnp.arange(vocab_size, dtype=jnp.int32)

    def sums(given):
        row, parent, weight, laws, taken, gone = given
        here = jnp.all(vocabulary[None] != gone[:, None], axis=0)
        left, drawn = weight * jnp.exp(target_log_probs[row, parent]), jnp.zeros((), weight.dtype)
        for slot in range(draft.sibling_laws):
            drawn = jnp.exp(draft.log_probs[row, laws[slot]])
            left = left - taken[slot] * drawn
        total = jnp.sum(jnp.where(here, jnp.maximum(left, 0.0), 0.0))
        if draft.siblings != "distinct":
            return total, jnp.ones_like(total)
        return total, jnp.sum(jnp.where(here, drawn, 0.0))

    given = row, parent, weight, jnp.maximum(laws, 0), taken, gone
    return kernel.sums(sums, given, vocab_size)


def _probability(draft, row, law, token):
    """q(token) under a row of the laws: [B, n]; 0 where there is no such law."""
    log_prob = draft.log_probs[row, jnp.maximum(law, 0), token]
    return jnp.where(law < 0, 0.0, jnp.exp(log_prob))


def remaining(
    draft: types.Draft, target_log_probs: jax.Array, node: jax.Array, state: Rounds
) -> jax.Array:
    """The law left at `node` when all its children are rejected, p where it has none: log [B, V].

    Args:
      draft: the proposal.
      target_log_probs: [B, N+1, V].
      node: int32[B].
      state: the rounds.
    """
    draft, target_log_probs = jax.tree.map(jnp.asarray, (draft, target_log_probs))
    row = jnp.arange(node.shape[0], dtype=jnp.int32)
    law = target_log_probs[row, node]
    children = kernel.children(draft, node) & state.tried
    left = state.weight[row, node][:, None] * jnp.exp(law)
    for slot in range(draft.sibling_laws):
        drawn = draft.log_probs[row, jnp.maximum(state.laws[row, node, slot], 0)]
        left = left - state.taken[row, node, slot][:, None] * jnp.exp(drawn)
    gone = jnp.where(children, draft.tokens, law.shape[1])
    left = jnp.maximum(left, 0.0).at[row[:, None], gone].set(0.0, mode="drop")
    return kernel.normalised(left, law, jnp.any(children, axis=-1))
