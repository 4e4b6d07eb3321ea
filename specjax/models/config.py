"""Shapes and switches of a decoder-only transformer of the Llama line.

A configuration is a frozen dataclass of plain numbers, so it is hashable: two models loaded from
the same configuration share every compiled program, whatever their weights.
"""

import dataclasses

__all__ = ["RotaryScaling", "TransformerConfig"]


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
    """How rotary frequencies are stretched for contexts longer than those of pre-training.

    Attributes:
      kind: `linear` (Chen et al. 2023, arXiv 2306.15595), `llama3` (Llama 3.1, arXiv 2407.21783) or
        `yarn` (Peng et al. 2023, arXiv 2309.00071).
      factor: how many times longer the context has become.
      original_context: context length of pre-training, in tokens (`llama3`, `yarn`).
      low_frequency_factor, high_frequency_factor: the band that `llama3` interpolates.
      fast_rotations, slow_rotations: the band that `yarn` interpolates, in rotations (32 and 1 in
        the paper).
      attention_factor: multiplies cosines and sines (`yarn`); None computes it from `factor`.
    """

    kind: str
    factor: float
    original_context: int = 0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    fast_rotations: float = 32.0
    slow_rotations: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self):
        if self.kind not in ("linear", "llama3", "yarn"):
            raise ValueError(
                f"rotary scaling kind={self.kind!r} is not supported; "
                "known: 'linear', 'llama3', 'yarn'"
            )
        if not self.factor >= 1.0:
            raise ValueError(f"rotary scaling factor={self.factor} must be at least 1")
        if self.kind != "linear" and self.original_context < 1:
            raise ValueError(
                f"rotary scaling {self.kind!r} needs original_context >= 1, "
                f"got {self.original_context}"
            )


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """A Llama-line transformer: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    Attributes:
      vocab_size: V, rows of the embedding.
      hidden_size: H, width of the residual stream.
      intermediate_size: width of the feed-forward layer.
      num_layers: L.
      num_heads, num_kv_heads: query heads and key/value heads; the second divides the first.
      head_size: features a head; even, since rotary positions turn pairs.
      context_length: longest text in tokens, prompt and answer together.
      rotary_base: base of the rotary frequencies.
      rotary_scaling: None, or how the frequencies are stretched.
      norm_epsilon: added to the mean square in RMSNorm.
      tied_embeddings: the head is the embedding's transpose.
      head_rows: rows of an untied head that speaks of a part of the vocabulary only (see
        `reduced_vocabulary`); None has one for every token.
      qkv_bias, output_bias, ffn_bias: which projections carry a bias.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    context_length: int
    rotary_base: float = 10000.0
    rotary_scaling: RotaryScaling | None = None
    norm_epsilon: float = 1e-5
    tied_embeddings: bool = True
    head_rows: int | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    ffn_bias: bool = False

    def __post_init__(self):
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_size",
            "context_length",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_rows is not None and not (
            1 <= self.head_rows <= self.vocab_size and not self.tied_embeddings
        ):
            raise ValueError(
                f"head_rows={self.head_rows} must lie between 1 and vocab_size={self.vocab_size}, "
                f"of a head of its own (tied_embeddings={self.tied_embeddings})"
            )
        if self.head_size % 2:
            raise ValueError(f"head_size={self.head_size} must be even for rotary positions")
