"""Reading a Hugging Face folder (config.json, safetensors, tokenizer.json), or fetching one."""

import json
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import jax.typing
import numpy as np

from specjax.checkpoints import assembly, optional, rotary
from specjax.checkpoints import tokenizer as tokenizers
from specjax.models import config as configs

__all__ = ["FLOATS", "download", "read", "read_config", "read_tokenizer", "stored_name", "write"]

_MODEL_TYPES = ("llama", "mistral", "qwen2")
_TOP_NAMES = {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
}
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_PICKLES = (".bin", ".pt", ".pth")
FLOATS = ("F64", "F32", "F16", "BF16")


def read(
    folder: str | os.PathLike[str], dtype: jax.typing.DTypeLike = jnp.float32
) -> tuple[configs.TransformerConfig, dict[Any, Any]]:
    """Reads configuration and weights.

    Model types `llama`, `mistral` and `qwen2`, where every layer attends to the whole text.

    Args:
      folder: holds config.json and either one safetensors file or model.safetensors.index.json and
        its parts.
      dtype: floating dtype of the parameters, whatever the stored one.

    Returns:
      The configuration and the parameters, the nested dict of `transformer.parameter_shapes`.

    Raises:
      ValueError: a file is absent or corrupt, the configuration asks for something the transformer
        does not do, or a tensor is missing, one too many or misshapen.
      ImportError: the `safetensors` library is not installed.
    """
    assembly.check_dtype(dtype)
    folder = pathlib.Path(folder)
    config = read_config(folder)
    library = optional.require("safetensors")
    stored: dict[str, Any] = {}
    for path, listed in _weight_files(folder).items():
        try:
            part = library.safe_open(str(path), framework="numpy")
            names = set(part.keys())
        except (library.SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{path}: truncated or corrupt safetensors file ({error})") from error
        if listed is not None and listed != names:
            odd = sorted(listed ^ names)[0]
            raise ValueError(f"{path}: tensor {odd!r} is in the file or its index, not in both")
        for name in names:
            kind = part.get_slice(name).get_dtype()
            if kind not in FLOATS:
                raise ValueError(
                    f"{path}: tensor {name!r} has type {kind}, not one of {FLOATS}; quantized "
                    "safetensors are not supported"
                )
            stored[name] = part
    if config.tied_embeddings and _HEAD in stored and _EMBEDDING in stored:
        # Some writers store the tied head a second time.
        head, embedding = (stored[name].get_tensor(name) for name in (_HEAD, _EMBEDDING))
        if not np.array_equal(head, embedding):
            raise ValueError(
                f"{folder}: tie_word_embeddings is true, but {_HEAD!r} is not the embedding"
            )
        del stored[_HEAD]
    # Old writers store the rotary frequencies, which the configuration determines.
    shapes = {
        name: tuple(part.get_slice(name).get_shape())
        for name, part in stored.items()
        if not name.endswith(".rotary_emb.inv_freq")
    }

    def values(name: str) -> np.ndarray:
        return stored[name].get_tensor(name)

    return config, assembly.assemble(config, stored_name, shapes, values, dtype, str(folder))


def read_config(folder: str | os.PathLike[str]) -> configs.TransformerConfig:
    """Reads config.json.

    Raises:
      ValueError: it is absent, not JSON, lacks an entry, or asks for something the transformer does
        not do; the message names the entry and its value.
    """
    path = pathlib.Path(folder) / "config.json"
    given = _json(path)
    try:
        return _config(given)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_tokenizer(folder: str | os.PathLike[str]) -> tokenizers.Tokenizer:
    """Reads tokenizer.json, and from the files beside it the chat template and what ends an answer.

    Raises:
      ValueError: tokenizer.json is absent, or a file is corrupt.
      ImportError: the `tokenizers` library is not installed.
    """
    folder = pathlib.Path(folder)
    files = ("tokenizer_config.json", "generation_config.json", "config.json")
    settings, generation, config = (
        _json(folder / name) if (folder / name).is_file() else {} for name in files
    )
    plain = tokenizers.Tokenizer.from_file(folder / "tokenizer.json")

    def token_id(entry: str) -> list[int]:
        text = settings.get(entry)
        text = text.get("content") if isinstance(text, dict) else text
        return plain.encode(text) if text is not None and len(plain.encode(text)) == 1 else []

    def listed(source: dict[str, Any], entry: str) -> list[int]:
        value = source.get(entry)
        return value if isinstance(value, list) else [] if value is None else [value]

    # The tokenizer's own end token closes a turn; generation_config.json may add others.
    eos = token_id("eos_token") + listed(generation, "eos_token_id")
    bos = token_id("bos_token") or listed(config, "bos_token_id")
    return tokenizers.Tokenizer.from_file(
        folder / "tokenizer.json",
        eos_ids=eos or listed(config, "eos_token_id"),
        bos_id=bos[0] if bos else None,
        chat_template=_chat_template(folder, settings),
    )


def write(
    folder: str | os.PathLike[str],
    config: configs.TransformerConfig,
    params: Any,
    tokenizer: tokenizers.Tokenizer,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> None:
    """Writes a Llama as a folder that `read` and other libraries load.

    Args:
      folder: is made; files of these names in it are overwritten.
      config: with a head for the whole vocabulary, and without rotary scaling or biases.
      params: the weights of that configuration.
      tokenizer: the model's.
      dtype: of the stored tensors.

    Raises:
      ValueError: a configuration that a plain Llama's folder cannot tell, or a full disk.
      ImportError: the `safetensors` library is not installed.
    """
    for name in ("rotary_scaling", "head_rows", "qkv_bias", "output_bias", "ffn_bias"):
        if getattr(config, name):
            raise ValueError(f"{name}={getattr(config, name)} cannot be written as a plain Llama")
    library = optional.require("safetensors.flax")
    folder = pathlib.Path(folder)
    eos = list(tokenizer.eos_ids)
    described = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "max_position_embeddings": config.context_length,
        "rope_theta": config.rotary_base,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": jnp.dtype(dtype).name,
        "eos_token_id": eos[0] if len(eos) == 1 else eos,
        "bos_token_id": tokenizer.bos_id,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        library.save_file(
            {name: leaf.astype(dtype) for name, leaf in assembly.stored(params, stored_name)},
            str(folder / "model.safetensors"),
            {"format": "pt"},
        )
        (folder / "config.json").write_text(json.dumps(described, indent=2), encoding="utf-8")
        tokenizer.save(folder)
    except (OSError, optional.require("safetensors").SafetensorError) as error:
        raise ValueError(f"{folder} could not be written: {error}") from error


def download(repository: str) -> pathlib.Path:
    """Fetches a model by its Hugging Face id into that library's own cache; returns the folder.

    Raises:
      RuntimeError: no network and nothing cached, no such model, or no leave to read it.
      ImportError: the `huggingface_hub` library is not installed.
    """
    library = optional.require("huggingface_hub")
    print(f"specjax: fetching {repository} from Hugging Face", file=sys.stderr)
    try:
        return pathlib.Path(
            library.snapshot_download(
                repository,
                allow_patterns=["*.json", "*.safetensors", "*.jinja"],
                ignore_patterns=["consolidated*", "*/*"],
            )
        )
    # Which errors come out depends on that library's version and its network library.
    except Exception as error:
        raise RuntimeError(
            f"could not fetch {repository!r} from Hugging Face ({type(error).__name__}: {error}); "
            "check the name, the network and, for a gated model, your login, or give the path of "
            "a local folder"
        ) from error


def _config(given: Mapping[str, Any]) -> configs.TransformerConfig:
    kind = given.get("model_type")
    if kind not in _MODEL_TYPES:
        raise ValueError(f"model_type={kind!r} is not supported; known: {_MODEL_TYPES}")
    # Entries left out mean what transformers takes them to mean, which depends on the model type.
    sliding = given.get("sliding_window", 4096 if kind == "mistral" else None)
    if kind == "qwen2" and not given.get("use_sliding_window"):
        sliding = None
    context = _whole(given, "max_position_embeddings")
    for entry, value, fine in (
        ("hidden_act", given.get("hidden_act", "silu"), ("silu", "swish")),
        ("quantization_config", given.get("quantization_config"), (None,)),
        ("sliding_window", sliding if sliding is None or sliding < context else None, (None,)),
    ):
        if value not in fine:
            raise ValueError(f"{entry}={value!r} is not supported; known: {fine}")
    hidden = _whole(given, "hidden_size")
    heads = _whole(given, "num_attention_heads")
    every_bias = kind == "llama" and bool(given.get("attention_bias", False))
    return configs.TransformerConfig(
        vocab_size=_whole(given, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_whole(given, "intermediate_size"),
        num_layers=_whole(given, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_whole(given, "num_key_value_heads", heads if kind == "llama" else None),
        head_size=_whole(given, "head_dim", hidden // heads),
        context_length=context,
        rotary_base=rotary.base(given),
        rotary_scaling=rotary.scaling(given, context),
        norm_epsilon=float(given.get("rms_norm_eps", 1e-6)),
        tied_embeddings=bool(given.get("tie_word_embeddings", False)),
        qkv_bias=every_bias or kind == "qwen2",
        output_bias=every_bias,
        ffn_bias=kind == "llama" and bool(given.get("mlp_bias", False)),
    )


def stored_name(path: assembly.ParameterPath) -> str:
    """The tensor in which Hugging Face folders keep a parameter."""
    leaf = "bias" if path[-1] == "bias" else "weight"
    if path[0] != "layers":
        return f"{_TOP_NAMES[str(path[0])]}.{leaf}"
    return f"model.layers.{path[1]}.{_LAYER_NAMES['.'.join(str(key) for key in path[2:-1])]}.{leaf}"


def _weight_files(folder: pathlib.Path) -> dict[pathlib.Path, set[str] | None]:
    """Files with weights, each with the tensors an index lists in it, or None without an index."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        listed: dict[pathlib.Path, set[str]] = {}
        for tensor, name in _json(index).get("weight_map", {}).items():
            path = folder / name
            if path.parent != folder or not path.is_file():
                raise ValueError(
                    f"{index}: tensor {tensor!r} is said to be in {name!r}, which is not there"
                )
            listed.setdefault(path, set()).add(tensor)
        if not listed:
            raise ValueError(f"{index}: has no 'weight_map'; the download is incomplete")
        return dict(listed)
    found = sorted(folder.glob("*.safetensors"))
    single = folder / "model.safetensors"
    if single in found or len(found) == 1:
        return {single if single in found else found[0]: None}
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise ValueError(
            f"{folder}: holds {pickles[0]!r} and no safetensors; specjax does not open pickles, "
            "which can run code; convert with transformers: "
            "from_pretrained(...).save_pretrained(folder)"
        )
    raise ValueError(
        f"{folder}: holds {len(found)} safetensors files and neither model.safetensors nor an index"
    )


def _chat_template(folder: pathlib.Path, settings: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template


def _json(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; the folder is not a complete Hugging Face model")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not an object")
    return content


def _whole(given: Mapping[str, Any], entry: str, default: int | None = None) -> int:
    value = given.get(entry)
    value = default if value is None else value
    if value is None:
        raise ValueError(f"lacks {entry!r}")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{entry}={value!r} is not a whole number of at least 1")
    return value
