"""The entry points: `generate`, `autoregressive`, `stream`, and `decode` after an `init`."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax import types, verification
from specjax.decoding import plain, requests, speculative, start
from specjax.decoding import state as states

__all__ = ["autoregressive", "decode", "generate", "rule_for", "stream"]


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
    chosen = _chosen(target, drafter, rule, options)
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
    chosen = None if rule is None else verification.get(rule)
    statistics = _no_statistics(target, drafter, request, state)
    # Every step emits a token, so a decode takes at most as many steps as the text has room for.
    most_steps = jnp.asarray(state.tokens.shape[1], jnp.int32)
    state, statistics = _run(target, drafter, request, state, statistics, most_steps, chosen)
    return _result(state, statistics)


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
) -> Iterator[list[list[int]]]:
    """Decodes as `generate` does and yields tokens as they are accepted.

    Args:
      steps: target steps between two yields.
      The others: as `generate`.

    Yields:
      One list of new tokens a row, empty for a row that has finished. The generator's value is the
      `DecodeResult`.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1")
    chosen = _chosen(target, drafter, rule, options)
    request, state = start.init(target, drafter, prompts, **options)
    statistics = _no_statistics(target, drafter, request, state)
    return _stream(target, drafter, request, state, statistics, chosen, steps)


def _chosen(target, drafter, rule, options) -> types.VerificationRule | None:
    """The rule asked for, if any; a rule that would fail must fail before a state is consumed."""
    if rule is None:
        return None
    if options.get("state") is not None:
        return rule_for(target, drafter, rule)
    return verification.get(rule)


def _stream(target, drafter, request, state, statistics, rule, steps):
    most_steps = jnp.asarray(steps, jnp.int32)
    shown = np.asarray(state.length)
    while np.any(np.asarray(state.finish) == states.FinishReason.RUNNING):
        state, statistics = _run(target, drafter, request, state, statistics, most_steps, rule)
        length, tokens = np.asarray(state.length), np.asarray(state.tokens)
        yield [tokens[row, shown[row] : length[row]].tolist() for row in range(len(length))]
        shown = length
    return _result(state, statistics)


def rule_for(
    target: types.LanguageModel,
    drafter: types.Drafter,
    rule: str | types.VerificationRule | None = None,
) -> types.VerificationRule:
    """The rule that `generate` would use with this drafter.

    Raises:
      ValueError: the rule asked for cannot take the drafter's drafts.
    """

    def begin(target, drafter):
        return start.init(target, drafter, [[0]], max_new_tokens=1)

    request, state = jax.eval_shape(begin, target, drafter)
    draft = _abstract_draft(target, drafter, request, state)
    chosen = verification.default_rule(draft) if rule is None else verification.get(rule)
    verification.check(chosen, draft)
    return chosen


def _abstract_draft(target, drafter, request, state) -> types.Draft:
    def propose(target, drafter, request, state):
        context = types.Context(
            state.tokens,
            state.length,
            state.finish == states.FinishReason.RUNNING,
            request.sampling,
            target,
            state.cache,
        )
        return drafter.propose(drafter.params, state.drafter, context, request.keys)[0]

    return jax.eval_shape(propose, target, drafter, request, state)


@jax.jit
def _no_statistics(target, drafter, request, state) -> states.Statistics:
    depth = _abstract_draft(target, drafter, request, state).tree.max_depth
    return states.no_statistics(state.length.shape[0], depth)


_run = jax.jit(speculative.run, static_argnames=("rule",), donate_argnames=("state", "statistics"))


def _result(state: states.DecodeState, statistics: states.Statistics) -> states.DecodeResult:
    # Copies, since going on from the state donates its buffers.
    return states.DecodeResult(
        tokens=jnp.copy(state.tokens),
        start=jnp.copy(state.start),
        length=jnp.copy(state.length),
        finish=jnp.copy(state.finish),
        statistics=statistics,
        state=state,
    )
