"""Sweeps of the tiny model that are as short as can be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rayft.flow.config import PipelineConfig, load_config


def small_config(
    folder: Path, methods: Mapping[str, Any], squeeze: Mapping[str, Any] | None = None
) -> PipelineConfig:
    """Write the shipped `tiny` with other methods and four steps, and read it back."""
    tiny = load_config("tiny", [f"output={folder / 'out'}"]).model_dump(mode="json")
    tiny["optim"]["steps"] = tiny["sweep"]["grace"] = 4
    tiny["data"] |= {"train": 24, "val": 4, "test": 4}
    tiny["sweep"]["methods"] = dict(methods)
    tiny["squeeze"] |= dict(squeeze or {})
    (folder / "small.yaml").write_text(yaml.safe_dump(tiny))
    return load_config(str(folder / "small.yaml"))
