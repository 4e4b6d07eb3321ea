"""The record of a prompt, a turn and a method: counts, pace, claims, and what costs predict."""

import dataclasses
import statistics as medians
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments import benchmark_turn, exactness
from specjax import decoding, types
from specjax.analysis import entropy, scoring

__all__ = ["PLAIN", "Price", "of_turn", "overlap", "predicted"]

PLAIN = "plain"


@dataclasses.dataclass(frozen=True)
class Price:
    """What a method's steps cost, for what the cost model predicts.

    Attributes:
      cost: in plain steps.
      stops: whether drafts may stop short, having looked one token further.
    """

    cost: decoding.Cost
    stops: bool


def of_turn(
    task: benchmark_turn.Task,
    turn: int,
    sides: Mapping[str, benchmark_turn.Conversation],
    name: str,
    timed: Mapping[str, Sequence[benchmark_turn.Timed]],
    compiled: dict[str, Any],
) -> list[dict[str, Any]]:
    """One a prompt; seconds and tokens a second are those of the whole batch, which has a name."""
    side, runs = sides[name], timed[name]
    own, plain = (_pace(timed[one]) for one in (name, PLAIN))
    records = []
    for row, prompt in enumerate(task.prompts[: task.new]):
        gaps = [gap for run in runs for gap in run.gaps[row]]
        counts = jax.tree.map(lambda leaf, row=row: leaf[row], runs[-1].counts)
        tested, accepted = counts.tested, counts.accepted
        new = runs[-1].answers[row]
        records.append(
            {
                "unit": task.unit(row),
                "prompt": prompt.key,
                "method": name,
                "rule": side.decoder.rule.name,
                **task.cell,
                "batch_of": task.prompts[0].key,
                "group": prompt.group,
                "source": prompt.source,
                "question_id": prompt.question,
                "turn": turn,
                "turns": len(prompt.turns),
                "prompt_tokens": len(side.rows[row]),
                "text_tokens": len(side.texts[row]),
                "new_tokens": len(new),
                "finish_reason": runs[-1].reasons[row],
                "target_steps": int(counts.target_steps),
                "draft_steps": int(counts.draft_steps),
                "drafted": counts.drafted.tolist(),
                "tested": tested.tolist(),
                "accepted": accepted.tolist(),
                "tau": len(new) / max(int(counts.target_steps), 1),
                "acceptance_rate": _rate(accepted.sum(), tested.sum()),
                "acceptance_by_position": list(map(_rate, accepted, tested)),
                "accept_histogram": counts.histogram.tolist(),
                **own,
                **{f"plain_{key}": value for key, value in plain.items()},
                "speedup": own["tokens_per_second"] / plain["tokens_per_second"],
                "inter_token_p50": float(np.percentile(gaps, 50)),
                "inter_token_p95": float(np.percentile(gaps, 95)),
                **_claims(task, row, sides, name, timed),
                **compiled,
                "tokens": new,
            }
        )
    return records


def predicted(
    record: Mapping[str, Any], price: Price | None, drafter: types.Drafter, batch: int
) -> dict[str, Any]:
    """The cost model's speedup from what was drafted and emitted.

    None where nothing was measured, and in a batch, whose passes are as wide as its row with the
    longest draft. A drafter works for whole drafts or, where it may stop, for one token more than
    it drafted.
    """
    if price is None or batch > 1:
        return {"predicted_speedup": None, "cost": None}
    drafted, depth = record["drafted"], len(record["tested"])
    is_chain = depth == drafter.nodes
    draft_steps = depth * record["target_steps"]
    if price.stops:
        draft_steps = sum(steps * min(nodes + 1, depth) for nodes, steps in enumerate(drafted))
    took = price.cost.of_steps(drafted, draft_steps, is_chain)
    return {
        "predicted_speedup": record["new_tokens"] / took,
        "cost": dataclasses.asdict(price.cost),
    }


def overlap(
    target: types.LanguageModel,
    drafter: types.Drafter,
    text: tuple[list[int], list[int]],
    temperature: float,
    batch: int,
) -> dict[str, Any]:
    """The first draft's acceptance probability from every place of an answer, off the clock.

    Args:
      target: the model.
      drafter: of the method.
      text: what stood before the answer, and the answer, as token ids.
      temperature: at which it was drawn.
      batch: rows; only an answer that was decoded alone is looked at, as a batch changes nothing.

    Returns:
      `overlap`, the mean of Σ min(p, q) over the `places` where a draft is there, of
      chains that have laws; `by_entropy`, what `entropy.of_text` says.
    """
    if batch > 1 or not drafter.nodes or not text[1]:
        return {"overlap": None, "places": 0, "by_entropy": None}
    found = scoring.score(target, drafter, [text], types.Sampling(temperature))
    shares = found.overlap[0]
    # The first node of a tree does not tell its law: a union's is a copy.
    has_law = found.form.tree.is_chain and not found.form.is_deterministic
    places = int(np.sum(~np.isnan(shares))) if has_law else 0
    return {
        "overlap": float(np.nansum(shares)) / places if places else None,
        "places": places,
        "by_entropy": entropy.of_text(found, 0),
    }


def _pace(runs: Sequence[benchmark_turn.Timed]) -> dict[str, float]:
    seconds = medians.median(run.seconds for run in runs)
    emitted = sum(map(len, runs[-1].answers))
    return {
        "prefill_seconds": medians.median(run.prefill_seconds for run in runs),
        "seconds": seconds,
        "batch_tokens": emitted,
        "tokens_per_second": emitted / seconds,
    }


def _rate(accepted: Any, tested: Any) -> float | None:
    return round(float(accepted) / float(tested), 4) if tested else None


def _claims(
    task: benchmark_turn.Task,
    row: int,
    sides: Mapping[str, benchmark_turn.Conversation],
    name: str,
    timed: Mapping[str, Sequence[benchmark_turn.Timed]],
) -> dict[str, Any]:
    """Whether every text is plain decoding's, where the rule promises it."""
    decoder, before = sides[name].decoder, sides[name].texts[row]
    divergence, identical = None, None
    # Where an earlier turn parted, this one answers another text.
    if exactness.is_pathwise(decoder.rule, task.temperature) and before == sides[PLAIN].texts[row]:
        text, *others = [run.answers[row] for run in (*timed[PLAIN], *timed[name])]
        divergence = exactness.parting(decoder.target, before, text, others)
        identical = divergence is None
    return {
        "identical": identical,
        "certified": exactness.certified(decoder.rule, min(decoder.drafter.nodes, 3)),
        "first_divergence": divergence,
    }
