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
for word; do last=$word; done
echo run >> "$LOG"; echo library > "$last"
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A compiler that notes its runs; gives how often it ran."""
    log = tmp_path / "log"
    log.write_text("")
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", STANDS_IN))
    monkeypatch.setenv("LOG", str(log))
    monkeypatch.setattr(build.ctypes, "CDLL", lambda path: None)
    return lambda: log.read_text().count("run")


def test_it_is_built_once(tmp_path, monkeypatch, stand_in):
    first = build.library()
    assert first.parent == tmp_path / "native" and first.read_text() == "library\n"
    assert build.library() == first and stand_in() == 1
    # Another instruction set in the same cache folder, as on a shared disk.
    monkeypatch.setattr(build, "_machine", lambda: "another")
    second = build.library()
    assert second != first and stand_in() == 2
    assert sorted(os.listdir(first.parent)) == sorted([first.name, second.name])


def test_a_library_that_is_there_needs_no_compiler(tmp_path, stand_in):
    first = build.library()
    (tmp_path / "cxx").unlink()
    assert build.library() == first and stand_in() == 1


def test_a_damaged_library_is_built_again(stand_in):
    first = build.library()
    first.write_text("lib")
    assert build.library() == first and first.read_text() == "library\n"
    assert stand_in() == 2


def test_the_machine_is_told_by_what_it_can_do():
    assert build._machine() == build._machine()
    if os.path.exists("/proc/cpuinfo"):
        assert "flags" in build._machine() or "Features" in build._machine()


@pytest.mark.parametrize(
    "body, reason",
    [
        ("exit 1", "failed"),
        ("echo no such flag >&2; exit 4", "no such flag"),
        (STANDS_IN, "(invalid ELF|file too short).*CXX"),
        ("exit 0", "cannot open shared object"),
    ],
)
def test_a_failure_is_told_once_and_xla_steps_in(tmp_path, monkeypatch, body, reason):
    monkeypatch.setenv("CXX", compiler(tmp_path / "cxx", body))
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    with pytest.warns(UserWarning, match=reason):
        assert not native.available()
    assert policy.for_backend("cpu").native is False
    with pytest.raises(native.BuildError, match="the warning before"):
        build.target("products")
    # Nothing is kept that a later compiler would trip over.
    assert not list((tmp_path / "native").glob("*.so"))


def test_a_compiler_with_arguments(tmp_path, monkeypatch):
    monkeypatch.setattr(build.ctypes, "CDLL", lambda path: None)
    monkeypatch.setenv("CXX", f"env LOG={tmp_path / 'log'} {compiler(tmp_path / 'cxx', STANDS_IN)}")
    assert build.library().read_text() == "library\n"
    assert (tmp_path / "log").read_text() == "run\n"


def test_a_compiler_that_cannot_be_read(monkeypatch):
    monkeypatch.setenv("CXX", 'g++ "')
    with pytest.raises(native.BuildError, match="CXX='g"):
        build.library()


def test_no_compiler(monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(native.BuildError, match="install a C"):
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
