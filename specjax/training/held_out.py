"""Acceptance on text held out: what a draft would guess of what the target wrote."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax.models import policy as policies
from specjax.training import batches, distillation, losses, stopping

__all__ = ["guesses", "measure"]


def measure(
    objective: distillation.Distillation,
    params: Any,
    frozen: Any,
    held_out: Iterable[batches.Batch],
    length: int = 5,
) -> dict[str, float]:
    """Acceptance on text held out.

    Args:
      objective: reads the laws.
      params, frozen: the draft.
      held_out: batches that were not trained on.
      length: K of τ.

    Returns:
      `overlap`, the mean of Σ min(p, q), which is the acceptance rate of a first draft at
      temperature 1; `agreement`, the share of greedy answers' tokens that the draft's most probable
      token is; and `tau`, what greedy decoding of those answers with drafts of K would give.
    """
    both = count = 0.0
    texts: list[stopping.Guesses] = []
    for batch in held_out:
        found = _laws(objective, params, frozen, batch)
        both += float(np.sum(found["overlap"], where=found["present"]))
        count += int(np.sum(found["present"]))
        texts += _of_greedy(batch, found)
    agreed = sum(int(text.right.sum()) for text in texts)
    greedy = sum(len(text.right) for text in texts)
    return {
        "overlap": both / max(count, 1),
        "agreement": agreed / max(greedy, 1),
        "tau": stopping.replay(texts, length).tau,
    }


def guesses(
    objective: distillation.Distillation,
    params: Any,
    frozen: Any,
    held_out: Iterable[batches.Batch],
) -> list[stopping.Guesses]:
    """What the draft would guess of every greedy answer, and how sure it would be.

    Arguments as `measure`.
    """
    texts: list[stopping.Guesses] = []
    for batch in held_out:
        texts += _of_greedy(batch, _laws(objective, params, frozen, batch))
    return texts


def _of_greedy(batch: batches.Batch, found: dict[str, np.ndarray]) -> list[stopping.Guesses]:
    return [
        stopping.Guesses(
            *(found[name][row, : batch.length[row]] for name in ("right", "maximum", "entropy"))
        )
        for row in np.flatnonzero(batch.temperature == 0)
    ]


def _laws(objective, params, frozen, batch: batches.Batch) -> dict[str, np.ndarray]:
    found = _traced_laws(objective, params, frozen, batch)
    return {name: np.asarray(value) for name, value in found.items()}


@jax.jit
def _traced_laws(objective, params, frozen, batch):
    # With whole products, as decoding will make them.
    made = dataclasses.replace(objective, policy=policies.Policy()).laws(params, frozen, batch)
    log_q = made["log_q"]
    best = frozen["tokens"][jnp.argmax(log_q, axis=-1)]
    return {
        "overlap": losses.overlap(made["log_p"], log_q),
        "right": best == made["tokens"],
        "maximum": jnp.exp(jnp.max(log_q, axis=-1)),
        "entropy": -jnp.sum(jnp.exp(log_q) * log_q, axis=-1),
        "present": made["present"],
    }
