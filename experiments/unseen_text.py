"""Text to measure drafts on, that they have not learnt from; and what one measures there."""

import dataclasses
import pathlib

from experiments import cards, distill_stages
from experiments.distill_config import Config
from specjax import checkpoints
from specjax.training import batches, folders, held_out

__all__ = ["MEASURED", "measure", "seed", "told", "write"]

# Answer tokens that are enough to measure on.
MEASURED = 20_000


def seed(config: Config) -> int:
    """A seed of text that the draft did not learn from, nor those that it went on from.

    Raises:
      ValueError: a card, or the folder's data, that cannot be read.
    """
    told = []
    card = None if config.start_from is None else cards.read(config.start_from)
    while card is not None:
        told.append(card)
        card = card.get("earlier")
        if not isinstance(card, dict | None):
            raise ValueError(f"{config.start_from}: its card names {card!r} as an earlier one")
    settings = pathlib.Path(config.folder) / "data" / "settings.json"
    if settings.exists():
        told.append(folders.read(settings))
    seeds = [made.get("seed", 0) for made in told]
    if not all(isinstance(number, int) for number in seeds):
        raise ValueError(f"{config.start_from}: of its card and {settings}, seeds are {seeds}")
    return max([config.texts.seed, *seeds]) + 1


def write(
    config: Config, bundle: checkpoints.Bundle, folder: pathlib.Path, tokens: int
) -> list[batches.Batch]:
    """All conversations of text of `seed`, and of every domain at every temperature."""
    texts = config.texts
    other = dataclasses.replace(
        config,
        folder=str(folder),
        tokens=tokens,
        texts=dataclasses.replace(
            texts,
            seed=seed(config),
            # As small as shards of all temperatures can be: all domains have their turn soon.
            batch=min(texts.batch, texts.answers * len(texts.temperatures)),
        ),
    )
    held, _ = distill_stages.generate(other, bundle, least=len(texts.domains))
    order = batches.Batches(held, config.batch_tokens, config.seed, unseen=None)
    return [order(index) for index in range(order.per_epoch)]


def measure(
    config: Config, bundle: checkpoints.Bundle, texts: list[batches.Batch]
) -> dict[str, float]:
    """What the draft to go on from measures as it is; `held_out.measure` tells of what."""
    params, frozen = distill_stages.begin(config, bundle, [], config.shape)
    objective = config.objective(bundle.config, config.shape)
    return held_out.measure(objective, params, frozen, texts, config.draft_length)


def told(texts: list[batches.Batch]) -> dict[str, int]:
    """Answer tokens that a measure stands on: all, and those of greedy answers."""
    return {
        "tokens": sum(int(batch.length.sum()) for batch in texts),
        "greedy_tokens": sum(int(batch.length[batch.temperature == 0].sum()) for batch in texts),
    }
