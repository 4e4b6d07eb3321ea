"""What this process asks of the operating system."""

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
from experiments import process

if sys.argv[1] == "keep":
    process.keep_memory()

size = 1 << 27

def fresh_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * size  # freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

fresh_pages()
print(fresh_pages())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is another")
def test_large_arrays_take_memory_that_was_freed():
    pages = {}
    for how in ("keep", "default"):
        command = [sys.executable, "-c", SCRIPT, how]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        pages[how] = int(done.stdout)
    assert pages["keep"] < 100 < 1000 < pages["default"], pages
