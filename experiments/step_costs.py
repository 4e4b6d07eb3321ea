"""What a target's passes and drafters' drafts cost here, for choosing drafts and lengths."""

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, TypeVar

from scipy import optimize

from experiments import measure
from specjax import decoding, types

__all__ = ["FILL", "LENGTHS", "WIDTHS", "measured", "of_all"]

# Draft lengths to choose among, and widths that tell their passes; between them a line is drawn.
LENGTHS = (1, 2, 3, 4, 5, 6, 8)
WIDTHS = (1, 2, 4, 6, 9)
FILL = 160
_REPEATS = 5
# Steps of one row that are timed together, so that a run takes a while; of more rows fewer.
_STEPS = 4

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
) -> tuple[dict[_Name, decoding.Cost], float]:
    """Measures, in turn, passes of several widths, drafts and whole steps.

    It takes some two seconds for every width, six for every drafter, and longer the first time,
    when all of it is compiled, and behind a long fill, which is prefilled for every drafter.

    A wider pass is held to cost no less than a narrower one (by isotonic regression): what says
    otherwise is noise, and a choice among lengths would fall for it. What a drafter's step takes
    beside draft and pass is its overhead: drawing and verifying, of as many drafts as it has. A
    plain step is one of the loop, with all of its own.

    Args:
      target: with a key/value cache.
      drafts: drafters by name, never stopping; a level of a draft costs the draft divided by its
        levels, as a token of a chain does.
      repeats: rounds.
      fill: committed tokens behind which all is measured; fewer where the context is short.
      batch: rows; all costs are of a batch, in plain steps of that batch.
      widths: of passes to measure, besides those of the drafters' loops.
      temperature: at which is drafted, verified and drawn: above 0 each takes a law of the whole
        vocabulary.

    Returns:
      The costs by name, in plain steps, and the seconds of a plain step.
    """
    fill = min(fill, (target.context_length or 2 * fill) // 2)
    own = {w for drafter in drafts.values() for w in decoding.pass_widths(drafter.nodes)}
    measured_widths = sorted({1, *widths, *own})
    cache = target.init_cache(batch, fill + max(measured_widths))
    prompt = measure.copying_prompt(target.vocab_size, fill)
    count = max(_STEPS // batch, 1)
    variants: dict[Any, measure.Variant] = {
        width: measure.forward(target, width, fill, cache, passes=count)
        for width in measured_widths
    }
    begun = measure.begin(target, decoding.NOTHING, prompt, batch, temperature, count)
    variants["plain"] = measure.steps(target, decoding.NOTHING, *begun, count)
    for name, drafter in drafts.items():
        begun = measure.begin(target, drafter, prompt, batch, temperature, count)
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
        whole = found["step", name].median / plain
        beside = max(whole - cost.of_step(levels, drafter.nodes + 1), 0.0)
        costs[name] = dataclasses.replace(cost, overhead=beside)
    return costs, plain
