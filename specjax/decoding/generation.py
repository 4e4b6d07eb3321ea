"""The entry points: `generate`, `autoregressive`, `stream`, and `decode` after an `init`."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from specjax import types, verification
from specjax.decoding import plain, requests, speculative, start
from specjax.decoding import state as states

__all__ = [
    "Form",
    "TokenStream",
    "advance",
    "as_result",
    "autoregressive",
    "decode",
    "first_draft",
    "form_of",
    "generate",
    "rule_for",
    "stream",
]


def generate(
    target: types.LanguageModel,
    drafter: types.Drafter,
    prompts: requests.Prompts,
    *,
    rule: str | types.VerificationRule | None = None,
    **options: Any,
) -> states.DecodeResult:
    """Decodes speculatively; the text has the law of plain decoding.

    Args:
      target: the model whose law is kept.
      drafter: what proposes.
      prompts: one list of token ids a row, or int[B, P] with `lengths`. With `state`, tokens to
        append to each row (a row may be empty: it simply goes on).
      rule: a verification rule or its name; None picks one by the draft's kind.
      **options: see `init`.

    Returns:
      A `DecodeResult`. At temperature 0 under every rule, and at any temperature under `match`, the
      text is that of `autoregressive` with the same key; under the other rules it has the same law.

    Raises:
      ValueError: a bad option, an empty prompt, a text that does not fit, or a rule that cannot
        take the draft.
    """
    # First of all, since a state to go on from is consumed by what follows.
    chosen = rule_for(target, drafter, rule)
    return decode(target, drafter, *start.init(target, drafter, prompts, **options), chosen)


def decode(
    target: types.LanguageModel,
    drafter: types.Drafter,
    request: states.Request,
    state: states.DecodeState,
    rule: str | types.VerificationRule | None = None,
) -> states.DecodeResult:
    """Runs the compiled loop until every row has finished.

    Args:
      target, drafter, request: as given to and by `init`.
      state: consumed (its buffers are donated).
      rule: as in `generate`.
    """
    # Every step emits a token or ends a row, so a decode takes at most as many as the text has
    # room for.
    steps = max(int(state.tokens.shape[1]), 1)
    return as_result(*advance(target, drafter, request, state, rule, steps))


def advance(
    target: types.LanguageModel,
    drafter: types.Drafter,
    request: states.Request,
    state: states.DecodeState,
    rule: str | types.VerificationRule | None = None,
    steps: int = 1,
) -> tuple[states.DecodeState, states.Statistics]:
    """Some steps of a decode, fewer where every row finishes before.

    Args:
      target, drafter, request, state, rule: as in `decode`.
      steps: target steps at the most.

    Returns:
      The state, and the counts of these steps alone.
    """
    requests.check(target, drafter, state)
    form = form_of(target, drafter, rule)
    statistics = states.no_statistics(state.length.shape[0], form.depth, drafter.nodes)
    most_steps = jnp.asarray(types.whole("steps", steps, 1), jnp.int32)
    return _run(target, drafter, request, state, statistics, most_steps, form.rule)


def autoregressive(
    target: types.LanguageModel, prompts: requests.Prompts, **options: Any
) -> states.DecodeResult:
    """Plain decoding, one token a step: the baseline, and the law that everything else keeps.

    Args and raises: as `generate`.
    """
    return generate(target, plain.NOTHING, prompts, rule="match", **options)


def stream(
    target: types.LanguageModel,
    drafter: types.Drafter,
    prompts: requests.Prompts,
    *,
    rule: str | types.VerificationRule | None = None,
    steps: int = 1,
    **options: Any,
) -> "TokenStream":
    """Decodes as `generate` does and yields tokens as they are accepted.

    Args:
      steps: target steps between two yields.
      The others: as `generate`.

    Raises:
      ValueError: as `generate`, or `steps` below 1.
    """
    chosen, steps = rule_for(target, drafter, rule), types.whole("steps", steps, 1)
    request, state = start.init(target, drafter, prompts, **options)
    return TokenStream(target, drafter, request, state, chosen, steps)


class TokenStream(Iterator[list[list[int]]]):
    """A decode under way: an iterator of one list of new tokens a row, empty for a finished row.

    `result` may be asked for at any time, so a stream can be left early and its text gone on with.

    Args:
      target, drafter, request: as given to and by `init`.
      state: consumed.
      rule: as in `generate`.
      steps: target steps between two yields.
    """

    def __init__(
        self,
        target: types.LanguageModel,
        drafter: types.Drafter,
        request: states.Request,
        state: states.DecodeState,
        rule: str | types.VerificationRule | None = None,
        steps: int = 1,
    ):
        requests.check(target, drafter, state)
        form = form_of(target, drafter, rule)
        self._models, self._request, self._rule = (target, drafter), request, form.rule
        self._steps = jnp.asarray(types.whole("steps", steps, 1), jnp.int32)
        self._state = state
        self._statistics = states.no_statistics(state.length.shape[0], form.depth, drafter.nodes)
        self._shown = np.asarray(state.length)

    def __next__(self) -> list[list[int]]:
        requests.check(*self._models, self._state)
        if not np.any(np.asarray(self._state.finish) == states.FinishReason.RUNNING):
            raise StopIteration
        self._advance()
        length, tokens = np.asarray(self._state.length), np.asarray(self._state.tokens)
        rows = zip(tokens, self._shown, length, strict=True)
        new = [row[begin:end].tolist() for row, begin, end in rows]
        self._shown = length
        return new

    def _advance(self) -> None:
        self._state, self._statistics = _run(
            *self._models, self._request, self._state, self._statistics, self._steps, self._rule
        )

    @property
    def result(self) -> states.DecodeResult:
        """The decode so far; its state goes on, after which this stream cannot."""
        return as_result(self._state, jax.tree.map(jnp.copy, self._statistics))


def rule_for(
    target: types.LanguageModel,
    drafter: types.Drafter,
    rule: str | types.VerificationRule | None = None,
) -> types.VerificationRule:
    """The rule that `generate` would use with this drafter.

    Raises:
      ValueError: the rule asked for cannot take the drafter's drafts, or no rule has this name.
    """
    return form_of(target, drafter, rule).rule


@struct.dataclass
class Form:
    """What is static in a draft: the rule that takes it, and its depth D."""

    rule: types.VerificationRule = struct.field(pytree_node=False)
    depth: int = struct.field(pytree_node=False)


def form_of(
    target: types.LanguageModel,
    drafter: types.Drafter,
    rule: str | types.VerificationRule | None = None,
) -> Form:
    """Of the drafter's drafts, with the rule that `generate` would use; raises as `rule_for`."""
    requests.check(target, drafter)
    return _traced_form(target, drafter, None if rule is None else verification.get(rule))


