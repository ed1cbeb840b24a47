from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from rayft.models.load import LoadedModel, ModelConfig, load_model
from rayft.models.targets import linear_shapes
from rayft.serving.engine import Engine, EngineLimits
from rayft.serving.packed_engine import PackedEngine
from rayft.serving.transformers_engine import TransformersEngine
from tests.unit.serving.adapters import save_adapters

MakeEngine = Callable[..., Engine]
ENGINES: dict[str, Callable[[LoadedModel, EngineLimits], Engine]] = {
    "packed": PackedEngine,
    "paged": lambda loaded, limits: PackedEngine(loaded, limits, paged=True),
    "transformers": TransformersEngine,
}


@pytest.fixture
def loaded(tiny_folder: Path) -> LoadedModel:
    return load_model(ModelConfig(name=str(tiny_folder)), torch.float32)


@pytest.fixture(scope="session")
def adapter_folders(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    base = load_model(ModelConfig(name=str(tiny_folder)), torch.float32)
    return save_adapters(tmp_path_factory.mktemp("adapters"), linear_shapes(base.model), base.fingerprint)


@pytest.fixture(params=ENGINES)
def make_engine(loaded: LoadedModel, request: pytest.FixtureRequest) -> Iterator[MakeEngine]:
    made: list[Engine] = []

    def make(max_running: int = 8, max_batch_tokens: int = 64, cache_tokens: int = 2048) -> Engine:
        limits = EngineLimits(max_running, max_batch_tokens, cache_tokens)
        made.append(ENGINES[request.param](loaded, limits))
        return made[-1]

    yield make
    for engine in made:
        engine.stop()
