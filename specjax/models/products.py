"""Products of tokens with kernels, in the form that a backend is quick at."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from specjax import native
from specjax.models import policy as policies

__all__ = ["products"]


def products(
    hidden: jax.Array,
    kernels: Sequence[jax.Array],
    policy: policies.Policy,
    dtype: jax.typing.DTypeLike | None = None,
) -> tuple[jax.Array, ...]:
    """hidden[B, T, in] times every kernel[out, in]: a tuple of [B, T, out].

    In `dtype`, which the sums are made in and never rounded below; by default that of the factors.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    is_float32 = all(factor.dtype == jnp.float32 for factor in (rows, *kernels))
    if policy.rounded and is_float32:
        made = [_rounded(rows, kernel) for kernel in kernels]
    elif policy.native and is_float32:
        made = _native(rows, tuple(kernels))
    elif rows.shape[0] == 1:
        made = [_times_vector(kernel, rows, policy.vector_parts, dtype) for kernel in kernels]
    else:
        made = _by_xla(rows, tuple(kernels), dtype)
    return tuple(product.reshape(*hidden.shape[:2], product.shape[-1]) for product in made)


def _times_vector(kernel: jax.Array, row: jax.Array, vector_parts: int, dtype) -> jax.Array:
    """kernel[out, in] times row[1, in], in parts of the kernel side by side: [1, out]."""
    outputs, inputs = kernel.shape
    parts = math.gcd(outputs, vector_parts)
    split = kernel.reshape(parts, outputs // parts, inputs)
    rows = jnp.broadcast_to(row, (parts, inputs))
    return jnp.einsum("poi,pi->po", split, rows, preferred_element_type=dtype).reshape(1, -1)


def _by_xla(rows, kernels, dtype=None):
    return tuple(jnp.matmul(rows, kernel.T, preferred_element_type=dtype) for kernel in kernels)


def _results(rows, kernels):
    return tuple(
        jax.ShapeDtypeStruct((rows.shape[0], kernel.shape[0]), rows.dtype) for kernel in kernels
    )


_native = native.function("products", _results, _by_xla)


def _of_rounded(handler: str, left_axis: int, right_axis: int):
    """A product over these axes of two matrices: factors in bfloat16, sums in float32."""

    def product(left, right):
        factors = (left.astype(jnp.bfloat16), right.astype(jnp.bfloat16))
        over = (((left_axis,), (right_axis,)), ((), ()))
        return jax.lax.dot_general(*factors, over, preferred_element_type=jnp.float32)

    return native.function(handler, functools.partial(jax.eval_shape, product), product)


_times_transposed = _of_rounded("times_transposed", 1, 1)
_times = _of_rounded("times", 1, 0)
_transposed_times = _of_rounded("transposed_times", 0, 0)


@jax.custom_vjp
def _rounded(rows: jax.Array, kernel: jax.Array) -> jax.Array:
    """rows[n, in] times kernel[out, in]; the gradients' products are made alike."""
    return _times_transposed(rows, kernel)


_rounded.defvjp(
    lambda rows, kernel: (_rounded(rows, kernel), (rows, kernel)),
    lambda kept, change: (_times(change, kept[1]), _transposed_times(change, kept[0])),
)
