"""`rayft cache`: list what rayft keeps on this machine, bound its size, and delete it.

    <cache>/data/<key>/           prepared data; the process that prepares it holds the lock <key>.lock
    <cache>/data/.<key>.<…>/      the same, unfinished
    <cache>/models/<name>/        a converted model; the processes that use it hold a lock of the folder
    <cache>/models/.<name>-<…>/   the same, unfinished
    <cache>/hashes/<hash>.json    the hash of a large file
    <cache>/probes/<key>.json     how a kind of run uses a GPU best, or what was rehearsed
    <cache>/lanes/<lane>/         a lane's copies of files, on a node that does not share the home's disk
    <Triton's cache>/<key>/       a compiled kernel, of rayft or of another program
    <Inductor's cache>/…          what `torch.compile` has made, for rayft or another program

All of this can be made again. `RAYFT_CACHE` may be a folder that holds other files too, so only what has a
name that rayft gives is listed and deleted.

An entry is renamed before it is deleted. If the deletion is killed, what remains has a name that nobody
reads, and the next deletion removes it. Links are deleted, and not followed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex

from rayft.config import nearest
from rayft.data.prepared import MANIFEST
from rayft.errors import ConfigError, ResourceError
from rayft.files import ABANDONED_SECONDS, locked, machine
from rayft.models.files import unused
from rayft.models.load import REGISTERED, SIZES_FILE
from rayft.paths import reason
from rayft.report.text import ago_text
from rayft.sweep.transfer import STALE_SECONDS

__all__ = ["KINDS", "Entry", "Outcome", "delete_all", "entries", "of_kind", "shrink"]

BOUNDED = ("data", "models")
"""Kinds whose size a user bounds. The others are small, or not rayft's alone."""
PLACES = {"kernels": "TRITON_CACHE_DIR", "compiled": "TORCHINDUCTOR_CACHE_DIR"}
"""Kind → variable of its folder, where that is not in rayft's cache."""
COMPILING_SECONDS = 600.0
"""Time since the last change within which a compilation may still need what others have left."""
UNFINISHED_SECONDS = 86400.0
"""Time without a change after which an unfinished model counts as abandoned; no lock tells."""

_SET = re.compile(r"(?P<key>[0-9a-f]{24})|\.(?P<unfinished>[0-9a-f]{24})\.(?P<maker>.+)")
_UNFINISHED_MODEL = re.compile(r"\.(.+)-[a-z0-9_]{8}")
_HASH = re.compile(r"[0-9a-f]{24}\.json")
_KERNEL = re.compile(r"[A-Z2-7]{52}")
_COMPILED = re.compile(r"fxgraph|aotautograd|triton|cache|locks|precompiled_headers|(?P<hash>[a-z2-7]{2})")
_KERNEL_LOCK = re.compile(r"rayft-.+\.lock")
_DELETED = re.compile(r"\.deleted-[0-9a-f]{16}")


@dataclass(frozen=True)
class Entry:
    """Something that is kept, and deleted as a whole."""

    kind: str
    name: str
    """Text that tells a user what it is."""
    paths: tuple[Path, ...]
    """The folders or files that it consists of."""
    size: int
    """Bytes of its files."""
    used: float
    """Time of the last use, or of the last change if uses are not recorded; in seconds since 1970."""
    whole: bool = True
    """Whether it is complete. Otherwise a preparation or a deletion is running, or was killed."""
    locks: tuple[Path, ...] = ()
    """Files that are locked by the processes that make it."""
    rest: float = 0.0
    """Seconds since the last use within which it counts as in use."""


@dataclass
class Outcome:
    """What a deletion did."""

    deleted: list[Entry] = field(default_factory=list)
    left: list[tuple[Entry, str]] = field(default_factory=list)
    """What is in use, and how that is known."""
    refused: list[tuple[Entry, OSError]] = field(default_factory=list)
    """What the system did not let this process delete."""

    @property
    def freed(self) -> int:
        """Bytes of all that was deleted."""
        return sum(entry.size for entry in self.deleted)

    def attempt(self, entry: Entry) -> bool:
        """Delete an entry unless it is in use; return whether it is gone."""
        try:
            why = _in_use(entry) or _delete(entry)
        except FileNotFoundError:
            # Another process has deleted it meanwhile.
            return True
        except OSError as error:
            self.refused.append((entry, error))
            return False
        if why:
            self.left.append((entry, why))
        else:
            self.deleted.append(entry)
        return not why


