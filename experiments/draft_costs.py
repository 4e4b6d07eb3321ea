"""What a draft's shape costs, and the speedup it promises: acceptance weighed against cost."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments import measure
from specjax import checkpoints, decoding, drafters
from specjax.training import distillation

__all__ = ["table", "text"]

_FILL = 200
_REPEATS = 7


def table(
    bundle: checkpoints.Bundle,
    measured: Mapping[distillation.Shape, Mapping[str, float]],
    length: int,
) -> list[dict[str, Any]]:
    """Measures the costs of shapes on this machine, in turn, and predicts speedups.

    The speedup over plain decoding is τ over a step's cost in plain steps: c for each of K drafted
    tokens and v(K + 1) for the pass that verifies them.

    Args:
      bundle: the target.
      measured: what `held_out.measure` found for each shape, with `tau` at K.
      length: K.

    Returns:
      A row a shape, in their order: its sizes, `bytes_per_step`, `c`, `v`, `tau` and `speedup`.
    """
    fill = min(_FILL, bundle.config.context_length // 2)
    prompt = measure.copying_prompt(bundle.config.vocab_size, fill)
    cache = bundle.target.init_cache(1, fill + 64)
    variants: dict[Any, measure.Variant] = {
        "plain": measure.forward(bundle.target, 1, fill, cache),
        "wide": measure.forward(bundle.target, length + 1, fill, cache),
    }
    for shape in measured:
        # Weights as they begin cost what trained ones do.
        config = distillation.configure(bundle.config, shape)
        parts = distillation.begin(bundle, shape, np.arange(shape.vocabulary))
        model = distillation.draft_model(config, *parts)
        drafter = drafters.model(model, length)
        variants[shape] = measure.proposal(bundle.target, drafter, prompt)
    seconds = measure.interleave(variants, _REPEATS)
    plain = seconds["plain"].median
    verify = seconds["wide"].median / plain
    rows = []
    for shape, found in measured.items():
        cost = decoding.Cost(
            seconds[shape].median / plain / length, ((1, 1.0), (length + 1, verify))
        )
        hidden, shared = bundle.config.hidden_size, bundle.config.num_kv_heads
        attention = 2 * hidden * bundle.config.head_size * (bundle.config.num_heads + shared)
        layer = attention + 3 * hidden * shape.intermediate_size
        rows.append(
            {
                "layers": list(shape.layers),
                "intermediate_size": shape.intermediate_size,
                "vocabulary": shape.vocabulary,
                "bytes_per_step": 4 * (len(shape.layers) * layer + hidden * shape.vocabulary),
                "c": cost.draft,
                "v": verify,
                **found,
                "speedup": found["tau"] / cost.of_step(length, length + 1),
            }
        )
    return rows


def text(rows: list[dict[str, Any]]) -> str:
    """The table, the best row marked."""
    best = max(rows, key=lambda row: row["speedup"])
    lines = [
        f"{'layers':<10}{'feed-forward':>13}{'vocabulary':>11}{'MB a step':>10}{'c':>7}{'v':>6}"
        f"{'agreement':>10}{'τ':>6}{'speedup':>9}"
    ]
    for row in rows:
        lines.append(
            f"{'+'.join(map(str, row['layers'])):<10}{row['intermediate_size']:>13}"
            f"{row['vocabulary']:>11}{row['bytes_per_step'] / 1e6:>10.1f}{row['c']:>7.3f}"
            f"{row['v']:>6.2f}{row['agreement']:>10.3f}{row['tau']:>6.2f}{row['speedup']:>8.2f}×"
            + ("  chosen" if row is best else "")
        )
    return "\n".join(lines)
