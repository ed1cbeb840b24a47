"""The record and the output of a sweep of a module's `config`; and a longer sweep to interrupt."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from rayft.flow.config import PipelineConfig, load_config
from rayft.flow.display import Display
from rayft.flow.sweep.run import run_sweep
from rayft.report.record import SweepRecord
from tests.e2e.small import run
from tests.e2e.warm import WarmWorkers


@pytest.fixture(scope="session")
def warm_workers(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> WarmWorkers:
    return WarmWorkers(tmp_path_factory.mktemp("warm"))


@pytest.fixture(scope="module")
def in_warm_workers(warm_workers: WarmWorkers) -> Iterator[None]:
    """Run the lanes of all tests of a module in workers that stay (see `tests.e2e.warm`)."""
    with warm_workers.used():
        yield


@pytest.fixture(scope="module")
def said() -> io.StringIO:
    return io.StringIO()


@pytest.fixture(scope="module")
def record(local_ray: None, config: PipelineConfig, said: io.StringIO) -> SweepRecord:
    return run_sweep(config, Display(Console(file=said, width=1000)))


@pytest.fixture(scope="session")
def long_config(tmp_path_factory: pytest.TempPathFactory) -> PipelineConfig:
    """A sweep of three trials that write everything a trial can write, at every second of 12 steps."""
    folder = tmp_path_factory.mktemp("long")
    tiny = load_config("tiny", [f"output={folder / 'whole'}"]).model_dump(mode="json")
    tiny["data"] |= {"train": 24, "val": 4, "test": 4}
    tiny["optim"] |= {"steps": 12, "warmup": 1}
    tiny["evaluate"] |= {"every": 2, "checkpoint_seconds": 0, "trail": True}
    tiny["scale"] |= {"device": "cpu", "dtype": "float32", "threads": 1}
    tiny["sweep"] |= {"methods": {"lora": {"ranks": [4], "lr": [1e-2, 1e-5, 2e-2]}}, "grace": 4}
    tiny["squeeze"] = {"ranks": [2]}
    (folder / "long.yaml").write_text(yaml.safe_dump(tiny))
    return load_config(folder / "long.yaml")


@pytest.fixture(scope="session")
def uninterrupted(warm_workers: WarmWorkers, long_config: PipelineConfig) -> Path:
    """The folder of that sweep, run without interruption."""
    with warm_workers.used():
        run(long_config)
    return long_config.folder
