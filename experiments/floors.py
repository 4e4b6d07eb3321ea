"""The least that a pass of a transformer must read and compute, and how long that takes at least.

A pass reads every weight once, however many tokens it holds, and what the cache has filled; it
multiplies every weight with every token. What the machine can read and compute is measured, so that
a floor is the machine's and the model's, not the program's.
"""

import dataclasses
import math

import jax

from specjax.models import config as configs
from specjax.models import transformer

__all__ = ["Machine", "cache_bytes", "flops", "parameters", "seconds", "weight_bytes"]


@dataclasses.dataclass(frozen=True)
class Machine:
    """What the machine can do: bytes read a second, and floating-point operations a second."""

    bytes_per_second: float
    flops_per_second: float


def parameters(config: configs.TransformerConfig) -> int:
    """Parameters that a pass reads whole: all, but for an embedding that is not the head too."""
    shapes = transformer.parameter_shapes(config)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    return count if config.tied_embeddings else count - config.vocab_size * config.hidden_size


def weight_bytes(config: configs.TransformerConfig, itemsize: int, laws: int | None = None) -> int:
    """Bytes of weights that a pass reads.

    Args:
      config: of the model.
      itemsize: bytes of a number.
      laws: for how many tokens logits are needed; for none the head is not read. None is all.
    """
    head = config.vocab_size * config.hidden_size if laws == 0 else 0
    return (parameters(config) - head) * itemsize


def cache_bytes(config: configs.TransformerConfig, fill: int, itemsize: int) -> int:
    """Bytes of keys and values of `fill` committed tokens in one row."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_size * fill * itemsize


def flops(
    config: configs.TransformerConfig, tokens: int, fill: int, laws: int | None = None
) -> int:
    """Floating-point operations of a pass over a chain, two for every product of the sums.

    Args:
      config: of the model.
      tokens: T, new tokens in one row.
      fill: committed tokens before them.
      laws: of how many of them the logits are needed; None is all.
    """
    head = config.vocab_size * config.hidden_size
    body = parameters(config) - head
    # Token t of the chain sees the committed ones, those before it, and itself; for each it takes
    # a product with its key and one with its value.
    seen = tokens * fill + tokens * (tokens + 1) // 2
    attention = 4 * config.num_layers * config.num_heads * config.head_size * seen
    return 2 * (body * tokens + head * (tokens if laws is None else laws)) + attention


def seconds(bytes_read: float, operations: float, machine: Machine) -> float:
    """The longer of reading and computing, done side by side."""
    return max(bytes_read / machine.bytes_per_second, operations / machine.flops_per_second)
