"""What a machine had better do with its traffic: method, draft length, gain and memory.

    python -m experiments.advise --log=requests.jsonl

reads when requests came and how long they were: JSON lines with `arrival` (seconds, or ISO 8601)
and `prompt_tokens` and `new_tokens`, or texts as `experiments.logs` says. It finds how many the
machine would have at once (plain decoding, requests sharing it as rows of a batch), measures here
what steps of batches of those sizes cost, and tells what speculation promises at each. Where the
log holds texts, acceptance is scored on them; otherwise on answers to the built-in prompts.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import app

from experiments import (
    binary,
    logs,
    measure,
    methods,
    outputs,
    prompt_files,
    targets,
    tune,
)
from specjax import checkpoints, decoding, types
from specjax.analysis import plots, scoring, serving, tuning

_TAKES = binary.takes(
    binary.BATCHES,
    binary.COUNT,
    binary.LOG,
    binary.LONGEST,
    binary.MAX_NEW_TOKENS,
    binary.METHODS,
    binary.PLOTS,
    binary.TEMPERATURE,
)
_CANDIDATES = ("prompt_lookup", "draft")
_SIZES = (1, 2, 4, 8, 16, 32)
# Of a log, spread over it: scoring takes a second or so each.
_TEXTS = 16
_SHARE = 0.95
_PREFILLED, _PREFILLS = 256, 5
# What practitioners say: sure below, marginal above.
_SURE, _MARGINAL = 8, 32
_HARDLY = 1.1


@dataclasses.dataclass(frozen=True)
class Config:
    """One run, as the flags give it."""

    model: str
    log: tuple[str, ...]
    candidates: tuple[methods.Asked, ...]
    batches: tuple[int, ...]
    count: int
    longest_prompt: int
    max_new_tokens: int
    temperature: float
    seed: int

    def __post_init__(self):
        rising = all(a < b for a, b in zip(self.batches, self.batches[1:], strict=False))
        if not self.batches or self.batches[0] != 1 or not rising:
            raise ValueError(
                f"--batches={','.join(map(str, self.batches))} must rise from 1, as 1,2,4,8"
            )
        # Holds the rest to what it takes.
        self.tuned()

    def tuned(self) -> tune.Config:
        """How candidates are weighed on texts."""
        return tune.Config(
            self.model,
            self.candidates,
            prompts=(),
            count=self.count,
            longest_prompt=self.longest_prompt,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            repeats=1,
            seed=self.seed,
        )


_Choice = tuple[methods.Asked, tuning.Option]


def _name(choice: _Choice | None) -> tuple[methods.Asked, int] | None:
    """What a choice is at any batch: its promise is another at each."""
    return choice and (choice[0], choice[1].length)


@dataclasses.dataclass(frozen=True)
class AtBatch:
    """What a batch size costs and promises.

    Attributes:
      batch: rows.
      step_seconds: of a plain step.
      choices: every method at every draft length, with what it promises.
      passes: v(T, B), pairs of width and cost in plain steps.
    """

    batch: int
    step_seconds: float
    choices: tuple[_Choice, ...]
    passes: tuple[tuple[int, float], ...]

    @property
    def best(self) -> _Choice | None:
        """Of the largest speedup; None where nothing beats plain decoding."""
        choice = max(self.choices, key=lambda choice: choice[1].speedup)
        return choice if choice[1].speedup > 1 else None

    def speedup_of(self, choice: _Choice | None) -> float:
        """Of a method and draft length, at this size; 1 for plain decoding."""
        if choice is None:
            return 1.0
        wanted = _name(choice)
        return next(one[1].speedup for one in self.choices if _name(one) == wanted)


def at_batch(
    bundle: checkpoints.Bundle,
    scores: Mapping[methods.Asked, scoring.Scores],
    batch: int,
    fill: int,
    temperature: float,
) -> AtBatch:
    """Measures steps of so many rows of about `fill` tokens, and weighs the candidates at them."""
    weighed, cost, seconds = tune.weigh(bundle, scores, fill, temperature, batch)
    choices = tuple((asked, option) for asked, options in weighed.items() for option in options)
    return AtBatch(batch, seconds, choices, cost.passes)


def _drafter(bundle: checkpoints.Bundle, choice: _Choice | None) -> types.Drafter:
    """Of a choice, with drafts of its length."""
    if choice is None:
        return decoding.NOTHING
    return tune.of_length(choice[0], choice[1].length).unstopping(bundle)


def _bytes(bundle: checkpoints.Bundle, choice: _Choice | None, batch: int, slots: int) -> int:
    """Weights of both models, once where they share them, and what rows of `slots` tokens hold."""
    drafter = _drafter(bundle, choice)
    weights = {id(leaf): leaf for leaf in jax.tree.leaves((bundle.target, drafter))}
    held = jax.eval_shape(
        lambda: (
            bundle.target.init_cache(batch, slots),
            drafter.init(drafter.params, batch, slots),
        )
    )
    leaves = [*weights.values(), *jax.tree.leaves(held)]
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def paces(rows: Sequence[AtBatch], choice: _Choice | None) -> Callable[[int], float]:
    """Tokens a second of each of n requests that are answered by one method.

    Beyond the largest batch requests wait for a turn.
    """
    sizes = [row.batch for row in rows]
    seconds = [row.step_seconds / row.speedup_of(choice) for row in rows]

    def pace(count: int) -> float:
        inside = min(count, sizes[-1])
        step = float(np.interp(inside, sizes, seconds))
        return inside / count / step

    return pace


def run(config: Config, bundle: checkpoints.Bundle | None = None) -> dict[str, Any]:
    """The report, ready for JSON; of the bundle where the caller has loaded it."""
    binary.start()
    bundle = bundle or targets.load(config.model)
    requests = [request for path in config.log for request in logs.requests(path, bundle)]
    slots = max(request.prompt_tokens + request.new_tokens for request in requests)
    if bundle.target.context_length is not None and slots > bundle.target.context_length:
        raise ValueError(
            f"--log={','.join(config.log)} holds a request of {slots} tokens, and the model's "
            f"context has {bundle.target.context_length}"
        )
    tune.check(bundle, config.tuned())
    own = [request.text for request in requests if request.text is not None]
    own = [text for text in own if len(text[0]) <= config.longest_prompt]
    answered = [text for text in own if text[1]]
    if answered:
        texts = prompt_files.spread(answered, _TEXTS)
    elif own:
        questions = [question for question, _ in prompt_files.spread(own, _TEXTS)]
        texts = tune.answered(bundle, questions, config.tuned())
    else:
        prompts = prompt_files.chosen(prompt_files.read(), config.count)
        texts = tune.profile(bundle, prompts, config.tuned())
    scores = tune.scored(bundle, texts, config.tuned())
    fill = int(np.median([one.prompt_tokens + one.new_tokens / 2 for one in requests]))
    rows = [at_batch(bundle, scores, batch, fill, config.temperature) for batch in config.batches]
    prefills = _prefills(bundle, [None, *(row.best for row in rows)])
    shared = functools.partial(_shared, requests, rows, prefills)
    plain = shared(None)
    concurrency = plain.concurrency(_SHARE)
    chosen = next((row for row in rows if row.batch >= concurrency), rows[-1])
    # One method for all the log: what changed it with every arrival, nobody runs.
    advised = shared(chosen.best)
    return {
        "requests": len(requests),
        "temperature": config.temperature,
        "texts": len(texts),
        "own_texts": bool(own),
        "fill": fill,
        "concurrency_p95": concurrency,
        "is_beyond": concurrency > rows[-1].batch,
        "utilisation": plain.utilisation,
        "latency": {
            "plain": float(np.mean(plain.latencies)),
            "speculative": float(np.mean(advised.latencies)),
        },
        "concurrency_p95_speculative": advised.concurrency(_SHARE),
        "batches": [_told(bundle, row, slots) for row in rows],
        "advice": _told(bundle, chosen, slots),
        "advised_at": [[row.batch, row.speedup_of(chosen.best)] for row in rows],
        "rule_of_thumb": _rule_of_thumb(rows),
        "machine": binary.machine(),
        "versions": binary.versions(),
    }


def _prefills(
    bundle: checkpoints.Bundle, choices: Sequence[_Choice | None]
) -> dict[tuple[methods.Asked, int] | None, float]:
    """Seconds of a prompt's token on its way through the models of every choice, in turn."""
    length = min(_PREFILLED, (bundle.target.context_length or 2 * _PREFILLED) // 2)
    prompt = measure.copying_prompt(bundle.target.vocab_size, length)
    drafters = {_name(choice): _drafter(bundle, choice) for choice in choices}
    variants = {
        name: measure.first_token(bundle.target, drafter, prompt, steps=0)
        for name, drafter in drafters.items()
    }
    found = measure.interleave(variants, _PREFILLS)
    return {name: seconds.median / length for name, seconds in found.items()}


def _shared(
    requests: Sequence[logs.Request],
    rows: Sequence[AtBatch],
    prefills: Mapping[tuple[methods.Asked, int] | None, float],
    choice: _Choice | None,
) -> serving.Timeline:
    """The log's requests on this machine, all answered by one method."""
    prefill = prefills[_name(choice)]
    return serving.share(
        [request.arrival for request in requests],
        [prefill * request.prompt_tokens for request in requests],
        [float(request.new_tokens) for request in requests],
        paces(rows, choice),
    )


def _told(bundle: checkpoints.Bundle, row: AtBatch, slots: int) -> dict[str, Any]:
    told = {
        "batch": row.batch,
        "step_milliseconds": 1000 * row.step_seconds,
        "method": "plain",
        "draft_length": 0,
        "tau": 1.0,
        "speedup": row.speedup_of(row.best),
        "bytes": _bytes(bundle, row.best, row.batch, slots),
        "plain_bytes": _bytes(bundle, None, row.batch, slots),
        "passes": [list(pair) for pair in row.passes],
    }
    if row.best is not None:
        asked, option = row.best
        told |= {"method": str(asked), "draft_length": option.length, "tau": option.tau}
    return told


def _rule_of_thumb(rows: Sequence[AtBatch]) -> dict[str, Any]:
    """`below 8 yes, above 32 hardly`, on this machine; None for sizes that were not measured."""
    below = [row.speedup_of(row.best) for row in rows if row.batch <= _SURE]
    above = [row.speedup_of(row.best) for row in rows if row.batch >= _MARGINAL]
    pays = min(below) > _HARDLY
    # That it pays at fewer says nothing of eight; that it does not is enough.
    is_told = not pays or any(row.batch == _SURE for row in rows)
    return {
        "gain_up_to_8": min(below),
        "holds_below_8": pays if is_told else None,
        "gain_from_32": max(above, default=None),
        "holds_above_32": max(above) <= _HARDLY if above else None,
    }


def table(report: dict[str, Any]) -> str:
    """Batches, then the advice."""
    whose = "the log's" if report["own_texts"] else "the built-in prompts'"
    lines = [
        f"{report['requests']} requests; acceptance of {report['texts']} of {whose} texts",
        f"{'batch':>5}{'plain step':>13}{'v(4)':>7}{'speedup':>9}{'weights, caches':>17}  best",
    ]
    for row in report["batches"]:
        cost = decoding.Cost(0.0, tuple((int(w), float(v)) for w, v in row["passes"]))
        lines.append(
            f"{row['batch']:>5}{row['step_milliseconds']:>10.1f} ms{cost.of_pass(4):>7.2f}"
            f"{row['speedup']:>8.2f}×{row['bytes'] / 1e6:>14.0f} MB  {_best(row)}"
        )
    rule, advice = report["rule_of_thumb"], report["advice"]
    latency = report["latency"]
    lines += [
        "",
        f"at most {report['concurrency_p95']} at once in 95 % of the busy time"
        + (" (more than was measured)" if report["is_beyond"] else "")
        + "; busy "
        f"{100 * report['utilisation']:.0f} % of the time",
        f"advice: {_best(advice)}, {advice['speedup']:.2f}× expected",
        f"weights and caches {advice['bytes'] / 1e6:.0f} MB "
        f"({advice['bytes'] / advice['plain_bytes'] - 1:+.1%})",
        "the same at every batch: "
        + ", ".join(f"{batch}: {speedup:.2f}×" for batch, speedup in report["advised_at"]),
        f"mean latency {latency['plain']:.2f} s, then {latency['speculative']:.2f} s, at most "
        f"{report['concurrency_p95_speculative']} at once",
        f"rule of thumb: up to 8 at once it pays: {_yes(rule['holds_below_8'])} (at least "
        f"{rule['gain_up_to_8']:.2f}×); from 32 on hardly: {_yes(rule['holds_above_32'])}"
        + ("" if rule["gain_from_32"] is None else f" ({rule['gain_from_32']:.2f}×)"),
    ]
    return "\n".join(lines)


def _best(row: dict[str, Any]) -> str:
    if row["method"] == "plain":
        return "plain decoding"
    return f"{row['method']}, draft length {row['draft_length']}, τ {row['tau']:.2f}"


def _yes(told: bool | None) -> str:
    return {True: "holds here", False: "does not hold here", None: "not measured"}[told]


def pictures(report: dict[str, Any]) -> dict[str, Any]:
    """Axes by name: what speculation promises at each size."""
    lines = {
        "the best at each size": [[row["batch"], row["speedup"]] for row in report["batches"]],
        f"advised: {_best(report['advice'])}": report["advised_at"],
    }
    told = {
        name: {batch: (speedup, None, None) for batch, speedup in line}
        for name, line in lines.items()
    }
    return {
        "speedup_by_batch": plots.speedup_against("requests at once", told, "predicted speedup")
    }


def config_from_flags() -> Config:
    """Reads the flags; ValueError names the one that is wrong."""
    if not binary.LOG.value:
        raise ValueError("give --log, a file of JSON lines with `arrival` and lengths")
    try:
        batches = tuple(int(size) for size in binary.BATCHES.value) or _SIZES
    except ValueError as error:
        sizes = ",".join(binary.BATCHES.value)
        raise ValueError(f"--batches={sizes} must be whole numbers") from error
    return Config(
        model=binary.MODEL.value,
        log=tuple(binary.LOG.value),
        candidates=tuple(map(methods.parse, binary.METHODS.value or _CANDIDATES)),
        batches=batches,
        count=binary.given(binary.COUNT, 2),
        longest_prompt=binary.given(binary.LONGEST, 1024),
        max_new_tokens=binary.given(binary.MAX_NEW_TOKENS, 96),
        temperature=binary.given(binary.TEMPERATURE, 0.0),
        seed=binary.SEED.value,
    )


def main(argv: list[str]) -> None:
    """Runs what the flags ask for; bad input ends in one line and exit code 2."""
    made = functools.partial(outputs.illustrated, config_from_flags, run, pictures)
    binary.report(argv, made, table, _TAKES)


if __name__ == "__main__":
    app.run(main, flags_parser=binary.parse_flags)
