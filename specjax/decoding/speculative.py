"""The loop: propose, verify, commit, as one compiled program with ragged acceptance per row.

Leviathan et al. 2023 (arXiv 2211.17192, algorithm 1), generalised: any drafter, any rule, chains
and trees. Plain decoding is this loop with nothing drafted.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax import sampling, trees, types, verification
from specjax.decoding import finish as finishes
from specjax.decoding import state as states

__all__ = ["check_room", "pass_widths", "prefill", "propose", "run", "step"]


def prefill(
    target: types.LanguageModel,
    drafter: types.Drafter,
    state: states.DecodeState,
    cached: jax.Array,
    chunk: int,
) -> states.DecodeState:
    """Runs committed tokens through the target and the drafter, all but the last, in chunks.

    Args:
      target: the model.
      drafter: sees every chunk with the target's output.
      state: with text written up to `length`.
      cached: int32[B], tokens already in the caches.
      chunk: tokens a pass; a row's last chunk must end within the caches.
    """
    offset = jnp.arange(chunk, dtype=jnp.int32)[None]

    def more(carry):
        done, _, _ = carry
        return jnp.any(done < state.length - 1)

    def feed(carry):
        done, cache, drafter_state = carry
        count = jnp.clip(state.length - 1 - done, 0, chunk)
        place = jnp.minimum(done[:, None] + offset, state.tokens.shape[1] - 1)
        tokens = jnp.take_along_axis(state.tokens, place, axis=1)
        output, entries = target.apply(target.params, tokens, cache, None, drafter.taps)
        cache = target.commit(target.append(cache, entries), None, count)
        drafter_state = drafter.prefill(
            drafter.params, drafter_state, state.tokens, done, count, output
        )
        return done + count, cache, drafter_state

    with jax.named_scope("prefill"):
        _, cache, drafter_state = jax.lax.while_loop(
            more, feed, (cached, state.cache, state.drafter)
        )
    return dataclasses.replace(state, cache=cache, drafter=drafter_state)


def step(
    target: types.LanguageModel,
    drafter: types.Drafter,
    request: states.Request,
    state: states.DecodeState,
    rule: str | types.VerificationRule | None = None,
    *,
    laws: bool = False,
) -> tuple[states.DecodeState, states.StepInfo]:
    """One step: a draft, one pass of the target over [last token, nodes], and what it accepts.

    Args:
      target: the model whose law is kept.
      drafter: what proposes.
      request: constants of the decode.
      state: the carry; rows that have finished stay as they are.
      rule: None picks one by the draft's kind (`verification.default_rule`).
      laws: whether the `StepInfo` holds the law of every emitted token.

    Raises:
      ValueError: the rule cannot take the draft, the vocabularies differ, or the state's caches
        lack the room.
    """
    active = state.finish == states.FinishReason.RUNNING
    context = types.Context(
        state.tokens, state.length, active, request.sampling, target, state.cache, request.keys
    )
    with jax.named_scope("propose"):
        draft, drafter_state = propose(drafter, state.drafter, context, request.keys)
        # The token of an absent node means nothing; the pass still reads one.
        draft = dataclasses.replace(
            draft,
            present=draft.present & active[:, None],
            tokens=jnp.clip(draft.tokens, 0, target.vocab_size - 1),
        )
        _check(target, drafter, draft, state)
        rule = verification.default_rule(draft) if rule is None else verification.get(rule)

    with jax.named_scope("verify"):
        root = jnp.take_along_axis(state.tokens, state.length[:, None] - 1, axis=1)
        tokens = jnp.concatenate([root, draft.tokens], axis=1)
        output, entries, log_probs = _forward(target, request, state, tokens, draft, drafter.taps)
        verdict = verification.verify(rule, request.keys, state.length, draft, log_probs)

    with jax.named_scope("commit"):
        state, info, verdict = _commit(target, request, state, draft, verdict, entries)
        context = dataclasses.replace(
            context,
            tokens=state.tokens,
            length=state.length,
            active=info.emitted > 0,
            cache=state.cache,
        )
        if laws:
            nodes = jnp.pad(verdict.path, ((0, 0), (1, 0)))
            emitted_laws = jnp.take_along_axis(log_probs, nodes[:, :, None], axis=1)
            info = dataclasses.replace(info, log_probs=emitted_laws)
        after = drafter.update(drafter.params, drafter_state, context, draft, verdict, output)
        _check_form(drafter, state.drafter, after)
    return dataclasses.replace(state, drafter=after), info


def propose(
    drafter: types.Drafter, state: Any, context: types.Context, keys: jax.Array
) -> tuple[types.Draft, Any]:
    """The drafter's own `propose`.

    Raises:
      ValueError: it returns something else than a `Draft` and a state.
    """
    made = drafter.propose(drafter.params, state, context, keys)
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], types.Draft)):
        raise ValueError(
            f"drafter {drafter.name!r}: propose returned a {type(made).__name__}; it must return "
            "(draft, state), a types.Draft and the state, changed or not"
        )
    return made


def _check_form(drafter: types.Drafter, given: Any, returned: Any) -> None:
    wanted, found = jax.tree.structure(given), jax.tree.structure(returned)
    if wanted != found:
        raise ValueError(
            f"drafter {drafter.name!r}: update returned {found}, and the step began with a state "
            f"{wanted}; return the state, changed or not"
        )


def run(
    target: types.LanguageModel,
    drafter: types.Drafter,
    request: states.Request,
    state: states.DecodeState,
    statistics: states.Statistics,
    most_steps: jax.Array,
    rule: types.VerificationRule | None,
) -> tuple[states.DecodeState, states.Statistics]:
    """Steps until every row has finished, `most_steps` at the most."""

    def more(carry):
        taken, state, _ = carry
        return (taken < most_steps) & jnp.any(state.finish == states.FinishReason.RUNNING)

    def body(carry):
        taken, state, statistics = carry
        state, info = step(target, drafter, request, state, rule)
        return taken + 1, state, states.record(statistics, info)

    taken = jnp.zeros((), jnp.int32)
    _, state, statistics = jax.lax.while_loop(more, body, (taken, state, statistics))
    return state, statistics


def _check(
    target: types.LanguageModel,
    drafter: types.Drafter,
    draft: types.Draft,
    state: states.DecodeState,
) -> None:
    if draft.log_probs.shape[2] != target.vocab_size:
        raise ValueError(
            f"the draft's vocabulary has {draft.log_probs.shape[2]} tokens and the target's "
            f"{target.vocab_size}; both must share one tokenizer"
        )
    if draft.tree.size != drafter.nodes:
        raise ValueError(
            f"drafter {drafter.name!r} has nodes={drafter.nodes}, but drafted N={draft.tree.size}"
        )
    check_room(draft.tree.size, state)


def check_room(nodes: int, state: states.DecodeState) -> None:
    """Raises ValueError when the state's caches are too short for drafts of so many nodes."""
    if nodes + 1 > state.room:
        raise ValueError(
            f"a draft of N={nodes} nodes needs room={nodes + 1} in the caches, and the state has "
            f"room={state.room}; start the decode with this drafter"
        )


