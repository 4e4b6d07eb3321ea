"""A whole distillation: its stages, the draft's file, and the card beside it."""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from experiments import acceptance, binary, cards, distill_stages, prompt_files, stopping
from experiments.distill_config import Config
from specjax import checkpoints
from specjax.training import curves, data, folders, shapes, shards

__all__ = ["run"]


def run(config: Config, bundle: checkpoints.Bundle, command: str) -> dict[str, Any]:
    """All stages; writes the draft with its card, and returns the card."""
    config = config.of(bundle.config)
    # What can be said of it is said before hours are spent on data.
    asked = config.candidates or (config.shape,)
    for shape in asked:
        shapes.configure(bundle.config, shape)
        config.copying_weight(shape.num_layers)
    earlier = None
    if config.start_from is not None:
        for shape in asked:
            distill_stages.check_shape(config, bundle, shape)
        earlier = cards.read(config.start_from)
        if config.draft.resolve() == pathlib.Path(config.start_from).resolve():
            raise ValueError(
                f"--out={config.draft} is the draft that --start_from names; give another file, "
                "or a run that is stopped could not go on"
            )
    prompt_files.read(*config.prompts)
    if config.export is not None and not bundle.config.tied_embeddings:
        raise ValueError("--export needs a target whose head is its embedding")
    if config.export is not None and any(isinstance(shape.layers, shapes.Own) for shape in asked):
        raise ValueError("--export needs a draft of the target's layers: its head is the target's")
    curves.check()
    claimed = distill_stages.claimed_tokens(pathlib.Path(config.folder))
    if claimed is not None and config.tokens > claimed:
        raise ValueError(
            f"--tokens={config.tokens}: what was trained in {config.folder} had {claimed}; ask for "
            f"--tokens={claimed} to go on, or give another --folder"
        )
    held, data_seconds = distill_stages.generate(config, bundle)
    shape, candidates = distill_stages.choose(config, bundle, held)
    trained = distill_stages.train(
        config, bundle, held, shape, pathlib.Path(config.folder) / "training"
    )
    whole = config.draft.with_name(f"new-{config.draft.name}")
    checkpoints.drafts.write(
        whole, bundle, trained.objective.config, trained.params, trained.frozen["tokens"]
    )
    chosen = _chosen_before(config.draft, whole)
    # No card stands beside a draft that it does not tell of.
    config.draft.with_suffix(".json").unlink(missing_ok=True)
    whole.replace(config.draft)
    if config.export is not None:
        checkpoints.drafts.export(config.draft, bundle, config.export)
    made = _card(config, bundle, held, shape, trained, data_seconds)
    made["stopping"] = chosen or stopping.chosen(
        bundle,
        trained.objective,
        trained.params,
        trained.frozen,
        trained.unseen,
        config.draft_length,
    )
    made |= {"command": command, "candidates": candidates, "earlier": earlier}
    folders.write_json(config.draft.with_suffix(".json"), made)
    if config.prompts:
        made["acceptance"] = _acceptance(config, bundle)
        folders.write_json(config.draft.with_suffix(".json"), made)
    return made


def _chosen_before(draft: pathlib.Path, whole: pathlib.Path) -> dict[str, Any] | None:
    """Where this very draft stops as `experiments.stopping` chose, for a run that ends again."""
    if not draft.exists() or folders.digest(draft) != folders.digest(whole):
        return None
    found = (cards.read(draft) or {}).get("stopping", {})
    return found if "seed" in found else None


def _acceptance(config: Config, bundle: checkpoints.Bundle) -> dict[str, Any]:
    """Greedy acceptance by group of prompts, at the draft length, without a line to stop at."""
    asked = acceptance.greedily(
        bundle,
        config.draft,
        config.draft_length,
        config.prompts,
        pathlib.Path(config.folder),
        seed=config.seed,
    )
    found = acceptance.run(asked, bundle)
    kept = ("max_new_tokens", "temperature", "longest_prompt", "left_out", "groups")
    return {"draft_length": config.draft_length, **{name: found[name] for name in kept}}


def _card(
    config: Config,
    bundle: checkpoints.Bundle,
    held: list[shards.Shard],
    shape: shapes.Shape,
    trained: distill_stages.Trained,
    data_seconds: float,
) -> dict[str, Any]:
    """What a user of the draft should know of it."""
    tokens = np.asarray(trained.frozen["tokens"])
    unseen = [shard.text(row)[1] for shard in held for row in shard.rows(unseen=True)]
    return {
        "target": bundle.name,
        "seed": config.seed,
        "shape": dataclasses.asdict(shape),
        "data": {
            **dataclasses.asdict(data.effective(config.texts)),
            "answer_tokens": sum(shard.answer_tokens for shard in held),
            "conversations": sum(map(len, held)),
            "held_out_conversations": len(unseen),
            "minutes": data_seconds / 60,
        },
        "training": {
            **dataclasses.asdict(config.schedule),
            "optimizer": config.optimizer,
            "batch_tokens": config.batch_tokens,
            "loss": repr(trained.objective.loss)
            if config.loss == "jensen_shannon"
            else config.loss,
            "features": config.features_weight(shape),
            "copying": config.copying_weight(shape.num_layers),
            "copying_steps": distill_stages.copying_steps(config, shape.num_layers),
            "accepted": config.accepted,
            "on_policy": config.on_policy,
            "start_from": config.start_from,
            "start_from_sha256": folders.digest(config.start_from),
            "epochs": trained.epochs,
            "minutes": trained.seconds / 60,
        },
        "coverage": float(np.mean(np.isin(np.concatenate(unseen), tokens))),
        "held_out": dict(trained.held_out),
        "bytes": config.draft.stat().st_size,
        "versions": binary.versions(),
    }
