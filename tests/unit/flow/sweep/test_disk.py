"""How much a sweep writes, and that full disks are found before it starts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rayft.errors import DiskFullError
from rayft.flow.config import load_config
from rayft.flow.sweep.disk import check_disk, check_other_disks, derived_bytes, trial_bytes
from rayft.models.load import load_skeleton
from rayft.models.targets import linear_shapes
from rayft.sweep.space import points
from tests.disks import Disk

pytestmark = pytest.mark.usefixtures("prepared")


def test_a_disk_without_room_for_all_that_a_sweep_writes_is_refused(disk: Disk) -> None:
    with pytest.raises(
        DiskFullError,
        match=rf"the sweep may write 5\.0 GiB below {disk.folder} \(3\.0 GiB of adapters and checkpoints, "
        r"2\.0 GiB of .* tracked adapters\), but only 0\.1 GiB are free, of which 1\.0 GiB must stay free",
    ):
        check_disk(disk.folder, 3 * 2**30, 2 * 2**30)


def test_other_folders_on_full_disks_are_refused_or_warned_of(
    tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    for setting in ("RAYFT_CACHE", "RAY_TMPDIR", "TMPDIR"):
        with monkeypatch.context() as patch:
            patch.setenv(setting, str(disk.folder))
            patch.setattr("tempfile.tempdir", None)
            with pytest.raises(
                DiskFullError, match=rf"{disk.folder}.* has only 6\d MiB free.* set {setting} to"
            ):
                check_other_disks(tmp_path)
    disk.resize(2**30)
    monkeypatch.setenv("RAY_TMPDIR", str(disk.folder))
    assert check_other_disks(tmp_path) == ()
    os.posix_fallocate(os.open(disk.folder / "filler", os.O_CREAT | os.O_RDWR), 0, int(2**30 * 0.96))
    monkeypatch.setattr("rayft.flow.sweep.disk.SCRATCH", 2**20)
    (warning,) = check_other_disks(tmp_path)
    assert "more than 95% full, so Ray can't move objects" in warning


def written(methods: str, *overrides: str) -> tuple[int, int]:
    """Return the bytes that a sweep's trials write, and the bytes that it writes besides them."""
    config = load_config("tiny", [f"sweep.methods={methods}", *overrides])
    run = config.run()
    trials, shapes = points(config.sweep, run), linear_shapes(load_skeleton(run.model))
    return trial_bytes(trials, shapes, config.sweep.lanes), derived_bytes(config, trials, shapes)


LORA, FULL = "lora: {ranks: [4], lr: [1e-2]}", "full: {lr: [1e-4]}"


def test_each_trial_writes_its_own_bytes() -> None:
    (lora, lora_copies), (full, full_copies) = written(f"{{{LORA}}}"), written(f"{{{FULL}}}")
    together, copies = written(f"{{{LORA}, {FULL}}}")
    # A trial keeps 4 bytes of an adapter and 20 of a checkpoint for each number; the lane 40 of two more.
    lora_numbers, full_numbers = lora // 64, full // 64
    assert together == 24 * (lora_numbers + full_numbers) + 40 * full_numbers
    assert full > 2 * lora
    # A tracked copy of the trial; the winner and two squeezed adapters, twice; the registered one.
    assert lora_copies == 4 * lora_numbers * (1 + 2 * 3 + 1)
    # The whole model, whose embeddings no adapter has.
    assert full_copies > 4 * full_numbers
    assert copies == lora_copies + full_copies


def test_a_trail_of_adapters_is_counted_and_whole_models_leave_none() -> None:
    trail = ("evaluate.trail=true", "evaluate.every=2")
    lora, _ = written(f"{{{LORA}}}")
    # Eight steps have four evaluations: five adapters are written, not one, beside the checkpoints.
    assert written(f"{{{LORA}}}", *trail)[0] == lora + 4 * 4 * (lora // 64)
    assert written(f"{{{FULL}}}", *trail)[0] == written(f"{{{FULL}}}")[0]
