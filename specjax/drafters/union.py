"""The trees of several drafters under one root (SpecInfer: Miao et al. 2024, arXiv 2305.09781).

Every part drafts for itself, and one pass of the target verifies all. Siblings stand in the order
of the parts, each with the law it was drawn from; what two parts agree on is drafted twice.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax import sampling, trees, types

__all__ = ["union"]


def union(*parts: types.Drafter) -> types.Drafter:
    """Merges the drafts of several drafters; the earlier ones' come first.

    A part whose draft was not accepted lags behind the text, and catches up by itself.

    Args:
      *parts: two or more; what they draw at random is drawn independently (or all of it coupled to
        the target), since siblings without replacement share one law.

    Raises:
      ValueError: fewer than two parts; a part that reads the target's features, since those of
        other parts' accepted nodes would be lost to it; or, when drafting, parts whose siblings do
        not go together.
    """
    if len(parts) < 2:
        raise ValueError(f"a union of {len(parts)} drafters; give at least two")
    # A union of unions is one union: each part must see the text as it is.
    parts = tuple(
        own for part in parts for own in (part.params if part.propose is _propose else (part,))
    )
    for part in parts:
        if part.taps:
            raise ValueError(
                f"drafter {part.name!r} reads features (taps={part.taps}), and a union cannot give "
                "it those of nodes that another drafted; leave it out"
            )
    return types.Drafter(
        params=parts,
        init=_init,
        prefill=_prefill,
        propose=_propose,
        update=_update,
        nodes=sum(part.nodes for part in parts),
        name="+".join(part.name for part in parts),
    )


def _init(params: tuple[types.Drafter, ...], batch: int, capacity: int) -> tuple[Any, ...]:
    return tuple(part.init(part.params, batch, capacity) for part in params)


def _prefill(params, state, text, start, count, output) -> tuple[Any, ...]:
    return tuple(
        part.prefill(part.params, of_part, text, start, count, output)
        for part, of_part in zip(params, state, strict=True)
    )


def _propose(params, state, context, keys) -> tuple[types.Draft, tuple[Any, ...]]:
    drafts, states = [], []
    for place, (part, of_part) in enumerate(zip(params, state, strict=True)):
        # Siblings of different parts must be drawn independently.
        own = sampling.derive(keys, sampling.Stream.UNION, jnp.full(keys.shape, place, jnp.int32))
        draft, of_part = part.propose(part.params, of_part, context, own)
        drafts.append(draft)
        states.append(of_part)
    return _merge(drafts), tuple(states)


def _merge(drafts: list[types.Draft]) -> types.Draft:
    """One draft of all nodes; a part's nodes keep their order, and hang on the one root."""
    kinds = {draft.siblings for draft in drafts if not draft.is_deterministic}
    if len(kinds) > 1 or "distinct" in kinds:
        raise ValueError(
            f"the parts of this union draw their siblings {' and '.join(sorted(kinds))}; in a "
            "union all must be independent (give drafters.tree replacement=True), or all coupled"
        )
    offsets, first_laws = _offsets(drafts), np.cumsum([0, *(d.log_probs.shape[1] for d in drafts)])
    law = [
        jnp.where(draft.law < 0, -1, draft.law + first)
        for draft, first in zip(drafts, first_laws[:-1].tolist(), strict=True)
    ]
    sampled = [draft.log_probs for draft in drafts if not draft.is_deterministic]
    return types.draft(
        jnp.concatenate([draft.tokens for draft in drafts], axis=1),
        _merged_tree([draft.tree for draft in drafts], offsets),
        log_probs=jnp.concatenate(sampled, axis=1) if sampled else None,
        law=jnp.concatenate(law, axis=1),
        present=jnp.concatenate([draft.present for draft in drafts], axis=1),
        vocab_size=drafts[0].log_probs.shape[2],
        siblings=kinds.pop() if kinds else "independent",
        sibling_laws=sum(draft.sibling_laws for draft in drafts),
        passengers=any(draft.passengers for draft in drafts),
    )


def _offsets(drafts) -> list[int]:
    """How far each part's node numbers move, and the total."""
    return np.cumsum([0, *(draft.tokens.shape[1] for draft in drafts)]).tolist()


def _merged_tree(parts: list[trees.Tree], offsets: list[int]) -> trees.Tree:
    """Children of a part's root hang on the common one; static if all parts are."""
    if all(part.static_parents is not None for part in parts):
        return trees.from_parents(
            [
                parent and parent + offset
                for part, offset in zip(parts, offsets, strict=False)
                for parent in part.static_parents or ()
            ]
        )
    tables = [trees.parents(part) for part in parts]
    batch = max(table.shape[0] for table in tables)
    moved = [
        jnp.broadcast_to(jnp.where(table > 0, table + offset, 0), (batch, table.shape[1]))
        for table, offset in zip(tables, offsets, strict=False)
    ]
    return trees.dynamic(jnp.concatenate(moved, axis=1), max(part.max_depth for part in parts))


def _update(params, state, context, draft, verdict, output) -> tuple[Any, ...]:
    states, offset = [], 0
    # A row emitted count + 1 tokens; the text before them ends here.
    start = context.length - verdict.count - 1
    for part, of_part in zip(params, state, strict=True):
        nodes = slice(offset, offset + part.nodes)
        own = _part(draft, nodes)
        mine = (verdict.path > nodes.start) & (verdict.path <= nodes.stop)
        order = jnp.arange(verdict.path.shape[1], dtype=jnp.int32)[None]
        mine = mine & (order < verdict.count[:, None])
        count = jnp.sum(mine, axis=1, dtype=jnp.int32)
        place = (start + count)[:, None]
        place = jnp.clip(place, 0, context.tokens.shape[1] - 1)
        # The root and the part's own nodes.
        rows = np.asarray([0, *range(nodes.start + 1, nodes.stop + 1)])
        of_rows = jax.tree.map(lambda leaf, rows=rows: leaf[:, rows], output)
        of_part = part.update(
            part.params,
            of_part,
            context,
            own,
            types.Verdict(
                path=(verdict.path - nodes.start)[:, : own.tree.max_depth],
                count=count,
                next_token=jnp.take_along_axis(context.tokens, place, axis=1)[:, 0],
                draws=None if verdict.draws is None else verdict.draws[:, rows],
            ),
            of_rows,
        )
        states.append(of_part)
        offset = nodes.stop
    return tuple(states)


def _part(draft: types.Draft, nodes: slice) -> types.Draft:
    """The nodes of one part as its own draft; the laws are those of all parts."""
    topology = draft.tree.static_parents
    if topology is not None:
        own = [max(parent - nodes.start, 0) for parent in topology[nodes]]
        tree = trees.from_parents(own)
    else:
        own = jnp.maximum(trees.parents(draft.tree)[:, nodes] - nodes.start, 0)
        tree = trees.dynamic(own, draft.tree.max_depth)
    return dataclasses.replace(
        draft,
        tokens=draft.tokens[:, nodes],
        present=draft.present[:, nodes],
        law=draft.law[:, nodes],
        tree=tree,
    )
