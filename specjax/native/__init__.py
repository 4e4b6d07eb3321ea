"""What XLA's CPU backend does too slowly, in C++: compiled on first use, called through its FFI.

Nothing here knows a model: a handler takes arrays and returns arrays, and stands for a JAX function
that a caller gives beside it (`function`).
"""

from specjax.native.build import BuildError
from specjax.native.function import available, function, multiplies_bfloat16

__all__ = ["BuildError", "available", "function", "multiplies_bfloat16"]
