"""specjax: lossless parallel decoding of language models as pure, compiled JAX functions."""

from specjax import (
    analysis,
    checkpoints,
    decoding,
    drafters,
    models,
    sampling,
    trees,
    types,
    verification,
)
from specjax.checkpoints import load
from specjax.decoding import autoregressive, generate, stream
from specjax.types import Sampling

__all__ = [
    "Sampling",
    "analysis",
    "autoregressive",
    "checkpoints",
    "decoding",
    "drafters",
    "generate",
    "load",
    "models",
    "sampling",
    "stream",
    "trees",
    "types",
    "verification",
]
