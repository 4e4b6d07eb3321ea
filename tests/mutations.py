"""Breaks the code line by line, and sees the tests go red.

    python -m tests.mutations [name…]

Every mutation replaces one piece of one file in a copy of the package, runs the tests that guard it
against the copy, and says whether they failed; on a copy without a mutation they must pass. The
exit code is the number of survivors.
"""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent


class Mutation(NamedTuple):
    """A named mistake: `before` becomes `after` in a file; `tests` must see it.

    `tests` is a file, and after a space, if there is one, which of its tests (pytest's -k).
    """

    name: str
    file: str
    before: str
    after: str
    tests: str


KERNEL, TREES = "verification/kernel.py", "tests/verification/test_trees.py"
ORACLES, RULES = "tests/verification/test_oracles.py", "tests/verification/test_rules.py"
CERTIFICATES = "tests/analysis/test_exactness.py"
LAW = "tests/decoding/test_law.py"

MUTATIONS = [
    # The walk that all rules share.
    Mutation(
        "accept at a uniform of 0",
        KERNEL,
        "uniform < accept",
        "uniform <= accept",
        ORACLES + " uniform_of_0",
    ),
    Mutation(
        "absent nodes accepted",
        KERNEL,
        "flags = flags & draft.present",
        "flags = flags",
        CERTIFICATES + " stopping",
    ),
    Mutation(
        "the last flagged sibling wins",
        "trees.py",
        "np.ones((tree.size, tree.size), bool), k=-1)",
        "np.ones((tree.size, tree.size), bool), k=-1).T",
        TREES + " static and multi_candidate and independent",
    ),
    Mutation(
        "residual not renormalised",
        KERNEL,
        "left / jnp.where(total > 0, total, 1.0)",
        "left",
        CERTIFICATES + " exact_on_chains and token",
    ),
    Mutation(
        "residual from the root",
        KERNEL,
        "categorical(residual_keys, residual(stop))",
        "categorical(residual_keys, residual(0 * stop))",
        "tests/verification/test_draws.py million and token",
    ),
    # match
    Mutation(
        "match: a repeated sibling counts again",
        "verification/match.py",
        "counted = jnp.where(repeated, 0.0, probability)",
        "counted = probability",
        CERTIFICATES + " match",
    ),
    Mutation(
        "match: not conditional on earlier siblings",
        "verification/match.py",
        "jnp.maximum(1 - taken, probability)",
        "jnp.ones_like(taken)",
        CERTIFICATES + " match",
    ),
    Mutation(
        "match: noise by node instead of depth",
        "verification/match.py",
        "length[:, None] + trees.depths(draft.tree)",
        "length[:, None] + jnp.arange(draft.tree.size + 1)[None]",
        "tests/verification/test_draws.py plain",
    ),
    # token
    Mutation(
        "token: ratio not cut at 1",
        "verification/token.py",
        "jnp.exp(jnp.minimum(log_ratio(draft, target_log_probs), 0.0))",
        "jnp.exp(log_ratio(draft, target_log_probs))",
        RULES + " probability and token",
    ),
    Mutation(
        "token: difference not clipped",
        "verification/token.py",
        "gap = jnp.maximum(jnp.exp(law + weight) - jnp.exp(proposal), 0.0)",
        "gap = jnp.abs(jnp.exp(law + weight) - jnp.exp(proposal))",
        CERTIFICATES + " exact_on_chains and token",
    ),
    Mutation(
        "token: q = 0 accepted",
        "verification/token.py",
        "possible = draft.present & (drawn > -jnp.inf)",
        "possible = draft.present",
        ORACLES + " token",
    ),
    # block
    Mutation(
        "block: residual of token",
        "verification/block.py",
        "return token.clipped_difference(draft, target_log_probs, node, chosen)",
        "return token.clipped_difference(draft, target_log_probs, node, 0 * chosen)",
        CERTIFICATES + " exact_on_chains and block",
    ),
    Mutation(
        "block: weights not held below 1",
        "verification/block.py",
        "return walk - jnp.maximum(jax.lax.cummax(walk, axis=1), 0.0)",
        "return jnp.minimum(walk, 0.0)",
        CERTIFICATES + " exact_on_chains and block",
    ),
    Mutation(
        "block: the flag of the last draft everywhere",
        "verification/block.py",
        "jnp.where(following, joint, weight)",
        "weight",
        CERTIFICATES + " exact_on_chains and block",
    ),
    # multi_candidate and the rounds
    Mutation(
        "rounds: what is left not clipped",
        "verification/rounds.py",
        "jnp.where(here, jnp.maximum(left, 0.0), 0.0)",
        "jnp.where(here, left, 0.0)",
        TREES + " static and multi_candidate and independent",
    ),
    Mutation(
        "rounds: every round costs 1",
        "verification/rounds.py",
        "cost = total + (1 - weight)",
        "cost = jnp.ones_like(total)",
        TREES + " static and multi_candidate and independent",
    ),
    Mutation(
        "rounds: a sibling without a law is tried",
        "verification/rounds.py",
        "present = present & (mass > 0)",
        "present = present & (mass >= 0)",
        TREES + " as_good_as_absent",
    ),
    Mutation(
        "rounds: q keeps the drawn tokens",
        "verification/rounds.py",
        "mass=state.mass.at[row, parent].set(jnp.where(present, rest, mass))",
        "mass=state.mass",
        TREES + " static and multi_candidate and distinct",
    ),
    Mutation(
        "rounds: duplicates skipped",
        "verification/rounds.py",
        "taken = taken + jnp.where(mine, price[:, :, None], 0.0)",
        "taken = taken + jnp.where(mine & ~repeated[:, :, None], price[:, :, None], 0.0)",
        TREES + " static and multi_candidate and independent",
    ),
    Mutation(
        "rounds: one law for all siblings",
        "verification/rounds.py",
        "holds = (laws == law[:, :, None]) | (laws < 0)",
        "holds = jnp.ones_like(laws) > 0",
        TREES + " static and multi_candidate and several",
    ),
    Mutation(
        "rounds: absent siblings cost a round",
        "verification/rounds.py",
        "price = jnp.where(present, cost / jnp.where(present, mass, 1.0), 0.0)",
        "price = cost / jnp.where(mass > 0, mass, 1.0)",
        TREES + " static and multi_candidate and independent",
    ),
    Mutation(
        "rounds: a one-hot sibling is not taken out",
        "verification/rounds.py",
        "gone = jnp.where(children, draft.tokens, law.shape[1])",
        "gone = jnp.where(children & (draft.law >= 0), draft.tokens, law.shape[1])",
        TREES + " static and multi_candidate and several",
    ),
    # traversal
    Mutation(
        "traversal: weights not handed down",
        "verification/traversal.py",
        "rounds.reject(draft, target_log_probs, hand_down=True)",
        "rounds.reject(draft, target_log_probs)",
        TREES + " static and traversal and independent",
    ),
    Mutation(
        "traversal: later siblings forgotten",
        "verification/traversal.py",
        "none[:, 1:] * none_later",
        "none[:, 1:]",
        TREES + " static and traversal and independent",
    ),
    Mutation(
        "traversal: what lies below forgotten",
        "verification/traversal.py",
        "through = 1 - none[:, 1:]",
        "through = stay[:, 1:]",
        TREES + " static and traversal and independent",
    ),
    Mutation(
        "traversal: drafts beyond a dead end",
        "verification/traversal.py",
        "present=draft.present & ~beyond",
        "present=draft.present",
        "tests/analysis/test_dead_end_certificates.py traversal",
    ),
    # k_seq
    Mutation(
        "k_seq: ρ = 1",
        "verification/k_seq.py",
        "jnp.where(several, factor, 1.0)",
        "jnp.where(several, 1.0, 1.0)",
        TREES + " static and k_seq",
    ),
    Mutation(
        "k_seq: k counts absent siblings",
        "verification/k_seq.py",
        "is_child = is_child & draft.present[:, None, :]",
        "is_child = is_child & (draft.present[:, None, :] | True)",
        TREES + " static and k_seq",
    ),
    Mutation(
        "k_seq: k counts distinct tokens",
        "verification/k_seq.py",
        "is_child = is_child & draft.present[:, None, :]",
        "again = draft.tokens[:, :, None] == draft.tokens[:, None, :]\n"
        "    again = jnp.any(again & trees.earlier_siblings(draft.tree), axis=-1)\n"
        "    is_child = is_child & (draft.present & ~again)[:, None, :]",
        TREES + " static and k_seq",
    ),
    Mutation(
        "k_seq: the split is never looked at again",
        "verification/k_seq.py",
        "(carry[0] < steps) & jnp.any(carry[2] > carry[1])",
        "carry[0] < 1",
        TREES + " static and k_seq",
    ),
    Mutation(
        "k_seq: one try is taken off",
        "verification/k_seq.py",
        "jnp.minimum(proposal, target / factor[:, None]) * tries[:, None]",
        "jnp.minimum(proposal, target / factor[:, None])",
        TREES + " static and k_seq",
    ),
    # coupled
    Mutation(
        "coupled: accepts as token does",
        "verification/coupled.py",
        "total = jnp.where(draft.law < 0, 1.0, jnp.sum(larger, axis=-1))",
        "total = jnp.maximum(wanted, drawn)",
        "tests/verification/test_coupled.py joint_law",
    ),
    Mutation(
        "coupled: residual of match",
        "verification/coupled.py",
        "left = target * jax.vmap(_overtaken)(target, proposal, token[:, 0])",
        "left = target * (jnp.arange(law.shape[1])[None] != token)",
        "tests/verification/test_coupled.py joint_law",
    ),
    Mutation(
        "coupled drafts: fresh noise",
        "drafters/model.py",
        "context.keys, position, law[:, None], going[:, None]",
        "keys, position, law[:, None], going[:, None]",
        "tests/drafters/test_union.py noise",
    ),
    # lossy
    Mutation(
        "typical: the first path instead of the longest",
        "verification/lossy.py",
        "longest = jnp.argmax(length, axis=-1)",
        "longest = jnp.argmax(jnp.minimum(length, 1), axis=-1)",
        TREES + " static and typical",
    ),
    # What rules refuse.
    Mutation(
        "k_seq: distinct siblings taken",
        "verification/k_seq.py",
        'if draft.siblings == "distinct" or draft.sibling_laws > 1:',
        "if draft.sibling_laws > 1:",
        CERTIFICATES + " k_seq",
    ),
    Mutation(
        "block: drafts of position-keyed noise taken",
        KERNEL,
        'if draft.siblings == "coupled":',
        'if draft.siblings == "cousins":',
        LAW + " position_keyed",
    ),
    # Drafters of trees.
    Mutation(
        "tree: siblings in sorted order",
        "drafters/tree.py",
        "return jnp.stack(drawn, axis=-1)",
        "return jnp.sort(jnp.stack(drawn, axis=-1), axis=-1)",
        "tests/drafters/test_tree.py",
    ),
    Mutation(
        "tree: siblings drawn again from the whole law",
        "drafters/tree.py",
        "if not self.replacement:",
        "if self.greedy:",
        "tests/drafters/test_tree.py",
    ),
    Mutation(
        "tree: siblings share a draw",
        "drafters/tree.py",
        "sampling.categorical(keys[:, place], left)",
        "sampling.categorical(keys[:, 0], left)",
        "tests/drafters/test_tree.py",
    ),
    Mutation(
        "tree: the memory keeps the first nodes",
        "drafters/tree.py",
        "memory.keep(params, state, context, verdict, is_chain=False)",
        "memory.keep(params, state, context, verdict, is_chain=True)",
        "tests/testing/test_drafter.py keeps and tree",
    ),
    Mutation(
        "union: parts share their draws",
        "drafters/union.py",
        "part.propose(part.params, of_part, context, own)",
        "part.propose(part.params, of_part, context, keys)",
        "tests/drafters/test_union.py",
    ),
    Mutation(
        "union: a part hears of others' nodes",
        "drafters/union.py",
        "mine = mine & (order < verdict.count[:, None])",
        "mine = order < verdict.count[:, None]",
        "tests/drafters/test_union.py",
    ),
]


