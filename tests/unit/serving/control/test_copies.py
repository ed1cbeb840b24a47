from __future__ import annotations

import os
from pathlib import Path

import pytest

from rayft.artifacts import AdapterArtifact
from rayft.errors import ArtifactError, DiskFullError, ResourceError
from rayft.serving.control.copies import STALE_SECONDS, Copies, Record
from rayft.serving.control.state import Deployed, Served
from rayft.squeeze.rank import squeeze
from tests.disks import PAGE, Disk
from tests.unit.serving.adapters import random_adapter

SHAPES = {"layer.q_proj": (6, 4)}
WEIGHTS = "adapter_model.safetensors"


def save(folder: Path, name: str = "a") -> tuple[Path, str]:
    artifact = random_adapter(name, SHAPES)
    return artifact.save(folder), artifact.content_hash


def test_a_copy_shares_nothing_with_its_source(tmp_path: Path) -> None:
    source, content = save(tmp_path / "a")
    copy = Copies(tmp_path / "fetched", "one").take(source, content)
    with (source / WEIGHTS).open("r+b") as file:
        file.truncate(50)
    assert AdapterArtifact.load(copy).content_hash == content


def test_a_damaged_copy_is_made_again(tmp_path: Path) -> None:
    source, content = save(tmp_path / "a")
    copies = Copies(tmp_path / "fetched", "one")
    copy = copies.take(source, content)
    (copy / WEIGHTS).write_bytes(b"")
    assert copies.take(source, content) == copy
    assert AdapterArtifact.load(copy).content_hash == content
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_a_copy_that_can_not_be_made_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    source, content = save(tmp_path / "a")
    (tmp_path / "fetched").mkdir()
    (tmp_path / "fetched" / "served-one").touch()
    with pytest.raises(ResourceError, match=r"served-one can't be written on .*or set another folder"):
        Copies(tmp_path / "fetched", "one").take(source, content)


def test_a_source_that_changes_while_it_is_copied_is_refused(tmp_path: Path) -> None:
    source, content = save(tmp_path / "a")
    save(source, "b")
    copies = Copies(tmp_path / "fetched", "one")
    with pytest.raises(ArtifactError, match="changed while it was read"):
        copies.take(source, content)
    assert list((tmp_path / "fetched" / "served-one").iterdir()) == []


def test_adapters_with_equal_factors_and_different_metadata_have_two_copies(tmp_path: Path) -> None:
    source, _ = save(tmp_path / "a")
    squeezed = squeeze(AdapterArtifact.load(source))
    content = squeezed.content_hash
    AdapterArtifact(squeezed.modules).save(source)
    copies = Copies(tmp_path / "fetched", "one")
    first = copies.take(source, content)
    squeezed.save(source)
    second = copies.take(source, content)
    assert (AdapterArtifact.load(first).squeezed, AdapterArtifact.load(second).squeezed) == (False, True)
    copies.keep({str(second)})
    assert [first.exists(), second.exists()] == [False, True]


def test_a_record_is_read_back_unless_it_is_damaged(tmp_path: Path) -> None:
    copies = Copies(tmp_path, "one")
    assert copies.record() is None
    new = Deployed("a", 2, "/x", "c", "/y", ("best",), pinned=True, score=0.5)
    old = Deployed("a", 1, "/x", "b", "models:/a/1")
    record = Record(Served(3, (old, new), {"a": 0.25}, {"a": old}), {"a": "/y"}, "base")
    copies.save(record)
    assert Copies(tmp_path, "one").record() == record
    assert Copies(tmp_path, "two").record() is None
    (tmp_path / "served-one" / "served.json").write_text("{")
    assert copies.record() is None


def test_folders_of_killed_servers_are_deleted_after_a_day(tmp_path: Path) -> None:
    copies = {name: Copies(tmp_path, name) for name in ("old", "touched", "new")}
    for one in copies.values():
        one.save(Record(Served()))
    for name in ("old", "touched"):
        folder = tmp_path / f"served-{name}"
        then = folder.stat().st_mtime - STALE_SECONDS - 1
        os.utime(folder, (then, then))
    copies["touched"].touch()
    copies["new"].remove_stale()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["served-new", "served-touched"]


def send(one: Copies, other: Copies, name: str, content: str, most: int = 1000) -> Path:
    """Send a copy to another node in parts, and return its folder there."""
    sizes = one.sizes(name, content)
    with other.staging(sum(sizes.values())) as staging:
        for file, size in sizes.items():
            parts = [one.part(name, file, offset, most) for offset in range(0, size, most)]
            assert {len(part) for part in parts[:-1]} <= {most}
            (staging / file).write_bytes(b"".join(parts))
        other.put(staging, name, content)
        return staging.parent / name


def test_a_received_copy_replaces_a_damaged_one(tmp_path: Path) -> None:
    source, content = save(tmp_path / "a")
    here, there = Copies(tmp_path / "here", "one"), Copies(tmp_path / "there", "one")
    copy = here.take(source, content)
    received = send(here, there, copy.name, content, most=100)
    assert received == tmp_path / "there" / "served-one" / copy.name
    assert {path.name: path.read_bytes() for path in received.iterdir()} == {
        path.name: path.read_bytes() for path in copy.iterdir()
    }
    (received / WEIGHTS).write_bytes(b"")
    assert AdapterArtifact.load(send(here, there, copy.name, content)).content_hash == content
    # A copy that failed half-way is deleted.
    there.drop([copy.name])

    def half() -> None:
        with there.staging(10) as staging:
            (staging / WEIGHTS).write_bytes(b"half")
            raise ResourceError("the director is gone")

    with pytest.raises(ResourceError, match="gone"):
        half()
    assert [path for path in received.parent.iterdir() if path.is_dir()] == []


def test_a_complete_copy_that_another_replica_has_received_remains(tmp_path: Path) -> None:
    source, content = save(tmp_path / "a")
    here, there = Copies(tmp_path / "here", "one"), Copies(tmp_path / "there", "one")
    copy = here.take(source, content)
    before = send(here, there, copy.name, content).stat().st_ino
    assert send(here, there, copy.name, content).stat().st_ino == before


def test_a_damaged_copy_is_not_sent(tmp_path: Path) -> None:
    source, content = save(tmp_path / "a")
    copies = Copies(tmp_path, "one")
    copy = copies.take(source, content)
    with pytest.raises(ArtifactError, match=f"has the content {content}, not other"):
        copies.sizes(copy.name, "other")
    (copy / WEIGHTS).write_bytes(b"")
    with pytest.raises(ArtifactError, match="truncated or damaged"):
        copies.sizes(copy.name, content)
    copies.drop([copy.name])
    with pytest.raises(ArtifactError, match="can't be read"):
        copies.part(copy.name, WEIGHTS, 0, 10)


def test_nothing_remains_of_a_copy_for_which_the_disk_is_too_full(disk: Disk) -> None:
    copies = Copies(disk.folder / "fetched", "one")
    disk.leave(4 * PAGE)
    with (
        pytest.raises(DiskFullError, match=str(disk.folder)),
        copies.staging(2**20) as staging,
    ):
        (staging / WEIGHTS).write_bytes(b"0" * 2**20)
    assert list((disk.folder / "fetched" / "served-one").iterdir()) == []
