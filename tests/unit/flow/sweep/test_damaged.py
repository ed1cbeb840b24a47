"""What is damaged of a sweep's folder is found before the start: it is made again, or a person decides."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rayft.analysis.record import PIECES, AdapterAnalysis
from rayft.analysis.section import AnalyzeConfig
from rayft.artifacts import AdapterArtifact, check_replaceable
from rayft.errors import ArtifactError, ConfigError, TrainError
from rayft.flow.analyze import run as analyze
from rayft.flow.analyze.source import Item
from rayft.flow.config import PipelineConfig, load_config
from rayft.flow.scores import ScoreStore
from rayft.flow.scoring import Measured, check_some, marked, score_all
from rayft.flow.squeeze.make import Source, SqueezedAdapter, continue_all
from rayft.flow.sweep.damaged import discard_damaged
from rayft.flow.sweep.preflight import Plan, preflight
from rayft.methods.base import LoraFactors
from rayft.models.files import LARGE, hash_file
from rayft.squeeze.section import ContinueConfig
from rayft.sweep.broker import Event, Job
from rayft.sweep.lane import TrainRequest
from rayft.sweep.result import damage, file_hashes, write_result
from rayft.sweep.score import ScoreRequest
from rayft.sweep.tuner import Trial, earlier
from tests.unit.damages import DAMAGES, empty, half, one_bit

ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "rayft.json")
CONFIG = """
name: answers
output: out
model: {name: tiny-llama}
data: {source: jsonl, name: answers.jsonl, val: 2, test: 2, max_length: 128}
optim: {steps: 2, rows_per_step: 2, warmup: 0}
scale: {device: cpu, dtype: float32, threads: 1}
sweep: {methods: {lora: {ranks: [2], lr: [1.0e-2]}}}
"""


def adapter(seed: int = 0) -> AdapterArtifact:
    draw = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 4, generator=draw), torch.randn(4, 2, generator=draw)
    return AdapterArtifact({"q": LoraFactors(a, b, 1.0)})


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path]:
    """A sweep's folder with a finished trial, and the folder that it lies in."""
    here = tmp_path_factory.mktemp("sweep")
    rows = [json.dumps({"prompt": f"How many in box {box}?", "completion": "5"}) for box in range(12)]
    (here / "answers.jsonl").write_text("\n".join(rows))
    (here / "answers.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{here}/mlflow.db")
        plan = preflight(load_config("answers.yaml"))
    (point,) = plan.points
    folder = plan.output / "trials" / point.key
    saved = adapter()
    saved.save(folder / "adapter")
    identity = request(plan).identity.brief.model_dump(mode="json", exclude_defaults=True)
    result = {
        "finished": True, "steps": 2, "val_curve": [[2, 1.0]], "val_loss": 1.0,
        "folder": str(folder / "adapter"), "content_hash": saved.content_hash,
    }  # fmt: skip
    write_result(folder, {"result": result, "run_id": "r", "identity": identity})
    return plan, here


