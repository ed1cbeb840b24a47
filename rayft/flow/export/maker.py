"""What the sweep or run that made an adapter says about it: its scores, and how it loaded the base."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rayft.artifacts import AdapterArtifact
from rayft.errors import ArtifactError, ConfigError, ReportError
from rayft.flow.config import load_train_config
from rayft.flow.export.source import Source
from rayft.flow.sweep.folder import RECORD_FILE, STAMP_FILE, is_sweep, sweep_above
from rayft.report.record import Score, Squeezed, SweepRecord, TrialRecord

__all__ = ["Maker", "Scores", "find_maker", "find_scores"]


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


@dataclass(frozen=True)
class Maker:
    """What is known of the sweep or run that made an adapter."""

    name: str = ""
    """Its name; empty if it is not known. In its folder, adapters are called `winner`, `adapter` or `r8`."""
    scores: Scores | None = None
    quantised: str = ""
    """How it quantised the base; empty if it did not, or is not known."""
    notes: tuple[str, ...] = ()
    """What could not be read, and what that means for the export."""


def find_maker(source: Source, given: Path | None, *, scored: bool, merging: bool) -> Maker:
    """Return what is known of the sweep that made an adapter: the given one, or the one that it lies in.

    Args:
        source: the adapter.
        given: folder of the sweep.
        scored: whether its scores are wanted.
        merging: whether the adapter is merged, so that it matters how the sweep loaded the base.

    Raises:
        ReportError: if scores are wanted of the given sweep, and its record can't be read.
    """
    folder = given or (sweep_above(source.folder) if source.folder is not None else None)
    if folder is None:
        damaged = _without_stamp(source.folder) if source.folder is not None and (scored or merging) else None
        if damaged is None:
            return Maker()
        note = (
            f"{damaged / STAMP_FILE} is missing or damaged, so what the sweep of {damaged} knows of the "
            "adapter was not used"
        )
        return Maker(notes=(note,))
    name, quantised, scores, notes = "", "", None, []
    try:
        settings = load_train_config(folder / STAMP_FILE)
        name, quantised = settings.name, settings.model.quantize or ""
    except ConfigError as error:
        # An older release may have written it. The export itself needs none.
        if merging:
            why = "; ".join(str(error).splitlines())
            notes.append(
                f"whether it was trained on a quantised base is not known, because {folder / STAMP_FILE} "
                f"can't be read ({why}); if it was, score the merged model before you use it"
            )
    # A run that `rayft train` has trained has no record.
    if scored and (given is not None or (folder / RECORD_FILE).is_file()):
        try:
            scores = find_scores(source, folder)
        except ReportError as error:
            if given is not None:
                raise
            notes.append(f"the card has no scores of the sweep: {error}")
        else:
            if scores is None:
                notes.append(f"the card has no scores of the sweep: {folder} has no record of this adapter")
    return Maker(scores.record.name if scores is not None else name, scores, quantised, tuple(notes))


def find_scores(source: Source, sweep: Path) -> Scores | None:
    """Return the recorded scores of an adapter, or None if the sweep has no record of it.

    The whole adapter is found by its folder, or else by its content; a lower rank by its content alone.

    Raises:
        ReportError: if the sweep's record is missing or damaged.
    """
    record = SweepRecord.load(sweep)
    items = [(Path(folder), item) for folder, item in _items(record, sweep)]
    place = source.folder.resolve() if source.folder is not None and source.whole else None
    found = next((item for folder, item in items if folder.resolve() == place), None)
    found = found or next((item for folder, item in items if _same(folder, source.artifact)), None)
    if found is None:
        return None
    trials = {trial.id: trial for trial in record.trials}
    trial = found if isinstance(found, TrialRecord) else trials[found.trial]
    return Scores(record, trial, found.val_score, found.test)


def _without_stamp(folder: Path) -> Path | None:
    """Return the folder above that holds a sweep's record, but no readable stamp."""
    place = folder.resolve()
    return next((above for above in place.parents if _is_lost(above)), None)


def _is_lost(folder: Path) -> bool:
    return (folder / RECORD_FILE).is_file() and not is_sweep(folder)


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
