"""Full disks: file systems in memory, whose size a test sets, and functions that fail as on a full disk."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors import SafetensorError

PAGE = os.sysconf("SC_PAGE_SIZE")


class Disk:
    """A mounted tmpfs whose size can be changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def used(self) -> int:
        """Bytes that the files use."""
        found = os.statvfs(self.folder)
        return (found.f_blocks - found.f_bfree) * found.f_frsize

    def leave(self, free: int) -> None:
        """Resize the disk so that `free` bytes, rounded up to pages, are free."""
        self.resize(self.used + max(free, 0))

    def hold_files(self, number: int) -> None:
        """Limit the number of files and folders, not counting the root."""
        self._mount(f"remount,nr_inodes={number + 1}")

    def resize(self, size: int) -> None:
        """Resize the disk to a number of bytes, but to one page at least: 0 would mean no limit."""
        self._mount(f"remount,size={max(size, PAGE)}")

    def _mount(self, options: str) -> None:
        subprocess.run(["mount", "-o", options, str(self.folder)], check=True)


@contextmanager
def mounted(folder: Path, size: int) -> Iterator[Disk]:
    """Mount a disk of `size` bytes for a block. Skip the test if mounting is not allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], check=False, capture_output=True
    )
    if made.returncode:
        pytest.skip(f"a small disk can't be mounted here ({made.stderr.decode().strip()}): it takes root")
    try:
        yield Disk(folder)
    finally:
        # Lazily: a library may still hold a file of it open.
        subprocess.run(["umount", "-l", str(folder)], check=True)


def full_disk(*_args: object, **_options: object) -> None:
    """Fail as Python's file functions do when the disk is full."""
    raise OSError(errno.ENOSPC, "No space left on device")


def full_disk_in_rust(*_args: object, **_options: object) -> None:
    """Fail as safetensors, which writes its files in Rust, does when the disk is full."""
    raise SafetensorError('I/O error: Os { code: 28, message: "No space left on device (os error 28)" }')
