"""Compiles the C++ of this package for the machine at hand, once, and tells XLA of it."""

import ctypes
import functools
import hashlib
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings

import jax
from jaxlib import version

from specjax import storage

__all__ = ["BuildError", "library", "target", "usable"]

_FOLDER = pathlib.Path(__file__).parent
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-std=c++20", "-shared", "-fPIC", "-w")
_LIMIT_SECONDS = 300.0


class BuildError(RuntimeError):
    """There is no compiler, or it failed; the message says what to do."""


def library() -> pathlib.Path:
    """The shared library, compiled unless the cache folder holds it.

    The file's name tells sources, compiler, instruction set and jaxlib apart, so that machines may
    share a cache folder. Processes may compile at the same time; the file appears whole or not at
    all.

    Raises:
      BuildError: there is no C++ compiler, or it does not accept the sources.
    """
    found = filter(shutil.which, ("c++", "g++", "clang++"))
    # The variable may hold arguments too, as in "ccache g++".
    compiler = shlex.split(os.environ.get("CXX", "")) or list(found)[:1]
    if not compiler:
        raise BuildError(
            "no C++ compiler found; install one (gcc 12 or later, or clang), or name it in the "
            "variable CXX"
        )
    sources = sorted(_FOLDER.glob("*.cc"))
    # What the compiler predefines names itself and every instruction set that it will use.
    machine = _run([*compiler, *_FLAGS, "-dM", "-E", "-x", "c++", os.devnull])
    parts = [machine, version.__version__, *_FLAGS]
    parts += [path.read_text() for path in (*sources, *sorted(_FOLDER.glob("*.h")))]
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    try:
        path = storage.cache_folder() / "native" / f"{digest}.so"
    except RuntimeError as error:
        raise BuildError(f"no home folder; name one in SPECJAX_CACHE ({error})") from error
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = pathlib.Path(folder) / path.name
            include = f"-I{jax.ffi.include_dir()}"
            print("compiling native kernels, once for this machine …", file=sys.stderr, flush=True)
            _run([*compiler, *_FLAGS, include, *map(str, sources), "-o", str(made)])
            os.replace(made, path)
    except OSError as error:
        raise BuildError(f"{path.parent}: {error}") from error
    return path


def _run(command: list[str]) -> str:
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
        raise BuildError(f"{command[0]}: {error}") from error
    if done.returncode:
        raise BuildError(
            f"{shlex.join(command)} failed, where gcc 12 or later, or clang, would not: "
            f"{done.stderr.strip()[-1000:]}"
        )
    return done.stdout


def usable() -> bool:
    """Whether the library can be built and loaded, tried once a process; one warning if not."""
    return _loaded() is not None


@functools.cache
def _loaded() -> tuple[ctypes.CDLL, str] | None:
    """The library in this process and what tells it from others; None, after a warning, without."""
    try:
        path = library()
        try:
            return ctypes.CDLL(str(path)), path.stem
        except OSError as error:
            raise BuildError(f"{error}; delete that file, to have it built again") from error
    except BuildError as error:
        warnings.warn(
            f"specjax's native kernels cannot be used, passes will be slower: {error}", stacklevel=2
        )
        return None


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
