"""What a target's passes and drafters' drafts cost here, for choosing drafts and lengths."""

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from scipy import optimize

from experiments import measure
from specjax import decoding, types

__all__ = ["FILL", "LENGTHS", "WIDTHS", "measured", "of_all"]

# Draft lengths to choose among, and widths that tell their passes; between them a line is drawn.
LENGTHS = (1, 2, 3, 4, 5, 6, 8)
WIDTHS = (1, 2, 4, 5, 7, 9)
FILL = 160
_REPEATS = 5
# Steps of one row that are timed together, so that a run takes a while; of more rows fewer.
_STEPS, _FEWEST = 4, 2

_Name = TypeVar("_Name", bound=Hashable)


def measured(target: types.LanguageModel, drafter: types.Drafter) -> decoding.Cost:
    """As `of_all`, of one drafter."""
    return of_all(target, {"": drafter})[0][""]


def of_all(
    target: types.LanguageModel,
    drafts: Mapping[_Name, types.Drafter],
    repeats: int = _REPEATS,
    fill: int = FILL,
    batch: int = 1,
    widths: Sequence[int] = WIDTHS,
    temperature: float = 0.0,
    **shape: Any,
) -> tuple[dict[_Name, decoding.Cost], float]:
    """Measures, in turn, passes of several widths, drafts and whole steps.

    It takes some two seconds for every width, six for every drafter, and longer the first time,
    when all of it is compiled, and behind a long fill, which is prefilled for every drafter.

    A wider pass is held to cost no less than a narrower one (by isotonic regression): what says
    otherwise is noise, and a choice among lengths would fall for it. What steps that draft take
    beside draft and pass is their overhead, drawing and verifying, shared among the drafted tokens.
    A plain step is one of the loop, with all of its own.

    Args:
      target: with a key/value cache.
      drafts: drafters by name, never stopping; a level of a draft costs the draft divided by its
        levels, as a token of a chain does.
      repeats: rounds.
      fill: committed tokens behind which all is measured; fewer where there is no room for more.
      batch: rows; all costs are of a batch, in plain steps of that batch.
      widths: of passes to measure, besides those of the drafters' loops.
      temperature: at which is drafted, verified and drawn: above 0 each takes a law of the whole
        vocabulary.
      **shape: `capacity` and `chunk` of the decodes that are meant, as `decoding.init` takes them;
        by default what the fill needs.

    Returns:
      The costs by name, in plain steps, and the seconds of a plain step.

    Raises:
      ValueError: capacity or context have no room for the steps.
    """
    most_nodes = max((drafter.nodes for drafter in drafts.values()), default=0)
    count = max(_STEPS // batch, _FEWEST)
    slots = min(shape.get("capacity") or math.inf, target.context_length or math.inf)
    fill = int(min(fill, slots - count * (most_nodes + 1)))
    if fill < 1:
        raise ValueError(f"{slots} slots have no room for {count} drafts of {most_nodes} tokens")
    prompt = measure.copying_prompt(target.vocab_size, fill)

    def begin(drafter: types.Drafter) -> tuple[decoding.Request, decoding.DecodeState]:
        return measure.begin(target, drafter, prompt, batch, temperature, count, **shape)

    begun = begin(decoding.NOTHING)
    own = {
        width
        for drafter in drafts.values()
        for width in decoding.pass_widths(drafter.nodes, _is_chain(target, drafter))
    }
    measured_widths = sorted({1, *widths, *own})
    variants: dict[Any, measure.Variant] = {
        width: measure.forward(target, width, fill, begun[1].cache, passes=count)
        for width in measured_widths
    }
    variants["plain"] = measure.steps(target, decoding.NOTHING, *begun, count)
    for name, drafter in drafts.items():
        begun = begin(drafter)
        variants["draft", name] = measure.proposal(target, drafter, *begun)
        variants["step", name] = measure.steps(target, drafter, *begun, count)
    found = measure.interleave(variants, repeats)
    risen = optimize.isotonic_regression([found[width].median for width in measured_widths]).x
    plain = found["plain"].median
    passes = tuple(zip(measured_widths, (risen / plain).tolist(), strict=True))
    costs = {}
    for name, drafter in drafts.items():
        levels = decoding.form_of(target, drafter).depth
        cost = decoding.Cost(found["draft", name].median / plain / levels, passes)
        timed = variants["step", name]
        _, counts = timed.run(*timed.prepare())
        # A lookup may have found nothing here and there. All rows are one.
        drafted = np.asarray(counts.drafted)[0].tolist()
        told = drafted, levels * timed.times, _is_chain(target, drafter)
        beside = found["step", name].median / plain * timed.times - cost.of_steps(*told)
        each = dataclasses.replace(cost, overhead=1.0).of_steps(*told) - cost.of_steps(*told)
        overhead = max(beside, 0.0) / each if each else 0.0
        costs[name] = dataclasses.replace(cost, overhead=overhead)
    return costs, plain


def _is_chain(target: types.LanguageModel, drafter: types.Drafter) -> bool:
    return decoding.form_of(target, drafter).depth == drafter.nodes
