"""What a run's settings leave open is tried on a real GPU, and a run goes on after its memory is full."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from rayft.data.section import DataConfig
from rayft.methods.base import MethodConfig
from rayft.models.load import ModelConfig
from rayft.train import placement, trainer
from rayft.train.run import EvaluateConfig, OptimConfig, RunConfig, ScaleConfig
from rayft.train.session import Session
from rayft.train.trainer import Trainer, TrainResult
from rayft.train.worker import Worker
from tests.gpu.sums import sums
from tests.reporter import RecordingReporter

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("nccl_group")]

ROWS = 32


@pytest.fixture
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what is tried in a folder of the test's own."""
    monkeypatch.setattr(placement, "cache_folder", lambda: tmp_path / "cache")


def train(folder: Path, reporter: RecordingReporter, name: str = "lora", **scale: Any) -> TrainResult:
    run = RunConfig(
        model=ModelConfig(name="tiny-llama"),
        data=DataConfig(source="jsonl", name=sums(folder, 60), val=10, test=10, max_length=512),
        method=MethodConfig(name=name, rank=4),
        optim=OptimConfig(lr=1e-2, steps=6, rows_per_step=ROWS),
        scale=ScaleConfig(device="cuda", dtype="bfloat16", zero=2, threads=1, **scale),
        evaluate=EvaluateConfig(every=3),
    )
    session = Session.open(run, Worker(device="cuda:0"))
    return Trainer(run, session, reporter, folder / f"{name}-{len(reporter.notes)}-{len(scale)}").fit()


def share_of(peak: int, part: float) -> float:
    """Return the share of the device's memory that holds a part of what a run took at its peak.

    What this process keeps between runs, such as cuBLAS's workspaces, comes on top.
    """
    gc.collect()
    torch.cuda.empty_cache()
    kept = torch.cuda.memory_allocated()
    total = torch.cuda.get_device_properties(0).total_memory
    return (kept + part * (peak - kept)) / total


@pytest.mark.usefixtures("_cache")
def test_a_small_model_is_captured_and_the_choice_is_kept(tmp_path: Path) -> None:
    first = train(tmp_path, RecordingReporter())
    assert first.placement == {"accumulation": 1, "activation_checkpointing": False, "graphs": True}
    assert len([*(tmp_path / "cache" / "probes").iterdir()]) == 1


@pytest.mark.usefixtures("_cache")
@pytest.mark.parametrize("graphs", [False, True])
def test_a_full_device_lowers_the_micro_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graphs: bool
) -> None:
    whole = train(tmp_path, RecordingReporter(), accumulation=1, graphs=False)
    # As if the probe had been too hopeful: the run has less than it needs.
    monkeypatch.setattr(trainer, "place", lambda *_: placement.Placement(graphs=graphs))
    torch.cuda.set_per_process_memory_fraction(share_of(whole.peak_memory, 0.6))
    try:
        reporter = RecordingReporter()
        lowered = train(tmp_path, reporter, activation_checkpointing=False)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert reporter.notes
    assert all("did not fit into the device's memory" in note for note in reporter.notes)
    assert lowered.placement["accumulation"] > 1
    for (_, one), (_, other) in zip(whole.train_curve, lowered.train_curve, strict=True):
        assert abs(one - other) <= 16 * torch.finfo(torch.bfloat16).eps * abs(one)


@pytest.mark.usefixtures("_cache")
def test_what_is_tried_keeps_to_the_share_of_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tmp_path, RecordingReporter(), accumulation=1, graphs=False)
    total = torch.cuda.get_device_properties(0).total_memory
    # Room for about half of the rows.
    share = share_of(whole.peak_memory, 0.7) / (1 - placement.SPARE)
    reporter = RecordingReporter()
    found = train(tmp_path, reporter, gpu_share=share)
    assert reporter.notes == []
    assert found.placement["accumulation"] > 1 or found.placement["activation_checkpointing"]
    assert found.peak_memory <= share * total
