"""What the best evaluation of a run has left, while the run trains on: on the CPU, and in its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rayft.errors import ArtifactError, TrainError
from rayft.peft.folder import Artifact, load_adapter

__all__ = ["BEST", "Kept"]

BEST = "best"
"""Folder of a checkpoint with what the best evaluation before it has left."""
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Kept:
    """An adapter, or the weights of a whole model if the method trains that."""

    artifact: Artifact | None = None
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Parameter path → value."""

    def save(self, folder: Path) -> None:
        """Write the folder."""
        if self.artifact is not None:
            self.artifact.save(folder)
        else:
            folder.mkdir(parents=True)
            save_file(dict(self.weights), folder / WEIGHTS)

    @classmethod
    def load(cls, folder: Path) -> Kept:
        """Read a folder that `save` wrote.

        Raises:
            TrainError: if a file is missing or damaged.
        """
        try:
            if (folder / WEIGHTS).is_file():
                return cls(weights=load_file(folder / WEIGHTS))
            return cls(artifact=load_adapter(folder))
        except (OSError, SafetensorError, ArtifactError) as error:
            raise TrainError(f"{folder} can't be read ({error}); delete {folder.parents[1]}") from error
