"""Draws of `verify` against the enumerated law of drafts and outcomes."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax import analysis, sampling, trees, types, verification
from specjax.analysis import laws, outcomes
from specjax.verification import kernel

__all__ = ["rows"]

_VOCABULARY, _BATCH = 3, 1_000_000
# Two siblings, and a child of the first: first draws, rounds, and a walk of two steps.
_TREE, _CHAIN = trees.from_parents([0, 0, 1]), trees.chain(2)


def rows(rule: types.VerificationRule, draws: int) -> Iterator[dict[str, Any]]:
    """Tests the rule on the first of a tree and a chain that it takes; nothing if it takes none."""
    for shape, tree in (("a tree of 3", _TREE), ("a chain of 2", _CHAIN)):
        siblings = "coupled" if rule.draw_law is not None else "independent"
        try:
            p_value = _p_value(rule, tree, siblings, draws)
        except verification.RefusedDraftError:
            continue
        yield {
            "rule": rule.name,
            "lossless": rule.lossless,
            "shape": shape,
            "count": draws,
            "p_value": p_value,
            # The law of outcomes is as told even where it is not the target's.
            "passed": p_value > 1e-6,
        }
        return


def _p_value(rule, tree, siblings, draws: int) -> float:
    """Pearson's test of drafts, stopping nodes and next tokens, in cells expected five times."""
    depth = tree.max_depth
    target_key, draft_key = jax.random.split(jax.random.key(11))
    target = analysis.random_law(target_key, _VOCABULARY, depth + 1, 1.0)
    proposal = analysis.random_law(draft_key, _VOCABULARY, depth, 1.0)
    law = np.asarray(_joint_law(rule, tree, siblings, target, proposal), np.float64).reshape(-1)
    counts = np.zeros(law.size)
    batches = math.ceil(draws / _BATCH)
    size = math.ceil(draws / batches)
    for batch in range(batches):
        keys = jax.random.split(jax.random.key(batch), size)
        cells = _draw(rule, tree, siblings, target, proposal, keys)
        counts += np.bincount(np.asarray(cells), minlength=law.size)
    if counts[law == 0].any():
        # What cannot happen did.
        return 0.0
    wanted = law / law.sum() * counts.sum()
    small = wanted < 5
    seen, wanted = (np.append(values[~small], values[small].sum()) for values in (counts, wanted))
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    statistic = float(np.sum((seen - wanted) ** 2 / wanted))
    freedom = (len(wanted) - 1) / 2
    return float(jax.scipy.special.gammaincc(jnp.float32(freedom), jnp.float32(statistic / 2)))


@functools.partial(jax.jit, static_argnames=("rule", "siblings"))
def _joint_law(rule, tree, siblings, target, proposal):
    """P(draft, stop, next token): [V^N, N+1, V]."""
    tokens = jnp.asarray(laws.digits(_VOCABULARY, tree.size))
    draft, after = _drafted(tree, siblings, target, proposal, tokens)
    chance = jnp.exp(jnp.sum(kernel.node_log_probs(draft), axis=1))
    law = outcomes.outcome_law(rule, draft, after)
    return chance[:, None, None] * law


def _drafted(tree, siblings, target, proposal, tokens):
    depths, index = trees.depths(tree)[0], laws.path_index(tree, tokens, _VOCABULARY)
    nothing = jnp.zeros((_VOCABULARY**tree.max_depth, _VOCABULARY))
    log_probs = laws.at_nodes([*proposal, nothing], depths, index)
    draft = types.draft(tokens, tree, log_probs=log_probs, siblings=siblings)
    return draft, laws.at_nodes(target, depths, index)


@functools.partial(jax.jit, static_argnames=("rule", "siblings"))
def _draw(rule, tree, siblings, target, proposal, keys):
    """Drafts and verifies a row for every key; the cell of `_joint_law` that it fell into."""
    batch = keys.shape[0]
    length = jnp.ones((batch,), jnp.int32)
    tokens = jnp.zeros((batch, tree.size), jnp.int32)
    depths = trees.depths(tree)[0]
    draft_keys = sampling.derive(keys, sampling.Stream.DRAFT, length)
    assert tree.static_parents is not None
    for node, parent in enumerate(tree.static_parents, start=1):
        draft, _ = _drafted(tree, siblings, target, proposal, tokens)
        law = draft.log_probs[:, parent]
        if siblings == "coupled":
            position = (length + depths[parent])[:, None]
            token = sampling.draw_target(keys, position, law[:, None])[:, 0]
        else:
            node_keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(draft_keys, node)
            token = sampling.categorical(node_keys, law)
        tokens = tokens.at[:, node - 1].set(token)
    draft, after = _drafted(tree, siblings, target, proposal, tokens)
    verdict = verification.verify(rule, keys, length, draft, after)
    last = jnp.take_along_axis(verdict.path, jnp.maximum(verdict.count - 1, 0)[:, None], axis=1)
    stop = jnp.where(verdict.count > 0, last[:, 0], 0)
    cell = jnp.zeros((batch,), jnp.int32)
    for node in range(tree.size):
        cell = cell * _VOCABULARY + tokens[:, node]
    return (cell * (tree.size + 1) + stop) * _VOCABULARY + verdict.next_token
