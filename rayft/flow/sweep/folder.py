"""The output folder of a sweep: its files, the sweep that it belongs to, and damaged results in it.

The first line of `config.yaml` (the stamp) holds a hash of the configuration. A sweep continues in a folder
with its own stamp, and is refused in a folder with another one. Damaged results are found before anything
starts: they are deleted and made again, and each is reported.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rayft.analysis.record import SweepAnalysis
from rayft.artifacts import META_FILE, check_replaceable
from rayft.artifacts.folder import FILES, is_staged_folder
from rayft.config import content_hash, leaves, load
from rayft.errors import ArtifactError, ConfigError, DiskFullError, ReportError, ResourceError
from rayft.files import is_staged_file, write_file
from rayft.flow.config import IDENTITY_FILE, STAMP_FILE, PipelineConfig, beginning, load_config
from rayft.flow.hold import LOCK_FILE
from rayft.flow.sweep.identity import begins, write_identity
from rayft.identity import Identity
from rayft.paths import PathText, reason
from rayft.report.evaluations import FOLDER as EVALUATIONS
from rayft.report.record import SweepRecord
from rayft.sweep.decisions import EVENTS_FILE
from rayft.sweep.result import RESULT_FILE, damage, discard, trial_folder
from rayft.sweep.space import Point
from rayft.train.checkpoint_folder import last_step

__all__ = [
    "RECORD_FILE",
    "STAMP_FILE",
    "WRITTEN",
    "check_own",
    "check_stamp",
    "clear_folder",
    "discard_damaged",
    "former_hash",
    "is_sweep",
    "known_keys",
    "make_folder",
    "stamp_line",
    "sweep_above",
    "sweep_hash",
]

RECORD_FILE = "sweep.json"
WRITTEN = (
    STAMP_FILE, IDENTITY_FILE, EVENTS_FILE, "adapter", "analysed", "analysis.json", "deploy.yaml",
    EVALUATIONS, "plots", "ray", "report.html", "scores", "serve.yaml", "squeezed", RECORD_FILE, "trials",
    "winner",
)  # fmt: skip
"""Names of all that a sweep writes into its folder, besides the files of the tracker."""
_NAMES = "|".join(map(re.escape, WRITTEN))
OWN = re.compile(rf"({_NAMES}|artifacts|spool|mlflow\.db.*|\.lock|\.({_NAMES})[-.][\w-]+)")
"""Names in a sweep's folder that come from rayft: results, the tracker's files, and what an interrupted write
left behind."""
OWN_FOLDERS = ("trials", "squeezed", "scores")
"""Folders in which only the sweep writes."""
ELSEWHERE = ("output", "question", "serve", "tracking", "promote", "squeeze", "analyze")
"""Settings of where results go and what is done with them. They change no trial."""
HOW = {
    "sweep": ("lanes", "slots", "restarts", "silence_seconds", "hang_seconds"),
    "evaluate": ("checkpoint_seconds",),
    "scale": ("threads",),
}
"""Settings of how trials run. They change no result, so they may differ when a sweep continues."""
SHOWN = 3
"""How many changed settings a message names."""


def is_sweep(folder: Path) -> bool:
    """Return whether a folder is the output folder of a sweep, judged by its stamp."""
    stamp = folder / STAMP_FILE
    return stamp.is_file() and stamp.read_text(errors="replace", encoding="utf-8").startswith("# sweep ")


def stamp_line(config: PipelineConfig) -> str:
    """Return the stamp of a configuration: the first line of `config.yaml`, with its newline."""
    return f"# sweep {sweep_hash(config)}\n"


def sweep_hash(config: PipelineConfig) -> str:
    """Return a hash of the settings that decide the results of the trials.

    Settings of where results go (`ELSEWHERE`) and of how trials run (`HOW`) are left out.
    """
    return _hash(config, HOW)


def former_hash(config: PipelineConfig) -> str:
    """Return the hash by which rayft 0.1.0 identified a sweep, which included the settings in `HOW`."""
    return _hash(config, {})


def _hash(config: PipelineConfig, left_out: Mapping[str, tuple[str, ...]]) -> str:
    fields = PipelineConfig.model_fields
    same: dict[str, Any] = {
        name: "" if fields[name].annotation in (str, PathText | None) else fields[name].default
        for name in ELSEWHERE
    }
    for name, settings in left_out.items():
        section = getattr(config, name)
        defaults = {setting: type(section).model_fields[setting].default for setting in settings}
        same[name] = section.model_copy(update=defaults)
    return content_hash(config.model_copy(update=same))


def check_stamp(config: PipelineConfig, output: Path) -> PipelineConfig | None:
    """Check that a sweep may start or continue in a folder.

    Returns:
        The configuration with which rayft 0.1.0 started the sweep, since the hash of that version included
        the settings in `HOW`; None if a later version started it, or if it has not started yet.

    Raises:
        ConfigError: if the folder holds another sweep, files that no sweep wrote, or no readable stamp.
        ArtifactError: if one of its adapter folders holds a user's files.
    """
    stamp, begun = output / STAMP_FILE, None
    if not is_sweep(output):
        others = sorted(name for name in WRITTEN if os.path.lexists(output / name))
        if "trials" in others and {IDENTITY_FILE, RECORD_FILE} & {*others}:
            raise ConfigError(
                f"{stamp} is missing or damaged: its first line does not name a sweep, so the results beside "
                "it can't be told from those of another sweep. Nothing was changed. Restore it from a copy; "
                "or, if the results are of this very configuration, write "
                f"'{stamp_line(config).strip()}' into its first line; or choose another folder with --set "
                "output=…"
            )
        if others:
            raise ConfigError(
                f"{output} holds {', '.join(others)}, which no sweep of rayft wrote and this one would "
                "replace; choose another folder with --set output=…"
            )
    elif not _is_of(stamp, config):
        begun = _begun_by_0_1_0(stamp)
        if begun is None or sweep_hash(begun) != sweep_hash(config):
            raise ConfigError(_other_sweep(config, output))
    check_own(output)
    return begun


def _is_of(stamp: Path, config: PipelineConfig) -> bool:
    """Return whether a stamp file is of a sweep, whose paths may be written from another folder."""
    first = stamp.read_text(encoding="utf-8", errors="replace").partition("\n")[0] + "\n"
    if first == stamp_line(config):
        return True
    try:
        written, before = load(PipelineConfig, stamp), load_config(stamp)
    except ConfigError:
        return False
    return first == stamp_line(written) and sweep_hash(before.located()) == sweep_hash(config.located())


def _begun_by_0_1_0(stamp: Path) -> PipelineConfig | None:
    """Return the configuration in a stamp file that rayft 0.1.0 wrote; None if another version wrote it."""
    try:
        before = load_config(stamp)
    except ConfigError:
        return None
    first = stamp.read_text(encoding="utf-8").partition("\n")[0]
    return before if first == f"# sweep {former_hash(before)}" else None


def _other_sweep(config: PipelineConfig, output: Path) -> str:
    """Return why a sweep can't continue in a folder that has another stamp."""
    stamp = output / STAMP_FILE
    otherwise = "Nothing in it was changed. Choose another folder with --set output=…, or delete that one"
    try:
        before = load_config(stamp)
    except ConfigError as error:
        return (
            f"{output} holds a sweep whose configuration ({stamp}) this version of rayft can't read: {error}."
            f" {otherwise}"
        )
    before, config = before.located(), config.located()
    if sweep_hash(before) == sweep_hash(config):
        return (
            f"{output} holds this sweep as an earlier version of rayft made it, which identified trials "
            "in another way. It can be read as it is (rayft report, serve, squeeze, analyze), but not "
            f"continued. {otherwise}"
        )
    kind, other = ("a sweep" if one.method is None else "a run" for one in (before, config))
    if kind != other:
        return f"{output} holds {kind}, and this is {other}. {otherwise}"
    old, new = leaves(before), leaves(config)
    changed = [
        f"{name} was {old.get(name, 'not set')}, now {new.get(name, 'not set')}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
        and name.partition(".")[0] not in ELSEWHERE
        and name.partition(".")[2] not in HOW.get(name.partition(".")[0], ())
    ]
    more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
    return (
        f"{output} holds {kind} with another configuration ({stamp}): {'; '.join(changed[:SHOWN])}{more}. "
        f"{otherwise}"
    )