def entries(cache: Path, kernels: Path | None, compiled: Path | None = None) -> list[Entry]:
    """Return what is kept, in the order of `KINDS`; of each kind, what was used last is first.

    Args:
        cache: rayft's cache. It need not exist.
        kernels: Triton's cache; None without Triton.
        compiled: Inductor's cache; by default it is left out.

    Raises:
        ResourceError: if a folder can't be read.
    """
    with _readable("RAYFT_CACHE"):
        _inside(cache)
    others = {"kernels": kernels, "compiled": compiled}
    found: list[Entry] = []
    for kind, scan in _SCANS.items():
        folder = others.get(kind, cache / kind)
        if folder is not None:
            with _readable(PLACES.get(kind, "RAYFT_CACHE")):
                paths = _inside(folder)
                here = [*scan(paths), *_remains(kind, paths)]
            found += sorted(here, key=lambda entry: -entry.used)
    return found


def of_kind(found: Iterable[Entry], kind: str) -> list[Entry]:
    """Return the entries of a kind, or all.

    Raises:
        ConfigError: if there is no such kind.
    """
    if kind not in (*KINDS, "all"):
        raise ConfigError(f"the cache has no '{kind}'{nearest(kind, (*KINDS, 'all'))}")
    return [entry for entry in found if kind in (entry.kind, "all")]


def delete_all(found: Iterable[Entry]) -> Outcome:
    """Delete all entries that are not in use."""
    outcome = Outcome()
    for entry in found:
        outcome.attempt(entry)
    return outcome


def shrink(found: Iterable[Entry], limit: int) -> tuple[Outcome, int]:
    """Delete the data and models that were used least recently, until the rest has at most `limit` bytes.

    What killed preparations and deletions have left is deleted in any case.

    Returns:
        What was deleted, and the size of the data and models that remain, in bytes.
    """
    bounded = sorted(
        (entry for entry in found if entry.kind in BOUNDED), key=lambda entry: (entry.whole, entry.used)
    )
    outcome, size = Outcome(), sum(entry.size for entry in bounded)
    for entry in bounded:
        if (size > limit or not entry.whole) and outcome.attempt(entry):
            size -= entry.size
    return outcome, size


# --- finding what is kept


def _sets(paths: Sequence[Path]) -> Iterator[Entry]:
    for path in paths:
        if found := _SET.fullmatch(path.name):
            key = found["key"] or found["unfinished"]
            manifest = path / MANIFEST if found["key"] else None
            whole = manifest is not None and manifest.is_file()
            # The locks of another machine may not be seen here, but its signs of life are.
            elsewhere = bool(found["maker"]) and not found["maker"].startswith(machine())
            yield from _entry(
                "data",
                _set_name(path) or key,
                [path],
                recorded=manifest if whole else None,
                whole=whole,
                locks=(path.with_name(f"{key}.lock"),),
                rest=ABANDONED_SECONDS if elsewhere else 0.0,
            )


