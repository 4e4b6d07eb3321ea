"""What a distillation is told."""

import dataclasses
import pathlib
from typing import Any

import jax

from experiments import binary, cards
from specjax import models
from specjax.training import copying, core, data, distillation, losses, on_policy, shapes

__all__ = ["OPTIMIZERS", "Config", "texts"]

OPTIMIZERS = {"adam": core.ADAM, "muon": core.MUON}
_VOCABULARY = 8192
_RATES = {"adam": 3e-3, "muon": 1.5e-2}


@dataclasses.dataclass(frozen=True)
class Config:
    """One distillation; a field that is None is left to the target.

    Attributes:
      folder: where data, checkpoints and the draft go.
      tokens: answer tokens that the target writes.
      data_minutes: time for them; what would take more is refused.
      texts: what the target writes; its taps become those of `taps` and the final norm.
      layers: the target's layers that the draft's begin as, by default the first and the last, or
        sizes of its own.
      feed_forward, vocabulary: the draft's other sizes; by default the target's (of a width of its
        own, in proportion and in whole heads), and 8,192 tokens.
      candidates: shapes to choose among instead.
      choice_steps: updates that each of them gets.
      batch_tokens: tokens an update, with padding.
      rate: the highest; by default the optimizer's own.
      features: weight of the distance of hidden states, 0.5 by default; drafts of layers of their
        own have none.
      copying: weight of the lessons in copying; by default 0.1 for new drafts of two layers or
        more, 0 for those of one, which cannot copy, and what its card says for a draft to go on
        from.
      copying_steps: updates on such lessons alone, before all others, of a new draft.
      accepted: weight of the negative expected accepted length, on answers drawn at temperature 1.
      on_policy: share of the updates that are on the draft's own text.
      start_from: a draft to go on from.
      devices: how many share a batch's rows.
      draft_length: K that acceptance and costs are measured for.
      out: the draft's file; by default draft.safetensors in the folder.
      prompts: files of prompts, as `acceptance` reads them, to measure the finished draft on.
      export: a folder for other libraries' assistant models, or None for none.
      The others: as `core` and `distillation` take them.
    """

    folder: str
    tokens: int = 700_000
    data_minutes: float = 120.0
    texts: data.Settings = data.Settings()
    taps: tuple[int, ...] = ()
    layers: tuple[int, ...] | shapes.Own | None = None
    feed_forward: int | None = None
    vocabulary: int | None = None
    candidates: tuple[shapes.Shape, ...] = ()
    choice_steps: int = 200
    steps: int = 2500
    rate: float | None = None
    optimizer: str = "muon"
    batch_tokens: int = 4096
    parts: int = 1
    loss: str = "forward_kl"
    beta: float = 0.5
    features: float | None = None
    copying: float | None = None
    copying_steps: int = 200
    accepted: float = 0.0
    on_policy: float = 0.0
    start_from: str | None = None
    dtype: str = "float32"
    devices: int = 1
    draft_length: int = 5
    seed: int = 0
    out: str | None = None
    prompts: tuple[str, ...] = ()
    export: str | None = None

    def __post_init__(self):
        if self.loss not in losses.LOSSES:
            raise ValueError(f"--loss={self.loss}: known are {', '.join(losses.LOSSES)}")
        losses.JensenShannon(self.beta)
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"--optimizer={self.optimizer}: known are {', '.join(OPTIMIZERS)}")
        if self.accepted and self.on_policy:
            raise ValueError(
                f"--accepted={self.accepted} counts text that the target wrote, and "
                f"--on_policy={self.on_policy} asks for the draft's own; leave one of them out"
            )
        for name in ("copying", "features"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"--{name}={getattr(self, name)} must be at least 0")
        kinds = (self.layers, *(shape.layers for shape in self.candidates))
        if self.features and any(isinstance(layers, shapes.Own) for layers in kinds):
            raise ValueError(
                f"--features={self.features} compares hidden states of one width, and a draft of "
                "layers of its own has another; leave it out"
            )
        for name in ("accepted", "on_policy"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name}={getattr(self, name)} must lie between 0 and 1")
        try:
            on_policy.check_share(self.on_policy)
        except ValueError as error:
            raise ValueError(f"--on_policy={self.on_policy}: {error}") from error
        if not 1 <= self.devices <= len(jax.devices()):
            raise ValueError(f"--devices={self.devices}, and there are {len(jax.devices())}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"--dtype={self.dtype} must be float32 or bfloat16")
        for name in (
            *("tokens", "choice_steps", "copying_steps", "steps", "batch_tokens", "parts"),
            "draft_length",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)} must be at least 1")

    def of(self, config: models.TransformerConfig) -> "Config":
        """With what was left to the target filled in."""
        taps = tuple(sorted({*self.taps, config.num_layers}))
        feed_forward = config.intermediate_size
        if isinstance(self.layers, shapes.Own):
            heads = round(
                feed_forward * self.layers.hidden_size / config.hidden_size / config.head_size
            )
            feed_forward = max(heads, 1) * config.head_size
        return dataclasses.replace(
            self,
            rate=_RATES[self.optimizer] if self.rate is None else self.rate,
            texts=dataclasses.replace(self.texts, taps=taps),
            layers=self.layers or tuple(sorted({0, config.num_layers - 1})),
            feed_forward=feed_forward if self.feed_forward is None else self.feed_forward,
            vocabulary=min(_VOCABULARY, config.vocab_size)
            if self.vocabulary is None
            else self.vocabulary,
        )

    @property
    def shape(self) -> shapes.Shape:
        """The draft's sizes, where no candidates are to be chosen among."""
        assert self.layers is not None and self.feed_forward is not None
        assert self.vocabulary is not None
        return shapes.Shape(self.layers, self.feed_forward, self.vocabulary)

    @property
    def schedule(self) -> core.Schedule:
        """Rates, and how many updates."""
        assert self.rate is not None
        return core.Schedule(self.steps, self.rate)

    @property
    def draft(self) -> pathlib.Path:
        """The draft's file."""
        return pathlib.Path(self.out or pathlib.Path(self.folder) / "draft.safetensors")

    def features_weight(self, shape: shapes.Shape) -> float:
        """Of the distance of hidden states, for a draft of this shape."""
        if isinstance(shape.layers, shapes.Own):
            return 0.0
        return 0.5 if self.features is None else self.features

    def objective(
        self, target: models.TransformerConfig, shape: shapes.Shape
    ) -> distillation.Distillation:
        """What a draft of this shape minimises."""
        loss = losses.LOSSES[self.loss]
        if self.loss == "jensen_shannon":
            loss = losses.JensenShannon(self.beta)
        length = self.draft_length if self.accepted else 0
        draft, features = shapes.configure(target, shape), self.features_weight(shape)
        return distillation.Distillation(draft, loss, features, length, share=self.accepted)

    def copying_weight(self, layers: int) -> float:
        """Of the lessons in copying, for a draft of so many layers."""
        if self.copying is None:
            if layers < 2 or self.start_from is None:
                return 0.1 if layers > 1 else 0.0
            # What was learnt so is forgotten without.
            made = cards.read(self.start_from) or {}
            return made.get("training", {}).get("copying", 0.0)
        if self.copying and layers < 2:
            raise ValueError(f"--copying={self.copying} needs a draft of two layers, not one")
        return self.copying

    def lessons(self, objective: distillation.Distillation) -> core.Objective:
        """The objective with lessons in copying, where there are to be any."""
        weight = self.copying_weight(objective.config.num_layers)
        if not weight:
            return objective
        return copying.Copying(objective, objective.config, weight, size=self.lesson)

    @property
    def lesson(self) -> int:
        """Tokens of a text to learn copying from."""
        return min(copying.Copying.size, self.batch_tokens)


def texts(domains: tuple[str, ...] = data.GENERIC, **others: Any) -> data.Settings:
    """What the target is to write, as the flags say.

    Args:
      domains: where the flags name none.
      **others: of `Settings`.
    """
    return data.Settings(
        seed=binary.SEED.value,
        domains=tuple(binary.given(binary.DOMAINS, domains)),
        batch=binary.given(binary.BATCH, data.Settings.batch),
        max_new_tokens=binary.given(binary.MAX_NEW_TOKENS, data.Settings.max_new_tokens),
        **others,
    )
