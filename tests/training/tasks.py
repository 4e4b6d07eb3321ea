"""A small target with a tokenizer, its data, and an objective whose optimum is known."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp

from experiments import targets
from specjax import checkpoints
from specjax.training import data, distillation, shapes, shards

SETTINGS = data.Settings(
    domains=("passage", "user_turn", "open", "code", "editing"),
    batch=8,
    max_new_tokens=24,
    taps=(targets.TINY.num_layers,),
    top=4,
    is_rounded=False,
)
SHAPE = shapes.Shape((0, 3), 96, 120)
OWN = shapes.Shape(shapes.Own(2, 32), 40, 120)
WIDER = shapes.Shape(shapes.Own(1, 96), 40, 120)
SHAPES = {"layers": SHAPE, "own": OWN, "wider": WIDER}


@functools.cache
def bundle() -> checkpoints.Bundle:
    return targets.tiny()


def make(folder: pathlib.Path, tokens: int = 600, **changes) -> list[shards.Shard]:
    return data.generate(bundle(), folder, tokens, dataclasses.replace(SETTINGS, **changes))


def begun(tokens, shape=SHAPE, **options):
    """A draft of the tiny target before any training: objective, params, frozen."""
    params, frozen = shapes.begin(bundle(), shape, tokens, jax.random.key(1))
    objective = distillation.Distillation(shapes.configure(bundle().config, shape), **options)
    return objective, params, frozen


def least_squares(params, frozen, batch, key):
    """Least squares, with a number that hangs on the key; examples are rows."""
    off = jnp.sum((batch["x"] @ params["w"].T + params["b"][None] - batch["y"]) ** 2, axis=1)
    drawn = jax.random.uniform(key, off.shape, off.dtype)
    total = jnp.sum(off * frozen["weight"].astype(off.dtype))
    return total, jnp.float32(off.shape[0]), {"drawn": jnp.sum(drawn)}


regression = jax.tree_util.Partial(least_squares)
