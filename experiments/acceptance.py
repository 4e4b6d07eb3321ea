"""Acceptance by domain: tokens a target step (τ) and acceptance rate on files of prompts.

    python -m experiments.acceptance --prompts=questions.jsonl --method=draft

decodes the first turn of every prompt. With --compare each prompt is also decoded plainly, in turn
with the method, alone and warm, for the wall clock; without it prompts go in batches, which is
quicker and gives the same counts (but with --draft_length=auto, whose lengths hang on all rows).
Every prompt is a JSON line of --out as soon as it is done, and a run that was stopped goes on after
the last.
"""

import dataclasses
import json
import pathlib
import statistics as medians
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app

from experiments import binary, methods, prompt_files, targets
from specjax import checkpoints, decoding, types, verification
from specjax.training import folders

_TAKES = binary.takes(
    binary.BATCH,
    binary.COMPARE,
    binary.COUNT,
    binary.DRAFT,
    binary.DRAFT_LENGTH,
    binary.LONGEST,
    binary.MAX_NEW_TOKENS,
    binary.METHOD,
    binary.OUT,
    binary.PROMPTS,
    binary.RULE,
    binary.STOP,
    binary.TEMPERATURE,
)

# Capacities, so that a run compiles a handful of programs.
_CAPACITIES = (256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192)
_CHUNK = 64


@dataclasses.dataclass(frozen=True)
class Config:
    """One run, as the flags give it."""

    model: str
    method: str
    settings: methods.Settings
    prompts: tuple[str, ...]
    count: int | None
    longest_prompt: int
    max_new_tokens: int
    temperature: float
    rule: str | None
    batch: int
    seed: int
    compare: bool
    out: str | None

    def __post_init__(self):
        methods.check(self.method, self.settings)
        for name in ("count", "longest_prompt", "max_new_tokens", "batch"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)} must be at least 1")
        types.Sampling(self.temperature)
        if self.compare and self.batch != 1:
            raise ValueError(f"--compare times prompts one by one, and --batch={self.batch}")

    def fixed(self, bundle: checkpoints.Bundle) -> dict[str, Any]:
        """What two records must share to stand in one file."""
        kept = dataclasses.asdict(self) | {"target": folders.fingerprint(bundle.target.params)}
        kept["settings"] = dataclasses.asdict(methods.resolved(self.method, self.settings))
        if self.method == "draft":
            # What a draft is, wherever it lies.
            kept["draft_content"] = folders.digest(self.settings.draft or methods.SHIPPED)
            del kept["settings"]["draft"]
        return {name: kept[name] for name in kept if name not in ("prompts", "count", "out")}


def greedily(
    bundle: checkpoints.Bundle,
    draft: pathlib.Path | str,
    draft_length: int,
    prompts: tuple[str, ...],
    folder: pathlib.Path,
    **others: Any,
) -> Config:
    """Greedy acceptance of a draft that never stops, in batches; others are fields of `Config`."""
    # Records are of this draft with this target on these prompts, wherever they lie.
    contents = [folders.fingerprint(bundle.target.params), *map(folders.digest, (draft, *prompts))]
    out = folder / f"acceptance-{'-'.join(str(content)[:8] for content in contents)}.jsonl"
    asked = {
        **{"count": None, "longest_prompt": 1536, "max_new_tokens": 128, "batch": 8, "seed": 0},
        **{"temperature": 0.0, "rule": None, "compare": False},
        **others,
    }
    settings = methods.Settings(draft_length, str(draft), stop="never")
    return Config(bundle.name, "draft", settings, prompts, out=str(out), **asked)


def measure(
    decoder: methods.Decoder,
    asked: Sequence[tuple[prompt_files.Prompt, list[int]]],
    config: Config,
) -> list[dict[str, Any]]:
    """Decodes prompts of one capacity together: a record for each."""
    rows = [tokens for _, tokens in asked]
    # The last batch starts over, so that all have one size.
    padded = [rows[index % len(rows)] for index in range(config.batch)]
    key = jax.random.key(config.seed)
    options = {
        "keys": jnp.stack([jax.random.fold_in(key, hash_of(tokens)) for tokens in padded]),
        "max_new_tokens": config.max_new_tokens,
        "sampling": types.Sampling(config.temperature),
        "capacity": _capacity(max(map(len, rows)), config),
        "chunk": _CHUNK,
    }
    result, prefill, seconds = _decode(decoder, padded, options)
    plain = None
    if config.compare:
        only = methods.Decoder(decoder.target, decoding.NOTHING, verification.get("match"))
        plain = _decode(only, padded, options)
    records = []
    for row, (prompt, tokens) in enumerate(asked):
        counts = jax.tree.map(lambda leaf, row=row: np.asarray(leaf[row]), result.statistics)
        new = result.new_tokens[row]
        record = {
            "prompt": prompt.key,
            "question_id": prompt.question,
            "group": prompt.group,
            "prompt_tokens": len(tokens),
            "new_tokens": len(new),
            "target_steps": int(counts.target_steps),
            "tested": counts.tested.tolist(),
            "accepted": counts.accepted.tolist(),
            "finish_reason": result.finish_reasons[row],
        }
        if plain is not None:
            (text,) = plain[0].new_tokens
            record |= {
                "prefill_seconds": prefill,
                "seconds": seconds,
                "plain_prefill_seconds": plain[1],
                "plain_seconds": plain[2],
                "plain_new_tokens": len(text),
                "identical": text == new if _is_pathwise(decoder, config) else None,
            }
        records.append(record)
    return records


