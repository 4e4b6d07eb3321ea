"""Decoding methods by name, shared by every binary."""

import dataclasses
from collections.abc import Callable

import specjax
from specjax import checkpoints, decoding, drafters, types

__all__ = ["METHODS", "Method", "Settings", "build"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What methods can be told.

    Attributes:
      draft_length: K; None takes the method's own.
      draft: the draft model, `layers:N` for the target's first N layers or anything that
        `specjax.load` takes.
      greedy_draft: whether a draft model drafts its most probable tokens (for `match`).
    """

    draft_length: int | None = None
    draft: str = "layers:12"
    greedy_draft: bool = False


@dataclasses.dataclass(frozen=True)
class Method:
    """A name's meaning: one line of description, and how its drafter is made."""

    description: str
    build: Callable[[checkpoints.Bundle, Settings], types.Drafter]


def build(name: str, bundle: checkpoints.Bundle, settings: Settings) -> types.Drafter:
    """The drafter of a method.

    Raises:
      ValueError: no method has this name, or a setting is out of range.
    """
    return find(name).build(bundle, settings)


def find(name: str) -> Method:
    """A method by its name; ValueError lists those that exist."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    return METHODS[name]


def _plain(bundle: checkpoints.Bundle, settings: Settings) -> types.Drafter:
    del bundle, settings
    return decoding.NOTHING


def _prompt_lookup(bundle: checkpoints.Bundle, settings: Settings) -> types.Drafter:
    del bundle
    return drafters.prompt_lookup(8 if settings.draft_length is None else settings.draft_length)


def _model(bundle: checkpoints.Bundle, settings: Settings) -> types.Drafter:
    length = 4 if settings.draft_length is None else settings.draft_length
    kind, _, number = settings.draft.partition(":")
    if kind == "layers":
        if not number.isdigit():
            raise ValueError(f"draft={settings.draft!r}: layers:N needs a whole N, as in layers:12")
        draft_model = checkpoints.layer_truncated(bundle, int(number))
    else:
        draft_model = specjax.load(settings.draft).target
    return drafters.model(draft_model, length, greedy=settings.greedy_draft)


METHODS = {
    "plain": Method("one token a target step", _plain),
    "prompt_lookup": Method("copies from prompt and answer", _prompt_lookup),
    "model": Method("a draft model, by default the target's first layers", _model),
}
