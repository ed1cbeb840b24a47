"""What a sweep may write over in its folder, and what it makes again there because it is damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from rich.console import Console

from rayft.artifacts import check_replaceable
from rayft.errors import ArtifactError, ConfigError
from rayft.flow import commands, demo
from rayft.flow.cluster import placed
from rayft.flow.config import PipelineConfig, beginning, config_values, load_config
from rayft.flow.sweep.folder import WRITTEN, check_stamp, discard_damaged
from rayft.flow.sweep.preflight import Plan, preflight
from rayft.identity import UNKNOWN
from rayft.sweep.result import TrialResult, damage, file_hashes, write_result
from rayft.sweep.search import earlier
from rayft.train.trainer import TrainResult
from tests.unit.damages import DAMAGES, empty, half, one_bit
from tests.unit.flow.answers import ADAPTER, adapter, request_of, trial_of
from tests.unit.serving.adapters import random_adapter

pytestmark = pytest.mark.usefixtures("prepared")


def tiny(tmp_path: Path, *overrides: str) -> PipelineConfig:
    return load_config("tiny", [f"output={tmp_path / 'out'}", *overrides])


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def config(plan: Plan) -> PipelineConfig:
    return load_config("answers.yaml")


@pytest.mark.parametrize("name", WRITTEN)
def test_a_sweep_does_not_write_over_files_that_no_sweep_wrote(tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(ConfigError, match=f"holds {name}, which no sweep of rayft wrote"):
        check_stamp(tiny(tmp_path), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
    assert (tmp_path / "out" / name).read_text() == "mine"


def test_a_sweep_may_write_beside_files_of_a_user(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "data.jsonl").write_text("mine")
    preflight(tiny(tmp_path))
    preflight(tiny(tmp_path))
    assert (tmp_path / "out" / "data.jsonl").read_text() == "mine"


@pytest.mark.parametrize("place", ["winner", "squeezed/r2", "squeezed/key/full"])
def test_a_sweep_is_refused_if_a_user_has_put_a_file_into_its_adapters(
    plan: Plan, config: PipelineConfig, place: str
) -> None:
    output = plan.output
    folder = random_adapter("a", {"up": (4, 4)}).save(output / place)
    check_stamp(config, output)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"holds notes\.txt, which rayft did not write"):
        preflight(config)


def test_a_sweep_is_refused_in_the_folder_of_another_one(tmp_path: Path) -> None:
    preflight(tiny(tmp_path))
    kept = (tmp_path / "out" / "config.yaml").read_text()
    steps = tiny(tmp_path).optim.steps
    match = (
        rf"holds a sweep with another configuration \(.*\): optim\.steps was {steps}, now 9\. Nothing in it"
    )
    with pytest.raises(ConfigError, match=match):
        preflight(tiny(tmp_path, "optim.steps=9", "squeeze.ranks=[1]"))
    run = tiny(tmp_path, "method={name: lora, rank: 4}")
    with pytest.raises(
        ConfigError, match=r"out holds a sweep, and this is a run\. Nothing in it was changed"
    ):
        check_stamp(run, tmp_path / "out")
    assert (tmp_path / "out" / "config.yaml").read_text() == kept
    # What does not decide results may change.
    preflight(tiny(tmp_path, "serve.port=9000", "question=another"))


def test_the_folder_of_an_earlier_version_is_called_that(tmp_path: Path) -> None:
    preflight(tiny(tmp_path))
    stamp = tmp_path / "out" / "config.yaml"
    _, content = stamp.read_text(encoding="utf-8").split("\n", 1)
    # The same configuration, whose hash that version computed from other fields.
    stamp.write_text("# sweep 0542ad439fd1\n" + content, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"as an earlier version of rayft made it.*can be read as it is"):
        preflight(tiny(tmp_path))
    stamp.write_text("# sweep 0542ad439fd1\n" + content.replace('"grace"', '"patience"'), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"can't read: unknown key 'sweep\.patience'"):
        preflight(tiny(tmp_path))


def test_the_demo_deletes_all_that_an_earlier_demo_wrote_if_it_is_told_to(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    out = preflight(config).output
    (out / "trials" / "a").mkdir(parents=True)
    for name in ("sweep.json", "mlflow.db", "mlflow.db-wal", ".sweep.json.42-77"):
        (out / name).write_text("{}")
    (tmp_path / "elsewhere").mkdir()
    (out / "plots").symlink_to(tmp_path / "elsewhere")
    before = contents(out)
    assert "starts from" in demo.earlier(config, overwrite=False)
    assert contents(out) == before
    assert demo.earlier(config, overwrite=True) == ""
    assert not list(out.iterdir())
    assert (tmp_path / "elsewhere").is_dir()


def test_the_demo_deletes_nothing_that_it_did_not_write(tmp_path: Path) -> None:
    config, other = tiny(tmp_path), tiny(tmp_path, "sweep.methods.lora.ranks=[2]")
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.yaml").write_text("mine: 1")
    assert demo.earlier(config, overwrite=True) == ""
    assert (out / "config.yaml").read_text() == "mine: 1"
    (out / "config.yaml").unlink()
    preflight(other)
    before = contents(out)
    with pytest.raises(ConfigError, match=r"another configuration.*--overwrite"):
        demo.earlier(config, overwrite=False)
    (out / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"another configuration|holds notes\.txt"):
            demo.earlier(config, overwrite=overwrite)
    (out / "notes.txt").unlink()
    (random_adapter("a", {"up": (4, 4)}).save(out / "winner") / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"winner holds notes\.txt"):
        demo.earlier(config, overwrite=True)
    assert contents(out).items() >= before.items()


def test_a_users_own_configuration_is_not_taken_for_a_demos(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.yaml").write_text("mine: 1")
    (out / "thesis.tex").write_text("mine")
    before = contents(out)
    with pytest.raises(ConfigError, match=r"holds config\.yaml, which no sweep of rayft wrote"):
        commands.demo([f"output={out}", "model.name=tiny-llama"], Console(quiet=True))
    assert contents(out) == before


def test_a_moved_folder_is_not_damaged(plan: Plan) -> None:
    left = earlier(request_of(plan))
    assert left is not None
    assert left.result.folder == str(trial_of(plan) / "adapter")
    assert discard_damaged(plan.output, plan.points) == []
    assert earlier(request_of(plan)) is not None


@pytest.mark.parametrize("name", ["result.json", *(f"adapter/{name}" for name in ADAPTER), "adapter"])
def test_a_damaged_result_or_adapter_is_trained_again(plan: Plan, tmp_path: Path, name: str) -> None:
    whole = shutil.copytree(plan.output, tmp_path / "whole")
    ways = (shutil.rmtree,) if name == "adapter" else DAMAGES
    if name == f"adapter/{ADAPTER[1]}":
        ways = (*DAMAGES, one_bit)
    for way in ways:
        shutil.rmtree(plan.output)
        shutil.copytree(whole, plan.output)
        way(trial_of(plan) / name)
        reports = discard_damaged(plan.output, plan.points)
        if (name, way) == ("result.json", Path.unlink):
            assert reports == [], "a trial without a result has not ended"
        else:
            (text,) = reports
            assert text.startswith(f"{plan.points[0].name} is trained again from the start: ")
        assert earlier(request_of(plan)) is None
        check_replaceable(trial_of(plan) / "adapter")
        assert discard_damaged(plan.output, plan.points) == []


@pytest.mark.parametrize(
    "content", ["null", "[]", "{}", '{"result": {}}', '{"result": {"finished": 1}, "run_id": ""}']
)
def test_a_result_that_lacks_something_is_trained_again(plan: Plan, content: str) -> None:
    (trial_of(plan) / "result.json").write_text(content)
    assert len(discard_damaged(plan.output, plan.points)) == 1


def test_another_adapter_than_the_result_names_counts_as_damage(plan: Plan) -> None:
    adapter(1).save(trial_of(plan) / "adapter")
    (text,) = discard_damaged(plan.output, plan.points)
    assert "holds another adapter" in text


def test_half_written_files_of_a_killed_process_are_deleted(plan: Plan) -> None:
    begun = [plan.output / ".winner-ab3_9xyz", trial_of(plan) / ".adapter-a1b2c3d4"]
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


def test_a_users_files_beside_a_damaged_adapter_stay(plan: Plan) -> None:
    (trial_of(plan) / "adapter" / "notes.txt").write_text("mine")
    half(trial_of(plan) / "adapter" / ADAPTER[1])
    assert len(discard_damaged(plan.output, plan.points)) == 1
    with pytest.raises(ArtifactError, match=r"holds notes\.txt"):
        check_replaceable(trial_of(plan) / "adapter")


def test_a_damaged_model_is_trained_again(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(bytes(range(200)))
    result = TrainResult(finished=True, steps=2, val_curve=[], val_loss=1.0, folder="/before/model")
    write_result(tmp_path, TrialResult(result, "", UNKNOWN, file_hashes(weights.parent)))
    assert damage(tmp_path) == ""
    one_bit(weights)
    assert damage(tmp_path) == f"{weights} is not what was written"
    weights.unlink()
    assert damage(tmp_path) == f"{weights} is missing"


@pytest.mark.parametrize("place", ["winner", "squeezed/r1"])
def test_a_damaged_derived_adapter_is_made_again(plan: Plan, config: PipelineConfig, place: str) -> None:
    for name in ADAPTER:
        for way in DAMAGES:
            folder = adapter().save(plan.output / place)
            way(folder / name)
            if (name, way) == (ADAPTER[2], Path.unlink):
                with pytest.raises(
                    ArtifactError, match=r"no rayft\.json.*If this sweep made that folder, del"
                ):
                    preflight(config)
                shutil.rmtree(folder)
                continue
            discard_damaged(plan.output, plan.points)
            adapter().save(folder)
    empty(adapter().save(plan.output / place) / ADAPTER[2])
    assert any(f"{place} is made again" in text for text in preflight(config).warnings)


@pytest.mark.parametrize("name", ["sweep.json", "analysis.json"])
def test_a_damaged_record_is_reported_and_written_again(plan: Plan, name: str) -> None:
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
            r"identity\.json is damaged.*Nothing was changed.*Restore.*delete it.*--set output",
        ),
        (
            "config.yaml",
            r"config\.yaml is missing or damaged.*Restore.*write '# sweep \w+' into.*--set output",
        ),
    ],
)
def test_a_damaged_stamp_or_identity_is_left_to_the_user(
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
        assert (trial_of(plan) / "result.json").is_file()


def test_the_remedy_that_the_message_names_works(plan: Plan, config: PipelineConfig) -> None:
    empty(plan.output / "config.yaml")
    with pytest.raises(ConfigError) as refused:
        preflight(config)
    (plan.output / "config.yaml").write_text(
        str(refused.value).partition("write '")[2].partition("'")[0] + "\n"
    )
    (plan.output / "identity.json").unlink()
    preflight(config)
    assert (trial_of(plan) / "result.json").is_file()


def test_a_saved_configuration_finds_its_files_from_anywhere(
    plan: Plan, config: PipelineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, saved = Path.cwd(), plan.output / "config.yaml"
    points = preflight(config).points
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = load_config(saved)
    assert (again.data.name, again.folder) == (str(here / "answers.jsonl"), plan.output)
    assert preflight(again).points == points
    # What is set on the command line begins here.
    (tmp_path / "elsewhere/answers.jsonl").write_text("")
    assert load_config(saved, ["data.name=answers.jsonl"]).data.name == "answers.jsonl"
    # The sweep continues with the user's own file too, and with none of other data.
    with pytest.raises(ConfigError, match=r"data\.name was .*here/answers\.jsonl, now .*elsewhere/answers"):
        check_stamp(load_config(saved, ["data.name=answers.jsonl"]), plan.output)
    monkeypatch.chdir(here)
    preflight(config)
    # Project and results may be moved together.
    monkeypatch.chdir(tmp_path)
    moved = here.rename(tmp_path / "moved")
    assert load_config(moved / "out/config.yaml").data.name == str(moved / "answers.jsonl")


def test_the_results_of_a_sweep_may_be_moved_alone(
    plan: Plan, config: PipelineConfig, tmp_path: Path
) -> None:
    preflight(config)
    moved = plan.output.rename(tmp_path / "away")
    # In the working directory there still is a file of that name.
    found = load_config(moved / "config.yaml")
    assert found.data.name == "answers.jsonl"
    assert found.folder == moved


def test_a_moved_sweep_continues_where_it_is(plan: Plan, config: PipelineConfig, tmp_path: Path) -> None:
    preflight(placed(config))
    moved = plan.output.rename(tmp_path / "away")
    assert load_config(moved / "config.yaml").folder == moved
    alone = tmp_path / "copy"
    alone.mkdir()
    shutil.copy(moved / "config.yaml", alone)
    assert load_config(alone / "config.yaml").folder == plan.output


def test_all_paths_of_a_saved_configuration_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project, out = tmp_path / "project", tmp_path / "out"
    names = ("train.jsonl", "val.jsonl", "scorer.py", "base", "start", "mlflow.db")
    for name in names:
        (project / name).mkdir(parents=True)
    out.mkdir()
    monkeypatch.chdir(project)
    written = """
data: {source: jsonl, files: {train: train.jsonl, val: val.jsonl}, scorer: {file: scorer.py, name: custom}}
model: {name: base}
start: start
tracking: {uri: 'sqlite:///mlflow.db'}
"""
    (out / "config.yaml").write_text(f"# sweep 0123\n{beginning(out)}{written}")
    monkeypatch.chdir(tmp_path)
    found = config_values(out / "config.yaml")
    place = {name: str(project / name) for name in names}
    assert found["data"]["files"] == {"train": place["train.jsonl"], "val": place["val.jsonl"]}
    assert found["data"]["scorer"]["file"] == place["scorer.py"]
    assert (found["model"]["name"], found["start"]) == (place["base"], place["start"])
    assert found["tracking"]["uri"] == f"sqlite:///{place['mlflow.db']}"
    assert found["output"] == str(out)
    # A copy that a user goes on with is a configuration like any other.
    (tmp_path / "mine.yaml").write_text((out / "config.yaml").read_text())
    assert config_values(tmp_path / "mine.yaml")["model"]["name"] == "base"
