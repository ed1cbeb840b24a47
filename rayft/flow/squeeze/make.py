"""Squeeze an adapter: to which targets, from which source, and the adapters that result."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from rayft.artifacts import AdapterArtifact, folder_bytes
from rayft.config import content_hash
from rayft.identity import UNKNOWN, Identity
from rayft.squeeze.budget import parse_bytes
from rayft.squeeze.rank import Progress, retained_energy, squeeze
from rayft.squeeze.section import ContinueConfig, SqueezeConfig
from rayft.sweep.request import tracking_key
from rayft.train.run import RunConfig

__all__ = ["Source", "SqueezedAdapter", "Target", "make", "sort_columns", "targets"]


@dataclass(frozen=True)
class Target:
    """How far to squeeze: a rank, a share of energy, or a size."""

    rank: int | None = None
    energy: float | None = None
    budget: str | None = None

    @property
    def label(self) -> str:
        """Short name, which is also the folder's: `r8`, `e0.95`, `b1.5MB`."""
        if self.rank is not None:
            return f"r{self.rank}"
        return f"e{self.energy:g}" if self.energy is not None else f"b{str(self.budget).replace(' ', '')}"

    def apply(self, full: AdapterArtifact) -> AdapterArtifact:
        """Return an adapter cut down to this target.

        Args:
            full: an adapter whose columns are sorted by singular value.

        Raises:
            SqueezeError: if the target can't be met.
        """
        budget = None if self.budget is None else parse_bytes(self.budget)
        return squeeze(full, rank=self.rank, energy=self.energy, budget=budget)


@dataclass(frozen=True)
class Source:
    """What is squeezed: a trial, or an adapter folder from elsewhere."""

    name: str
    key: str
    """Key of its results, unique where they are kept and tracked."""
    run: RunConfig | None
    """Run that names its base and data, for scoring and further training; None if they are not known."""
    run_id: str = ""
    """Its tracked run; empty if there is none."""
    identity: Identity = UNKNOWN
    """Identity of that base and data; unknown without a `run`."""
    made_by: str = "sweep"
    """Command and source, with which its results are marked."""

    def maker(self, label: str, cont: ContinueConfig | None = None) -> str:
        """Return the mark of a result (`ArtifactMeta.made`): the command, its source and its target.

        Args:
            label: of the result.
            cont: how the result was trained further, if it was.
        """
        mark = f"{self.made_by} to {label}"
        if cont is None:
            return mark
        return f"{mark} by {content_hash(cont)} {self.run.hash if self.run else ''}".rstrip()

    def makers(self, targets: Sequence[Target], cont: ContinueConfig | None) -> dict[str, str]:
        """Return the name of each folder that may be written → the mark of its adapter.

        Args:
            targets: what is squeezed to.
            cont: how the results are trained further, if they are.
        """
        marks = {target.label: self.maker(target.label) for target in targets}
        if cont is not None:
            names = [f"{label}+{cont.steps}" for label in marks]
            marks |= {name: self.maker(name, cont) for name in names}
        return marks


@dataclass(frozen=True)
class SqueezedAdapter:
    """A source at a lower rank, saved in a folder."""

    name: str
    source: Source
    how: Literal["post", "cont"]
    """`post`: squeezed only; `cont`: squeezed, then trained further."""
    rank: int
    folder: Path
    parameters: int
    bytes: int
    energy: Mapping[str, float]
    """Module → share of the source's energy (squared Frobenius norm of its update) that it retains."""
    seconds: float
    """Seconds that squeezing and further training took."""
    val_loss: float | None = None

    @property
    def key(self) -> str:
        """Key of its results, unique where they are kept."""
        return f"{self.source.key}@{self.label}"

    @property
    def tracked_as(self) -> str:
        """Key of its tracked run; scores on other data belong to another run."""
        return tracking_key(self.key, self.source.identity)

    @property
    def energy_mean(self) -> float:
        """Share of energy that is retained, as the mean over modules."""
        return sum(self.energy.values()) / len(self.energy)

    @property
    def energy_min(self) -> float:
        """Share of energy that is retained in the module that retains least."""
        return min(self.energy.values())

    @property
    def label(self) -> str:
        """What follows the source's name, such as `r8`."""
        return self.name.rpartition("@")[2]


def targets(config: SqueezeConfig, rank: int | None) -> list[Target]:
    """Return the targets that a configuration asks for.

    Args:
        config: the configuration.
        rank: of the source, whose own and higher ranks are left out. None for a source without factors,
            of which every rank is left in.
    """
    found = [Target(rank=target) for target in config.ranks if rank is None or target < rank]
    if config.energy is not None:
        found.append(Target(energy=config.energy))
    if config.budget is not None:
        found.append(Target(budget=config.budget))
    return found


def make(full: AdapterArtifact, target: Target, source: Source, folder: Path) -> SqueezedAdapter:
    """Squeeze an adapter to a target and save it in `folder`/<label>, with the mark of its source.

    Args:
        full: the adapter, with its columns sorted by singular value.
        target: how far to squeeze it.
        source: where it comes from.
        folder: for the results.

    Raises:
        SqueezeError: if the target can't be met. Nothing is written then.
        ArtifactError, ResourceError: as `AdapterArtifact.save`.
    """
    started = time.perf_counter()
    small = _marked(target.apply(full), source.maker(target.label))
    # Lanes, which score it, have other working directories.
    path = small.save((folder / target.label).absolute())
    return SqueezedAdapter(
        name=f"{source.name}@{target.label}",
        source=source,
        how="post",
        rank=small.rank,
        folder=path,
        parameters=small.parameters,
        bytes=folder_bytes(path),
        energy=retained_energy(small),
        seconds=time.perf_counter() - started,
    )


def sort_columns(
    folder: str | Path, out: Path, progress: Progress | None = None, *, made: str = "sweep"
) -> AdapterArtifact:
    """Sort the columns of an adapter by singular value, at its full rank; save the result and return it.

    Args:
        folder: of the adapter.
        out: folder for the result.
        progress: called with the number of modules that have been finished since its last call.
        made: mark of the result.
    """
    full = _marked(squeeze(AdapterArtifact.load(folder), progress=progress), made)
    full.save(out)
    return full


def _marked(artifact: AdapterArtifact, made: str) -> AdapterArtifact:
    return replace(artifact, meta=artifact.meta.model_copy(update={"made": made}))
