"""What tuning the target does to a draft, and what a short realignment repairs.

    python -m experiments.staleness --folder=runs/staleness

tunes the target on text files at three strengths. Each tuned target writes new text, on which the
old draft's acceptance is held against the KL divergence between the two targets; then the draft
goes on training for a while on other text of the tuned target, and is measured again. Its embedding
and its head's rows are those of the target that it drafts for (or lead through them), and so the
tuned ones throughout.
"""

import dataclasses
import pathlib
import sysconfig
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from experiments import binary, distill_config, distill_stages, methods, targets, unseen_text
from specjax import checkpoints, types
from specjax.models import transformer
from specjax.training import (
    batches,
    core,
    curves,
    data,
    fitting,
    folders,
    losses,
    tuning,
)

_TAKES = binary.takes(*binary.OF_TRAINING, binary.DRAFT, binary.FILES)
_STRENGTHS = flags.DEFINE_list("strengths", ["10", "40", "160"], "Updates of the target.")
_TARGET_RATE = flags.DEFINE_float("target_rate", 3e-5, "Learning rate of the target.")
_WINDOW = flags.DEFINE_integer("window", 256, "Tokens of a window that the target is tuned on.")
_ROWS = flags.DEFINE_integer("rows", 4, "Windows an update of the target.")

_LIBRARY = ("argparse", "ast", "bdb", "calendar", "configparser", "csv", "difflib", "doctest")


@dataclasses.dataclass(frozen=True)
class Config:
    """One run, as the flags give it."""

    model: str
    draft: str
    folder: str
    files: tuple[str, ...]
    strengths: tuple[int, ...]
    target_rate: float
    domains: tuple[str, ...]
    tokens: int
    batch: int
    steps: int
    rate: float
    batch_tokens: int
    window: int
    rows: int
    draft_length: int
    seed: int


