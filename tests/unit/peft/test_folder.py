"""A folder in PEFT's own format is written whole or not at all, whatever its tensors look like."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rayft.artifacts import ArtifactMeta
from rayft.artifacts import folder as adapter_folder
from rayft.errors import DiskFullError
from rayft.peft.folder import PeftFolder
from tests.disks import full_disk, full_disk_in_rust

META = ArtifactMeta(method="peft:C3A")


def made(value: float = 1.0) -> PeftFolder:
    tensors = {"base_model.model.up.c3a_kernel": torch.full((2, 3), value)}
    return PeftFolder({"peft_type": "C3A", "modules_to_save": None}, tensors, META)


def test_tensors_that_are_not_contiguous_are_saved_and_loaded(tmp_path: Path) -> None:
    turned = torch.arange(6.0).reshape(2, 3).t()
    folder = PeftFolder({"peft_type": "C3A"}, {"base_model.model.up.c3a_kernel": turned}, META)
    loaded = PeftFolder.load(folder.save(tmp_path / "adapter"))
    assert torch.equal(loaded.tensors["base_model.model.up.c3a_kernel"], turned)
    assert loaded.content_hash == folder.content_hash


@pytest.mark.parametrize("full", [full_disk, full_disk_in_rust])
def test_a_full_disk_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: Callable[..., None]
) -> None:
    made(1.0).save(tmp_path / "adapter")
    monkeypatch.setattr(adapter_folder, "save_file", full)
    with pytest.raises(DiskFullError, match=rf"the disk of {tmp_path} is full \(.* needed, .* free\)"):
        made(2.0).save(tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert PeftFolder.load(tmp_path / "adapter").content_hash == made(1.0).content_hash


def test_a_failed_swap_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(1.0).save(tmp_path / "adapter")
    rename = Path.rename

    def fails(self: Path, target: Any) -> Path:
        # Whatever goes to the folder's own place, but for what was there before.
        if Path(target).name == "adapter" and self.name != "old":
            raise OSError(5, "I/O error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="I/O error"):
        made(2.0).save(tmp_path / "adapter")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert PeftFolder.load(tmp_path / "adapter").content_hash == made(1.0).content_hash
