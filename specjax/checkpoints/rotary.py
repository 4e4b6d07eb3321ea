"""Rotary entries of a Hugging Face config.json, in the spelling of every year.

Older files have `rope_theta` and `rope_scaling` (whose kind is `type` or `rope_type`); newer ones
have both in `rope_parameters`.
"""

import math
from collections.abc import Mapping
from typing import Any

from specjax.models import config as configs

__all__ = ["base", "scaling"]

_KINDS = ("default", "linear", "llama3", "yarn")


def base(given: Mapping[str, Any]) -> float:
    """Base of the rotary frequencies; `given` is the content of config.json.

    Raises:
      ValueError: the value is not a number above 1.
    """
    entries = given.get("rope_parameters") or {}
    value = entries.get("rope_theta", given.get("rope_theta", 10000.0))
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 1:
        raise ValueError(f"rope_theta={value!r} is not a number above 1")
    return float(value)


def scaling(given: Mapping[str, Any], context: int) -> configs.RotaryScaling | None:
    """How rotary frequencies are stretched, or None.

    Args:
      given: content of config.json.
      context: its `max_position_embeddings`.

    Raises:
      ValueError: a kind, or an entry of a kind, that the transformer does not do; the message names
        it.
    """
    entries = {**(given.get("rope_scaling") or {}), **(given.get("rope_parameters") or {})}
    partial = entries.get("partial_rotary_factor", given.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ValueError(f"partial_rotary_factor={partial!r} is not supported; known: 1.0")
    if any(isinstance(value, Mapping) for value in entries.values()):
        raise ValueError(f"rotary entries that differ by layer are not supported: {entries}")
    kind = entries.get("rope_type", entries.get("type", "default"))
    if kind not in _KINDS:
        raise ValueError(f"rotary scaling {kind!r} is not supported; known: {_KINDS}")
    if kind == "default":
        return None
    original = int(
        given.get("original_max_position_embeddings")
        or entries.get("original_max_position_embeddings")
        or context
    )
    factor = entries.get("factor")
    if factor is None and kind == "yarn":
        factor = context / original
    factor = _number(factor, "factor")
    if kind == "linear":
        return configs.RotaryScaling(kind=kind, factor=factor)
    if kind == "llama3":
        return configs.RotaryScaling(
            kind=kind,
            factor=factor,
            original_context=original,
            low_frequency_factor=_number(entries.get("low_freq_factor"), "low_freq_factor"),
            high_frequency_factor=_number(entries.get("high_freq_factor"), "high_freq_factor"),
        )
    if not entries.get("truncate", True):
        raise ValueError("yarn with truncate=false is not supported; known: true")
    return configs.RotaryScaling(
        kind=kind,
        factor=factor,
        original_context=original,
        fast_rotations=_number(entries.get("beta_fast") or 32.0, "beta_fast"),
        slow_rotations=_number(entries.get("beta_slow") or 1.0, "beta_slow"),
        attention_factor=_attention_factor(entries, factor),
    )


def _attention_factor(entries: Mapping[str, Any], factor: float) -> float | None:
    if entries.get("attention_factor") is not None:
        return _number(entries["attention_factor"], "attention_factor")
    one, every = entries.get("mscale"), entries.get("mscale_all_dim")
    if not one or not every or factor <= 1.0:
        return None
    return (0.1 * one * math.log(factor) + 1.0) / (0.1 * every * math.log(factor) + 1.0)


def _number(value: Any, entry: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"rotary {entry}={value!r} is not a number")
    return float(value)
