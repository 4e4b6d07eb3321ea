"""Libraries that only reading a checkpoint needs, imported when the first checkpoint asks for them.

The core of specjax runs without them; whoever lacks one learns which extra brings it.
"""

import importlib
import types

__all__ = ["require"]


def require(name: str) -> types.ModuleType:
    """Returns the module `name`.

    Raises:
      ImportError: the library is not installed; the message names the extra that brings it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"reading this checkpoint needs the library {name.partition('.')[0]!r} ({error}); "
            "install it with: python -m pip install 'specjax[models]'"
        ) from error
