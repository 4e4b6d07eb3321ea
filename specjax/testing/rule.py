"""Holds a `VerificationRule` to its contract, on random laws with every edge, and certifies it.

Drafts of every kind are offered. What the rule refuses it must refuse with a ValueError; on what it
takes its acceptances must be probabilities, its residuals laws, its gradients finite, its verdicts
the same in every program, and the text's law the target's, by enumeration.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from specjax import analysis, sampling, trees, types, verification
from specjax.analysis import laws, outcomes
from specjax.testing import cases, chance, static
from specjax.verification import kernel

__all__ = ["check_rule"]

_TOLERANCE = 1e-5
_UNREACHED = 1e-6
# Rounds of verdicts, each of a batch, that are held against the outcome law.
_ROUNDS = 64


def check_rule(
    rule: types.VerificationRule,
    key: jax.Array,
    *,
    tree: trees.Tree | None = None,
    vocab_size: int = 3,
    batch: int = 64,
) -> str:
    """Holds a rule to the contract of `types.VerificationRule`.

    Args:
      rule: any rule.
      key: a typed key, consumed; draws laws, drafts and verdicts.
      tree: a static topology to draft on, small enough that all V^N drafts can be enumerated; None
        takes a chain of three and a tree of three.
      vocab_size: V.
      batch: B, rows of laws; a multiple of 8.

    Returns:
      What was certified, a line for each kind of draft that the rule takes. For a rule that is not
      `lossless` it says by how much the law of the text is off.

    Raises:
      AssertionError: the rule breaks the contract; the message says where and by how much.
      ValueError: a dynamic tree, a size that checks nothing, or a rule that refuses every draft.
    """
    given = (trees.chain(3), trees.from_parents((0, 0, 1))) if tree is None else (tree,)
    if tree is not None and (tree.static_parents is None or tree.size < 1):
        raise ValueError(f"tree={tree} must be static, with at least one node")
    if vocab_size < 2 or batch < 8 or batch % 8:
        raise ValueError(
            f"need vocab_size >= 2 and a batch of a multiple of 8, got {vocab_size} and {batch}"
        )
    check = _Check(rule, key, vocab_size, batch)
    check.functions()
    report, refusals, taken = [], [], 0
    for case in cases.every_kind(check.random, given, vocab_size, batch):
        refusal = check.refusal(case)
        if refusal is not None:
            refusals.append(f"{case.name}: {refusal}")
            continue
        check.properties(case, is_first=not taken)
        taken += 1
        # Draws that are coupled to the draft have another law, which only some rules tell.
        if case.draft.siblings != "coupled" or rule.draw is None or rule.draw_law is not None:
            check.frequencies(case)
            report.append(check.certificate(case))
    if not taken:
        raise ValueError(f"rule {rule.name!r} refuses every draft: {'; '.join(refusals)}")
    return "\n".join(report)


@functools.partial(jax.jit, static_argnames=("rule",))
def _answers(rule, keys, length, draft, target, weight):
    """All that a rule says of a batch: dict of arrays."""

    def value(log_probs, target):
        law = analysis.outcome_law(rule, dataclasses.replace(draft, log_probs=log_probs), target)
        return jnp.sum(law * weight), law

    (_, law), gradients = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(
        draft.log_probs, target
    )
    accept, residual = kernel.judge(rule, draft, target)
    return {
        "accept": accept,
        "residual": outcomes.residuals(draft, residual),
        "law": law,
        "gradients": gradients,
        "verdict": verification.verify(rule, keys, length, draft, target),
    }


@functools.partial(jax.jit, static_argnames=("rule",))
def _mapped(rule, *given):
    """The verdict of two halves of the batch under `vmap`, joined."""

    def halves(leaf):
        return leaf.reshape(2, leaf.shape[0] // 2, *leaf.shape[1:])

    verdict = jax.vmap(functools.partial(verification.verify, rule))(*jax.tree.map(halves, given))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), verdict)


@functools.partial(jax.jit, static_argnames=("rule",))
def _law_of_drafts(rule, draft, target):
    """P(drafted tokens, stop, next token) of the first row's chain: [V^N, N+1, V]."""
    tokens = jnp.asarray(laws.digits(draft.log_probs.shape[2], draft.tree.size))

    def repeated(leaf):
        return jnp.broadcast_to(leaf[:1], (tokens.shape[0], *leaf.shape[1:]))

    draft, target = jax.tree.map(repeated, (draft, target))
    draft = dataclasses.replace(draft, tokens=tokens)
    drafted = jnp.exp(jnp.sum(kernel.node_log_probs(draft), axis=1))
    return drafted[:, None, None] * analysis.outcome_law(rule, draft, target)


