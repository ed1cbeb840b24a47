"""Two workers load and train a base that ZeRO-3 partitions."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from rayft.data.source import DataConfig
from rayft.methods.base import AdapterLinear
from rayft.models.heads import head_parameters
from rayft.models.load import ModelConfig, load_model
from rayft.train.run import EvaluateConfig, OptimConfig, RunConfig, ScaleConfig
from rayft.train.session import Session
from rayft.train.trainer import Reporter, Trainer
from rayft.train.worker import Worker
from tests.unit.train.workers import in_two_workers

TASKS: dict[str, Any] = {
    "tiny-llama": "causal_lm",
    "tiny-gpt2": "causal_lm",
    "tiny-bert": "sequence_classification",
    "tiny-vit": "image_classification",
}
# Without these limits, such a small model would stay gathered all the time; with them, about one layer is.
SMALL: dict[str, Any] = {
    "zero_optimization": {
        "stage3_max_live_parameters": 16000,
        "stage3_max_reuse_distance": 1,
        "stage3_prefetch_bucket_size": 4000,
    }
}


def make_run(name: str, data: str) -> RunConfig:
    return RunConfig(
        model=ModelConfig(name=name, task=TASKS[name]),
        data=DataConfig(source="jsonl", name=data, val=8, test=8, max_length=128),
        optim=OptimConfig(lr=1e-2, steps=3, rows_per_step=2),
        scale=ScaleConfig(device="cpu", dtype="float32", zero=3, workers=2, threads=1),
        evaluate=EvaluateConfig(every=1),
        deepspeed=SMALL,
    )


def check(rank: int, folder: str, data: str, cache: str) -> None:
    """Load and train as one of two workers."""
    os.environ["RAYFT_CACHE"] = cache
    for name in TASKS:
        check_parts(make_run(name, data), Worker(rank, 2))
    check_training(make_run("tiny-llama", data), Worker(rank, 2), Path(folder))


def check_parts(run: RunConfig, worker: Worker) -> None:
    """Compare the gathered parts with the whole base."""
    import deepspeed

    from rayft.train.partition import load_partitioned

    loaded, whole = load_partitioned(run, worker), load_model(run.model, torch.float32)
    assert loaded.fingerprint == whole.fingerprint
    parts, wanted = dict(loaded.model.named_parameters()), dict(whole.model.named_parameters())
    assert parts.keys() == wanted.keys()
    heads = head_parameters(loaded.model).keys()
    for name, part in parts.items():
        assert bool(part.numel()) == (name in heads), f"{name} is whole"
    with deepspeed.zero.GatheredParameters([p for n, p in parts.items() if n not in heads]):
        for name, part in parts.items():
            assert torch.equal(part, wanted[name]), name
    for (_, buffer), (name, other) in zip(
        loaded.model.named_buffers(), whole.model.named_buffers(), strict=True
    ):
        assert torch.equal(buffer, other), name


def check_training(run: RunConfig, worker: Worker, folder: Path) -> None:
    """Train, evaluate and save; at most half of the weights may be in memory before the backward pass."""
    import deepspeed
    from torch.multiprocessing.reductions import StorageWeakRef

    seen: list[StorageWeakRef] = []
    forward, backward = AdapterLinear.forward, deepspeed.DeepSpeedEngine.backward

    def noted(layer: AdapterLinear, x: torch.Tensor) -> torch.Tensor:
        seen.append(StorageWeakRef(layer.weight.untyped_storage()))
        return forward(layer, x)

    def checked(engine: Any, loss: torch.Tensor) -> Any:
        kept = sum(not reference.expired() for reference in seen)
        assert kept <= len(seen) // 2, f"{kept} of {len(seen)} weights are kept for the backward pass"
        seen.clear()
        return backward(engine, loss)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AdapterLinear, "forward", noted)
        patch.setattr(deepspeed.DeepSpeedEngine, "backward", checked)
        result = Trainer(run, Session.open(run, worker), Reporter(), folder / "run").fit()
    if worker.rank == 0:
        (folder / "losses.json").write_text(json.dumps(result.train_curve), encoding="utf-8")


def test_two_workers_load_and_train_a_partitioned_base(tmp_path: Path) -> None:
    data = tmp_path / "sums.jsonl"
    lines = [{"prompt": f"{i}+{j}=", "completion": str(i + j)} for i in range(8) for j in range(8)]
    data.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    # In an empty cache the first worker saves the tiny models, rank 0 or not.
    in_two_workers(check, tmp_path, str(tmp_path), str(data), str(tmp_path / "cache"))
    losses = [loss for _, loss in json.loads((tmp_path / "losses.json").read_text(encoding="utf-8"))]
    assert losses[-1] < losses[0]
