"""Compiled programs kept on disk between starts, and what a start spends on them.

JAX files a program under a hash of its text, its options, the versions and the machine's features,
so that a stale one is never read; deleting the directory is always safe.
"""

import collections
import contextlib
import os
import pathlib
import sys
from collections.abc import Iterator

import jax
from jax.experimental.compilation_cache import compilation_cache

from specjax import storage

__all__ = ["CompilationClock", "keep_programs", "without_kept_programs"]

_DIRECTORY = "jax_compilation_cache_dir"
_ENABLED = "jax_enable_compilation_cache"
# What compiles faster than this is hardly faster to read, and there is much of it.
_THRESHOLDS = {
    "jax_persistent_cache_min_compile_time_secs": 0.2,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
_PHASES = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",
    # Part of `compile`: programs that were read instead of compiled.
    "/jax/compilation_cache/cache_retrieval_time_sec": "read",
}


def keep_programs(directory: str | None) -> pathlib.Path | None:
    """Switches the persistent compilation cache on; to be called before anything is compiled.

    Args:
      directory: where programs are kept; the empty string keeps none. None takes the environment
        variable `JAX_COMPILATION_CACHE_DIR`, or else `programs` in the folder of fetched files.
        JAX's own environment variables also win over the thresholds set here.

    Returns:
      The directory, or None where nothing is kept.
    """
    if directory is None:
        directory = os.environ.get(_DIRECTORY.upper()) or str(storage.cache_folder() / "programs")
    if not directory:
        jax.config.update(_ENABLED, False)
        return None
    path = pathlib.Path(directory).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        # Nothing but time is lost; otherwise JAX would warn at every program.
        print(f"compiled programs are not kept: {error}", file=sys.stderr, flush=True)
        jax.config.update(_ENABLED, False)
        return None
    jax.config.update(_DIRECTORY, str(path))
    for name, value in _THRESHOLDS.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    print(f"compiled programs are kept in {path}", file=sys.stderr, flush=True)
    return path


@contextlib.contextmanager
def without_kept_programs() -> Iterator[None]:
    """A block in which every program is compiled, none is read and none is kept."""
    before = getattr(jax.config, _ENABLED)
    # Whether the cache is used is decided once, at the first program, unless it is reset.
    jax.config.update(_ENABLED, False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update(_ENABLED, before)
        compilation_cache.reset_cache()


class CompilationClock:
    """Seconds that JAX spends on programs inside a `with` block, as JAX itself reports them.

    Attributes:
      seconds: by phase, `trace`, `lower` and `compile` (in which reading kept programs, `read`, is
        contained).
      programs: how many were made.
    """

    def __init__(self):
        self.seconds = dict.fromkeys(_PHASES.values(), 0.0)
        self.programs = 0
        self._counts: collections.Counter[str] = collections.Counter()
        self._runs = False

    def __enter__(self) -> "CompilationClock":
        self._runs = True
        jax.monitoring.register_event_duration_secs_listener(self._hear)
        return self

    def __exit__(self, *exception) -> None:
        # A listener cannot be taken back alone; it only stops listening.
        self._runs = False
        self.programs = self._counts["compile"]

    def _hear(self, event: str, duration_secs: float, **kwargs) -> None:
        del kwargs
        phase = _PHASES.get(event)
        if self._runs and phase is not None:
            self.seconds[phase] += duration_secs
            self._counts[phase] += 1
