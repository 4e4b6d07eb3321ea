"""The library is built once for a machine, and its absence is told."""

import os
import stat

import pytest

from specjax import native
from specjax.models import policy
from specjax.native import build


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPECJAX_CACHE", str(tmp_path))
    build.target.cache_clear()
    build._loaded.cache_clear()
    yield tmp_path
    build.target.cache_clear()
    build._loaded.cache_clear()


def compiler(path, body):
    """A script in place of a compiler."""
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return str(path)


STANDS_IN = """
for word; do case $word in -E) echo "$MACHINE"; exit;; esac; last=$word; done
echo run >> "$LOG"; echo library > "$last"
"""


def test_it_is_built_once(tmp_path, monkeypatch):
    log = tmp_path / "log"
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", STANDS_IN))
    monkeypatch.setenv("LOG", str(log))
    monkeypatch.setenv("MACHINE", "one")
    first = build.library()
    assert first.parent == tmp_path / "native" and first.read_text() == "library\n"
    assert build.library() == first
    assert log.read_text() == "run\n"
    # Another instruction set in the same cache folder, as on a shared disk.
    monkeypatch.setenv("MACHINE", "two")
    assert build.library() != first
    assert log.read_text() == "run\nrun\n"
    assert sorted(os.listdir(first.parent)) == sorted([first.name, build.library().name])


@pytest.mark.parametrize(
    "body, reason",
    [
        ("exit 1", "failed"),
        ("echo no such flag >&2; exit 4", "no such flag"),
        (STANDS_IN, "(invalid ELF|file too short).*delete that file"),
    ],
)
def test_a_failure_is_told_once_and_xla_steps_in(tmp_path, monkeypatch, body, reason):
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", body))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    monkeypatch.setenv("MACHINE", "one")
    with pytest.warns(UserWarning, match=reason):
        assert not native.available()
    assert policy.for_backend("cpu").native is False
    with pytest.raises(native.BuildError, match="the warning before"):
        build.target("products")


def test_a_compiler_with_arguments(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", f"env MACHINE=three {compiler(tmp_path / 'cxx', STANDS_IN)}")
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    assert build.library().read_text() == "library\n"


def test_no_compiler(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(native.BuildError, match="install one"):
        build.library()


def test_no_home(tmp_path, monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(build.storage, "cache_folder", home)
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", STANDS_IN))
    with pytest.raises(native.BuildError, match="SPECJAX_CACHE"):
        build.library()


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", STANDS_IN))
    monkeypatch.setenv("SPECJAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(native.BuildError, match="file"):
        build.library()
