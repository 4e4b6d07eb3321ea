"""What every binary shares: its common flags, progress, and ends in one line."""

import contextlib
import importlib.metadata
import json
import logging
import os
import pathlib
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import jax
from absl import flags
from absl import logging as absl_logging

from experiments import compilation, process
from specjax import native, verification

__all__ = [
    "Progress",
    "commit",
    "cores",
    "draft_length",
    "folder",
    "given",
    "machine",
    "parse_flags",
    "report",
    "start",
    "takes",
    "versions",
]

MODEL = flags.DEFINE_string(
    "model", "smollm2-135m", "Checkpoint: a name, GGUF file, folder, Hugging Face id, or `tiny`."
)
DRAFT = flags.DEFINE_string(
    "draft",
    None,
    "Draft model: layers:N (default layers:12), the target's first, a checkpoint, or, with "
    "--method=draft, a file that experiments.distill made.",
)
DRAFT_LENGTH = flags.DEFINE_string(
    "draft_length", None, "Tokens drafted a step, or `auto` where a binary takes it."
)
STOP = flags.DEFINE_string(
    "stop",
    None,
    "How unsure a draft model stops: maximum:P, its largest probability below P, entropy:H, above "
    "H nats, or never; by default as was found best for it.",
)
RULE = flags.DEFINE_string(
    "rule", None, f"One of: {', '.join(verification.RULES)}; default by binary."
)
MAX_NEW_TOKENS = flags.DEFINE_integer(
    "max_new_tokens", None, "Longest answer, in tokens; default by binary."
)
TEMPERATURE = flags.DEFINE_float("temperature", None, "0 is greedy; default by binary.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the requests' keys.")
BATCH = flags.DEFINE_integer("batch", None, "Rows decoded or verified together.")
BATCHES = flags.DEFINE_list("batches", [], "Rows decoded together, several sizes.")
REPEATS = flags.DEFINE_integer("repeats", None, "Timed runs of each; default by binary.")
METHOD = flags.DEFINE_string("method", None, "A decoding method's name; default by binary.")
METHODS = flags.DEFINE_multi_string(
    "methods",
    [],
    "A decoding method with settings, as in `draft draft_length=3 rule=match`; may be given again.",
)
COMPARE = flags.DEFINE_bool("compare", False, "Also decode plainly, and compare.")
PROMPTS = flags.DEFINE_multi_string(
    "prompts", [], "JSON lines with `turns` (and `group`); may be given again; default built-in."
)
LOG = flags.DEFINE_multi_string(
    "log", [], "JSON lines of traffic, as the binary tells; may be given again."
)
COUNT = flags.DEFINE_integer("count", None, "Prompts, spread evenly; default by binary.")
LONGEST = flags.DEFINE_integer(
    "longest_prompt", None, "Longer prompts, in tokens, are left out; default by binary."
)
OUT = flags.DEFINE_string("out", None, "The file to write; default by binary.")
FOLDER = flags.DEFINE_string("folder", None, "Where data, checkpoints and results go.")
DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16", "float16"], "Of a model's passes."
)
REPORT = flags.DEFINE_string("report", None, "A Markdown file to write the tables to.")
PLOTS = flags.DEFINE_string("plots", None, "A folder to draw pictures in (extra `plots`).")
TOKENS = flags.DEFINE_integer("tokens", None, "Answer tokens that the target writes.")
DOMAINS = flags.DEFINE_list("domains", None, "Domains of training data; default by binary.")
FILES = flags.DEFINE_list("files", [], "Text files of your own.")
STEPS = flags.DEFINE_integer("steps", None, "Updates of the draft; default by binary.")
RATE = flags.DEFINE_float("rate", None, "Highest learning rate; default by binary.")
BATCH_TOKENS = flags.DEFINE_integer("batch_tokens", 4096, "Tokens an update, with padding.")
JSON = flags.DEFINE_bool("json", False, "End with one JSON object on the last line.")
COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache",
    None,
    "Directory of compiled programs, empty for none; by default JAX_COMPILATION_CACHE_DIR, or "
    "`programs` beside the fetched models.",
)
# What every binary takes that trains a draft.
OF_TRAINING = (FOLDER, TOKENS, DOMAINS, BATCH, STEPS, RATE, BATCH_TOKENS, DRAFT_LENGTH)
_SHARED = [value for value in list(globals().values()) if isinstance(value, flags.FlagHolder)]
# Flags that `takes` declares are its caller's.
flags.disclaim_key_flags()


def folder() -> str:
    """The flag --folder, which must be given.

    Raises:
      ValueError: it was not.
    """
    if FOLDER.value is None:
        raise ValueError("give --folder, where data, checkpoints and results go")
    return FOLDER.value


def given(flag: flags.FlagHolder, default: Any) -> Any:
    """A flag's value, or the binary's own default where it was not given."""
    return default if flag.value is None else flag.value


def draft_length(auto: bool = False) -> int | str | None:
    """The flag --draft_length: a number, None where it was not given, or `auto` if that is taken.

    Raises:
      ValueError: anything else.
    """
    value = DRAFT_LENGTH.value
    if value is None or (auto and value == "auto"):
        return value
    try:
        return int(value)
    except ValueError:
        wish = "a whole number or `auto`" if auto else "a whole number"
        raise ValueError(f"--draft_length={value!r} must be {wish}") from None


