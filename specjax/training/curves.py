"""A picture of a training run: the loss, and acceptance on text held out."""

import importlib
import pathlib
import types
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["check", "plot"]

_SMOOTH = 50


def check() -> types.ModuleType:
    """What pictures need, or an ImportError that says how to get it."""
    try:
        return importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ImportError(
            "a picture needs matplotlib; install it with: python -m pip install 'specjax[plots]'"
        ) from error


def plot(lines: Sequence[dict[str, Any]], path: pathlib.Path | str) -> None:
    """Draws the metrics of a run.

    Args:
      lines: of `fitting.read_metrics`.
      path: of the picture; its ending says the format.

    Raises:
      ImportError: matplotlib is not installed.
    """
    figure = check()
    steps = np.asarray([line["step"] for line in lines])
    loss = np.asarray([line["loss"] for line in lines])
    drawing = figure.Figure(figsize=(9, 3.6), layout="constrained")
    left, right = drawing.subplots(1, 2)
    left.plot(steps, loss, color="0.8", linewidth=0.7, label="each update")
    width = min(_SMOOTH, len(loss))
    smooth = np.convolve(loss, np.ones(width) / width, "valid")
    left.plot(steps[width - 1 :], smooth, color="C0", label=f"mean of {width}")
    left.set(xlabel="update", ylabel="loss (nats a token)", title="Loss")
    left.legend(frameon=False)
    measured = [line for line in lines if "held_out" in line]
    where = [line["step"] for line in measured]
    for index, (name, label) in enumerate(
        (("overlap", "Σ min(p, q)"), ("agreement", "greedy agreement"))
    ):
        shares = [line["held_out"][name] for line in measured if name in line["held_out"]]
        if shares:
            right.plot(where, shares, marker="o", markersize=3, color=f"C{index}", label=label)
    right.set(xlabel="update", ylabel="share of tokens", title="Acceptance on text held out")
    if measured:
        right.legend(frameon=False)
    drawing.savefig(path, dpi=150)
