"""Whether a function may be a static field: equal wherever its record is made again."""

import copy
import functools
import inspect
from typing import Any

__all__ = ["fault"]


def fault(name: str, function: Any) -> str | None:
    """What keeps a function from being static, or None."""
    try:
        hash(function)
    except TypeError as error:
        return f"{name} is not hashable ({error}), so it cannot be static"
    made_anew = (
        isinstance(function, functools.partial)
        or inspect.ismethod(function)
        or "<locals>" in getattr(function, "__qualname__", "")
        or copy.copy(function) != function
    )
    if made_anew:
        return (
            f"{name} is {function!r}: neither a function of a module nor a frozen dataclass, so "
            "another object, and another compilation, whenever it is made"
        )
    return None
