"""Training text without a data set: the target answers prompts of templates and of its own.

A shard is one batch. What it holds follows from the settings and its number alone (and from earlier
shards, whose answers later prompts work on), so a run that was killed goes on where it stopped and
ends with the same shards.
"""

import dataclasses
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from specjax import checkpoints, decoding, types
from specjax.models import policy as policies
from specjax.models import transformer
from specjax.training import folders, prompts, recording, shards

__all__ = ["DOMAINS", "GENERIC", "Progress", "Settings", "effective", "generate", "needed", "read"]

# Domains whose prompts are no templates: a turn that the target writes as if it were the user, the
# answer to such a turn, and the continuation of the user's own files.
_OWN = ("user_turn", "open", "files")
DOMAINS = (*prompts.DOMAINS, *_OWN)

# The default turn: much of what the target itself asks, which is what users ask more than templates
# are; and code, since it is what drafts are used for most.
GENERIC = (
    *("passage", "user_turn", "open", "code", "summarisation", "user_turn", "open", "open"),
    *("mathematics", "question_answering", "user_turn", "open", "open", "code", "translation"),
    *("editing", "user_turn", "open", "open", "chat"),
)

_SETTINGS = "settings.json"
# A batch ends when this part of it is left: few rows cost nearly what all cost.
_LEFT = 1 / 8
_STEPS = 16
# Prompts that may be too long for each that is not.
_PATIENCE = 50
_DRAWN = (0.7, 0.9)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is generated.

    Attributes:
      seed: of prompts and answers.
      domains: the domains of the shards in turn, from `DOMAINS`; those that work on passages (or on
        user turns) need that domain earlier in the tuple.
      temperatures: of the answers, in turn within a batch; 0 is greedy.
      answers: how many answers each prompt gets; they share its prefill.
      batch: conversations a shard, decoded together; a multiple of `answers`.
      max_new_tokens: longest answer.
      passages: how many passages a prompt that works on some holds at the most.
      longest_passage: tokens of one.
      longest_prompt: tokens of a prompt with its chat template; longer ones are drawn anew.
      is_rounded: the target's products are rounded as `policies.for_training` rounds them, where it
        does: text and recorded laws are then those of the rounded target, and written sooner.
      taps: layers of the target whose features are recorded; empty for none.
      top: how many of the most probable tokens are recorded with their log-probabilities.
      files: text files for the domain `files`.

    Raises:
      ValueError: a bad value, named.
    """

    seed: int = 0
    domains: tuple[str, ...] = GENERIC
    temperatures: tuple[float, ...] = (0.0, 0.8, 0.0, 1.0)
    answers: int = 2
    batch: int = 128
    max_new_tokens: int = 200
    passages: int = 4
    longest_passage: int = 200
    longest_prompt: int = 1024
    is_rounded: bool = True
    taps: tuple[int, ...] = ()
    top: int = 0
    files: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.domains:
            raise ValueError("domains=() asks for nothing")
        for index, domain in enumerate(self.domains):
            if domain not in DOMAINS:
                raise ValueError(f"unknown domain {domain!r}; known: {', '.join(DOMAINS)}")
            source = needed(domain)
            if source is not None and source not in self.domains[:index]:
                raise ValueError(
                    f"domain {domain!r} works on what {source!r} gives; name that one before it"
                )
        if "files" in self.domains and not self.files:
            raise ValueError("domain 'files' continues text files; name some")
        if self.files and "files" not in self.domains:
            raise ValueError(
                f"files={self.files} are continued in the domain 'files', which is not among "
                f"domains={self.domains}"
            )
        if not self.temperatures or min(self.temperatures) < 0:
            raise ValueError(f"temperatures={self.temperatures} must be some numbers, 0 or more")
        for name in (
            *("batch", "max_new_tokens", "answers"),
            *("passages", "longest_passage", "longest_prompt"),
        ):
            types.whole(name, getattr(self, name), 1)
        if self.batch % self.answers:
            raise ValueError(f"batch={self.batch} is no multiple of answers={self.answers}")


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far generation has come.

    Attributes:
      shards: finished, those of earlier runs included.
      tokens: answer tokens in them.
      wanted: answer tokens asked for.
      tokens_per_second: of this run; 0 before its first shard.
      seconds_left: an estimate; NaN before the first shard.
    """

    shards: int
    tokens: int
    wanted: int
    tokens_per_second: float
    seconds_left: float


