"""What can be said of a draft on the host, and of many drafts of one text: complaints, or None.

Leaves are numpy's (`jax.device_get`). A complaint names the row, the node and the values.
"""

import collections

import numpy as np

from specjax import trees, types
from specjax.testing import chance

__all__ = ["difference", "fault", "hidden_choice", "miscalibration", "repetition"]


def fault(draft: types.Draft, vocab_size: int, tolerance: float) -> str | None:
    """What is wrong with a draft by itself: forms, ranges, topology, laws.

    Args:
      draft: B rows of N nodes.
      vocab_size: V of the target.
      tolerance: how far the mass of a law may be from 1.
    """
    batch, size = draft.tokens.shape
    laws = draft.log_probs.shape[1]
    wanted = {"tokens": np.int32, "present": np.bool_, "law": np.int32}
    for name, dtype in wanted.items():
        array = getattr(draft, name)
        if array.shape != (batch, size) or array.dtype != dtype:
            return (
                f"{name} are {array.dtype}{list(array.shape)}, not "
                f"{np.dtype(dtype).name}{[batch, size]}"
            )
    if draft.log_probs.shape != (batch, laws, vocab_size):
        return f"log_probs have shape {draft.log_probs.shape}, not [B, R, V] with V={vocab_size}"
    if draft.siblings not in ("independent", "distinct", "coupled"):
        return f"siblings={draft.siblings!r} is unknown"
    parents = _parents(draft)
    for row in range(batch):
        depth = [0]
        for node in range(1, size + 1):
            parent = int(parents[row, node - 1])
            where = f"row {row}, node {node}"
            if not 0 <= parent < node:
                return f"{where}: the parent is {parent}, not in 0…{node - 1}"
            depth.append(depth[parent] + 1)
            if depth[-1] > draft.tree.max_depth:
                return f"{where}: depth {depth[-1]}, and the tree's is {draft.tree.max_depth}"
            if not draft.present[row, node - 1]:
                continue
            if parent and not draft.present[row, parent - 1]:
                return f"{where} is present, and its parent {parent} is not"
            complaint = _law_fault(draft, row, node, tolerance)
            if complaint is not None:
                return f"{where}: {complaint}"
        complaint = _sibling_fault(draft, row)
        if complaint is not None:
            return f"row {row}, {complaint}"
    return None


def _sibling_fault(draft: types.Draft, row: int) -> str | None:
    """Whether the children of a node were drawn from more laws than the draft says."""
    if draft.is_deterministic:
        return None
    for parent in range(draft.tokens.shape[1] + 1):
        children = (_parents(draft)[row] == parent) & draft.present[row]
        laws = draft.law[row][children]
        certain = int(np.sum(laws < 0))
        count = len(np.unique(laws[laws >= 0])) + certain
        if count > draft.sibling_laws:
            return (
                f"children of node {parent}: drawn from {count} laws ({certain} of them one-hot), "
                f"and sibling_laws={draft.sibling_laws}"
            )
        if draft.siblings == "distinct" and certain:
            return f"children of node {parent}: distinct siblings, {certain} of them deterministic"
    return None


def _law_fault(draft: types.Draft, row: int, node: int, tolerance: float) -> str | None:
    """What is wrong with the token of a present node and its law."""
    laws, vocab_size = draft.log_probs.shape[1:]
    token, law = int(draft.tokens[row, node - 1]), int(draft.law[row, node - 1])
    if not 0 <= token < vocab_size:
        return f"token {token} is none of the vocabulary 0…{vocab_size - 1}"
    if not -1 <= law < laws:
        return f"law {law} is none of the {laws} in log_probs, nor −1"
    if law < 0:
        return None
    mass = float(np.exp(draft.log_probs[row, law].astype(np.float64)).sum())
    # Written so that a NaN is complained of.
    if not abs(mass - 1) <= tolerance:
        return f"law {law} has mass {mass:.6g}, not 1"
    if draft.siblings == "distinct":
        earlier = _earlier_siblings(draft, row, node)
        twins = [other for other in earlier if draft.tokens[row, other - 1] == token]
        if twins:
            return (
                f"token {token} is also that of its sibling {twins[0]}, drawn without replacement"
            )
    if draft.log_probs[row, law, token] == -np.inf:
        return f"token {token} was drawn, and has probability 0 under law {law}"
    return None


