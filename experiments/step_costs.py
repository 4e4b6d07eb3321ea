"""What a target's passes and a drafter's drafts cost here, for choosing a draft length."""

import dataclasses

import numpy as np

from experiments import measure
from specjax import decoding, types

__all__ = ["measured", "measured_with_seconds"]

# Every width that a draft length here asks for: between them a line is drawn, beyond them none.
_WIDTHS = (1, 2, 3, 4, 6, 9)
_FILL = 160
_REPEATS = 5


def measured(target: types.LanguageModel, drafter: types.Drafter) -> decoding.Cost:
    """As `measured_with_seconds`, without the seconds."""
    return measured_with_seconds(target, drafter)[0]


def measured_with_seconds(
    target: types.LanguageModel, drafter: types.Drafter, repeats: int = _REPEATS
) -> tuple[decoding.Cost, float]:
    """Measures, in turn, passes of several widths, a draft and whole steps; takes some seconds.

    A wider pass is held to cost no less than a narrower one: what says otherwise is noise, and a
    choice among lengths would fall for it. What a step takes beside its draft and its pass is the
    overhead.

    Args:
      target: with a key/value cache.
      drafter: of chains that never stops; a drafted token costs its draft divided by its nodes.
      repeats: rounds.

    Returns:
      The costs in plain steps, and the seconds of a plain step.
    """
    limit = target.context_length or 2 * _FILL
    fill = min(_FILL, limit // 2)
    widths = sorted({*_WIDTHS, drafter.nodes + 1})
    cache = target.init_cache(1, fill + max(widths))
    variants: dict[str | int, measure.Variant] = {
        width: measure.forward(target, width, fill, cache) for width in widths
    }
    prompt = measure.copying_prompt(target.vocab_size, fill)
    variants["draft"] = measure.proposal(target, drafter, prompt)
    variants["step"] = measure.steps(target, drafter, prompt)
    found = measure.interleave(variants, repeats)
    plain = found[1].median
    passes = np.maximum.accumulate([found[width].median for width in widths]) / plain
    cost = decoding.Cost(
        found["draft"].median / plain / drafter.nodes,
        tuple(zip(widths, passes.tolist(), strict=True)),
    )
    whole = found["step"].median / plain
    beside = max(whole - cost.of_step(drafter.nodes, drafter.nodes + 1), 0.0)
    return dataclasses.replace(cost, overhead=beside), plain
