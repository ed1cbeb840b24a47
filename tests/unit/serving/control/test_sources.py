from __future__ import annotations

import re
import shutil
import socket
from pathlib import Path

import pytest

from rayft.errors import ArtifactError, BadRequestError, DiskFullError
from rayft.serving.control.allowed import check_allowed
from rayft.serving.control.sources import check_source, find, followed
from tests.disks import PAGE, Disk
from tests.unit.serving.adapters import random_adapter

SHAPES = {"layer.q_proj": (6, 4)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return random_adapter("a", SHAPES).save(tmp_path / "roots" / "a")


def test_a_folder_below_a_root_may_be_loaded(folder: Path) -> None:
    check_allowed(str(folder), [str(folder.parent)])
    check_allowed("models:/a@b", [])
    check_allowed("s3://bucket/adapters/a", ["s3://bucket/adapters"])
    check_allowed(f"file://{folder}", [f"file://{folder.parent}"])


@pytest.mark.parametrize(
    "source",
    [
        "{root}/../outside", "{root}/a/../../outside", "/etc", "{root}/link", "{root}/files", "a", "../a",
        "{root}/a\0", "s3://other/a", "s3://bucket/adapters/../secret", "s3://bucket/adapters-of-others/a",
        "file:///etc", "{root}x", "s3://bucket/adapters/%2e%2e/secret", "s3://bucket/adapters/a/..%2F..%2fsecret",
        "s3://bucket/adapters/%252e%252e/secret", "s3://bucket/adapters/.\t./secret", "s3://bucket/adapters/.%0a./a",
        "s3://bucket/adapters/..?a", "s3://bucket/adapters/..#a", "s3://bucket/adapters/..\\secret",
        "s3://bucket/adapters/a::file:///etc", "file://{root}/link", "local://{root}/files", "file://a",
        "local://{root}/../outside", "file://{root}/files", "local://{root}/link",
        "file://{root}/link::a", "{root}/a\nb",
    ],
)  # fmt: skip
def test_nothing_outside_the_roots_may_be_loaded(folder: Path, tmp_path: Path, source: str) -> None:
    root = folder.parent
    outside = Path(shutil.copytree(folder, tmp_path / "outside"))
    (root / "link").symlink_to(outside)
    (root / "files").mkdir()
    for file in outside.iterdir():
        (root / "files" / file.name).symlink_to(file)
    with pytest.raises(BadRequestError):
        check_allowed(
            source.format(root=root), [str(root), f"file://{root}", f"local://{root}", "s3://bucket/adapters"]
        )
    with pytest.raises(BadRequestError):
        check_allowed(str(folder), [])


def test_a_url_is_fetched_once(folder: Path, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/adapters/a", recursive=True)
    there = find("a", "memory://adapters/a", None, tmp_path / "got", "1MB", pinned=True)
    here = find("a", str(folder), None, tmp_path, "1MB", pinned=True)
    assert there.content_hash == here.content_hash
    assert (there.version, there.source, there.pinned) == (0, "memory://adapters/a", True)
    assert [path.name for path in (tmp_path / "got").iterdir()] == [here.content_hash]
    memory.rm("/adapters", recursive=True)
    with pytest.raises(ArtifactError, match="memory://adapters/a"):
        find("a", "memory://adapters/a", None, tmp_path / "got", "1MB", pinned=False)
    assert [path.name for path in (tmp_path / "got").iterdir()] == [here.content_hash]


def test_a_damaged_copy_is_fetched_again(folder: Path, tmp_path: Path) -> None:
    import fsspec

    fsspec.filesystem("memory").put(str(folder), "/adapters/damaged", recursive=True)
    first = find("a", "memory://adapters/damaged", None, tmp_path / "got", "1MB", pinned=False)
    weights = Path(first.folder) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert find("a", "memory://adapters/damaged", None, tmp_path / "got", "1MB", pinned=False) == first
    assert [path.name for path in (tmp_path / "got").iterdir()] == [first.content_hash]


def test_an_error_of_a_store_becomes_an_artifact_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    class NoCredentialsError(Exception):
        """An error of a store that is not an OSError, as botocore's are."""

    def refuse(*_: object, **__: object) -> None:
        raise NoCredentialsError("Unable to locate credentials")

    monkeypatch.setattr(MemoryFileSystem, "info", refuse)
    monkeypatch.setattr(MemoryFileSystem, "exists", refuse)
    with pytest.raises(
        ArtifactError, match=r"memory://adapters/a can't be read: Unable to locate credentials"
    ):
        find("a", "memory://adapters/a", None, tmp_path / "got", "1MB", pinned=False)
    assert not [*(tmp_path / "got").iterdir()]


def test_an_adapter_that_is_too_large_is_refused_before_it_is_read(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="more than the 100B"):
        find("a", str(folder), None, tmp_path, "100B", pinned=False)


@pytest.mark.parametrize("size", [None, 10])
def test_a_url_with_more_bytes_than_it_tells_is_not_fetched_whole(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int | None
) -> None:
    import fsspec
    from fsspec.implementations.memory import MemoryFileSystem

    fsspec.filesystem("memory").put(str(folder), "/adapters/large", recursive=True)
    monkeypatch.setattr(MemoryFileSystem, "size", lambda *_: size)
    monkeypatch.setattr("rayft.artifacts.AdapterArtifact.load", lambda _: pytest.fail("it was read"))
    with pytest.raises(ArtifactError, match="memory://adapters/large is larger than the 100 bytes"):
        find("a", "memory://adapters/large", None, tmp_path / "got", "100B", pinned=False)
    assert not [*(tmp_path / "got").iterdir()]


def test_only_aliases_are_followed() -> None:
    sources = ("models:/a@champion", "models:/a", "models:/a/3", "/a", "s3://a/b")
    assert [followed(source) for source in sources] == [True, True, False, False, False]


def test_a_registry_source_needs_a_registry(tmp_path: Path) -> None:
    with pytest.raises(BadRequestError, match="without a registry; set registry to MLflow's URI"):
        find("a", "models:/a", None, tmp_path, "1MB", pinned=False)


def test_a_full_disk_is_not_reported_as_an_unreadable_url(folder: Path, disk: Disk) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/adapters/full", recursive=True)
    disk.resize(2 * PAGE)
    with pytest.raises(DiskFullError, match=f"the disk of {disk.folder}/got is full"):
        find("a", "memory://adapters/full", None, disk.folder / "got", "1MB", pinned=True)
    assert not [*disk.folder.rglob("*.*")]
    disk.resize(2**20)
    assert find("a", "memory://adapters/full", None, disk.folder / "got", "1MB", pinned=True).content_hash


def test_the_error_about_a_missing_folder_names_the_node_and_the_alternatives(tmp_path: Path) -> None:
    reason = rf"{tmp_path}/gone does not exist on {re.escape(socket.gethostname())};.*models:/NAME/VERSION"
    with pytest.raises(ArtifactError, match=rf"adapter 'a' is not served: {reason}"):
        find("a", str(tmp_path / "gone"), None, tmp_path, "1MB", pinned=False)
    with pytest.raises(ArtifactError, match=reason):
        check_source(str(tmp_path / "gone"), None, tmp_path, "1MB")
