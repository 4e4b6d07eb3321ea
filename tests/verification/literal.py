"""The rules as their papers tell them, one draft and one node after the other, in numpy.

A draft is a `Draft` of one row, taken apart by `Row`. Every rule gives P(stop at this node, next
token): float64[N+1, V].
"""

import dataclasses

import numpy as np


@dataclasses.dataclass
class Row:
    """One row of a draft: tokens and presence of nodes 1…N, and the law each was drawn from."""

    parents: list[int]
    tokens: list[int]
    present: list[bool]
    laws: list[np.ndarray]
    distinct: bool

    @classmethod
    def of(cls, draft, parents, row):
        vocab_size = draft.log_probs.shape[2]
        probabilities = np.exp(np.asarray(draft.log_probs[row], np.float64))
        laws = [
            np.eye(vocab_size)[token] if law < 0 else probabilities[law]
            for token, law in zip(
                np.asarray(draft.tokens[row]), np.asarray(draft.law[row]), strict=True
            )
        ]
        return cls(
            np.asarray(parents).tolist(),
            np.asarray(draft.tokens[row]).tolist(),
            np.asarray(draft.present[row]).tolist(),
            laws,
            draft.siblings == "distinct",
        )

    def children(self, node):
        """Present children with token and law, in draw order; a law loses what was drawn before."""
        drawn = []
        for child, parent in enumerate(self.parents, start=1):
            if parent != node or not self.present[child - 1]:
                continue
            law = self.laws[child - 1].copy()
            if self.distinct:
                law[drawn] = 0
                law /= law.sum()
            token = self.tokens[child - 1]
            drawn.append(token)
            yield child, token, law


def normalised(law):
    return law / law.sum() if law.sum() > 0 else law


def chance(wanted, offered):
    return min(1.0, wanted / offered) if offered > 0 else 0.0


def multi_candidate(row, target):
    outcome = np.zeros_like(target)

    def walk(node, reach):
        law = target[node]
        for child, token, proposal in row.children(node):
            accept = chance(law[token], proposal[token])
            walk(child, reach * accept)
            reach *= 1 - accept
            law = normalised(np.maximum(law - proposal, 0))
        outcome[node] += reach * law

    walk(0, 1.0)
    return outcome


def traversal(row, target):
    """From the leaves up: a subtree that accepts nothing is deleted, and its parent's law mends."""

    def through(node, weight):
        """What ends in the subtree, given that nothing before it did: outcome, P(anything)."""
        law, outcome, nothing = target[node], np.zeros_like(target), 1.0
        for child, token, proposal in row.children(node) if law.sum() > 0 else ():
            below, accepted = through(child, chance(weight * law[token], proposal[token]))
            outcome += nothing * below
            nothing *= 1 - accepted
            left = np.maximum(weight * law - proposal, 0)
            mass = left.sum()
            law = normalised(left)
            weight = mass / (mass + 1 - weight) if mass + 1 - weight > 0 else 1.0
        outcome[node] += nothing * weight * law
        return outcome, 1 - nothing * (1 - weight)

    return through(0, 1.0)[0]


def k_seq(row, target):
    outcome = np.zeros_like(target)

    def walk(node, reach):
        law, children = target[node], list(row.children(node))
        if not children:
            outcome[node] += reach * law
            return
        count, proposal = len(children), children[0][2]

        def beta(factor):
            return np.minimum(proposal, law / factor).sum()

        low, high = 1.0, float(count)
        for _ in range(200):
            middle = (low + high) / 2
            lawful = 1 - (1 - beta(middle)) ** count <= middle * beta(middle) + 1e-15
            low, high = (low, middle) if lawful else (middle, high)
        factor = high
        for child, token, _ in children:
            accept = chance(law[token], factor * proposal[token])
            walk(child, reach * accept)
            reach *= 1 - accept
        tries = sum((1 - beta(factor)) ** j for j in range(count))
        left = np.maximum(law - np.minimum(proposal, law / factor) * tries, 0)
        outcome[node] += reach * (normalised(left) if left.sum() > 1e-13 else law)

    walk(0, 1.0)
    return outcome


def typical(row, target, epsilon, delta):
    """The longest path of tokens that are probable enough, the first among equals."""
    best, longest = 0, 0
    depth, whole = {0: 0}, {0: True}
    for node, parent in enumerate(row.parents, start=1):
        law = target[parent]
        positive = law[law > 0]
        entropy = -(positive * np.log(positive)).sum()
        enough = law[row.tokens[node - 1]] > min(epsilon, delta * np.exp(-entropy))
        whole[node] = whole[parent] and row.present[node - 1] and bool(enough)
        depth[node] = depth[parent] + 1
        if whole[node] and depth[node] > longest:
            best, longest = node, depth[node]
    outcome = np.zeros_like(target)
    outcome[best] = target[best]
    return outcome


RULES = {"multi_candidate": multi_candidate, "traversal": traversal, "k_seq": k_seq}
