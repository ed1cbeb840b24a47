"""What rayft 0.1.0 made is still read, and trials that it finished are not trained again.

`made_by_0.1.0.tar.gz` holds what `rayft sweep answers.yaml` of that version left, with these in the place of
what depends on the folder that it ran in: @HERE@, and for each run of runs.json @RUN:name@ (its hash) and
@KEY:name@ (the hash's first six digits).
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sqlite3
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rayft.analysis.record import SweepAnalysis
from rayft.artifacts import AdapterArtifact
from rayft.config import load
from rayft.errors import ConfigError, TrainError
from rayft.flow.analyze.source import Item
from rayft.flow.config import PipelineConfig, load_config
from rayft.flow.squeeze.checks import check_base
from rayft.flow.squeeze.continued import continue_all
from rayft.flow.squeeze.make import Source, SqueezedAdapter
from rayft.flow.sweep.preflight import Plan, preflight
from rayft.flow.sweep.tracking import SweepTracking
from rayft.models.tiny import save_tiny_qwen
from rayft.registry.store import MlflowRegistry
from rayft.report.record import SweepRecord
from rayft.report.render import render
from rayft.serving.config import ServeConfig
from rayft.sweep.request import TrainRequest, tracking_key
from rayft.sweep.search import earlier
from rayft.tracking.base import Former
from rayft.tracking.mlflow import MlflowTracker
from tests.unit.flow.answers import Lanes

ARCHIVE = Path(__file__).with_name("made_by_0.1.0.tar.gz")
TRIALS = ("lora-r2-lr0.02-s0", "lora-r2-lr0.001-s0")


@pytest.fixture
def here(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that 0.1.0 ran in."""
    monkeypatch.setenv("RAYFT_CACHE", str(models))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    with tarfile.open(ARCHIVE) as archive:
        files = {member.name: archive.extractfile(member) for member in archive}
        contents = {name: file.read() for name, file in files.items() if file is not None}
    known = {"@HERE@": str(tmp_path)}
    for name, run in json.loads(contents["runs.json"].replace(b"@HERE@", bytes(tmp_path))).items():
        # How 0.1.0 computed it.
        digest = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()[:12]
        known |= {f"@RUN:{name}@": digest, f"@KEY:{name}@": digest[:6]}

    def filled(text: str) -> str:
        return re.sub("|".join(map(re.escape, known)), lambda found: known[found[0]], text)

    for name, content in contents.items():
        path = tmp_path / filled(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        binary = path.suffix in (".pt", ".safetensors")
        path.write_bytes(content if binary else filled(content.decode()).encode())
    database = sqlite3.connect(tmp_path / "out" / "mlflow.db")
    database.executescript((tmp_path / "out" / "mlflow.sql").read_text())
    database.close()
    return tmp_path


@pytest.fixture
def config(here: Path) -> PipelineConfig:
    return load_config(here / "answers.yaml")


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def requests(plan: Plan) -> list[TrainRequest]:
    return [
        TrainRequest(
            key=point.key,
            name=point.name,
            run=point.run,
            output=str(plan.output),
            evaluate_at=(),
            expected=plan.identity,
        )
        for point in plan.points
    ]


def test_finished_trials_are_used_again(config: PipelineConfig) -> None:
    for _ in range(2):
        plan = preflight(config)
        found = {request.name: earlier(request) for request in requests(plan)}
        assert [*found] == [*TRIALS]
        assert all(left is not None and left.result.finished for left in found.values())
        assert plan.former_hash
        assert not any("not used again" in text for text in plan.warnings)


def edit_answers(here: Path, models: Path) -> None:
    (here / "train.jsonl").write_text((here / "train.jsonl").read_text().replace('"5"', '"77"'))


def edit_the_test_part(here: Path, models: Path) -> None:
    (here / "test.jsonl").write_text((here / "test.jsonl").read_text().replace("31", "33"))


def other_weights(here: Path, models: Path) -> None:
    shutil.copytree(models, here / "cache", dirs_exist_ok=True)
    save_tiny_qwen(here / "cache" / "models" / "tiny-qwen", seed=1)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            edit_answers,
            r"the data has changed: /.*/train\.jsonl, .* had the digest \w+, now \w+ .*was rayft 0\.1\.0\)",
        ),
        (edit_the_test_part, "the data has changed"),
        (other_weights, r"the base has changed: the weights of tiny-qwen had the fingerprint \w+, now \w+"),
    ],
)
def test_a_change_since_then_is_refused_and_nothing_changes_in_the_folder(
    here: Path, models: Path, config: PipelineConfig, monkeypatch: pytest.MonkeyPatch, change: Any, match: str
) -> None:
    change(here, models)
    if (here / "cache").is_dir():
        monkeypatch.setenv("RAYFT_CACHE", str(here / "cache"))
    before = tree(here / "out")
    with pytest.raises(ConfigError, match=match + r".*Nothing was changed.*--set output="):
        preflight(config)
    assert tree(here / "out") == before


