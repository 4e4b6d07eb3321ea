"""Checkpoints of training, by Orbax."""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as orbax

__all__ = ["Checkpoints"]


class Checkpoints:
    """The newest states of a training run, in a folder of their own.

    Args:
      folder: is made if need be.
      keep: how many states stay; older ones are removed.
    """

    def __init__(self, folder: pathlib.Path, keep: int = 2):
        self._folder = folder.absolute()
        self._manager = orbax.CheckpointManager(
            self._folder,
            options=orbax.CheckpointManagerOptions(
                max_to_keep=keep, create=True, enable_async_checkpointing=False
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self._manager.close()

    @property
    def newest(self) -> int | None:
        """The step of the newest state, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Keeps a pytree of arrays; it is whole on disk when this returns.

        Raises:
          ValueError: it could not be written, as on a full disk; older states stay.
        """
        if step == self.newest:
            return
        try:
            self._manager.save(step, args=orbax.args.StandardSave(state))
            self._manager.wait_until_finished()
        except Exception as error:
            raise ValueError(
                f"{self._folder}: the state of step {step} could not be saved ({error}); "
                f"step {self.newest} is the last one there"
            ) from error

    def restore(self, like: Any) -> Any:
        """The newest state, on the devices and with the shapes of `like`.

        Raises:
          ValueError: there is none, it is damaged, or of other shapes; the message names it.
        """
        step = self.newest
        if step is None:
            raise ValueError(f"{self._folder} holds no checkpoint")
        shapes = jax.tree.map(orbax.utils.to_shape_dtype_struct, like)
        try:
            return self._manager.restore(step, args=orbax.args.StandardRestore(shapes))
        except Exception as error:
            raise ValueError(
                f"{self._folder / str(step)} cannot be restored: {_line(error)}; remove that "
                "folder to go on from the one before, or train into another one"
            ) from error


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
