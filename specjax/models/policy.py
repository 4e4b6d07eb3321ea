"""How a forward pass is laid out for a backend: other programs, the same arithmetic.

What wins depends on the compiler more than on the model, so the choices are gathered here, as one
small value that `transformer.language_model` takes. `BUILD.md` keeps what was measured, and what
was tried and lost.
"""

import dataclasses
import os

import jax

from specjax import native

__all__ = ["Policy", "for_backend", "for_training"]


@dataclasses.dataclass(frozen=True)
class Policy:
    """Choices of a forward pass; hashable, so that equal policies share compiled programs.

    Attributes:
      native: float32 products, attention and norms by `specjax.native`, which reads weights and
        cache once, at the speed of memory, and gives a token the same logits to the last bit
        whatever passes beside it; for one CPU device. What follows is for XLA's own.
      rounded: float32 products by a CPU that multiplies bfloat16, whatever `native` says of them:
        factors are rounded to it, sums are float32, as TPUs multiply by default; for training,
        which is then up to twice as fast, and the text for it. Derivatives are those of reverse
        mode only.
      vector_parts: a product with one token is made in so many parts side by side, or as many of
        them as divide the kernel's rows. The CPU backend multiplies a matrix by a vector on one
        core, and a batch of them on all.
      shortest_prefix: attention reads a prefix of the cache's slots, this many or twice, four, …
        times as many, the least that holds all that is filled.

    Raises:
      ValueError: a number below 1.
    """

    native: bool = False
    rounded: bool = False
    vector_parts: int = 1
    shortest_prefix: int = 128

    def __post_init__(self):
        for name in ("vector_parts", "shortest_prefix"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")


def for_backend(backend: str | None = None) -> Policy:
    """The policy for a backend: `cpu`, `gpu` or `tpu`; None is JAX's default backend.

    Only the CPU's was measured; the others are laid out plainly.
    """
    backend = jax.default_backend() if backend is None else backend
    if backend == "cpu":
        cores = os.cpu_count() or 1
        # A sharded program would gather what a call from outside XLA needs.
        alone = jax.device_count() == 1
        return Policy(alone and native.available(), vector_parts=1 << (cores - 1).bit_length())
    return Policy()


def for_training() -> Policy:
    """The policy for passes over many tokens, forward and back, on JAX's default backend.

    XLA's own products have gradients, and are quick at many tokens; rounded ones are quicker.
    """
    return Policy(rounded=jax.device_count() == 1 and native.multiplies_bfloat16())