def test_a_checkpoint_is_used_if_other_trials_show_its_data_and_base(
    here: Path, config: PipelineConfig
) -> None:
    trials = {name: next((here / "out" / "trials").glob(f"{name}-??????")) for name in TRIALS}
    (trials[TRIALS[0]] / "result.json").unlink()
    shutil.rmtree(trials[TRIALS[0]] / "adapter")
    assert preflight(config).former_hash
    (here / "out" / "identity.json").unlink()
    for folder in (here / "out" / "trials").iterdir():
        if folder != trials[TRIALS[0]]:
            shutil.rmtree(folder)
    (here / "out" / "sweep.json").unlink()
    before = tree(here / "out")
    with pytest.raises(
        ConfigError, match=r"trials/lora-r2-lr0\.02.*did not record which data and base.*Delete it"
    ):
        preflight(config)
    assert tree(here / "out") == before


def squeezed(plan: Plan) -> SqueezedAdapter:
    point = plan.points[0]
    source = Source(point.name, point.key, point.run, "", plan.identity)
    return SqueezedAdapter(
        f"{point.name}@r1", source, "post", 1, plan.output / "squeezed" / "r1", 176, 1232, {"q": 1.0}, 0.0
    )


def test_a_continued_training_is_used_again(here: Path, config: PipelineConfig) -> None:
    plan, lanes = preflight(config), Lanes(lambda _: "asked for")
    executor: Any = lanes
    assert config.squeeze.cont
    item = squeezed(plan)
    (one,) = continue_all(executor, [item], config.squeeze.cont, plan.output)
    assert lanes.asked == []
    assert one.val_loss == 6.276771068572998
    # The adapter that the training started from is another one now.
    folder = plan.output / "squeezed" / "r1"
    artifact = AdapterArtifact.load(folder)
    name, factors = next(iter(artifact.modules.items()))
    replace(artifact, modules={**artifact.modules, name: replace(factors, scale=-factors.scale)}).save(folder)
    with pytest.raises(TrainError, match="asked for"):
        continue_all(executor, [item], config.squeeze.cont, plan.output)
    assert lanes.asked == [f"{item.source.key}@r1+{config.squeeze.cont.steps}"]


def test_its_record_and_analysis_are_read(here: Path, config: PipelineConfig) -> None:
    record, analysis = SweepRecord.load(here / "out"), SweepAnalysis.find(here / "out")
    assert analysis is not None
    assert [trial.id for trial in record.trials] == [*TRIALS]
    page = render(record, here / "report.html", analysis).read_text()
    assert all(name in page for name in TRIALS)
    plan = preflight(config)
    found = {one.name: one for one in analysis.adapters}
    for trial, point in zip(record.trials, plan.points, strict=True):
        item = Item(trial.id, point.run, Path(trial.folder), trial.run_id, plan.identity)
        assert (item.group, item.weights) == (found[trial.id].group, found[trial.id].weights)
        assert item.with_inputs(found[trial.id]).inputs == plan.identity.inputs


def test_its_serving_configuration_is_read(here: Path, config: PipelineConfig) -> None:
    serve = load(ServeConfig, here / "out" / "serve.yaml")
    (folder,) = serve.adapters.values()
    check_base(AdapterArtifact.load(folder), None, preflight(config).run)
    assert AdapterArtifact.load(folder).squeezed


def test_its_tracked_runs_are_continued(config: PipelineConfig) -> None:
    plan = preflight(config)
    record = SweepRecord.load(plan.output)
    tracker = MlflowTracker(plan.tracker)
    parent = SweepTracking(plan, tracker).run_id
    for trial, request in zip(record.trials, requests(plan), strict=True):
        for former in (Former(request.key), None):
            key = tracking_key(request.key, plan.identity)
            assert tracker.run(trial.id, key, parent=parent, former=former) == trial.run_id
    # The second time the run has the new key.
    assert SweepTracking(plan, tracker).run_id == parent
    other = plan.identity.model_copy(update={"base": "f" * 16})
    key = tracking_key(record.trials[0].id, other)
    elsewhere = tracker.run("sweep", "elsewhere")
    assert tracker.run("trial", key, parent=elsewhere, former=Former(requests(plan)[0].key)) not in {
        trial.run_id for trial in record.trials
    }
    tracker.close()


def test_its_registered_version_is_found(config: PipelineConfig) -> None:
    plan = preflight(config)
    record, registry = SweepRecord.load(plan.output), MlflowRegistry(plan.tracker.uri)
    (version,) = registry.versions("answers")
    winner = plan.output / "winner"
    assert version.content_hash == AdapterArtifact.load(winner).content_hash
    assert registry.register("answers", record.trials[0].run_id, winner, {}) == 1
    fetched = registry.fetch("models:/answers/1", plan.output / "fetched")
    assert AdapterArtifact.load(fetched).content_hash == version.content_hash
