"""The file that passes an adapter to the workers."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from rayft.artifacts import AdapterArtifact
from rayft.errors import ResourceError
from rayft.kernels.segment_lora import SlotFactors
from rayft.serving.engine.vllm import files
from rayft.serving.engine.vllm.files import read, slot_factors, written
from tests.disks import Disk, full_disk
from tests.unit.serving.adapters import random_adapter

Usage = namedtuple("Usage", "total used free")

SHAPES = {"layers.0.q_proj": (13, 20), "layers.0.down_proj": (7, 5), "layers.1.q_proj": (1, 3)}


def lora() -> AdapterArtifact:
    return random_adapter("lora", SHAPES, rank=3)


def selector() -> AdapterArtifact:
    return random_adapter("selector", SHAPES, rank=3, selector=True)


def mixed() -> AdapterArtifact:
    return AdapterArtifact({**lora().modules, "layers.0.q_proj": selector().modules["layers.0.q_proj"]})


KINDS = pytest.mark.parametrize("make", [lora, selector, mixed])
Make = Callable[[], AdapterArtifact]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in place of shared memory, in which nothing else writes."""
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(files, "SHARED", folder)
    return folder


def check(found: dict[str, SlotFactors], artifact: AdapterArtifact, dtype: torch.dtype) -> None:
    assert {*found} == {*artifact.modules}
    for name, layer in artifact.modules.items():
        factors = found[name]
        assert factors.scale == layer.scale
        assert torch.equal(factors.b, layer.b.to(dtype))
        if layer.columns is None:
            assert factors.a is not None
            assert torch.equal(factors.a, layer.a.to(dtype))
        else:
            assert factors.columns is not None
            assert factors.columns.dtype == torch.int64
            assert tuple(factors.columns.tolist()) == layer.columns


@KINDS
@DTYPES
def test_what_is_written_is_read(make: Make, dtype: torch.dtype) -> None:
    artifact = make()
    with written(artifact, dtype) as path:
        found = read(path)
    # The file is deleted here, and the tensors stay.
    check(found, artifact, dtype)


@KINDS
@DTYPES
def test_the_file_is_one_of_safetensors(make: Make, dtype: torch.dtype) -> None:
    artifact = make()
    with written(artifact, dtype) as path:
        loaded = load_file(path)
        with safe_open(path, framework="pt") as opened:
            scales = json.loads(opened.metadata()["scales"])
        length = int.from_bytes(path.read_bytes()[:8], "little")
        header = json.loads(path.read_bytes()[8 : 8 + length])
    assert scales == {name: layer.scale for name, layer in artifact.modules.items()}
    expected = {}
    for name, layer in artifact.modules.items():
        factors = slot_factors(layer)
        expected[f"{name}.b"] = factors.b.to(dtype)
        if factors.a is not None:
            expected[f"{name}.a"] = factors.a.to(dtype)
        if factors.columns is not None:
            expected[f"{name}.columns"] = factors.columns
    assert {*loaded} == {*expected}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    # The workers map the file, so each tensor has to begin at a multiple of its numbers' size.
    first = 8 + length
    for name, tensor in expected.items():
        assert (first + header[name]["data_offsets"][0]) % tensor.element_size() == 0


@KINDS
def test_an_adapters_folder_is_read_too(make: Make, tmp_path: Path) -> None:
    artifact = make()
    # Folders hold α = s·rank.
    saved = AdapterArtifact.load(artifact.save(tmp_path / "adapter"))
    check(read(tmp_path / "adapter"), saved, torch.float32)


def test_the_file_is_in_shared_memory_until_the_block_ends(shared: Path) -> None:
    with written(lora(), torch.float32) as path:
        assert path.parent == shared
    assert [*shared.iterdir()] == []


def test_the_file_is_deleted_after_an_error_in_the_block(shared: Path) -> None:
    with pytest.raises(KeyError), written(lora(), torch.float32):
        raise KeyError
    assert [*shared.iterdir()] == []


def test_temporary_files_are_used_if_there_is_little_shared_memory(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(factors.a.nbytes + factors.b.nbytes for factors in lora().modules.values())
    for free, folder in ((2 * size, Path(tempfile.gettempdir())), (2 * size + 1, shared)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Usage(free, 0, free))
        with written(lora(), torch.float32) as path:
            assert path.parent == folder
        assert not path.exists()


def test_temporary_files_are_used_if_there_is_no_shared_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SHARED", tmp_path / "missing")
    with written(lora(), torch.float32) as path:
        assert path.parent == Path(tempfile.gettempdir())


def test_a_full_disk_is_the_users_problem_and_leaves_nothing(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", full_disk)
    with (
        pytest.raises(ResourceError, match=r"adapter of [\d,]+ bytes.*shm.*No space left.*free space there"),
        written(lora(), torch.float32),
    ):
        pytest.fail("it has a file")
    assert [*shared.iterdir()] == []


def test_a_disk_that_is_really_full(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SHARED", disk.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**30, 0, 2**30))
    artifact = random_adapter("large", {"layer": (4096, 4096)}, rank=64)
    disk.leave(2**20)
    with pytest.raises(ResourceError, match="free space there"), written(artifact, torch.bfloat16):
        pytest.fail("it has a file")
    assert [*disk.folder.iterdir()] == []
