"""Logged traffic: JSON lines of prompts with the answers that a target gave."""

import dataclasses
import datetime
import hashlib
import json
import pathlib
from typing import Any

import numpy as np

from experiments import json_lines
from specjax import checkpoints

__all__ = ["Pair", "Request", "pair", "read", "requests"]

# What logs call it when the model itself ended its answer.
_ENDED = ("eos", "stop")


@dataclasses.dataclass(frozen=True)
class Request:
    """When a request came, and how long it was.

    Attributes:
      arrival: seconds.
      prompt_tokens, new_tokens: lengths.
      text: prompt and answer as token ids, where the line holds them; without an answer it is
        empty.
    """

    arrival: float
    prompt_tokens: int
    new_tokens: int
    text: tuple[list[int], list[int]] | None


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
    pairs = [pair(line) for path in paths for line in json_lines.read("log", path)]
    return list({pair.key: pair for pair in pairs}.values())


def pair(line: json_lines.Line) -> Pair:
    """One line of a log; ValueError as `read`."""
    given = line.given
    field = line.first("messages", "turns", "prompt")
    prompt: Any = given.get(field)
    answer: Any = given.get("answer")
    reason = given.get("finish_reason")
    if field == "messages":
        line.check(field, isinstance(prompt, list) and bool(prompt), "a list of messages")
    elif field == "turns":
        line.check(field, json_lines.are_texts(prompt), "a list of texts")
        prompt = prompt[0]
    else:
        is_right = json_lines.is_text(prompt) or _are_ids(prompt)
        line.check(field, is_right, "a text or a list of token ids; or give `messages` or `turns`")
    line.check("finish_reason", reason is None or isinstance(reason, str), "a text")
    # A model may have ended its answer at once.
    is_right = json_lines.is_text(answer) or _are_ids(answer) or (answer == "" and reason in _ENDED)
    line.check("answer", is_right, "a text or a list of token ids, not empty")
    told = json.dumps([pathlib.Path(line.path).name, line.number, given], sort_keys=True)
    key = hashlib.sha256(told.encode()).hexdigest()[:16]
    return Pair(line.place, key, line.group, field, prompt, answer, reason in _ENDED)


def requests(path: str, bundle: checkpoints.Bundle) -> list[Request]:
    """Every line of a log of arrivals, in order.

    A line has `arrival` (seconds, or a time as ISO 8601 has it), and `prompt_tokens` and
    `new_tokens`, or a `prompt` with `new_tokens`, or prompt and answer as `read` takes them.

    Raises:
      ValueError: a file that cannot be read or is empty, or a line that is no request; the message
        names file, line and field.
    """
    found = []
    for line in json_lines.read("log", path):
        given = line.given
        arrival: Any = _seconds(given.get("arrival"))
        line.check("arrival", arrival is not None, "seconds, or a time as ISO 8601 has it")
        if "answer" in given:
            text = pair(line).tokens(bundle)
            lengths: dict[str, Any] = {"prompt_tokens": len(text[0]), "new_tokens": len(text[1])}
        else:
            text = None
            lengths = {name: given.get(name) for name in ("prompt_tokens", "new_tokens")}
            if "prompt" in given:
                line.check("prompt", json_lines.is_text(given["prompt"]), "a text")
                text = (bundle.chat(given["prompt"]), [])
                lengths["prompt_tokens"] = len(text[0])
            for name, length in lengths.items():
                is_whole = isinstance(length, int) and not isinstance(length, bool) and length >= 1
                line.check(name, is_whole, "a whole number of at least 1, or give `answer`")
        found.append(Request(arrival, text=text, **lengths))
    return found


def _seconds(told: Any) -> float | None:
    """A time; None where it is none."""
    if isinstance(told, str):
        try:
            return datetime.datetime.fromisoformat(told).timestamp()
        except ValueError:
            return None
    is_number = isinstance(told, int | float) and not isinstance(told, bool)
    return float(told) if is_number and np.isfinite(told) else None


def _are_ids(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(token, int) and not isinstance(token, bool) for token in value)
    )