def known_keys(points: list[Point], begun: PipelineConfig | None, output: Path) -> list[Point]:
    """Return the points of a sweep, with the former keys where rayft 0.1.0 has started the trial.

    Args:
        points: of the sweep, with the keys of this version.
        begun: the configuration with which rayft 0.1.0 started the sweep; None if it did not.
        output: the sweep's folder.
    """
    if begun is None:
        return points
    seconds = {"checkpoint_seconds": begun.evaluate.checkpoint_seconds}
    found = []
    for point in points:
        then = point.run.model_copy(update={"evaluate": point.run.evaluate.model_copy(update=seconds)})
        key = f"{point.name}-{content_hash(then)[:6]}"
        found.append(replace(point, key=key) if trial_folder(output, key).is_dir() else point)
    return found


def make_folder(config: PipelineConfig, output: Path, identity: Identity, *, keep: bool) -> None:
    """Make a sweep's folder, and record its configuration and its data and base there.

    Args:
        config: the sweep's.
        output: its folder.
        identity: of its data and base.
        keep: whether a recorded configuration stays, because the keys of its trials follow from it.

    Raises:
        ResourceError: if the folder can't be written; DiskFullError if its disk is full.
    """
    stamp = output / STAMP_FILE
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not keep:
            lines = stamp_line(config) + beginning(output)
            write_file(stamp, lines + config.model_dump_json(indent=2) + "\n")
        if begins(output, identity):
            _delete_unfinished(output)
        write_identity(output, identity)
    except DiskFullError:
        raise
    except OSError as error:
        raise ResourceError(
            f"can't write to {output} ({reason(error, stamp)}); choose another folder with --set output=…"
        ) from error


