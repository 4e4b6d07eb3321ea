"""The stages of a distillation: data, choice, training; each goes on where it stopped."""

import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from experiments import draft_costs
from experiments.distill_config import OPTIMIZERS, Config
from specjax import checkpoints
from specjax.training import (
    batches,
    copying,
    curves,
    data,
    distillation,
    fitting,
    folders,
    held_out,
    on_policy,
    shapes,
    shards,
)

__all__ = [
    "Trained",
    "begin",
    "check_shape",
    "claimed_tokens",
    "choose",
    "copying_steps",
    "generate",
    "of_draft",
    "train",
]

_MOST_UNSEEN = 24
_MEASURE_EVERY = 400
# Of keys: others of the same seed drew the text and are the objective's.
_STREAM = 0x5EED0003
_CLAIMED = (
    *("batch_tokens", "loss", "beta", "accepted", "on_policy", "draft_length", "dtype"),
    *("parts", "devices", "seed", "optimizer"),
)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained draft.

    Attributes:
      objective: knows its configuration.
      params: averaged weights.
      frozen: the target's part.
      unseen: batches of text held out.
      held_out: what was measured on them last.
      seconds: of training, in all runs.
      epochs: times that the data was gone through.
    """

    objective: distillation.Distillation
    params: Any
    frozen: Any
    unseen: list[batches.Batch]
    held_out: Mapping[str, float]
    seconds: float
    epochs: float

    def measure(self, texts: list[batches.Batch], length: int) -> dict[str, float]:
        """Acceptance on other texts, as `held_out.measure` tells it."""
        return held_out.measure(self.objective, self.params, self.frozen, texts, length)


def generate(
    config: Config, bundle: checkpoints.Bundle, least: int = 1
) -> tuple[list[shards.Shard], float]:
    """The data, in so many shards at the least, and the seconds that making it took in all runs."""
    folder = pathlib.Path(config.folder) / "data"
    spent = folder / "seconds.json"
    earlier = _seconds(spent)
    began = time.monotonic()

    def report(progress: data.Progress) -> None:
        folders.write(spent, json.dumps(earlier + time.monotonic() - began))
        pace = "the next one compiles first"
        if progress.tokens_per_second:
            pace = (
                f"{progress.tokens_per_second:.0f} a second, "
                f"{progress.seconds_left / 60:.0f} minutes left"
            )
        _say(
            f"data: {progress.tokens} of {progress.wanted} tokens in {progress.shards} shards, "
            + pace
        )

    held = data.generate(
        bundle,
        folder,
        config.tokens,
        config.texts,
        least=least,
        budget_seconds=60 * config.data_minutes,
        report=report,
    )
    return held, _seconds(spent)


def _seconds(path: pathlib.Path) -> float:
    if not path.exists():
        return 0.0
    try:
        return float(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be used: {error}; remove it to count anew") from error


def choose(
    config: Config, bundle: checkpoints.Bundle, held: list[shards.Shard]
) -> tuple[shapes.Shape, list[dict[str, Any]]]:
    """The candidate of the best predicted speedup, and the table of all."""
    if not config.candidates:
        return config.shape, []
    short = dataclasses.replace(config, steps=config.choice_steps)
    candidates = tuple(dict.fromkeys(config.candidates))
    folder = pathlib.Path(config.folder) / "candidates"
    # Timed again, another might win, and what was trained of the first would be lost.
    folders.claim(
        folder / "settings.json",
        {
            "candidates": list(map(str, candidates)),
            "claims": [_claims(short, held, shape) for shape in candidates],
            "start_from": folders.digest(config.start_from),
            "schedule": dataclasses.asdict(short.schedule),
            "copying_steps": config.copying_steps,
        },
    )
    kept = folder / "choice.json"
    if kept.exists():
        found = folders.read(kept)
        if found.keys() != {"best", "rows"}:
            raise ValueError(f"{kept} holds no choice; remove it to choose anew")
        return candidates[found["best"]], found["rows"]
    measured, texts = {}, {}
    for shape in candidates:
        _say(f"candidate: {shape}")
        sizes = (shape.told, shape.intermediate_size, shape.vocabulary)
        name = "-".join(map(str, sizes)).replace("+", "-")
        trained = train(short, bundle, held, shape, folder / name)
        measured[shape] = trained.held_out
        texts[shape] = held_out.guesses(
            trained.objective, trained.params, trained.frozen, trained.unseen
        )
    rows = draft_costs.table(bundle, measured, texts, config.draft_length)
    best = max(range(len(rows)), key=lambda index: rows[index]["speedup"])
    folders.write_json(kept, {"best": best, "rows": rows})
    return candidates[best], rows


def _claims(config: Config, held: list[shards.Shard], shape: shapes.Shape) -> dict[str, Any]:
    """What a training folder must be gone on with."""
    return {
        **{name: getattr(config, name) for name in _CLAIMED},
        "features": config.features_weight(shape),
        "copying": config.copying_weight(shape.num_layers),
        "shape": dataclasses.asdict(shape),
        "answer_tokens": sum(shard.answer_tokens for shard in held),
    }


def train(
    config: Config,
    bundle: checkpoints.Bundle,
    held: list[shards.Shard],
    shape: shapes.Shape,
    folder: pathlib.Path,
) -> Trained:
    """Trains a draft, or goes on training it."""
    if config.accepted and not any(np.any(shard.temperature == 1) for shard in held):
        raise ValueError(
            f"--accepted={config.accepted} counts answers drawn at temperature 1, and of "
            f"temperatures={config.texts.temperatures} none is; add 1.0 to them"
        )
    params, frozen = begin(config, bundle, held, shape)
    objective = config.objective(bundle.config, shape)
    claimed = _claims(config, held, shape)
    params, copying_seconds = _taught_to_copy(
        config, objective, params, frozen, folder / "copying", claimed
    )
    recorded = batches.Batches(
        held, config.batch_tokens, config.seed, multiple=config.parts * config.devices
    )
    order: Callable[[int, Any], batches.Batch] = recorded
    if config.on_policy:
        order = on_policy.OnPolicy(
            bundle, objective, frozen, recorded, share=config.on_policy, seed=config.seed
        )
    unseen = _unseen(config, held)
    _say_where("training", folder, config.steps)
    state = fitting.fit(
        config.lessons(objective),
        params,
        frozen,
        order,
        config.schedule,
        folder,
        seed=config.seed,
        parts=config.parts,
        dtype=config.dtype,
        optimizer=OPTIMIZERS[config.optimizer],
        mesh=_mesh(config.devices),
        settings={
            **claimed,
            "schedule": dataclasses.asdict(config.schedule),
            "start_from": folders.digest(config.start_from),
        },
        measure_every=_MEASURE_EVERY,
        measure=lambda params: held_out.measure(
            objective, params, frozen, unseen, config.draft_length
        ),
        report=_reporter("training", config.steps),
    )
    lines = fitting.read_metrics(folder)
    curves.plot(lines, folder / "curves.png")
    measured = next(line["held_out"] for line in reversed(lines) if "held_out" in line)
    return Trained(
        objective,
        state.average,
        frozen,
        unseen,
        measured,
        copying_seconds + lines[-1]["seconds"],
        config.steps / recorded.per_epoch,
    )


def _taught_to_copy(
    config: Config,
    objective: distillation.Distillation,
    params: Any,
    frozen: Any,
    folder: pathlib.Path,
    claimed: dict[str, Any],
) -> tuple[Any, float]:
    """What training begins with, once it can copy, and the seconds that this took."""
    draft = objective.config
    steps = copying_steps(config, draft.num_layers)
    if not steps:
        return params, 0.0
    rows = max(config.batch_tokens // config.lesson // config.parts, 1)
    schedule = dataclasses.replace(config.schedule, steps=steps, warmup=20)
    _say_where("copying", folder, steps)
    state = fitting.fit(
        copying.Copying(None, draft, 1.0, rows, config.lesson),
        params,
        frozen,
        # Texts are drawn from the key; a row a part is only counted.
        lambda step, params: np.zeros(config.parts, np.float32),
        schedule,
        folder,
        # Other texts than those beside training.
        seed=config.seed + 1,
        parts=config.parts,
        dtype=config.dtype,
        optimizer=OPTIMIZERS[config.optimizer],
        settings={**claimed, "schedule": dataclasses.asdict(schedule)},
        report=_reporter("copying", schedule.steps, "copied"),
    )
    return state.params, fitting.read_metrics(folder)[-1]["seconds"]


def copying_steps(config: Config, layers: int) -> int:
    """Updates on copying alone: of a new draft that has lessons in it."""
    is_new = config.start_from is None and config.copying_weight(layers)
    return config.copying_steps if is_new else 0


def _mesh(devices: int) -> jax.sharding.Mesh | None:
    """Devices to share a batch's rows, where there are several; XLA lays out the rest."""
    if devices == 1:
        return None
    return jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def _reporter(stage: str, steps: int, *names: str) -> Callable[[dict[str, Any]], None]:
    """Tells every fiftieth line of the metrics, and those with measurements."""

    def report(line: dict[str, Any]) -> None:
        if "held_out" in line or line["step"] % 50 == 0:
            left = line["seconds"] / line["step"] * (steps - line["step"])
            found = {name: line[name] for name in names}
            found |= {f"held out {name}": value for name, value in line.get("held_out", {}).items()}
            _say(
                f"{stage}: step {line['step']} of {steps}, loss {line['loss']:.3f}"
                + "".join(f", {name} {value:.3f}" for name, value in found.items())
                + f"; {left / 60:.0f} minutes left"
            )

    return report


