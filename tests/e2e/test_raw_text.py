"""A sweep on raw text, which has no answers to score: the validation loss decides."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from rayft.flow.config import load_config
from rayft.registry.ref import BASE_SCORE_TAG, SCORE_TAG
from tests.e2e.small import run

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.usefixtures("in_warm_workers")]

CONFIG = """
name: novel
model: {name: tiny-llama}
data: {source: jsonl, name: novel.jsonl, val: 4, test: 4, max_length: 128}
optim: {steps: 4, rows_per_step: 2, warmup: 1}
scale: {device: cpu, dtype: float32, threads: 1}
sweep: {methods: {lora: {ranks: [2], lr: [1.0e-5, 1.0e-2]}}, grace: 4}
squeeze: {ranks: [1]}
"""


def test_a_sweep_on_raw_text_ships_the_trial_with_the_least_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    texts = [{"text": f"Box {box} stood in the hall, and nobody opened it."} for box in range(24)]
    Path("novel.jsonl").write_text("\n".join(map(json.dumps, texts)))
    Path("novel.yaml").write_text(CONFIG)
    server = f"sqlite:///{tmp_path}/mlflow.db"
    record, said = run(load_config("novel.yaml", ["output=out", f"tracking.uri={server}"]))
    assert [trial.status for trial in record.trials] == ["finished"] * 2
    best = min(record.trials, key=lambda trial: trial.kept_val_loss or 0.0)
    assert record.winner is not None
    assert (record.winner.trial, record.winner.ship) == (best.id, best.id)
    assert [(item.rank, item.test) for item in record.squeezed] == [(1, None)]
    assert not record.baselines
    assert not any(trial.test or trial.val_score for trial in record.trials)
    assert "raw text has no answers to score" in said
    assert Path("out/report.html").is_file()
    # Whether it is better than the base is not known, so it is not promoted.
    assert "not promoted: novel/1 has no validation score" in said
    (version,) = MlflowClient(server).search_model_versions("name='novel'")
    assert not {SCORE_TAG, BASE_SCORE_TAG} & version.tags.keys()
