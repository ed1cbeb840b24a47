"""ZeRO's stages train the same adapters (one process; the stages' sharding needs Ray, see integration)."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayft.artifacts import AdapterArtifact
from rayft.train.context import Session, SilentReporter, Worker
from rayft.train.loop import fit
from rayft.train.run import RunConfig
from tests.unit.train.curves import assert_same_losses


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_stage_changes_no_loss(run: RunConfig, tmp_path: Path, zero: int) -> None:
    plain = fit(run, Session.open(run, Worker()), SilentReporter(), tmp_path / "plain")
    sharded = run.model_copy(update={"scale": run.scale.model_copy(update={"zero": zero})})
    result = fit(sharded, Session.open(sharded, Worker()), SilentReporter(), tmp_path / "sharded")
    assert_same_losses(plain, result)
    assert AdapterArtifact.load(result.folder).parameters == AdapterArtifact.load(plain.folder).parameters
