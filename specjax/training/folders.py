"""A folder belongs to one run: settings that stand in it, and refuse others."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

__all__ = ["claim"]


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