def generate(
    bundle: checkpoints.Bundle,
    folder: pathlib.Path | str,
    tokens: int,
    settings: Settings | None = None,
    *,
    least: int = 1,
    budget_seconds: float | None = None,
    report: Callable[[Progress], None] = lambda _: None,
) -> list[shards.Shard]:
    """Lets the target write until so many answer tokens are there; goes on where a run stopped.

    Args:
      bundle: the target with its tokenizer and chat template.
      folder: where the shards go; holds those of one setting only.
      tokens: answer tokens wanted, those already there included.
      settings: what to generate; None is the generic mixture with seed 0.
      least: shards wanted, however many tokens there are.
      budget_seconds: the time there is for it in this run, or None; looked at from the second
        shard on.
      report: called before the first shard that is not there yet, and after every shard.

    Returns:
      All shards, in order.

    Raises:
      ValueError: other settings than the folder's, more tokens than the budget allows (the message
        says how long they would take), a damaged shard, or a full disk.
    """
    settings = effective(Settings() if settings is None else settings)
    types.whole("tokens", tokens, 1)
    folder = pathlib.Path(folder)
    target = _target(bundle, settings)
    own = {
        **dataclasses.asdict(settings),
        "target": folders.fingerprint(bundle.target.params),
        "tokenizer": bundle.tokenizer.fingerprint,
        "chat_template": folders.digest_text(bundle.tokenizer.chat_template or ""),
        "texts": [folders.digest(path) for path in settings.files],
    }
    folders.claim(folder / _SETTINGS, own)
    made: list[shards.Shard] = []
    recorder = recording.recorder(target, settings.taps, settings.top)
    files = _files(settings.files, bundle)
    began = mark = time.monotonic()
    speeds: list[tuple[int, float]] = []
    while (done := _count(made)) < tokens or len(made) < least:
        index = len(made)
        path = folder / _name(index)
        if path.exists():
            made.append(shards.read(path))
            mark = time.monotonic()
            continue
        if not speeds:
            report(Progress(index, done, tokens, 0.0, math.nan))
        domain = settings.domains[index % len(settings.domains)]
        asked = _prompts(bundle, settings, index, domain, made, files)
        shards.write(path, domain, _answers(target, settings, index, asked, recorder))
        made.append(shards.read(path))
        done, now = _count(made), time.monotonic()
        speeds.append((made[-1].answer_tokens, now - mark))
        mark = now
        # The first holds the compilation, which tells nothing of what is to come.
        told = speeds[1:] or speeds
        rate = sum(count for count, _ in told) / sum(seconds for _, seconds in told)
        left = max(tokens - done, 0) / rate
        report(Progress(len(made), done, tokens, rate, left))
        if len(speeds) == 1:
            continue
        if len(told) < len(settings.domains):
            # Domains differ in speed: until each has had its turn, the fastest speaks for all,
            # the first, which is faster still than it seems, among them.
            rate = max(count / seconds for count, seconds in speeds)
            left = max(tokens - done, 0) / rate
        spare = math.inf if budget_seconds is None else max(budget_seconds - (now - began), 0)
        if left > spare:
            raise ValueError(
                f"{tokens} tokens do not fit the budget: at {rate:.0f} tokens a second "
                f"{tokens - done} more take {left / 60:.0f} minutes, of which {spare / 60:.0f} are "
                f"left; ask for {done + int(rate * spare)}, or give more time"
            )
    return made


def read(folder: pathlib.Path | str, bundle: checkpoints.Bundle) -> list[shards.Shard]:
    """The shards of a folder, in order, up to the first that is not there.

    Raises:
      ShardError: one of them is damaged.
      ValueError: another target wrote them.
    """
    folders.check(
        pathlib.Path(folder) / _SETTINGS, {"target": folders.fingerprint(bundle.target.params)}
    )
    made = []
    while (path := pathlib.Path(folder) / _name(len(made))).exists():
        made.append(shards.read(path))
    return made


def _name(index: int) -> str:
    return f"shard-{index:05d}"


def _count(made: Sequence[shards.Shard]) -> int:
    return sum(shard.answer_tokens for shard in made)


def needed(domain: str) -> str | None:
    """The domain whose answers this one's prompts are made of, or None."""
    if domain == "open":
        return "user_turn"
    return "passage" if domain in prompts.NEEDS_PASSAGES else None


def effective(settings: Settings) -> Settings:
    """With `is_rounded` as it is on this machine, where it may mean nothing."""
    return dataclasses.replace(
        settings, is_rounded=settings.is_rounded and policies.for_training().rounded
    )


def _target(bundle: checkpoints.Bundle, settings: Settings) -> types.LanguageModel:
    """The target as it writes."""
    if not settings.is_rounded:
        return bundle.target
    # Norms and attention are the backend's own, which read the cache once.
    policy = dataclasses.replace(policies.for_backend(), rounded=True)
    rounded = transformer.language_model(bundle.config, bundle.target.params, policy)
    return dataclasses.replace(rounded, eos_ids=bundle.target.eos_ids)


def _files(paths: Sequence[str], bundle: checkpoints.Bundle) -> list[list[int]]:
    texts = []
    for path in paths:
        try:
            text = pathlib.Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read as text: {error}") from error
        texts.append(bundle.tokenizer.encode(text))
        if len(texts[-1]) < 2:
            raise ValueError(f"{path} holds too little text to continue")
    return texts


