"""The file that passes adapters to the workers."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rayft.artifacts import AdapterArtifact
from rayft.errors import ArtifactError, ResourceError
from rayft.serving.engine.vllm import files
from rayft.serving.engine.vllm.files import Channel, Inbox
from rayft.serving.engine.vllm.image import Bytes, Image, factors_of
from rayft.serving.engine.vllm.shard import Part, Parts
from tests.disks import Disk, full_disk
from tests.unit.serving.adapters import random_adapter

Usage = namedtuple("Usage", "total used free")

SHAPES = {"layers.0.q_proj": (13, 20), "layers.0.down_proj": (8, 6), "layers.1.q_proj": (1, 3)}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def parts_of(rank: int, workers: int) -> Parts:
    """Return what one of several workers has: a share of the first two layers."""
    found = []
    for name, (outputs, inputs) in SHAPES.items():
        rows, columns = (0, outputs), (0, inputs)
        if name.endswith("down_proj"):
            columns = (rank * inputs // workers, (rank + 1) * inputs // workers)
            rows = (0, outputs)
        found.append(Part(name, (outputs, inputs), rows, columns))
    return tuple(found)


def lora(rank: int = 3) -> AdapterArtifact:
    return random_adapter(f"lora {rank}", SHAPES, rank=rank)


def channel_of(workers: int = 1) -> Channel:
    return Channel([parts_of(rank, workers) for rank in range(workers)], torch.float32)


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in place of shared memory, in which nothing else writes."""
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(files, "SHARED", folder)
    yield folder
    assert [*folder.iterdir()] == []


def all_of(image: Bytes, piece: int = 10**5) -> bytes:
    """Read an image in pieces; what no piece fills is zero."""
    found, begin = bytearray(image.nbytes), 0
    while begin < image.nbytes:
        memory = torch.zeros(piece, dtype=torch.uint8)
        count = image.read(memory, begin)
        found[begin : begin + count] = memory[:count].numpy().tobytes()
        begin += count
    return bytes(found)


@DTYPES
def test_each_worker_gets_its_image(dtype: torch.dtype, shared: Path) -> None:
    artifact = random_adapter("selector", SHAPES, rank=3, selector=True)
    workers = [parts_of(rank, 3) for rank in range(3)]
    channel = Channel([*workers, workers[1]], dtype)
    path = channel.write(artifact)
    for parts in workers:
        expected = all_of(Image(factors_of(artifact), parts, dtype))
        # What lies between two matrices is not read.
        found = all_of(Inbox(parts, dtype).image(path), 1000)
        assert len(found) == len(expected)
        assert found[: 3 * 64] == expected[: 3 * 64]
        assert len(found) - sum(map(int.__eq__, found, expected)) < 3 * 3 * 256
    channel.close()


