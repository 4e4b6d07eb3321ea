"""Reports and pictures that a binary writes; that it can is known before anything is measured."""

import importlib.util
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from experiments import binary
from specjax.analysis import plots
from specjax.training import folders

__all__ = ["check", "draw", "illustrated", "write"]

_Config = TypeVar("_Config")


def check(report: str | None, pictures: str | None) -> None:
    """Makes the folders of a report and of pictures, where they are asked for.

    Raises:
      ValueError: a folder that cannot be made.
      ImportError: matplotlib is not installed (extra `plots`).
    """
    if pictures is not None:
        if importlib.util.find_spec("matplotlib") is None:
            raise ImportError(
                "--plots needs matplotlib; install the extra `plots` (pip install -e '.[plots]')"
            )
        # An extra, and slow to import; pictures go to files alone.
        import matplotlib

        matplotlib.use("agg")
    for name, path in (("report", report and pathlib.Path(report).parent), ("plots", pictures)):
        try:
            if path is not None:
                pathlib.Path(path).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--{name}: {path} cannot be made: {error}") from error


def illustrated(
    configure: Callable[[], _Config],
    run: Callable[[_Config], dict[str, Any]],
    pictures: Callable[[dict[str, Any]], Mapping[str, Any]],
) -> dict[str, Any]:
    """The report of a run, drawn where --plots asks for it.

    Args:
      configure: reads the other flags.
      run: measures.
      pictures: axes by name, of a report.
    """
    config = configure()
    check(None, binary.PLOTS.value)
    report = run(config)
    if binary.PLOTS.value is not None:
        draw(binary.PLOTS.value, pictures(report))
    return report


def draw(
    folder: str, pictures: Mapping[str, Any], heading: str = "", end: str = ""
) -> list[pathlib.Path]:
    """Writes pictures as PNG files.

    Args:
      folder: that `check` made.
      pictures: axes by name.
      heading: over the legend of each.
      end: of every file's name.

    Returns:
      The files.
    """
    paths = {name: pathlib.Path(folder) / f"{name}{end}.png" for name in pictures}
    for name, axes in pictures.items():
        plots.save(axes, paths[name], heading)
    return list(paths.values())


def write(path: str, told: str, drawn: list[pathlib.Path]) -> None:
    """Writes a report in Markdown, with the pictures behind it.

    Raises:
      ValueError: a file that cannot be written.
    """
    folder = pathlib.Path(path).resolve().parent
    for picture in drawn:
        place = os.path.relpath(picture.resolve(), folder)
        told += f"\n![{picture.stem.replace('_', ' ')}]({place})\n"
    folders.write(path, told)