def _unseen(config: Config, held: list[shards.Shard]) -> list[batches.Batch]:
    order = batches.Batches(held, config.batch_tokens, config.seed, unseen=True)
    return [order(index) for index in range(min(order.per_epoch, _MOST_UNSEEN))]


def of_draft(config: Config, bundle: checkpoints.Bundle, draft: str) -> Config:
    """With the shape of a draft, to go on from it."""
    found, weights, tokens = checkpoints.drafts.weights(draft, bundle)
    own = shapes.Own(found.num_layers, found.hidden_size)
    return dataclasses.replace(
        config,
        layers=own if "inward" in weights else tuple(range(found.num_layers)),
        feed_forward=found.intermediate_size,
        vocabulary=len(tokens),
        start_from=draft,
    ).of(bundle.config)


def begin(config: Config, bundle, held, shape: shapes.Shape) -> tuple[Any, Any]:
    """What is trained, and the rest: of the target's own layers, or of an earlier draft."""
    if config.start_from is None:
        tokens = shapes.vocabulary(
            held, shape.vocabulary, bundle.target.eos_ids, bundle.config.vocab_size
        )
        key = jax.random.fold_in(jax.random.key(config.seed), _STREAM)
        return shapes.begin(bundle, shape, tokens, key)
    weights, tokens = check_shape(config, bundle, shape)
    frozen = shapes.begin(bundle, shape, tokens, jax.random.key(0))[1]
    return {name: weights[name] for name in weights if name not in frozen}, frozen