@pytest.fixture
def plan(kept: tuple[Plan, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A copy of it, which may be damaged."""
    monkeypatch.chdir(shutil.copytree(kept[1], tmp_path / "here"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/here/mlflow.db")
    return Plan(**{**vars(kept[0]), "output": tmp_path / "here" / "out"})


@pytest.fixture
def config(plan: Plan) -> PipelineConfig:
    return load_config("answers.yaml")


def request(plan: Plan) -> TrainRequest:
    (point,) = plan.points
    run = point.run.model_dump_json()
    return TrainRequest(point.key, point.name, run, str(plan.output), (), expected=plan.identity)


def trial(plan: Plan) -> Path:
    return plan.output / "trials" / plan.points[0].key


def test_a_moved_folder_is_whole(plan: Plan) -> None:
    values = earlier(request(plan))
    assert values is not None
    assert values["result"]["folder"] == str(trial(plan) / "adapter")
    assert discard_damaged(plan.output, plan.points) == []
    assert earlier(request(plan)) is not None


@pytest.mark.parametrize("name", ["result.json", *(f"adapter/{name}" for name in ADAPTER), "adapter"])
def test_a_damaged_result_or_adapter_is_trained_again(plan: Plan, tmp_path: Path, name: str) -> None:
    whole = shutil.copytree(plan.output, tmp_path / "whole")
    ways = (shutil.rmtree,) if name == "adapter" else DAMAGES
    if name == f"adapter/{ADAPTER[1]}":
        ways = (*DAMAGES, one_bit)
    for way in ways:
        shutil.rmtree(plan.output)
        shutil.copytree(whole, plan.output)
        way(trial(plan) / name)
        said = discard_damaged(plan.output, plan.points)
        if (name, way) == ("result.json", Path.unlink):
            assert said == [], "a trial without a result has not ended"
        else:
            (text,) = said
            assert text.startswith(f"{plan.points[0].name} is trained again from the start: ")
        assert earlier(request(plan)) is None
        check_replaceable(trial(plan) / "adapter")
        assert discard_damaged(plan.output, plan.points) == []


@pytest.mark.parametrize(
    "content", ["null", "[]", "{}", '{"result": {}}', '{"result": {"finished": 1}, "run_id": ""}']
)
def test_a_result_that_lacks_something_is_trained_again(plan: Plan, content: str) -> None:
    (trial(plan) / "result.json").write_text(content)
    assert len(discard_damaged(plan.output, plan.points)) == 1


def test_another_adapter_than_the_result_names(plan: Plan) -> None:
    adapter(1).save(trial(plan) / "adapter")
    (text,) = discard_damaged(plan.output, plan.points)
    assert "holds another adapter" in text


def test_what_a_killed_process_had_begun_to_write_goes(plan: Plan) -> None:
    begun = [plan.output / ".winner-ab3_9xyz", trial(plan) / ".adapter-a1b2c3d4"]
    begun.append(plan.output / "squeezed" / ".r2-0123abcd")
    for folder in begun:
        (folder / "new").mkdir(parents=True)
    for file in (plan.output / ".sweep.json.42-77", plan.output / "scores" / ".base.json.42-77"):
        file.parent.mkdir(exist_ok=True)
        file.write_text("{")
        begun.append(file)
    kept = [plan.output / ".notes-20261128", plan.output / ".env"]
    kept[0].mkdir()
    (kept[0] / "mine.md").write_text("mine")
    kept[1].write_text("A=1")
    assert discard_damaged(plan.output, plan.points) == []
    assert not any(path.exists() for path in begun)
    assert all(path.exists() for path in kept)


def test_files_of_a_user_beside_a_damaged_adapter_stay(plan: Plan) -> None:
    (trial(plan) / "adapter" / "notes.txt").write_text("mine")
    half(trial(plan) / "adapter" / ADAPTER[1])
    assert len(discard_damaged(plan.output, plan.points)) == 1
    with pytest.raises(ArtifactError, match=r"holds notes\.txt"):
        check_replaceable(trial(plan) / "adapter")


def test_a_damaged_model_is_trained_again(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(bytes(range(200)))
    result = {"finished": True, "steps": 2, "val_curve": [], "val_loss": 1.0, "folder": "/before/model"}
    values = {"result": {**result, "content_hash": ""}, "run_id": "", "hashes": file_hashes(weights.parent)}
    write_result(tmp_path, values)
    assert damage(tmp_path) == ""
    one_bit(weights)
    assert damage(tmp_path) == f"{weights} is not what was written"
    weights.unlink()
    assert damage(tmp_path) == f"{weights} is missing"


@pytest.mark.parametrize("place", ["winner", "squeezed/r1"])
def test_a_damaged_adapter_that_is_derived_is_made_again(
    plan: Plan, config: PipelineConfig, place: str
) -> None:
    for name in ADAPTER:
        for way in DAMAGES:
            folder = adapter().save(plan.output / place)
            way(folder / name)
            if (name, way) == (ADAPTER[2], Path.unlink):
                with pytest.raises(
                    ArtifactError, match=r"no rayft\.json.*If it is what this sweep made, del"
                ):
                    preflight(config)
                shutil.rmtree(folder)
                continue
            discard_damaged(plan.output, plan.points)
            adapter().save(folder)
    empty(adapter().save(plan.output / place) / ADAPTER[2])
    assert any(f"{place} is made again" in text for text in preflight(config).warnings)


@pytest.mark.parametrize("name", ["sweep.json", "analysis.json"])
def test_a_damaged_record_is_said_and_written_again(plan: Plan, name: str) -> None:
    for way in DAMAGES[:-1]:
        (plan.output / name).write_text('{"format": 1}')
        way(plan.output / name)
        (text,) = discard_damaged(plan.output, plan.points)
        assert name in text


@pytest.mark.parametrize(
    ("name", "match"),
    [
        (
            "identity.json",
            r"identity\.json is damaged.*Nothing was touched.*Put back.*delete it.*--set output",
        ),
        (
            "config.yaml",
            r"config\.yaml is missing or damaged.*Put back.*write '# sweep \w+' into.*--set output",
        ),
    ],
)
def test_what_decides_results_is_left_to_a_person(
    plan: Plan, config: PipelineConfig, name: str, match: str
) -> None:
    content = (plan.output / name).read_bytes()
    for way in DAMAGES:
        if (name, way) in (("identity.json", Path.unlink), ("config.yaml", half)):
            continue
        (plan.output / name).write_bytes(content)
        way(plan.output / name)
        with pytest.raises(ConfigError, match=match):
            preflight(config)
        assert (trial(plan) / "result.json").is_file()


def test_the_way_out_that_is_named_leads_out(plan: Plan, config: PipelineConfig) -> None:
    empty(plan.output / "config.yaml")
    with pytest.raises(ConfigError) as refused:
        preflight(config)
    (plan.output / "config.yaml").write_text(
        str(refused.value).partition("write '")[2].partition("'")[0] + "\n"
    )
    (plan.output / "identity.json").unlink()
    preflight(config)
    assert (trial(plan) / "result.json").is_file()


def test_a_damaged_hash_is_taken_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("rayft.models.files.SETTLED", -1.0)
    path = tmp_path / "weights"
    path.write_bytes(b"\1" * LARGE)
    value = hash_file(path)
    (note,) = (tmp_path / "cache" / "hashes").iterdir()
    for way in DAMAGES:
        way(note)
        assert hash_file(path) == value
        assert json.loads(note.read_text())["hash"] == value


class Lanes:
    """An executor whose lanes answer at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failing: str = "") -> None:
        self.asked: list[str] = []
        self._failing = failing
        monkeypatch.setattr("ray.nodes", list)
        monkeypatch.setattr("ray.get", lambda event: event)
        monkeypatch.setattr("ray.wait", lambda events, num_returns: (events[:1], events[1:]))
        self.broker = SimpleNamespace(next_event=SimpleNamespace(remote=self._answer))

    def submit(self, jobs: list[Job]) -> None:
        self.asked += [job.id for job in jobs]

    def _answer(self, name: str) -> Any:
        class Answer(Event):
            __hash__ = object.__hash__

        if name == self._failing:
            return Answer("failed", values={"error": "its lane died"})
        return Answer("final", values={"scores": {"val": [1.0, 0.0], "test": [0.5]}})


def requests(plan: Plan, **changes: Any) -> dict[str, ScoreRequest]:
    run = plan.run.model_copy(update=changes).model_dump_json()
    return {
        "base": ScoreRequest(run, ("val", "test"), expected=plan.identity),
        "trial": ScoreRequest(run, ("test",), str(trial(plan) / "adapter"), expected=plan.identity),
    }


def test_a_score_is_made_once(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    lanes, store = Lanes(monkeypatch), ScoreStore(plan.output / "scores", said.append)
    executor: Any = lanes
    first = score_all(executor, requests(plan), store)
    assert lanes.asked == ["base", "trial"]
    again = score_all(executor, requests(plan), store)
    assert {name: [*found.parts["test"]] for name, found in again.items()} == {
        name: [*found.parts["test"]] for name, found in first.items()
    }
    # How a trial is run changes no score; how answers are generated does.
    seldom = plan.run.evaluate.model_copy(update={"checkpoint_seconds": 1.0})
    score_all(executor, requests(plan, evaluate=seldom), store)
    assert lanes.asked == ["base", "trial"]
    longer = plan.run.evaluate.model_copy(update={"max_new_tokens": 3})
    score_all(executor, requests(plan, evaluate=longer), store)
    assert lanes.asked == ["base", "trial"] * 2
    adapter(1).save(trial(plan) / "adapter")
    score_all(executor, requests(plan, evaluate=longer), store)
    assert lanes.asked == [*["base", "trial"] * 2, "trial"]
    assert said == []
    for way in DAMAGES:
        del lanes.asked[:]
        way(plan.output / "scores" / "base.json")
        score_all(executor, requests(plan, evaluate=longer), store)
        assert lanes.asked == ["base"]
    assert len(said) == len(DAMAGES) - 1
    assert all(text.startswith("base is scored again: ") for text in said)


def test_what_cannot_be_scored_costs_itself_alone(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    executor: Any = Lanes(monkeypatch, failing="base")
    store = ScoreStore(plan.output / "scores", lambda _: None)
    found = score_all(executor, requests(plan), store)
    assert found["base"] == Measured(error="its lane died")
    assert found["trial"].parts == {"val": [1.0, 0.0], "test": [0.5]}
    check_some(found)
    half(trial(plan) / "adapter" / ADAPTER[1])
    found = score_all(executor, requests(plan), store)
    assert "is truncated or damaged" in found["trial"].error
    assert executor.asked == ["base", "trial", "base"]
    with pytest.raises(TrainError, match="base can't be scored: its lane died"):
        check_some(found)
    values = earlier(request(plan))
    assert values is not None
    (one,) = marked([Trial(plan.points[0], values["result"], "r")], {plan.points[0].name: found["trial"]})
    assert one.status == "failed"
    assert one.error.startswith("can't be scored: ")


def test_a_damaged_finding_is_made_again_and_an_adapter_that_is_gone_has_notes(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    lanes = Lanes(monkeypatch)
    executor: Any = lanes
    made = AdapterAnalysis(name="one", measures={"gap": 1.0})

    def answer(name: str) -> Any:
        return type("Answer", (Event,), {"__hash__": object.__hash__})(
            "final", values={"analysis": made.model_dump_json()}
        )

    lanes.broker.next_event.remote = answer
    item = Item("one", plan.points[0].run, trial(plan) / "adapter", "", plan.identity)
    wanted, said = AnalyzeConfig(parts=("gap",)), []
    analyze.analyze_items(executor, [item], wanted, plan.output, said.append)
    (piece,) = (plan.output / PIECES).iterdir()
    for way in DAMAGES:
        del lanes.asked[:]
        way(piece)
        analyze.analyze_items(executor, [item], wanted, plan.output, said.append)
        assert lanes.asked == ["analyse one"]
    assert len(said) == len(DAMAGES) - 1
    shutil.rmtree(item.folder)
    lanes.broker.next_event.remote = lambda name: type("Answer", (Event,), {"__hash__": object.__hash__})(
        "failed", values={"error": "no adapter"}
    )
    (found,) = analyze.analyze_items(executor, [item], wanted, plan.output, said.append)
    assert found.notes == {"gap": "no adapter"}


def test_a_continued_training_that_fails_is_left_out(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    point = plan.points[0]
    source = Source(point.name, point.key, point.run, "", plan.identity)
    small = adapter().save(plan.output / "squeezed" / "r1")
    item = SqueezedAdapter(f"{point.name}@r1", source, "post", 2, small, 16, 100, {"q": 1.0}, 0.0)
    executor: Any = Lanes(monkeypatch, failing=f"{point.key}@r1+1")
    said: list[str] = []
    cont = ContinueConfig(steps=1)
    assert continue_all(executor, [item], cont, plan.output, None, said.append) == []
    (text,) = said
    assert text.startswith(f"{item.name}+1 is left out: ")
    assert text.endswith("its lane died")
    with pytest.raises(TrainError, match="its lane died"):
        continue_all(executor, [item], cont, plan.output)
