"""From the tensors of a file to the parameter tree, holding the file to exactly the configuration.

GGUF files and Hugging Face folders name their tensors differently but agree on the rest: one tensor
a parameter, kernels stored as [out, in]. A checkpoint that lacks a tensor, holds one more than the
configuration asks for, or holds one of another shape would still decode, only wrongly; so each is
an error here.
"""

import concurrent.futures
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import jax.typing
import numpy as np

from specjax.models import config as configs
from specjax.models import transformer

__all__ = ["ParameterPath", "assemble", "check_dtype", "stored"]

ParameterPath = tuple[str | int, ...]
"""Keys from the root of a parameter tree to a leaf: ('layers', 0, 'ffn', 'up', 'kernel')."""

_NAMES_SHOWN = 5


def check_dtype(dtype: jax.typing.DTypeLike) -> np.dtype:
    """Returns `dtype` as a NumPy dtype.

    Raises:
      ValueError: it is not a floating dtype.
    """
    resolved = jnp.dtype(dtype)
    if not jnp.issubdtype(resolved, jnp.floating):
        raise ValueError(
            f"dtype={resolved.name} is not a floating dtype; known: float32, bfloat16, float16"
        )
    return resolved


def assemble(
    config: configs.TransformerConfig,
    name_of: Callable[[ParameterPath], str],
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    dtype: jax.typing.DTypeLike,
    source: str,
    held: Mapping[str, Any] | None = None,
) -> dict[Any, Any]:
    """Reads every parameter of `config`.

    Args:
      config: what the file must hold, no more and no less.
      name_of: the stored name of a parameter.
      shapes: shape of every stored tensor; kernels [out, in], scales and biases [out].
      read: the values of a stored tensor in the stored shape, in any floating dtype; called from
        several threads.
      dtype: floating dtype of the result.
      source: file or folder, for messages.
      held: branches of the parameters that are at hand already, and not in the file.

    Returns:
      The nested dict of arrays of `transformer.parameter_shapes(config)`.

    Raises:
      ValueError: a tensor is missing, is one too many, has another shape, or holds a number that is
        not finite in `dtype`; the message names it.
    """
    dtype = check_dtype(dtype)
    held = {} if held is None else held
    expected = {
        name_of(path): (path, leaf)
        for path, leaf in _leaves(transformer.parameter_shapes(config))
        if path[0] not in held
    }
    _check_names(set(expected), set(shapes), source)
    for name, (_, leaf) in expected.items():
        if tuple(shapes[name]) != leaf.shape:
            raise ValueError(
                f"{source}: tensor {name!r} has shape {tuple(shapes[name])}, but the file's own "
                f"configuration asks for {leaf.shape}"
            )

    def parameter(name: str) -> jnp.ndarray:
        # A number too large for a 16-bit dtype turns into infinity here and is named just below.
        with np.errstate(over="ignore"):
            values = read(name).astype(dtype, copy=False)
        if not np.isfinite(values).all():
            raise ValueError(
                f"{source}: tensor {name!r} holds numbers that are not finite in {dtype.name}; the "
                "file is corrupt or the dtype too narrow"
            )
        return jnp.asarray(values)

    params: dict[Any, Any] = dict(held)
    with concurrent.futures.ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for name, values in zip(expected, pool.map(parameter, expected), strict=True):
            *branches, last = expected[name][0]
            node = params
            for key in branches:
                node = node.setdefault(key, {})
            node[last] = values
    return params


def stored(
    params: Mapping[Any, Any], name_of: Callable[[ParameterPath], str]
) -> Iterator[tuple[str, Any]]:
    """Every parameter under its stored name."""
    for path, leaf in _leaves(params):
        yield name_of(path), leaf


def _leaves(
    tree: Mapping[Any, Any], prefix: ParameterPath = ()
) -> Iterator[tuple[ParameterPath, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def _check_names(expected: set[str], stored: set[str], source: str) -> None:
    missing, extra = sorted(expected - stored), sorted(stored - expected)
    if not missing and not extra:
        return
    problems = []
    if missing:
        problems.append(
            f"lacks {len(missing)} tensor(s) its configuration asks for: {_shown(missing)}"
        )
    if extra:
        problems.append(
            f"holds {len(extra)} tensor(s) its configuration does not know: {_shown(extra)}"
        )
    raise ValueError(
        f"{source} {' and '.join(problems)}; it is incomplete, or of an architecture specjax does "
        "not read"
    )


def _shown(names: list[str]) -> str:
    rest = len(names) - _NAMES_SHOWN
    return ", ".join(repr(name) for name in names[:_NAMES_SHOWN]) + (
        f" and {rest} more" if rest > 0 else ""
    )
