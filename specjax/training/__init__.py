"""Training drafts: data from the target, losses, and the core that every trainer builds on."""

from specjax.training import (
    batches,
    core,
    curves,
    data,
    distillation,
    fitting,
    folders,
    held_out,
    losses,
    on_policy,
    prompts,
    recording,
    saving,
    shards,
    stopping,
    tuning,
)

__all__ = [
    "batches",
    "core",
    "curves",
    "data",
    "distillation",
    "fitting",
    "folders",
    "held_out",
    "losses",
    "on_policy",
    "prompts",
    "recording",
    "saving",
    "shards",
    "stopping",
    "tuning",
]
