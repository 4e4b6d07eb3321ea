"""A C++ handler as a JAX function, which transforms like the XLA function that it stands for."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from specjax.native import build

__all__ = ["available", "function", "multiplies_bfloat16"]


def available() -> bool:
    """Whether handlers can be called here: on the CPU, with a library that can be built."""
    return jax.default_backend() == "cpu" and build.usable()


def multiplies_bfloat16() -> bool:
    """Whether handlers can be called here that want a CPU which multiplies bfloat16."""
    return jax.default_backend() == "cpu" and build.multiplies_bfloat16()


def function(
    handler: str, results: Callable[..., Any], reference: Callable[..., Any]
) -> Callable[..., Any]:
    """The function that a handler computes.

    Args:
      handler: its symbol in the library.
      results: shapes of the results, from the arguments.
      reference: the same function in JAX. Derivatives, forward and backward, are its own; under
        `vmap`, and in programs lowered for other platforms, it takes the handler's place.

    Returns:
      A function of pytrees of arrays; it raises BuildError where the library cannot be built.
    """

    def on_cpu(*operands):
        name = build.target(handler)
        return jax.ffi.ffi_call(name, results(*operands))(*jax.tree.leaves(operands))

    # Jitted for those who call it outside a program: it is compiled once for a shape.
    @functools.partial(jax.jit, inline=True)
    def by_platform(*operands):
        return jax.lax.platform_dependent(*operands, cpu=on_cpu, default=reference)

    @jax.custom_batching.custom_vmap
    def call(*operands):
        return by_platform(*operands)

    @call.def_vmap
    def _(axis_size, in_batched, *operands):
        axes = jax.tree.map(lambda batched: 0 if batched else None, tuple(in_batched))
        made = jax.vmap(reference, axes, axis_size=axis_size)(*operands)
        return made, jax.tree.map(lambda _: True, made)

    @jax.custom_jvp
    def differentiable(*operands):
        return call(*operands)

    @differentiable.defjvp
    def _(primals, tangents):
        _, change = jax.jvp(reference, primals, tangents)
        return differentiable(*primals), change

    return differentiable
