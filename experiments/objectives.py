"""Which loss a draft had better learn from, and from whose text: a table of short trainings.

    python -m experiments.objectives --folder=runs/draft --draft=runs/draft/draft.safetensors

goes on training one draft by one loss after another, each for the same number of updates on the
data that distilling left in the folder (where there is none, it is made), and measures all on text
of another seed. Nothing else is minimised, but for the lessons in copying that the draft had before
(its card tells of them). `accepted_length` is the negative expected accepted length on answers
drawn at temperature 1, which it is about, and forward KL on the others. On-policy means that half
the updates are on text that the draft itself writes (DistillSpec, Zhou et al. 2023, arXiv
2310.08461, section 4).
"""

import dataclasses
import pathlib
from typing import Any

import jax
from absl import app

from experiments import binary, distill_config, distill_stages, methods, targets, unseen_text
from specjax.training import curves, data, folders

_TAKES = binary.takes(*binary.OF_TRAINING, binary.DRAFT, binary.MAX_NEW_TOKENS)

VARIANTS: dict[str, dict[str, Any]] = {
    "forward_kl": {},
    "reverse_kl": {"loss": "reverse_kl"},
    "jensen_shannon": {"loss": "jensen_shannon"},
    "total_variation": {"loss": "total_variation"},
    "accepted_length": {"accepted": 1.0},
    "forward_kl, on-policy": {"on_policy": 0.5},
    "total_variation, on-policy": {"loss": "total_variation", "on_policy": 0.5},
}
# Where none of these is given, whatever data the folder holds will do.
_OF_DATA = (binary.TOKENS, binary.DOMAINS, binary.BATCH, binary.MAX_NEW_TOKENS)


def run(
    config: distill_config.Config, draft: str, model: str, any_data: bool = False
) -> dict[str, Any]:
    """The report, ready for JSON; with `any_data` on whatever data the folder holds."""
    curves.check()
    binary.start()
    bundle = targets.load(model)
    config = distill_stages.of_draft(config, bundle, draft)
    held = data.read(pathlib.Path(config.folder) / "data", bundle) if any_data else []
    if not held:
        held, _ = distill_stages.generate(config, bundle)
    folder = pathlib.Path(config.folder) / "objectives"
    # What a folder holds out of little text would not tell losses apart.
    texts = unseen_text.write(
        config, bundle, folder / "measured", min(config.tokens, unseen_text.MEASURED)
    )

    before = unseen_text.measure(config, bundle, texts)
    rows: list[dict[str, Any]] = []
    for name, changes in VARIANTS.items():
        with binary.Progress(name):
            trained = distill_stages.train(
                dataclasses.replace(config, **changes),
                bundle,
                held,
                config.shape,
                folder / f"{name.replace(', ', '-')}-{config.steps}-{config.rate:g}",
            )
        found = trained.measure(texts, config.draft_length)
        rows.append({"loss": name, "minutes": trained.seconds / 60, **found})
        # A process has room for so many programs, and the next loss needs none of these.
        jax.clear_caches()
    report = {
        **{"draft": draft, "steps": config.steps, "before": before, "rows": rows},
        "measured_on": unseen_text.told(texts),
        "versions": binary.versions(),
    }
    folders.write_json(folder / "objectives.json", report)
    return report


def table(report: dict[str, Any]) -> str:
    """A line a loss."""
    lines = [f"{'loss':<28}{'overlap':>9}{'agreement':>11}{'τ':>7}{'minutes':>9}"]
    for row in ({"loss": "before", "minutes": 0.0, **report["before"]}, *report["rows"]):
        lines.append(
            f"{row['loss']:<28}{row['overlap']:>9.3f}{row['agreement']:>11.3f}{row['tau']:>7.2f}"
            f"{row['minutes']:>9.1f}"
        )
    told = report["measured_on"]
    lines.append(
        f"measured on {told['tokens']:,} tokens, agreement and τ on the {told['greedy_tokens']:,} "
        "of them that are greedy"
    )
    return "\n".join(lines)


def config_from_flags() -> distill_config.Config:
    """Reads the flags; ValueError names the one that is wrong."""
    return distill_config.Config(
        folder=binary.folder(),
        tokens=binary.given(binary.TOKENS, distill_config.Config.tokens),
        texts=distill_config.texts(),
        steps=binary.given(binary.STEPS, 150),
        rate=binary.given(binary.RATE, 2e-3),
        batch_tokens=binary.BATCH_TOKENS.value,
        features=0.0,
        draft_length=binary.draft_length_or(distill_config.Config.draft_length),
        seed=binary.SEED.value,
    )


def main(argv: list[str]) -> None:
    """Runs what the flags ask for; bad input ends in one line and exit code 2."""

    def report() -> dict[str, Any]:
        draft = str(binary.given(binary.DRAFT, methods.SHIPPED))
        any_data = not any(flag.present for flag in _OF_DATA)
        return run(config_from_flags(), draft, binary.MODEL.value, any_data)

    binary.report(argv, report, table, _TAKES)


if __name__ == "__main__":
    app.run(main, flags_parser=binary.parse_flags)
