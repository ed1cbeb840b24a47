"""Disks that are really full, and the error of each library that rayft writes with."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from rayft.errors import DiskFullError, ResourceError
from rayft.files import room_on, write_file
from rayft.paths import check_file, check_folder
from tests.disks import PAGE, Disk

CONTENT = np.random.default_rng(0).bytes(2**20)


def by_safetensors(folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2**18)}, folder / "a.safetensors")


def by_sqlite(folder: Path) -> None:
    database = sqlite3.connect(folder / "a.db")
    try:
        with database:
            database.execute("CREATE TABLE a (content BLOB)")
            database.execute("INSERT INTO a VALUES (?)", (CONTENT,))
    finally:
        database.close()


def by_arrow(folder: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"a": [CONTENT]}).save_to_disk(folder / "a")


def by_parquet_cache(folder: Path) -> None:
    import datasets
    import pyarrow.parquet

    source = folder.parent / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": [CONTENT]}), source)
    datasets.Dataset.from_parquet(str(source), cache_dir=str(folder))


def by_tokenizers(folder: Path) -> None:
    import tokenizers

    words = {f"{number:x}" * 20: number for number in range(20_000)}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="0" * 20)).save(str(folder / "a.json"))


def by_copying(folder: Path) -> None:
    source = folder.parent / "source"
    source.mkdir()
    (source / "a").write_bytes(CONTENT)
    shutil.copytree(source, folder / "copy")


def by_drawing(folder: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure()
    figure.add_subplot().imshow(np.random.default_rng(0).random((500, 500)))
    figure.savefig(folder / "a.png", dpi=400)


def by_deepspeed(folder: Path) -> None:
    from rayft.train.checkpoint_writer import CheckpointWriter

    writer = CheckpointWriter(None)
    writer.makedirs(str(folder / "step"), exist_ok=True)
    writer.save({"a": torch.zeros(2**18)}, str(folder / "step" / "a.pt"))
    writer.save({"a": torch.zeros(2)}, str(folder / "step" / "b.pt"))
    assert not (folder / "step" / "b.pt").exists()
    writer.check()


WRITERS = [
    by_safetensors,
    by_sqlite,
    by_arrow,
    by_parquet_cache,
    by_tokenizers,
    by_copying,
    by_drawing,
    by_deepspeed,
]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_every_writer_raises_an_error_that_names_the_full_disk(
    disk: Disk, write: Callable[[Path], None]
) -> None:
    disk.resize(64 * PAGE)
    with (
        pytest.raises(
            DiskFullError, match=rf"the disk of {disk.folder}(/\w+)? is full \(1.0 MiB needed, .* free\)"
        ),
        room_on(disk.folder, 2**20),
    ):
        write(disk.folder)


def test_the_disk_that_is_full_is_named_among_several(disk: Disk, tmp_path: Path) -> None:
    disk.resize(64 * PAGE)
    message = rf"the disk of {disk.folder} is full \("
    with pytest.raises(DiskFullError, match=message), room_on(tmp_path, others=[disk.folder]):
        by_safetensors(disk.folder)


def test_a_disk_without_free_inodes_is_an_error_that_says_so(disk: Disk) -> None:
    disk.hold_files(0)
    with pytest.raises(
        DiskFullError, match=r"can't hold more files \(no inodes are free, 1 bytes needed, .* are\)"
    ):
        write_file(disk.folder / "a", "1")
    with pytest.raises(DiskFullError, match=r"can't hold more files"):
        check_folder(disk.folder / "new", "output")


def test_a_full_disk_is_not_taken_for_a_wrong_path(disk: Disk) -> None:
    write_file(disk.folder / "a", "1")
    disk.resize(PAGE)
    with pytest.raises(DiskFullError, match=f"the disk of {disk.folder} is full"):
        check_folder(disk.folder, "output")
    with pytest.raises(ResourceError, match="is a folder"):
        check_file(disk.folder, "output")


def test_a_file_is_kept_until_the_new_one_is_complete(disk: Disk) -> None:
    path = write_file(disk.folder / "a", CONTENT)
    disk.leave(2**19)
    with pytest.raises(DiskFullError, match=r"1.0 MiB needed, 512.0 KiB free"):
        write_file(path, CONTENT[::-1])
    assert path.read_bytes() == CONTENT
    disk.leave(2**21)
    assert write_file(path, CONTENT[::-1]).read_bytes() == CONTENT[::-1]