def _set_name(path: Path) -> str:
    """Return what a prepared set was made of, or an empty text if that can't be read."""
    try:
        return str(json.loads((path / MANIFEST).read_text(encoding="utf-8"))["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _models(paths: Sequence[Path]) -> Iterator[Entry]:
    for path in paths:
        unfinished = _UNFINISHED_MODEL.fullmatch(path.name)
        if unfinished and path.is_dir() and {below.name for below in _inside(path)} <= {"new", "damaged"}:
            yield from _entry("models", unfinished[1], [path], whole=False, rest=UNFINISHED_SECONDS)
        elif (path / SIZES_FILE).is_file() or (path.name in REGISTERED and path.is_dir()):
            yield from _entry("models", path.name, [path], recorded=path)


def _hashes(paths: Sequence[Path]) -> Iterator[Entry]:
    return _entry("hashes", "hashes of large files", [path for path in paths if _HASH.fullmatch(path.name)])


def _probes(paths: Sequence[Path]) -> Iterator[Entry]:
    return _entry("probes", "settings tried on GPUs", [path for path in paths if _HASH.fullmatch(path.name)])


def _lanes(paths: Sequence[Path]) -> Iterator[Entry]:
    for path in paths:
        if path.is_dir() and not _DELETED.fullmatch(path.name):
            yield from _entry("lanes", path.name, [path], recorded=path, rest=STALE_SECONDS)


def _kernels(paths: Sequence[Path]) -> Iterator[Entry]:
    return _entry(
        "kernels",
        "compiled kernels",
        [path for path in paths if _KERNEL.fullmatch(path.name)],
        locks=tuple(path for path in paths if _KERNEL_LOCK.fullmatch(path.name)),
    )


def _compiled(paths: Sequence[Path]) -> Iterator[Entry]:
    found = [path for path in paths if (name := _COMPILED.fullmatch(path.name)) and _is_inductors(path, name)]
    return _entry("compiled", "functions compiled by torch.compile", found, rest=COMPILING_SECONDS)


def _is_inductors(path: Path, name: re.Match[str]) -> bool:
    """Return whether a path is Inductor's: a folder of two letters has files whose hashes begin with them."""
    return not name["hash"] or all(one.name.startswith(f"c{name['hash']}") for one in _inside(path))


_SCANS: dict[str, Callable[[Sequence[Path]], Iterator[Entry]]] = {
    "data": _sets,
    "models": _models,
    "hashes": _hashes,
    "probes": _probes,
    "lanes": _lanes,
    "kernels": _kernels,
    "compiled": _compiled,
}
KINDS = (*_SCANS,)
"""Kinds of what is kept. Each but those of `PLACES` is in a folder of that name."""


def _remains(kind: str, paths: Sequence[Path]) -> Iterator[Entry]:
    """Yield what killed deletions have left."""
    for path in paths:
        if _DELETED.fullmatch(path.name):
            yield from _entry(kind, "deleted", [path], whole=False)


def _entry(
    kind: str,
    name: str,
    paths: Sequence[Path],
    *,
    recorded: Path | None = None,
    whole: bool = True,
    locks: tuple[Path, ...] = (),
    rest: float = 0.0,
) -> Iterator[Entry]:
    """Yield an entry, or nothing if its paths have vanished.

    Args:
        kind: its kind.
        name: its name.
        paths: what it consists of.
        recorded: the file or folder whose time of modification is that of the last use. By default, the last
            use is the last change of anything in the entry.
        whole: whether it is complete.
        locks: files that are locked by the processes that make it.
        rest: seconds since the last use within which it counts as in use.
    """
    found = [status for path in paths for status in _statuses(path)]
    with suppress(FileNotFoundError):
        if found:
            used = max(status.st_mtime for status in found) if recorded is None else recorded.stat().st_mtime
            size = sum(status.st_size for status in found if not stat.S_ISDIR(status.st_mode))
            yield Entry(kind, name, tuple(paths), size, used, whole, locks, rest)


def _statuses(path: Path) -> Iterator[os.stat_result]:
    """Yield the status of a path and of everything below it. What vanishes meanwhile is left out."""
    with suppress(FileNotFoundError):
        status = path.lstat()
        yield status
        if stat.S_ISDIR(status.st_mode):
            for below in path.iterdir():
                yield from _statuses(below)


def _inside(folder: Path) -> list[Path]:
    """Return what a folder contains; nothing if it is missing."""
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []


@contextmanager
def _readable(setting: str) -> Iterator[None]:
    """Turn an error of the system about reading a folder into one that names the setting of the folder."""
    try:
        yield
    except OSError as error:
        place = Path(error.filename)
        raise ResourceError(
            f"can't read {place} ({reason(error, place)}); set {setting} to a folder that can be read"
        ) from error


# --- deleting it


def _in_use(entry: Entry) -> str:
    """Return why the age of an entry means that it may be in use, or an empty text."""
    age = time.time() - entry.used
    return f"it may be in use: it changed {ago_text(age)}" if entry.rest and age < entry.rest else ""


def _delete(entry: Entry) -> str:
    """Delete an entry unless its locks are held; return why it was left, or an empty text.

    Raises:
        FileNotFoundError: if it is not there.
        OSError: if it can't be deleted.
    """
    with _alone(entry) as alone:
        if not alone:
            return "a process is using it"
        gone = [_remove(path) for path in entry.paths]
        if entry.kind == "data":
            for lock in entry.locks:
                if not lock.with_suffix("").exists():
                    lock.unlink(missing_ok=True)
    if not any(gone):
        raise FileNotFoundError(entry.paths[0])
    return ""


@contextmanager
def _alone(entry: Entry) -> Iterator[bool]:
    """Yield whether no other process holds a lock of an entry. During the block, none can take one."""
    with ExitStack() as held:
        free = [held.enter_context(locked(lock, wait=0)) is not None for lock in entry.locks]
        if entry.kind == "models" and entry.whole:
            free += [held.enter_context(unused(path)) for path in entry.paths]
        yield all(free)


def _remove(path: Path) -> bool:
    """Remove a file, a link or a folder; return whether it was there."""
    gone = path
    if not _DELETED.fullmatch(path.name):
        gone = path.with_name(f".deleted-{token_hex(8)}")
        try:
            path.rename(gone)
        except FileNotFoundError:
            return False
    while os.path.lexists(gone):
        # Another process may remove it too, and be faster with some of its files.
        with suppress(FileNotFoundError):
            if gone.is_dir() and not gone.is_symlink():
                shutil.rmtree(gone)
            else:
                gone.unlink()
    return True
