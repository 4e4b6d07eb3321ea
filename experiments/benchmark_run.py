"""Conversations decoded by several methods in turn: a record for each prompt, turn and method.

Everything is warm, compiled off the clock. A turn goes on from the state that the one before left,
so a method's second prompt is the user's next message behind that method's own answer. Before a
timed decode some steps of the same decode are streamed, for the time between arrivals.
"""

import dataclasses
import statistics as medians
import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from experiments import exactness, measure, methods, prompt_files
from specjax import checkpoints, decoding, types
from specjax.analysis import entropy, scoring

__all__ = [
    "PLAIN",
    "Task",
    "Warm",
    "capacity_of",
    "hash_of",
    "measured",
    "predicted",
]

PLAIN = "plain"
# Capacities, so that a run compiles a handful of programs.
_CAPACITIES = (512, 1024, 2048, 4096, 8192)
_CHUNK = 64
_STREAMED = 24

_State = TypeVar("_State")


@dataclasses.dataclass(frozen=True)
class Task:
    """Prompts to be decoded together, by every method in turn.

    Attributes:
      prompts: with equally many turns; the batch begins over where it has more rows.
      first: the first turn of each, as token ids.
      batch: rows.
      temperature: 0 is greedy.
      max_new_tokens: of every turn.
      context: tokens that were put before the question, about.
      capacity: text slots for the whole conversation.
    """

    prompts: tuple[prompt_files.Prompt, ...]
    first: tuple[list[int], ...]
    batch: int
    temperature: float
    max_new_tokens: int
    context: int
    capacity: int

    @property
    def cell(self) -> dict[str, Any]:
        """What its records share."""
        return {
            "batch": self.batch,
            "temperature": self.temperature,
            "max_new_tokens": self.max_new_tokens,
            "context": self.context,
        }


@dataclasses.dataclass
class Warm:
    """What has been compiled, with the seconds that took and the bytes that each program holds."""

    peak_bytes: dict[tuple, int | None] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _Conversation:
    """One method's side of a task.

    Attributes:
      name: of the method.
      decoder: the method.
      before: where the last turn left it.
      rows: the tokens that the next turn appends.
      texts: all tokens so far, the next turn's among them.
    """

    name: str
    decoder: methods.Decoder
    before: decoding.DecodeState | None
    rows: list[list[int]]
    texts: list[list[int]]

    def start(
        self, options: dict[str, Any]
    ) -> tuple[decoding.Request, decoding.DecodeState, float]:
        """The turn's prompt run through the models, and the seconds it took."""
        before = _copied(self.before)
        began = time.perf_counter()
        request, state = decoding.init(
            self.decoder.target, self.decoder.drafter, self.rows, state=before, **options
        )
        jax.block_until_ready(state)
        return request, state, time.perf_counter() - began


@dataclasses.dataclass(frozen=True)
class _Timed:
    """A turn decoded by one method, once."""

    result: decoding.DecodeResult
    texts: list[list[int]]
    prefill_seconds: float
    seconds: float
    gaps: list[float]


