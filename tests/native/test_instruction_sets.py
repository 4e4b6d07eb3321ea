"""Sums are the same beside others whatever the machine: narrower vectors, other tunings."""

import os
import platform
import shutil
import subprocess
import sys

import pytest

from specjax import native

SCRIPT = """
import jax.numpy as jnp
import numpy as np
from specjax.models import attention, policy, products

chosen = policy.Policy(native=True)
def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)

for inputs, outputs in ((576, 37), (45, 8)):
    hidden, kernel = normal(0, 1, 20, inputs), normal(1, outputs, inputs)
    def times(tokens):
        return np.asarray(products.products(tokens, [kernel], chosen)[0])
    alone = np.concatenate([times(hidden[:, i : i + 1]) for i in range(20)], axis=1)
    for count in (2, 3, 4, 5, 8, 9, 16, 20):
        np.testing.assert_array_equal(times(hidden[:, :count]), alone[:, :count])
for heads, size in ((2, 16), (6, 40)):
    query = normal(2, 1, 8, heads, size)
    old = (normal(3, 1, 2, 21, size), normal(4, 1, 2, 21, size))
    new = (normal(5, 1, 8, 2, size), normal(6, 1, 8, 2, size))
    def attend(first, count):
        cut = slice(first, first + count)
        masks = (jnp.ones((1, 1, 21), bool), jnp.eye(count, dtype=bool)[None])
        keys, values = (entry[:, cut] for entry in new)
        asked = (query[:, cut], (keys, values), old, masks, jnp.int32(21))
        return np.asarray(attention.attend(*asked, chosen))
    alone = np.concatenate([attend(i, 1) for i in range(8)], axis=1)
    for count in (2, 3, 4, 8):
        np.testing.assert_array_equal(attend(0, count), alone[:, :count])
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags are of x86")
@pytest.mark.skipif(not native.available() or not shutil.which("g++"), reason="no g++")
@pytest.mark.parametrize(
    "flags", ["-mno-avx512f -mtune=znver3", "-mno-avx512f -mno-fma", "-mno-avx -mno-avx512f"]
)
def test_sums_do_not_depend_on_what_stands_beside_them(tmp_path, flags):
    environment = os.environ | {"CXX": f"g++ {flags}", "SPECJAX_CACHE": str(tmp_path)}
    # What the compiler lacks, it says as if for want of a compiler: then nothing is tested.
    environment["PYTHONWARNINGS"] = "error"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
