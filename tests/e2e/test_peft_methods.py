"""A sweep of `lora` and a method of PEFT on the tiny model, whose winner has no low-rank factors."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from mlflow import MlflowClient
from rich.console import Console

from rayft.artifacts import AdapterArtifact
from rayft.data.section import DataConfig, PartFiles
from rayft.data.source import read
from rayft.errors import ArtifactError
from rayft.flow.commands import squeeze
from rayft.flow.config import PipelineConfig
from rayft.flow.selection import served_adapters
from rayft.peft.folder import PeftFolder, load_adapter
from rayft.report.record import SweepRecord
from tests.e2e.small import small_config

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.usefixtures("in_warm_workers")]

METHODS = {
    "lora": {"ranks": [2], "lr": [1e-7]},
    "peft:DoRA": {"ranks": [2], "lr": [1e-2]},
}
"""Learning rates that let DoRA win."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PipelineConfig:
    folder = tmp_path_factory.mktemp("peft")
    small = small_config(folder, METHODS)
    return small.model_copy(update={"data": with_repeats(folder, small.data)})


def with_repeats(folder: Path, task: DataConfig) -> DataConfig:
    """Write the parts of a task to files; train has another answer to its first question and two repeats."""
    parts = read(task)
    named: dict[str, str] = {}
    for part in ("train", "val", "test"):
        rows = [
            {"prompt": example.messages[0].content, "completion": example.answer}
            for example in getattr(parts, part)
        ]
        if part == "train":
            rows += [{**rows[0], "completion": "another answer"}, *rows[:2]]
        named[part] = str(folder / f"{part}.jsonl")
        Path(named[part]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataConfig(source="jsonl", files=PartFiles(**named), max_length=task.max_length)


def test_a_winner_without_factors_ends_in_a_report_that_says_so(
    record: SweepRecord, config: PipelineConfig, said: io.StringIO
) -> None:
    output = Path(config.output)
    assert record.winner
    assert record.winner.trial.startswith("peft:DoRA")
    assert "it has no low-rank factors" in record.winner.why
    assert "it has no low-rank factors" in (output / "report.html").read_text()
    assert "is peft:DoRA, whose update has no low-rank factors: it is saved in" in said.getvalue()
    assert "the best one that can is" in said.getvalue()
    assert not record.squeezed
    assert not served_adapters(output, record)
    assert SweepRecord.load(output) == record


def test_what_was_dropped_is_printed_tracked_and_reported(
    record: SweepRecord, config: PipelineConfig, said: io.StringIO
) -> None:
    assert config.data.files
    text = (
        f"{config.data.files.train}: dropped 2 of 27 rows whose question and answer an earlier one has (the "
        "first is line 26: "
    )
    (reported,) = record.data_dropped
    assert reported.startswith(text)
    assert record.data_sizes == {"train": 25, "val": 4, "test": 4}
    assert reported in said.getvalue()
    assert said.getvalue().index(reported) < said.getvalue().index("start workers")
    assert "dropped 2 of 27 rows" in (Path(config.output) / "report.html").read_text()
    client = MlflowClient(f"sqlite:///{config.output}/mlflow.db")
    experiment = client.get_experiment_by_name("rayft")
    assert experiment
    (sweep,) = client.search_runs([experiment.experiment_id], "tags.`rayft.kind` = 'sweep'")
    assert sweep.data.params["data_dropped"] == reported


def test_every_trial_was_scored_and_can_be_read(record: SweepRecord) -> None:
    assert [trial.status for trial in record.trials] == ["finished"] * 2
    assert all(trial.test is not None and trial.bytes > 0 for trial in record.trials)
    kinds = {trial.method: type(load_adapter(trial.folder)) for trial in record.trials}
    assert kinds == {"lora": AdapterArtifact, "peft:DoRA": PeftFolder}


def test_squeezing_it_says_what_to_train_instead(record: SweepRecord, tmp_path: Path) -> None:
    assert record.winner
    folder = next(trial.folder for trial in record.trials if trial.id == record.winner.trial)
    with pytest.raises(ArtifactError, match="can't be squeezed, promoted or served: train lora"):
        squeeze(folder, tmp_path, Console(quiet=True), ranks=[1])