def _is_pathwise(decoder: methods.Decoder, config: Config) -> bool:
    """Whether a text, and not only its law, is that of plain decoding."""
    return config.temperature == 0 or decoder.rule.draw is not None


def hash_of(tokens: Sequence[int]) -> int:
    """A number that a prompt has in whatever batch it stands: 31 bits."""
    value = 0
    for token in tokens:
        value = (value * 1000003 + token) % (1 << 31)
    return value


def _decode(
    decoder: methods.Decoder, prompts: list[list[int]], options: dict[str, Any]
) -> tuple[decoding.DecodeResult, float, float]:
    """A decode, and the seconds of its prefill and of its loop; programs are compiled before."""

    def run() -> tuple[decoding.DecodeResult, float, float]:
        asked = time.perf_counter()
        request, state = decoding.init(decoder.target, decoder.drafter, prompts, **options)
        jax.block_until_ready(state)
        began = time.perf_counter()
        result = decoder.decode(request, state)
        jax.block_until_ready(result.tokens)
        return result, began - asked, time.perf_counter() - began

    shape = (decoder.drafter.name, decoder.drafter.nodes, len(prompts), options["capacity"])
    if shape not in _WARM:
        decoder.warm(prompts, options)
        run()
        _WARM.add(shape)
    return run()


_WARM: set[tuple[str, int, int, int]] = set()


def _capacity(longest: int, config: Config) -> int:
    needed = longest + config.max_new_tokens
    return next((size for size in _CAPACITIES if size >= needed), needed)


