"""Prompts to measure on: JSON lines in the form of Spec-Bench and others, or the built-in suite."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from experiments import json_lines

__all__ = ["BUILT_IN", "Prompt", "chosen", "read", "spread"]

# The categories of MT-Bench, which Spec-Bench's own file takes for groups.
_MULTI_TURN = (
    *("writing", "roleplay", "reasoning", "math"),
    *("coding", "extraction", "stem", "humanities"),
)
BUILT_IN = pathlib.Path(__file__).parent / "prompts" / "suite.jsonl"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One conversation to be answered.

    Attributes:
      question: what its file calls it.
      group: the domain it belongs to.
      turns: what the user says, one message a turn.
      source: the file it comes from, by name.
      system: what stands before the first turn, or None for the template's own.
    """

    question: Any
    group: str
    turns: tuple[str, ...]
    source: str = ""
    system: str | None = None

    @property
    def key(self) -> str:
        """Tells it from all others, whatever their files call them."""
        told = json.dumps([self.group, self.question, self.turns, self.system])
        return hashlib.sha256(told.encode()).hexdigest()[:16]

    def asked(self, first: str | None = None) -> list[dict[str, str]]:
        """The messages up to the first answer, perhaps with another first turn."""
        opening = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*opening, {"role": "user", "content": self.turns[0] if first is None else first}]


def read(*paths: str) -> list[Prompt]:
    """Every line of some files, each a JSON object; without files the built-in suite.

    A line has `turns`, a list of texts, or `messages`, of which a leading system's and the user's
    count, or `prompt`, one text; it may have `group` (or `category`, of which Spec-Bench's eight of
    MT-Bench are one group, `multi_turn`) and `question_id`. A line that is given twice counts once.

    Raises:
      ValueError: a file that cannot be read or is empty, or a line that is no such object; the
        message names file, line and field.
    """
    prompts = []
    for path in paths or (str(BUILT_IN),):
        for line in json_lines.read("prompts", path):
            group = line.group
            if "group" not in line.given and group in _MULTI_TURN:
                group = "multi_turn"
            question = line.given.get("question_id", line.number)
            system, turns = _said(line)
            prompts.append(Prompt(question, group, turns, pathlib.Path(path).name, system))
    return list({prompt.key: prompt for prompt in prompts}.values())


def _said(line: json_lines.Line) -> tuple[str | None, tuple[str, ...]]:
    """What stands before the first turn, and what the user says."""
    field = line.first("messages", "turns", "prompt")
    given = line.given.get(field)
    if field == "prompt":
        line.check(field, json_lines.is_text(given), "a text; or give `turns`, or `messages`")
        return None, (str(given),)
    if field == "turns":
        line.check(field, json_lines.are_texts(given), "a list of texts")
        return None, tuple(given or ())
    messages: list[Any] = given if isinstance(given, list) else []
    wish = "a list of messages with `role` and `content`, the user's among them"
    line.check(field, all(isinstance(one, dict) and "role" in one for one in messages), wish)
    turns = [one.get("content") for one in messages if one["role"] == "user"]
    opening = [one.get("content") for one in messages[:1] if one["role"] == "system"]
    line.check(field, json_lines.are_texts([*opening, *turns]) and bool(turns), wish)
    return (opening[0] if opening else None), tuple(turns)


def chosen(
    prompts: Sequence[Prompt], count: int | None, groups: Sequence[str] = ()
) -> list[Prompt]:
    """`count` prompts of every group, evenly spread; of some groups where they are named.

    Raises:
      ValueError: a group that no prompt has; the message lists those there are.
    """
    found: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        found.setdefault(prompt.group, []).append(prompt)
    for group in groups:
        if group not in found:
            raise ValueError(f"unknown group {group!r}; the prompts' are {', '.join(found)}")
    return [
        prompt
        for group, some in found.items()
        if not groups or group in groups
        for prompt in spread(some, count)
    ]


def spread(items: Sequence[Any], count: int | None) -> list[Any]:
    """`count` of the items, evenly spread; all of them for None or where there are no more."""
    if count is None or count >= len(items):
        return list(items)
    return [items[index * len(items) // count] for index in range(count)]
