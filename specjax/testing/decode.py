"""Holds whole decodes of a drafter, under every rule that takes its drafts, to their promises.

`check_drafter` looks at drafts and `check_rule` at verdicts; this looks at the texts that both make
together, and at what is counted of them.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax import decoding, types, verification

__all__ = ["check_decoding"]

_TEMPERATURES = (0.0, 0.8, 1.2, 0.5)


def check_decoding(
    drafter: types.Drafter,
    target: types.LanguageModel,
    key: jax.Array,
    prompts: Sequence[Sequence[int]],
    *,
    rules: Sequence[str | types.VerificationRule] | None = None,
    new_tokens: int = 24,
    least_acceptance: float = 0.0,
) -> str:
    """Decodes prompts by a drafter under rules, and checks texts, ends and counts.

    Held against plain decoding: every text of a rule with draws of the target's (`match`,
    `coupled`), and every rule's text at temperature 0. Held for every rule: a text ends with its
    first end-of-sequence token or at its limit, and says which; what is counted is what was
    written; a second request compiles nothing. Under the rule that is the drafts' default, a row in
    a batch of other temperatures, lengths and ends writes what it writes alone.

    Args:
      drafter: any drafter.
      target: the model it drafts for; a small one.
      key: a typed key, consumed; the rows' keys come of it.
      prompts: at least two, on which it drafts; the temperatures 0, 0.8, 1.2 and 0.5 go in turns.
      rules: rules or names; default all lossless ones, less those that refuse the drafts.
      new_tokens: limit of the longest row.
      least_acceptance: accepted over tested drafts that every rule must reach, in [0, 1].

    Returns:
      A line for every rule: acceptance rate and τ, or why it refuses the drafts.

    Raises:
      AssertionError: something does not hold; the message names the rule, the row and the values.
      ValueError: fewer than two prompts, or none of the rules takes the drafts.
    """
    if len(prompts) < 2:
        raise ValueError(f"need at least 2 prompts, got {len(prompts)}")
    check = _Check(drafter, target, key, prompts, new_tokens)
    lines, checked = [], 0
    for rule in verification.RULES.values() if rules is None else map(verification.get, rules):
        try:
            decoding.rule_for(target, drafter, rule)
        except verification.RefusedDraftError as refusal:
            lines.append(f"{drafter.name}, {rule.name}: refused, {refusal}")
            continue
        lines.append(check.rule(rule, least_acceptance))
        checked += 1
    if not checked:
        raise ValueError("no rule takes these drafts:\n" + "\n".join(lines))
    return "\n".join(lines)


class _Check:
    """One drafter, and what plain decoding writes."""

    def __init__(self, drafter, target, key, prompts, new_tokens: int):
        self.traces = collections.Counter()
        self.name, self.target, self.prompts = drafter.name, target, [list(p) for p in prompts]
        self.drafter = dataclasses.replace(drafter, propose=_Counted(drafter.propose, self.traces))
        self.default = decoding.rule_for(target, drafter)
        rows = range(len(prompts))
        self.options: dict[str, Any] = {
            "keys": jax.random.split(key, len(prompts)),
            "sampling": types.Sampling([_TEMPERATURES[row % 4] for row in rows]),
            "max_new_tokens": [max(1, new_tokens - row) for row in rows],
            "capacity": max(map(len, prompts)) + new_tokens,
            "eos": [[] for _ in rows],
        }
        without = decoding.autoregressive(target, self.prompts, **self.options).new_tokens
        # Every other row ends at a token that it is known to write, in the middle of its text.
        self.options["eos"] = [
            [text[len(text) // 2]] if row % 2 else [] for row, text in enumerate(without)
        ]
        self.plain = decoding.autoregressive(target, self.prompts, **self.options)
        self.ends(self.plain, "plain decoding")

    def demand(self, holds, complaint: str):
        if not holds:
            raise AssertionError(f"drafter {self.name!r}, {complaint}")

    def rule(self, rule: types.VerificationRule, least_acceptance: float) -> str:
        name = f"rule {rule.name!r}"
        result = self.decode(rule, self.prompts, self.options)
        self.ends(result, name)
        self.counts(result, name)
        for row, (text, wanted) in enumerate(
            zip(result.new_tokens, self.plain.new_tokens, strict=True)
        ):
            temperature = _TEMPERATURES[row % 4]
            if rule.draw is not None or temperature == 0.0:
                self.demand(
                    text == wanted or not rule.lossless,
                    f"{name}: row {row} at temperature {temperature} writes {text}, and plain "
                    f"decoding {wanted}",
                )
        if rule == self.default:
            self.alone(rule, result, name)
        before = self.traces.total()
        other = {**self.options, "eos": [[] for _ in self.prompts]}
        other["keys"] = _keys(self.options["keys"], reversed(range(len(self.prompts))))
        other["sampling"] = types.Sampling([0.9] * len(self.prompts))
        again = self.decode(rule, self.prompts, other)
        self.demand(
            self.traces.total() == before,
            f"{name}: other keys, temperatures and ends traced propose again",
        )
        self.ends(again, name, other)
        self.counts(again, name)
        rate = again.statistics.acceptance_rate
        self.demand(
            np.isnan(rate) and least_acceptance == 0 or rate >= least_acceptance,
            f"{name}: acceptance rate {rate:.3f}, below {least_acceptance}",
        )
        tau = again.statistics.tau
        return f"{self.name}, {rule.name}: acceptance rate {rate:.3f}, τ {tau:.2f}"

    def decode(self, rule, prompts, options) -> decoding.DecodeResult:
        return decoding.generate(self.target, self.drafter, prompts, rule=rule, **options)

    def alone(self, rule, result, name):
        """The last row writes by itself what it wrote in the batch."""
        row = len(self.prompts) - 1
        options = {
            "keys": _keys(self.options["keys"], [row]),
            "sampling": types.Sampling([_TEMPERATURES[row % 4]]),
            "max_new_tokens": self.options["max_new_tokens"][row:],
            "capacity": self.options["capacity"],
            "eos": self.options["eos"][row:],
        }
        (text,) = self.decode(rule, self.prompts[row:], options).new_tokens
        wanted = result.new_tokens[row]
        self.demand(
            text == wanted, f"{name}: row {row} writes {wanted} in the batch, and {text} alone"
        )

    def ends(self, result, name, options=None):
        """A text ends at its first end-of-sequence token or its limit, and the reason is told."""
        options = self.options if options is None else options
        rows = zip(
            result.new_tokens,
            result.finish_reasons,
            options["eos"],
            options["max_new_tokens"],
            strict=True,
        )
        for row, (text, reason, eos, limit) in enumerate(rows):
            first = next((place for place, token in enumerate(text) if token in eos), None)
            wanted = "length" if first is None else "eos"
            length = limit if first is None else first + 1
            self.demand(
                len(text) == length and reason == wanted,
                f"{name}: row {row} ends after {len(text)} tokens for {reason!r}; eos={eos} and "
                f"its limit {limit} say after {length} for {wanted!r}, of {text}",
            )

    def counts(self, result, name):
        """What is counted is what was written, and no draft is accepted that was not tested."""
        counts = jax.device_get(result.statistics)
        depth = np.arange(counts.histogram.shape[1])
        for row, text in enumerate(result.new_tokens):
            steps, accepted = int(counts.target_steps[row]), int(counts.accepted[row].sum())
            emitted, drafted = int(counts.emitted[row]), int(counts.nodes_drafted[row])
            tested, histogram = counts.tested[row], counts.histogram[row]
            facts = {
                f"emitted={emitted}": emitted == len(text),
                f"histogram={histogram} of {steps} steps and {accepted} accepted": (
                    histogram.sum() == steps and (depth * histogram).sum() == accepted
                ),
                # A step writes what it accepts and one token more, unless the text ends before.
                f"{accepted} accepted in {steps} steps": (
                    accepted + steps - 1 <= len(text) <= accepted + steps
                ),
                f"{counts.accepted[row]} accepted of {tested} tested of {drafted} drafted": (
                    np.all(counts.accepted[row] <= tested) and tested.sum() <= drafted
                ),
            }
            for fact, holds in facts.items():
                self.demand(holds, f"{name}: row {row} wrote {len(text)} tokens, and has {fact}")


def _keys(keys: jax.Array, rows: Iterable[int]) -> jax.Array:
    return keys[jnp.asarray(list(rows))]


@dataclasses.dataclass(frozen=True, eq=False)
class _Counted:
    """A function that counts how often it is traced."""

    function: Callable[..., Any]
    traces: collections.Counter

    def __call__(self, *given):
        self.traces["propose"] += 1
        return self.function(*given)
