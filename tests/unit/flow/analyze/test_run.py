"""An analysis keeps its findings, those of an earlier one, and nobody else's files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rayft.analysis.record import PIECES, AdapterAnalysis, Gap, ModuleSpectrum, SweepAnalysis
from rayft.analysis.section import AnalyzeConfig
from rayft.errors import ReportError
from rayft.flow.analyze.run import analyze_items, analyze_target, completed, earlier_analysis
from rayft.flow.analyze.source import Item
from rayft.flow.display import Display
from rayft.flow.sweep.preflight import Plan
from rayft.train.run import RunConfig
from tests.unit.damages import DAMAGES
from tests.unit.flow.answers import CONFIG, Lanes, adapter, trial_of

GAP = Gap(train=1.0, held_out=1.5, low=0.2, high=0.8, n=9)
SPECTRUM = ModuleSpectrum(
    effective_rank=2, stable_rank=1, energy_ranks={}, spectral_norm=1, frobenius_norm=1, nuclear_norm=1
)
EARLIER = AdapterAnalysis(
    name="a", group="g", weights="w", measures={"gap": 0.5, "sam_sharpness": 0.1}, gap=GAP,
    landscapes={"random": {"kind": "random"}}, notes={"hessian": "no curvlinops", "trajectory": "no trail"},
    seconds={"gap": 1.0, "sharpness": 2.0, "hessian": 0.0, "trajectory": 0.0, "landscape": 3.0},
)  # fmt: skip
NOW = AdapterAnalysis(
    name="a", group="g", weights="w", measures={"hessian_trace": 3.0, "sam_sharpness": 0.2},
    spectra={"q": SPECTRUM}, seconds={"hessian": 9.0, "sharpness": 2.5},
)  # fmt: skip


def before(**settings: object) -> SweepAnalysis:
    return SweepAnalysis(config=AnalyzeConfig.model_validate(settings), adapters=(EARLIER,))


def test_parts_that_are_not_asked_for_again_stay() -> None:
    earlier = before(parts=("gap", "sharpness", "hessian", "landscape", "trajectory"))
    (one,), config = completed([NOW], AnalyzeConfig(parts=("sharpness", "hessian")), earlier)
    assert one.measures == {"gap": 0.5, "sam_sharpness": 0.2, "hessian_trace": 3.0}
    assert one.gap == GAP
    assert one.spectra == {"q": SPECTRUM}
    assert one.landscapes == {"random": {"kind": "random"}}
    assert one.notes == {"trajectory": "no trail"}, "the Hessian is there now"
    assert one.seconds["hessian"] == 9.0
    assert config.parts == ("gap", "sharpness", "hessian", "landscape", "trajectory")


def test_an_earlier_finding_stays_if_its_part_fails_now() -> None:
    failed = NOW.model_copy(
        update={
            "measures": {},
            "seconds": {"sharpness": 0.1},
            "notes": {"sharpness": "no memory", "bounds": "why"},
        }
    )
    (one,), _ = completed(
        [failed], AnalyzeConfig(parts=("sharpness", "bounds")), before(parts=("sharpness",))
    )
    assert one.measures["sam_sharpness"] == 0.1
    assert one.notes == {"hessian": "no curvlinops", "trajectory": "no trail", "bounds": "why"}


@pytest.mark.parametrize(
    "earlier",
    [None, before(parts=("gap",), samples=7)],
    ids=["nothing before", "other settings"],
)
def test_an_analysis_with_other_settings_is_not_added(earlier: SweepAnalysis | None) -> None:
    asked = AnalyzeConfig(parts=("sharpness", "hessian"))
    assert completed([NOW], asked, earlier) == ([NOW], asked)


@pytest.mark.parametrize("other", ["weights", "group", "name"])
def test_findings_of_another_adapter_are_not_added(other: str) -> None:
    now = NOW.model_copy(update={other: "another"})
    (one,), _ = completed([now], AnalyzeConfig(parts=("hessian",)), before(parts=("gap",)))
    assert one == now


def item(folder: Path, name: str) -> Item:
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "adapter.safetensors").write_bytes(name.encode())
    return Item(
        name, RunConfig.model_validate({"data": {"source": "jsonl", "name": "x.jsonl"}}), folder / name
    )


def test_an_interrupted_analysis_continues_with_what_is_missing(tmp_path: Path) -> None:
    answers: dict[str, AdapterAnalysis | str] = {}

    def answer(name: str) -> AdapterAnalysis | str:
        found = answers[name.removeprefix("analyse ")]
        if found == "interrupted":
            raise KeyboardInterrupt
        return found

    lanes, config = Lanes(answer), AnalyzeConfig(parts=("gap",))
    items = [item(tmp_path, name) for name in ("a", "b", "c")]
    noted = {"gap": "no test part"}
    answers |= {
        "a": "interrupted",
        "b": AdapterAnalysis(name="b", notes=noted),
        "c": AdapterAnalysis(name="c", measures={"gap": 0.25}),
    }
    executor: Any = lanes
    with pytest.raises(KeyboardInterrupt):
        analyze_items(executor, items, config, tmp_path)
    assert lanes.asked == ["analyse a", "analyse b", "analyse c"]

    lanes.asked, answers["a"] = [], "RuntimeError: no\ntrace"
    found = analyze_items(executor, items, config, tmp_path)
    assert lanes.asked == ["analyse a", "analyse b"], "what has notes is done again"
    assert [one.name for one in found] == ["a", "b", "c"]
    assert found[0].notes == {"gap": "RuntimeError: no"}
    assert found[2].measures == {"gap": 0.25}
    assert found[2].weights == items[2].weights

    # Another configuration, or other weights, are another analysis.
    lanes.asked = []
    analyze_items(executor, items, config.model_copy(update={"samples": 7}), tmp_path)
    assert len(lanes.asked) == 3
    (tmp_path / "c" / "adapter.safetensors").write_bytes(b"other")
    lanes.asked = []
    analyze_items(executor, items, config, tmp_path)
    assert "analyse c" in lanes.asked

    SweepAnalysis(config=config, adapters=tuple(found)).save(tmp_path)
    assert not (tmp_path / PIECES).exists()


def test_damaged_findings_are_made_again_and_a_missing_adapter_has_notes(plan: Plan) -> None:
    made = AdapterAnalysis(name="one", measures={"gap": 1.0})
    lanes = Lanes(lambda _: made)
    executor: Any = lanes
    only = Item("one", plan.points[0].run, trial_of(plan) / "adapter", "", plan.identity)
    wanted, reports = AnalyzeConfig(parts=("gap",)), []
    analyze_items(executor, [only], wanted, plan.output, reports.append)
    (piece,) = (plan.output / PIECES).iterdir()
    for way in DAMAGES:
        del lanes.asked[:]
        way(piece)
        analyze_items(executor, [only], wanted, plan.output, reports.append)
        assert lanes.asked == ["analyse one"]
    assert len(reports) == len(DAMAGES) - 1
    shutil.rmtree(only.folder)
    lanes.answer = lambda _: "no adapter"
    (found,) = analyze_items(executor, [only], wanted, plan.output, reports.append)
    assert found.notes == {"gap": "no adapter"}


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


def test_an_analysis_deletes_only_its_own_pieces(tmp_path: Path) -> None:
    (tmp_path / PIECES).mkdir()
    (tmp_path / PIECES / f"{'0' * 24}.json").write_text("{}")
    (tmp_path / PIECES / "notes.txt").write_text("mine")
    one = SweepAnalysis(config=AnalyzeConfig())
    one.save(tmp_path)
    assert [path.name for path in (tmp_path / PIECES).iterdir()] == ["notes.txt"]
    (tmp_path / PIECES / "notes.txt").unlink()
    one.save(tmp_path)
    assert not (tmp_path / PIECES).exists()


class _Reached(Exception):  # noqa: N818  (it says that lanes would start now)
    pass


@pytest.mark.usefixtures("prepared")
def test_a_configuration_without_a_sweep_names_base_and_data(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    adapter().save(tmp_path / "adapter")
    Path("my.yaml").write_text(CONFIG.partition("sweep:")[0])

    def cluster(lanes: int, **_: Any) -> None:
        assert lanes == 1
        raise _Reached

    monkeypatch.setattr("rayft.flow.analyze.run.cluster", cluster)
    with pytest.raises(_Reached):
        analyze_target(str(tmp_path / "adapter"), Display(Console(quiet=True)), config=Path("my.yaml"))
