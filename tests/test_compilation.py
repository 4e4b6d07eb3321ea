"""Kept programs: where they lie, who decides, and that a second process reads them."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from experiments import compilation

ROOT = pathlib.Path(__file__).parents[1]
OPTIONS = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)
PROGRAM = """
import sys
from experiments import compilation
compilation.keep_programs(None)
import jax, jax.numpy as jnp
with compilation.CompilationClock() as clock:
    jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8))).block_until_ready()
print(clock.programs, clock.seconds["read"] > 0)
with compilation.without_kept_programs(), compilation.CompilationClock() as clock:
    jax.jit(lambda x: jnp.cos(x) @ x)(jnp.ones((8, 8))).block_until_ready()
print(clock.programs, clock.seconds["read"] > 0)
"""


def option(name):
    return getattr(jax.config, name)


@pytest.fixture(autouse=True)
def keep_options():
    before = {name: option(name) for name in OPTIONS}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def nothing_asked(monkeypatch, tmp_path):
    """An environment that says nothing of JAX's cache, and a folder for what is fetched."""
    for name in OPTIONS:
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("SPECJAX_CACHE", str(tmp_path))


def test_programs_lie_beside_what_is_fetched(nothing_asked, tmp_path, capsys):
    kept = compilation.keep_programs(None)
    assert kept is not None and kept == tmp_path / "programs" and kept.is_dir()
    assert option("jax_compilation_cache_dir") == str(kept)
    assert option("jax_persistent_cache_min_compile_time_secs") == 0.2
    assert str(kept) in capsys.readouterr().err


def test_the_environment_wins_over_the_default(nothing_asked, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "environment"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "3")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 3.0)
    assert compilation.keep_programs(None) == tmp_path / "environment"
    assert option("jax_persistent_cache_min_compile_time_secs") == 3.0
    assert compilation.keep_programs(str(tmp_path / "flag")) == tmp_path / "flag"


def test_an_empty_directory_keeps_nothing(nothing_asked, capsys):
    assert compilation.keep_programs("") is None
    assert not option("jax_enable_compilation_cache")
    assert capsys.readouterr().err == ""


def test_a_directory_that_cannot_be_made_is_said_once(nothing_asked, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert compilation.keep_programs(str(tmp_path / "file" / "programs")) is None
    assert not option("jax_enable_compilation_cache")
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_second_process_reads(tmp_path):
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    def run():
        ended = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=environment,
        )
        assert ended.returncode == 0, ended.stderr
        assert ended.stderr.splitlines() == [f"compiled programs are kept in {tmp_path}"]
        counted, anew = (line.split() for line in ended.stdout.splitlines())
        assert int(counted[0]) > 0 and int(anew[0]) > 0
        assert anew[1] == "False"
        return counted[1]

    assert run() == "False"
    assert any(tmp_path.iterdir())
    assert run() == "True"
