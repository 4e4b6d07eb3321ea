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
    run(SCRIPT, tmp_path, flags)


def run(script, folder, flags):
    environment = os.environ | {"CXX": f"g++ {flags}", "SPECJAX_CACHE": str(folder)}
    # What the compiler lacks, it says as if for want of a compiler: then nothing is tested.
    environment["PYTHONWARNINGS"] = "error"
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


ROUNDED = """
import jax.numpy as jnp
import numpy as np
from specjax import native
from specjax.models import policy, products

assert native.multiplies_bfloat16() == {expected}
chosen = policy.Policy(rounded=native.multiplies_bfloat16())
def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)
def rounded(array):
    return np.asarray(array.astype(jnp.bfloat16 if {expected} else jnp.float32), np.float64)

for tokens, inputs, outputs in ((5, 7, 3), (33, 1065, 47), (3, 40, 4130)):
    rows, kernel = normal(0, tokens, inputs), normal(1, outputs, inputs)
    (made,) = products.products(rows[None], [kernel], chosen)
    np.testing.assert_allclose(made[0], rounded(rows) @ rounded(kernel).T, atol=1e-3, rtol=1e-5)
"""


@pytest.mark.skipif(not native.multiplies_bfloat16(), reason="the CPU does not multiply bfloat16")
@pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
@pytest.mark.parametrize(
    "flags, expected",
    [
        # By vectors, on CPUs without tile registers.
        ("-mno-amx-bf16", True),
        # Compiled for tile registers, which the system or the CPU may not give.
        ("-mamx-tile -mamx-bf16", True),
        ("-mno-avx512bf16 -mno-amx-bf16", False),
    ],
)
def test_products_are_rounded_where_the_instructions_are(tmp_path, flags, expected):
    run(ROUNDED.format(expected=expected), tmp_path, flags)