def pass_widths(nodes: int, is_chain: bool = True) -> tuple[int, ...]:
    """Tokens of a target's pass: its root, with what a draft of so many nodes may hold.

    A pass takes the least of them that holds every row's draft: nodes of a tree that are left out
    leave gaps, those of a chain none. Each is compiled, so there are few.
    """
    return (1, nodes // 2 + 1, nodes + 1) if is_chain and nodes >= 4 else (1, nodes + 1)


def _forward(
    target: types.LanguageModel,
    request: states.Request,
    state: states.DecodeState,
    tokens: jax.Array,
    draft: types.Draft,
    taps: tuple[int, ...],
) -> tuple[types.ModelOutput, Any, jax.Array]:
    """The target's pass over root and nodes, or over those first ones that some row drafted.

    Returns:
      Its output and entries, and its warped laws, [B, N+1, V]; zeros for the nodes left out, which
      nobody may read.
    """
    size = draft.tree.size
    past = sampling.history(state.tokens, state.length, draft.tree, draft.tokens)

    def of(width: int, tree: trees.Tree | None) -> tuple[types.ModelOutput, Any, jax.Array]:
        output, entries = target.apply(target.params, tokens[:, :width], state.cache, tree, taps)
        before = dataclasses.replace(past, path=past.path[:, :width], depth=past.depth[:, :width])
        return output, entries, sampling.warp(request.sampling, output.logits, before)

    whole = functools.partial(of, size + 1, draft.tree)
    if size == 0 or draft.passengers:
        return whole()

    def first(width: int) -> tuple[types.ModelOutput, Any, jax.Array]:
        def fill(leaf):
            return jnp.pad(leaf, [(0, 0), (0, 1 + size - width)] + [(0, 0)] * (leaf.ndim - 2))

        return jax.tree.map(fill, of(width, None if width == 1 else trees.chain(width - 1)))

    widths = pass_widths(size, draft.tree.is_chain)
    needed = 1 + jnp.max(jnp.sum(draft.present, axis=1, dtype=jnp.int32))
    shortest = jnp.sum(needed > np.asarray(widths[:-1], np.int32), dtype=jnp.int32)
    # The branches read the cache and return entries only: a cache returned from a branch would be
    # copied.
    shorter = [functools.partial(first, width) for width in widths[:-1]]
    return jax.lax.switch(shortest, [*shorter, whole])


def _commit(
    target: types.LanguageModel,
    request: states.Request,
    state: states.DecodeState,
    draft: types.Draft,
    verdict: types.Verdict,
    entries: Any,
) -> tuple[states.DecodeState, states.StepInfo, types.Verdict]:
    """Writes what was accepted, through the text's first end; the verdict comes back cut there."""
    active = state.finish == states.FinishReason.RUNNING
    depth = draft.tree.max_depth
    order = jnp.arange(depth + 1, dtype=jnp.int32)[None]
    accepted = jnp.take_along_axis(draft.tokens, jnp.maximum(verdict.path - 1, 0), axis=1)
    is_draft = order < verdict.count[:, None]
    offered = jnp.where(is_draft, jnp.pad(accepted, ((0, 0), (0, 1))), verdict.next_token[:, None])
    # Rows that have finished write nothing: their slots are out of range.
    capacity = state.tokens.shape[1]
    row = jnp.arange(offered.shape[0], dtype=jnp.int32)[:, None]
    place = jnp.where(active[:, None], state.length[:, None] + order, capacity)
    text = state.tokens.at[row, place].set(offered, mode="drop")
    is_dead_end = verdict.next_token < 0
    offers = verdict.count + jnp.where(is_dead_end, 0, 1).astype(jnp.int32)
    kept, reason = finishes.close(request, text, state.stop_from, state.length, offers, depth + 1)
    running = reason == states.FinishReason.RUNNING
    reason = jnp.where(running & is_dead_end, np.int32(states.FinishReason.DEAD_END), reason)
    kept = jnp.where(active, kept, 0)
    # Now that the end is known, nothing is written past it.
    place = jnp.where(order < kept[:, None], place, capacity)
    text = state.tokens.at[row, place].set(offered, mode="drop")

    nodes = jnp.pad(verdict.path, ((0, 0), (1, 0)))
    cache = target.append(state.cache, entries)
    cache = target.commit(cache, None if draft.tree.is_chain else nodes, kept)

    stop = jnp.take_along_axis(nodes, verdict.count[:, None], axis=1)[:, 0]
    refused = jnp.any(verification.children(draft, stop), axis=-1) & (kept == offers)
    accepted_count = jnp.minimum(verdict.count, kept)
    levels = jnp.where(draft.present, trees.depths(draft.tree)[:, 1:], 0)
    info = states.StepInfo(
        tokens=offered,
        log_probs=None,
        emitted=kept,
        accepted=accepted_count,
        tested=order[:, :depth] < (accepted_count + refused.astype(jnp.int32))[:, None],
        drafted=jnp.sum(draft.present, axis=-1, dtype=jnp.int32),
        draft_steps=jnp.max(levels, axis=-1, initial=0),
        active=active,
    )
    count = jnp.maximum(kept - 1, 0)
    verdict = dataclasses.replace(
        verdict, count=count, next_token=jnp.take_along_axis(offered, count[:, None], axis=1)[:, 0]
    )
    state = dataclasses.replace(
        state,
        tokens=text,
        length=state.length + kept,
        finish=jnp.where(active, reason, state.finish),
        cache=cache,
    )
    return state, info, verdict
