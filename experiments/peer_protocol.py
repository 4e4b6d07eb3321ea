"""What a run and its engines say to each other: a line of JSON at a time, through pipes.

An engine is a process of its own, so that no library's threads stand in another's way. It reads
its settings, says that it is ready, and answers requests in the order in which they come, until
there are no more. Nothing here imports what is large: every worker imports this.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

__all__ = ["Answer", "Engine", "Request", "parse", "serve"]


@dataclasses.dataclass(frozen=True)
class Request:
    """One greedy decode.

    Attributes:
      tokens: the prompt.
      method: as the engine calls it, with settings, as in `prompt_lookup draft_length=3`.
      max_new_tokens: where an answer ends that does not end before.
    """

    tokens: list[int]
    method: str
    max_new_tokens: int


@dataclasses.dataclass(frozen=True)
class Answer:
    """What was decoded, with what it took; seconds are of the wall clock.

    Attributes:
      new_tokens: those behind the prompt, through the first that ends an answer.
      prefill_seconds: to the end of the pass over the prompt.
      prefill_tokens: new tokens that came with that pass: 0 where the prompt's last token is left
        to the first step, one where it is not, more where the pass also verified a draft.
      seconds: of all that came after.
      target_steps: passes of the target after that one.
    """

    new_tokens: list[int]
    prefill_seconds: float
    prefill_tokens: int
    seconds: float
    target_steps: int


class Engine(Protocol):
    """A library with the weights loaded."""

    def decode(self, request: Request) -> Answer:
        """The answer, greedily."""
        ...


def serve(load: Callable[[Mapping[str, Any]], Engine]) -> None:
    """The whole of a worker: answers until its input ends.

    The first run of each request is off the clock, whatever the library: then all that is compiled
    is, and all have seen the text once. What fails is told in the answer's place.

    Args:
      load: makes the engine, of the settings that the run gave; imports its library only then.
    """
    # Libraries print what they like: that goes to standard error, and the pipe stays clean.
    pipe = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(told: Mapping[str, Any]) -> None:
        print(json.dumps(told), file=pipe, flush=True)

    settings = json.loads(sys.stdin.readline())
    try:
        engine = load(settings)
    # Whatever a library raises, it is the reason why the run goes on without it.
    except Exception as error:
        say({"error": _reason(error)})
        return
    say({"ready": True})
    warm: set[str] = set()
    for line in sys.stdin:
        request = Request(**json.loads(line))
        try:
            if line not in warm:
                engine.decode(request)
                warm.add(line)
            say(dataclasses.asdict(engine.decode(request)))
        except Exception as error:
            say({"error": _reason(error)})


def parse(method: str, known: Mapping[str, str | None]) -> tuple[str, int | None]:
    """A peer's method and its one setting; None where that is not given.

    Args:
      method: as in a request.
      known: the setting that each method takes, or None.

    Raises:
      ValueError: an unknown method, or another setting than a whole number from 1 on.
    """
    name, *words = method.split() or [""]
    if name not in known:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(known)}")
    if not words:
        return name, None
    setting, _, number = words[0].partition("=")
    if len(words) > 1 or setting != known[name] or not number.isdecimal() or int(number) < 1:
        takes = f"{known[name]}=N, at least 1" if known[name] else "no setting"
        raise ValueError(f"the method {method!r} takes {takes}")
    return name, int(number)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
