"""Distils a draft model from the target, from nothing but the target itself.

    python -m experiments.distill --folder=runs/draft

generates texts with the target, counts its tokens to choose the draft's vocabulary, trains the
draft on the target's laws, and writes it as one file with a card beside it. Every stage goes on
where it was stopped. With --candidates several shapes are trained for a while first, and the cost
model chooses among them.
"""

import dataclasses
import json
import pathlib
import shlex
import sys
import time
from typing import Any

import jax
import numpy as np
from absl import app, flags

import specjax
from experiments import binary, draft_costs, tiny
from specjax import checkpoints
from specjax.training import (
    batches,
    core,
    curves,
    data,
    distillation,
    fitting,
    held_out,
    losses,
    shards,
)

flags.adopt_module_key_flags(binary)
_FOLDER = flags.DEFINE_string("folder", None, "Where data, checkpoints and the draft go.")
_TOKENS = flags.DEFINE_integer("tokens", 1_500_000, "Answer tokens that the target writes.")
_DATA_MINUTES = flags.DEFINE_float("data_minutes", 120.0, "Time for them; more is refused.")
_DOMAINS = flags.DEFINE_list("domains", None, f"In turn, of: {', '.join(data.DOMAINS)}.")
_FILES = flags.DEFINE_list("files", [], "Text files for the domain `files`.")
_TAPS = flags.DEFINE_list("taps", [], "Layers to record besides the final norm.")
_TOP = flags.DEFINE_integer("top", 0, "Most probable tokens to record with the data.")
_LAYERS = flags.DEFINE_list(
    "layers", None, "The target's layers that the draft begins as; default its first and last."
)
_WIDTH = flags.DEFINE_integer(
    "feed_forward", None, "Width of its feed-forward layers; default the target's."
)
_VOCABULARY = flags.DEFINE_integer("vocabulary", 8192, "Tokens that the draft speaks of.")
_CANDIDATES = flags.DEFINE_multi_string(
    "candidates", [], "LAYERS/FEED_FORWARD/VOCABULARY, as in 0+29/1536/8192, to choose among."
)
_CHOICE_STEPS = flags.DEFINE_integer("choice_steps", 200, "Updates that each candidate gets.")
_STEPS = flags.DEFINE_integer("steps", 3000, "Updates.")
_BATCH_TOKENS = flags.DEFINE_integer("batch_tokens", 4096, "Tokens an update, with padding.")
_PARTS = flags.DEFINE_integer("parts", 1, "Parts that a batch is gone through in.")
_RATE = flags.DEFINE_float("rate", 1e-3, "Highest learning rate.")
_LOSS = flags.DEFINE_string("loss", "forward_kl", f"One of: {', '.join(losses.LOSSES)}.")
_BETA = flags.DEFINE_float("beta", 0.5, "Of --loss=jensen_shannon.")
_FEATURES = flags.DEFINE_float("features", 0.5, "Weight of the distance of hidden states.")
_ACCEPTED = flags.DEFINE_float("accepted", 0.0, "Weight of the negative expected accepted length.")
_FROM = flags.DEFINE_string("start_from", None, "A draft to go on from, as when realigning.")
_DTYPE = flags.DEFINE_string("dtype", "float32", "Dtype of the passes; bfloat16 on accelerators.")
_DEVICES = flags.DEFINE_integer("devices", 1, "Devices that share a batch's rows.")
_OUT = flags.DEFINE_string("out", None, "The draft's file; default draft.safetensors in --folder.")

_MOST_HELD_OUT = 16


