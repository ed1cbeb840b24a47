"""All ZeRO stages train the same adapters (in one process; tests/integration shards over several)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from rayft.artifacts import AdapterArtifact
from rayft.config import parse
from rayft.errors import MethodError
from rayft.methods import METHODS
from rayft.methods.base import InPlace
from rayft.train.run import RunConfig
from rayft.train.session import Session
from rayft.train.trainer import Reporter, Trainer, TrainResult, validation_loss
from rayft.train.worker import Worker
from tests.unit.train.curves import assert_same_losses
from tests.unit.train.runs import by_family, changed, restored_linear, with_method

# Adam's first step of a link changes every value by about lr, however small its gradient is. At lr 1e-2,
# rounding shows in the loss three links later.
GENTLE = {"lr": 2e-3}

# Without these limits, such a small model would stay gathered all the time; with them, no layer outlives its
# use.
RELEASED = {
    "deepspeed": {
        "zero_optimization": {
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 0,
            "stage3_param_persistence_threshold": 0,
        }
    }
}


def trained(run: RunConfig, folder: Path) -> TrainResult:
    return Trainer(run, Session.open(run, Worker()), Reporter(), folder).fit()


def assert_same_artifact(one: TrainResult, other: TrainResult) -> None:
    if not one.content_hash:
        return
    mine, theirs = AdapterArtifact.load(one.folder), AdapterArtifact.load(other.folder)
    assert mine.modules.keys() == theirs.modules.keys()
    for name, factors in mine.modules.items():
        assert factors.a.shape == theirs.modules[name].a.shape
        assert factors.b.shape == theirs.modules[name].b.shape
        assert factors.b.any()
        assert theirs.modules[name].b.any()


@pytest.mark.parametrize("name", by_family(METHODS))
def test_neither_zero_nor_recomputed_activations_change_a_loss(
    run: RunConfig, tmp_path: Path, name: str
) -> None:
    run = with_method(run, name, links=2, optim=GENTLE | {"steps": 4}, evaluate={"every": None})
    plain = trained(run, tmp_path / "0")
    for zero in (1, 2, 3):
        if zero == 3 and isinstance(METHODS[name], InPlace):
            continue
        # Activations are recomputed at stages 1 and 3, and kept at stage 2.
        scale = {"zero": zero, "activation_checkpointing": zero != 2}
        sharded = trained(changed(run, scale=scale, **(RELEASED if zero == 3 else {})), tmp_path / str(zero))
        assert_same_losses(plain, sharded)
        assert (sharded.trainable, sharded.parameters) == (plain.trainable, plain.parameters)
        assert_same_artifact(plain, sharded)


def recomputes(session: Session) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in session.loaded.model.modules())


def test_the_next_run_keeps_its_activations_again(run: RunConfig, session: Session, tmp_path: Path) -> None:
    short = changed(run, optim={"steps": 1})
    again = changed(short, scale={"activation_checkpointing": True})
    Trainer(again, session, Reporter(), tmp_path / "a").fit()
    assert recomputes(session)
    Trainer(short, session, Reporter(), tmp_path / "b").fit()
    assert not recomputes(session)


@pytest.mark.parametrize("name", by_family(METHODS))
def test_a_run_learns_in_bfloat16(run: RunConfig, tmp_path: Path, name: str) -> None:
    run = with_method(run, name, scale={"dtype": "bfloat16", "zero": 2})
    result = trained(run, tmp_path)
    assert result.val_curve[-1][1] < result.val_curve[0][1] < result.train_curve[0][1]
    if result.content_hash:
        artifact = AdapterArtifact.load(result.folder)
        wide = torch.float32 if isinstance(METHODS[name], InPlace) else torch.bfloat16
        assert {factors.b.dtype for factors in artifact.modules.values()} == {wide}


def test_dropout_is_the_same_under_zero_3(run: RunConfig, tmp_path: Path) -> None:
    for name in ("lora", "cla"):
        run = changed(with_method(run, name, optim=GENTLE | {"steps": 2}), method={"dropout": 0.25})
        plain = trained(run, tmp_path / name)
        assert_same_losses(plain, trained(changed(run, scale={"zero": 3}), tmp_path / f"{name}-3"))


def test_a_run_under_zero_3_leaves_torch_as_it_was_for_later_tests(run: RunConfig, tmp_path: Path) -> None:
    linear = functional.linear
    with restored_linear():
        trained(changed(run, scale={"zero": 3}, optim={"steps": 1}), tmp_path)
        assert functional.linear is not linear
    assert functional.linear is linear


def test_paca_is_refused_under_zero_3_before_anything_starts(run: RunConfig) -> None:
    rest = {"data": run.data.model_dump(), "method": {"name": "paca"}}
    with pytest.raises(MethodError, match=r"which ZeRO-3 partitions: use scale\.zero 0, 1 or 2, or rcla"):
        parse(RunConfig, {**rest, "scale": {"zero": 3}})
    parse(RunConfig, {**rest, "scale": {"zero": 2}})


class _Elsewhere(Worker):
    """One of two workers, the other of which has two more batches."""

    def total(self, *values: float) -> list[float]:
        return list(values)

    def largest(self, value: int) -> int:
        return value + 2


def test_a_worker_with_fewer_batches_takes_part_in_all_forward_passes(session: Session) -> None:
    calls: list[int] = []
    handle = session.loaded.model.register_forward_hook(lambda *_: calls.append(1))
    alone = validation_loss(session)
    batches = len(calls)
    session.worker = _Elsewhere()
    assert validation_loss(session) == alone
    handle.remove()
    assert len(calls) == batches + batches + 2
