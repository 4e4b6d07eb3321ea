"""A folder belongs to one run: settings that stand in it, and refuse others."""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

__all__ = [
    "append",
    "check",
    "claim",
    "digest",
    "digest_text",
    "fingerprint",
    "read",
    "write",
    "write_json",
]


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


def digest_text(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(params: Any) -> str:
    """Tells weights apart: SHA-256 of every leaf's shape and of some rows of it."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        found.update(repr(leaf.shape).encode())
        found.update(np.asarray(leaf[:: max(len(leaf) // 4, 1)]).tobytes())
    return found.hexdigest()


def write(path: pathlib.Path | str, text: str) -> None:
    """Writes a whole file of text in the place of what stood there, or leaves that as it was.

    Raises:
      ValueError: it cannot be written, as on a full disk.
    """
    path = pathlib.Path(path)
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ValueError(f"{path} cannot be written: {error}; make room, and run again") from error


def write_json(path: pathlib.Path | str, value: Any) -> None:
    """As `write`, of a value ready for JSON, indented for people."""
    write(path, json.dumps(value, indent=1) + "\n")


def append(path: pathlib.Path | str, text: str) -> None:
    """Writes text behind what stands in a file.

    Raises:
      ValueError: it cannot be written, as on a full disk; a part of it may have been.
    """
    try:
        with pathlib.Path(path).open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error}; make room, and run again") from error


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
    except OSError as error:
        raise ValueError(_useless(path, error)) from error
    if not path.exists():
        write_json(path, own)
    # What stands there and is not asked for is another run's too.
    check(path, dict.fromkeys(read(path)) | own)


def check(path: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Holds settings against those that stand in a folder, where there are any.

    Raises:
      ValueError: one of them is another; the message names both values and the remedy.
    """
    found = read(path) if path.exists() else settings
    for name in sorted(settings):
        if settings[name] != found.get(name):
            raise ValueError(
                f"{path.parent} holds what was made with {name}={found.get(name)!r}, and "
                f"{settings[name]!r} is asked for; give another folder, or the same settings"
            )


def read(path: pathlib.Path) -> dict[str, Any]:
    """What stands in a file of JSON by name.

    Raises:
      ValueError: it cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"it holds {found!r}, not settings by name")
    except (OSError, ValueError) as error:
        raise ValueError(_useless(path, error)) from error
    return found


def _useless(path: pathlib.Path, error: Exception) -> str:
    return f"{path} cannot be used: {error}; give another folder"
