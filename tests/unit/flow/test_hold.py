"""Only one command at a time writes to a folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rayft.errors import ConfigError, DiskFullError
from rayft.flow.hold import LOCK_FILE, hold
from tests.disks import Disk

HOLDER = """
import sys, time
from pathlib import Path
from rayft.flow.hold import hold
with hold(Path(sys.argv[1]), "--out"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_command_is_refused_by_naming_the_first(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        refusal = rf"process {holder.pid} on .* is writing to {folder}; .* with --out\. "
        with pytest.raises(ConfigError, match=refusal), hold(folder, "--out"):
            pass
        holder.kill()
        holder.wait()
    assert (folder / LOCK_FILE).is_file()
    # The system has released the lock of the process that was killed.
    with hold(folder, "--out"):
        assert str(os.getpid()) in (folder / LOCK_FILE).read_text()
    assert not (folder / LOCK_FILE).exists()


def test_a_folder_that_stays_empty_is_removed_again(tmp_path: Path) -> None:
    with hold(tmp_path / "a" / "b", "--out"):
        pass
    assert list(tmp_path.iterdir()) == []
    with hold(tmp_path / "a" / "b", "--out"):
        (tmp_path / "a" / "b" / "kept").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["kept"]


def test_a_disk_without_space_for_the_lock_is_an_error(disk: Disk) -> None:
    (disk.folder / "full").write_bytes(bytes(disk.used))
    disk.hold_files(1)
    with pytest.raises(DiskFullError, match=str(disk.folder)), hold(disk.folder / "out", "--out"):
        pass
