"""Trials share one base in memory: none leaves a trace, and their order does not matter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from rayft.errors import MethodError
from rayft.methods.base import MethodConfig
from rayft.train.run import RunConfig
from rayft.train.session import Session
from rayft.train.trainer import Reporter, Trainer, TrainResult, validation_loss
from rayft.train.worker import Worker
from tests.reporter import RecordingReporter
from tests.unit.train.runs import ADAPTERS, StopAt, by_family, changed, with_method


def trial(run: RunConfig, name: str) -> RunConfig:
    return with_method(run, name, links=2, optim={"steps": 4}, evaluate={"every": None})


def weights(session: Session) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in session.loaded.model.state_dict().items()}


def assert_untouched(session: Session, before: dict[str, torch.Tensor]) -> None:
    after = session.loaded.model.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), f"{name} changed"
    assert not any(p.requires_grad for p in session.loaded.model.parameters())


def assert_same(one: TrainResult, other: TrainResult) -> None:
    assert one.train_curve == other.train_curve
    assert one.val_curve == other.val_curve
    assert one.content_hash == other.content_hash


@pytest.mark.parametrize(
    "names", [("lora", "cola", "paca", "rc3la"), pytest.param(ADAPTERS, marks=pytest.mark.exhaustive)]
)
def test_trials_in_turn_equal_trials_alone(
    run: RunConfig, session: Session, tmp_path: Path, names: Sequence[str]
) -> None:
    before, alone = weights(session), {}
    for name in names:
        fresh = Session.open(run, Worker())
        alone[name] = Trainer(trial(run, name), fresh, Reporter(), tmp_path / "alone" / name).fit()
    assert len({result.content_hash for result in alone.values()}) == len(names)
    for order in (names, names[::-1]):
        for name in order:
            result = Trainer(trial(run, name), session, Reporter(), tmp_path / order[0] / name).fit()
            assert_same(alone[name], result)
            assert_untouched(session, before)


def test_paca_in_bfloat16_restores_the_base_bitwise(run: RunConfig, tmp_path: Path) -> None:
    run = changed(trial(run, "paca"), scale={"dtype": "bfloat16", "zero": 2})
    session = Session.open(run, Worker())
    before, loss = weights(session), validation_loss(session)
    Trainer(run, session, Reporter(), tmp_path).fit()
    assert_untouched(session, before)
    assert validation_loss(session) == loss


def test_a_trial_that_stops_or_fails_leaves_the_base_unchanged(
    run: RunConfig, session: Session, tmp_path: Path
) -> None:
    before = weights(session)
    Trainer(trial(run, "paca"), session, StopAt(2), tmp_path / "stopped", (2,)).fit()
    assert_untouched(session, before)

    class _Fails(RecordingReporter):
        def log(self, step: int, metrics: object) -> None:
            raise OSError

    for name in ("paca", "rac"):
        with pytest.raises(OSError):  # noqa: PT011
            Trainer(trial(run, name), session, _Fails(), tmp_path / name).fit()
        assert_untouched(session, before)


def test_a_tied_output_layer_stays_tied_and_frozen(run: RunConfig, session: Session, tmp_path: Path) -> None:
    model = session.loaded.model
    before = model.get_output_embeddings().weight.clone()
    Trainer(trial(run, "lora"), session, Reporter(), tmp_path / "lora").fit()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.equal(model.get_output_embeddings().weight, before)


def test_a_full_fine_tune_keeps_tied_layers_tied(run: RunConfig, session: Session, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = session.loaded.model
    before = model.get_output_embeddings().weight.clone()
    result = Trainer(trial(run, "full"), session, Reporter(), tmp_path).fit()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not torch.equal(model.get_output_embeddings().weight, before)
    saved = AutoModelForCausalLM.from_pretrained(result.folder)
    assert saved.get_output_embeddings().weight is saved.get_input_embeddings().weight
    for name, value in model.state_dict().items():
        assert torch.equal(saved.state_dict()[name], value)


@pytest.mark.parametrize("name", by_family(["lora", "asym", "cla", "c3la"], ["asym", "c3la"]))
def test_the_seed_decides_what_dropout_drops(
    run: RunConfig, session: Session, tmp_path: Path, name: str
) -> None:
    plain = trial(run, name)
    dropping = changed(plain, method={"dropout": 0.5})
    one, again, other, none = (
        Trainer(chosen, session, Reporter(), tmp_path / str(number)).fit()
        for number, chosen in enumerate((dropping, dropping, changed(dropping, seed=1), plain))
    )
    assert_same(one, again)
    # B starts at 0, so dropout shows in the loss of the second step, not of the first.
    assert one.train_curve[0] == none.train_curve[0]
    assert one.train_curve[1] != none.train_curve[1]
    assert one.content_hash != other.content_hash


@pytest.mark.parametrize("name", ["full", "paca"])
def test_dropout_is_refused_for_methods_that_train_the_base(run: RunConfig, name: str) -> None:
    with pytest.raises(
        MethodError,
        match=f"'{name}' trains the base's own weights, .*so method.dropout does nothing: drop it",
    ):
        changed(run, method=MethodConfig(name=name, dropout=0.1))
