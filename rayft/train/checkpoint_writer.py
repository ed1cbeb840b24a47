"""Write DeepSpeed's checkpoint files: synced to disk, with errors raised after all workers are done.

DeepSpeed exchanges messages between its writes, so a worker that raised at a failed write would leave the
others waiting. `torch.save` hides the system's error if it is given a path, but not if it is given an open
file.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

__all__ = ["CheckpointWriter"]


class CheckpointWriter(TorchCheckpointEngine):  # type: ignore[misc]
    """DeepSpeed's own writer, except that it keeps the first error and writes nothing after it."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._error: Exception | None = None

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Create a folder."""
        try:
            if self._error is None:
                os.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self._error = error

    def save(self, state_dict: Any, path: str) -> None:
        """Write a file and sync it."""
        try:
            if self._error is None:
                with open(path, "wb") as file:
                    torch.save(state_dict, file, _use_new_zipfile_serialization=self.zipfile_serialization)
                    file.flush()
                    os.fsync(file.fileno())
        except Exception as error:  # noqa: BLE001  (`check` raises it)
            self._error = error

    def check(self) -> None:
        """Raise the first error since the last call, if there was one."""
        error, self._error = self._error, None
        if error is not None:
            raise error
