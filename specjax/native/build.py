"""Compiles the C++ of this package for the machine at hand, once, and tells XLA of it."""

import ctypes
import functools
import hashlib
import os
import pathlib
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings

import jax
from jaxlib import version

from specjax import storage

__all__ = ["BuildError", "library", "multiplies_bfloat16", "target", "usable"]

_FOLDER = pathlib.Path(__file__).parent
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-std=c++20", "-shared", "-fPIC", "-w")
_LIMIT_SECONDS = 300.0
_REMEDY = "install a C++ compiler (gcc 12 or later, or clang), or name one in the variable CXX"


class BuildError(RuntimeError):
    """There is no compiler, or it failed; the message says what to do."""


def library() -> pathlib.Path:
    """The shared library, compiled unless the cache folder holds it whole.

    The file's name tells sources, machine, `CXX` and jaxlib apart, so that machines may share a
    cache folder, and ends in a digest of what the file holds. Processes may compile at the same
    time. A library that is there needs no compiler.

    Raises:
      BuildError: there is no C++ compiler, or it does not accept the sources.
    """
    sources = sorted(_FOLDER.glob("*.cc"))
    parts = [_machine(), os.environ.get("CXX", ""), version.__version__, *_FLAGS]
    parts += [path.read_text() for path in (*sources, *sorted(_FOLDER.glob("*.h")))]
    name = _digest("\0".join(parts).encode())
    try:
        folder = storage.cache_folder() / "native"
    except RuntimeError as error:
        raise BuildError(f"no home folder; name one in SPECJAX_CACHE ({error})") from error
    try:
        for path in folder.glob(f"{name}-*.so"):
            if path.stem == f"{name}-{_digest(path.read_bytes())}":
                return path
            # Damaged: loading it would end the process.
            path.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            made = pathlib.Path(temporary) / "made.so"
            print("compiling native kernels, once for this machine …", file=sys.stderr, flush=True)
            include = f"-I{jax.ffi.include_dir()}"
            compiler = _compiler()
            _run([*compiler, *_FLAGS, include, *map(str, sources), "-o", str(made)])
            try:
                ctypes.CDLL(str(made))
            except OSError as error:
                # A C compiler, say, leaves out what C++ needs: nothing to be kept.
                raise BuildError(f"{shlex.join(compiler)}: {error}; {_REMEDY}") from error
            path = folder / f"{name}-{_digest(made.read_bytes())}.so"
            os.replace(made, path)
    except OSError as error:
        raise BuildError(f"{folder}: {error}; name another folder in SPECJAX_CACHE") from error
    return path


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _machine() -> str:
    """What instruction sets depend on."""
    told = {"flags", "Features", "model name", "CPU part"}
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = [f"model name: {platform.processor()}"]
    lines = {line for line in lines if line.partition(":")[0].strip() in told}
    return "\n".join([platform.system(), platform.machine(), *sorted(lines)])


def _compiler() -> list[str]:
    try:
        # The variable may hold arguments too, as in "ccache g++".
        named = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise BuildError(f"CXX={os.environ['CXX']!r} cannot be read: {error}") from error
    found = [name for name in ("c++", "g++", "clang++") if shutil.which(name)]
    if not named and not found:
        raise BuildError(f"no C++ compiler found; {_REMEDY}")
    return named or found[:1]


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_LIMIT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{error}; {_REMEDY}") from error
    if done.returncode:
        raise BuildError(f"{shlex.join(command)} failed {done.stderr.strip()[-1000:]}; {_REMEDY}")


def usable() -> bool:
    """Whether the library can be built and loaded, tried once a process; one warning if not."""
    return _loaded() is not None


@functools.cache
def _loaded() -> tuple[ctypes.CDLL, str] | None:
    """The library in this process and what tells it from others; None, after a warning, without."""
    try:
        path = library()
        return ctypes.CDLL(str(path)), path.stem
    except (BuildError, OSError) as error:
        warnings.warn(
            f"specjax's native kernels cannot be used, passes will be slower: {error}", stacklevel=2
        )
        return None


def multiplies_bfloat16() -> bool:
    """Whether the handlers of `matrices.cc` can be called: the CPU multiplies bfloat16."""
    loaded = _loaded()
    if loaded is None:
        return False
    loaded[0].multiplies_bfloat16.restype = ctypes.c_bool
    return loaded[0].multiplies_bfloat16()


@functools.cache
def target(name: str) -> str:
    """Registers a handler of the library with XLA, and returns the name to call it by.

    The name holds the library's, so that a compiled program kept on disk never meets another
    version's handler.

    Raises:
      BuildError: the library cannot be built.
    """
    loaded = _loaded()
    if loaded is None:
        raise BuildError("the native kernels cannot be built here; see the warning before")
    handlers, version_name = loaded
    full_name = f"specjax_{name}_{version_name}"
    handler = jax.ffi.pycapsule(getattr(handlers, name))
    jax.ffi.register_ffi_target(full_name, handler, platform="cpu")
    return full_name
