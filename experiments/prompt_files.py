"""Prompts to measure on: JSON lines in the form of Spec-Bench and others, or the built-in suite."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

__all__ = ["BUILT_IN", "Prompt", "chosen", "read", "spread"]

BUILT_IN = pathlib.Path(__file__).parent / "prompts" / "suite.jsonl"


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One conversation to be answered.

    Attributes:
      question: what its file calls it.
      group: the domain it belongs to.
      turns: what the user says, one message a turn.
      source: the file it comes from, by name.
    """

    question: Any
    group: str
    turns: tuple[str, ...]
    source: str = ""

    @property
    def key(self) -> str:
        """Tells it from all others, whatever their files call them."""
        told = json.dumps([self.group, self.question, self.turns])
        return hashlib.sha256(told.encode()).hexdigest()[:16]


def read(*paths: str) -> list[Prompt]:
    """Every line of some files, each a JSON object; without files the built-in suite.

    A line has `turns`, a list of texts, or `messages`, of whose contents the user's count, or
    `prompt`, one text; it may have `group` (or `category`) and `question_id`.

    Raises:
      ValueError: a file that cannot be read or is empty, or a line that is no such object; the
        message names file, line and field.
    """
    prompts = []
    for path in paths or (str(BUILT_IN),):
        try:
            text = pathlib.Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--prompts={path} cannot be read: {error}") from error
        if not text.strip():
            raise ValueError(f"--prompts={path} holds no prompts")
        # Texts may hold what `splitlines` takes for the end of a line.
        for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
            try:
                given = json.loads(line)
                turns = _turns(given)
                group = given.get("group") or given.get("category") or pathlib.Path(path).stem
                if not isinstance(group, str):
                    raise ValueError(f"group={group!r} is no text")
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"--prompts={path}, line {number}: {error!r}; a line is a JSON object with "
                    "`turns`, a list of texts, or `messages`, or `prompt`"
                ) from error
            question = given.get("question_id", number)
            prompts.append(Prompt(question, group, turns, pathlib.Path(path).name))
    return prompts


def _turns(given: dict[str, Any]) -> tuple[str, ...]:
    """What the user says."""
    if "messages" in given:
        field = "messages"
        turns = [message["content"] for message in given[field] if message["role"] == "user"]
    elif "prompt" in given and "turns" not in given:
        field, turns = "prompt", [given["prompt"]]
    else:
        field, turns = "turns", given["turns"]
    texts = isinstance(turns, list) and all(isinstance(turn, str) and turn for turn in turns)
    if not texts or not turns:
        raise ValueError(f"{field}={given[field]!r} are no texts")
    return tuple(turns)


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
