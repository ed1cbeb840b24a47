"""One process as a process group, and a small run on the tiny model."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rayft.data.source import DataConfig
from rayft.methods.base import MethodConfig
from rayft.models.load import ModelConfig
from rayft.train.context import Session, Worker
from rayft.train.run import EvaluateConfig, OptimConfig, RunConfig, ScaleConfig


@pytest.fixture(scope="session", autouse=True)
def _group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    # What a Ray Train worker has in its environment, and DeepSpeed asks for.
    os.environ.update(LOCAL_RANK="0", RANK="0", WORLD_SIZE="1")
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        del os.environ[name]


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
