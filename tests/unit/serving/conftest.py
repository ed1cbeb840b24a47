from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from rayft.models.load import LoadedModel, ModelConfig, load_model
from rayft.models.targets import linear_shapes
from rayft.serving.engine.api import Engine, EngineLimits, end_tokens
from rayft.serving.engine.cpu.engine import CpuEngine
from tests.unit.serving.adapters import save_adapters

MakeEngine = Callable[..., Engine]


def cpu_engine(loaded: LoadedModel, limits: EngineLimits) -> CpuEngine:
    return CpuEngine(loaded.model, end_tokens(loaded.model.generation_config, loaded.tokenizer), limits)


@pytest.fixture
def loaded(tiny_folder: Path) -> LoadedModel:
    return load_model(ModelConfig(name=str(tiny_folder)), torch.float32)


@pytest.fixture(scope="session")
def adapter_folders(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    base = load_model(ModelConfig(name=str(tiny_folder)), torch.float32)
    return save_adapters(tmp_path_factory.mktemp("adapters"), linear_shapes(base.model), base.fingerprint)


@pytest.fixture
def make_engine(loaded: LoadedModel) -> Iterator[MakeEngine]:
    made: list[Engine] = []

    def make(max_running: int = 8, max_batch_tokens: int = 64, cache_tokens: int = 2048) -> Engine:
        made.append(cpu_engine(loaded, EngineLimits(max_running, max_batch_tokens, cache_tokens)))
        return made[-1]

    yield make
    for engine in made:
        engine.stop()
