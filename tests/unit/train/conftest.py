"""A process group of this process alone, and a small run on the tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rayft.data.source import DataConfig
from rayft.methods.base import MethodConfig
from rayft.models.load import ModelConfig
from rayft.train.run import EvaluateConfig, OptimConfig, RunConfig, ScaleConfig
from rayft.train.session import Session
from rayft.train.worker import Worker
from tests.unit.train.runs import restored_linear


@pytest.fixture(scope="session", autouse=True)
def _group(process_group: None) -> None:
    """Initialise the process group, since almost every test here trains."""


@pytest.fixture(autouse=True)
def _linear() -> Iterator[None]:
    """Restore what ZeRO-3 replaces, since later tests in this process measure layers without it."""
    with restored_linear():
        yield


@pytest.fixture
def run(tiny_folder: Path) -> RunConfig:
    threads = torch.get_num_threads()
    return RunConfig(
        model=ModelConfig(name=str(tiny_folder)),
        data=DataConfig(
            name="needle_haystack",
            params={"min_num_statements": 1, "max_num_statements": 2},
            train=24,
            val=6,
            test=6,
            max_length=512,
        ),
        method=MethodConfig(rank=4),
        optim=OptimConfig(lr=1e-2, steps=6, rows_per_step=2, warmup=1),
        scale=ScaleConfig(device="cpu", dtype="float32", zero=0, threads=threads),
        evaluate=EvaluateConfig(every=2, checkpoint_seconds=0),
    )


@pytest.fixture
def session(run: RunConfig) -> Session:
    return Session.open(run, Worker())
