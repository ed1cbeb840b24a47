"""Sweeps, the demo, reports and analyses replace what they made, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from rayft.analysis.record import PIECES, AdapterAnalysis, SweepAnalysis
from rayft.analysis.section import AnalyzeConfig
from rayft.cli import app
from rayft.errors import ArtifactError, ConfigError, ReportError
from rayft.flow import commands
from rayft.flow.analyze.run import earlier_analysis
from rayft.flow.config import PipelineConfig, load_config
from rayft.flow.demo import clear
from rayft.flow.sweep.preflight import WRITTEN, preflight
from rayft.report.render import check_report, render
from tests.unit.report.example import example
from tests.unit.serving.adapters import random_adapter


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path_factory.mktemp("cache")))


def tiny(tmp_path: Path, *overrides: str) -> PipelineConfig:
    return load_config("tiny", [f"output={tmp_path / 'out'}", *overrides])


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", WRITTEN)
def test_a_sweep_does_not_write_over_what_no_sweep_wrote(tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(ConfigError, match=f"holds {name}, which no sweep of rayft's wrote"):
        preflight(tiny(tmp_path))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
    assert (tmp_path / "out" / name).read_text() == "mine"


def test_a_sweep_may_write_beside_other_files(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "data.jsonl").write_text("mine")
    preflight(tiny(tmp_path))
    preflight(tiny(tmp_path))
    assert (tmp_path / "out" / "data.jsonl").read_text() == "mine"


@pytest.mark.parametrize("place", ["winner", "squeezed/r2", "squeezed/key/full"])
def test_a_sweep_goes_on_unless_something_was_put_into_its_adapters(tmp_path: Path, place: str) -> None:
    preflight(tiny(tmp_path))
    folder = random_adapter("a", {"up": (4, 4)}).save(tmp_path / "out" / place)
    preflight(tiny(tmp_path))
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"holds notes\.txt, which rayft did not write"):
        preflight(tiny(tmp_path))


def test_the_demo_clears_its_own_folder(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    out = preflight(config).output
    (out / "trials" / "a").mkdir(parents=True)
    (out / "sweep.json").write_text("{}")
    (tmp_path / "elsewhere").mkdir()
    (out / "plots").symlink_to(tmp_path / "elsewhere")
    clear(config, overwrite=False)
    assert not list(out.iterdir())
    assert (tmp_path / "elsewhere").is_dir()


def test_the_demo_leaves_what_it_did_not_make(tmp_path: Path) -> None:
    config, other = tiny(tmp_path), tiny(tmp_path, "sweep.methods.lora.ranks=[2]")
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.yaml").write_text("mine: 1")
    clear(config, overwrite=True)
    assert (out / "config.yaml").read_text() == "mine: 1"
    (out / "config.yaml").unlink()
    preflight(other)
    before = contents(out)
    with pytest.raises(ConfigError, match=r"another configuration.*--overwrite"):
        clear(config, overwrite=False)
    (out / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"another configuration|holds notes\.txt"):
            clear(config, overwrite=overwrite)
    (out / "notes.txt").unlink()
    (random_adapter("a", {"up": (4, 4)}).save(out / "winner") / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match=r"winner holds notes\.txt"):
        clear(config, overwrite=True)
    assert contents(out).items() >= before.items()


def test_a_configuration_of_somebodys_own_is_not_taken_for_a_demos(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.yaml").write_text("mine: 1")
    (out / "thesis.tex").write_text("mine")
    before = contents(out)
    with pytest.raises(ConfigError, match=r"holds config\.yaml, which no sweep of rayft's wrote"):
        commands.demo([f"output={out}"], Console(quiet=True))
    assert contents(out) == before


def test_a_report_replaces_a_report_of_the_same_sweep(tmp_path: Path) -> None:
    record = example()
    path = render(record, tmp_path / "report.html")
    check_report(record, path)
    # A page that 0.1.0 wrote says so only by how it begins.
    old = "\n".join(line for line in path.read_text().splitlines() if "generator" not in line)
    path.write_text(old)
    check_report(record, path)
    other = record.model_copy(update={"name": "other"})
    render(other, path)
    with pytest.raises(ReportError, match=r"is the report of another sweep.*--overwrite"):
        check_report(record, path)
    check_report(record, path, overwrite=True)


@pytest.mark.parametrize("content", ["mine", "<!doctype html><title>mine</title>", ""])
def test_a_report_replaces_no_file_of_somebodys_own(tmp_path: Path, content: str) -> None:
    example().save(tmp_path / "sweep" / "sweep.json")
    path = tmp_path / "notes.html"
    path.write_text(content)
    shown = CliRunner().invoke(app, ["report", str(tmp_path / "sweep"), "-o", str(path), "--overwrite"])
    assert isinstance(shown.exception, ReportError)
    assert "was not written by rayft" in str(shown.exception)
    assert path.read_text() == content
    with pytest.raises(ReportError, match="was not written by rayft"):
        check_report(example(), tmp_path / "sweep")


def test_an_analysis_replaces_one_of_the_same_adapters(tmp_path: Path) -> None:
    one = SweepAnalysis(config=AnalyzeConfig(), adapters=(AdapterAnalysis(name="a"),))
    one.save(tmp_path)
    assert earlier_analysis(tmp_path, {"a", "b"}, overwrite=False) == one
    with pytest.raises(ReportError, match=r"has an analysis of a, which would be lost.*--overwrite"):
        earlier_analysis(tmp_path, {"b"}, overwrite=False)
    assert earlier_analysis(tmp_path, {"b"}, overwrite=True) == one
    whole = (tmp_path / "analysis.json").read_text()
    (tmp_path / "analysis.json").write_text(whole.replace('"format": 1', '"format": "new"'))
    assert earlier_analysis(tmp_path, {"a"}, overwrite=False) is None
    (tmp_path / "analysis.json").write_text('{"mine": 1}')
    with pytest.raises(ReportError, match="no analysis of rayft's; move it away"):
        earlier_analysis(tmp_path, {"a"}, overwrite=True)


def test_an_analysis_deletes_its_own_pieces_only(tmp_path: Path) -> None:
    (tmp_path / PIECES).mkdir()
    (tmp_path / PIECES / f"{'0' * 24}.json").write_text("{}")
    (tmp_path / PIECES / "notes.txt").write_text("mine")
    one = SweepAnalysis(config=AnalyzeConfig())
    one.save(tmp_path)
    assert [path.name for path in (tmp_path / PIECES).iterdir()] == ["notes.txt"]
    (tmp_path / PIECES / "notes.txt").unlink()
    one.save(tmp_path)
    assert not (tmp_path / PIECES).exists()