def _parents(draft: types.Draft) -> np.ndarray:
    return np.broadcast_to(np.asarray(trees.parents(draft.tree)), draft.tokens.shape)


def _earlier_siblings(draft: types.Draft, row: int, node: int) -> list[int]:
    parents = _parents(draft)[row]
    return [
        other
        for other in range(1, node)
        if parents[other - 1] == parents[node - 1] and draft.present[row, other - 1]
    ]


def difference(
    found: types.Draft, row: int, wanted: types.Draft, other: int, tolerance: float
) -> str | None:
    """Where row `row` of a draft first differs from row `other` of another, and how.

    Absent nodes are alike whatever they hold. Laws are compared as probabilities.
    """
    there, here = _parents(wanted), _parents(found)
    for node in range(1, found.tokens.shape[1] + 1):
        index = node - 1
        present = bool(found.present[row, index]), bool(wanted.present[other, index])
        if present[0] != present[1]:
            states = ["absent", "present"]
            return f"node {node} is {states[present[0]]}, not {states[present[1]]}"
        if not present[0]:
            continue
        if here[row, index] != there[other, index]:
            return f"node {node} has parent {here[row, index]}, not {there[other, index]}"
        laws = _law(found, row, index), _law(wanted, other, index)
        if (laws[0] is None) != (laws[1] is None):
            kinds = ["drawn from a law", "deterministic"]
            return f"node {node} is {kinds[laws[0] is None]}, not {kinds[laws[1] is None]}"
        if laws[0] is not None and laws[1] is not None:
            gap = float(np.max(np.abs(laws[0] - laws[1])))
            if not gap <= tolerance:
                return f"the law of node {node} differs by {gap:.3g} (tolerance {tolerance:.3g})"
        tokens = int(found.tokens[row, index]), int(wanted.tokens[other, index])
        if tokens[0] != tokens[1]:
            return f"node {node} is token {tokens[0]}, not {tokens[1]}"
    return None


def _law(draft: types.Draft, row: int, index: int) -> np.ndarray | None:
    """Probabilities [V], None for a deterministic node."""
    law = draft.law[row, index]
    return None if law < 0 else np.exp(draft.log_probs[row, law].astype(np.float64))


def hidden_choice(draft: types.Draft, texts: int) -> str | None:
    """Whether a drawn node is present in one row and absent in another that had drawn alike so far.

    Then the node's own token decided, or a sibling's, or a draw that no law knows of. Rows whose
    numbers agree modulo `texts` draft for one text, under keys of their own.
    """
    parents = _parents(draft)
    shown = np.where(draft.present, draft.tokens, -1)
    for node in range(1, draft.tokens.shape[1] + 1):
        index = node - 1
        answers = collections.defaultdict(dict)
        for row in range(draft.tokens.shape[0]):
            if draft.law[row, index] < 0:
                continue
            drawn = shown[row, :index]
            if draft.siblings != "distinct":
                drawn = np.where(parents[row, :index] == parents[row, index], -1, drawn)
            before = (row % texts, tuple(drawn), tuple(parents[row, :node]))
            answers[before].setdefault(bool(draft.present[row, index]), row)
        for (_, tokens, _), rows in answers.items():
            if len(rows) > 1:
                own = [int(draft.tokens[rows[answer], index]) for answer in (True, False)]
                return (
                    f"after the same drafted tokens {[int(token) for token in tokens]} node {node} "
                    f"is present as token {own[0]} and absent as token {own[1]}; presence may "
                    "depend on what was drawn before a node, never on its own token, nor on its "
                    "siblings' unless they are distinct"
                )
    return None


