"""This process and the operating system: its age, the memory it took, and that it keeps it."""

import ctypes
import os
import pathlib
import sys

__all__ = ["keep_memory", "peak_memory", "seconds_since_start"]

# What glibc's mallopt calls them.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def seconds_since_start() -> float | None:
    """Age of this process in seconds, imports and all; None where there is no /proc."""
    try:
        # The name of the program, in parentheses, may hold spaces; the start is field 22.
        fields = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return float(pathlib.Path("/proc/uptime").read_text().split()[0]) - started
    except (OSError, ValueError, IndexError):
        return None


def peak_memory() -> int | None:
    """The most memory this process ever held, in bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def keep_memory() -> None:
    """Memory once freed stays with this process, for its next large array.

    By default every large array comes from the system anew, page by page and filled with zeros,
    which took a fifth of a training step. To be called before the first program runs; other
    systems than Linux with glibc are left as they are.
    """
    try:
        allocator = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    # All threads share the arena that can grow without end.
    for option, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1)):
        allocator(ctypes.c_int(option), ctypes.c_int(value))
