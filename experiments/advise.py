"""What a machine had better do with its traffic: method, draft length, gain and memory.

    python -m experiments.advise --log=requests.jsonl

reads when requests came and how long they were: JSON lines with `arrival` (seconds, or ISO 8601)
and `prompt_tokens` and `new_tokens`, or texts as `experiments.logs` says. It finds how many the
machine would have at once (plain decoding, requests sharing it as rows of a batch), measures here
what steps of batches of those sizes cost, and tells what speculation promises at each. Where the
log holds texts, acceptance is scored on them; otherwise on answers to the built-in prompts.
"""

import dataclasses
import datetime
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import app

from experiments import binary, json_lines, logs, measure, methods, prompt_files, targets, tune
from specjax import checkpoints, decoding
from specjax.analysis import scoring, serving, tuning

_TAKES = binary.takes(
    binary.BATCHES,
    binary.COUNT,
    binary.LOG,
    binary.LONGEST,
    binary.MAX_NEW_TOKENS,
    binary.METHODS,
    binary.TEMPERATURE,
)
_CANDIDATES = ("prompt_lookup", "draft")
_SIZES = (1, 2, 4, 8, 16, 32)
# Of a log, spread over it: scoring takes a second or so each.
_TEXTS = 16
_SHARE = 0.95
_PREFILLED = 256
# What practitioners say: sure below, marginal above.
_SURE, _MARGINAL = 8, 32
_HARDLY = 1.1


@dataclasses.dataclass(frozen=True)
class Request:
    """A line of a log.

    Attributes:
      arrival: seconds.
      prompt_tokens, new_tokens: lengths.
      text: prompt and answer as token ids, where the line holds them; without an answer it is
        empty.
    """

    arrival: float
    prompt_tokens: int
    new_tokens: int
    text: tuple[list[int], list[int]] | None


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


def read(path: str, bundle: checkpoints.Bundle) -> list[Request]:
    """Every line of a log.

    Raises:
      ValueError: a file that cannot be read or is empty, or a line that is no request; the message
        names file, line and field.
    """
    requests = []
    for line in json_lines.read("log", path):
        given = line.given
        arrival: Any = _seconds(given.get("arrival"))
        line.check("arrival", arrival is not None, "seconds, or a time as ISO 8601 has it")
        if "answer" in given:
            text = logs.pair(line).tokens(bundle)
            lengths: dict[str, Any] = {"prompt_tokens": len(text[0]), "new_tokens": len(text[1])}
        else:
            text = None
            lengths = {name: given.get(name) for name in ("prompt_tokens", "new_tokens")}
            if "prompt" in given:
                line.check("prompt", json_lines.is_text(given["prompt"]), "a text")
                text = (bundle.chat(given["prompt"]), [])
                lengths["prompt_tokens"] = len(text[0])
            for name, length in lengths.items():
                is_whole = isinstance(length, int) and not isinstance(length, bool) and length >= 1
                line.check(name, is_whole, "a whole number of at least 1, or give `answer`")
        requests.append(Request(arrival, text=text, **lengths))
    return requests


def _seconds(told: Any) -> float | None:
    """A time; None where it is none."""
    if isinstance(told, str):
        try:
            return datetime.datetime.fromisoformat(told).timestamp()
        except ValueError:
            return None
    is_number = isinstance(told, int | float) and not isinstance(told, bool)
    return float(told) if is_number and np.isfinite(told) else None


@dataclasses.dataclass(frozen=True)
class AtBatch:
    """What a batch size costs and promises.

    Attributes:
      batch: rows.
      step_seconds: of a plain step.
      best: the best method with its option; None where nothing beats plain decoding.
      speedup: that it promises; 1 then.
      bytes: weights, caches and drafts of so many rows.
      passes: v(T, B), pairs of width and cost in plain steps.
    """

    batch: int
    step_seconds: float
    best: tuple[methods.Asked, tuning.Option] | None
    speedup: float
    bytes: int
    passes: tuple[tuple[int, float], ...]


def at_batch(
    bundle: checkpoints.Bundle,
    scores: Mapping[methods.Asked, scoring.Scores],
    batch: int,
    slots: int,
) -> AtBatch:
    """Measures steps of so many rows, and weighs the candidates at them."""
    weighed, cost, seconds = tune.weigh(bundle, scores, batch)
    found = [(asked, option) for asked, options in weighed.items() for option in options]
    asked, option = max(found, key=lambda pair: pair[1].speedup)
    pays = option.speedup > 1
    drafter = tune.of_length(asked, option.length).unstopping(bundle) if pays else decoding.NOTHING
    return AtBatch(
        batch,
        seconds,
        (asked, option) if pays else None,
        option.speedup if pays else 1.0,
        _bytes(bundle, drafter, batch, slots),
        cost.passes,
    )


