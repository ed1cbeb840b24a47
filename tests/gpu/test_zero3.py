"""A worker group of two GPUs trains under ZeRO-3 what one GPU trains."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch

from benchmarks.bench_train_sharded import Case, make_run, write_base, write_data
from benchmarks.bench_train_step import SHAPES
from rayft.artifacts import AdapterArtifact
from rayft.numerics import relative_error, tolerance
from rayft.squeeze.rank import squeeze
from rayft.sweep.executor import EXECUTORS
from rayft.sweep.search import search
from rayft.sweep.space import MethodSpace, SweepConfig, points
from rayft.train.trainer import TrainResult

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

SHAPE, STEPS, FIRST_STEP = "135m", 5, 60
"""SmolLM2's; the last is how many seconds a first step may take where no kernel was compiled before."""


@pytest.fixture(scope="module")
def _cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=8, num_gpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def train(zero: int, gpus: int, folder: Path) -> TrainResult:
    """Train with a worker group of its own, and return its result."""
    base, data = write_base(SHAPE, folder / "base"), write_data(folder)
    run = make_run(Case(SHAPE, zero, gpus), base, data, STEPS, lr=1e-3)
    executor = EXECUTORS["isolated"](run.scale, str(folder / "ray"), 1, 0, f"zero{zero}")
    try:
        sweep = SweepConfig(methods={"lora": MethodSpace(ranks=(16,), lr=(1e-3,))}, grace=STEPS)
        (trial,) = search(sweep, points(sweep, run), executor, folder / f"zero{zero}")
    finally:
        executor.close()
    assert trial.result is not None, trial.error
    return trial.result


@pytest.mark.usefixtures("_cluster")
def test_two_gpus_train_as_one(tmp_path: Path) -> None:
    whole, parts = train(2, 1, tmp_path), train(3, 2, tmp_path)
    losses = [torch.tensor([*dict(run.train_curve).values(), run.val_loss]) for run in (whole, parts)]
    assert losses[0].isfinite().all()
    assert relative_error(losses[1], losses[0]) <= tolerance(
        torch.bfloat16, SHAPES[SHAPE]["intermediate_size"]
    )
    assert losses[0][-1] < 0.9 * losses[0][0], "nothing was learnt, so any two runs would agree"
    assert parts.seconds["train"] < FIRST_STEP + STEPS
    adapter = AdapterArtifact.load(parts.folder)
    squeezed = squeeze(adapter, rank=4)
    assert (adapter.rank, squeezed.rank) == (16, 4)
    assert all(factors.b.any() and factors.b.isfinite().all() for factors in adapter.modules.values())
