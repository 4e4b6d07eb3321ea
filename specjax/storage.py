"""Where specjax keeps what is costly to fetch or to make again."""

import os
import pathlib

__all__ = ["cache_folder"]


def cache_folder() -> pathlib.Path:
    """The environment variable `SPECJAX_CACHE`, or `~/.cache/specjax`; it may not exist yet."""
    folder = os.environ.get("SPECJAX_CACHE")
    return (
        pathlib.Path(folder).expanduser() if folder else pathlib.Path.home() / ".cache" / "specjax"
    )
