"""Decoding methods by name, shared by every binary."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import specjax
from experiments import cards, step_costs
from specjax import checkpoints, decoding, drafters, types, verification
from specjax.training import folders

__all__ = [
    "METHODS",
    "OF_A_FILE",
    "SHIPPED",
    "Asked",
    "Decoder",
    "Method",
    "Settings",
    "build",
    "check",
    "decoder",
    "find",
    "parse",
    "resolved",
]

# What `auto` chooses among: each is a program of its own.
_LENGTHS = (1, 2, 3, 5, 8)
SHIPPED = pathlib.Path(__file__).parent / "assets" / "smollm2-135m-draft.safetensors"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What methods can be told.

    Attributes:
      draft_length: K, or `auto` for lengths chosen on the way; None takes the method's own.
      draft: the draft model, `layers:N` for the target's first N layers or anything that
        `specjax.load` takes; None takes the method's own.
      greedy_draft: whether a draft model drafts its most probable tokens (for `match`).
      stop: how unsure of its next token a draft model stops: `maximum:P`, its largest probability
        below P, `entropy:H`, above H nats, or `never`; None is what the draft's card found best,
        and `never` without a card. Where lengths are chosen on the way, drafts stop so too.
      expansion: children of a tree's nodes by their depth, as in `2-2-1`.
    """

    draft_length: int | str | None = None
    draft: str | None = None
    greedy_draft: bool = False
    stop: str | None = None
    expansion: str | None = None


@dataclasses.dataclass(frozen=True)
class Method:
    """A name's meaning: one line of description, how its drafter is made, settings it takes."""

    description: str
    build: Callable[[checkpoints.Bundle, Settings], types.Drafter]
    takes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Asked:
    """A method with its settings and rule, as in `draft draft_length=3 rule=match`.

    Attributes:
      name: of `METHODS`.
      settings: what is not said is the method's own.
      rule: a rule's name; None picks one by the draft's kind.
    """

    name: str
    settings: Settings = Settings()
    rule: str | None = None

    def __str__(self) -> str:
        told = {
            field.name: getattr(self.settings, field.name)
            for field in dataclasses.fields(self.settings)
            if getattr(self.settings, field.name) != field.default
        }
        if self.rule is not None:
            told["rule"] = self.rule
        return " ".join([self.name, *(f"{name}={value}" for name, value in told.items())])

    def decoder(self, bundle: checkpoints.Bundle) -> "Decoder":
        """Ready to decode; raises as `decoder`."""
        return decoder(self.name, bundle, self.settings, self.rule)

    @property
    def stops(self) -> bool:
        """Whether its drafts may stop short of their length."""
        return resolved(self.name, self.settings).stop not in (None, "never")

    def told(self) -> dict[str, Any]:
        """Its settings with what its card says, and what its draft's file holds, wherever it lies.

        Raises:
          ValueError: a card or a draft that cannot be read.
        """
        told = dataclasses.asdict(resolved(self.name, self.settings))
        if self.name in OF_A_FILE:
            told["draft"] = folders.digest(self.settings.draft or SHIPPED)
        return told

    def unstopping(self, bundle: checkpoints.Bundle) -> types.Drafter:
        """Its longest drafts, always whole: what a step of it can cost; raises as `build`."""
        settings = resolved(self.name, self.settings)
        # One that stops drafts fewer tokens than its nodes, and would seem to be cheap.
        stop = "never" if "stop" in find(self.name).takes else None
        length = max(_LENGTHS) if settings.draft_length == "auto" else settings.draft_length
        settings = dataclasses.replace(settings, draft_length=length, stop=stop)
        return build(self.name, bundle, settings)