@jax.jit
def _coupled_tokens(keys, length, draft):
    """A chain's tokens, drawn with the target's own noise from the laws that they name."""
    position = length[:, None] + jnp.arange(draft.tree.size, dtype=jnp.int32)[None]
    return sampling.draw_target(keys, position, draft.log_probs[:, : draft.tree.size])


class _Check:
    """One rule and its randomness."""

    def __init__(self, rule, key, vocab_size, batch):
        self.rule, self.vocab_size, self.batch = rule, vocab_size, batch
        self.random = np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
        verdict_key, self.law_key = jax.random.split(key)
        self.keys = list(jax.random.split(verdict_key, (_ROUNDS, batch)))
        self.length = jnp.asarray(self.random.integers(1, 50, batch), jnp.int32)

    def demand(self, holds, complaint):
        if not holds:
            raise AssertionError(f"rule {self.rule.name!r}: {complaint}")

    def functions(self):
        for name in ("check", "accept", "residual", "prepare", "draw", "draw_law"):
            function = getattr(self.rule, name)
            complaint = None if function is None else static.fault(name, function)
            self.demand(complaint is None, complaint)

    def refusal(self, case) -> str | None:
        """Why the rule refuses a draft, None if it takes it."""
        try:
            self.rule.check(case.draft)
        except ValueError as error:
            return str(error)
        except Exception as error:
            raise AssertionError(
                f"rule {self.rule.name!r}: check of {case.name} raises {type(error).__name__} "
                f"({error}); refusals are ValueErrors"
            ) from error
        return None

    def answers(self, case, keys):
        weight = jnp.asarray(self.random.standard_normal(case.target.shape), jnp.float32)
        try:
            found = _answers(self.rule, keys, self.length, case.draft, case.target, weight)
        except (TypeError, ValueError, IndexError) as error:
            raise AssertionError(
                f"rule {self.rule.name!r}: takes {case.name}, and fails on them: {error}"
            ) from error
        return jax.device_get(found)

    def properties(self, case, is_first):
        answers = self.answers(case, self.keys[0])
        self.acceptances(case, answers["accept"])
        self.residuals(case, answers["residual"], answers["law"])
        self.draws(case, answers["verdict"].draws)
        for name, gradient in zip(("q", "p"), answers["gradients"], strict=True):
            bad = np.argwhere(~np.isfinite(gradient))
            self.demand(
                not len(bad),
                f"{case.name}: the gradient of the outcome law in log {name} is "
                f"{gradient[tuple(bad[0])] if len(bad) else 0} at {bad[:1].tolist()}",
            )
        self.dead_ends(case)
        if is_first:
            self.programs(case, answers["verdict"])

    def programs(self, case, verdict):
        """The verdict is the same in every kind of program and batch."""
        given = (self.keys[0], self.length, case.draft, case.target)
        eager = jax.device_get(verification.verify(self.rule, *given))
        self.equal(case, "without jit", eager, verdict)
        # Under vmap a branch becomes a selection of its operands, which the checker of keys takes
        # for a use.
        with jax.debug_key_reuse(False):
            self.equal(case, "under vmap", jax.device_get(_mapped(self.rule, *given)), verdict)
        rows = np.asarray([cases.GENERIC, cases.GENERIC + 1])
        few = jax.tree.map(lambda leaf: leaf[rows], given)
        alone = jax.jit(functools.partial(verification.verify, self.rule))(*few)
        wanted = jax.tree.map(lambda leaf: leaf[rows], verdict)
        self.equal(case, "in a batch of two", jax.device_get(alone), wanted)

    def acceptances(self, case, accept):
        shape = case.draft.tokens.shape
        self.demand(
            accept.shape == shape and accept.dtype == case.target.dtype,
            f"{case.name}: accept gives {accept.dtype}{list(accept.shape)}, not "
            f"{case.target.dtype}{list(shape)}",
        )
        for name, bad in (
            ("no probability", ~((accept >= 0) & (accept <= 1))),
            ("above 0 at an absent node", ~np.asarray(case.draft.present) & (accept != 0)),
        ):
            for row, node in np.argwhere(bad):
                raise AssertionError(
                    f"rule {self.rule.name!r}: {case.name}, row {row}, node {node + 1}: the "
                    f"acceptance {accept[row, node]} is {name}"
                )

    def residuals(self, case, residual, law):
        shape = case.target.shape
        self.demand(
            residual.shape == shape and residual.dtype == case.target.dtype,
            f"{case.name}: residual gives {residual.dtype} of [B, V] = {residual.shape[::2]}, not "
            f"{case.target.dtype} of {shape[::2]}",
        )
        mass = residual.sum(axis=-1, dtype=np.float64)
        stops = np.pad(np.asarray(case.draft.present), ((0, 0), (1, 0)), constant_values=True)
        # Where p and q differ by rounding alone, what is left is rounding, and a compiler that
        # takes it twice may round it twice; no text stops there but by rounding.
        reached = ~((mass > 0) & (law.sum(axis=-1, dtype=np.float64) <= _UNREACHED * mass))
        off = np.isnan(mass) | (stops & reached & ~(np.abs(mass - 1) <= _TOLERANCE))
        for row, node in np.argwhere(off):
            raise AssertionError(
                f"rule {self.rule.name!r}: {case.name}, row {row}: the residual after node {node} "
                f"has mass {mass[row, node]:.6g}, not 1"
            )

    def draws(self, case, draws):
        shape = case.target.shape[:2]
        self.demand(
            draws is None or (draws.shape == shape and draws.dtype == np.int32),
            f"{case.name}: draw does not give int32{list(shape)}",
        )

    def equal(self, case, program, found, wanted):
        for name in ("count", "next_token", "draws"):
            one, other = getattr(found, name), getattr(wanted, name)
            if one is not None and not np.array_equal(one, other):
                row = int(np.argwhere(one != other)[0][0])
                raise AssertionError(
                    f"rule {self.rule.name!r}: {case.name}, row {row}: {name} is {one[row]} "
                    f"{program}, and {other[row]} otherwise"
                )

    def dead_ends(self, case):
        """Where the target's law has no token nothing is accepted, and nothing drawn."""
        dead = np.arange(self.batch) % (case.draft.tree.size + 1)
        row = np.arange(self.batch)
        target = case.target.at[row, dead].set(-jnp.inf)
        answers = self.answers(dataclasses.replace(case, target=target), self.keys[0])
        accept, residual = answers["accept"], answers["residual"]
        below = np.asarray(trees.parents(case.draft.tree)) == dead[:, None]
        self.demand(
            not np.any(np.where(below, accept, 0)),
            f"{case.name}: a node is accepted below one after which the target has no token",
        )
        self.demand(
            not np.any(residual[row, dead]),
            f"{case.name}: the residual has a token where the target's law has none",
        )

    def frequencies(self, case):
        """Verdicts come as often as the outcome law says, for the one generic row.

        A coupled draft is made anew for every verdict, with its keys: then the law is that of the
        drafted tokens too.
        """

        def everywhere(leaf):
            return jnp.broadcast_to(leaf[cases.GENERIC : cases.GENERIC + 1], leaf.shape)

        draft, target = jax.tree.map(everywhere, (case.draft, case.target))
        coupled = draft.siblings == "coupled"
        same = dataclasses.replace(case, draft=draft, target=target)
        if coupled:
            law = np.asarray(_law_of_drafts(self.rule, draft, target), np.float64)
        else:
            law = self.answers(same, self.keys[0])["law"][:1].astype(np.float64)
        counts = np.zeros(law.shape)
        for keys in self.keys:
            number = np.zeros(self.batch, int)
            if coupled:
                tokens = _coupled_tokens(keys, self.length, draft)
                same = dataclasses.replace(same, draft=dataclasses.replace(draft, tokens=tokens))
                number = np.ravel_multi_index(
                    tuple(np.asarray(tokens).T), (self.vocab_size,) * draft.tree.size
                )
            verdict = self.answers(same, keys)["verdict"]
            path = np.pad(verdict.path, ((0, 0), (1, 0)))
            stop = np.take_along_axis(path, verdict.count[:, None], axis=1)[:, 0]
            np.add.at(counts, (number, stop, verdict.next_token), 1)
        self.as_expected(case, counts.sum(axis=0), law.sum(axis=0), "")
        for number in range(len(law)) if coupled else ():
            drafted = np.unravel_index(number, (self.vocab_size,) * draft.tree.size)
            after = f" after the draft {[int(token) for token in drafted]}"
            self.as_expected(case, counts[number], law[number], after)

    def as_expected(self, case, counts, law, after):
        """Demands counts [N+1, V] of outcomes that their law allows."""
        count = len(self.keys) * self.batch
        surprise = chance.surprise(counts, count * law, count * law * (1 - law))
        node, token = np.unravel_index(np.argmax(surprise), surprise.shape)
        self.demand(
            surprise[node, token] < chance.LIMIT,
            f"{case.name}: {int(counts[node, token])} of {count} verdicts stop at node {node} with "
            f"token {token}{after}, and by the outcome law {count * law[node, token]:.1f} were to "
            "be expected",
        )

    def certificate(self, case) -> str:
        """Certifies a kind of draft under laws sharp and flat; gives a line on the worst."""
        tree = case.topology
        depth = tree.max_depth
        found = []
        for index, concentration in enumerate((1.0, 0.3, 3.0, 1.0, 0.3, 3.0)):
            self.law_key, first, second = jax.random.split(self.law_key, 3)
            target = analysis.random_law(first, self.vocab_size, depth + 1, concentration)
            proposal = analysis.random_law(second, self.vocab_size, depth, concentration)
            # In the later half drafting stops after some paths, and others are dead ends.
            stops, ends = (
                [
                    (self.random.random(self.vocab_size**level) < 0.2) & (index > 2) & (level > 0)
                    for level in range(depth + 1)
                ]
                for _ in range(2)
            )
            target = [
                jnp.where(end[:, None], -jnp.inf, law)
                for end, law in zip(ends, target, strict=True)
            ]
            found.append(
                analysis.certify(
                    self.rule,
                    tree,
                    target,
                    *([] if case.draft.is_deterministic else [proposal]),
                    sources=case.sources,
                    siblings=case.draft.siblings,
                    absent=stops[:depth],
                    traced=case.draft.tree.static_parents is None,
                )
            )
        # numpy's maximum, to which a NaN is no small number.
        walk = np.max([certificate.walk_error for certificate in found])
        self.demand(
            walk <= 1e-6,
            f"{case.name}: the product of acceptances and residuals is off by {walk:.3g} from the "
            "enumeration of flags or draws",
        )
        worst = found[int(np.argmax([certificate.error for certificate in found]))]
        off = f"off by {worst.error:.3g}, {worst.total_variation:.3g} in total variation"
        self.demand(
            worst.passed or not self.rule.lossless,
            f"{case.name}: the law of texts of {depth + 1} tokens is {off}, and the rule says it "
            "is lossless",
        )
        kind = "exact" if worst.passed else f"lossy, {off}"
        accepted = found[0].expected_accepted
        return f"rule {self.rule.name!r}, {case.name}: {kind}; {accepted:.3f} accepted of {depth}"
