"""What a draft's shape costs, and the speedup it promises: acceptance weighed against cost."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments import step_costs
from specjax import checkpoints, drafters
from specjax.training import shapes, stopping

__all__ = ["table", "text"]

_REPEATS = 7


def table(
    bundle: checkpoints.Bundle,
    measured: Mapping[shapes.Shape, Mapping[str, float]],
    texts: Mapping[shapes.Shape, Sequence[stopping.Guesses]],
    length: int,
) -> list[dict[str, Any]]:
    """Measures the costs of shapes on this machine, in turn, and predicts speedups.

    Each shape has the draft length that serves it best, without a line to stop at: a shape that
    costs more, or that is right more seldom, had better draft less.

    Args:
      bundle: the target.
      measured: what `held_out.measure` found for each shape.
      texts: what `held_out.guesses` found for each shape.
      length: K that drafts are timed at.

    Returns:
      A row a shape, in their order: its sizes, `bytes_per_step`, `cost`, what was measured,
      `draft_length`, and τ and speedup at it.
    """
    drafts = {}
    for shape in measured:
        # Weights as they begin cost what trained ones do.
        config = shapes.configure(bundle.config, shape)
        parts = shapes.begin(bundle, shape, np.arange(shape.vocabulary), jax.random.key(0))
        drafts[shape] = drafters.model(shapes.draft_model(config, *parts), length)
    costs, _ = step_costs.of_all(bundle.target, drafts, _REPEATS)
    rows = []
    for shape, found in measured.items():
        _, tried = stopping.choose(texts[shape], costs[shape], step_costs.LENGTHS)
        best = max((row for row in tried if row.is_whole), key=lambda row: row.speedup)
        config = shapes.configure(bundle.config, shape)
        heads, hidden = config.num_heads + config.num_kv_heads, config.hidden_size
        layer = 2 * hidden * config.head_size * heads + 3 * hidden * shape.intermediate_size
        rows.append(
            {
                "layers": dataclasses.asdict(shape)["layers"],
                "intermediate_size": shape.intermediate_size,
                "vocabulary": shape.vocabulary,
                "bytes_per_step": 4 * (shape.num_layers * layer + hidden * shape.vocabulary),
                "cost": dataclasses.asdict(costs[shape]),
                **found,
                "draft_length": best.length,
                "tau": best.tau,
                "speedup": best.speedup,
            }
        )
    return rows


def text(rows: list[dict[str, Any]]) -> str:
    """The table, the best row marked."""
    best = max(rows, key=lambda row: row["speedup"])
    lines = [
        f"{'layers':<10}{'feed-forward':>13}{'vocabulary':>11}{'MB a step':>10}{'c':>7}"
        f"{'agreement':>10}{'length':>7}{'τ':>6}{'speedup':>9}"
    ]
    for row in rows:
        layers = row["layers"]
        told = "{num_layers}x{hidden_size}".format(**layers) if isinstance(layers, dict) else None
        lines.append(
            f"{told or '+'.join(map(str, layers)):<10}{row['intermediate_size']:>13}"
            f"{row['vocabulary']:>11}{row['bytes_per_step'] / 1e6:>10.1f}"
            f"{row['cost']['draft']:>7.3f}{row['agreement']:>10.3f}{row['draft_length']:>7}"
            f"{row['tau']:>6.2f}{row['speedup']:>8.2f}×" + ("  chosen" if row is best else "")
        )
    return "\n".join(lines)
