"""Runs that share their steps on a GPU, with and without CUDA graphs, give what each gives alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rayft.data.section import DataConfig
from rayft.methods.base import ChainConfig, MethodConfig
from rayft.models.load import ModelConfig
from rayft.train import slots
from rayft.train.packed import Courses, Pack
from rayft.train.run import EvaluateConfig, OptimConfig, RunConfig, ScaleConfig
from rayft.train.session import Session
from rayft.train.slots import Sizing, sizing
from rayft.train.trainer import Reporter, Trainer, TrainResult
from rayft.train.worker import Worker
from tests.gpu.sums import sums

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("nccl_group")]

METHODS = {
    "lora": MethodConfig(name="lora", rank=4),
    "wide": MethodConfig(name="lora", rank=14),
    "lora_plus": MethodConfig(name="lora_plus", rank=8),
    "cla": MethodConfig(name="cla", rank=16),
    "asym": MethodConfig(name="asym", rank=3),
    "c3la": MethodConfig(name="c3la", rank=4, chain=ChainConfig(links=2)),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    data = sums(tmp_path_factory.mktemp("data"))
    return RunConfig(
        model=ModelConfig(name="tiny-llama"),
        data=DataConfig(source="jsonl", name=data, val=10, test=10, max_length=128),
        optim=OptimConfig(lr=1e-2, steps=8, rows_per_step=4),
        scale=ScaleConfig(device="cuda", dtype="bfloat16", threads=1, accumulation=2, graphs=False).settled(),
        evaluate=EvaluateConfig(every=4),
    )


@pytest.fixture(scope="module")
def session(run: RunConfig, nccl_group: None) -> Session:
    return Session.open(run, Worker(device="cuda:0"))


@pytest.fixture(scope="module")
def alone(
    run: RunConfig, session: Session, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, TrainResult]:
    folder = tmp_path_factory.mktemp("alone")
    return {
        name: Trainer(run.model_copy(update={"method": method}), session, Reporter(), folder / name).fit()
        for name, method in METHODS.items()
    }


@pytest.mark.parametrize("graphs", [False, True])
def test_the_losses_are_those_of_each_alone(
    run: RunConfig, session: Session, alone: dict[str, TrainResult], tmp_path: Path, *, graphs: bool
) -> None:
    pack = Pack(session, graphs=graphs)
    courses, ended = Courses[TrainResult](pack), dict[str, TrainResult | Exception]()
    with pack.stream():
        for name, method in METHODS.items():
            own = run.model_copy(update={"method": method})
            trainer = Trainer(own, pack.session(), Reporter(), tmp_path / name, pack=pack)
            courses.begin(name, trainer.course(), trainer.clock)
        while len(courses):
            for name in courses.questions:
                courses.answer(name, True)
            courses.advance()
            ended |= courses.ended()
        assert pack._graphs == graphs
        pack.close()
    for name, expected in alone.items():
        found = ended[name]
        assert isinstance(found, TrainResult), found
        # The same numbers, in sums of other shapes.
        for (_, one), (_, other) in zip(expected.train_curve, found.train_curve, strict=True):
            assert abs(one - other) <= 16 * torch.finfo(torch.bfloat16).eps * abs(one), name


def test_a_small_model_is_packed_and_the_choice_is_kept(
    run: RunConfig, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path))
    run = run.model_copy(update={"scale": run.scale.model_copy(update={"graphs": None})})
    found = sizing(run, session, None)
    assert found == Sizing(16, graphs=True)
    monkeypatch.setattr(slots, "_seconds", None)
    assert sizing(run, session, None) == found