def parse(text: str) -> Asked:
    """Reads a method as `Asked` writes it.

    Raises:
      ValueError: no method or rule has this name, or a setting that is unknown, out of range, or
        not for this method; the message holds the text.
    """
    name, *words = text.split() or [""]
    find(name)
    told: dict[str, Any] = {}
    for word in words:
        setting, is_given, value = word.partition("=")
        known = [field.name for field in dataclasses.fields(Settings)]
        if setting not in (*known, "rule") or not is_given or setting in told:
            raise ValueError(
                f"{text!r}: {word!r} is no setting; write name=value once, of "
                f"{', '.join((*known, 'rule'))}"
            )
        told[setting] = value
    rule = told.pop("rule", None)
    try:
        if rule is not None:
            verification.get(rule)
        if told.get("draft_length", "auto") != "auto":
            told["draft_length"] = int(told["draft_length"])
        if "greedy_draft" in told:
            if told["greedy_draft"] not in ("True", "False"):
                raise ValueError(f"greedy_draft={told['greedy_draft']}: write True or False")
            told["greedy_draft"] = told["greedy_draft"] == "True"
        asked = Asked(name, Settings(**told), rule)
        check(name, asked.settings)
    except ValueError as error:
        raise ValueError(f"the method {text!r}: {error}") from error
    return asked


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A method ready to decode with a target.

    Attributes:
      target: the model.
      drafter: what proposes; the longest of `choices` where there are some.
      rule: what verifies.
      choices: drafters by draft length, when that is chosen on the way.
      cost: of this machine, then.
    """

    target: types.LanguageModel
    drafter: types.Drafter
    rule: types.VerificationRule
    choices: Mapping[int, types.Drafter] | None = None
    cost: decoding.Cost | None = None

    def warm(self, prompts: list[list[int]], options: dict[str, Any]) -> None:
        """Compiles the program of every draft length that may be chosen."""
        for drafter in (self.choices or {}).values():
            request, state = decoding.init(self.target, self.drafter, prompts, **options)
            decoding.advance(self.target, drafter, request, state, self.rule)

    def stream(
        self, request: decoding.Request, state: decoding.DecodeState
    ) -> decoding.TokenStream:
        """The answers as they are accepted."""
        if self.choices is None or self.cost is None:
            return decoding.TokenStream(self.target, self.drafter, request, state, self.rule)
        return decoding.AutomaticStream(
            self.target, self.choices, request, state, self.cost, self.rule
        )

    def decode(
        self, request: decoding.Request, state: decoding.DecodeState
    ) -> decoding.DecodeResult:
        """The whole answers."""
        if self.choices is None or self.cost is None:
            return decoding.decode(self.target, self.drafter, request, state, self.rule)
        return decoding.decode_automatically(
            self.target, self.choices, request, state, self.cost, self.rule
        )


def decoder(
    name: str,
    bundle: checkpoints.Bundle,
    settings: Settings,
    rule: str | types.VerificationRule | None = None,
) -> Decoder:
    """A method ready to decode; with `draft_length="auto"` costs are measured first.

    Raises:
      ValueError: as `build`, or a rule that cannot take the method's drafts.
    """
    if settings.draft_length != "auto":
        drafter = build(name, bundle, settings)
        return Decoder(bundle.target, drafter, decoding.rule_for(bundle.target, drafter, rule))
    check(name, settings)
    choices = {
        length: build(name, bundle, dataclasses.replace(settings, draft_length=length))
        for length in _LENGTHS
    }
    longest = choices[max(choices)]
    return Decoder(
        bundle.target,
        longest,
        decoding.rule_for(bundle.target, longest, rule),
        choices,
        step_costs.measured(bundle.target, Asked(name, settings).unstopping(bundle)),
    )


def build(name: str, bundle: checkpoints.Bundle, settings: Settings) -> types.Drafter:
    """The drafter of a method.

    Raises:
      ValueError: no method has this name, or a setting is out of range or not for this method.
    """
    check(name, settings)
    return find(name).build(bundle, resolved(name, settings))


def check(name: str, settings: Settings) -> None:
    """What can be said of a name and its settings without a model; ValueError as `build`."""
    method = find(name)
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value != field.default and field.name not in method.takes:
            raise ValueError(f"{field.name}={value} means nothing to the method {name!r}")
    _stop(settings)
    _expansion(settings)
    if name in OF_A_FILE and not pathlib.Path(settings.draft or SHIPPED).exists():
        raise ValueError(f"there is no draft {settings.draft or SHIPPED}; name one with --draft")
    if isinstance(settings.draft_length, int) and settings.draft_length < 1:
        raise ValueError(f"draft_length={settings.draft_length} must be at least 1")
    if name == "union" and settings.draft_length == "auto":
        raise ValueError("draft_length=auto: a union drafts a tree, and only chains have a length")


def find(name: str) -> Method:
    """A method by its name; ValueError lists those that exist."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; known: {', '.join(METHODS)}")
    return METHODS[name]


def _length(settings: Settings, own: int) -> int:
    """The draft length; where it is chosen on the way, the longest."""
    if settings.draft_length == "auto":
        return max(_LENGTHS)
    return own if settings.draft_length is None else int(settings.draft_length)


def _plain(bundle: checkpoints.Bundle, settings: Settings) -> types.Drafter:
    del bundle, settings
    return decoding.NOTHING


def _prompt_lookup(bundle: checkpoints.Bundle, settings: Settings) -> types.Drafter:
    del bundle
    return drafters.prompt_lookup(_length(settings, 8))


