"""Draft models made for one target: one small file, of what the target itself does not hold.

A draft of the target's own layers shares its embedding, and the rows of its head are rows of the
target's; so the file holds layers, the final norm and the list of tokens, and little else. One of
another width holds two projections besides, through which it shares embedding and head too.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax.numpy as jnp
import jax.typing
import numpy as np

from specjax import types
from specjax.checkpoints import assembly, huggingface, loading, optional
from specjax.models import config as configs
from specjax.models import reduced, transformer

__all__ = ["export", "read", "weights", "whole", "write"]

_TABLE = "vocabulary"
_PROJECTIONS = ("inward", "outward")
_KEY, _FORMAT = "specjax", "specjax draft 1"


def write(
    path: str | os.PathLike[str],
    bundle: loading.Bundle,
    config: configs.TransformerConfig,
    params: Any,
    tokens: np.ndarray,
) -> None:
    """Writes a draft in bfloat16.

    Args:
      path: of the safetensors file; an older one stays until this one is whole.
      bundle: the target.
      config: the draft's.
      params: what is not the target's own: `layers`, `norm`, perhaps `head`, and of another width
        `inward` and `outward`, [H of the target, H].
      tokens: int32[M], the tokens of the head's rows.

    Raises:
      ValueError: a full disk.
      ImportError: the `safetensors` library is not installed.
    """
    library = optional.require("safetensors.flax")
    projections = {name: params[name] for name in _PROJECTIONS if name in params}
    others = {name: branch for name, branch in params.items() if name not in projections}
    named = [*assembly.stored(others, huggingface.stored_name), *projections.items()]
    tensors = {name: jnp.asarray(leaf, jnp.bfloat16) for name, leaf in named}
    described = {
        "format": _FORMAT,
        "config": dataclasses.asdict(config),
        "tokenizer": bundle.tokenizer.fingerprint,
    }
    try:
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors[_TABLE] = jnp.asarray(tokens, jnp.int32)
        # One entry, since the library writes several in any order.
        part = path.with_name(path.name + ".part")
        part.write_bytes(library.save(tensors, {_KEY: json.dumps(described)}))
        part.replace(path)
    except (OSError, optional.require("safetensors").SafetensorError) as error:
        raise ValueError(f"{path} could not be written: {error}") from error


def read(path: str | os.PathLike[str], bundle: loading.Bundle) -> types.LanguageModel:
    """The draft model of a file, in the target's dtype, sharing the target's embedding.

    A draft of another width gets the target's embedding as its projection shows it.

    Args:
      path: of the safetensors file.
      bundle: the target it was made for, or one tuned from it.

    Raises:
      ValueError: no such file, a damaged one, one for another tokenizer or another width, or a
        table with a token that the vocabulary does not have.
      ImportError: the `safetensors` library is not installed.
    """
    config, params, tokens = weights(path, bundle)
    model = reduced.reduced_vocabulary(
        transformer.language_model(config, whole(params)), tokens, config.vocab_size
    )
    return dataclasses.replace(model, eos_ids=bundle.target.eos_ids)


def whole(params: dict[str, Any]) -> dict[str, Any]:
    """A transformer's weights, of what `weights` gives: the same where there are no projections."""
    if "inward" not in params:
        return params
    embedding, rows = params["embed"]["embedding"], params["head"]["kernel"]
    return {
        **{name: params[name] for name in ("layers", "norm")},
        "embed": {"embedding": embedding @ params["inward"]},
        "head": {"kernel": rows @ params["outward"]},
    }


def _config(given: dict[str, Any]) -> configs.TransformerConfig:
    scaling = given.get("rotary_scaling")
    scaling = None if scaling is None else configs.RotaryScaling(**scaling)
    return configs.TransformerConfig(**{**given, "rotary_scaling": scaling})


def export(
    path: str | os.PathLike[str],
    bundle: loading.Bundle,
    folder: str | os.PathLike[str],
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> None:
    """Writes a draft as a Hugging Face folder, for libraries that take an assistant model.

    Its head speaks of the whole vocabulary, as such libraries want: it is the target's.

    Args:
      path: as `read` takes it.
      bundle: the target.
      folder, dtype: as `huggingface.write` takes them.

    Raises:
      ValueError: as `read` and `huggingface.write`, or a draft with a head or a width of its own.
    """
    config, params, tokens = weights(path, bundle)
    if not bundle.config.tied_embeddings:
        raise ValueError("a target with a head of its own: its draft's folder cannot share it")
    rows = transformer.head_kernel(bundle.target.params)[jnp.asarray(tokens)]
    if "inward" in params:
        raise ValueError(
            f"{path} is of another width than its target, whose head such a folder holds; export a "
            "draft of the target's layers"
        )
    if not np.array_equal(params["head"]["kernel"], rows):
        raise ValueError(
            f"{path} holds a head of its own, which such a folder cannot hold beside the target's; "
            "export a draft that was distilled without one"
        )
    headless = {name: branch for name, branch in params.items() if name != "head"}
    whole = dataclasses.replace(config, tied_embeddings=True, head_rows=None)
    huggingface.write(folder, whole, headless, bundle.tokenizer, dtype)


def weights(
    path: str | os.PathLike[str], bundle: loading.Bundle
) -> tuple[configs.TransformerConfig, dict[str, Any], np.ndarray]:
    """What `read` makes a model of: its configuration, its weights, and the head's tokens.

    Of another width than the target's, its embedding and head are the target's still, and `inward`
    and `outward` lead to its own; `whole` takes them there.

    Args and raises: as `read`.
    """
    library = optional.require("safetensors")
    try:
        file = library.safe_open(str(path), framework="numpy")
        described = json.loads(file.metadata()[_KEY])
        stored = {name: file.get_slice(name) for name in file.keys() if name != _TABLE}
        tokens = file.get_tensor(_TABLE)
        config = _config(described["config"])
    except (library.SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no draft that can be read: {error!r}") from error
    if described.get("format") != _FORMAT:
        raise ValueError(f"{path} is of format {described.get('format')!r}, not {_FORMAT!r}")
    if described.get("tokenizer") != bundle.tokenizer.fingerprint:
        raise ValueError(
            f"{path} is a draft for another tokenizer than that of {bundle.name!r}; a draft and "
            "its target must share one"
        )
    target = bundle.config
    led = {name: stored.pop(name).get_shape() for name in _PROJECTIONS if name in stored}
    wanted = [target.hidden_size, config.hidden_size]
    if led and led != dict.fromkeys(_PROJECTIONS, wanted):
        raise ValueError(f"{path} leads between widths by {led}, where {wanted} is called for")
    for name in ("vocab_size",) if led else ("vocab_size", "hidden_size"):
        if getattr(config, name) != getattr(target, name):
            raise ValueError(
                f"{path} is a draft for a target of {name}={getattr(config, name)}, and "
                f"{bundle.name!r} has {getattr(target, name)}"
            )
    try:
        reduced.check_table(tokens, config.head_rows or config.vocab_size, config.vocab_size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    own = bundle.target.params
    held: dict[str, Any] = {"embed": own["embed"]}
    if huggingface.stored_name(("head", "kernel")) not in stored:
        held["head"] = {"kernel": transformer.head_kernel(own)[jnp.asarray(tokens)]}
    params = assembly.assemble(
        config,
        huggingface.stored_name,
        {name: tuple(part.get_shape()) for name, part in stored.items()},
        lambda name: file.get_tensor(name),
        own["norm"]["scale"].dtype,
        str(path),
        held,
    )
    for name in led:
        params[name] = jnp.asarray(file.get_tensor(name), own["norm"]["scale"].dtype)
    return config, params, tokens
