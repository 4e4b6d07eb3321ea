"""Reading a GGUF file: weights (often quantized), configuration, tokenizer and chat template.

Quantized blocks are expanded with the `gguf` library to the exact numbers they stand for. The
format is described in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import jax.typing
import numpy as np

from specjax.checkpoints import assembly, optional
from specjax.models import config as configs

__all__ = ["read"]

_TOP_NAMES = {"embed": "token_embd", "norm": "output_norm", "head": "output"}
_LAYER_NAMES = {
    "attention_norm": "attn_norm",
    "attention.query": "attn_q",
    "attention.key": "attn_k",
    "attention.value": "attn_v",
    "attention.output": "attn_output",
    "ffn_norm": "ffn_norm",
    "ffn.gate": "ffn_gate",
    "ffn.up": "ffn_up",
    "ffn.down": "ffn_down",
}
_FREQUENCIES = "rope_freqs.weight"
# Numbers expanded at a time: enough to outweigh the steps between, few enough to stay in a cache.
_PIECE = 1 << 18
_SCALING_KEYS = ("type", "factor", "original_context_length", "finetuned", "attn_factor")
_SCALING_KEYS += ("yarn_beta_fast", "yarn_beta_slow")


def read(
    path: str | os.PathLike[str], dtype: jax.typing.DTypeLike = jnp.float32
) -> tuple[configs.TransformerConfig, dict[Any, Any], dict[str, Any]]:
    """Reads a GGUF file of architecture `llama`.

    Args:
      path: the file.
      dtype: floating dtype of the parameters, whatever the file's quantization.

    Returns:
      The configuration; the parameters, the nested dict of `transformer.parameter_shapes`, with the
      rows of query and key in the half-split order of rotary positions; and the metadata as plain
      Python values under the file's own keys, `tokenizer.*` among them.

    Raises:
      ValueError: the file is absent, not GGUF, truncated or corrupt, of another architecture, asks
        for something the transformer does not do, or lacks, exceeds or misshapes a tensor.
      ImportError: the `gguf` library is not installed.
    """
    assembly.check_dtype(dtype)
    path = pathlib.Path(path)
    reader = _open(path)
    try:
        metadata = {
            key: field.contents()
            for key, field in reader.fields.items()
            if not key.startswith("GGUF.")
        }
    except (ValueError, IndexError, TypeError) as error:
        raise _unreadable(path, error) from error
    stored = {tensor.name: tensor for tensor in reader.tensors}
    try:
        config = _config(metadata, stored)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    dequantize = optional.require("gguf.quants").dequantize

    def values(name: str) -> np.ndarray:
        tensor = stored[name]
        try:
            array = _in_long_rows(dequantize, tensor)
        except NotImplementedError as error:
            raise ValueError(
                f"{path}: tensor {name!r} has type {tensor.tensor_type.name}, which the "
                "gguf library cannot expand; take a file of type F32, F16, BF16, Q8_0 or Q4_1"
            ) from error
        kind = name.split(".")[-2]
        array = _unpermute(array, heads[kind]) if kind in heads else array
        # An unquantized tensor is a view of the mapped file, which may be replaced after reading.
        return array.copy() if tensor.tensor_type.name == "F32" else array

    shapes = {
        name: tuple(int(n) for n in t.shape)[::-1]
        for name, t in stored.items()
        if name != _FREQUENCIES
    }
    params = assembly.assemble(config, _stored_name, shapes, values, dtype, str(path))
    return config, params, metadata


def _open(path: pathlib.Path) -> Any:
    library = optional.require("gguf")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    with path.open("rb") as file:
        start = file.read(24)
    if start[:4] != b"GGUF":
        pointer = (
            " (a Git LFS pointer: run git lfs pull)"
            if start.startswith(b"version https://git")
            else ""
        )
        raise ValueError(
            f"{path}: not a GGUF file; it starts with {start[:8]!r}, not b'GGUF'{pointer}"
        )

    class Reader(library.GGUFReader):
        # Slicing a memory map costs several times what slicing a plain view of it costs, and the
        # reader slices once for each of some 200 000 strings.
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value.view(np.ndarray) if name == "data" else value)

        # The library asks for sizes and byte orders anew each time; in the machine's own order
        # ("I") a slice is enough.
        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            if override_order is not None or self.byte_order != "I":
                return super()._get(offset, dtype, count, override_order)
            return self.data[offset : offset + np.dtype(dtype).itemsize * int(count)].view(dtype)

    try:
        # Lengths read from a corrupt header overflow before they are found to be wrong.
        with np.errstate(over="ignore"):
            return Reader(path)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise _unreadable(path, error) from error


def _in_long_rows(dequantize: Callable[..., np.ndarray], tensor: Any) -> np.ndarray:
    """What `dequantize` makes of a tensor, faster.

    The library takes 16 rows at a time, and for short rows most of the time goes into the steps
    between. Rows are whole blocks, one behind the other, so several may be given as one long one.
    """
    shape = tuple(int(n) for n in tensor.shape)[::-1]
    if len(shape) < 2:
        return dequantize(tensor.data, tensor.tensor_type)
    pieces = max(1, math.prod(shape) // _PIECE)
    rows = math.gcd(shape[0], 16 << (pieces - 1).bit_length())
    return dequantize(tensor.data.reshape(rows, -1), tensor.tensor_type).reshape(shape)


def _unreadable(path: pathlib.Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path}: truncated or corrupt GGUF file of {path.stat().st_size} bytes "
        f"({type(error).__name__}: {error}); fetch it again"
    )


def _stored_name(path: assembly.ParameterPath) -> str:
    leaf = "bias" if path[-1] == "bias" else "weight"
    if path[0] != "layers":
        return f"{_TOP_NAMES[str(path[0])]}.{leaf}"
    return f"blk.{path[1]}.{_LAYER_NAMES['.'.join(str(key) for key in path[2:-1])]}.{leaf}"


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Undoes the order of rows [out, ...] that interleaved rotary positions need."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _config(metadata: Mapping[str, Any], stored: Mapping[str, Any]) -> configs.TransformerConfig:
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ValueError(
            f"architecture {architecture!r} is not supported; specjax reads GGUF files of "
            "architecture 'llama'"
        )
    if _number(metadata, "split.count", 1) > 1:
        raise ValueError(
            f"one of {metadata['split.count']} parts; merge them first: llama-gguf-split --merge"
        )
    for key, harmless in (("llama.expert_count", 0), ("llama.attention.sliding_window", 0)):
        if _number(metadata, key, harmless) != harmless:
            raise ValueError(f"{key}={metadata[key]} is not supported; only {harmless} is")
    if "token_embd.weight" not in stored:
        raise ValueError("lacks tensor 'token_embd.weight'")
    hidden = int(_number(metadata, "llama.embedding_length"))
    heads = int(_number(metadata, "llama.attention.head_count"))
    if heads < 1:
        raise ValueError(f"llama.attention.head_count={heads} must be at least 1")
    head_size = int(_number(metadata, "llama.attention.key_length", hidden // heads))
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if _number(metadata, key, head_size) != head_size:
            raise ValueError(
                f"{key}={metadata[key]} differs from the head size {head_size}; "
                "partial rotary positions and unequal head sizes are not supported"
            )
    vocabulary = int(stored["token_embd.weight"].shape[-1])
    if _number(metadata, "llama.vocab_size", vocabulary) != vocabulary:
        raise ValueError(
            f"llama.vocab_size={metadata['llama.vocab_size']}, but tensor "
            f"'token_embd.weight' has {vocabulary} rows"
        )
    base = float(_number(metadata, "llama.rope.freq_base", 10000.0))
    return configs.TransformerConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=int(_number(metadata, "llama.feed_forward_length")),
        num_layers=int(_number(metadata, "llama.block_count")),
        num_heads=heads,
        num_kv_heads=int(_number(metadata, "llama.attention.head_count_kv", heads)),
        head_size=head_size,
        context_length=int(_number(metadata, "llama.context_length")),
        rotary_base=base,
        rotary_scaling=_rotary_scaling(metadata, stored, base, head_size),
        # The file stores a 32-bit float; its shortest decimal is the number that was meant.
        norm_epsilon=float(
            str(np.float32(_number(metadata, "llama.attention.layer_norm_rms_epsilon")))
        ),
        tied_embeddings="output.weight" not in stored,
        qkv_bias="blk.0.attn_q.bias" in stored,
        output_bias="blk.0.attn_output.bias" in stored,
        ffn_bias="blk.0.ffn_up.bias" in stored,
    )


def _number(metadata: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = metadata.get(key, default)
    if value is None:
        raise ValueError(f"metadata key {key!r} is missing; the file is incomplete")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key}={value!r} is not a single number, which is not supported")
    return value


def _rotary_scaling(
    metadata: Mapping[str, Any], stored: Mapping[str, Any], base: float, head_size: int
) -> configs.RotaryScaling | None:
    prefix = "llama.rope.scaling."
    keys = {key.removeprefix(prefix) for key in metadata if key.startswith(prefix)}
    if unknown := sorted(keys.difference(_SCALING_KEYS)):
        raise ValueError(f"{prefix}{unknown[0]} is not supported; known: {_SCALING_KEYS}")
    kind = metadata.get(prefix + "type", "none")
    factor = float(_number(metadata, prefix + "factor", 1.0))
    if kind == "none" and "llama.rope.scale_linear" in metadata:
        kind, factor = "linear", float(_number(metadata, "llama.rope.scale_linear"))
    if kind == "none":
        return _llama3_scaling(stored, base, head_size) if _FREQUENCIES in stored else None
    if _FREQUENCIES in stored:
        raise ValueError(
            f"tensor {_FREQUENCIES!r} together with {prefix}type={kind!r} is not supported"
        )
    if kind == "linear":
        return configs.RotaryScaling(kind="linear", factor=factor)
    if kind == "yarn":
        multiplier = float(_number(metadata, prefix + "attn_factor", 1.0))
        return configs.RotaryScaling(
            kind="yarn",
            factor=factor,
            original_context=int(_number(metadata, prefix + "original_context_length")),
            fast_rotations=float(_number(metadata, prefix + "yarn_beta_fast", 32.0)),
            slow_rotations=float(_number(metadata, prefix + "yarn_beta_slow", 1.0)),
            attention_factor=multiplier * (0.1 * math.log(max(factor, 1.0)) + 1.0),
        )
    raise ValueError(f"{prefix}type={kind!r} is not supported; known: 'none', 'linear', 'yarn'")


def _llama3_scaling(
    stored: Mapping[str, Any], base: float, head_size: int
) -> configs.RotaryScaling:
    """Recovers Llama 3.1's scaling, of which the file keeps only the divisor of every frequency."""
    tensor = stored[_FREQUENCIES]
    divisors = np.asarray(
        optional.require("gguf.quants").dequantize(tensor.data, tensor.tensor_type)
    )
    scaling = configs.RotaryScaling(
        kind="llama3", factor=max(1.0, float(divisors.max())), original_context=8192
    )
    frequencies = base ** -(np.arange(0, head_size, 2) / head_size)
    rotations = scaling.original_context * frequencies / (2 * np.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    kept = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    expected = 1.0 / ((1.0 - kept) / scaling.factor + kept)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
        raise ValueError(
            f"tensor {_FREQUENCIES!r} is not the scaling of Llama 3.1 to 3.3 "
            f"(factor {scaling.factor:g}, original context 8192), the only one specjax recovers "
            "from it; read the model from its Hugging Face folder instead"
        )
    return scaling