def tuned(config: Config, bundle: checkpoints.Bundle, steps: int) -> checkpoints.Bundle:
    """The target after so many updates on the files."""
    texts = [
        bundle.tokenizer.encode(pathlib.Path(path).read_text(encoding="utf-8"))
        for path in config.files
    ]
    windows = tuning.Windows(texts, config.rows, config.window, config.seed)
    folder = pathlib.Path(config.folder) / f"target-{steps}"
    state = fitting.fit(
        tuning.NextToken(bundle.config),
        bundle.target.params,
        {},
        windows,
        core.Schedule(steps, config.target_rate, warmup=min(10, steps // 2), decay=0.0),
        folder,
        seed=config.seed,
        settings={
            "files": [folders.digest(path) for path in config.files],
            "rows": config.rows,
            "window": config.window,
            "rate": config.target_rate,
            "seed": config.seed,
        },
        # The last state is all that is wanted of it.
        save_every=steps,
    )
    return checkpoints.assemble(
        f"{bundle.name}, {steps} updates", bundle.config, state.params, bundle.tokenizer
    )


def divergence(
    old: checkpoints.Bundle, new: checkpoints.Bundle, held: list[batches.Batch]
) -> float:
    """KL(new ‖ old) a token of text that the new target wrote, in nats."""
    total = count = 0.0
    for batch in held:
        value, present = _divergence(old.target, new.target.params, batch)
        total, count = total + float(value), count + float(present)
    return total / count


@jax.jit
def _divergence(old: types.LanguageModel, params: Any, batch: batches.Batch):
    def law(weights, hidden):
        head = transformer.head_kernel(weights)
        logits = jnp.matmul(hidden, head.T, preferred_element_type=jnp.float32)
        return jax.nn.log_softmax(logits, axis=-1)

    cache = old.init_cache(batch.tokens.shape[0], 1)
    output, _ = old.apply(old.params, batch.tokens, cache, None, (old.num_layers,))
    answers = batch.normalizer.shape[1]
    hidden = batches.before_answers(output.features[:, :, 0], batch.start, answers)
    present = jnp.arange(answers, dtype=jnp.int32)[None] < batch.length[:, None]

    def of_row(row):
        before, after, here = row
        value = losses.forward_kl(law(params, after), law(old.params, before))
        return jnp.sum(jnp.where(here, value, 0.0))

    # Row by row: two whole laws of a batch would be the largest arrays of all.
    after = batch.features.astype(hidden.dtype)
    values = jax.lax.map(of_row, (hidden, after, present))
    return jnp.sum(values), jnp.sum(present, dtype=jnp.float32)


def realigned(
    config: Config, bundle: checkpoints.Bundle, steps: int
) -> tuple[dict[str, Any], list[batches.Batch]]:
    """The draft on a tuned target, before and after a short realignment; and what it is held on."""
    asked = distill_config.Config(
        folder=config.folder,
        tokens=config.tokens,
        texts=data.Settings(
            seed=config.seed,
            domains=config.domains,
            batch=config.batch,
            # Targets are told apart by laws, which are to be whole.
            is_rounded=False,
        ),
        steps=config.steps,
        rate=config.rate,
        batch_tokens=config.batch_tokens,
        draft_length=config.draft_length,
        seed=config.seed,
    )
    asked = distill_stages.of_draft(asked, bundle, config.draft)
    # What the old draft learnt from would not tell an old target from a new one.
    texts = dataclasses.replace(asked.texts, seed=unseen_text.seed(asked))
    folder = pathlib.Path(config.folder) / f"after-{steps}"
    asked = dataclasses.replace(asked, folder=str(folder), texts=texts)
    unseen = unseen_text.write(
        asked, bundle, folder / "measured", min(config.tokens, unseen_text.MEASURED)
    )
    before = unseen_text.measure(asked, bundle, unseen)
    held, _ = distill_stages.generate(asked, bundle)
    trained = distill_stages.train(asked, bundle, held, asked.shape, folder / "draft")
    row = {
        "before": before,
        "after": trained.measure(unseen, config.draft_length),
        "measured_on": unseen_text.told(unseen),
        "realignment_minutes": trained.seconds / 60,
    }
    return row, unseen


def run(config: Config) -> dict[str, Any]:
    """The report, ready for JSON."""
    binary.start()
    bundle = targets.load(config.model)
    rows = []
    # What can be said of them is said before anything long.
    curves.check()
    for path in config.files:
        folders.digest(path)
    for steps in (0, *config.strengths):
        with binary.Progress(f"target after {steps} updates"):
            changed = tuned(config, bundle, steps) if steps else bundle
            row, unseen = realigned(config, changed, steps)
            row["kl"] = divergence(bundle, changed, unseen) if steps else 0.0
        rows.append({"updates": steps, **row})
        folders.write_json(pathlib.Path(config.folder) / "staleness.json", rows)
    plot(rows, pathlib.Path(config.folder) / "staleness.png")
    return {**dataclasses.asdict(config), "rows": rows, "versions": binary.versions()}


def plot(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Acceptance against the divergence between targets, before and after realignment."""
    from matplotlib import figure

    drawing = figure.Figure(figsize=(5.2, 3.6), layout="constrained")
    axes = drawing.subplots()
    divergences = np.asarray([row["kl"] for row in rows])
    for index, when in enumerate(("before", "after")):
        shares = [row[when]["agreement"] for row in rows]
        axes.plot(divergences, shares, marker="o", color=f"C{index}", label=f"{when} realignment")
    axes.set(
        xlabel="KL(tuned ‖ old), nats a token",
        ylabel="greedy acceptance of the draft",
        title="Staleness",
    )
    axes.legend(frameon=False)
    drawing.savefig(path, dpi=150)


def table(report: dict[str, Any]) -> str:
    """A line a strength."""
    lines = [
        f"{'updates':>8}{'KL':>8}{'agreement':>12}{'realigned':>11}{'overlap':>9}{'realigned':>11}"
        f"{'τ':>7}{'realigned':>11}{'minutes':>9}"
    ]
    for row in report["rows"]:
        before, after = row["before"], row["after"]
        lines.append(
            f"{row['updates']:>8}{row['kl']:>8.3f}{before['agreement']:>12.3f}"
            f"{after['agreement']:>11.3f}{before['overlap']:>9.3f}{after['overlap']:>11.3f}"
            f"{before['tau']:>7.2f}{after['tau']:>11.2f}{row['realignment_minutes']:>9.1f}"
        )
    told = [row["measured_on"] for row in report["rows"]]
    lines.append(
        "measured on "
        + ", ".join(f"{row['greedy_tokens']:,} of {row['tokens']:,}" for row in told)
        + " tokens, agreement and τ on the first of each"
    )
    return "\n".join(lines)


def config_from_flags() -> Config:
    """Reads the flags; ValueError names the one that is wrong."""
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    files = binary.FILES.value or [str(library / f"{name}.py") for name in _LIBRARY]
    try:
        strengths = tuple(int(value) for value in _STRENGTHS.value)
    except ValueError as error:
        raise ValueError(f"--strengths={','.join(_STRENGTHS.value)}: {error}") from error
    return Config(
        model=binary.MODEL.value,
        draft=str(binary.given(binary.DRAFT, methods.SHIPPED)),
        folder=binary.folder(),
        files=tuple(files),
        strengths=strengths,
        target_rate=_TARGET_RATE.value,
        domains=tuple(binary.given(binary.DOMAINS, data.GENERIC)),
        tokens=binary.given(binary.TOKENS, 60_000),
        batch=binary.given(binary.BATCH, 128),
        steps=binary.given(binary.STEPS, 200),
        rate=binary.given(binary.RATE, 2e-3),
        batch_tokens=binary.BATCH_TOKENS.value,
        window=_WINDOW.value,
        rows=_ROWS.value,
        draft_length=binary.draft_length_or(5),
        seed=binary.SEED.value,
    )


def main(argv: list[str]) -> None:
    """Runs what the flags ask for; bad input ends in one line and exit code 2."""
    binary.report(argv, lambda: run(config_from_flags()), table, _TAKES)


if __name__ == "__main__":
    app.run(main, flags_parser=binary.parse_flags)
