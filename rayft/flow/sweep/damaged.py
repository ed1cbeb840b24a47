"""What is damaged in a sweep's folder, or was left half written by a process that was killed.

It is found before anything starts, deleted and made again; what held a result is named.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from rayft.analysis.record import SweepAnalysis
from rayft.artifacts import META_FILE, check_replaceable
from rayft.artifacts.folder import FILES, is_staged_folder
from rayft.errors import ArtifactError, ReportError
from rayft.files import is_staged_file
from rayft.report.record import SweepRecord
from rayft.sweep.result import RESULT_FILE, damage, discard
from rayft.sweep.space import Point
from rayft.train.checkpoint import last_step
from rayft.train.context import trial_folder

__all__ = ["check_own", "discard_damaged"]

RECORD_FILE = "sweep.json"
OWN_FOLDERS = ("trials", "squeezed", "scores")
"""Folders in which only the sweep writes."""


def discard_damaged(output: Path, points: Sequence[Point]) -> list[str]:
    """Delete what is damaged of a sweep's results and is made again; return a sentence for each.

    Args:
        output: the sweep's folder.
        points: the trials of the sweep.
    """
    said = []
    _delete_staged(output)
    for point in points:
        folder = trial_folder(output, point.key)
        problem = damage(folder)
        if problem:
            step = last_step(folder / "checkpoint")
            where = f"from its checkpoint at step {step}" if step else "from the start"
            said.append(f"{point.name} is trained again {where}: {problem}")
        if problem or not (folder / RESULT_FILE).is_file():
            discard(folder)
    for place in _adapters(output):
        if _unreadable(place):
            shutil.rmtree(place)
            said.append(f"{place} is made again: its {META_FILE} is damaged")
    try:
        SweepAnalysis.find(output)
    except ReportError as error:
        said.append(f"the report is made without the earlier analysis: {error}")
    if (output / RECORD_FILE).is_file():
        try:
            SweepRecord.load(output)
        except ReportError:
            said.append(f"{output / RECORD_FILE} is damaged, or of another version, and is written again")
    return said


def _delete_staged(output: Path) -> None:
    """Delete what processes that were killed had begun to write."""
    for path in [*output.glob(".*"), *(path for name in OWN_FOLDERS for path in (output / name).rglob(".*"))]:
        if is_staged_file(path):
            path.unlink()
        elif is_staged_folder(path):
            shutil.rmtree(path)


def check_own(output: Path) -> None:
    """Refuse to continue where something of a user's lies in what the sweep writes again.

    Raises:
        ArtifactError: naming it.
    """
    for place in _adapters(output):
        if _unreadable(place):
            continue
        try:
            check_replaceable(place)
        except ArtifactError as error:
            raise ArtifactError(
                f"{error}. If it is what this sweep made, delete it: it is made again"
            ) from None


def _adapters(output: Path) -> list[Path]:
    """List the adapter folders that a sweep makes of its trials'."""
    squeezed = {path.parent for path in (output / "squeezed").rglob("*") if path.name in FILES}
    return [output / "winner", *sorted(squeezed)]


def _unreadable(place: Path) -> bool:
    """Return whether a folder is an adapter of rayft's, by its files, whose `rayft.json` can't be read."""
    if not place.is_dir() or place.is_symlink():
        return False
    names = {path.name for path in place.iterdir()}
    if META_FILE not in names or not names <= FILES:
        return False
    try:
        check_replaceable(place)
    except ArtifactError:
        return True
    return False