# Compiled only so that the drafter is traced once: the program is empty.
@functools.partial(jax.jit, static_argnames=("rule",))
def _traced_form(target, drafter, rule: types.VerificationRule | None) -> Form:
    draft = first_draft(target, drafter)
    rule = verification.default_rule(draft) if rule is None else rule
    verification.check(rule, draft)
    return Form(rule, draft.tree.max_depth)


def first_draft(target: types.LanguageModel, drafter: types.Drafter) -> types.Draft:
    """What the drafter drafts for a text of one token, in a batch of one.

    To be traced for its form (`jax.eval_shape`): nothing of it depends on any request.
    """
    one = jnp.ones((1,), jnp.int32)
    slots = drafter.nodes + 2
    context = types.Context(
        tokens=jnp.zeros((1, slots), jnp.int32),
        length=one,
        active=one > 0,
        sampling=types.Sampling(jnp.zeros((1,), jnp.float32)),
        target=target,
        cache=target.init_cache(1, 2 * slots),
        keys=requests.request_keys(None, None, 1),
    )
    memory = drafter.init(drafter.params, 1, 2 * slots)
    return speculative.propose(drafter, memory, context, context.keys)[0]


_run = jax.jit(speculative.run, static_argnames=("rule",), donate_argnames=("state", "statistics"))


def as_result(state: states.DecodeState, statistics: states.Statistics) -> states.DecodeResult:
    """What a decode gave so far, from which it can go on."""
    # Copies, since going on from the state donates its buffers.
    return states.DecodeResult(
        tokens=jnp.copy(state.tokens),
        start=jnp.copy(state.start),
        length=jnp.copy(state.length),
        finish=jnp.copy(state.finish),
        statistics=statistics,
        state=state,
    )