def measured(
    bundle: checkpoints.Bundle,
    decoders: Mapping[str, methods.Decoder],
    task: Task,
    repeats: int,
    seed: int,
    warm: Warm,
    costs: Mapping[str, decoding.Cost],
) -> list[dict[str, Any]]:
    """Decodes a task: a record for every prompt, turn and method, `PLAIN` first.

    Args:
      bundle: the target with its tokenizer.
      decoders: methods by name, `PLAIN` among them.
      task: the prompts.
      repeats: timed decodes of each turn by each method, in turn; seconds are medians.
      seed: of the requests' keys, which hang on the prompts too.
      warm: what was compiled before; what is compiled here is added.
      costs: of the methods' steps in such a batch, for what the cost model predicts.
    """
    rows = [list(task.first[index % len(task.first)]) for index in range(task.batch)]
    key = jax.random.key(seed)
    options = {
        "keys": jnp.stack([jax.random.fold_in(key, hash_of(tokens)) for tokens in rows]),
        "max_new_tokens": task.max_new_tokens,
        "sampling": types.Sampling(task.temperature),
        "capacity": task.capacity,
        "chunk": _CHUNK,
    }
    sides = {
        name: _Conversation(name, decoder, None, rows, rows) for name, decoder in decoders.items()
    }
    records = []
    for turn in range(len(task.prompts[0].turns)):
        compiled = {name: _compile(side, options, warm) for name, side in sides.items()}
        timed: dict[str, list[_Timed]] = {name: [] for name in sides}
        # Whoever comes first finds the machine as the last prompt left it.
        names = list(sides)
        place = hash_of(rows[0]) % len(names)
        for _ in range(repeats):
            for name in names[place:] + names[:place]:
                timed[name].append(_decode(sides[name], options))
        for name in names:
            made = _records(task, turn, sides[name], timed[name], timed[PLAIN], compiled[name])
            drafter = decoders[name].drafter
            for record, text in zip(made, sides[name].texts, strict=False):
                record["predicted_speedup"] = predicted(record, costs.get(name), drafter)
                record["cost"] = dataclasses.asdict(costs[name]) if name in costs else None
                record |= _overlap(bundle.target, drafter, (text, record["tokens"]), options)
            records += made
        if turn + 1 < len(task.prompts[0].turns):
            for name, side in sides.items():
                _go_on(bundle, task, turn + 1, side, timed[name][-1])
    return records


def _compile(side: _Conversation, options: dict[str, Any], warm: Warm) -> dict[str, Any]:
    """Compiles what a turn runs, once a shape: seconds, and the bytes that the loop's takes."""
    shape = (side.name, len(side.rows), options["capacity"], side.before is not None)
    began = time.perf_counter()
    is_new = shape not in warm.peak_bytes
    if is_new:
        short = options | {"max_new_tokens": 2}
        request, state, _ = side.start(short)
        decoder = side.decoder
        warm.peak_bytes[shape] = measure.peak_bytes(
            decoder.target, decoder.drafter, request, state, decoder.rule
        )
        decoder.warm([row[-2:] for row in side.rows], short)
        jax.block_until_ready(decoder.decode(request, state).tokens)
    return {
        "compile_seconds": time.perf_counter() - began if is_new else 0.0,
        "peak_bytes": warm.peak_bytes[shape],
    }


def _decode(side: _Conversation, options: dict[str, Any]) -> _Timed:
    request, state, prefill_seconds = side.start(options)
    stamps = [time.perf_counter()]
    for _, _ in zip(range(_STREAMED), side.decoder.stream(request, _copied(state)), strict=False):
        stamps.append(time.perf_counter())
    began = time.perf_counter()
    result = side.decoder.decode(request, state)
    jax.block_until_ready(result.tokens)
    seconds = time.perf_counter() - began
    return _Timed(result, side.texts, prefill_seconds, seconds, np.diff(stamps).tolist())


def _copied(state: _State) -> _State:
    """A decode consumes its state."""
    return jax.tree.map(jnp.copy, state)


def _go_on(
    bundle: checkpoints.Bundle, task: Task, turn: int, side: _Conversation, timed: _Timed
) -> None:
    answers = timed.result.new_tokens
    side.before = timed.result.state
    side.rows = [
        bundle.tokenizer.follow_up(task.prompts[row % len(task.prompts)].turns[turn], answers[row])
        for row in range(task.batch)
    ]
    side.texts = [
        [*text, *answer, *new]
        for text, answer, new in zip(side.texts, answers, side.rows, strict=True)
    ]