def _opening(bundle: checkpoints.Bundle) -> list[int]:
    """The chat template's tokens up to where the user begins to speak."""
    first, second = bundle.chat("A"), bundle.chat("7")
    agree = next(i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return first[:agree]


def _prompts(
    bundle: checkpoints.Bundle,
    settings: Settings,
    index: int,
    domain: str,
    made: Sequence[shards.Shard],
    files: Sequence[Sequence[int]],
) -> list[list[int]]:
    """The token ids of a shard's prompts."""
    generator = np.random.default_rng([settings.seed, index])
    count = settings.batch // settings.answers
    if domain == "user_turn":
        return [
            [*_opening(bundle), *bundle.tokenizer.encode(prompts.opening(generator))]
            for _ in range(count)
        ]
    if domain == "files":
        return [_window(generator, files) for _ in range(count)]
    source = needed(domain)
    texts = [
        _plain(bundle, shard, i, settings.longest_passage)
        for shard in made
        if shard.domain == source
        for i in range(len(shard))
    ]
    asked: list[list[int]] = []
    shortest = len(_opening(bundle))
    if shortest > settings.longest_prompt // 2:
        raise ValueError(
            f"the chat template alone takes {shortest} tokens, too many for prompts of "
            f"longest_prompt={settings.longest_prompt}"
        )
    # Every turn of the user's is answered once, or text held out would be trained on.
    turns = count * sum(shard.domain == domain for shard in made)
    refused = 0
    while len(asked) < count:
        if domain == "open":
            said = texts[turns % len(texts)]
            turns += 1
        else:
            parts = 1 + int(generator.integers(settings.passages)) if texts else 0
            joined = " ".join(texts[int(generator.integers(len(texts)))] for _ in range(parts))
            said = prompts.make(domain, generator, [joined] if texts else ())
        tokens = bundle.chat(said)
        if len(tokens) <= settings.longest_prompt:
            asked.append(tokens)
            continue
        refused += 1
        if refused > _PATIENCE * count:
            raise ValueError(
                f"hardly a prompt of domain {domain!r} fits longest_prompt="
                f"{settings.longest_prompt}; allow longer ones, or fewer passages="
                f"{settings.passages} of longest_passage={settings.longest_passage}"
            )
    return asked


def _window(generator: np.random.Generator, files: Sequence[Sequence[int]]) -> list[int]:
    text = files[int(generator.integers(len(files)))]
    begin = int(generator.integers(len(text) - 1))
    return list(text[begin : begin + int(generator.integers(16, 256))])


def _plain(bundle: checkpoints.Bundle, shard: shards.Shard, index: int, longest: int) -> str:
    """An answer as text, or a space where it holds none, which no template refuses.

    Of a user's turn, what it began with belongs to it.
    """
    prompt, answer = shard.text(index)
    if shard.domain == "user_turn":
        answer = np.concatenate([prompt[len(_opening(bundle)) :], answer])
    return bundle.tokenizer.decode(answer[:longest]).strip() or " "


def _answers(
    target: types.LanguageModel,
    settings: Settings,
    index: int,
    asked: list[list[int]],
    recorder: types.Drafter,
) -> dict[str, np.ndarray]:
    """Decodes a batch and lays out a shard's arrays."""
    count = settings.batch
    # Openings are few, so that greedy turns of a user would often be the same.
    is_drawn = settings.domains[index % len(settings.domains)] == "user_turn"
    temperature = np.resize(
        np.asarray(_DRAWN if is_drawn else settings.temperatures, np.float32), count
    )
    first = np.uint32(index * count)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.key(settings.seed), first + np.arange(count, dtype=np.uint32)
    )
    one_each = decoding.init(target, recorder, asked, max_new_tokens=settings.max_new_tokens)
    request, state = _repeat(one_each, settings.answers)
    request = dataclasses.replace(
        request, keys=keys, sampling=types.Sampling(jnp.asarray(temperature))
    )
    stream = decoding.TokenStream(target, recorder, request, state, "match", steps=_STEPS)
    running = np.full(count, True)
    for new in stream:
        running = np.asarray([len(tokens) > 0 for tokens in new])
        if np.sum(running) <= _LEFT * count:
            break
    result = stream.result
    start, length, text = (np.asarray(x) for x in (result.start, result.length, result.tokens))
    record = jax.tree.map(np.asarray, result.state.drafter)
    row = np.repeat(np.arange(count), length - start)
    slot = np.concatenate([np.arange(*ends) for ends in zip(start, length, strict=True)])
    return {
        "offsets": np.concatenate([[0], np.cumsum(length)]).astype(np.int64),
        "prompts": start.astype(np.int32),
        "temperature": temperature,
        "tokens": np.concatenate([text[i, : length[i]] for i in range(count)]),
        **{
            name: getattr(record, name)[row, slot]
            for name in ("features", "normalizer", "top_tokens", "top_log_probs")
        },
    }


def _repeat(tree: Any, times: int) -> Any:
    """Every row so many times, in place of each other; what has no rows stays."""
    return jax.tree.map(
        lambda leaf: jnp.repeat(leaf, times, axis=0) if jnp.ndim(leaf) else jnp.copy(leaf), tree
    )
