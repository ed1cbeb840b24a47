"""A folder of images: `class/file.png`, or one such folder a part (`train/class/file.png`)."""

from __future__ import annotations

import glob
import os
import tempfile
from pathlib import Path
from typing import Any

from rayft.data.files import Table, plain_images, quiet
from rayft.errors import DataError

__all__ = ["part_folders", "read_image_folder"]

PARTS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
"""What the folder of a part may be called."""


def part_folders(name: str) -> dict[str, str]:
    """Find the folders of the parts; the whole one is `train` where it has none.

    A folder is divided into parts if all its folders are called as parts are, `train` among them:
    there may be a class of trains.

    Raises:
        DataError: if it is no folder.
    """
    path = _folder(name)
    inside = {child.name for child in path.iterdir() if child.is_dir() and not child.name.startswith(".")}
    known = {alias: part for part, aliases in PARTS.items() for alias in aliases}
    if "train" not in inside or not inside <= set(known):
        return {"train": name}
    twice = [part for part, aliases in PARTS.items() if len(inside & set(aliases)) > 1]
    if twice:
        both = " and ".join(sorted(inside & set(PARTS[twice[0]])))
        raise DataError(f"{path} has {both} for the same part: keep one, or name the folders in data.files")
    return {known[child]: str(path / child) for child in inside}


def read_image_folder(name: str) -> Table:
    """List the images in a folder of class folders; the class is the uppermost folder's name.

    Raises:
        DataError: if there are none, or one lies outside a class folder.
    """
    import datasets

    root = Path(os.path.normpath(_folder(name).absolute()))
    try:
        # The cache holds a list of paths, and would outlive a change of the folder.
        with quiet(), tempfile.TemporaryDirectory() as cache:
            found = datasets.load_dataset(
                "imagefolder",
                # Neither `data_dir` nor its labels: both guess, and take a class called "test" for a part.
                data_files={"train": [f"{glob.escape(str(root))}/**"]},
                split="train",
                drop_labels=True,
                drop_metadata=True,
                cache_dir=cache,
                keep_in_memory=True,
            )
            images = plain_images(found).to_list()
    except (ValueError, FileNotFoundError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{root} holds no image: put PNG or JPEG files into one folder for each class ({error})"
        ) from error
    rows = sorted((_row(root, row["image"]) for row in images), key=lambda row: row["image"]["path"])
    return Table(str(root), ("image", "label"), rows)


def _folder(name: str) -> Path:
    path = Path(name).expanduser()
    if not path.is_dir():
        raise DataError(
            f"no folder at {path.absolute()}; give a folder of class folders as data.name, or one for each "
            "part as data.files"
        )
    return path


def _row(root: Path, image: dict[str, Any]) -> dict[str, Any]:
    inside = Path(image["path"]).relative_to(root).parts
    if len(inside) < 2:
        raise DataError(f"{image['path']} is in no class folder; move it into the folder of its class")
    return {"image": image, "label": inside[0]}
