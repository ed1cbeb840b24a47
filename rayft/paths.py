"""Paths that users set: read them, and check that they can be written before anything starts."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from rayft.errors import ConfigError, ResourceError
from rayft.files import disk_full, disk_full_error

__all__ = [
    "PathText",
    "check_file",
    "check_folder",
    "check_text",
    "checked_text",
    "home",
    "read_path",
    "reason",
    "runs_folder",
]

LONGEST_NAME = 255
"""Most bytes in the name of a file on Linux's file systems."""
LONGEST_PATH = 4095
"""Most bytes in a path on Linux."""
TRIES = 5
"""Attempts to write into a folder that other processes create and remove at the same time."""
PROBE = b"\0" * 4096
"""Data to write as a test: on a full disk, creating an empty file may still succeed."""


def check_text(value: str) -> str:
    """Return the text of a path unchanged, after checking that a file system can have such a path.

    A URL is checked like a path, except for its length.

    Raises:
        ValueError: if no file system can have such a path.
    """
    if not value.strip():
        raise ValueError("is empty; write a path")
    if "\0" in value:
        raise ValueError("holds a NUL character, which no path can")
    encoding = sys.getfilesystemencoding()
    try:
        size = len(os.fsencode(value))
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"holds bytes or characters that are not {encoding}; rename it, or set PYTHONUTF8=1 if only the "
            "locale is at fault"
        ) from error
    if "://" not in value:
        longest = max(len(os.fsencode(part)) for part in Path(value).parts or (".",))
        if longest > LONGEST_NAME or size > LONGEST_PATH:
            raise ValueError(
                f"is too long: a name may have {LONGEST_NAME} bytes and a path {LONGEST_PATH}; shorten it"
            )
    if value.startswith("~"):
        try:
            Path(value).expanduser()
        except RuntimeError as error:
            raise ValueError(
                "begins with the home folder of a user who has none; write the whole path"
            ) from error
    return value


PathText = Annotated[str, AfterValidator(check_text)]
"""A path or URL in a configuration."""


def read_path(text: str | Path, setting: str) -> Path:
    """Return the path that a user wrote, with `~` replaced by the home folder.

    Args:
        text: what the user wrote.
        setting: name of the option, key or variable, for the message.

    Raises:
        ConfigError: if the text is empty or can't be a path.
    """
    path = Path(checked_text(str(text), setting)).expanduser()
    try:
        path.stat()
    except OSError as error:
        # A missing path may be fine, since it can be created. A loop of links can't.
        if error.errno == errno.ELOOP:
            raise ConfigError(f"{setting}: {path} is a link that leads back to itself; remove it") from error
    return path


def checked_text(text: str, setting: str) -> str:
    """Return a path or URI that a user wrote, unchanged.

    Args:
        text: what the user wrote.
        setting: name of the option, key or variable, for the message.

    Raises:
        ConfigError: if the text is empty or can't be a path.
    """
    try:
        return check_text(text)
    except ValueError as error:
        raise ConfigError(f"{setting} {error}") from error


def home(setting: str) -> Path:
    """Return the home folder.

    Args:
        setting: name of a variable that the user can set instead, for the message.

    Raises:
        ResourceError: if the user has no home folder.
    """
    try:
        return Path.home()
    except RuntimeError as error:
        raise ResourceError(
            f"this user has no home folder (HOME is not set): set HOME, or {setting}"
        ) from error


def runs_folder(*, cluster: bool = False) -> Path:
    """Return the folder for sweeps that have no output folder of their own.

    Args:
        cluster: whether the command runs on a cluster. There the working directory of a job is temporary, so
            the folder is in the home folder.
    """
    if given := os.environ.get("RAYFT_OUTPUT"):
        return read_path(given, "RAYFT_OUTPUT")
    return home("RAYFT_OUTPUT") / "rayft-runs" if cluster else Path("runs")


def check_folder(folder: Path, setting: str) -> None:
    """Check that files can be written into a folder, by writing one. All that is created is removed again.

    Args:
        folder: the folder, which need not exist.
        setting: name of the option, key or variable that names it, for the message.

    Raises:
        ResourceError: if the folder can't be created, or no file can be written into it.
    """
    folder = folder.absolute()
    for _ in range(TRIES):
        place, error = _probe(folder)
        # Then another process that checks the same folder has removed what it had created.
        if not isinstance(error, FileNotFoundError):
            break
    if error is None:
        return
    if disk_full(error):
        raise disk_full_error(error, folder) from error
    raise ResourceError(
        f"can't write to {folder} ({reason(error, place)}); set {setting} to a folder that can be written"
    ) from error


def _probe(folder: Path) -> tuple[Path, Exception | None]:
    """Write a file into a folder, which is created if need be; remove all that was created.

    Returns:
        The folder that could not be created or written to, and the error, if there was one.
    """
    made: list[Path] = []
    place = folder
    try:
        for place in reversed((folder, *folder.parents)):
            if not place.is_dir():
                place.mkdir(exist_ok=True)
                made.append(place)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".rayft-", buffering=0) as file:
            file.write(PROBE)
    except (OSError, ValueError) as error:
        return place, error
    else:
        return place, None
    finally:
        for each in reversed(made):
            with contextlib.suppress(OSError):
                each.rmdir()


def check_file(file: Path, setting: str) -> None:
    """Check that a file can be written: that it can be opened, or created if it does not exist.

    Args:
        file: the file.
        setting: name of the option, key or variable that names it, for the message.

    Raises:
        ResourceError: if it can't be written.
    """
    if file.is_dir():
        raise ResourceError(f"{file} is a folder; set {setting} to a file, such as {file / 'file'}")
    if not file.exists() and not file.is_symlink():
        check_folder(file.absolute().parent, setting)
        return
    try:
        with file.open("ab"):
            pass
    except OSError as error:
        if disk_full(error):
            raise disk_full_error(error, file.parent) from error
        raise ResourceError(
            f"can't write to {file} ({reason(error, file)}); set {setting} to a file that can be written"
        ) from error


def reason(error: Exception, place: Path) -> str:
    """Return why a path could not be used, as part of a message."""
    if place.is_symlink() and not place.exists():
        return f"{place} is a link to {place.readlink()}, which is not there"
    if isinstance(error, FileExistsError | NotADirectoryError):
        return f"{place} is a file, not a folder"
    text = getattr(error, "strerror", None) or str(error)
    return f"{text}: {place}" if isinstance(error, OSError) else text
