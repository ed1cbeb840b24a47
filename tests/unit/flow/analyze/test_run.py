"""What an analysis keeps of the one before it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rayft.analysis.record import PIECES, AdapterAnalysis, Gap, ModuleSpectrum, SweepAnalysis
from rayft.analysis.section import AnalyzeConfig
from rayft.flow.analyze.run import analyze_items, completed
from rayft.flow.analyze.source import Item
from rayft.sweep.broker import Event, Job
from rayft.train.run import RunConfig

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


def test_parts_that_were_not_asked_for_again_stay() -> None:
    earlier = before(parts=("gap", "sharpness", "hessian", "landscape", "trajectory"))
    (one,), config = completed([NOW], AnalyzeConfig(parts=("sharpness", "hessian")), earlier)
    assert one.measures == {"gap": 0.5, "sam_sharpness": 0.2, "hessian_trace": 3.0}
    assert one.gap == GAP
    assert one.spectra == {"q": SPECTRUM}
    assert one.landscapes == {"random": {"kind": "random"}}
    assert one.notes == {"trajectory": "no trail"}, "the Hessian is there now"
    assert one.seconds["hessian"] == 9.0
    assert config.parts == ("gap", "sharpness", "hessian", "landscape", "trajectory")


def test_what_fails_now_and_was_found_before_is_there_and_not_called_missing() -> None:
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
def test_what_can_not_stand_beside_it_goes(earlier: SweepAnalysis | None) -> None:
    asked = AnalyzeConfig(parts=("sharpness", "hessian"))
    assert completed([NOW], asked, earlier) == ([NOW], asked)


@pytest.mark.parametrize("other", ["weights", "group", "name"])
def test_another_adapter_keeps_nothing(other: str) -> None:
    now = NOW.model_copy(update={other: "another"})
    (one,), _ = completed([now], AnalyzeConfig(parts=("hessian",)), before(parts=("gap",)))
    assert one == now


class Lanes:
    """An executor whose lanes analyse as they are told to; the last job that was asked for ends first."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.answers: dict[str, AdapterAnalysis | str] = {}
        self.broker = SimpleNamespace(next_event=SimpleNamespace(remote=lambda key: key))
        fake = "rayft.flow.analyze.run.ray"
        monkeypatch.setattr(f"{fake}.wait", lambda refs, num_returns: (refs[-1:], refs[:-1]))
        monkeypatch.setattr(f"{fake}.get", self._event)

    def submit(self, jobs: list[Job]) -> None:
        self.asked += [job.id for job in jobs]

    def _event(self, key: str) -> Event:
        answer = self.answers[key.removeprefix("analyse ")]
        if answer == "interrupted":
            raise KeyboardInterrupt
        if isinstance(answer, str):
            return Event("failed", 0, {"error": answer})
        return Event("final", 0, {"analysis": answer.model_dump_json()})


def item(folder: Path, name: str) -> Item:
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / "adapter.safetensors").write_bytes(name.encode())
    return Item(
        name, RunConfig.model_validate({"data": {"source": "jsonl", "name": "x.jsonl"}}), folder / name
    )


def test_an_interrupted_analysis_goes_on_with_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lanes, config = Lanes(monkeypatch), AnalyzeConfig(parts=("gap",))
    monkeypatch.setattr(Item, "request", lambda *_: b"")
    items = [item(tmp_path, name) for name in ("a", "b", "c")]
    noted = {"gap": "no test part"}
    lanes.answers = {
        "a": "interrupted",
        "b": AdapterAnalysis(name="b", notes=noted),
        "c": AdapterAnalysis(name="c", measures={"gap": 0.25}),
    }
    executor: Any = lanes
    with pytest.raises(KeyboardInterrupt):
        analyze_items(executor, items, config, tmp_path)
    assert lanes.asked == ["analyse a", "analyse b", "analyse c"]

    lanes.asked, lanes.answers["a"] = [], "RuntimeError: no\ntrace"
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


def test_a_damaged_piece_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lanes, config = Lanes(monkeypatch), AnalyzeConfig(parts=("gap",))
    monkeypatch.setattr(Item, "request", lambda *_: b"")
    lanes.answers = {"a": AdapterAnalysis(name="a", measures={"gap": 0.25})}
    executor: Any = lanes
    for _ in range(2):
        analyze_items(executor, [item(tmp_path, "a")], config, tmp_path)
        (piece,) = (tmp_path / PIECES).iterdir()
        piece.write_text(piece.read_text()[:20])
    assert lanes.asked == ["analyse a"] * 2
