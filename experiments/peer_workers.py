"""The engines that are compared, and the process of each."""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments import methods, peer_llama, peer_protocol, peer_transformers

__all__ = ["ENGINES", "Engine", "Program", "Workers", "cores_of", "programs_of"]

# What a library's threads may still spin for after an answer.
_SETTLING_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class Engine:
    """A library that decodes.

    Attributes:
      command: what Python is given to start a worker.
      needs: the modules it imports, with the names of their packages.
      takes: its methods, each with the one setting it takes; None for specjax, whose methods are
        those of `experiments.methods`.
      usual: the methods that are run where none are named.
    """

    command: tuple[str, ...]
    needs: Mapping[str, str]
    takes: Mapping[str, str | None] | None
    usual: tuple[str, ...]

    def check(self, method: str) -> str:
        """The method as it is written in full; ValueError where there is none such."""
        if self.takes is None:
            return str(methods.parse(method))
        peer_protocol.parse(method, self.takes)
        return " ".join(method.split())

    def missing(self) -> str | None:
        """Why it cannot run, as far as that is known without starting it."""
        absent = [package for name, package in self.needs.items() if not _is_there(name)]
        if not absent:
            return None
        return f"not installed: {', '.join(absent)} (python -m pip install 'specjax[peers]')"

    @property
    def version(self) -> str:
        """Of all its packages, in one line."""
        told = []
        for package in self.needs.values():
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                told.append(f"{package} {importlib.metadata.version(package)}")
        return ", ".join(told)


ENGINES = {
    "specjax": Engine(
        ("-m", "experiments.peer_specjax"),
        {name: name for name in ("specjax", "jax", "jaxlib")},
        None,
        ("plain", "prompt_lookup", "draft"),
    ),
    "transformers": Engine(
        ("-m", "experiments.peer_transformers"),
        {"transformers": "transformers", "torch": "torch"},
        peer_transformers.METHODS,
        tuple(peer_transformers.METHODS),
    ),
    "llama.cpp": Engine(
        ("-m", "experiments.peer_llama"),
        {"llama_cpp": "llama-cpp-python"},
        peer_llama.METHODS,
        tuple(peer_llama.METHODS),
    ),
}


@dataclasses.dataclass(frozen=True)
class Program:
    """A method of an engine."""

    engine: str
    method: str

    def __str__(self) -> str:
        return f"{self.engine}:{self.method}"


def programs_of(asked: Sequence[str]) -> tuple[Program, ...]:
    """The programs of some engines, in the order in which they take turns: A B C A B C.

    Args:
      asked: each an engine for its usual methods, or `ENGINE:METHOD`.

    Raises:
      ValueError: an unknown engine or method, or one that is named twice.
    """
    found: dict[str, list[Program]] = {}
    for text in asked:
        engine, named, method = text.partition(":")
        if engine not in ENGINES:
            raise ValueError(
                f"--engines={','.join(asked)}: unknown engine {engine!r}; write ENGINE or "
                f"ENGINE:METHOD with one of {', '.join(ENGINES)}"
            )
        one = ENGINES[engine]
        try:
            names = [one.check(name) for name in ([method] if named else one.usual)]
        except ValueError as error:
            raise ValueError(f"--engines={','.join(asked)}: {error}") from error
        found.setdefault(engine, []).extend(Program(engine, name) for name in names)
    most = max(map(len, found.values()), default=0)
    turns = [some[place] for place in range(most) for some in found.values() if place < len(some)]
    if len(set(turns)) < len(turns) or not turns:
        raise ValueError(f"--engines={','.join(asked)}: give some, and each method once")
    return tuple(turns)


def cores_of(threads: int) -> tuple[int, ...]:
    """The cores that so many threads have to themselves; none where the system has no say in it.

    Raises:
      ValueError: there are not so many.
    """
    if not hasattr(os, "sched_getaffinity"):
        return ()
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= threads <= len(cores):
        raise ValueError(f"--threads={threads} must lie between 1 and the {len(cores)} cores here")
    return tuple(cores[:threads])


class _WorkerError(RuntimeError):
    """A request or a whole worker; the message says why."""


class _Worker:
    """The process of one engine, which lives until it is closed or its pipe is."""

    def __init__(self, engine: Engine, settings: Mapping[str, Any], threads: int):
        root = pathlib.Path(__file__).parents[1]
        known = os.environ.get("PYTHONPATH")
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(root), *([known] if known else [])]),
            **{f"{name}_NUM_THREADS": str(threads) for name in ("OMP", "MKL", "OPENBLAS")},
            # Intel's runtime spins for a fifth of a second otherwise, in the next one's time.
            "KMP_BLOCKTIME": "1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            "TOKENIZERS_PARALLELISM": "false",
        }
        # Kept, so that the last of it can tell how a worker ended.
        self._told = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        with _on(cores_of(threads)):
            self._process = subprocess.Popen(
                [sys.executable, *engine.command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._told,
                text=True,
                encoding="utf-8",
                env=environment,
            )
        self.is_alive = True
        try:
            self.exchange({**settings, "threads": threads})
        except _WorkerError:
            self.close()
            raise

    def exchange(self, said: Mapping[str, Any]) -> dict[str, Any]:
        """What the worker answers; `_WorkerError` says why there is no answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps(said), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise _WorkerError(self._end())
        answer = json.loads(line)
        if "error" in answer:
            raise _WorkerError(answer["error"])
        return answer

    def close(self) -> None:
        """Ends the process."""
        self.is_alive = False
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._told):
            assert file is not None
            with contextlib.suppress(OSError):
                file.close()

    def _end(self) -> str:
        self.is_alive = False
        code = self._process.wait()
        self._told.seek(0)
        lines = [line.strip() for line in self._told if line.strip()]
        return " ".join([f"its process ended with code {code}", *(f"({x})" for x in lines[-1:])])


class Workers:
    """The processes of all engines, each started when it is first asked; a context.

    Attributes:
      skipped: engines and programs that do not run, each with its reason.

    Args:
      settings: of every engine, as its worker reads them.
      threads: of each; they run on the same cores, one at a time.
      skipped: what is known not to run before any is started.
    """

    def __init__(
        self, settings: Mapping[str, Mapping[str, Any]], threads: int, skipped: Mapping[str, str]
    ):
        self.skipped = dict(skipped)
        self._settings = settings
        self._threads = threads
        self._workers: dict[str, _Worker] = {}

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self._workers.values():
            worker.close()

    def ask(
        self, program: Program, tokens: list[int], max_new_tokens: int
    ) -> peer_protocol.Answer | None:
        """A program's answer; None, and its reason in `skipped`, where there is none."""
        if program.engine in self.skipped or str(program) in self.skipped:
            return None
        request = peer_protocol.Request(tokens, program.method, max_new_tokens)
        worker = self._workers.get(program.engine)
        try:
            if worker is None:
                engine, settings = ENGINES[program.engine], self._settings[program.engine]
                worker = _Worker(engine, settings, self._threads)
                self._workers[program.engine] = worker
            time.sleep(_SETTLING_SECONDS)
            return peer_protocol.Answer(**worker.exchange(dataclasses.asdict(request)))
        except _WorkerError as error:
            # A method that was refused leaves the others.
            lives = worker is not None and worker.is_alive
            self.skipped[str(program) if lives else program.engine] = str(error)
            return None


def _is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@contextlib.contextmanager
def _on(cores: Sequence[int]) -> Iterator[None]:
    """A block in which a process that is started runs on some cores only; all for none."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