def _delete_unfinished(output: Path) -> None:
    """Delete what trials on other data, or another base, have left that would be taken for these trials' own.

    None of them has left a checkpoint or a result. But the search would repeat its decisions about them, and
    an analysis would find the adapters of their evaluations.
    """
    (output / EVENTS_FILE).unlink(missing_ok=True)
    for trail in output.glob("trials/*/trail"):
        shutil.rmtree(trail)


def sweep_above(folder: Path) -> Path | None:
    """Return the folder of the sweep that a folder is or lies in; None if there is none."""
    place = folder.resolve()
    return next((above for above in (place, *place.parents) if is_sweep(above)), None)


def clear_folder(output: Path) -> None:
    """Delete everything that a sweep left in its folder, whatever its settings.

    The caller holds the folder (`rayft.flow.hold`).

    Args:
        output: the folder.

    Raises:
        ConfigError: if the folder holds anything that rayft did not write.
        ArtifactError: if one of its adapter folders holds a user's files.
    """
    others = sorted(path.name for path in output.iterdir() if not OWN.fullmatch(path.name))
    if others:
        raise ConfigError(
            f"{output} holds {', '.join(others)}, which rayft did not write and would have to delete; move "
            "that away, or choose another folder with --set output=…"
        )
    check_own(output)
    for path in output.iterdir():
        if path.name == LOCK_FILE:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def check_own(output: Path) -> None:
    """Check that the adapter folders which a sweep would write again hold no files of a user.

    Raises:
        ArtifactError: naming the folder and the files.
    """
    for place in _derived_adapters(output):
        if _unreadable(place):
            continue
        try:
            check_replaceable(place)
        except ArtifactError as error:
            raise ArtifactError(
                f"{error}. If this sweep made that folder, delete it: the sweep makes it again"
            ) from None


def discard_damaged(output: Path, points: Sequence[Point]) -> list[str]:
    """Delete the damaged results of a sweep, which it then makes again.

    Files that a killed process was still writing are deleted too, without a report.

    Args:
        output: the sweep's folder.
        points: the trials of the sweep.

    Returns:
        A sentence for each damaged result.
    """
    reports = []
    _delete_staged(output)
    for point in points:
        folder = trial_folder(output, point.key)
        problem = damage(folder)
        if problem:
            step = last_step(folder / "checkpoint")
            where = f"from its checkpoint at step {step}" if step else "from the start"
            reports.append(f"{point.name} is trained again {where}: {problem}")
        if problem or not (folder / RESULT_FILE).is_file():
            discard(folder)
    for place in _derived_adapters(output):
        if _unreadable(place):
            shutil.rmtree(place)
            reports.append(f"{place} is made again: its {META_FILE} is damaged")
    try:
        SweepAnalysis.find(output)
    except ReportError as error:
        reports.append(f"the report is made without the earlier analysis: {error}")
    if (output / RECORD_FILE).is_file():
        try:
            SweepRecord.load(output)
        except ReportError:
            reports.append(f"{output / RECORD_FILE} is damaged, or of another version, and is written again")
    return reports


def _delete_staged(output: Path) -> None:
    """Delete files and folders that a killed process was still writing."""
    for path in [*output.glob(".*"), *(path for name in OWN_FOLDERS for path in (output / name).rglob(".*"))]:
        if is_staged_file(path):
            path.unlink()
        elif is_staged_folder(path):
            shutil.rmtree(path)


def _derived_adapters(output: Path) -> list[Path]:
    """Return the adapter folders that are derived from trials: the winner, a single run's, squeezed ones."""
    squeezed = {path.parent for path in (output / "squeezed").rglob("*") if path.name in FILES}
    return [output / "winner", output / "adapter", *sorted(squeezed)]


def _unreadable(place: Path) -> bool:
    """Return whether a folder has the files of an adapter of rayft's, but an unreadable `rayft.json`."""
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
