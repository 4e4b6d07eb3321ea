"""The loop: resuming to the bit, faults that keep the last good checkpoint, whole metrics."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specjax.training import core, curves, fitting
from tests.training import tasks

# A checkpoint that cannot be restored leaves Orbax's threads calling a loop that has ended.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

SCHEDULE = core.Schedule(12, 0.1, warmup=2)


def batches(number, params=None):
    keys = jax.random.split(jax.random.key(number))
    return {name: jax.random.normal(key, (4, 2)) for name, key in zip("xy", keys, strict=True)}


def fit(folder, schedule=SCHEDULE, batches=batches, **options):
    params = {"w": jnp.eye(2), "b": jnp.zeros(2)}
    frozen = {"weight": jnp.ones(())}
    return fitting.fit(
        tasks.regression, params, frozen, batches, schedule, folder, save_every=5, **options
    )


def losses(folder):
    return [(line["step"], line["loss"], line["drawn"]) for line in fitting.read_metrics(folder)]


class StoppedError(Exception):
    pass


def stopping_at(step):
    def report(line):
        if line["step"] == step:
            raise StoppedError

    return report


@pytest.mark.parametrize("optimizer", [core.ADAM, core.MUON], ids=["adam", "muon"])
@pytest.mark.parametrize("stop", [3, 5, 8])
def test_a_stopped_run_goes_on_to_the_bit(tmp_path, stop, optimizer):
    whole = fit(tmp_path / "whole", optimizer=optimizer)
    with pytest.raises(StoppedError):
        fit(tmp_path / "parts", report=stopping_at(stop), optimizer=optimizer)
    resumed = fit(tmp_path / "parts", optimizer=optimizer)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    chex.assert_trees_all_equal(jax.device_get(resumed), jax.device_get(whole))


def test_a_killed_process_goes_on_to_the_bit(tmp_path):
    script = f"""
import pathlib, time
from tests.training import test_fitting as here
here.fit(pathlib.Path({str(tmp_path)!r}) / "killed", report=lambda line: time.sleep(0.2))
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    lines = tmp_path / "killed" / "checkpoints" / "5"
    began = time.monotonic()
    while not lines.exists() and time.monotonic() - began < 120:
        time.sleep(0.05)
    assert process.poll() is None and lines.exists()
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "checkpoints" / "12").exists()
    fit(tmp_path / "killed")
    fit(tmp_path / "whole")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_a_finished_run_is_not_run_again(tmp_path):
    fit(tmp_path)
    fit(tmp_path, report=lambda line: pytest.fail("stepped"))


def test_loss_that_is_no_number_stops_with_the_step_and_keeps_the_checkpoint(tmp_path):
    def poisoned(number, params):
        batch = batches(number)
        return {**batch, "y": batch["y"] * jnp.nan} if number == 7 else batch

    with pytest.raises(fitting.TrainingError, match="step 7: loss nan.*checkpoint.*step 5"):
        fit(tmp_path, batches=poisoned)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["5"]
    fit(tmp_path)
    fit(tmp_path / "whole")
    assert losses(tmp_path) == losses(tmp_path / "whole")


def test_another_runs_folder_is_refused(tmp_path):
    fit(tmp_path, settings={"rate": 0.1, "shape": (1, 2)})
    fit(tmp_path, settings={"rate": 0.1, "shape": (1, 2)})
    with pytest.raises(ValueError, match=r"rate=0.1, and 0.2"):
        fit(tmp_path, settings={"rate": 0.2, "shape": (1, 2)})


def test_damaged_checkpoint_is_named(tmp_path):
    with pytest.raises(StoppedError):
        fit(tmp_path, report=stopping_at(7))
    (item,) = (tmp_path / "checkpoints" / "5").glob("default")
    for path in item.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match="checkpoints/5 cannot be restored.*remove that folder"):
        fit(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "5")
    fit(tmp_path)


def test_checkpoint_of_other_shapes_is_named(tmp_path):
    fit(tmp_path)
    with pytest.raises(ValueError, match="checkpoints/12 cannot be restored"):
        fitting.fit(
            tasks.regression,
            {"w": jnp.zeros((3, 2)), "b": jnp.zeros(3)},
            {"weight": jnp.ones(())},
            batches,
            SCHEDULE,
            tmp_path,
        )


def test_measures_and_draws(tmp_path):
    fit(tmp_path, measure=lambda average: {"overlap": float(average["b"][0])}, measure_every=5)
    lines = fitting.read_metrics(tmp_path)
    assert [line["step"] for line in lines if "held_out" in line] == [5, 10, 12]
    assert all(np.isfinite(line["held_out"]["overlap"]) for line in lines if "held_out" in line)
    curves.plot(lines, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_metrics_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "nowhere" / "metrics.jsonl")
    with pytest.raises(ValueError, match="metrics.jsonl cannot be written.*make room"):
        fit(tmp_path)


def test_damaged_metrics_are_named(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        fitting.read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n{\n")
    with pytest.raises(ValueError, match="line 2"):
        fitting.read_metrics(tmp_path)


def test_damage_before_the_last_line_is_named_and_nothing_behind_it_is_lost(tmp_path):
    fit(tmp_path)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], lines[3][:5], *lines[4:]]) + "\n")
    before = path.read_text()
    with pytest.raises(ValueError, match="metrics.jsonl, line 4"):
        fit(tmp_path)
    assert path.read_text() == before
    # Half of the last line is what a kill leaves.
    path.write_text("\n".join([*lines, lines[-1][:5]]))
    fit(tmp_path)
    assert path.read_text().splitlines() == lines
