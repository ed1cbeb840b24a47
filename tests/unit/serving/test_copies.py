from __future__ import annotations

import os
from pathlib import Path

import pytest

from rayft.artifacts import AdapterArtifact
from rayft.errors import ArtifactError
from rayft.serving.copies import STALE_SECONDS, Copies, Record
from rayft.serving.state import Deployed, Served
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


def test_a_source_that_changes_meanwhile_is_refused(tmp_path: Path) -> None:
    source, content = save(tmp_path / "a")
    save(source, "b")
    copies = Copies(tmp_path / "fetched", "one")
    with pytest.raises(ArtifactError, match="changed while it was read"):
        copies.take(source, content)
    assert list((tmp_path / "fetched" / "served-one").iterdir()) == []


def test_equal_factors_with_other_metadata_are_two_copies(tmp_path: Path) -> None:
    source, content = save(tmp_path / "a")
    copies = Copies(tmp_path / "fetched", "one")
    first = copies.take(source, content)
    loaded = AdapterArtifact.load(source)
    meta = loaded.meta.model_copy(update={"singular_values": {"layer.q_proj": (1.0,) * 4}})
    AdapterArtifact(loaded.modules, meta=meta).save(source)
    second = copies.take(source, content)
    assert (AdapterArtifact.load(first).squeezed, AdapterArtifact.load(second).squeezed) == (False, True)
    copies.keep({str(second)})
    assert [first.exists(), second.exists()] == [False, True]


def test_the_record_is_read_back_and_a_damaged_one_is_none(tmp_path: Path) -> None:
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
