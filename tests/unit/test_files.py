"""Atomic writes, locks, and errors of full disks."""

from __future__ import annotations

import errno
import os
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rayft import files
from rayft.errors import DiskFullError
from rayft.files import (
    ABANDONED_SECONDS,
    abandoned,
    disk_full,
    kept_alive,
    locked,
    machine,
    room_on,
    write_file,
)


def test_a_file_is_replaced_whole_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    assert write_file(path, "one") == path
    write_file(path, "žwei")
    assert path.read_bytes() == "žwei".encode()
    assert os.listdir(path.parent) == ["a.json"]


def test_a_write_that_fails_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_file(tmp_path / "a.json", "old")

    def refuse(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(DiskFullError, match=r"3 bytes needed, .* free"):
        write_file(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


FULL = (
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    RuntimeError("I/O error: No space left on device (os error 28)"),
    sqlite3.OperationalError("database or disk is full"),
)


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_every_librarys_error_of_a_full_disk_is_recognised(error: Exception, tmp_path: Path) -> None:
    outer = RuntimeError("can't save")
    outer.__cause__ = error
    assert disk_full(error)
    assert disk_full(outer)
    with pytest.raises(DiskFullError, match=str(tmp_path)), room_on(tmp_path / "missing"):
        raise outer


def test_other_errors_are_not_changed(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), room_on(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_a_lock_has_one_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path) as held:
        assert held is not None
        with locked(path, wait=0) as second:
            assert second is None
    with locked(path, wait=0) as again:
        assert again is not None


def test_a_file_that_each_holder_deletes_has_one_holder_at_a_time(tmp_path: Path) -> None:
    path, inside = tmp_path / "lock", 0
    seen: list[int] = []

    def hold() -> None:
        nonlocal inside
        for _ in range(300):
            with locked(path) as descriptor:
                assert descriptor is not None
                inside += 1
                seen.append(inside)
                inside -= 1
                path.unlink()

    with ThreadPoolExecutor(4) as pool:
        for held in [pool.submit(hold) for _ in range(4)]:
            held.result(timeout=60)
    assert seen == [1] * 1200


def test_a_folder_is_abandoned_after_some_minutes_without_a_sign_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    assert not abandoned(folder)
    os.utime(folder, (time.time() - ABANDONED_SECONDS - 1,) * 2)
    assert abandoned(folder)
    monkeypatch.setattr(files, "ALIVE_SECONDS", 0.01)
    with kept_alive(folder):
        deadline = time.monotonic() + 10
        while abandoned(folder) and time.monotonic() < deadline:
            time.sleep(0.01)
    assert not abandoned(folder)
    with pytest.raises(FileNotFoundError):
        abandoned(tmp_path / "missing")


def test_a_machine_has_the_same_name_in_all_its_processes() -> None:
    code = "from rayft.files import machine; print(machine())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == machine()
