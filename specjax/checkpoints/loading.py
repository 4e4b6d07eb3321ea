"""From a name to a model that can decode: weights, tokenizer and configuration together."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import jax.typing

from specjax import types
from specjax.checkpoints import fetch, gguf, huggingface
from specjax.checkpoints import tokenizer as tokenizers
from specjax.models import config as configs
from specjax.models import transformer

__all__ = ["Bundle", "assemble", "layer_truncated", "load"]

_FETCHED = {"smollm2-135m": fetch.smollm2}
_HUGGING_FACE_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A loaded checkpoint.

    Attributes:
      name: what was asked for.
      target: the model.
      tokenizer: its tokenizer.
      config: its configuration.
    """

    name: str
    target: types.LanguageModel
    tokenizer: tokenizers.Tokenizer
    config: configs.TransformerConfig

    def chat(self, text: str | Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a prompt in the checkpoint's chat template, up to where the answer begins.

        Args:
          text: what the user says, or a list of messages with `role` and `content`.

        Raises:
          ValueError: the checkpoint has no chat template, or it refuses the messages.
        """
        messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
        return self.tokenizer.chat(messages)


def load(name: str, dtype: jax.typing.DTypeLike = jnp.float32) -> Bundle:
    """Loads a checkpoint.

    Args:
      name: 'smollm2-135m' (fetched when it is nowhere at hand), the path of a GGUF file, the path
        of a Hugging Face folder, or a Hugging Face id 'owner/name'.
      dtype: floating dtype of weights, activations and cache.

    Raises:
      ValueError: an unknown name, a path that does not exist, or a checkpoint that cannot be read;
        see `gguf.read` and `huggingface.read`.
      RuntimeError: a checkpoint that had to be fetched could not be (`fetch.FetchError` among
        them).
      ImportError: a library of the extra `models` is not installed.
    """
    name = str(name)
    path = pathlib.Path(name).expanduser()
    if name in _FETCHED:
        return _from_gguf(name, _FETCHED[name](), dtype)
    if name and path.is_dir():
        return _from_folder(name, path, dtype)
    if path.is_file():
        if path.suffix == ".safetensors":
            raise ValueError(
                f"{name!r} is one file of a Hugging Face folder; give the folder {path.parent}"
            )
        return _from_gguf(name, path, dtype)
    looks_like_path = name.startswith((".", "~", "/", "\\")) or name.endswith(
        (".gguf", ".safetensors")
    )
    if _HUGGING_FACE_ID.fullmatch(name) and not looks_like_path:
        return _from_folder(name, huggingface.download(name), dtype)
    if looks_like_path or "/" in name or "\\" in name:
        raise ValueError(f"the path {name!r} does not exist (in {pathlib.Path.cwd()})")
    raise ValueError(
        f"unknown checkpoint {name!r}; known: {', '.join(map(repr, _FETCHED))}, the path of a GGUF "
        "file, the path of a Hugging Face folder, or a Hugging Face id 'owner/name'"
    )


def layer_truncated(bundle: Bundle, layers: int) -> types.LanguageModel:
    """The bundle's model with its first layers only, sharing its arrays: an untrained draft.

    Args:
      bundle: a loaded checkpoint.
      layers: how many layers to keep; all of them gives the model itself.

    Raises:
      ValueError: `layers` lies outside 1…L.
    """
    depth = bundle.config.num_layers
    if not 1 <= layers <= depth:
        raise ValueError(f"layers={layers} must lie between 1 and the model's {depth}")
    params = {
        **bundle.target.params,
        "layers": {index: bundle.target.params["layers"][index] for index in range(layers)},
    }
    config = dataclasses.replace(bundle.config, num_layers=layers)
    return _model(config, params, bundle.tokenizer)


def _from_gguf(name: str, path: pathlib.Path, dtype: jax.typing.DTypeLike) -> Bundle:
    config, params, metadata = gguf.read(path, dtype)
    return assemble(name, config, params, tokenizers.Tokenizer.from_gguf(metadata))


def _from_folder(name: str, folder: pathlib.Path, dtype: jax.typing.DTypeLike) -> Bundle:
    config, params = huggingface.read(folder, dtype)
    return assemble(name, config, params, huggingface.read_tokenizer(folder))


def assemble(
    name: str,
    config: configs.TransformerConfig,
    params: dict[Any, Any],
    tokenizer: tokenizers.Tokenizer,
) -> Bundle:
    """A bundle of parts that are at hand.

    Args:
      name: for messages.
      config: the configuration.
      params: its weights.
      tokenizer: the tokenizer; its end-of-sequence tokens become the model's.

    Raises:
      ValueError: weights of another configuration, or a tokenizer that knows more tokens.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{name}: the tokenizer knows {tokenizer.vocab_size} tokens, but the embedding has "
            f"{config.vocab_size} rows; the files do not belong together"
        )
    return Bundle(name, _model(config, params, tokenizer), tokenizer, config)


def _model(
    config: configs.TransformerConfig, params: dict[Any, Any], tokenizer: tokenizers.Tokenizer
) -> types.LanguageModel:
    model = transformer.language_model(config, params)
    return dataclasses.replace(model, eos_ids=tokenizer.eos_ids)
