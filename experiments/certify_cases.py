"""What `experiments.certify` certifies: every rule on every kind of draft that it takes."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from specjax import analysis, trees, types

__all__ = ["WARPERS", "Case", "cases", "certificates", "example"]

# Options that leave a law alone stand where a warper sets none, so that one program serves all.
_NEUTRAL = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
WARPERS = {
    name: types.Sampling(**{**_NEUTRAL, **options})
    for name, options in {
        "none": {},
        "temperature 0.5": {"temperature": 0.5},
        "top-k 2": {"top_k": 2},
        "top-p 0.6": {"top_p": 0.6},
        "min-p 0.4": {"min_p": 0.4},
        "greedy": {"temperature": 0.0},
    }.items()
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
_QUICK = ("chain of 2", "2, then 1 each")
_KINDS = (
    "sampled",
    "traced tree",
    "distinct",
    "two drafters",
    "partly certain",
    "certain",
    "stopping",
    "coupled",
)


@dataclasses.dataclass(frozen=True)
class Case:
    """A rule, a topology, a kind of draft and a dtype: one program, many laws.

    Attributes:
      rule: the rule.
      shape: name of the topology.
      kind: how nodes were drawn: `sampled` independently, `distinct` without replacement, by `two
        drafters` in turns, `partly certain` (every other node deterministic), `certain`, `stopping`
        after some paths, `coupled` to the target's draws; `traced tree` is sampled, and the rule is
        shown a dynamic topology.
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
    """Every combination that may make sense; a rule refuses the drafts that it cannot take.

    Rules go in turns, since they share programs.
    """
    for shape in _SHAPES if full else _QUICK:
        is_chain = trees.from_parents(_SHAPES[shape][0]).is_chain
        for kind in _KINDS:
            if kind in (("distinct", "traced tree") if is_chain else ("coupled",)):
                # A chain's siblings are always distinct, and noise has one winner.
                continue
            for dtype in ("float32", "float64"):
                for rule in rules:
                    yield Case(rule, shape, kind, dtype)


def certificates(case: Case, seeds: int) -> list[tuple[str, analysis.Certificate]]:
    """Certificates under every warper, of `seeds` random pairs of laws each.

    Raises:
      RefusedDraftError: the rule cannot take such drafts.
    """
    tree, vocab_size = case.tree, case.vocab_size
    # Where one drafter would do there is a second that no node names: kinds share a program then.
    proposals = 0 if case.kind == "certain" else 2
    laws = [
        _laws(vocab_size, tree.max_depth + (place == 0), case.dtype, seeds, place)
        for place in range(1 + proposals)
    ]
    found = analysis.certify_many(
        case.rule,
        tree,
        *laws,
        sources=_sources(case.kind, tree.size),
        siblings=case.kind if case.kind in ("distinct", "coupled") else "independent",
        absent=_stops(tree, vocab_size) if case.kind == "stopping" else None,
        traced=case.kind == "traced tree",
    )
    names = [name for name in WARPERS for _ in range(seeds)]
    return list(zip(names, found, strict=True))


def example(rule: types.VerificationRule) -> float:
    """Drafts accepted of two, all drawn from (2/3, 1/3) where the target's law is (1/3, 2/3).

    The example of Sun et al. 2024 (arXiv 2403.10444): `token` accepts 10/9, `block` 11/9.

    Raises:
      RefusedDraftError: the rule cannot take such drafts.
    """
    target, proposal = (
        [jnp.broadcast_to(jnp.log(jnp.asarray(law)), (2**level, 2)) for level in range(3)]
        for law in ([1 / 3, 2 / 3], [2 / 3, 1 / 3])
    )
    siblings = "independent" if rule.draw_law is None else "coupled"
    found = analysis.certify(rule, trees.chain(2), target, proposal, siblings=siblings)
    return found.expected_accepted


@functools.cache
def _laws(vocab_size: int, depth: int, dtype: str, seeds: int, salt: int) -> list[jax.Array]:
    """A conditional law for every warper and seed, sharp and flat in turns: [W·seeds, V^d, V]."""
    pairs = [(settings, seed) for settings in WARPERS.values() for seed in range(seeds)]
    made = [_law(settings, seed, salt, vocab_size, depth, dtype) for settings, seed in pairs]
    return [jnp.stack(level) for level in zip(*made, strict=True)]


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _law(settings, seed, salt, vocab_size: int, depth: int, dtype: str) -> list[jax.Array]:
    key = jax.random.fold_in(jax.random.key(seed), salt)
    concentration = jnp.where(seed % 2 == 0, 1.0, 0.3).astype(dtype)
    return analysis.warped_law(
        settings, analysis.random_law(key, vocab_size, depth, concentration, jnp.dtype(dtype))
    )


def _sources(kind: str, size: int) -> list[int]:
    if kind == "two drafters":
        return [node % 2 for node in range(size)]
    if kind == "partly certain":
        return [-(node % 2) for node in range(size)]
    return [-1 if kind == "certain" else 0] * size


def _stops(tree: trees.Tree, vocab_size: int) -> list[np.ndarray]:
    """Drafting stops after every third path, but never before the first token."""
    return [
        (np.arange(vocab_size**level) % 3 == 1) & (level > 0) for level in range(tree.max_depth)
    ]
