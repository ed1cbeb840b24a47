"""Data that are edited while a sweep runs, or after it, are noticed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from rayft.errors import ConfigError, TrainError
from rayft.flow.config import PipelineConfig, load_config
from rayft.flow.sweep import run as flow
from tests.e2e.small import run

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.usefixtures("in_warm_workers")]

CONFIG = """
name: answers
model: {name: tiny-llama}
data: {source: jsonl, name: answers.jsonl, val: 4, test: 4, max_length: 128}
optim: {steps: 4, rows_per_step: 2, warmup: 1}
scale: {device: cpu, dtype: float32, threads: 1}
evaluate: {max_new_tokens: 4}
sweep: {methods: {lora: {ranks: [2], lr: [1.0e-2]}}}
squeeze: {ranks: [1]}
"""


def write(answer: str) -> None:
    rows = [{"prompt": f"How many in box {box}?", "completion": answer} for box in range(24)]
    Path("answers.jsonl").write_text("\n".join(map(json.dumps, rows)))


def test_edited_answers_are_refused_in_the_same_folder_and_learnt_in_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # One server for both folders, so that the run of one sweep could be mistaken for that of the other.
    server = f"sqlite:///{tmp_path}/mlflow.db"
    Path("answers.yaml").write_text(CONFIG)
    config, other = (
        load_config("answers.yaml", [f"output={name}", f"tracking.uri={server}"]) for name in ("out", "other")
    )

    with monkeypatch.context() as during:

        def checked(config: PipelineConfig) -> Any:
            plan = flow_preflight(config)
            write("77")
            return plan

        flow_preflight = flow.preflight
        during.setattr(flow, "preflight", checked)
        write("5")
        with pytest.raises(
            TrainError, match=r"since the command began the data has changed: .*answers\.jsonl"
        ):
            run(config)
        assert not [*Path("out/trials").glob("*/result.json")]

    write("5")
    first, _ = run(config)
    (trial,) = first.trials
    kept = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    write("77")
    with pytest.raises(ConfigError, match=r"the data has changed: .*answers\.jsonl .*now \w+\. Nothing was"):
        run(config)
    assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == kept

    second, _ = run(other)
    assert second.trials[0].id == trial.id
    assert second.trials[0].train_loss != trial.train_loss
    assert second.trials[0].run_id != trial.run_id
    client = MlflowClient(server)
    for record in (first, second):
        tracked = client.get_run(record.trials[0].run_id)
        assert tracked.data.params["data_digest"] == record.data_digest
        assert len(client.get_metric_history(tracked.info.run_id, "train_loss")) == 4
    assert not Path("out/spool/rejected.log").exists()
    assert not Path("other/spool/rejected.log").exists()
