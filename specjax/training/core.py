"""The training core: one compiled step that any trainer of drafts and heads builds on.

An objective says what is minimised; everything else is here. Numbers that a user would sweep
(rates, clipping, decay) are traced, so a sweep compiles once.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from specjax import types
from specjax.training import muon

__all__ = ["ADAM", "MUON", "Objective", "Schedule", "TrainState", "init", "place", "step"]

Objective = Callable[[Any, Any, Any, jax.Array], tuple[jax.Array, jax.Array, dict[str, jax.Array]]]
"""`(params, frozen, batch, key) -> (sum, weight, sums)`: a sum over the batch's examples, how many
there were, and sums of other numbers to report. A pytree, so that numbers in it are traced: a bare
function goes in as `jax.tree_util.Partial(function)`."""

ADAM = optax.scale_by_adam(b1=0.9, b2=0.95)
"""Adam (Kingma and Ba 2015, arXiv 1412.6980)."""

MUON = muon.muon(optax.chain(ADAM, optax.scale(0.3)))
"""Muon for matrices, Adam with smaller steps for the rest."""


@struct.dataclass
class TrainState:
    """What training changes, and what a checkpoint holds.

    Attributes:
      step: int32[], updates made.
      params: what is trained, float32.
      average: exponential moving average of `params`, which is what to decode with.
      optimizer: its moments.
    """

    step: jax.Array
    params: Any
    average: Any
    optimizer: Any


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How far and how carefully to step.

    Attributes:
      steps: updates in all.
      rate: highest learning rate.
      warmup: updates over which it rises from 0; after them it falls as a cosine.
      last: the rate at the end, as a part of the highest.
      clip: the longest gradient; longer ones are shortened to it.
      decay: decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101), of matrices.
      average: decay of the moving average; early updates average over what there is.

    Raises:
      ValueError: a number out of range, named.
    """

    steps: int
    rate: float = 1e-3
    warmup: int = 100
    last: float = 0.02
    clip: float = 1.0
    decay: float = 0.01
    average: float = 0.998

    def __post_init__(self):
        types.whole("steps", self.steps, 1)
        types.whole("warmup", self.warmup, 0)
        for name, least, most in (
            ("rate", 0, float("inf")),
            ("last", 0, 1),
            ("clip", 0, float("inf")),
            ("decay", 0, 1),
            ("average", 0, 1),
        ):
            value = getattr(self, name)
            if not least <= value <= most:
                raise ValueError(f"{name}={value} must lie between {least} and {most}")

    def at(self, step: int) -> dict[str, jax.Array]:
        """The numbers of one update, float32[] each."""
        warmup = min(self.warmup, self.steps - 1)
        curve = optax.warmup_cosine_decay_schedule(
            self.rate / max(warmup, 1), self.rate, warmup, self.steps, self.rate * self.last
        )
        numbers = {
            "rate": curve(step),
            "clip": self.clip,
            "decay": self.decay,
            "average": min(self.average, (1 + step) / (10 + step)),
        }
        return {name: jnp.asarray(value, jnp.float32) for name, value in numbers.items()}


def init(params: Any, optimizer: optax.GradientTransformation = ADAM) -> TrainState:
    """The state before the first update; `params` is copied, since steps donate their state."""
    params = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        average=jax.tree.map(jnp.copy, params),
        optimizer=optimizer.init(params),
    )


@functools.partial(
    jax.jit, static_argnames=("parts", "dtype", "optimizer"), donate_argnames=("state",)
)
def step(
    state: TrainState,
    frozen: Any,
    batch: Any,
    key: jax.Array,
    numbers: dict[str, jax.Array],
    objective: Objective,
    parts: int = 1,
    dtype: str = "float32",
    optimizer: optax.GradientTransformation = ADAM,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update; a state whose loss or gradient is not finite comes back unchanged.

    Args:
      state: consumed.
      frozen: weights that the objective reads and nothing changes.
      batch: pytree of arrays [B, …].
      key: a typed key, folded with the step's number; not consumed.
      numbers: `Schedule.at` of the step.
      objective: what is minimised: its sum over the batch divided by its weight.
      parts: the batch's rows are gone through in so many parts, whose gradients add up; the same
        up to rounding, in less memory.
      dtype: in which the objective computes; weights and moments stay float32.
      optimizer: `ADAM` or `MUON`, that of `init`; static.

    Returns:
      The state and what to report, float32[]: `loss`, `gradient_norm`, `rate`, `finite` (1 or 0)
      and the objective's own means.

    Raises:
      ValueError: rows that do not divide into `parts`.
    """
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % parts:
        raise ValueError(f"a batch of {rows} rows does not divide into parts={parts}")
    key = jax.random.fold_in(key, state.step)

    def total(params, part, key):
        cast = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        value, weight, sums = objective(cast, frozen, part, key)
        return value.astype(jnp.float32), (weight, sums)

    differentiate = jax.value_and_grad(total, has_aux=True)
    if parts == 1:
        summed = differentiate(state.params, batch, key)
    else:
        split = jax.tree.map(lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:]), batch)

        def add(carry, turn):
            part, number = turn
            made = differentiate(state.params, part, jax.random.fold_in(key, number))
            return jax.tree.map(jnp.add, carry, made), None

        part = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), split)
        struct_of_key = jax.ShapeDtypeStruct(key.shape, key.dtype)
        shapes = jax.eval_shape(differentiate, state.params, part, struct_of_key)
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        summed, _ = jax.lax.scan(add, nothing, (split, jnp.arange(parts, dtype=jnp.int32)))
    (value, (weight, sums)), gradient = summed
    weight = jnp.maximum(weight.astype(jnp.float32), 1.0)
    gradient = jax.tree.map(lambda leaf: leaf / weight, gradient)
    norm = optax.tree.norm(gradient)
    shorter = jnp.minimum(1.0, numbers["clip"] / jnp.maximum(norm, 1e-12))
    # optax raises floats to whole numbers, which JAX's strict promotion refuses.
    with jax.numpy_dtype_promotion("standard"):
        updates, moments = optimizer.update(
            jax.tree.map(lambda leaf: leaf * shorter, gradient), state.optimizer, state.params
        )

    def move(leaf, update):
        # Norms and biases are not drawn to 0.
        decay = numbers["decay"] if leaf.ndim > 1 else 0.0
        return leaf - numbers["rate"] * (update + decay * leaf)

    params = jax.tree.map(move, state.params, updates)
    keep = numbers["average"]
    average = jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, state.average, params)
    loss = value / weight
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    made = TrainState(state.step + 1, params, average, moments)
    state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), made, state)
    report = {name: part.astype(jnp.float32) / weight for name, part in sums.items()}
    report |= {
        "loss": loss,
        "gradient_norm": norm,
        "rate": numbers["rate"],
        "finite": finite.astype(jnp.float32),
    }
    return state, report


def place(tree: Any, mesh: jax.sharding.Mesh, *, rows: bool) -> Any:
    """Puts a pytree on a mesh with an axis `data`: rows shared out, or everything everywhere.

    Steps on what was placed so are data parallel: each device goes through its rows, and the
    gradients are summed.

    Raises:
      ValueError: rows that do not divide among the devices.
    """
    spec = jax.sharding.PartitionSpec("data") if rows else jax.sharding.PartitionSpec()
    if rows:
        count = jax.tree.leaves(tree)[0].shape[0]
        if count % mesh.shape["data"]:
            raise ValueError(
                f"a batch of {count} rows does not divide among {mesh.shape['data']} devices"
            )
    return jax.device_put(tree, jax.sharding.NamedSharding(mesh, spec))