def draft_length_or(default: int) -> int:
    """The flag --draft_length as a number; ValueError for anything else."""
    value = draft_length()
    return default if value is None else int(value)


def takes(*used: flags.FlagHolder) -> frozenset[str]:
    """The flags of those above that a binary takes, for its help and for `report`.

    The model, the seed, and what says how to run and to report go without saying.
    """
    names = frozenset(flag.name for flag in (*used, MODEL, SEED, JSON, COMPILATION_CACHE))
    for name in sorted(names):
        flags.declare_key_flag(name)
    return names


def _refuse_others(taken: frozenset[str]) -> None:
    """A flag that a binary has no use for is not passed over in silence."""
    for flag in _SHARED:
        if flag.present and flag.name not in taken:
            raise ValueError(f"--{flag.name} means nothing to this command")


class Progress:
    """Says on standard error what takes long, and how long it took."""

    def __init__(self, what: str):
        self.what = what
        self._tenth = 0
        self._first: tuple[int, float] | None = None

    def __enter__(self):
        self.began = time.perf_counter()
        print(f"{self.what} …", end="", file=sys.stderr, flush=True)
        return self

    def say(self, what: str) -> None:
        """Says what is being done that takes long without an end to be seen."""
        print(f" {what} …", end="", file=sys.stderr, flush=True)

    def expect(self, seconds: float) -> None:
        """Says how much longer it may take."""
        self.say(f"about {seconds:.0f} s more")

    def at(self, done: int, all_of_them: int) -> None:
        """Says, past every tenth, how far it has come and how much longer it may take."""
        now, tenth = time.perf_counter(), 10 * done // all_of_them
        # What comes first compiles for all that follow.
        before, since = self._first or (0, self.began)
        if self._first is None and done:
            self._first = (done, now)
        if tenth > self._tenth and done < all_of_them:
            self._tenth = tenth
            left = (now - since) * (all_of_them - done) / (done - before)
            print(f" {100 * done // all_of_them} %", end="", file=sys.stderr, flush=True)
            self.expect(left)

    def __exit__(self, *exception):
        self.seconds = time.perf_counter() - self.began
        ended = " stopped" if exception[0] is KeyboardInterrupt else " failed"
        told = f" {self.seconds:.1f} s" if exception[0] is None else ended
        print(told, file=sys.stderr, flush=True)


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags, and returns what is left; a bad one ends as every bad input does."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        _fail(error)


def report(
    argv: list[str],
    run: Callable[[], dict[str, Any]],
    table: Callable[[dict[str, Any]], str],
    taken: frozenset[str],
) -> None:
    """Runs a binary and prints its report; bad input ends in one line and exit code 2.

    A report with `passed`, false, ends with exit code 1.

    Args:
      argv: what the flags left: the program's name.
      run: reads the flags and returns the report, ready for JSON.
      table: the report for people.
      taken: of `takes`; other flags that all binaries know are refused.
    """
    # jax tells which accelerators it did not find.
    logging.getLogger("jax").setLevel(logging.WARNING)
    # Orbax tells every file that it writes.
    absl_logging.set_verbosity(absl_logging.WARNING)
    # The line of code that warns says nothing to those who call a binary.
    warnings.formatwarning = lambda message, *_, **__: f"\nwarning: {message}\n"
    try:
        if len(argv) > 1:
            raise ValueError(f"unexpected argument {argv[1]!r}; every option is a flag")
        _refuse_others(taken)
        made = run()
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        _fail(error)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    print(f"\n{table(made)}", file=sys.stderr if JSON.value else sys.stdout, flush=True)
    if JSON.value:
        print(json.dumps(made, allow_nan=False))
    if not made.get("passed", True):
        sys.exit(1)


def start() -> float:
    """What comes before the first program is compiled; the seconds that native kernels took."""
    process.keep_memory()
    # A notebook or a script calls a binary's functions without flags.
    compilation.keep_programs(COMPILATION_CACHE.value if flags.FLAGS.is_parsed() else None)
    began = time.perf_counter()
    native.available()
    return time.perf_counter() - began


def versions() -> dict[str, str | None]:
    """Versions that a measurement depends on; specjax is None in a checkout not installed."""
    try:
        own = importlib.metadata.version("specjax")
    except importlib.metadata.PackageNotFoundError:
        own = None
    return {
        "specjax": own,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
    }


def commit() -> str | None:
    """The checkout's commit, with + where files differ from it; None outside of one."""
    folder = pathlib.Path(__file__).parent

    def git(*words: str) -> str:
        told = subprocess.run(
            ["git", *words], cwd=folder, capture_output=True, text=True, check=True
        )
        return told.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", ".", "../specjax")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def machine() -> str:
    """The processor and how many of its cores this process may use, as far as they can be told."""
    names = [platform.processor() or platform.machine()]
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{next(iter(names), platform.machine())}, {cores()} cores"


def cores() -> int:
    """How many this process may use."""
    # Of Linux alone.
    allowed = getattr(os, "sched_getaffinity", None)
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def _fail(error: Exception) -> NoReturn:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)