def _draft(bundle: checkpoints.Bundle, settings: Settings) -> types.Drafter:
    found = checkpoints.drafts.read(settings.draft or SHIPPED, bundle)
    drafter = _chain(found, _length(settings, 5), settings)
    return dataclasses.replace(drafter, name="draft")


def _tree(bundle: checkpoints.Bundle, settings: Settings) -> types.Drafter:
    found = checkpoints.drafts.read(settings.draft or SHIPPED, bundle)
    return drafters.tree(found, _expansion(settings), greedy=settings.greedy_draft)


def _union(bundle: checkpoints.Bundle, settings: Settings) -> types.Drafter:
    both = drafters.union(_prompt_lookup(bundle, settings), _draft(bundle, settings))
    return dataclasses.replace(both, name="union")


def _expansion(settings: Settings) -> tuple[int, ...]:
    given = "2-1-1" if settings.expansion is None else settings.expansion
    try:
        factors = tuple(int(factor) for factor in given.split("-"))
        if min(factors) >= 1:
            return factors
    except ValueError:
        pass
    raise ValueError(f"expansion={given!r}: write children by depth, each at least 1, as in 2-2-1")


def _chain(draft_model: types.LanguageModel, length: int, settings: Settings) -> types.Drafter:
    below, above = _stop(settings)
    return drafters.model(
        draft_model,
        length,
        greedy=settings.greedy_draft,
        stop_below=below,
        stop_above=above,
    )


def _stop(settings: Settings) -> tuple[float | None, float | None]:
    """`stop_below` and `stop_above`, as `drafters.model` takes them."""
    kind, _, number = (settings.stop or "never").partition(":")
    try:
        match kind:
            case "maximum" if 0 <= float(number) <= 1:
                return float(number), None
            case "entropy" if 0 <= float(number) < math.inf:
                return None, float(number)
            case "never" if not number:
                return None, None
    except ValueError:
        pass
    raise ValueError(
        f"stop={settings.stop!r}: write maximum:P with a probability, entropy:H with nats from 0 "
        "on, as in maximum:0.3 and entropy:2.5, or never"
    )


def resolved(name: str, settings: Settings) -> Settings:
    """With what the draft's card found best on text held out, of what is not asked for.

    Raises:
      ValueError: a card that cannot be read.
    """
    if name not in ("draft", "union"):
        return settings
    if settings.draft_length is not None and settings.stop is not None:
        return settings
    path = pathlib.Path(SHIPPED if settings.draft is None else settings.draft)
    made = cards.read(path)
    try:
        best = None if made is None else made["stopping"].get("best")
        if best is None:
            return settings
        stop = "never"
        if best["stop_below"] is not None:
            stop = f"maximum:{best['stop_below']!r}"
        elif best["stop_above"] is not None:
            stop = f"entropy:{best['stop_above']!r}"
        return dataclasses.replace(
            settings,
            draft_length=settings.draft_length or int(best["length"]),
            stop=settings.stop or stop,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(cards.unreadable(path, error)) from error


def _model(bundle: checkpoints.Bundle, settings: Settings) -> types.Drafter:
    length = _length(settings, 4)
    draft = "layers:12" if settings.draft is None else settings.draft
    kind, _, number = draft.partition(":")
    if kind == "layers":
        if not number.isdecimal():
            raise ValueError(f"draft={draft!r}: layers:N needs a whole N, as in layers:12")
        draft_model = checkpoints.layer_truncated(bundle, int(number))
    else:
        loaded = specjax.load(draft)
        if loaded.tokenizer.fingerprint != bundle.tokenizer.fingerprint:
            raise ValueError(
                f"draft={draft!r} has another tokenizer than {bundle.name}: its tokens of one id "
                "mean other text"
            )
        draft_model = loaded.target
    return _chain(draft_model, length, settings)


_OF_DRAFTS = ("draft_length", "draft", "greedy_draft", "stop")
# Methods whose draft is a file that `experiments.distill` made.
OF_A_FILE = ("draft", "tree", "union")
METHODS = {
    "plain": Method("one token a target step", _plain),
    "prompt_lookup": Method("copies from prompt and answer", _prompt_lookup, ("draft_length",)),
    "draft": Method(
        "the draft distilled from SmolLM2-135M-Instruct, or another that experiments.distill made",
        _draft,
        _OF_DRAFTS,
    ),
    "model": Method("a draft model, by default the target's first layers", _model, _OF_DRAFTS),
    "tree": Method(
        "a tree of the distilled draft's guesses", _tree, ("draft", "greedy_draft", "expansion")
    ),
    "union": Method("prompt lookup and the distilled draft in one tree", _union, _OF_DRAFTS),
}
