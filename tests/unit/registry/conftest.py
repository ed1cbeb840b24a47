from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rayft.artifacts import AdapterArtifact, ArtifactMeta
from rayft.methods.base import LoraFactors
from rayft.registry.store import MlflowRegistry
from rayft.tracking import TrackerSpec
from rayft.tracking.mlflow import MlflowTracker


@pytest.fixture
def registry(spec: TrackerSpec) -> MlflowRegistry:
    return MlflowRegistry(spec.uri)


@pytest.fixture
def run_id(spec: TrackerSpec) -> str:
    with MlflowTracker(spec) as tracker:
        return tracker.run("trial", "t0")


@pytest.fixture
def adapter(tmp_path: Path) -> Callable[[int], Path]:
    """Save an adapter folder whose content depends on a seed."""

    def save(seed: int) -> Path:
        generator = torch.Generator().manual_seed(seed)
        factors = LoraFactors(
            torch.randn(2, 6, generator=generator), torch.randn(5, 2, generator=generator), 2.0
        )
        meta = ArtifactMeta(method="lora", base_model="base", base_fingerprint="f00d")
        return AdapterArtifact({"layers.0.q": factors}, meta=meta).save(tmp_path / "adapters" / str(seed))

    return save