@dataclasses.dataclass(frozen=True)
class Config:
    """One run, as the flags give it."""

    model: str
    folder: str
    tokens: int
    data_minutes: float
    data: data.Settings
    taps: tuple[int, ...]
    layers: tuple[int, ...] | None
    feed_forward: int | None
    vocabulary: int
    candidates: tuple[distillation.Shape, ...]
    choice_steps: int
    schedule: core.Schedule
    batch_tokens: int
    parts: int
    loss: str
    beta: float
    features: float
    accepted: float
    start_from: str | None
    dtype: str
    devices: int
    seed: int
    draft_length: int
    out: str

    def __post_init__(self):
        if self.loss not in losses.LOSSES:
            raise ValueError(f"--loss={self.loss}: known are {', '.join(losses.LOSSES)}")
        if not 0 <= self.accepted <= 1:
            raise ValueError(f"--accepted={self.accepted} must lie between 0 and 1")
        if self.devices > len(jax.devices()):
            raise ValueError(f"--devices={self.devices}, and there are {len(jax.devices())}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"--dtype={self.dtype} must be float32, bfloat16 or float16")

    def of(self, bundle: checkpoints.Bundle) -> "Config":
        """With what is left to the target filled in."""
        config = bundle.config
        return dataclasses.replace(
            self,
            data=dataclasses.replace(
                self.data, taps=tuple(sorted({*self.taps, config.num_layers}))
            ),
            layers=self.layers or tuple(sorted({0, config.num_layers - 1})),
            feed_forward=self.feed_forward or config.intermediate_size,
            vocabulary=min(self.vocabulary, config.vocab_size),
        )

    @property
    def shape(self) -> distillation.Shape:
        """The draft's sizes, where no candidates are to be chosen among."""
        assert self.layers is not None and self.feed_forward is not None
        return distillation.Shape(self.layers, self.feed_forward, self.vocabulary)

    def objective(self, bundle: checkpoints.Bundle, shape: distillation.Shape):
        """What a draft of this shape minimises."""
        loss = losses.LOSSES[self.loss]
        if self.loss == "jensen_shannon":
            loss = losses.JensenShannon(self.beta)
        return distillation.Distillation(
            distillation.configure(bundle.config, shape),
            loss,
            self.features,
            self.draft_length if self.accepted else 0,
            share=self.accepted,
        )


def generate(config: Config, bundle: checkpoints.Bundle) -> tuple[list[shards.Shard], float]:
    """The data, and the seconds that making it took in all runs."""
    folder = pathlib.Path(config.folder) / "data"
    spent = folder / "seconds.json"
    earlier = json.loads(spent.read_text()) if spent.exists() else 0.0
    began = time.monotonic()

    def report(progress: data.Progress) -> None:
        spent.write_text(json.dumps(earlier + time.monotonic() - began))
        _say(
            f"data: {progress.tokens} of {progress.wanted} tokens in {progress.shards} shards, "
            f"{progress.tokens_per_second:.0f} a second, "
            f"{progress.seconds_left / 60:.0f} minutes left"
        )

    held = data.generate(
        bundle,
        folder,
        config.tokens,
        config.data,
        budget_seconds=60 * config.data_minutes,
        report=report,
    )
    return held, earlier + time.monotonic() - began


def train(
    config: Config,
    bundle: checkpoints.Bundle,
    held: list[shards.Shard],
    shape: distillation.Shape,
    schedule: core.Schedule,
    folder: pathlib.Path,
) -> tuple[distillation.Distillation, Any, Any, dict[str, float]]:
    """Trains a draft: objective, averaged weights, the target's part, and the last measurement."""
    tokens = distillation.vocabulary(
        held, shape.vocabulary, bundle.target.eos_ids, bundle.config.vocab_size
    )
    objective = config.objective(bundle, shape)
    params, frozen = distillation.begin(bundle, shape, tokens)
    if config.start_from is not None:
        params, frozen = _go_on_from(config, bundle, objective, frozen)
    order = batches.Batches(held, config.batch_tokens, config.seed)
    unseen = batches.Batches(held, config.batch_tokens, config.seed, unseen=True)
    measured = [unseen(index) for index in range(min(unseen.per_epoch, _MOST_HELD_OUT))]
    mesh = None
    if config.devices > 1:
        mesh = jax.make_mesh((config.devices,), ("data",))

    def report(line: dict[str, Any]) -> None:
        if "held_out" in line or line["step"] % 50 == 0:
            left = line["seconds"] / line["step"] * (schedule.steps - line["step"])
            found = line.get("held_out", {})
            _say(
                f"step {line['step']} of {schedule.steps}: loss {line['loss']:.3f}, "
                f"overlap {line['overlap']:.3f}"
                + "".join(f", held out {name} {found[name]:.3f}" for name in found)
                + f"; {left / 60:.0f} minutes left"
            )

    state = fitting.fit(
        objective,
        params,
        frozen,
        order,
        schedule,
        folder,
        seed=config.seed,
        parts=config.parts,
        dtype=config.dtype,
        mesh=mesh,
        settings={
            "shape": dataclasses.asdict(shape),
            "schedule": dataclasses.asdict(schedule),
            "loss": repr(objective.loss),
            "features": config.features,
            "accepted": config.accepted,
            "batch_tokens": config.batch_tokens,
            "seed": config.seed,
            "start_from": config.start_from,
            "answer_tokens": sum(shard.answer_tokens for shard in held),
        },
        measure=lambda params: held_out.measure(
            objective, params, frozen, measured, config.draft_length
        ),
        report=report,
    )
    curves.plot(fitting.read_metrics(folder), folder / "curves.png")
    last = next(line for line in reversed(fitting.read_metrics(folder)) if "held_out" in line)
    return objective, state.average, frozen, last["held_out"]


def _go_on_from(config: Config, bundle, objective, frozen):
    """The weights of an earlier draft, which must have the same shape."""
    found, weights, tokens = checkpoints.drafts.weights(str(config.start_from), bundle)
    if found != objective.config:
        raise ValueError(
            f"--start_from={config.start_from} is of another shape: {found}, and "
            f"{objective.config} is asked for"
        )
    _, frozen = distillation.begin(bundle, config.shape, tokens)
    return {name: weights[name] for name in ("layers", "norm")}, frozen


def choose(
    config: Config, bundle: checkpoints.Bundle, held: list[shards.Shard]
) -> tuple[distillation.Shape, list[dict[str, Any]]]:
    """The candidate of the best predicted speedup, and the table of all."""
    if not config.candidates:
        return config.shape, []
    schedule = dataclasses.replace(config.schedule, steps=config.choice_steps)
    agreement = {}
    for shape in config.candidates:
        _say(f"candidate: {shape}")
        name = "-".join(map(str, (*shape.layers, shape.intermediate_size, shape.vocabulary)))
        folder = pathlib.Path(config.folder) / "candidates" / name
        agreement[shape] = train(config, bundle, held, shape, schedule, folder)[3]
    rows = draft_costs.table(bundle, agreement, config.draft_length)
    best = max(rows, key=lambda row: row["speedup"])
    return config.candidates[rows.index(best)], rows


def run(config: Config) -> dict[str, Any]:
    """The report, ready for JSON; also the card of the draft."""
    binary.start()
    with binary.Progress(f"loading {config.model}"):
        bundle = tiny.bundle() if config.model == "tiny" else specjax.load(config.model)
        jax.block_until_ready(bundle.target.params)
    config = config.of(bundle)
    held, data_seconds = generate(config, bundle)
    shape, candidates = choose(config, bundle, held)
    folder = pathlib.Path(config.folder) / "training"
    objective, params, frozen, measured = train(
        config, bundle, held, shape, config.schedule, folder
    )
    checkpoints.drafts.write(config.out, bundle, objective.config, params, frozen["tokens"])
    seconds = fitting.read_metrics(folder)[-1]["seconds"]
    card = {
        "command": shlex.join(["python", "-m", "experiments.distill", *sys.argv[1:]]),
        "target": config.model,
        "seed": config.seed,
        "data": {
            **dataclasses.asdict(config.data),
            "answer_tokens": sum(shard.answer_tokens for shard in held),
            "conversations": sum(map(len, held)),
            "held_out_conversations": sum(len(shard.rows(unseen=True)) for shard in held),
            "minutes": data_seconds / 60,
        },
        "shape": dataclasses.asdict(shape),
        "candidates": candidates,
        "coverage": _coverage(held, frozen["tokens"]),
        "training": {
            **dataclasses.asdict(config.schedule),
            "batch_tokens": config.batch_tokens,
            "loss": config.loss,
            "features": config.features,
            "accepted": config.accepted,
            "epochs": config.schedule.steps
            / batches.Batches(held, config.batch_tokens, config.seed).per_epoch,
            "minutes": seconds / 60,
        },
        "held_out": measured,
        "bytes": pathlib.Path(config.out).stat().st_size,
        "versions": binary.versions(),
    }
    pathlib.Path(config.out).with_suffix(".json").write_text(
        json.dumps(card, indent=1) + "\n", encoding="utf-8"
    )
    return {**card, "draft": config.out}


def _coverage(held: list[shards.Shard], tokens: Any) -> float:
    """The share of the held-out answers' tokens that the draft speaks of."""
    written = np.concatenate(
        [shard.text(row)[1] for shard in held for row in shard.rows(unseen=True)]
    )
    return float(np.mean(np.isin(written, np.asarray(tokens))))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(report: dict[str, Any]) -> str:
    """What was made, and what it measured."""
    lines = []
    if report["candidates"]:
        lines.append(draft_costs.text(report["candidates"]))
    data_part, training, measured = report["data"], report["training"], report["held_out"]
    lines += [
        f"draft        {report['draft']}, {report['bytes'] / 1e6:.1f} MB",
        f"data         {data_part['answer_tokens']} tokens, {data_part['conversations']} "
        f"conversations, {data_part['minutes']:.1f} minutes",
        f"vocabulary   {report['shape']['vocabulary']} tokens, {report['coverage']:.1%} of text",
        f"training     {training['steps']} updates, {training['epochs']:.1f} epochs, "
        f"{training['minutes']:.1f} minutes",
        f"held out     overlap {measured['overlap']:.3f}, greedy agreement "
        f"{measured['agreement']:.3f}, τ {measured['tau']:.2f}",
    ]
    return "\n".join(lines)


def parse_shape(text: str) -> distillation.Shape:
    """A shape from LAYERS/FEED_FORWARD/VOCABULARY; ValueError says how it is written."""
    try:
        layers, width, vocabulary = text.split("/")
        return distillation.Shape(
            tuple(int(layer) for layer in layers.split("+")), int(width), int(vocabulary)
        )
    except ValueError as error:
        raise ValueError(
            f"--candidates={text!r}: write LAYERS/FEED_FORWARD/VOCABULARY, as in 0+29/1536/8192"
        ) from error


def _integers(name: str, values: list[str]) -> tuple[int, ...]:
    try:
        return tuple(int(value) for value in values)
    except ValueError as error:
        raise ValueError(f"--{name}={','.join(values)}: {error}") from error


def config_from_flags() -> Config:
    """Reads the flags; ValueError names the one that is wrong."""
    if _FOLDER.value is None:
        raise ValueError("give --folder, where data, checkpoints and the draft go")
    out = _OUT.value or str(pathlib.Path(_FOLDER.value) / "draft.safetensors")
    return Config(
        model=binary.MODEL.value,
        folder=_FOLDER.value,
        tokens=_TOKENS.value,
        data_minutes=_DATA_MINUTES.value,
        data=data.Settings(
            seed=binary.SEED.value,
            domains=data.GENERIC if _DOMAINS.value is None else tuple(_DOMAINS.value),
            batch=binary.given(binary.BATCH, 128),
            max_new_tokens=binary.given(binary.MAX_NEW_TOKENS, 160),
            top=_TOP.value,
            files=tuple(_FILES.value),
        ),
        taps=_integers("taps", _TAPS.value),
        layers=None if _LAYERS.value is None else _integers("layers", _LAYERS.value),
        feed_forward=_WIDTH.value,
        vocabulary=_VOCABULARY.value,
        candidates=tuple(map(parse_shape, _CANDIDATES.value)),
        choice_steps=_CHOICE_STEPS.value,
        schedule=core.Schedule(_STEPS.value, _RATE.value),
        batch_tokens=_BATCH_TOKENS.value,
        parts=_PARTS.value,
        loss=_LOSS.value,
        beta=_BETA.value,
        features=_FEATURES.value,
        accepted=_ACCEPTED.value,
        start_from=_FROM.value,
        dtype=_DTYPE.value,
        devices=_DEVICES.value,
        seed=binary.SEED.value,
        draft_length=int(binary.draft_length() or 5),
        out=out,
    )


def main(argv: list[str]) -> None:
    """Runs what the flags ask for; bad input ends in one line and exit code 2."""
    binary.report(argv, lambda: run(config_from_flags()), table)


if __name__ == "__main__":
    app.run(main, flags_parser=binary.parse_flags)
