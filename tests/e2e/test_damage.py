"""Files of a sweep that are damaged between two commands, or while one runs, are made again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayft.flow import scoring
from rayft.flow.config import PipelineConfig
from rayft.report.record import SweepRecord
from rayft.sweep.executor import LaneExecutor
from tests.e2e.small import run, small_config
from tests.unit.damages import half

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.usefixtures("in_warm_workers")]

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PipelineConfig:
    lora = {"lora": {"ranks": [4], "lr": [1e-2, 1e-3]}}
    return small_config(tmp_path_factory.mktemp("damage"), lora, {"ranks": [2]})


def found(record: SweepRecord) -> dict[str, Any]:
    """Return what a sweep has found, without anything that depends on clocks."""
    kept = record.model_dump(include={"baselines", "winner", "comparisons", "singular_values"})
    kept["trials"] = [(one.id, one.status, one.val_loss, one.train_loss, one.test) for one in record.trials]
    kept["squeezed"] = [(one.name, one.energy_mean, one.test, one.val_score) for one in record.squeezed]
    return kept


def hashes(folder: Path) -> dict[str, str]:
    results = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("trials/*/result.json")}
    return {key: values["result"]["content_hash"] for key, values in results.items()}


def test_damaged_files_are_made_again_and_nothing_else(
    record: SweepRecord, config: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, first = config.folder, hashes(config.folder)
    scores = {path: path.stat().st_mtime_ns for path in folder.glob("scores/*.json")}
    assert len(scores) == 3 + len(record.trials) + len(record.squeezed)
    assert record.winner
    best = next(Path(one.folder) for one in record.trials if record.winner.trial == one.id)

    def refuse(_executor: LaneExecutor) -> None:
        pytest.fail("a lane was started, although nothing was left to do")

    with monkeypatch.context() as patch:
        patch.setattr(LaneExecutor, "start", refuse)
        half(folder / "sweep.json")
        unchanged, said = run(config)
        assert found(unchanged) == found(record)
        assert "sweep.json is damaged" in said

    half(best / WEIGHTS)
    half(folder / "winner" / WEIGHTS)
    (folder / "squeezed" / "r2" / "rayft.json").write_bytes(b"")
    mended, said = run(config)
    assert f"{record.winner.trial} is trained again from" in said
    assert f"{best / WEIGHTS} is truncated or damaged" in said
    assert found(mended) == found(record)
    assert hashes(folder) == first
    assert {path: path.stat().st_mtime_ns for path in folder.glob("scores/*.json")} == scores


def test_an_adapter_that_is_damaged_meanwhile_fails_only_its_own_trial(
    record: SweepRecord, config: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert record.winner
    lost = next(one for one in record.trials if record.winner.trial == one.id)
    score_sweep = scoring.score_sweep

    def loses(*arguments: Any) -> Any:
        half(Path(lost.folder) / WEIGHTS)
        return score_sweep(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "score_sweep", loses)
        rest, said = run(config)
    assert f"{lost.id}: failed, can't be scored: " in said
    marked = next(one for one in rest.trials if one.id == lost.id)
    assert marked.status == "failed"
    assert "truncated or damaged" in marked.reason
    assert rest.winner
    assert rest.winner.trial == next(one.id for one in record.trials if one.id != lost.id)
    assert [one.trial for one in rest.squeezed] == [rest.winner.trial]
    page = (config.folder / "report.html").read_text()
    assert "1 of 2 trials failed" in page
