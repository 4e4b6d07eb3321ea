"""Prompts to measure on: JSON lines in the form of Spec-Bench, or the built-in ones."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

__all__ = ["Prompt", "read", "spread"]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One conversation to be answered.

    Attributes:
      question: what its file calls it.
      group: the domain it belongs to.
      turns: what the user says, one message a turn.
    """

    question: Any
    group: str
    turns: tuple[str, ...]

    @property
    def key(self) -> str:
        """Tells it from all others, whatever their files call them."""
        told = json.dumps([self.group, self.question, self.turns])
        return hashlib.sha256(told.encode()).hexdigest()[:16]


def read(*paths: str) -> list[Prompt]:
    """Every line of some files, each a JSON object with `turns`; without files the built-in texts.

    Raises:
      ValueError: a file that cannot be read, or a line without turns; the message names it.
    """
    if not paths:
        folder = pathlib.Path(__file__).parent / "prompts"
        return [
            Prompt(file.stem, "built-in", (file.read_text(encoding="utf-8"),))
            for file in sorted(folder.glob("*.txt"))
        ]
    prompts = []
    for path in paths:
        try:
            lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--prompts={path} cannot be read: {error}") from error
        if not lines:
            raise ValueError(f"--prompts={path} holds no prompts")
        for number, line in enumerate(lines, start=1):
            try:
                given = json.loads(line)
                turns = given["turns"]
                texts = isinstance(turns, list) and all(isinstance(turn, str) for turn in turns)
                if not texts or not turns:
                    raise ValueError(f"turns={turns!r} are no texts")
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"--prompts={path}, line {number}: {error!r}; a line is a JSON object with "
                    "`turns`, a list of texts"
                ) from error
            group = given.get("group") or given.get("category") or pathlib.Path(path).stem
            prompts.append(Prompt(given.get("question_id", number), group, tuple(turns)))
    return prompts


def spread(items: Sequence[Any], count: int | None) -> list[Any]:
    """`count` of the items, evenly spread; all of them for None or where there are no more."""
    if count is None or count >= len(items):
        return list(items)
    return [items[index * len(items) // count] for index in range(count)]
