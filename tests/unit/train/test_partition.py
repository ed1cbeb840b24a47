"""Two processes with parts of a base each, as ZeRO-3 has them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from rayft.data.source import DataConfig
from rayft.methods.base import AdapterLinear
from rayft.models.heads import head_parameters
from rayft.models.load import ModelConfig, load_model
from rayft.train.run import EvaluateConfig, OptimConfig, RunConfig, ScaleConfig
from rayft.train.session import Session
from rayft.train.trainer import Reporter, Trainer
from rayft.train.worker import Worker

TASKS: dict[str, Any] = {
    "tiny-llama": "causal_lm",
    "tiny-gpt2": "causal_lm",
    "tiny-bert": "sequence_classification",
    "tiny-vit": "image_classification",
}
# So small a model would be whole all the time: no more is fetched ahead or kept than about a layer.
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


def worker(rank: int, folder: str, data: str) -> None:
    """Load and train as one of two."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", DS_ACCELERATOR="cpu")
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.set_num_threads(1)
    for name in TASKS:
        check_parts(make_run(name, data), Worker(rank, 2))
    check_training(make_run("tiny-llama", data), Worker(rank, 2), Path(folder))
    dist.destroy_process_group()


def check_parts(run: RunConfig, worker: Worker) -> None:
    """Compare the parts, put together, with the base."""
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
    """Train, evaluate and save; between forward and backward pass no layer's weight may be in memory."""
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


def test_two_workers_hold_a_base_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "sums.jsonl"
    lines = [{"prompt": f"{i}+{j}=", "completion": str(i + j)} for i in range(8) for j in range(8)]
    data.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    # Made by whichever worker is first, rank 0 or not.
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path / "cache"))
    mp.spawn(worker, (str(tmp_path), str(data)), nprocs=2)
    losses = [loss for _, loss in json.loads((tmp_path / "losses.json").read_text(encoding="utf-8"))]
    assert losses[-1] < losses[0]
