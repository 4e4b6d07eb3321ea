"""Conversations decoded by several methods in turn, plain decoding among them."""

from collections.abc import Mapping
from typing import Any

from experiments import benchmark_record, benchmark_turn, methods
from specjax import checkpoints, decoding

__all__ = ["measured"]


def measured(
    bundle: checkpoints.Bundle,
    decoders: Mapping[str, methods.Decoder],
    task: benchmark_turn.Task,
    repeats: int,
    seed: int,
    warm: dict[tuple, int | None],
    prices: Mapping[str, benchmark_record.Price],
) -> list[dict[str, Any]]:
    """Decodes a task: a record for every prompt, turn and method, plain decoding first.

    Args:
      bundle: the target with its tokenizer.
      decoders: methods by name, plain decoding among them.
      task: the prompts.
      repeats: timed decodes of each turn by each method, in turn; seconds are medians.
      seed: of the requests' keys, which hang on the prompts too.
      warm: bytes of the programs that were compiled before; what is compiled here is added.
      prices: of the methods' steps, of those that the cost model can tell.
    """
    rows = list(map(list, task.first))
    asked = benchmark_turn.options(rows, task.temperature, task.max_new_tokens, seed) | {
        "capacity": task.capacity
    }
    sides = {
        name: benchmark_turn.Conversation(name, decoder, None, rows, rows)
        for name, decoder in decoders.items()
    }
    records = []
    for turn in range(len(task.prompts[0].turns)):
        compiled = {
            name: benchmark_turn.compiled(side, asked, warm) for name, side in sides.items()
        }
        timed: dict[str, list[benchmark_turn.Timed]] = {name: [] for name in sides}
        left: dict[str, decoding.DecodeState] = {}
        names = list(sides)
        for repeat in range(repeats):
            # Whoever comes first finds the machine as the last decode left it.
            place = (benchmark_turn.hash_of(rows[0]) + repeat) % len(names)
            for name in names[place:] + names[:place]:
                once, left[name] = sides[name].decode(asked)
                timed[name].append(once)
        for name in names:
            made = benchmark_record.of_turn(task, turn, sides, name, timed, compiled[name])
            for row, record in enumerate(made):
                text = (sides[name].texts[row], record["tokens"])
                record |= benchmark_record.overlap(
                    bundle.target, decoders[name].drafter, text, task.temperature, task.batch
                )
                record |= benchmark_record.predicted(
                    record, prices.get(name), decoders[name].drafter, task.batch
                )
            records += made
        if turn + 1 < len(task.prompts[0].turns):
            said = [prompt.turns[turn + 1] for prompt in task.prompts]
            for name, side in sides.items():
                side.go_on(bundle, said, timed[name][-1].answers, left[name])
    return records
