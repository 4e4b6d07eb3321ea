"""The parts that `experiments.profile` measures, each a method that returns its figures.

Figures are ready for JSON: seconds as medians with the least and the most, ratios of medians of one
alternation, and what a pass must read and compute beside what it took.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments import compilation, floors, loop_program, measure
from specjax import checkpoints, decoding, trees, types

__all__ = ["QUICK", "Config", "Job"]

# Eight nodes besides the root, as a chain and as a tree of depth 2.
_SHAPES = {"one token": None, "chain of 8": trees.chain(8), "tree of 8": trees.branching((2, 3))}
_LAWS = {
    "greedy": types.Sampling(),
    "temperature 0.8, top-p 0.9": types.Sampling(temperature=0.8, top_p=0.9),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """One run, as the flags give it.

    Attributes:
      model, draft: checkpoints, as `specjax.load` and `methods.Settings` take them.
      draft_length: K.
      prompt_length: tokens of the prompt.
      prompts: prompt lengths for prefill.
      widths, capacities, fills: of the passes.
      new_tokens: how long the loops run.
      repeats: timed rounds.
      read_bytes, matmul_side: sizes that the machine is measured at.
    """

    model: str = "smollm2-135m"
    draft: str = "layers:12"
    draft_length: int = 8
    prompt_length: int = 128
    prompts: tuple[int, ...] = (128, 512)
    widths: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    capacities: tuple[int, ...] = (256, 1024, 2048, 8192)
    fills: tuple[int, ...] = (128, 512, 2000)
    new_tokens: int = 64
    repeats: int = 7
    read_bytes: int = 540_000_000
    matmul_side: int = 2048

    def __post_init__(self):
        for name in ("widths", "capacities", "fills"):
            if not getattr(self, name) or min(getattr(self, name)) < 1:
                raise ValueError(f"--{name}={getattr(self, name)} must be whole and at least 1")
        for name, least in (("repeats", 1), ("draft_length", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name}={getattr(self, name)} must be at least {least}")
        if self.prompt_length <= self.draft_length:
            raise ValueError(
                f"--prompt_length={self.prompt_length} must be more than the draft length "
                f"{self.draft_length}"
            )
        if not any(
            self.fits(capacity, fill) for capacity in self.capacities for fill in self.fills
        ):
            raise ValueError(
                f"no fill of --fills={self.fills} fits a capacity of --capacities="
                f"{self.capacities} with a draft of 8"
            )

    @staticmethod
    def fits(capacity: int, fill: int) -> bool:
        """Whether a cache has room for the widest of `_SHAPES` after `fill` tokens."""
        return fill + 9 <= capacity


QUICK = Config(
    prompt_length=24,
    prompts=(24,),
    widths=(1, 2, 8),
    capacities=(64, 128),
    fills=(24, 64),
    new_tokens=8,
    repeats=2,
    read_bytes=16_000_000,
    matmul_side=256,
)


class Job:
    """The parts of the report, of one target, drafter and configuration."""

    def __init__(
        self,
        config: Config,
        bundle: checkpoints.Bundle,
        lookup: types.Drafter,
        draft: types.Drafter,
    ):
        self.config, self.transformer, self.target = config, bundle.config, bundle.target
        self.drafters = {"prompt_lookup": lookup, "model": draft}
        self.dtype = jnp.dtype(jax.tree.leaves(bundle.target.params)[0].dtype)
        self.prompt = measure.copying_prompt(bundle.config.vocab_size, config.prompt_length)
        self.expect: Callable[[float], None] = lambda seconds: None
        self.limits = floors.Machine(1.0, 1.0)

    def time(self, variants: dict[Any, measure.Variant]) -> dict[Any, measure.Seconds]:
        return measure.interleave(variants, self.config.repeats, self.expect)

    def floor(self, tokens: int, fill: int, laws: int | None = None) -> dict[str, float]:
        """What a pass must read and compute, and the seconds that takes at least."""
        size = self.dtype.itemsize
        read = floors.weight_bytes(self.transformer, size, laws)
        read += floors.cache_bytes(self.transformer, fill, size)
        operations = floors.flops(self.transformer, tokens, fill, laws)
        return {
            "bytes": read,
            "flops": operations,
            "floor_seconds": floors.seconds(read, operations, self.limits),
        }

    def machine(self) -> dict[str, Any]:
        config = self.config
        forms = measure.bandwidth_forms(config.read_bytes)
        times = self.time({**forms, "matmul": measure.matmul(config.matmul_side)})
        operations = 2 * config.matmul_side**3
        matmul = times.pop("matmul")
        best = min(times, key=lambda name: times[name].median)
        rates = {name: _rate(measure.read_size(config.read_bytes), t) for name, t in times.items()}
        # The least that anything takes follows from the most that was ever reached.
        self.limits = floors.Machine(rates[best]["max"], _rate(operations, matmul)["max"])
        return {
            "bytes_per_second": rates[best],
            "best_form": best,
            "forms": rates,
            "flops_per_second": _rate(operations, matmul),
        }

    def width(self) -> dict[str, Any]:
        fill, widest = self.config.prompt_length, max(self.config.widths)
        capacity = min(
            (size for size in self.config.capacities if size >= fill + widest),
            default=fill + widest,
        )
        cache = self.target.init_cache(1, capacity)
        times = self.time(
            {
                count: measure.forward(self.target, count, fill, cache)
                for count in self.config.widths
            }
        )
        # A token may be had from a pass of any width.
        plain = min(seconds.median for seconds in times.values())
        passes = [
            {
                "tokens": count,
                "seconds": dataclasses.asdict(seconds),
                "plain_steps": seconds.median / plain,
                **self.floor(count, fill),
            }
            for count, seconds in times.items()
        ]
        return {"capacity": capacity, "fill": fill, "passes": passes}

    def capacity(self) -> list[dict[str, Any]]:
        variants = {}
        for capacity in self.config.capacities:
            cache = self.target.init_cache(1, capacity)
            for fill in self.config.fills:
                if self.config.fits(capacity, fill):
                    for shape, tree in _SHAPES.items():
                        count = 1 if tree is None else tree.size + 1
                        pass_ = measure.forward(self.target, count, fill, cache, tree)
                        variants[capacity, fill, shape] = pass_
        times = self.time(variants)
        rows = []
        for (capacity, fill, shape), seconds in times.items():
            first = next(key for key in times if key[2] == shape)
            rows.append(
                {
                    "capacity": capacity,
                    "fill": fill,
                    "shape": shape,
                    "seconds": dataclasses.asdict(seconds),
                    "ratio_to_first": seconds.median / times[first].median,
                }
            )
        return rows

    def drafting(self) -> dict[str, Any]:
        fill = self.config.prompt_length
        capacity = fill + self.config.draft_length + 1
        draft_model = self.drafters["model"].params.model
        variants = {
            name: measure.forward(model, 1, fill, model.init_cache(1, capacity))
            for name, model in (("target step", self.target), ("draft step", draft_model))
        }
        for name, drafter in self.drafters.items():
            begun = measure.begin(self.target, drafter, self.prompt)
            variants[name] = measure.proposal(self.target, drafter, *begun)
        times = self.time(variants)
        step = times["target step"].median
        return {
            "draft_length": self.config.draft_length,
            "target_step_seconds": dataclasses.asdict(times["target step"]),
            "draft_step_seconds": dataclasses.asdict(times["draft step"]),
            "draft_step_in_target_steps": times["draft step"].median / step,
            "proposals": {
                name: {
                    "seconds": dataclasses.asdict(times[name]),
                    "target_steps": times[name].median / step,
                }
                for name in self.drafters
            },
        }

    def verification(self) -> dict[str, Any]:
        length = self.config.draft_length
        fill = self.config.prompt_length
        cache = self.target.init_cache(1, fill + length + 1)
        variants: dict[Any, measure.Variant] = {
            "pass": measure.forward(self.target, length + 1, fill, cache)
        }
        for law, sampling in _LAWS.items():
            made = measure.verifications(self.target, self.prompt, length, sampling)
            variants |= {(law, rule): variant for rule, variant in made.items()}
        times = self.time(variants)
        whole = times.pop("pass")
        return {
            "nodes": length + 1,
            "pass_seconds": dataclasses.asdict(whole),
            "rules": [
                {
                    "law": law,
                    "rule": rule,
                    "seconds": dataclasses.asdict(seconds),
                    "passes": seconds.median / whole.median,
                }
                for (law, rule), seconds in times.items()
            ],
        }

    def loop(self) -> dict[str, Any]:
        chosen = {"plain": decoding.NOTHING, "prompt_lookup": self.drafters["prompt_lookup"]}
        return {
            name: measure.loop(
                self.target,
                drafter,
                self.prompt,
                self.config.new_tokens,
                self.config.repeats,
                self.expect,
            )
            for name, drafter in chosen.items()
        }

    def prefill(self) -> list[dict[str, Any]]:
        lookup = self.drafters["prompt_lookup"]
        variants = {}
        for length in self.config.prompts:
            prompt = measure.copying_prompt(self.target.vocab_size, length)
            for steps in (0, 1):
                variants[length, steps] = measure.first_token(self.target, lookup, prompt, steps)
        times = self.time(variants)
        rows = []
        for length in self.config.prompts:
            seconds = times[length, 0]
            # The last token is left to the first step, and prefill needs no logits.
            floor = self.floor(length - 1, 0, laws=0)
            rows.append(
                {
                    "tokens": length,
                    "seconds": dataclasses.asdict(seconds),
                    "seconds_per_token": seconds.median / length,
                    "first_token_seconds": dataclasses.asdict(times[length, 1]),
                    **floor,
                }
            )
        return rows

    def program(self) -> dict[str, Any]:
        with compilation.without_kept_programs():
            return loop_program.start(self.target, self.drafters["prompt_lookup"], self.prompt)


def _rate(amount: float, seconds: measure.Seconds) -> dict[str, float]:
    """Amount a second: median, and the extremes in ascending order."""
    return {
        "median": amount / seconds.median,
        "min": amount / seconds.max,
        "max": amount / seconds.min,
    }