def _bytes(bundle: checkpoints.Bundle, drafter: Any, batch: int, slots: int) -> int:
    """Weights of both models, once where they share them, and what rows of `slots` tokens hold."""
    weights = {id(leaf): leaf for leaf in jax.tree.leaves((bundle.target, drafter))}
    held = jax.eval_shape(
        lambda: (
            bundle.target.init_cache(batch, slots),
            drafter.init(drafter.params, batch, slots),
        )
    )
    leaves = [*weights.values(), *jax.tree.leaves(held)]
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def paces(rows: Sequence[AtBatch], speculates: bool) -> Callable[[int], float]:
    """Tokens a second of each of n requests; beyond the largest batch requests wait for a turn."""
    sizes = [row.batch for row in rows]
    seconds = [row.step_seconds / (row.speedup if speculates else 1.0) for row in rows]

    def pace(count: int) -> float:
        inside = min(count, sizes[-1])
        step = float(np.interp(inside, sizes, seconds))
        return inside / count / step

    return pace


def run(config: Config, bundle: checkpoints.Bundle | None = None) -> dict[str, Any]:
    """The report, ready for JSON; of the bundle where the caller has loaded it."""
    binary.start()
    bundle = bundle or targets.load(config.model)
    requests = [request for path in config.log for request in read(path, bundle)]
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
    slots = max(request.prompt_tokens + request.new_tokens for request in requests)
    if bundle.target.context_length is not None and slots > bundle.target.context_length:
        raise ValueError(
            f"--log={','.join(config.log)} holds a request of {slots} tokens, and the model's "
            f"context has {bundle.target.context_length}"
        )
    scores = tune.scored(bundle, texts, config.tuned())
    rows = [at_batch(bundle, scores, batch, slots) for batch in config.batches]
    prompt = measure.copying_prompt(bundle.target.vocab_size, _PREFILLED)
    variant = measure.first_token(bundle.target, decoding.NOTHING, prompt, steps=0)
    prefill = measure.interleave({"": variant}, 3)[""].median / _PREFILLED
    arrivals = [request.arrival for request in requests]
    prefills = [prefill * request.prompt_tokens for request in requests]
    tokens = [float(request.new_tokens) for request in requests]
    shared = {
        name: serving.share(arrivals, prefills, tokens, paces(rows, speculates))
        for name, speculates in (("plain", False), ("speculative", True))
    }
    concurrency = shared["plain"].concurrency(_SHARE)
    chosen = next((row for row in rows if row.batch >= concurrency), rows[-1])
    return {
        "requests": len(requests),
        "temperature": config.temperature,
        "texts": len(texts),
        "own_texts": bool(own),
        "concurrency_p95": concurrency,
        "is_beyond": concurrency > rows[-1].batch,
        "utilisation": shared["plain"].utilisation,
        "latency": {name: float(np.mean(line.latencies)) for name, line in shared.items()},
        "concurrency_p95_speculative": shared["speculative"].concurrency(_SHARE),
        "batches": [_told(row) for row in rows],
        "advice": _told(chosen),
        "rule_of_thumb": _rule_of_thumb(rows),
        "versions": binary.versions(),
    }


def _told(row: AtBatch) -> dict[str, Any]:
    told = {
        "batch": row.batch,
        "step_milliseconds": 1000 * row.step_seconds,
        "method": "plain",
        "draft_length": 0,
        "tau": 1.0,
        "speedup": row.speedup,
        "bytes": row.bytes,
        "passes": [list(pair) for pair in row.passes],
    }
    if row.best is not None:
        asked, option = row.best
        told |= {"method": str(asked), "draft_length": option.length, "tau": option.tau}
    return told


def _rule_of_thumb(rows: Sequence[AtBatch]) -> dict[str, Any]:
    """`below 8 yes, above 32 hardly`, on this machine; None for sizes that were not measured."""
    below = [row.speedup for row in rows if row.batch <= _SURE]
    above = [row.speedup for row in rows if row.batch >= _MARGINAL]
    return {
        "gain_up_to_8": min(below),
        "holds_below_8": min(below) > _HARDLY,
        "gain_from_32": max(above, default=None),
        "holds_above_32": max(above) <= _HARDLY if above else None,
    }


def table(report: dict[str, Any]) -> str:
    """Batches, then the advice."""
    whose = "the log's" if report["own_texts"] else "the built-in prompts'"
    lines = [
        f"{report['requests']} requests; acceptance of {report['texts']} of {whose} texts",
        f"{'batch':>5}{'plain step':>13}{'v(4)':>7}{'speedup':>9}{'memory':>10}  best",
    ]
    for row in report["batches"]:
        cost = decoding.Cost(0.0, tuple((int(w), float(v)) for w, v in row["passes"]))
        lines.append(
            f"{row['batch']:>5}{row['step_milliseconds']:>10.1f} ms{cost.of_pass(4):>7.2f}"
            f"{row['speedup']:>8.2f}×{row['bytes'] / 1e6:>7.0f} MB  {_best(row)}"
        )
    rule, advice = report["rule_of_thumb"], report["advice"]
    latency = report["latency"]
    lines += [
        "",
        f"at most {report['concurrency_p95']} at once in 95 % of the busy time"
        + (" (more than was measured)" if report["is_beyond"] else "")
        + "; busy "
        f"{100 * report['utilisation']:.0f} % of the time",
        f"advice: {_best(advice)}, {advice['speedup']:.2f}× expected, "
        f"{advice['bytes'] / 1e6:.0f} MB",
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
    binary.report(argv, lambda: run(config_from_flags()), table, _TAKES)


if __name__ == "__main__":
    app.run(main, flags_parser=binary.parse_flags)
