"""What the operating system knows of this process: its age and the memory it took."""

import os
import pathlib
import sys

__all__ = ["peak_memory", "seconds_since_start"]


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
