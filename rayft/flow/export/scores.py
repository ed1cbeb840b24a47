"""The scores of an adapter, from the record of the sweep that made it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rayft.artifacts import AdapterArtifact
from rayft.errors import ArtifactError, ReportError
from rayft.flow.export.source import Source
from rayft.flow.sweep.folder import is_sweep, sweep_above
from rayft.report.record import Score, Squeezed, SweepRecord, TrialRecord

__all__ = ["Scores", "find_scores", "sweep_of"]


@dataclass(frozen=True)
class Scores:
    """What a sweep recorded about an adapter."""

    record: SweepRecord
    trial: TrialRecord
    """The trial that trained it, or that it was squeezed from."""
    val: float | None
    """Score on the validation part."""
    test: Score | None
    """Score on the test part."""


def sweep_of(source: Source, given: Path | None) -> Path | None:
    """Return the folder of the sweep that made an adapter: the given one, or the one that it lies in.

    Raises:
        ReportError: if the given folder is no sweep's.
    """
    if given is not None:
        if not is_sweep(given):
            raise ReportError(f"{given} is no folder of a sweep; give the one that `rayft sweep` wrote")
        return given
    return sweep_above(source.folder) if source.folder is not None else None


def find_scores(source: Source, sweep: Path | None) -> Scores | None:
    """Return the recorded scores of an adapter, or None if the sweep has no record of it.

    The adapter is found by its folder, or else by its content.
    """
    if sweep is None:
        return None
    try:
        record = SweepRecord.load(sweep)
    except ReportError:
        return None
    items = [(Path(folder), item) for folder, item in _items(record, sweep)]
    place = source.folder.resolve() if source.folder is not None else None
    found = next((item for folder, item in items if folder.resolve() == place), None)
    found = found or next((item for folder, item in items if _same(folder, source.artifact)), None)
    if found is None:
        return None
    trials = {trial.id: trial for trial in record.trials}
    trial = found if isinstance(found, TrialRecord) else trials[found.trial]
    return Scores(record, trial, found.val_score, found.test)


def _items(record: SweepRecord, sweep: Path) -> Iterator[tuple[str, TrialRecord | Squeezed]]:
    """Yield each adapter of a sweep: its folder, and its record."""
    for trial in record.trials:
        if trial.folder:
            yield trial.folder, trial
        if record.winner is not None and record.winner.trial == trial.id:
            # The winner at its full rank, with its columns sorted by singular value.
            yield str(sweep / "winner"), trial
    for item in record.squeezed:
        if item.folder:
            yield item.folder, item


def _same(folder: Path, artifact: AdapterArtifact) -> bool:
    try:
        return AdapterArtifact.load(folder).content_hash == artifact.content_hash
    except ArtifactError:
        return False
