"""Read a folder of images: `class/file.png`, or such a folder for each part (`train/class/file.png`)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from rayft.config import lone_surrogate
from rayft.data.files import Table
from rayft.errors import DataError

__all__ = ["PARTS", "part_folders", "read_image_folder"]

PARTS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "eval", "evaluation"),
    "test": ("test", "testing"),
}
"""The names that the folder of a part may have, in upper or lower case."""

ARCHIVES = (
    ".zip",
    ".tar",
    ".tar.gz",
    ".tgz",
    ".tar.bz2",
    ".tbz2",
    ".tar.xz",
    ".txz",
    ".tar.zst",
    ".7z",
    ".rar",
)


def part_folders(name: str) -> dict[str, str]:
    """Return the folder of each part. If no folder has the name of a part, the whole folder is `train`.

    Raises:
        DataError: if `name` is not a folder, only some of its folders have names of parts, none of them is
            `train`, or two are for the same part.
    """
    path = _folder(name)
    known = {alias: part for part, aliases in PARTS.items() for alias in aliases}
    found: dict[str, list[str]] = {}
    others = []
    for child in _subfolders(path):
        part = known.get(child.casefold())
        if part is None:
            others.append(child)
        else:
            found.setdefault(part, []).append(child)
    if not found:
        return {"train": name}
    if others or "train" not in found:
        raise _half_divided(path, sorted(chain(*found.values())), others)
    for part, children in found.items():
        if len(children) > 1:
            raise DataError(
                f"{path} has {' and '.join(children)} for the same part, {part}: keep one, or name "
                "the folder of each part in data.files"
            )
    return {part: str(path / children[0]) for part, children in found.items()}


def read_image_folder(name: str) -> Table:
    """List the images in a folder of class folders. The name of the uppermost folder is the class.

    Raises:
        DataError: if there is no image, an image is outside of a class folder, a class folder has no image,
            or there is an archive or a link to a folder, neither of which is read.
    """
    root = Path(os.path.normpath(_folder(name).absolute()))
    rows = [_row(root, path) for path in sorted(_images(root), key=str)]
    if not rows:
        raise DataError(f"{root} holds no image: put PNG or JPEG files into one folder for each class")
    classes = {row["label"] for row in rows}
    empty = [child for child in _subfolders(root) if child not in classes]
    if empty:
        raise DataError(
            f"{root} has folders without an image: {', '.join(empty)}; put images of the class into each "
            "or remove it"
        )
    return Table(str(root), ("image", "label"), rows, folder=root)


def _folder(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_dir():
        raise DataError(
            f"no folder at {path.absolute()}; give a folder of class folders as data.name, or one for each "
            "part as data.files"
        )
    return path


def _subfolders(path: Path) -> list[str]:
    try:
        children = [child for child in path.iterdir() if not child.name.startswith(".")]
    except OSError as error:
        _refuse(error)
    return sorted(child.name for child in children if child.is_dir())


def _half_divided(path: Path, parts: list[str], others: list[str]) -> DataError:
    named = ", ".join(parts)
    problem = (
        f"{path} has folders with the names of parts ({named}) beside others ({', '.join(others)})"
        if others
        else f"{path} has folders with the names of parts ({named}), and none for train"
    )
    return DataError(
        f"{problem}. If they are parts, call all of them train, val or test, or name them in data.files. If "
        f"they are classes, write data.files: {{train: {path}}} instead of data.name, or move all into one "
        f"folder called train ({path / 'train' / parts[0]})"
    )


def _images(root: Path) -> Iterator[Path]:
    """Find all images that are not hidden, at any depth.

    `datasets.load_dataset` is not used, because it silently leaves out links and folders called `__x__`, and
    lists images in archives with the paths where it unpacked them.
    """
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    suffixes = frozenset(ImageFolder.EXTENSIONS)
    for folder, inside, files in os.walk(root, onerror=_refuse):
        inside[:] = [name for name in inside if not name.startswith(".")]
        for path in (Path(folder, name) for name in inside):
            if path.is_symlink():
                raise DataError(
                    f"{path} is a link to a folder, which is not followed; put the folder in its place"
                )
        for path in (Path(folder, name) for name in files if not name.startswith(".")):
            if path.name.lower().endswith(ARCHIVES):
                raise DataError(f"{path} is an archive, which is not looked into; unpack or remove it")
            if path.suffix.lower() in suffixes:
                yield path
            elif path.is_symlink() and not path.exists():
                raise DataError(f"{path} is a link to nothing; repair or remove it")


def _refuse(error: OSError) -> NoReturn:
    raise DataError(f"{error.filename} can't be listed ({error.strerror}); make it readable") from error


def _row(root: Path, path: Path) -> dict[str, Any]:
    if lone_surrogate(str(path)):
        raise DataError(f"the name of {str(path)!a} is not UTF-8; rename it")
    inside = path.relative_to(root).parts
    if len(inside) < 2:
        raise DataError(f"{path} is in no class folder; move it into the folder of its class")
    return {"image": {"bytes": None, "path": str(path)}, "label": inside[0]}