def _law_as_drawn(draft: types.Draft, row: int, index: int) -> np.ndarray | None:
    """Probabilities [V] given a node's earlier siblings; None for a deterministic node."""
    law = _law(draft, row, index)
    if law is not None and draft.siblings == "distinct":
        earlier = _earlier_siblings(draft, row, index + 1)
        law[draft.tokens[row, [other - 1 for other in earlier]]] = 0.0
        law /= law.sum()
    return law


def miscalibration(draft: types.Draft) -> str | None:
    """Whether tokens came too often, or too seldom, for the laws named as their nodes'.

    Counted by token, by how likely it is among its law's, and, over all nodes, by its probability:
    a law that is sharper or flatter than it says shows best there. The rows draft under keys of
    their own.
    """
    vocab_size = draft.log_probs.shape[2]
    # The probability of what was drawn over the largest, and what it was to be.
    height, expected_height, variance_of_height, drawn = 0.0, 0.0, 0.0, 0
    for node in range(1, draft.tokens.shape[1] + 1):
        index = node - 1
        counts, expected, variance = np.zeros((3, 2, vocab_size))
        for row in np.flatnonzero(draft.present[:, index]).tolist():
            law = _law_as_drawn(draft, row, index)
            if law is None:
                continue
            token, order = draft.tokens[row, index], np.argsort(-law, kind="stable")
            counts[[0, 1], [token, int(np.argmax(order == token))]] += 1
            both = np.stack([law, law[order]])
            expected, variance = expected + both, variance + both * (1 - both)
            share = law / law.max()
            mean = float(law @ share)
            height, drawn = height + float(share[token]), drawn + 1
            expected_height += mean
            variance_of_height += float(law @ share**2) - mean**2
        surprise = chance.surprise(counts, expected, variance)
        way, worst = np.unravel_index(np.argmax(surprise), surprise.shape)
        if surprise[way, worst] > chance.LIMIT:
            likely = "the likeliest" if worst == 0 else f"number {worst + 1} by likelihood"
            name = f"{likely} token of its law" if way else f"token {worst}"
            return (
                f"node {node} is {name} in {int(counts[way, worst])} of {int(counts[0].sum())} "
                f"drafts, where by its laws {expected[way, worst]:.1f} were to be expected"
            )
    total = (np.asarray(value) for value in (height, expected_height, max(variance_of_height, 0.0)))
    if chance.surprise(*total) > chance.LIMIT_ALONE:
        return (
            f"what {drawn} nodes drew has {height / drawn:.3f} of its law's largest probability in "
            f"the mean, where by the laws {expected_height / drawn:.3f} was to be expected"
        )
    return None


def repetition(first: types.Draft, second: types.Draft) -> str | None:
    """Whether nodes of a later draft take after those of an earlier one under the same keys.

    Every step draws afresh, so that a node equals any earlier one as often as its law says.
    """
    size = first.tokens.shape[1]
    equal, expected, variance = np.zeros((3, size, size))
    for index in range(size):
        for row in np.flatnonzero(second.present[:, index]).tolist():
            law = _law_as_drawn(second, row, index)
            if law is None:
                continue
            earlier = first.present[row] & (first.law[row] >= 0)
            chance_of = np.where(earlier, law[first.tokens[row]], 0.0)
            equal[index] += earlier & (first.tokens[row] == second.tokens[row, index])
            expected[index] += chance_of
            variance[index] += chance_of * (1 - chance_of)
    surprise = chance.surprise(equal, expected, variance)
    later, earlier = np.unravel_index(np.argmax(surprise), surprise.shape)
    if surprise[later, earlier] > chance.LIMIT:
        return (
            f"node {later + 1} is the token that node {earlier + 1} was a step before in "
            f"{int(equal[later, earlier])} drafts, where by its laws "
            f"{expected[later, earlier]:.1f} were to be expected: the same noise serves two steps, "
            "which only drafts that say siblings='coupled' may do"
        )
    return None
