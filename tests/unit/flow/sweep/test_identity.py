"""A sweep whose data or base has changed is refused before anything starts, and its folder stays as it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rayft.artifacts import AdapterArtifact
from rayft.errors import ConfigError, TrainError
from rayft.flow.config import PipelineConfig, load_config
from rayft.flow.sweep.identity import current_identity
from rayft.flow.sweep.preflight import Plan, preflight
from rayft.methods.base import LoraFactors
from rayft.models.tiny import save_tiny_llama
from rayft.sweep.decisions import EVENTS_FILE, Decision, EventLog
from rayft.sweep.request import TrainRequest
from rayft.sweep.search import earlier

CONFIG = """
name: answers
output: out
model: {name: base}
data:
  source: jsonl
  files: {train: train.jsonl, val: val.jsonl, test: test.jsonl}
  max_length: 128
optim: {steps: 2, rows_per_step: 2, warmup: 0}
scale: {device: cpu, dtype: float32, threads: 1}
sweep: {methods: {lora: {ranks: [2], lr: [1.0e-2]}}}
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def here(tmp_path: Path, saved: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    shutil.copytree(saved, tmp_path / "base")
    for part, boxes in (("train", range(8)), ("val", range(8, 10)), ("test", range(10, 12))):
        rows = [json.dumps({"prompt": f"How many in box {box}?", "completion": "5"}) for box in boxes]
        (tmp_path / f"{part}.jsonl").write_text("\n".join(rows))
    (tmp_path / "answers.yaml").write_text(CONFIG)
    return tmp_path


def config(*overrides: str) -> PipelineConfig:
    return load_config("answers.yaml", overrides)


def request(plan: Plan) -> TrainRequest:
    (point,) = plan.points
    return TrainRequest(point.key, point.name, point.run, str(plan.output), (), expected=plan.identity)


def finish(plan: Plan) -> None:
    """Leave what a finished trial leaves."""
    (point,) = plan.points
    folder = plan.output / "trials" / point.key
    adapter = AdapterArtifact({"q": LoraFactors(torch.ones(2, 4), torch.ones(4, 2), 1.0)})
    adapter.save(folder / "adapter")
    identity = request(plan).identity.brief.model_dump(mode="json", exclude_defaults=True)
    result = {
        "finished": True, "steps": 2, "val_curve": [], "val_loss": 1.0, "folder": str(folder / "adapter"),
        "content_hash": adapter.content_hash,
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps({"result": result, "run_id": "r", "identity": identity}))


def interrupt(plan: Plan) -> None:
    """Leave what a trial leaves that was killed after a checkpoint."""
    (point,) = plan.points
    folder = plan.output / "trials" / point.key / "checkpoint" / "step-000001"
    folder.mkdir(parents=True)
    identity = request(plan).identity.brief.model_dump(mode="json", exclude_defaults=True)
    (folder / "state.json").write_text(json.dumps({"step": 1, "identity": identity, "files": {}}))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit(name: str, old: str, new: str) -> Callable[[], object]:
    return lambda: Path(name).write_text(Path(name).read_text().replace(old, new))


@pytest.mark.parametrize("leave", [finish, interrupt])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            edit("train.jsonl", '"5"', '"77"'),
            r"the data has changed: /.*/train\.jsonl, .* \(train\) had the digest \w+, now",
        ),
        (
            edit("test.jsonl", '"5"', '"77"'),
            r"the data has changed: .*test\.jsonl \(test\) had the digest",
        ),
        (
            lambda: save_tiny_llama(Path("base"), seed=1),
            r"the base has changed: .*/base is not what it was in model\.safetensors \(hash",
        ),
        (
            edit("base/chat_template.jinja", "'content']", "'content'] + ' '"),
            r"not what it was in chat_template\.jinja",
        ),
        (edit("base/generation_config.json", "pad_token_id", "bos_token_id"), "generation_config"),
    ],
)
def test_a_change_of_data_or_base_is_refused_by_name(
    here: Path, leave: Callable[[Plan], None], change: Callable[[], object], match: str
) -> None:
    leave(preflight(config()))
    before = tree(here / "out")
    change()
    with pytest.raises(ConfigError, match=match + r".*Nothing was changed.*--set output="):
        preflight(config())
    assert tree(here / "out") == before
    # The same command in another folder starts a new sweep.
    assert preflight(config("output=other")).identity.data


