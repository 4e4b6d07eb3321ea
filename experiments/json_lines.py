"""Files of JSON lines, an object each, that say where they are wrong: file, line and field."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

__all__ = ["Line", "are_texts", "is_text", "read"]


@dataclasses.dataclass(frozen=True)
class Line:
    """An object with its place.

    Attributes:
      flag: that named the file.
      path: of the file.
      number: of the line, from 1.
      given: the object.
    """

    flag: str
    path: str
    number: int
    given: Mapping[str, Any]

    @property
    def place(self) -> str:
        """For messages."""
        return f"--{self.flag}={self.path}, line {self.number}"

    @property
    def group(self) -> str:
        """Its `group` or `category`, or the file's name; ValueError where that is no text."""
        field = next((name for name in ("group", "category") if self.given.get(name)), "group")
        group = self.given.get(field) or pathlib.Path(self.path).stem
        self.check(field, isinstance(group, str), "a text")
        return group

    def first(self, *fields: str) -> str:
        """The first of some fields that the line has; the last where it has none."""
        return next((field for field in fields if field in self.given), fields[-1])

    def check(self, field: str, is_right: bool, wish: str) -> None:
        """Raises ValueError with file, line, field, its value and what it must be."""
        if not is_right:
            raise ValueError(f"{self.place}, {field}: {self.given.get(field)!r} must be {wish}")


def read(flag: str, path: str) -> list[Line]:
    """Every line of a file, in order.

    Args:
      flag: that named the file, for messages.
      path: of the file.

    Raises:
      ValueError: a file that cannot be read or is empty, or a line that is no JSON object.
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--{flag}={path} cannot be read: {error}") from error
    if not text.strip():
        raise ValueError(f"--{flag}={path} is empty; give a file of JSON lines")
    lines = []
    # Texts may hold what `splitlines` takes for the end of a line.
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        place = f"--{flag}={path}, line {number}"
        try:
            given = json.loads(line)
        except json.JSONDecodeError as error:
            told = f"{error.msg} at column {error.colno}"
            raise ValueError(f"{place}: {told}; a line is a JSON object") from error
        if not isinstance(given, dict):
            raise ValueError(f"{place}: {given!r} is no object; a line is a JSON object")
        lines.append(Line(flag, path, number, given))
    return lines


def is_text(value: Any) -> bool:
    """Whether it is a text, and not empty."""
    return isinstance(value, str) and bool(value)


def are_texts(value: Any) -> bool:
    """Whether it is a list of such texts, and not empty."""
    return isinstance(value, list) and bool(value) and all(map(is_text, value))
