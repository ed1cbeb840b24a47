"""File transfer between a command's node and lanes on other disks, without Ray."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rayft.artifacts import AdapterArtifact
from rayft.artifacts.folder import is_staged_folder
from rayft.errors import ArtifactError
from rayft.files import machine
from rayft.methods.base import LoraFactors
from rayft.sweep import transfer
from rayft.sweep.transfer import FileHost, RemoteHome
from rayft.train.checkpoint_folder import last_step
from rayft.train.home import Home


class Direct:
    """The file host, called directly in this process instead of as an actor."""

    def __init__(self, home: Path) -> None:
        self._host, self._home = FileHost(), home

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            os.rename(self._home.with_name("away"), self._home)
            try:
                return getattr(self._host, name)(*arguments)
            finally:
                os.rename(self._home, self._home.with_name("away"))

        return SimpleNamespace(remote=call)


@pytest.fixture
def home_folder(tmp_path: Path) -> Path:
    """Return a folder that only the host sees: it has this name only during a call of the host."""
    (tmp_path / "away").mkdir()
    return tmp_path / "home"


@pytest.fixture
def remote(home_folder: Path, monkeypatch: pytest.MonkeyPatch) -> RemoteHome:
    monkeypatch.setenv("RAYFT_CACHE", str(home_folder.with_name("cache")))
    monkeypatch.setattr(transfer, "PART", 1000)
    monkeypatch.setattr(transfer.ray, "get", lambda value: value)
    return RemoteHome(Direct(home_folder), "lane0")


def test_files_and_folders_are_fetched_unchanged(remote: RemoteHome, home_folder: Path) -> None:
    away = home_folder.with_name("away")
    (away / "base" / "sub").mkdir(parents=True)
    (away / "base" / "weights").write_bytes(os.urandom(3500))
    (away / "base" / "sub" / "empty").touch()
    (away / "rows.jsonl").write_text("{}\n")
    base = remote.local(home_folder / "base")
    assert base.name == "base"
    assert (base / "weights").read_bytes() == (away / "base" / "weights").read_bytes()
    assert (base / "sub" / "empty").read_bytes() == b""
    rows = remote.local(str(home_folder / "rows.jsonl"))
    assert rows.suffix == ".jsonl", "the suffix says how it is read"
    assert rows.read_text() == "{}\n"
    assert remote.local(home_folder / "missing") == home_folder / "missing"
    assert remote.local("tiny-llama") == Path("tiny-llama"), "a name is no path"


def test_a_file_that_this_node_has_is_not_fetched(remote: RemoteHome, tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    assert remote.local(tmp_path / "own") == tmp_path / "own"


def test_copies_are_deleted_with_their_scope(remote: RemoteHome, home_folder: Path) -> None:
    (home_folder.with_name("away") / "one").write_text("1")
    with remote.within("session1"):
        base = remote.local(home_folder / "one")
    with remote.within("job1"):
        adapter = remote.local(home_folder / "one")
    remote.drop("job1")
    assert base.exists()
    assert not adapter.exists()
    remote.drop("session1")
    assert not base.exists()


def test_a_checkpoint_of_two_nodes_is_complete_at_home(remote: RemoteHome, home_folder: Path) -> None:
    away = home_folder.with_name("away")
    other = RemoteHome(remote._host, "lane0-on-another-node")
    for step in (1, 2, 3):
        for rank, node in enumerate((remote, other)):
            place = node.place(home_folder / "trials" / "a" / "checkpoint") / f"step-{step:06d}"
            place.mkdir(parents=True)
            (place / f"rank{rank}.pt").write_bytes(os.urandom(2500))
            node.send(place)
            assert not place.exists(), "it fills the disk of a node that does not need it"
        place = remote.place(home_folder / "trials" / "a" / "checkpoint") / f"step-{step:06d}"
        remote.commit(place, {"step": step, "tag": place.name, "identity": {}})
    checkpoint = away / "trials" / "a" / "checkpoint"
    assert sorted(path.name for path in checkpoint.iterdir() if path.is_dir()) == [
        "step-000002",
        "step-000003",
    ]
    state = json.loads((checkpoint / "step-000003" / "state.json").read_text())
    assert set(state["files"]) == {"rank0.pt", "rank1.pt"}
    assert last_step(checkpoint) == 3

    # A lane on a third node continues from this checkpoint.
    third = RemoteHome(remote._host, "lane1")
    place = third.place(home_folder / "trials" / "a" / "checkpoint")
    third.bring(place)
    assert last_step(place) == 3
    third.prune(place, 1)
    assert [path.name for path in checkpoint.iterdir() if path.is_dir()] == ["step-000003"]


def test_an_adapter_arrives_unchanged(remote: RemoteHome, home_folder: Path) -> None:
    folder = home_folder / "trials" / "a"
    sent = AdapterArtifact({"q": LoraFactors(torch.randn(2, 6), torch.randn(4, 2), 1.0)})
    sent.save(remote.place(folder) / "adapter")
    remote.check(folder / "adapter")
    remote.send(remote.place(folder) / "adapter", keep=True)
    found = AdapterArtifact.load(home_folder.with_name("away") / "trials" / "a" / "adapter")
    assert found.content_hash == sent.content_hash
    assert (remote.place(folder) / "adapter").is_dir()
    remote.write(remote.place(folder) / "result.json", "{}")
    assert (home_folder.with_name("away") / "trials" / "a" / "result.json").read_text() == "{}"


def test_a_folder_at_home_with_other_files_is_not_replaced(remote: RemoteHome, home_folder: Path) -> None:
    adapter = home_folder.with_name("away") / "trials" / "a" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "thesis.tex").touch()
    with pytest.raises(ArtifactError, match=r"thesis\.tex"):
        remote.check(home_folder / "trials" / "a" / "adapter")


def test_the_next_command_deletes_what_a_killed_lane_had_begun_to_send(tmp_path: Path) -> None:
    host, target = FileHost(), tmp_path / "trials" / "a" / "adapter"
    host.append(f"{host.begin(str(target))}/adapter_model.safetensors", b"half")
    (left,) = target.parent.iterdir()
    assert is_staged_folder(left)


def test_the_folder_of_a_killed_lane_is_deleted(remote: RemoteHome, tmp_path: Path) -> None:
    old = tmp_path / "cache" / "lanes" / "old"
    old.mkdir()
    os.utime(old, (0, 0))
    RemoteHome(remote._host, "new")
    assert not old.exists()
    assert (tmp_path / "cache" / "lanes" / f"lane0-{machine()}").is_dir(), "a living lane lost its files"
    remote.close()
    assert not (tmp_path / "cache" / "lanes" / f"lane0-{machine()}").exists()


def test_on_a_shared_disk_every_path_is_used_as_it_is(tmp_path: Path) -> None:
    home = Home()
    assert home.local(tmp_path) == home.place(tmp_path) == tmp_path
    home.write(tmp_path / "small", "text")
    home.send(tmp_path)
    assert (tmp_path / "small").read_text() == "text"
    home.remove(tmp_path)
    assert not tmp_path.exists()