def by_group(records: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """τ, acceptance and speedup of every group, and of all prompts together."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(record["group"], []).append(record)
    made = {name: _summary(some) for name, some in sorted(groups.items())}
    return made | {"overall": _summary(records)}


def _summary(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    tested, accepted = (
        np.sum([record[name] for record in records], axis=0) for name in ("tested", "accepted")
    )
    new = sum(record["new_tokens"] for record in records)
    summary = {
        "prompts": len(records),
        "new_tokens": new,
        "tau": new / max(sum(record["target_steps"] for record in records), 1),
        "acceptance_rate": float(accepted.sum() / max(tested.sum(), 1)),
        "acceptance_by_position": [
            round(float(a / t), 4) if t else None for a, t in zip(accepted, tested, strict=True)
        ],
    }
    if all("seconds" in record for record in records):
        loop, whole = ("seconds",), ("prefill_seconds", "seconds")
        summary |= {
            "speedup": _speedup(records, loop),
            "speedup_median": medians.median(_speedup([record], loop) for record in records),
            "speedup_with_prefill": _speedup(records, whole),
            "identical": None
            if any(record["identical"] is None for record in records)
            else sum(record["identical"] for record in records),
        }
    return summary


def _speedup(records: Sequence[dict[str, Any]], parts: Sequence[str]) -> float:
    """Tokens a second over those of plain decoding, of so many parts of the time."""
    paces = []
    for plain in ("", "plain_"):
        tokens = sum(record[f"{plain}new_tokens"] for record in records)
        paces.append(tokens / sum(record[plain + part] for record in records for part in parts))
    return paces[0] / paces[1]


def run(config: Config, bundle: checkpoints.Bundle | None = None) -> dict[str, Any]:
    """The report, ready for JSON; of the bundle where the caller has loaded it."""
    chosen = _chosen(config)
    binary.start()
    bundle = bundle or targets.load(config.model)
    decoder = methods.decoder(config.method, bundle, config.settings, config.rule)
    if not chosen:
        raise ValueError("no prompts were given to measure on")
    keys = {prompt.key for prompt in chosen}
    # A file may hold those of other prompts too.
    records = [record for record in _earlier(config, bundle) if record["prompt"] in keys]
    done = {record["prompt"] for record in records}
    waiting = [
        (prompt, bundle.chat(prompt.turns[0])) for prompt in chosen if prompt.key not in done
    ]
    left_out = [prompt for prompt, tokens in waiting if len(tokens) > config.longest_prompt]
    waiting = [asked for asked in waiting if len(asked[1]) <= config.longest_prompt]
    if not waiting and not records:
        raise ValueError(
            f"all {len(left_out)} prompts have more than --longest_prompt={config.longest_prompt} "
            "tokens"
        )
    # Prompts of one capacity follow each other: few programs, and batches of like lengths.
    waiting.sort(key=lambda asked: len(asked[1]))
    with binary.Progress(f"{config.method} on {len(waiting)} prompts") as progress:
        for first in range(0, len(waiting), config.batch):
            some = measure(decoder, waiting[first : first + config.batch], config)
            records += some
            if config.out is not None:
                folders.append(config.out, "".join(json.dumps(one) + "\n" for one in some))
            progress.at(min(first + config.batch, len(waiting)), len(waiting))
    return {
        **config.fixed(bundle),
        "left_out": len(left_out),
        "groups": by_group(records),
        "versions": binary.versions(),
    }


def _chosen(config: Config) -> list[prompt_files.Prompt]:
    groups: dict[str, list[prompt_files.Prompt]] = {}
    for prompt in prompt_files.read(*config.prompts):
        groups.setdefault(prompt.group, []).append(prompt)
    return [p for some in groups.values() for p in prompt_files.spread(some, config.count)]


def _earlier(config: Config, bundle: checkpoints.Bundle) -> list[dict[str, Any]]:
    """Records of a run that was stopped; the first line says what it measured."""
    if config.out is None:
        return []
    path, own = pathlib.Path(config.out), json.loads(json.dumps(config.fixed(bundle)))
    if not path.exists():
        folders.write(path, json.dumps(own) + "\n")
    try:
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:  # a kill may leave half a line
            folders.write(path, whole)
        found, *records = map(json.loads, whole.splitlines())
        if any("prompt" not in record for record in records):
            raise ValueError("its records do not name their prompts; give another file")
    except (OSError, ValueError) as error:
        raise ValueError(f"--out={path} cannot be used: {error}") from error
    if found != own:
        raise ValueError(f"--out={path} holds another measurement: {found}; give another file")
    return records


def table(report: dict[str, Any]) -> str:
    """A line a group."""
    timed = "speedup" in report["groups"]["overall"]
    told = {name: value for name, value in report["settings"].items() if value is not None}
    lines = [
        f"{report['method']} {told}, temperature {report['temperature']}, "
        f"{report['max_new_tokens']} new tokens; {report['left_out']} prompts left out as too long",
        f"{'group':<20}{'prompts':>8}{'τ':>7}{'α':>7}  by position" + " " * 20 * timed,
    ]
    for name, row in report["groups"].items():
        positions = " ".join(
            "–" if rate is None else f"{rate:.2f}" for rate in row["acceptance_by_position"]
        )
        line = (
            f"{name:<20}{row['prompts']:>8}{row['tau']:>7.2f}{row['acceptance_rate']:>7.2f}  "
            f"{positions}"
        )
        if timed:
            line += (
                f"  {row['speedup']:.2f}× (median {row['speedup_median']:.2f}, with prefill "
                f"{row['speedup_with_prefill']:.2f})"
            )
            if row["identical"] is not None:
                line += f", identical {row['identical']}"
        lines.append(line)
    return "\n".join(lines)


def config_from_flags() -> Config:
    """Reads the flags; ValueError names the one that is wrong."""
    return Config(
        model=binary.MODEL.value,
        method=binary.given(binary.METHOD, "draft"),
        settings=methods.Settings(
            binary.draft_length(auto=True), binary.DRAFT.value, stop=binary.STOP.value
        ),
        prompts=tuple(binary.PROMPTS.value),
        count=binary.COUNT.value,
        longest_prompt=binary.given(binary.LONGEST, 1536),
        max_new_tokens=binary.given(binary.MAX_NEW_TOKENS, 128),
        temperature=binary.given(binary.TEMPERATURE, 0.0),
        rule=binary.RULE.value,
        batch=binary.given(binary.BATCH, 1 if binary.COMPARE.value else 8),
        seed=binary.SEED.value,
        compare=binary.COMPARE.value,
        out=binary.OUT.value,
    )


def main(argv: list[str]) -> None:
    """Runs what the flags ask for; bad input ends in one line and exit code 2."""
    binary.report(argv, lambda: run(config_from_flags()), table, _TAKES)


if __name__ == "__main__":
    app.run(main, flags_parser=binary.parse_flags)
