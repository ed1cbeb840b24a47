"""`rayft train`: one run is trained, tracked and scored; it continues, and goes on from an adapter."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from mlflow import MlflowClient
from rich.console import Console

from rayft.artifacts import AdapterArtifact
from rayft.config import parse, read_yaml
from rayft.errors import ConfigError
from rayft.flow.config import TrainConfig, packaged
from rayft.flow.display import Display
from rayft.flow.interrupt import SIGNALS, interrupts
from rayft.flow.train import Trained, train_run
from rayft.models.load import ModelConfig, load_model
from tests.e2e.test_kill import when

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.ray,
    pytest.mark.usefixtures("local_ray", "in_warm_workers"),
]


def config(output: Path, **changes: Any) -> TrainConfig:
    """Return the packaged `tiny` as one short run."""
    tiny = read_yaml(packaged()["tiny"].read_text())
    del tiny["sweep"]
    tiny["data"] |= {"train": 24, "val": 4, "test": 4}
    tiny["optim"] = {"steps": 6, "lr": 1e-2}
    tiny["scale"] = {"device": "cpu", "dtype": "float32", "threads": 1}
    tiny["evaluate"] |= {"checkpoint_seconds": 0}
    return parse(TrainConfig, {**tiny, "method": {"rank": 4}, "output": str(output), **changes})


def train(config: TrainConfig) -> tuple[Trained, str]:
    """Train a run; return what it left and what was printed."""
    said = io.StringIO()
    return train_run(config, Display(Console(file=said, width=1000))), said.getvalue()


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory, in_warm_workers: None) -> tuple[Trained, str]:
    return train(config(tmp_path_factory.mktemp("train") / "once"))


def test_the_adapter_is_in_the_output_folder_and_peft_loads_it(once: tuple[Trained, str]) -> None:
    done, _ = once
    assert done.adapter == done.folder / "adapter"
    assert AdapterArtifact.load(done.adapter).squeezed
    base = load_model(ModelConfig(name="tiny-llama"), torch.float32).model
    peft.PeftModel.from_pretrained(base, str(done.adapter))
    assert not done.before
    assert done.result.steps == 6
    # It is evaluated, and writes a checkpoint, also before its end.
    assert [step for step, _ in done.result.val_curve] == [1, 2, 3, 4, 5, 6]


def test_it_is_tracked_with_its_scores(once: tuple[Trained, str]) -> None:
    done, _ = once
    run = MlflowClient(f"sqlite:///{done.folder}/mlflow.db").get_run(done.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "tiny"
    assert run.data.tags["rayft.kind"] == "run"
    score = done.scores.score("test")
    assert score
    assert run.data.metrics["test_score"] == score.value
    assert run.data.params["method.rank"] == "4"


def test_a_run_that_is_done_is_not_trained_again(once: tuple[Trained, str]) -> None:
    done, _ = once
    again, said = train(config(done.folder))
    assert again.before
    assert "is trained already" in said
    assert (again.result.content_hash, again.run_id) == (done.result.content_hash, done.run_id)
    assert again.scores.score("test") == done.scores.score("test")
    with pytest.raises(ConfigError, match=r"optim.steps was 6, now 7"):
        train(config(done.folder, optim={"steps": 7, "lr": 1e-2}))


def test_a_run_goes_on_from_an_adapter(once: tuple[Trained, str], tmp_path: Path) -> None:
    done, _ = once
    further, _ = train(config(tmp_path / "further", method=None, start=str(done.adapter)))
    found = AdapterArtifact.load(further.result.folder)
    assert found.rank == 4
    assert found.meta.parent == AdapterArtifact.load(done.adapter).content_hash
    assert further.result.train_curve[0][1] < done.result.train_curve[0][1]


@pytest.fixture
def _signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    interrupts.forget()


@pytest.mark.usefixtures("_signals")
def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    optim = {"steps": 40, "lr": 1e-2}
    whole, _ = train(config(tmp_path / "whole", optim=optim))
    cut = config(tmp_path / "cut", optim=optim)
    interrupts.install()
    with (
        when(
            lambda: any(cut.folder.glob("trials/*/checkpoint/*/state.json")),
            lambda: os.kill(os.getpid(), signal.SIGINT),
        ),
        pytest.raises(KeyboardInterrupt),
    ):
        train(cut)
    interrupts.forget()
    assert not (cut.folder / "adapter").exists()
    resumed, _ = train(cut)
    assert not resumed.before
    assert resumed.result.content_hash == whole.result.content_hash
    assert resumed.result.train_curve == whole.result.train_curve
