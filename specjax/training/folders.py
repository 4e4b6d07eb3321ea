"""A folder belongs to one run: settings that stand in it, and refuse others."""

import hashlib
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

__all__ = ["claim", "digest", "fingerprint"]


def digest(path: pathlib.Path | str | None) -> str | None:
    """SHA-256 of a file's content; None for no file.

    Raises:
      ValueError: it cannot be read.
    """
    if path is None:
        return None
    try:
        with pathlib.Path(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def fingerprint(params: Any) -> str:
    """Tells weights apart: SHA-256 of every leaf's shape and of some rows of it."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        found.update(repr(leaf.shape).encode())
        found.update(np.asarray(leaf[:: max(len(leaf) // 4, 1)]).tobytes())
    return found.hexdigest()


def claim(path: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Writes the settings where none stand yet, with the folder, and refuses others.

    Args:
      path: of the file of settings.
      settings: what makes a run the one it is, ready for JSON.

    Raises:
      ValueError: the folder holds what other settings made, or cannot be written; the message names
        both values and the remedy.
    """
    own = json.loads(json.dumps(settings))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            path.write_text(json.dumps(own, indent=1), encoding="utf-8")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be used: {error}; give another folder") from error
    for name in sorted({*own, *found}):
        if own.get(name) != found.get(name):
            raise ValueError(
                f"{path.parent} holds what was made with {name}={found.get(name)!r}, and "
                f"{own.get(name)!r} is asked for; give another folder, or the same settings"
            )
