"""Strict modes for every test: no silent broadcasting, no silent promotion, no key used twice."""

import gc
import logging
import os
import pathlib

import chex
import hypothesis
import jax
import pytest
from absl.testing import flagsaver

from experiments import binary
from specjax import checkpoints

# Compiled programs are kept beside pytest's own cache, where processes share them; the environment
# tells the binaries and the notebook that tests start.
_BESIDE_PYTEST = pathlib.Path(__file__).parents[1] / ".pytest_cache/programs"
_PROGRAMS = {
    "jax_compilation_cache_dir": os.environ.get("SPECJAX_TEST_PROGRAMS", str(_BESIDE_PYTEST)),
    "jax_persistent_cache_min_compile_time_secs": 0.05,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}
for _name, _value in _PROGRAMS.items():
    jax.config.update(_name, _value)
    os.environ[_name.upper()] = str(_value)

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_debug_key_reuse", True)
# Where passes of unlike widths may round unlike, they do so as little as the machine can.
jax.config.update("jax_default_matmul_precision", "highest")

hypothesis.settings.register_profile(
    "specjax", deadline=None, derandomize=True, max_examples=25, database=None
)
hypothesis.settings.load_profile("specjax")


@pytest.fixture(autouse=True)
def fresh_trace_counter():
    """Lets each test count the traces of `chex.assert_max_traces` from zero."""
    chex.clear_trace_counter()


@pytest.fixture(autouse=True, scope="module")
def programs(request):
    """Compiles a module's programs and frees them.

    Most are small, run a few times, and would be optimised for longer than they run; a module
    marked `optimised` has them compiled as users have. Thousands of them exhaust a process's memory
    mappings.
    """
    quickly = not any(request.node.iter_markers("optimised"))
    jax.config.update("jax_disable_most_optimizations", quickly)
    # A process that a test starts rounds as this one does.
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(quickly)
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct in float32."""
    return checkpoints.load("smollm2-135m")


@pytest.fixture
def call(capsys):
    """Calls a binary in this process: its exit code, and what it printed."""
    logger = logging.getLogger("jax")
    before = logger.level

    def run(module, *arguments):
        with flagsaver.flagsaver():
            code = 0
            try:
                module.main(binary.parse_flags([module.__name__, *arguments]))
            except SystemExit as end:
                code = end.code
        return (code, *capsys.readouterr())

    yield run
    logger.setLevel(before)
