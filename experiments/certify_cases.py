"""What `experiments.certify` certifies: every rule on every kind of draft that it takes."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from specjax import analysis, trees, types

__all__ = ["Case", "WARPERS", "cases", "certificates"]

WARPERS = {
    "none": types.Sampling(1.0),
    "temperature 0.5": types.Sampling(0.5),
    "top-k 2": types.Sampling(1.0, top_k=2),
    "top-p 0.6": types.Sampling(1.0, top_p=0.6),
    "min-p 0.4": types.Sampling(1.0, min_p=0.4),
    "greedy": types.Sampling(0.0),
}

# Parents and the vocabulary: V^N drafts are enumerated, and 2^N flags or V^(N+1) draws for each.
_SHAPES = {
    "chain of 1": ([0], 4),
    "chain of 2": ([0, 1], 3),
    "chain of 3": ([0, 1, 2], 3),
    "2 siblings": ([0, 0], 4),
    "3 siblings": ([0, 0, 0], 3),
    "2, then 1 each": ([0, 0, 1, 2], 3),
    "2, then 2 of the first": ([0, 0, 1, 1], 3),
    "depth first": ([0, 1, 0, 2, 3], 2),
    "2, then 2 each": ([0, 0, 1, 1, 2, 2], 2),
}
_QUICK = ("chain of 1", "chain of 3", "3 siblings", "2, then 1 each")
_KINDS = ("sampled", "distinct", "two drafters", "partly certain", "certain", "stopping", "coupled")


@dataclasses.dataclass(frozen=True)
class Case:
    """A rule, a topology, a kind of draft and a dtype: one program, many laws.

    Attributes:
      rule: the rule.
      shape: name of the topology.
      kind: how nodes were drawn: `sampled` independently, `distinct` without replacement, by `two
        drafters` in turns, `partly certain` (every other node deterministic), `certain`, `stopping`
        after some paths, `coupled` to the target's draws.
      dtype: `float32` or `float64`.
    """

    rule: types.VerificationRule
    shape: str
    kind: str
    dtype: str

    @property
    def tree(self) -> trees.Tree:
        return trees.from_parents(_SHAPES[self.shape][0])

    @property
    def vocab_size(self) -> int:
        return _SHAPES[self.shape][1]


def cases(rules: Sequence[types.VerificationRule], full: bool) -> Iterator[Case]:
    """Every combination that may make sense; a rule refuses the drafts that it cannot take."""
    shapes = list(_SHAPES) if full else _QUICK
    for rule in rules:
        for shape in shapes:
            for kind in _KINDS:
                is_chain = trees.from_parents(_SHAPES[shape][0]).is_chain
                if kind == ("distinct" if is_chain else "coupled"):
                    # A chain's siblings are always distinct, and noise has one winner.
                    continue
                for dtype in ("float32", "float64"):
                    yield Case(rule, shape, kind, dtype)


def certificates(case: Case, seeds: int) -> list[tuple[str, analysis.Certificate]]:
    """Certificates under every warper, of `seeds` random pairs of laws each.

    Raises:
      ValueError: the rule cannot take such drafts.
    """
    tree, vocab_size = case.tree, case.vocab_size
    dtype = jnp.dtype(case.dtype)
    proposals = {"two drafters": 2, "certain": 0}.get(case.kind, 1)
    made: list[list[list[jax.Array]]] = [[] for _ in range(1 + proposals)]
    for settings in WARPERS.values():
        for seed in range(seeds):
            keys = jax.random.split(jax.random.key(seed), 1 + proposals)
            for place, laws in enumerate(made):
                depth = tree.max_depth + (place == 0)
                # Sharp laws and flat ones.
                law = analysis.random_law(
                    keys[place], vocab_size, depth, (1.0, 0.3)[seed % 2], dtype
                )
                laws.append(analysis.warped_law(settings, law))
    stacked = [[jnp.stack(level) for level in zip(*laws, strict=True)] for laws in made]
    found = analysis.certify_many(
        case.rule,
        tree,
        stacked[0],
        *stacked[1:],
        sources=_sources(case.kind, tree.size),
        siblings=case.kind if case.kind in ("distinct", "coupled") else "independent",
        absent=_stops(tree, vocab_size) if case.kind == "stopping" else None,
    )
    names = [name for name in WARPERS for _ in range(seeds)]
    return list(zip(names, found, strict=True))


def _sources(kind: str, size: int) -> list[int] | None:
    if kind == "two drafters":
        return [node % 2 for node in range(size)]
    if kind == "partly certain":
        return [-(node % 2) for node in range(size)]
    return None


def _stops(tree: trees.Tree, vocab_size: int) -> list[np.ndarray]:
    """Drafting stops after every third path, but never before the first token."""
    return [
        (np.arange(vocab_size**level) % 3 == 1) & (level > 0) for level in range(tree.max_depth)
    ]
