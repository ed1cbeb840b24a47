"""The trainer: a run learns, stops, resumes, and saves its result."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, FalconConfig, FalconForCausalLM

from rayft.artifacts import AdapterArtifact
from rayft.errors import ConfigError, InterruptedRunError, TrainError
from rayft.methods.base import MethodConfig
from rayft.models.inject import attach
from rayft.models.load import ModelConfig
from rayft.numerics import assert_close
from rayft.train import deepspeed, packed, stopwatch
from rayft.train.deepspeed import later
from rayft.train.masters import load_masters
from rayft.train.packed import Pack
from rayft.train.run import RunConfig
from rayft.train.session import Session
from rayft.train.trainer import Reporter, Trainer, TrainResult, validation_loss
from rayft.train.worker import Worker
from tests.reporter import RecordingReporter
from tests.unit.train.curves import WIDEST, assert_same_losses
from tests.unit.train.runs import DieAt, StopAt, by_family, changed, play, two_rows, with_method


@pytest.mark.parametrize("method", ["lora", "cla"])
def test_a_run_learns_and_its_saved_adapter_has_the_same_loss(
    run: RunConfig, session: Session, tmp_path: Path, method: str
) -> None:
    run = changed(run, method=MethodConfig(name=method, rank=4))
    reporter = RecordingReporter()
    result = Trainer(run, session, reporter, tmp_path).fit()
    assert result.finished
    assert result.steps == 6
    losses = [loss for _, loss in result.train_curve]
    assert losses[-1] < losses[0]
    assert [step for step, _ in result.val_curve] == [2, 4, 6] == [step for step, _ in reporter.reported]
    assert result.val_curve[-1][1] < result.val_curve[0][1]
    assert reporter.notes == []
    artifact = AdapterArtifact.load(result.folder)
    assert artifact.content_hash == result.content_hash
    assert artifact.meta.method == method
    assert artifact.meta.base_fingerprint == session.loaded.fingerprint
    attach(session.loaded.model, artifact)
    again, before = torch.tensor([validation_loss(session)]), torch.tensor([result.val_loss])
    assert_close(again, before, torch.float32, WIDEST)


def test_a_mask_of_all_pairs_is_told_once_for_all_runs_of_a_session(
    run: RunConfig, tiny_folder: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    config = FalconConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    for saved in (FalconForCausalLM(config), tokenizer):
        saved.save_pretrained(tmp_path / "falcon")
    run = changed(run, model=ModelConfig(name=str(tmp_path / "falcon")), optim={"steps": 1})
    session = Session.open(run, Worker())
    notes = []
    for seed in range(2):
        reporter = RecordingReporter()
        Trainer(changed(run, seed=seed), session, reporter, tmp_path / str(seed)).fit()
        notes.append(reporter.notes)
    (note,), others = notes
    assert note.startswith("FalconForCausalLM has attention of its own, so its rows take a mask of all pairs")
    assert others == []


def test_a_full_fine_tune_saves_a_model_folder(run: RunConfig, session: Session, tmp_path: Path) -> None:
    result = Trainer(
        changed(run, method=MethodConfig(name="full"), optim={"lr": 1e-3}),
        session,
        Reporter(),
        tmp_path,
    ).fit()
    assert (Path(result.folder) / "model.safetensors").is_file()
    assert (Path(result.folder) / "tokenizer.json").is_file()
    assert result.trainable == sum(p.numel() for p in session.loaded.model.parameters())


def test_the_same_seed_gives_the_same_run_and_another_does_not(
    run: RunConfig, session: Session, tmp_path: Path
) -> None:
    first = Trainer(run, session, Reporter(), tmp_path / "a").fit()
    other = Trainer(changed(run, seed=1), session, Reporter(), tmp_path / "b").fit()
    again = Trainer(run, session, Reporter(), tmp_path / "c").fit()
    assert first.train_curve == again.train_curve
    assert first.content_hash == again.content_hash
    assert first.train_curve != other.train_curve


def test_a_reporter_can_stop_a_run(run: RunConfig, session: Session, tmp_path: Path) -> None:
    result = Trainer(run, session, StopAt(2), tmp_path).fit()
    assert not result.finished
    assert result.steps == 2
    assert AdapterArtifact.load(result.folder).rank == 4


def test_a_resumed_run_equals_an_uninterrupted_one(run: RunConfig, session: Session, tmp_path: Path) -> None:
    whole = Trainer(run, session, Reporter(), tmp_path / "whole").fit()
    with pytest.raises(KeyboardInterrupt):
        Trainer(run, session, DieAt(4), tmp_path / "cut").fit()
    reporter = RecordingReporter()
    resumed = Trainer(run, session, reporter, tmp_path / "cut").fit()
    assert [step for step, _ in reporter.logged] == [5, 6]
    assert resumed.train_curve == whole.train_curve
    assert resumed.val_curve == whole.val_curve
    assert resumed.content_hash == whole.content_hash
    # The total of a process does not include the time of earlier processes.
    for result, before in ((whole, False), (resumed, True)):
        own = result.seconds["total"] - result.seconds["overhead"]
        spent = result.seconds["train"] + result.seconds["evaluate"]
        assert own < spent if before else own == pytest.approx(spent)


def test_checkpoints_hold_only_the_trained_parameters(
    run: RunConfig, session: Session, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        Trainer(run, session, DieAt(4), tmp_path).fit()
    folders = sorted((tmp_path / "checkpoint").glob("step-*"))
    assert [json.loads((folder / "state.json").read_text())["step"] for folder in folders] == [2, 4]
    for folder in folders:
        masters, others = load_masters(folder / "masters.safetensors")
        assert masters
        assert all("lora_" in name for name in masters)
        assert not others


def test_a_checkpoint_of_another_run_is_refused(run: RunConfig, session: Session, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        Trainer(run, session, DieAt(4), tmp_path).fit()
    with pytest.raises(TrainError, match="checkpoint of another run: the configuration has changed"):
        Trainer(changed(run, seed=1), session, Reporter(), tmp_path).fit()


def test_a_checkpoint_of_other_data_or_another_base_is_refused(
    run: RunConfig, session: Session, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        Trainer(run, session, DieAt(4), tmp_path).fit()
    for field, said in (("data", "the data has changed"), ("base", "the base has changed")):
        identity = session.identity.model_copy(update={field: "0" * 16})
        with pytest.raises(TrainError, match=f"{said}: .*Put back what it was"):
            Trainer(run, replace(session, identity=identity), Reporter(), tmp_path).fit()
    assert Trainer(run, session, Reporter(), tmp_path).fit().finished


@pytest.mark.parametrize(("every", "said"), [(2, "the loss is nan at step 2"), (1, "validation loss is nan")])
def test_a_loss_that_is_not_finite_ends_the_run(
    run: RunConfig, session: Session, tmp_path: Path, every: int, said: str
) -> None:
    # With this learning rate, float32 overflows in the second step, or in the evaluation before it.
    diverging = changed(run, optim={"lr": 1e30, "clip": 1e9}, evaluate={"every": every})
    with pytest.raises(TrainError, match=f"{said} .* use a lower learning rate") as raised:
        Trainer(diverging, session, Reporter(), tmp_path).fit()
    assert raised.value.everywhere


@pytest.mark.parametrize(
    "name", by_family(["lora", "lora_plus", "asym", "cola", "rac", "cla", "rc3la", "paca"])
)
def test_accumulation_changes_no_loss(run: RunConfig, session: Session, tmp_path: Path, name: str) -> None:
    run = with_method(run, name, links=2, optim={"lr": 2e-3}, evaluate={"every": None})
    at_once = Trainer(run, session, Reporter(), tmp_path / "a").fit()
    in_two = Trainer(changed(run, scale={"accumulation": 2}), session, Reporter(), tmp_path / "b").fit()
    assert_same_losses(at_once, in_two)


def test_a_classifier_trains_with_its_head(run: RunConfig, tmp_path: Path) -> None:
    lines = [
        json.dumps({"text": f"{word} {number}", "label": word})
        for word in ("red", "green", "blue")
        for number in range(20)
    ]
    file = tmp_path / "colours.jsonl"
    file.write_text("\n".join(lines))
    data = type(run.data)(
        source="jsonl", name=str(file), val=9, test=9, max_length=64, format="classification"
    )
    model = run.model.model_copy(update={"task": "sequence_classification", "num_labels": 3})
    run = run.model_copy(update={"data": data, "model": model})
    run = changed(run, optim={"rows_per_step": 8, "steps": 30, "lr": 5e-3})
    session = Session.open(run, Worker())
    result = Trainer(run, session, Reporter(), tmp_path / "run").fit()
    assert result.val_curve[-1][1] < 0.5 * result.val_curve[0][1]
    artifact = AdapterArtifact.load(result.folder)
    assert artifact.meta.task == "sequence_classification"
    assert artifact.heads["score.weight"].shape[0] == 3
    with pytest.raises(ConfigError, match="num_labels is 2; set it to 3"):
        Session.open(changed(run, model={"num_labels": 2}), Worker())


@pytest.mark.parametrize("slots", [0, 2])
@pytest.mark.parametrize(
    ("ahead", "half"),
    [(True, ["launch", "launch", "read", "launch", "read", "read"]), (False, ["launch", "read"] * 3)],
)
def test_a_step_is_launched_before_the_last_one_is_read_unless_its_numbers_are_needed(
    run: RunConfig,
    session: Session,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    slots: int,
    half: list[str],
    *,
    ahead: bool,
) -> None:
    # CPUs have computed a step when it is launched, so there is nothing to gain.
    assert not Worker().runs_ahead
    assert Worker(device="cuda:0").runs_ahead
    monkeypatch.setattr(Worker, "runs_ahead", ahead)
    run, happened = changed(run, evaluate={"every": 3}), list[str]()
    for module in (deepspeed, packed):
        monkeypatch.setattr(module, "later", partial(_noted, happened))
    if slots:
        pack = Pack(session)
        courses = packed.Courses[TrainResult](pack)
        for number in range(slots):
            own = Trainer(run, pack.session(), Reporter(), tmp_path / str(number), pack=pack)
            courses.begin(str(number), own.course(), own.clock)
        play(courses, pack)
    else:
        Trainer(run, session, Reporter(), tmp_path).fit()
    assert happened == half * 2


@pytest.mark.parametrize("ahead", [True, False])
def test_the_seconds_of_a_step_do_not_depend_on_when_they_are_read(
    run: RunConfig, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, ahead: bool
) -> None:
    monkeypatch.setattr(Worker, "runs_ahead", ahead)
    # Each look at the clock finds it a second later.
    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(perf_counter=partial(next, itertools.count(0.0))))
    reporter = RecordingReporter()
    result = Trainer(changed(run, evaluate={"every": 3}), session, reporter, tmp_path).fit()
    assert [metrics["step_seconds"] for _, metrics in reporter.logged] == [1.0] * result.steps
    assert result.seconds["train"] == result.steps


def test_the_share_of_padding_is_logged(run: RunConfig, session: Session, tmp_path: Path) -> None:
    reporter = RecordingReporter()
    Trainer(*two_rows(changed(run, optim={"steps": 2}), session), reporter, tmp_path).fit()
    assert [metrics["padding"] for _, metrics in reporter.logged] == [7 / 32] * 2


def _noted(happened: list[str], values: Sequence[torch.Tensor]) -> Callable[[], list[float]]:
    happened.append("launch")
    found = later(values)

    def read() -> list[float]:
        happened.append("read")
        return found()

    return read


def test_a_step_that_is_not_read_when_a_run_is_interrupted_is_in_its_checkpoint(
    run: RunConfig, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Worker, "runs_ahead", True)
    run = changed(run, evaluate={"every": None})
    whole = Trainer(run, session, Reporter(), tmp_path / "whole").fit()

    class Interrupted(RecordingReporter):
        @property
        def interrupted(self) -> bool:
            return len(self.logged) == 2

    reporter = Interrupted()
    with pytest.raises(InterruptedRunError, match="after step 3"):
        Trainer(run, session, reporter, tmp_path / "cut").fit()
    assert [step for step, _ in reporter.logged] == [1, 2, 3]
    resumed = Trainer(run, session, Reporter(), tmp_path / "cut").fit()
    assert resumed.train_curve == whole.train_curve
    assert resumed.content_hash == whole.content_hash
