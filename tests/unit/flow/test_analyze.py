"""What an analysis keeps of the one before it."""

from __future__ import annotations

import pytest

from rayft.analysis.record import AdapterAnalysis, Gap, ModuleSpectrum, SweepAnalysis
from rayft.analysis.section import AnalyzeConfig
from rayft.flow.analyze import completed

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