def test_a_sweep_continues_when_its_data_are_restored(here: Path) -> None:
    first = preflight(config())
    finish(first)
    edit("train.jsonl", '"5"', '"77"')()
    with pytest.raises(ConfigError, match="data has changed"):
        preflight(config())
    edit("train.jsonl", '"77"', '"5"')()
    again = preflight(config())
    assert again.identity == first.identity
    left = earlier(request(again))
    assert left is not None
    assert left.run_id == "r"


def test_a_folder_without_results_takes_any_data(here: Path) -> None:
    first = preflight(config())
    edit("train.jsonl", '"5"', '"77"')()
    second = preflight(config())
    assert second.identity.data != first.identity.data
    finish(second)
    assert preflight(config()).identity == second.identity


def test_decisions_about_trials_on_other_data_are_not_repeated(here: Path) -> None:
    """Trials can have been evaluated and decided about, and yet have left no checkpoint."""
    first = preflight(config())
    (point,) = first.points
    log, trail = first.output / EVENTS_FILE, first.output / "trials" / point.key / "trail" / "step-000001"
    trail.mkdir(parents=True)
    EventLog(log).append(Decision(point.key, 1, 3.0, go_on=False))
    preflight(config())
    assert EventLog(log).find(point.key, 1) is not None
    assert trail.is_dir()
    edit("train.jsonl", '"5"', '"77"')()
    second = preflight(config())
    assert EventLog(log).decisions == []
    assert not trail.exists()
    EventLog(log).append(Decision(point.key, 1, 2.0, go_on=True))
    interrupt(second)
    preflight(config())
    assert EventLog(log).find(point.key, 1) is not None


def test_a_relative_path_names_another_file_in_another_folder(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(preflight(config("output=" + str(here / "out"))))
    elsewhere = here / "elsewhere"
    elsewhere.mkdir()
    for name in ("base", "answers.yaml", "train.jsonl", "val.jsonl", "test.jsonl"):
        (shutil.copytree if name == "base" else shutil.copy)(here / name, elsewhere / name)
    monkeypatch.chdir(elsewhere)
    # The same content under another path: other keys. It is said, since trials run again.
    plan = preflight(config("output=" + str(here / "out")))
    assert any(text.endswith("is not used again: it has other settings") for text in plan.warnings)
    edit("val.jsonl", '"5"', '"77"')()
    with pytest.raises(ConfigError, match=r"elsewhere/val\.jsonl.* \(val\) had the digest"):
        preflight(config("output=" + str(here / "out")))


def test_a_result_from_other_data_is_not_used_again(here: Path) -> None:
    plan = preflight(config())
    finish(plan)
    asked = request(plan)
    other = plan.identity.model_copy(update={"data": "0" * 16})
    with pytest.raises(TrainError, match=r"trials/.* holds a result that can't be used again: the data has"):
        earlier(TrainRequest(asked.key, asked.name, asked.run, asked.output, (), expected=other))


def test_commands_that_read_the_data_of_a_sweep_compare_them_too(here: Path) -> None:
    plan = preflight(config())
    finish(plan)
    now = current_identity(plan.run, plan.output)
    assert now.differences(plan.identity) == []
    assert now.fingerprint
    edit("train.jsonl", '"5"', '"77"')()
    with pytest.raises(ConfigError, match=r"data has changed.*or name other data .* with --config"):
        current_identity(plan.run, plan.output)
    assert current_identity(plan.run).data != now.data
