"""Texts and what was recorded of them, in folders of memory-mapped arrays.

A shard is a folder that appears whole or not at all; a summary beside its arrays names each with
its checksum, so that a damaged one is found before anything is trained on it.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["ARRAYS", "Shard", "ShardError", "read", "write"]

_SUMMARY = "shard.json"
# The first rows of every shard are held out, one of so many; answers to one prompt stay together.
_HELD_OUT = 16
_TOGETHER = 4


class ShardError(ValueError):
    """A shard could not be written or cannot be read; the message names it and the remedy."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """Conversations of one domain.

    What is large is memory-mapped when it is asked for, and not kept open: files that a process may
    have open are few.

    n conversations, t tokens in all, m of them answers. The answers' recorded laws stand in order:
    row r of `features` belongs to the r-th answer token of the shard.

    Attributes:
      folder: where it lies.
      domain: what its prompts are.
      offsets: int64[n+1]; conversation i is `tokens[offsets[i]:offsets[i+1]]`.
      prompts: int32[n], length of the prompt at its beginning; the rest is the answer.
      temperature: float32[n], at which the answer was drawn; 0 is greedy.
      tokens: int32[t].
      normalizer: float32[m]; the final norm's output times the head, less this, is the law, as
        far as both products are rounded alike.
    """

    folder: pathlib.Path
    domain: str
    offsets: np.ndarray
    prompts: np.ndarray
    temperature: np.ndarray
    tokens: np.ndarray
    normalizer: np.ndarray

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def features(self) -> np.ndarray:
        """float16[m, taps, H], hidden states at the token before; mapped anew."""
        return self._mapped("features")

    @property
    def top_tokens(self) -> np.ndarray:
        """int32[m, k], the most probable tokens, falling; mapped anew."""
        return self._mapped("top_tokens")

    @property
    def top_log_probs(self) -> np.ndarray:
        """float32[m, k], their natural logs; mapped anew."""
        return self._mapped("top_log_probs")

    def _mapped(self, name: str) -> np.ndarray:
        return np.load(self.folder / f"{name}.npy", mmap_mode="r")

    @property
    def answer_tokens(self) -> int:
        """How many tokens the target wrote."""
        return len(self.normalizer)

    @property
    def answer_offsets(self) -> np.ndarray:
        """int64[n+1]; the recorded rows of conversation i are offsets[i]:offsets[i+1]."""
        lengths = np.diff(self.offsets) - self.prompts
        return np.concatenate([[0], np.cumsum(lengths)])

    def rows(self, unseen: bool | None) -> range:
        """The conversations that are held out (True), those to train on, or all (None)."""
        if unseen is None:
            return range(len(self))
        count = max(len(self) // _HELD_OUT // _TOGETHER * _TOGETHER, min(_TOGETHER, len(self) // 2))
        return range(count) if unseen else range(count, len(self))

    def text(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Prompt and answer of a conversation, int32 each."""
        begin, end = self.offsets[index : index + 2]
        middle = begin + self.prompts[index]
        return self.tokens[begin:middle], self.tokens[middle:end]


_HELD = ("offsets", "prompts", "temperature", "tokens", "normalizer")
ARRAYS = (*_HELD, "features", "top_tokens", "top_log_probs")


def write(folder: pathlib.Path, domain: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a shard, whole or not at all.

    Args:
      folder: to be made; its parent exists.
      domain: of its prompts.
      arrays: every array of a `Shard`.

    Raises:
      ShardError: it cannot be written, as on a full disk; nothing of it is left.
    """
    assert sorted(arrays) == sorted(ARRAYS), sorted(arrays)
    part = folder.with_name(folder.name + ".part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        summary: dict[str, Any] = {"domain": domain, "arrays": {}}
        for name, array in arrays.items():
            path = part / f"{name}.npy"
            with path.open("wb") as file:
                np.save(file, array)
            summary["arrays"][name] = _checksum(path)
        (part / _SUMMARY).write_text(json.dumps(summary, indent=1), encoding="utf-8")
        os.replace(part, folder)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        size = sum(array.nbytes for array in arrays.values())
        raise ShardError(
            f"{folder}: {size / 1e6:.0f} MB could not be written ({error}); the shards before it "
            "are whole, so make room and run the same command again"
        ) from error


def read(folder: pathlib.Path) -> Shard:
    """Opens a shard, after checking that every array is what was written.

    Raises:
      ShardError: something is missing or damaged; the message names the file.
    """
    remedy = "remove the folder and run the command that made it again"
    try:
        summary = json.loads((folder / _SUMMARY).read_text(encoding="utf-8"))
        for name in ARRAYS:
            path = folder / f"{name}.npy"
            if _checksum(path) != summary["arrays"][name]:
                raise ShardError(f"{path} is damaged: it is not what was written; {remedy}")
        held = {name: np.load(folder / f"{name}.npy") for name in _HELD}
        return Shard(folder, summary["domain"], **held)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ShardError):
            raise
        raise ShardError(f"{folder} is no whole shard ({error!r}); {remedy}") from error


def _checksum(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
