"""The training loop: steps, checkpoints, metrics, and going on where a run stopped."""

import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import optax

from specjax.training import core, folders, saving

__all__ = ["SAVE_EVERY", "TrainingError", "fit", "read_metrics", "settings_of", "updates_of"]

# Updates between checkpoints.
SAVE_EVERY = 40
_METRICS = "metrics.jsonl"
_SETTINGS = "training.json"
# Of keys: others of the same seed drew the text.
_STREAM = 0x5EED0001


class TrainingError(ValueError):
    """Training cannot go on; the message says at which step, why, and what is kept."""


def fit(
    objective: core.Objective,
    params: Any,
    frozen: Any,
    batches: Callable[[int, Any], Any],
    schedule: core.Schedule,
    folder: pathlib.Path | str,
    *,
    seed: int = 0,
    parts: int = 1,
    dtype: str = "float32",
    optimizer: optax.GradientTransformation = core.ADAM,
    mesh: jax.sharding.Mesh | None = None,
    settings: dict[str, Any] | None = None,
    save_every: int = SAVE_EVERY,
    measure_every: int = 200,
    measure: Callable[[Any], dict[str, float]] | None = None,
    report: Callable[[dict[str, Any]], None] = lambda _: None,
) -> core.TrainState:
    """Trains to the schedule's end; a run that was killed goes on from its newest checkpoint.

    On one CPU the resumed run gives the same losses to the bit: a batch follows from its step's
    number, keys from seed and step, and all else is in the checkpoint.

    Args:
      objective, params, frozen, parts, dtype, optimizer: as `core.step` takes them.
      batches: `(step, params) -> batch`, a function of the step's number alone or, where a draft
        trains on what it writes itself, of what is being trained too.
      schedule: rates, and how many steps.
      folder: checkpoints and `metrics.jsonl`, a line a step; holds one run only.
      seed: of the objective's key.
      mesh: devices to share a batch's rows, on its axis `data`; None is the default device.
      settings: what makes this run the one it is; a folder with others is refused.
      save_every: updates between checkpoints; the last is always kept.
      measure_every: updates between measurements.
      measure: `(averaged params) -> numbers`, on text held out, for the metrics.
      report: called with every line of the metrics.

    Returns:
      The state after the last step.

    Raises:
      TrainingError: a loss or gradient that is not finite; the checkpoint before stays.
      ValueError: a folder with another run, a damaged checkpoint, or a full disk.
    """
    folder = pathlib.Path(folder)
    folders.claim(folder / _SETTINGS, settings or {})
    key = jax.random.fold_in(jax.random.key(seed), _STREAM)
    state = core.init(params, optimizer)
    if mesh is not None:
        state, frozen = (core.place(tree, mesh, rows=False) for tree in (state, frozen))
    with saving.Checkpoints(folder / "checkpoints") as checkpoints:
        if checkpoints.newest is not None:
            state = checkpoints.restore(state)
        first = int(state.step)
        seconds = _forget_after(folder / _METRICS, first)
        began = time.monotonic() - seconds
        lines: list[str] = []
        for number in range(first, schedule.steps):
            batch = batches(number, state.params)
            if mesh is not None:
                batch = core.place(batch, mesh, rows=True)
            state, told = core.step(
                state,
                frozen,
                batch,
                key,
                schedule.at(number),
                objective,
                parts,
                dtype,
                optimizer,
            )
            line = {name: float(value) for name, value in told.items()}
            if not line.pop("finite"):
                folders.append(folder / _METRICS, "".join(lines))
                raise TrainingError(
                    f"step {number}: loss {line['loss']}, gradient {line['gradient_norm']}; "
                    f"the newest good checkpoint in {folder} is of step "
                    f"{checkpoints.newest or 'none'}; a rate below {schedule.rate:g} may help, "
                    "in another folder"
                )
            done = number + 1
            line = {"step": done, "seconds": time.monotonic() - began, **line}
            if measure and (done % measure_every == 0 or done == schedule.steps):
                line["held_out"] = measure(state.average)
            lines.append(json.dumps(line) + "\n")
            if done % save_every == 0 or done == schedule.steps:
                # They go first: a checkpoint never stands for steps without lines.
                folders.append(folder / _METRICS, "".join(lines))
                lines.clear()
                checkpoints.save(done, state)
            report(line)
    return state


def read_metrics(folder: pathlib.Path | str) -> list[dict[str, Any]]:
    """The lines of a run's metrics, one a step.

    Raises:
      ValueError: there are none, or a line is damaged; the message names it.
    """
    path = pathlib.Path(folder) / _METRICS
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return lines


def settings_of(folder: pathlib.Path | str) -> dict[str, Any] | None:
    """What the folder's run was started with; None where none was."""
    path = pathlib.Path(folder) / _SETTINGS
    return folders.read(path) if path.exists() else None


def updates_of(folder: pathlib.Path | str) -> int:
    """How many updates the folder's metrics tell of, a few more perhaps than its checkpoint has."""
    path = pathlib.Path(folder) / _METRICS
    return path.read_text(encoding="utf-8").count("\n") if path.exists() else 0


def _forget_after(path: pathlib.Path, step: int) -> float:
    """Drops lines of steps that are to be made again; the seconds that training has taken."""
    if not path.exists():
        return 0.0
    kept = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            made = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # a kill may leave half a line
                break
            raise ValueError(
                f"{path}, line {number}: {error}; remove the folder, or mend it"
            ) from error
        if made["step"] > step:
            break
        kept.append(made)
    if len(kept) < len(lines):
        folders.write(path, "".join(json.dumps(line) + "\n" for line in kept))
    return kept[-1]["seconds"] if kept else 0.0
