"""The cards of drafts: JSON beside a draft's file, of how it was made and is used best."""

import json
import pathlib
from typing import Any

__all__ = ["read", "unreadable"]


def read(draft: pathlib.Path | str) -> dict[str, Any] | None:
    """The card beside a draft, which says how it was made and is used best; None without one.

    Raises:
      ValueError: a card that cannot be read.
    """
    path = pathlib.Path(draft).with_suffix(".json")
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"it holds {found!r}")
        return found
    except (OSError, ValueError) as error:
        raise ValueError(unreadable(path, error)) from error


def unreadable(draft: pathlib.Path, error: Exception) -> str:
    """What to say of a card that is none."""
    return (
        f"{draft.with_suffix('.json')} is no card of a draft ({error!r}); say --draft_length and "
        "--stop, or remove it"
    )