def passes(tests: str, mutation: Mutation | None) -> bool:
    """Whether these tests pass on a copy, mutated or whole."""
    with tempfile.TemporaryDirectory() as folder:
        for part in ("specjax", "experiments", "tests", "notebooks"):
            shutil.copytree(ROOT / part, pathlib.Path(folder) / part)
        shutil.copy(ROOT / "pyproject.toml", folder)
        if mutation is not None:
            path = pathlib.Path(folder) / "specjax" / mutation.file
            text = path.read_text()
            if text.count(mutation.before) != 1:
                raise SystemExit(
                    f"{mutation.name}: {mutation.file} no longer says {mutation.before!r}"
                )
            path.write_text(text.replace(mutation.before, mutation.after))
        file, _, which = tests.partition(" ")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-q",
            "--numprocesses=0",
            file,
            "-k",
            which,
        ]
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": folder},
            capture_output=True,
            text=True,
            check=False,
        )
    # Anything else, such as no test at all, is a fault of this table.
    if done.returncode not in (0, 1):
        raise SystemExit(f"{tests}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 0


def main(names: list[str]) -> int:
    """Runs the mutations whose names hold one of the words, or all."""
    chosen = [m for m in MUTATIONS if not names or any(name in m.name for name in names)]
    survivors, sound = 0, set()
    for mutation in chosen:
        began = time.perf_counter()
        if mutation.tests not in sound and not passes(mutation.tests, None):
            raise SystemExit(f"{mutation.tests} fails without any mutation")
        sound.add(mutation.tests)
        lives = passes(mutation.tests, mutation)
        survivors += lives
        verdict = "SURVIVES" if lives else "caught"
        seconds = time.perf_counter() - began
        print(f"{mutation.name:<48}{verdict:<10}{mutation.tests} ({seconds:.0f} s)", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} caught")
    return survivors


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