def _records(
    task: Task,
    turn: int,
    side: _Conversation,
    runs: Sequence[_Timed],
    plain_runs: Sequence[_Timed],
    compiled: dict[str, Any],
) -> list[dict[str, Any]]:
    """One a prompt; of a batch, seconds and tokens a second are the whole batch's."""
    result = runs[-1].result
    own, plain = (_pace(some) for some in (runs, plain_runs))
    gaps = [gap for run in runs for gap in run.gaps]
    records = []
    for row, prompt in enumerate(task.prompts):
        counts = jax.tree.map(lambda leaf, row=row: np.asarray(leaf[row]), result.statistics)
        tested, accepted = counts.tested, counts.accepted
        new = result.new_tokens[row]
        records.append(
            {
                "prompt": prompt.key,
                "method": side.name,
                "rule": side.decoder.rule.name,
                **task.cell,
                "group": prompt.group,
                "source": prompt.source,
                "question_id": prompt.question,
                "turn": turn,
                "prompt_tokens": len(side.rows[row]),
                "new_tokens": len(new),
                "finish_reason": result.finish_reasons[row],
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
                **{f"plain_{name}": value for name, value in plain.items()},
                "speedup": own["tokens_per_second"] / plain["tokens_per_second"],
                "inter_token_p50": float(np.percentile(gaps, 50)),
                "inter_token_p95": float(np.percentile(gaps, 95)),
                **_claims(task, row, side.decoder, runs, plain_runs),
                **compiled,
                "tokens": new,
            }
        )
    return records


def predicted(
    record: Mapping[str, Any], cost: decoding.Cost | None, drafter: types.Drafter
) -> float | None:
    """The cost model's speedup from what was drafted and emitted; None where nothing was measured.

    A drafter that looks one token further before it stops pays for that step too.
    """
    if cost is None:
        return None
    drafted, depth = record["drafted"], len(record["tested"])
    looked = sum(steps * min(nodes + 1, depth) for nodes, steps in enumerate(drafted))
    draft_steps = looked if depth == drafter.nodes else record["draft_steps"]
    widths = None if depth == drafter.nodes else (1, drafter.nodes + 1)
    return record["new_tokens"] / cost.of_steps(drafted, draft_steps, widths)


def _overlap(
    target: types.LanguageModel,
    drafter: types.Drafter,
    text: tuple[list[int], list[int]],
    options: dict[str, Any],
) -> dict[str, Any]:
    """The first draft's acceptance probability from every place of an answer, off the clock."""
    form = jax.eval_shape(decoding.first_draft, target, drafter)
    if form.is_deterministic or not text[1]:
        return {"overlap": None, "by_entropy": None}
    found = scoring.score(target, drafter, [text], options["sampling"])
    overlap = found.overlap[0]
    known = overlap[~np.isnan(overlap)]
    return {
        "overlap": float(np.mean(known)) if len(known) else None,
        "by_entropy": {
            "target": entropy.binned(found.entropy_p[0], overlap),
            "draft": entropy.binned(found.entropy_q[0], overlap),
        },
    }


def _pace(runs: Sequence[_Timed]) -> dict[str, float]:
    seconds = medians.median(run.seconds for run in runs)
    emitted = sum(map(len, runs[-1].result.new_tokens))
    return {
        "prefill_seconds": medians.median(run.prefill_seconds for run in runs),
        "seconds": seconds,
        "batch_tokens": emitted,
        "tokens_per_second": emitted / seconds,
    }


def _rate(accepted: Any, tested: Any) -> float | None:
    return round(float(accepted) / float(tested), 4) if tested else None


def _claims(
    task: Task,
    row: int,
    decoder: methods.Decoder,
    runs: Sequence[_Timed],
    plain_runs: Sequence[_Timed],
) -> dict[str, Any]:
    """Whether every text is plain decoding's, where the rule promises it."""
    before, first = (some[0].texts[row] for some in (runs, plain_runs))
    divergence, identical = None, None
    # Where an earlier turn parted, this one answers another text.
    if exactness.is_pathwise(decoder.rule, task.temperature) and before == first:
        (text, *others) = [run.result.new_tokens[row] for run in (*plain_runs, *runs)]
        divergence = exactness.parting(decoder.target, before, text, others)
        identical = divergence is None
    return {
        "identical": identical,
        "certified": exactness.certified(decoder.rule, min(decoder.drafter.nodes, 3)),
        "first_divergence": divergence,
    }


def hash_of(tokens: Sequence[int]) -> int:
    """A number that a prompt has in whatever batch it stands: 31 bits."""
    value = 0
    for token in tokens:
        value = (value * 1000003 + token) % (1 << 31)
    return value


def capacity_of(needed: int) -> int:
    """Text slots for so many tokens, one of a few sizes."""
    return next((size for size in _CAPACITIES if size >= needed), needed)
