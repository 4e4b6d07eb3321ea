"""Distils a draft model from the target, from nothing but the target itself.

    python -m experiments.distill --folder=runs/draft

generates texts with the target, counts its tokens to choose the draft's vocabulary, trains the
draft on the target's laws, and writes it as one file with a card beside it. Every stage goes on
where it was stopped. With --candidates several shapes are trained for a while first, and the cost
model chooses among them. --model=tiny shows all of it in a few minutes.
"""

import pathlib
import shlex
import sys
from typing import Any

from absl import app, flags

from experiments import binary, distill_config, draft_costs, stopping, targets
from experiments.distill_config import Config
from experiments.distill_run import run
from specjax.training import data, losses, shapes

_TAKES = binary.takes(
    *binary.OF_TRAINING,
    binary.DTYPE,
    binary.FILES,
    binary.MAX_NEW_TOKENS,
    binary.OUT,
    binary.PROMPTS,
)
_DATA_MINUTES = flags.DEFINE_float(
    "data_minutes", Config.data_minutes, "Time for them; what would take more is refused."
)
_TAPS = flags.DEFINE_list("taps", [], "Layers to record besides the final norm.")
_TOP = flags.DEFINE_integer("top", 0, "Most probable tokens to record with the data.")
_LAYERS = flags.DEFINE_list(
    "layers",
    None,
    "The target's layers that the draft begins as, by default its first and last; or 4x256 for "
    "four of width 256 of its own.",
)
_FEED_FORWARD = flags.DEFINE_integer(
    "feed_forward",
    None,
    "Width of its feed-forward layers; default the target's, or in proportion to its own width.",
)
_VOCABULARY = flags.DEFINE_integer("draft_vocabulary", None, "Tokens it speaks of; default 8192.")
_CANDIDATES = flags.DEFINE_multi_string(
    "candidates",
    [],
    "LAYERS/FEED_FORWARD/VOCABULARY, as in 0+29/1536/8192 or 4x256/704/8192, to choose among.",
)
_CHOICE_STEPS = flags.DEFINE_integer(
    "choice_steps", Config.choice_steps, "Updates that each candidate gets."
)
_OPTIMIZER = flags.DEFINE_string("optimizer", Config.optimizer, "muon or adam.")
_PARTS = flags.DEFINE_integer("parts", Config.parts, "Parts that a batch is gone through in.")
_LOSS = flags.DEFINE_string("loss", Config.loss, f"One of: {', '.join(losses.LOSSES)}.")
_BETA = flags.DEFINE_float("beta", Config.beta, "Of --loss=jensen_shannon.")
_FEATURES = flags.DEFINE_float(
    "features",
    None,
    "Weight of the distance of hidden states; default 0.5, and 0 for layers of the draft's own.",
)
_COPYING = flags.DEFINE_float(
    "copying",
    None,
    "Weight of lessons in copying; default 0.1 for new drafts of two layers or more.",
)
_COPYING_STEPS = flags.DEFINE_integer(
    "copying_steps", Config.copying_steps, "Updates on such lessons alone, before all others."
)
_ACCEPTED = flags.DEFINE_float(
    "accepted",
    Config.accepted,
    "Weight of the negative expected accepted length, on answers drawn at temperature 1.",
)
_ON_POLICY = flags.DEFINE_float(
    "on_policy", Config.on_policy, "Share of the updates that are on the draft's own text."
)
_START_FROM = flags.DEFINE_string(
    "start_from", None, "A draft to go on from, as when realigning it."
)
_EXPORT = flags.DEFINE_string(
    "export", None, "Also write the draft as a Hugging Face folder, for other libraries."
)
_DEVICES = flags.DEFINE_integer("devices", 1, "Devices that share a batch's rows.")


def report(config: Config) -> dict[str, Any]:
    """The card of the draft, ready for JSON."""
    binary.start()
    bundle = targets.load(binary.MODEL.value)
    command = shlex.join(["python", "-m", "experiments.distill", *sys.argv[1:]])
    return {**run(config, bundle, command), "draft": str(config.draft)}


