"""Adapters that travel to the lane that scores them."""

from __future__ import annotations

from pathlib import Path

import torch

from rayft.artifacts import AdapterArtifact
from rayft.methods.base import LoraFactors
from rayft.sweep.score import _artifact, folder_files


def test_an_adapter_travels_with_its_files(tmp_path: Path) -> None:
    factors = LoraFactors(torch.randn(2, 6), torch.randn(4, 2), 1.0)
    sent = AdapterArtifact({"q": factors})
    sent.save(tmp_path / "adapter")
    files = folder_files(tmp_path / "adapter")
    assert set(files) == {"adapter_config.json", "adapter_model.safetensors", "rayft.json"}
    found = _artifact("/on/another/machine", files)
    assert found.content_hash == sent.content_hash
    assert _artifact(str(tmp_path / "adapter"), {}).content_hash == sent.content_hash