def test_a_large_adapter_passes_in_pieces(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PIECE", 256)
    artifact, parts = lora(8), parts_of(0, 1)
    channel = channel_of()
    found = all_of(Inbox(parts, torch.float32).image(channel.write(artifact)))
    expected = all_of(Image(factors_of(artifact), parts, torch.float32))
    entries = torch.frombuffer(bytearray(expected), dtype=torch.int64)[: 3 * 8].view(3, 8).tolist()
    for (outputs, inputs), (a, b, *_) in zip(SHAPES.values(), entries, strict=True):
        assert found[b : b + 32 * outputs] == expected[b : b + 32 * outputs]
        assert found[a : a + 32 * inputs] == expected[a : a + 32 * inputs]
    channel.close()


def test_one_file_without_a_name_serves_all_loads(shared: Path) -> None:
    channel, inbox = channel_of(), Inbox(parts_of(0, 1), torch.float32)
    paths, sizes = set(), []
    for rank in (9, 3, 9, 16):
        paths.add(path := channel.write(lora(rank)))
        sizes.append(inbox.image(path).nbytes)
        assert sizes[-1] == Image(factors_of(lora(rank)), parts_of(0, 1), torch.float32).nbytes
        channel.settle(opened=True)
        assert [*shared.iterdir()] == [], "it ends with the processes that have it open"
    assert len(paths) == 1
    assert sizes[0] == sizes[2] != sizes[1]
    image = inbox.image(path)
    channel.close()
    with pytest.raises(OSError, match="too short"):
        all_of(image)


def test_the_name_stays_until_all_workers_have_opened_the_file(shared: Path) -> None:
    channel = channel_of()
    path = channel.write(lora())
    channel.settle(opened=False)
    assert [*shared.iterdir()] == [path]
    assert channel.write(lora(2)) == path
    Inbox(parts_of(0, 1), torch.float32).image(path)
    channel.settle(opened=True)
    assert [*shared.iterdir()] == []
    channel.close()


def test_the_file_of_an_engine_that_was_killed_is_deleted_by_the_next_one(shared: Path) -> None:
    killed, alive, new = channel_of(), channel_of(), channel_of()
    left, used, young = killed.write(lora()), alive.write(lora()), shared / f"{files.PREFIX}young"
    young.touch()
    for path in (left, used):
        os.utime(path, (0, 0))
    # The system does this when a process is killed.
    assert killed._handle is not None
    os.close(killed._handle)
    made = new.write(lora())
    assert {*shared.iterdir()} == {used, young, made}
    young.unlink()
    alive.close()
    new.close()


def test_the_engine_sees_when_the_workers_have_read(shared: Path) -> None:
    channel = channel_of(2)
    first, second = (Inbox(parts_of(rank, 2), torch.float32) for rank in range(2))
    first.mark(7)
    path = channel.write(lora())
    for inbox in (second, first):
        assert not channel.was_read(7)
        inbox.image(path)
        inbox.mark(7)
    assert channel.was_read(7)
    assert not channel.was_read(8)
    channel.write(lora(2))
    # A load that was given up, which ends late.
    second.mark(7)
    second.mark(8)
    assert not channel.was_read(8)
    first.mark(8)
    assert channel.was_read(8)
    channel.close()


def test_a_large_adapter_leaves_no_large_file(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "KEPT", 10_000)
    channel, inbox = channel_of(), Inbox(parts_of(0, 1), torch.float32)
    for _ in range(2):
        path = channel.write(lora(200))
        expected = all_of(Image(factors_of(lora(200)), parts_of(0, 1), torch.float32))
        assert len(all_of(inbox.image(path))) == len(expected) > 10_000
        assert path.stat().st_size > 10_000
        channel.settle(opened=False)
        assert path.stat().st_size == 10_000
    channel.close()


def test_temporary_files_are_used_if_there_is_little_shared_memory(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free, temporary = 0, Path(tempfile.gettempdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free, 0, free))
    channel, inbox = channel_of(), Inbox(parts_of(0, 1), torch.float32)
    seen = []
    for rank, room in ((3, 0), (4, 100_000), (200, 30_000), (4, 100_000), (3, 0)):
        free = room
        path = channel.write(lora(rank))
        assert len(all_of(inbox.image(path))) > 0
        seen.append(path)
        assert path.is_file()
        assert sum(one.is_file() for one in {*seen}) == 1, "one at a time"
    assert [path.parent for path in seen] == [temporary, shared, temporary, temporary, temporary]
    assert len({*seen}) == 3
    channel.close()
    assert not path.exists()


def test_temporary_files_are_used_if_there_is_no_shared_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SHARED", tmp_path / "missing")
    channel = channel_of()
    path = channel.write(lora())
    assert path.parent == Path(tempfile.gettempdir())
    channel.close()
    assert not path.exists()


def test_an_adapter_that_does_not_fit_the_model_makes_no_file(shared: Path) -> None:
    with pytest.raises(ArtifactError, match="no linear layer lm_head"):
        channel_of().write(random_adapter("head", {"lm_head": (4, 4)}))


def test_a_full_disk_is_the_users_problem_and_leaves_nothing(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel, inbox = channel_of(), Inbox(parts_of(0, 1), torch.float32)
    for name in ("pwrite", "pwrite", "open"):
        with monkeypatch.context() as context:
            context.setattr(os, name, full_disk)
            message = r"adapter of [\d,]+ bytes.*shm.*No space left.*free space there"
            with pytest.raises(ResourceError, match=message):
                channel.write(lora())
        assert [*shared.iterdir()] == []
        # Then there is space again.
        all_of(inbox.image(channel.write(lora())))
        channel.settle(opened=True)
        channel.close()


def test_a_disk_takes_what_is_written_bit_by_bit(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, rest, place: write(handle, rest[:100], place))
    channel = channel_of()
    image = Inbox(parts_of(0, 1), torch.float32).image(channel.write(lora()))
    assert all_of(image)[:64] == all_of(Image(factors_of(lora()), parts_of(0, 1), torch.float32))[:64]
    channel.close()


def test_a_disk_that_is_really_full(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SHARED", disk.folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**30, 0, 2**30))
    parts = (Part("layer", (4096, 4096), (0, 4096), (0, 4096)),)
    channel, inbox = Channel([parts], torch.bfloat16), Inbox(parts, torch.bfloat16)
    small, large = (random_adapter("one", {"layer": (4096, 4096)}, rank=rank) for rank in (8, 64))
    disk.leave(2**20)
    used = disk.used
    inbox.image(channel.write(small))
    with pytest.raises(ResourceError, match="free space there"):
        channel.write(large)
    assert [*disk.folder.iterdir()] == []
    assert disk.used == used, "although the worker has the file open"
    inbox.image(channel.write(small))
    channel.close()


def test_a_file_that_is_gone_or_broken_can_not_be_read(tmp_path: Path) -> None:
    inbox = Inbox(parts_of(0, 1), torch.float32)
    with pytest.raises(OSError, match="missing") as caught:
        inbox.image(tmp_path / "missing")
    assert caught.value.errno == errno.ENOENT
    inbox.mark(3)