def check_shape(
    config: Config, bundle: checkpoints.Bundle, shape: shapes.Shape
) -> tuple[dict[str, Any], np.ndarray]:
    """The draft to go on from, its weights and tokens.

    Raises:
      ValueError: it is not of the shape that is asked for.
    """
    assert config.start_from is not None
    found, weights, tokens = checkpoints.drafts.weights(config.start_from, bundle)
    wanted = shapes.configure(bundle.config, shape)
    is_own = isinstance(shape.layers, shapes.Own)
    if (found, "inward" in weights) != (wanted, is_own):
        kinds = [
            f"{config}, of layers of {'its own' if own else 'the target'}"
            for config, own in ((found, "inward" in weights), (wanted, is_own))
        ]
        raise ValueError(
            f"--start_from={config.start_from} is of another shape: {kinds[0]}; asked for is "
            f"{kinds[1]}"
        )
    return weights, tokens


def claimed_tokens(folder: pathlib.Path) -> int | None:
    """Answer tokens that a training in the folder was begun with; None before any."""
    for name in ("training", "training/copying"):
        made = fitting.settings_of(folder / name)
        if made is not None:
            return made["answer_tokens"]
    kept = folder / "candidates" / "settings.json"
    return folders.read(kept)["claims"][0]["answer_tokens"] if kept.exists() else None


def _say_where(stage: str, folder: pathlib.Path, steps: int) -> None:
    """Where a training begins or goes on: the first update is long in coming."""
    done = fitting.updates_of(folder)
    if done < steps:
        about = f"goes on near step {done} of {steps}" if done else f"{steps} steps"
        _say(f"{stage}: {about}, the first one compiles")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
