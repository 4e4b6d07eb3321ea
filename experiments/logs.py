"""Logged traffic: JSON lines of prompts with the answers that a target gave."""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

from specjax import checkpoints

__all__ = ["Pair", "parse", "read"]

# What logs call it when the model itself ended its answer.
_ENDED = ("eos", "stop")
_WISH = (
    "a line is a JSON object with `prompt`, a text or a list of token ids, or `messages` or "
    "`turns`, and with `answer`, a text or a list of token ids"
)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A prompt with its answer, as a line of a log gives them.

    Attributes:
      place: file and line, for messages.
      key: tells it from all other lines.
      group: the domain it belongs to.
      field: what the prompt is called there.
      prompt: a text or messages, to be put in the chat template, or token ids.
      answer: a text or token ids.
      is_ended: whether the model ended it, by a token that the text does not show.
    """

    place: str
    key: str
    group: str
    field: str
    prompt: Any
    answer: str | list[int]
    is_ended: bool

    def tokens(self, bundle: checkpoints.Bundle) -> tuple[list[int], list[int]]:
        """Prompt and answer as token ids.

        An answer's text is encoded anew, so its tokens may be others than those that were written.

        Raises:
          ValueError: a text that the tokenizer does not take, or ids beyond the vocabulary; the
            message names file, line and field.
        """
        tokenizer, field = bundle.tokenizer, self.field
        try:
            prompt = self.prompt if _are_ids(self.prompt) else bundle.chat(self.prompt)
            tokenizer.decode(prompt)
            field = "answer"
            answer = self.answer
            answer = tokenizer.encode(answer) if isinstance(answer, str) else list(answer)
            tokenizer.decode(answer)
        except ValueError as error:
            raise ValueError(f"{self.place}, {field}: {error}") from error
        if self.is_ended and tokenizer.eos_ids and not set(answer[-1:]) & set(tokenizer.eos_ids):
            answer.append(tokenizer.eos_ids[0])
        return prompt, answer


def read(*paths: str) -> list[Pair]:
    """Every line of some logs; a file that is given twice counts once.

    A line holds the prompt as `messages` (with `role` and `content`), as `turns` (texts of the
    user, of which the first is asked), or as `prompt` (what the user says, or token ids as the
    model saw them), and the `answer`. It may hold `group` (or `category`; by default the file's
    name) and `finish_reason`: after `stop` or `eos` the end-of-sequence token is scored too.

    Raises:
      ValueError: a file that cannot be read or is empty, or a line that is no such object; the
        message names file, line and field.
    """
    if not paths:
        raise ValueError("give --log, a file of JSON lines with `prompt` and `answer`")
    pairs = []
    for path in paths:
        try:
            text = pathlib.Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--log={path} cannot be read: {error}") from error
        # Texts may hold what `splitlines` takes for the end of a line.
        lines = text.removesuffix("\n").split("\n")
        if not text.strip():
            raise ValueError(f"--log={path} is empty; {_WISH}")
        pairs += [parse(path, number, line) for number, line in enumerate(lines, start=1)]
    return list({pair.key: pair for pair in pairs}.values())


def parse(path: str, number: int, line: str) -> Pair:
    """One line of a log; ValueError as `read`."""
    place = f"--log={path}, line {number}"
    try:
        given = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{place}: {error}; {_WISH}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{place}: {given!r} is no object; {_WISH}")

    def check(field: str, is_right: bool, wish: str) -> None:
        if not is_right:
            raise ValueError(f"{place}, {field}: {given.get(field)!r} must be {wish}")

    field = next((name for name in ("messages", "turns") if name in given), "prompt")
    prompt: Any = given.get(field)
    answer: Any = given.get("answer")
    reason = given.get("finish_reason")
    if field == "messages":
        check(field, isinstance(prompt, list) and bool(prompt), "a list of messages")
    elif field == "turns":
        is_right = isinstance(prompt, list) and prompt and all(map(_is_text, prompt))
        check(field, bool(is_right), "a list of texts")
        prompt = prompt[0] if prompt else prompt
    else:
        check(field, _is_text(prompt) or _are_ids(prompt), "a text or a list of token ids")
    check("finish_reason", reason is None or isinstance(reason, str), "a text")
    # A model may have ended its answer at once.
    is_right = _is_text(answer) or _are_ids(answer) or (answer == "" and reason in _ENDED)
    check("answer", is_right, "a text or a list of token ids, not empty")
    name = next((name for name in ("group", "category") if given.get(name)), "group")
    group = given.get(name) or pathlib.Path(path).stem
    check(name, isinstance(group, str), "a text")
    told = json.dumps([pathlib.Path(path).name, number, given], sort_keys=True)
    key = hashlib.sha256(told.encode()).hexdigest()[:16]
    return Pair(place, key, group, field, prompt, answer, reason in _ENDED)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _are_ids(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(token, int) and not isinstance(token, bool) for token in value)
    )
