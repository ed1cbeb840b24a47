"""LoRAs are extracted from the winner of a sweep that is a whole model (`full`, on the tiny model)."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rayft.analysis.record import SweepAnalysis
from rayft.analysis.section import AnalyzeConfig
from rayft.artifacts import AdapterArtifact
from rayft.flow.config import PipelineConfig
from rayft.flow.selection import served_adapters
from rayft.models.load import load_model
from rayft.models.targets import linear_shapes
from rayft.numerics import relative_error
from rayft.report.record import SweepRecord
from tests.e2e.small import small_config

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.usefixtures("in_warm_workers")]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> PipelineConfig:
    made = small_config(
        tmp_path_factory.mktemp("full"),
        {"lora": {"ranks": [2], "lr": [1e-7]}, "full": {"ranks": [2], "lr": [1e-3]}},
        {"ranks": [4, 1], "energy": 0.9, "budget": "20kB", "cont": {"steps": 2, "lr": 1e-3}},
    )
    analyze = AnalyzeConfig(
        parts=("gap", "spectra", "line"), samples=4, examples=2, grid=3, intruder_modules=2
    )
    return made.model_copy(update={"analyze": analyze})


def test_loras_are_extracted_scored_and_recorded(
    record: SweepRecord, config: PipelineConfig, said: io.StringIO
) -> None:
    assert record.winner
    assert record.winner.trial.startswith("full")
    labels = [item.name.rpartition("@")[2] for item in record.squeezed]
    assert labels == ["r4", "r1", "b20kB", "e0.9", "r4+2", "r1+2", "b20kB+2", "e0.9+2"]
    assert [item.how for item in record.squeezed] == ["post"] * 4 + ["cont"] * 4
    assert all(item.test is not None and item.energy_mean > 0 for item in record.squeezed)
    sizes = [item.bytes for item in record.squeezed[:3]]
    assert sizes[1] < sizes[0]
    assert sizes[2] <= 20_000
    assert "parameters outside its modules that training changed" in said.getvalue(), "norms, embeddings"
    assert (Path(config.output) / "report.html").read_text().count("@r4") > 0


def test_an_extracted_adapter_is_the_best_of_its_rank(record: SweepRecord, config: PipelineConfig) -> None:
    assert record.winner
    trial = next(trial for trial in record.trials if trial.id == record.winner.trial)
    base = load_model(config.model, torch.float32).model
    tuned = load_model(config.model.model_copy(update={"name": trial.folder}), torch.float32).model
    small = AdapterArtifact.load(record.squeezed[0].folder)
    for path in linear_shapes(base):
        update = (tuned.get_submodule(path).weight - base.get_submodule(path).weight).double()  # type: ignore[operator]
        factors = small.modules[path]
        found = factors.scale * factors.b.double() @ factors.a.double()
        best = float(torch.linalg.svdvals(update)[4:].norm() / update.norm())
        # The SVD is randomised: never better than the best, and by very little worse.
        assert best * (1 - 1e-6) <= relative_error(found, update) <= 1.05 * best


def test_the_whole_model_is_analysed_beside_the_adapter(record: SweepRecord, config: PipelineConfig) -> None:
    analysis = SweepAnalysis.find(config.output)
    assert analysis
    assert not any(one.notes for one in analysis.adapters)
    trial = next(trial for trial in record.trials if trial.method == "full")
    (whole,) = (one for one in analysis.adapters if one.name == trial.id)
    base = load_model(config.model, torch.float32).model
    tuned = load_file(Path(trial.folder) / "model.safetensors")
    updates = []
    for path in linear_shapes(base):
        weight = tuned[f"{path}.weight"]
        # In the precision that was trained and saved in.
        before = base.get_submodule(path).weight.to(weight.dtype)  # type: ignore[operator, union-attr]
        updates.append(weight.double() - before.double())
    assert set(whole.spectra) == set(linear_shapes(base))
    norm = torch.stack([update.norm() for update in updates]).norm()
    assert whole.measures["update_norm"] == pytest.approx(float(norm))
    assert whole.measures["update_norm"] > 0
    assert {*whole.landscapes} == {"line"}


def test_what_is_shipped_of_it_is_served_under_the_sweeps_name(
    record: SweepRecord, config: PipelineConfig
) -> None:
    assert record.winner
    output = Path(config.output)
    shipped = record.model_copy(
        update={"winner": record.winner.model_copy(update={"ship": record.squeezed[0].name})}
    )
    served = {item.name: item.folder for item in served_adapters(output, shipped)}
    assert served[record.name] == Path(record.squeezed[0].folder)
    assert f"{record.name}-lora" in served
    unshipped = record.model_copy(
        update={"winner": record.winner.model_copy(update={"ship": record.winner.trial})}
    )
    assert not served_adapters(output, unshipped)
