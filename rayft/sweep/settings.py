"""What lanes are told when they start. This module imports neither torch nor Ray (see `launcher`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Group", "HomeNode", "LaneSettings"]


@dataclass(frozen=True)
class HomeNode:
    """How a lane finds out whether it sees the disk of the node on which the command runs."""

    node: str
    """Id of the Ray node."""
    mark: str
    """A file that exists as long as the command runs: a worker that sees the file sees that disk."""
    launcher: Any
    """Handle of the launcher, whose `file_host` serves files to workers that do not see the disk."""


@dataclass(frozen=True)
class LaneSettings:
    """What the workers of a lane are told when they start."""

    name: str
    broker: Any
    """Handle of the broker actor."""
    home: HomeNode
    """Where the command's files are."""
    slots: int | None = 1
    """The most trials that share the lane's steps; None if the lane finds out how many are fastest."""
    once: bool = False
    """Whether the lane ends when there is no job left for it, instead of waiting for more (isolated
    trials)."""


@dataclass(frozen=True)
class Group:
    """The Ray resources of a lane."""

    workers: int
    cuda: bool
    resources: Mapping[str, float]
    """Resources of each worker."""
    storage: str
    """Folder in which Ray Train keeps its files."""
