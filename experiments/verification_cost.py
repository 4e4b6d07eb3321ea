"""What verification costs at a large vocabulary, beside reading the laws once.

    python -m experiments.verification_cost

times `verify` for every rule, jitted and warm, on chains and on a tree of 64 nodes, in alternation
with a pass that reads the target's and the draft's laws once. A tree's rule sums over the
vocabulary once for most drafted siblings, so its row also tells the cost of a node, beside a sum of
`block`; and the temporary memory says whether anything of the laws' size is kept.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from experiments import binary, measure
from specjax import trees, types, verification

_TAKES = binary.takes(binary.BATCH, binary.REPEATS)
_LENGTH = flags.DEFINE_integer("length", 8, "K, the chain's draft length.")
_VOCABULARY = flags.DEFINE_integer("vocabulary", 131072, "V.")
_EXPANSION = flags.DEFINE_list("expansion", ["4", "3", "4"], "The tree's children by depth.")

_CHAIN_RULES = ("token", "block", "multi_candidate", "traversal", "k_seq")
_TREE_RULES = ("multi_candidate", "traversal", "k_seq")


@dataclasses.dataclass(frozen=True)
class Config:
    """One run, as the flags give it."""

    batch: int = 8
    length: int = 8
    vocabulary: int = 131072
    expansion: tuple[int, ...] = (4, 3, 4)
    repeats: int = 7

    def __post_init__(self):
        for name in ("batch", "length", "vocabulary", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)} must be at least 1")


@jax.jit
def _read(target, proposal):
    return jnp.sum(target) + jnp.sum(proposal)


@functools.partial(jax.jit, static_argnames=("rule",))
def _verify(rule, keys, length, draft, target):
    return verification.verify(rule, keys, length, draft, target)


def _problem(config: Config, tree: trees.Tree, siblings: str):
    """A draft with its laws, and the target's, near each other as those of a good draft are."""
    keys = jax.random.split(jax.random.key(0), 3)
    size = tree.size
    rows = 1 + max(tree.static_parents or (0,))
    logits = 2 * jax.random.normal(keys[0], (config.batch, size + 1, config.vocabulary))
    near = logits[:, :rows] + jax.random.normal(keys[1], (config.batch, rows, config.vocabulary))
    target, proposal = jax.nn.log_softmax(logits), jax.nn.log_softmax(near)
    parents = jnp.asarray(tree.static_parents)
    tokens = jax.random.categorical(keys[2], proposal[:, parents]).astype(jnp.int32)
    draft = types.draft(tokens, tree, log_probs=proposal, siblings=siblings)
    return jax.block_until_ready((draft, target))


def run(config: Config) -> dict[str, Any]:
    """The report, ready for JSON."""
    binary.start()
    shapes = {
        f"chain of {config.length}": (trees.chain(config.length), "independent", _CHAIN_RULES),
        "tree": (trees.branching(config.expansion), "independent", _TREE_RULES),
        "tree, distinct": (trees.branching(config.expansion), "distinct", _TREE_RULES[:2]),
    }
    keys = jax.random.split(jax.random.key(1), config.batch)
    length = jnp.full((config.batch,), 5, jnp.int32)
    report: dict[str, Any] = {"config": dataclasses.asdict(config), "versions": binary.versions()}
    rows = report["rows"] = []
    block_sum = None
    for shape, (tree, siblings, rules) in shapes.items():
        with binary.Progress(f"{shape}, {tree.size} nodes") as progress:
            draft, target = _problem(config, tree, siblings)
            variants = {"read": measure.Variant(functools.partial(_read, target, draft.log_probs))}
            memory = {}
            for name in rules:
                given = verification.get(name), keys, length, draft, target
                variants[name] = measure.Variant(functools.partial(_verify, *given))
                analysis = _verify.lower(*given).compile().memory_analysis()
                memory[name] = getattr(analysis, "temp_size_in_bytes", None)
            times = measure.interleave(variants, config.repeats, progress.expect)
        read = times["read"].median
        laws = target.nbytes + draft.log_probs.nbytes
        for name, seconds in times.items():
            if name == "block":
                block_sum = seconds.median / (tree.size - 1)
            rows.append(
                {
                    "shape": shape,
                    "nodes": tree.size,
                    "what": name,
                    "seconds": dataclasses.asdict(seconds),
                    "reads": seconds.median / read,
                    "block_sums": block_sum and seconds.median / (tree.size * block_sum),
                    "temporary_share": None if memory.get(name) is None else memory[name] / laws,
                }
            )
    return report


def table(report: dict[str, Any]) -> str:
    """A line for every rule and shape."""
    lines = [
        f"{'drafts':<18}{'nodes':>6}  {'rule':<16}{'ms':>24}{'of reading':>12}"
        f"{'a node / a sum':>17}{'temporary / laws':>18}"
    ]
    for row in report["rows"]:
        seconds = row["seconds"]
        spread = "{:.2f} [{:.2f}, {:.2f}]".format(
            *(1e3 * seconds[name] for name in ("median", "min", "max"))
        )
        sums = "" if row["what"] in ("read", "token") else _show(row["block_sums"])
        lines.append(
            f"{row['shape']:<18}{row['nodes']:>6}  {row['what']:<16}{spread:>24}"
            f"{row['reads']:>11.2f}×{sums:>17}{_show(row['temporary_share']):>18}"
        )
    return "\n".join(lines)


def _show(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}×"


def main(argv: list[str]) -> None:
    """Runs what the flags ask for; bad input ends in one line and exit code 2."""

    def job():
        try:
            expansion = tuple(int(factor) for factor in _EXPANSION.value)
        except ValueError as error:
            raise ValueError(f"--expansion={','.join(_EXPANSION.value)}: {error}") from error
        batch = binary.given(binary.BATCH, Config.batch)
        repeats = binary.given(binary.REPEATS, Config.repeats)
        return run(Config(batch, _LENGTH.value, _VOCABULARY.value, expansion, repeats))

    binary.report(argv, job, table, _TAKES)


if __name__ == "__main__":
    app.run(main, flags_parser=binary.parse_flags)
