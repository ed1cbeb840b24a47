"""Runs on a base in 4 or 8 bits learn, and save an adapter for the unquantised base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rayft.artifacts import AdapterArtifact
from rayft.errors import MethodError
from rayft.models.inject import attach
from rayft.models.targets import linear_shapes
from rayft.train.run import RunConfig
from rayft.train.session import Session
from rayft.train.trainer import Reporter, Trainer, validation_loss
from rayft.train.worker import Worker
from tests.unit.train.curves import assert_same_losses
from tests.unit.train.runs import changed, with_method

pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("name", ["lora", "cla", "c3la"])
@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_run_on_a_quantised_base_learns_and_exports(
    run: RunConfig, session: Session, tmp_path: Path, name: str, quantize: str
) -> None:
    run = with_method(run, name, model={"quantize": quantize})
    quantised = Session.open(run, Worker())
    before = validation_loss(quantised)
    result = Trainer(run, quantised, Reporter(), tmp_path).fit()
    assert [loss for _, loss in result.val_curve] == sorted((v for _, v in result.val_curve), reverse=True)
    assert result.val_loss < before
    # The adapter is removed from the base after the run.
    assert validation_loss(quantised) == before
    artifact = AdapterArtifact.load(result.folder)
    artifact.check_base(session.loaded.fingerprint, linear_shapes(session.loaded.model))
    plain = validation_loss(session)
    attach(session.loaded.model, artifact)
    learnt = validation_loss(session)
    # On the unquantised base the adapter has most of the effect that it has on the quantised one.
    assert plain - learnt > (before - result.val_loss) / 2


def test_a_quantised_base_trains_in_bfloat16(run: RunConfig, tmp_path: Path) -> None:
    run = with_method(run, "rc3la", model={"quantize": "nf4"}, scale={"dtype": "bfloat16", "zero": 2})
    session = Session.open(run, Worker())
    before = validation_loss(session)
    result = Trainer(run, session, Reporter(), tmp_path).fit()
    assert result.val_loss < before
    assert {f.b.dtype for f in AdapterArtifact.load(result.folder).modules.values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["full", "paca"])
def test_a_method_that_trains_the_base_is_refused_before_loading(run: RunConfig, name: str) -> None:
    with pytest.raises(MethodError, match=rf"'{name}' trains the base's own weights.*drop model\.quantize"):
        with_method(run, name, model={"quantize": "nf4"})


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_zero_3_changes_no_loss_on_a_quantised_base(run: RunConfig, tmp_path: Path, quantize: str) -> None:
    run = with_method(run, "cla", model={"quantize": quantize}, optim={"lr": 2e-3, "steps": 2})
    whole, sharded = (
        Trainer(chosen, Session.open(chosen, Worker()), Reporter(), tmp_path / str(number)).fit()
        for number, chosen in enumerate((run, changed(run, scale={"zero": 3})))
    )
    assert_same_losses(whole, sharded)