def table(made: dict[str, Any]) -> str:
    """What was made, and what it measured."""
    lines = [draft_costs.text(made["candidates"])] if made["candidates"] else []
    texts, training, measured = made["data"], made["training"], made["held_out"]
    lines += [
        f"draft        {made['draft']}, {made['bytes'] / 1e6:.1f} MB",
        f"data         {texts['answer_tokens']} tokens, {texts['conversations']} conversations, "
        f"{texts['minutes']:.1f} minutes",
        f"vocabulary   {made['shape']['vocabulary']} tokens, {made['coverage']:.1%} of text",
        f"training     {training['steps']} updates, {training['epochs']:.1f} epochs, "
        f"{training['minutes']:.1f} minutes",
        f"held out     overlap {measured['overlap']:.3f}, greedy agreement "
        f"{measured['agreement']:.3f}, τ {measured['tau']:.2f}",
    ]
    for group, row in made.get("acceptance", {"groups": {}})["groups"].items():
        lines.append(f"  {group:<19}τ {row['tau']:.2f}, acceptance {row['acceptance_rate']:.2f}")
    if made["stopping"]:
        lines += stopping.lines(made["stopping"])
    return "\n".join(lines)


def parse_shape(text: str) -> shapes.Shape:
    """A shape from LAYERS/FEED_FORWARD/VOCABULARY; ValueError says how it is written."""
    try:
        layers, width, vocabulary = text.split("/")
        return shapes.Shape(_layers(layers.split("+")), int(width), int(vocabulary))
    except ValueError as error:
        raise ValueError(
            f"--candidates={text!r}: write LAYERS/FEED_FORWARD/VOCABULARY, as in 0+29/1536/8192 "
            "or 4x256/704/8192"
        ) from error


def _layers(given: list[str]) -> tuple[int, ...] | shapes.Own:
    """The target's layers by number, or sizes of the draft's own; ValueError for neither."""
    depth, by, width = given[0].partition("x")
    if by and len(given) == 1:
        return shapes.Own(int(depth), int(width))
    return tuple(int(layer) for layer in given)


def _integers(name: str, values: list[str] | None) -> tuple[int, ...]:
    try:
        return tuple(int(value) for value in values or [])
    except ValueError as error:
        raise ValueError(f"--{name}={','.join(values or [])}: {error}") from error


def _layers_of_flag() -> tuple[int, ...] | shapes.Own | None:
    given = _LAYERS.value or []
    try:
        return _layers(given) if given else None
    except ValueError as error:
        raise ValueError(
            f"--layers={','.join(given)}: write numbers of layers, as in 0,29, or how many of "
            "which width, as in 4x256"
        ) from error


def config_from_flags() -> Config:
    """Reads the flags; ValueError names the one that is wrong."""
    domains = (*data.GENERIC, "files") if binary.FILES.value else data.GENERIC
    return Config(
        folder=binary.folder(),
        tokens=binary.given(binary.TOKENS, Config.tokens),
        data_minutes=_DATA_MINUTES.value,
        texts=distill_config.texts(
            domains=domains,
            top=_TOP.value,
            files=tuple(str(pathlib.Path(path)) for path in binary.FILES.value),
        ),
        taps=_integers("taps", _TAPS.value),
        layers=_layers_of_flag(),
        feed_forward=_FEED_FORWARD.value,
        vocabulary=_VOCABULARY.value,
        candidates=tuple(map(parse_shape, _CANDIDATES.value)),
        choice_steps=_CHOICE_STEPS.value,
        steps=binary.given(binary.STEPS, Config.steps),
        rate=binary.given(binary.RATE, Config.rate),
        optimizer=_OPTIMIZER.value,
        batch_tokens=binary.BATCH_TOKENS.value,
        parts=_PARTS.value,
        loss=_LOSS.value,
        beta=_BETA.value,
        features=_FEATURES.value,
        copying=_COPYING.value,
        copying_steps=_COPYING_STEPS.value,
        accepted=_ACCEPTED.value,
        on_policy=_ON_POLICY.value,
        start_from=_START_FROM.value,
        dtype=binary.DTYPE.value,
        devices=_DEVICES.value,
        draft_length=binary.draft_length_or(Config.draft_length),
        seed=binary.SEED.value,
        out=binary.OUT.value,
        prompts=tuple(binary.PROMPTS.value),
        export=_EXPORT.value,
    )


def main(argv: list[str]) -> None:
    """Runs what the flags ask for; bad input ends in one line and exit code 2."""
    binary.report(argv, lambda: report(config_from_flags()), table, _TAKES)


if __name__ == "__main__":
    app.run(main, flags_parser=binary.parse_flags)
