"""Where a draft had better stop on this machine: its length and line chosen anew.

    python -m experiments.stopping --folder=runs/stopping --draft=runs/draft/draft.safetensors

lets the target write text of another seed than the draft learnt from, replays its greedy answers
with what the draft would have guessed, at the costs of this machine, and keeps the draft length and
the line of the best predicted speedup in the draft's card, where `--method=draft` finds them.
Without --draft that is the card of the draft that comes along.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import app

from experiments import (
    binary,
    cards,
    distill_config,
    distill_stages,
    methods,
    step_costs,
    targets,
    unseen_text,
)
from specjax import checkpoints, drafters
from specjax.training import batches, distillation, folders, held_out, shapes, stopping

__all__ = ["chosen", "lines"]

_TAKES = binary.takes(
    binary.BATCH,
    binary.BATCH_TOKENS,
    binary.DOMAINS,
    binary.DRAFT,
    binary.FOLDER,
    binary.MAX_NEW_TOKENS,
    binary.TOKENS,
)


def chosen(
    bundle: checkpoints.Bundle,
    objective: distillation.Distillation,
    params: Any,
    frozen: Any,
    unseen: Sequence[batches.Batch],
    length: int,
) -> dict[str, Any]:
    """The card's `stopping`: costs of this machine, the best choice by them, and never to stop.

    Args:
      bundle: the target.
      objective, params, frozen: the draft.
      unseen: text that it did not learn from.
      length: K that drafts are timed at; one of those that are tried.

    Returns:
      `cost`, `best` and `never` by length, or nothing where no text is greedy.
    """
    texts = held_out.guesses(objective, params, frozen, unseen)
    if not texts:
        return {}
    model = shapes.draft_model(objective.config, params, frozen)
    with binary.Progress("costs of steps"):
        cost = step_costs.measured(bundle.target, drafters.model(model, length))
    best, tried = stopping.choose(texts, cost, sorted({*step_costs.LENGTHS, length}))
    return {
        "tokens": sum(len(text.right) for text in texts),
        "cost": dataclasses.asdict(cost),
        "best": dataclasses.asdict(best),
        "never": [dataclasses.asdict(row) for row in tried if row.is_whole],
    }


def lines(found: dict[str, Any]) -> list[str]:
    """What was chosen, for people."""
    best, cost = found["best"], found["cost"]
    rule = {
        "stop_below": f"below a maximum of {best['stop_below'] or 0:.2f}",
        "stop_above": f"above an entropy of {best['stop_above'] or 0:.2f} nats",
    }
    when = next((text for name, text in rule.items() if best[name] is not None), "never")
    passes = ", ".join(f"{steps:.2f} of {width}" for width, steps in cost["passes"])
    return [
        f"cost         in plain steps: a drafted token {cost['draft']:.3f}, a pass {passes} "
        f"tokens, the rest of a drafted token {cost['overhead']:.3f}",
        f"stop         {when}, at a draft length of {best['length']}: τ {best['tau']:.2f}, "
        f"predicted speedup {best['speedup']:.2f}×; never: "
        + ", ".join(f"{row['speedup']:.2f}× at {row['length']}" for row in found["never"]),
    ]


def run(config: distill_config.Config, draft: str, model: str) -> dict[str, Any]:
    """Chooses, and writes it into the card; the card's `stopping`, ready for JSON."""
    made = cards.read(draft)
    if made is None:
        raise ValueError(f"{draft} has no card beside it to keep the choice in")
    card = pathlib.Path(draft).with_suffix(".json")
    # Whether it can be written is known before minutes are spent.
    folders.write_json(card, made)
    content = folders.digest(draft)
    binary.start()
    bundle = targets.load(model)
    config = distill_stages.of_draft(config, bundle, draft)
    unseen = unseen_text.write(
        config, bundle, pathlib.Path(config.folder) / "measured", config.tokens
    )
    params, frozen = distill_stages.begin(config, bundle, [], config.shape)
    objective = config.objective(bundle.config, config.shape)
    found = chosen(bundle, objective, params, frozen, unseen, config.draft_length)
    if not found:
        raise ValueError("the target wrote no greedy answer; raise --tokens")
    found |= {
        "seed": unseen_text.seed(config),
        "domains": sorted(set(config.texts.domains)),
        "versions": binary.versions(),
    }
    if folders.digest(draft) != content or cards.read(draft) != made:
        raise ValueError(f"{draft} and its card were made anew meanwhile; run again")
    folders.write_json(card, made | {"stopping": found})
    return {"draft": draft, "card": str(card), **found}


def config_from_flags() -> distill_config.Config:
    """Reads the flags; ValueError names the one that is wrong."""
    return distill_config.Config(
        folder=binary.folder(),
        tokens=binary.given(binary.TOKENS, unseen_text.MEASURED),
        texts=distill_config.texts(),
        batch_tokens=binary.BATCH_TOKENS.value,
        seed=binary.SEED.value,
    )


def main(argv: list[str]) -> None:
    """Runs what the flags ask for; bad input ends in one line and exit code 2."""

    def report() -> dict[str, Any]:
        draft = str(binary.given(binary.DRAFT, methods.SHIPPED))
        return run(config_from_flags(), draft, binary.MODEL.value)

    def table(made: dict[str, Any]) -> str:
        return "\n".join([*lines(made), f"kept in      {made['card']}"])

    binary.report(argv, report, table, _TAKES)


if __name__ == "__main__":
    app.run(main, flags_parser=binary.parse_flags)
