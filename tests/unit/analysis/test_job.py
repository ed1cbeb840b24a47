"""All parts of the analysis of one adapter on the tiny model, without workers."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rayft.analysis.gap import sample
from rayft.analysis.job import AnalyzeRequest, analyze
from rayft.analysis.record import AdapterAnalysis, Landscape
from rayft.analysis.section import AnalyzeConfig
from rayft.artifacts import AdapterArtifact, ArtifactMeta
from rayft.config import parse
from rayft.data.pack import collate_rows, rows_of
from rayft.data.section import DataConfig, PartFiles
from rayft.evaluate.loss import target_losses
from rayft.methods.base import LoraFactors, MethodConfig
from rayft.models.inject import advance, clear, export, inject
from rayft.models.load import ModelConfig, load_model
from rayft.models.methods import settled
from rayft.models.targets import linear_shapes
from rayft.numerics import assert_close, relative_error
from rayft.peft.folder import load_adapter
from rayft.squeeze.rank import squeeze
from rayft.train.run import RunConfig
from rayft.train.session import Session
from rayft.train.worker import Worker
from tests.unit.data import templates
from tests.unit.serving.adapters import random_adapter
from tests.unit.test_chat_templates import save_base

PARTS = ("gap", "bounds", "spectra", "sharpness", "line", "landscape", "trajectory")
CONFIG = AnalyzeConfig(parts=PARTS, samples=6, examples=3, grid=5, intruder_modules=3)


@pytest.fixture(scope="module")
def run(tiny_folder: Path) -> RunConfig:
    return parse(
        RunConfig,
        {
            "model": {"name": str(tiny_folder)},
            "data": {
                "name": "needle_haystack", "params": {"min_num_statements": 1, "max_num_statements": 2},
                "train": 24, "val": 6, "test": 6, "max_length": 512,
            },
            "scale": {"device": "cpu", "dtype": "float32", "zero": 0, "threads": 1},
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def session(run: RunConfig) -> Session:
    return Session.open(run, Worker())


@pytest.fixture(scope="module")
def artifact(session: Session, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter folder as a trial leaves it, with a trail of three steps."""
    folder, shapes = tmp_path_factory.mktemp("trial"), linear_shapes(session.loaded.model)
    for step in range(3):
        random_adapter(f"step{step}", shapes, rank=4).save(folder / "trail" / f"step-{step:06d}")
    return random_adapter("end", shapes, rank=4).save(folder / "adapter")


def analysed(request: AnalyzeRequest, session: Session) -> AdapterAnalysis:
    found = request.analyse(session)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def found(session: Session, run: RunConfig, artifact: Path) -> AdapterAnalysis:
    request = AnalyzeRequest("mine", run, CONFIG, str(artifact), "group")
    return analysed(request, session)


def test_every_part_gives_its_measures(found: AdapterAnalysis, session: Session) -> None:
    assert found.notes == {}
    assert set(found.seconds) == set(PARTS)
    assert (found.name, found.group) == ("mine", "group")
    assert found.gap is not None
    assert found.gap.n == 6
    assert found.gap.low <= found.gap.value <= found.gap.high
    assert all(math.isfinite(value) for value in found.measures.values())
    assert set(found.spectra) == set(linear_shapes(session.loaded.model))
    assert all(1 <= one.stable_rank <= one.effective_rank <= 4.000001 for one in found.spectra.values())
    assert found.intruders is not None
    assert [*found.intruders.counts] == sorted(found.intruders.counts)
    assert [*found.intruders.shares] == sorted(found.intruders.shares)
    assert 0 < found.intruders.shares[-1] <= 1
    assert len(found.intruders.modules) == 3
    assert found.measures["sam_sharpness"] > 0
    for name, kind in (("line_rise", "line"), ("landscape_rise", "random")):
        assert found.measures[name] == Landscape.from_json(found.landscapes[kind]).rise
    assert found.median_spectrum[0] == 1.0


def test_a_landscape_has_the_adapters_own_loss_at_its_centre(
    found: AdapterAnalysis, session: Session, run: RunConfig, artifact: Path
) -> None:
    random = found.landscapes["random"]
    middle = random["coordinates"].index([0.0, 0.0])
    at_end = dict(
        zip(
            map(tuple, found.landscapes["trajectory"]["coordinates"]),
            found.landscapes["trajectory"]["losses"],
            strict=True,
        )
    )
    assert len(random["losses"]) == len(at_end) == 25
    assert len(found.landscapes["trajectory"]["path"]) == 4
    bare = analyze(
        session,
        run,
        AdapterArtifact.load(artifact),
        CONFIG.model_copy(update={"parts": ("landscape",), "grid": 3, "extent": 2.0}),
        name="again",
    )
    again = bare.landscapes["random"]
    centre = again["losses"][again["coordinates"].index((0.0, 0.0))]
    assert relative_error(torch.tensor(random["losses"][middle]), torch.tensor(centre)) < 1e-5


def test_lines_pass_through_the_base_and_the_adapter(found: AdapterAnalysis, session: Session) -> None:
    random, update = (Landscape.from_json(found.landscapes[kind]) for kind in ("line", "update"))
    plane = Landscape.from_json(found.landscapes["random"])
    assert (random.kind, update.kind) == ("random", "update")
    assert [point for (point,) in update.coordinates] == [-1, -0.5, 0, 0.5, 1]
    # The plane's first direction is the line's, with the second at 0.
    along = [plane.losses[plane.coordinates.index((x, 0.0))] for (x,) in random.coordinates]
    assert_close(torch.tensor(random.losses), torch.tensor(along), torch.float32, 64, depth=16)
    assert_close(torch.tensor(update.losses[2]), torch.tensor(along[2]), torch.float32, 64, depth=16)
    session.loaded.model.eval()
    train = sample(session.train, CONFIG.examples, CONFIG.seed, "train")
    batches = [collate_rows([row], session.pad_id) for row in rows_of(train, 512, packing=True)]
    with torch.no_grad():
        bare = torch.cat([target_losses(session.loaded.model, batch) for batch in batches]).mean()
    # Less the whole update it is the base.
    assert_close(torch.tensor(update.losses[0]), bare, torch.float32, 64, depth=16)


def test_the_session_is_left_without_an_adapter(session: Session, found: AdapterAnalysis) -> None:
    assert not any(getattr(module, "adapter", None) for module in session.loaded.model.modules())
    assert not any(parameter.requires_grad for parameter in session.loaded.model.parameters())


def whole(run: RunConfig, folder: Path) -> RunConfig:
    """Return a run that tuned a whole model, which is in a folder."""
    return run.model_copy(
        update={
            "method": run.method.model_copy(update={"name": "full"}),
            "model": run.model.model_copy(update={"name": str(folder)}),
        }
    )


@pytest.fixture(scope="module")
def merged(run: RunConfig, artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with the adapter in its weights, as if all of it had been trained."""
    loaded, adapter = load_model(run.model, torch.float32), AdapterArtifact.load(artifact)
    for path, factors in adapter.modules.items():
        loaded.model.get_submodule(path).weight.data += factors.delta()
    folder = tmp_path_factory.mktemp("merged")
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tuned(run: RunConfig, merged: Path) -> AdapterAnalysis:
    model = whole(run, merged)
    request = AnalyzeRequest("tuned", model, CONFIG, base=run.model)
    return analysed(request, Session.open(model, Worker()))


def test_a_whole_model_has_the_measures_of_the_adapter_merged_into_it(
    tuned: AdapterAnalysis, found: AdapterAnalysis
) -> None:
    same = {
        "gap", "sample_train_loss", "sample_test_loss", "update_norm", "update_over_base",
        "update_spectral_max", "stable_rank_mean", "line_rise", "landscape_rise",
    }  # fmt: skip
    for name in same:
        ours, theirs = (torch.tensor(one.measures[name]) for one in (tuned, found))
        assert_close(ours, theirs, torch.float32, 64, depth=16)
    assert set(tuned.spectra) == set(found.spectra)
    for path, one in tuned.spectra.items():
        # The weights are float32: what their rounding adds is less than 1 % of the update, and of full rank.
        assert one.energy_ranks["0.99"] == found.spectra[path].energy_ranks["0.99"]
    assert tuned.intruders == found.intruders
    for kind in ("line", "random"):
        ours, theirs = (Landscape.from_json(one.landscapes[kind]) for one in (tuned, found))
        assert ours.coordinates == theirs.coordinates
        assert_close(torch.tensor(ours.losses), torch.tensor(theirs.losses), torch.float32, 64, depth=16)


def test_parts_that_need_factors_are_noted_for_a_whole_model(tuned: AdapterAnalysis) -> None:
    assert set(tuned.notes) == {"sharpness", "trajectory"}
    assert (
        "'full' is a whole model, without low-rank factors: extract a LoRA first" in tuned.notes["sharpness"]
    )
    assert {*tuned.landscapes} == {"line", "random"}
    assert not {name for name in tuned.measures if name.startswith(("bound_norm", "bound_lipschitz"))}


def test_a_whole_model_without_its_base_has_no_spectra(
    session: Session, run: RunConfig, merged: Path
) -> None:
    config = CONFIG.model_copy(update={"parts": ("gap", "spectra", "line")})
    found = analyze(session, whole(run, merged), None, config, name="whole")
    assert found.gap is not None
    assert set(found.notes) == {"spectra"}
    assert found.measures["sample_train_loss"] > 0
    other = run.model.model_copy(update={"name": "tiny-vit", "task": "image_classification"})
    found = analyze(session, whole(run, merged), None, config, name="whole", base=other)
    assert set(found.notes) == {"spectra"}
    assert "is it a model of another kind?" in found.notes["spectra"]


def test_rows_of_an_update_need_an_adapter(session: Session, run: RunConfig, merged: Path) -> None:
    config = CONFIG.model_copy(update={"parts": ("line", "landscape"), "directions": "update"})
    found = analyze(session, whole(run, merged), None, config, name="whole", base=run.model)
    assert set(found.notes) == {"line", "landscape"}
    assert not found.landscapes


def test_a_whole_model_stores_all_of_its_parameters(session: Session, tuned: AdapterAnalysis) -> None:
    assert tuned.measures["parameters"] == sum(p.numel() for p in session.loaded.model.parameters())


@pytest.mark.parametrize(
    ("name", "links"),
    [
        ("lora", 1), ("asym", 1), ("cla", 1), ("paca", 1), ("cola", 2), ("rac", 2), ("c3la", 2),
        ("peft:PiSSA", 1), ("peft:MiSS", 1), ("peft:VeRA", 1), ("peft:SHiRA", 1), ("peft:DoRA", 1),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Sparse invariant")
def test_the_numbers_stored_are_those_that_trained(
    session: Session, run: RunConfig, tmp_path: Path, name: str, links: int
) -> None:
    model, method = session.loaded.model, settled(MethodConfig(name=name, rank=4))
    count = links * inject(model, method, seed=0).trainable
    for link in range(1, links):
        advance(model, 0, link)
    exported = export(model, ArtifactMeta(method=name))
    clear(model)
    folder = exported.save(tmp_path / "adapter")
    config = CONFIG.model_copy(update={"parts": ("gap", "bounds")})
    found = analyze(session, run, load_adapter(folder), config, name=name)
    assert found.notes == {}
    assert found.measures["parameters"] == count
    expected = 5 * math.sqrt(2 * math.log(2) * 32 * count / len(session.train))
    assert 10 ** found.measures["bound_information_log10"] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["cla", "paca", "peft:VeRA"])
def test_the_bits_of_a_number_are_those_that_trained(run: RunConfig, name: str) -> None:
    scale = run.scale.model_copy(update={"dtype": "bfloat16"})
    session = Session.open(run.model_copy(update={"scale": scale}), Worker())
    model = session.loaded.model
    inject(model, MethodConfig(name=name, rank=4), seed=0)
    exported = export(model, ArtifactMeta(method=name))
    clear(model)
    config = CONFIG.model_copy(update={"parts": ("bounds",)})
    found = analyze(session, run, exported, config, name=name).measures
    expected = 5 * math.sqrt(2 * math.log(2) * 16 * found["parameters"] / len(session.train))
    assert 10 ** found["bound_information_log10"] == pytest.approx(expected)


def test_a_squeezed_adapter_stores_both_of_its_factors(session: Session, run: RunConfig) -> None:
    model = session.loaded.model
    inject(model, MethodConfig(name="asym", rank=4), seed=0)
    exported = export(model, ArtifactMeta(method="asym"))
    clear(model)
    assert isinstance(exported, AdapterArtifact)
    small = squeeze(exported, rank=2)
    config = CONFIG.model_copy(update={"parts": ("bounds",)})
    found = analyze(session, run, small, config, name="small")
    assert found.measures["parameters"] == sum(2 * sum(shape) for shape in linear_shapes(model).values())


def test_the_lipschitz_terms_inputs_are_those_of_the_models_first_layer(
    session: Session, run: RunConfig
) -> None:
    model, config = session.loaded.model, CONFIG.model_copy(update={"parts": ("bounds",)})
    every = random_adapter("one", linear_shapes(model), rank=2)
    last = [path for path in every.modules if path.endswith("down_proj")]
    some = replace(every, modules={path: every.modules[path] for path in last})
    # The same update of every layer, of which all but the last ones are 0.
    none = {path: LoraFactors(f.a, torch.zeros_like(f.b), f.scale) for path, f in every.modules.items()}
    whole = replace(every, modules={**none, **some.modules})
    found, expected = (
        analyze(session, run, one, config, name="one").measures["bound_lipschitz_log10"]
        for one in (some, whole)
    )
    assert found == pytest.approx(expected)


def test_a_path_ends_where_the_weights_were_kept(
    session: Session, run: RunConfig, artifact: Path, tmp_path: Path
) -> None:
    shutil.copytree(artifact.parent / "trail", tmp_path / "trail")
    for step in (3, 4):
        later = random_adapter(f"later{step}", linear_shapes(session.loaded.model), rank=4)
        later.save(tmp_path / "trail" / f"step-{step:06d}")
    config = CONFIG.model_copy(update={"parts": ("trajectory",), "grid": 3})

    def kept(step: int) -> AdapterAnalysis:
        shutil.copytree(tmp_path / "trail" / f"step-{step:06d}", tmp_path / "adapter", dirs_exist_ok=True)
        request = AnalyzeRequest("kept", run, config, str(tmp_path / "adapter"))
        return analysed(request, session)

    path = kept(3).landscapes["trajectory"]["path"]
    assert len(path) == 4
    assert path[-1] == [0.0, 0.0]
    assert "those of evaluation 2" in kept(1).notes["trajectory"]


def test_without_a_trail_the_note_explains_how_to_keep_one(
    session: Session, run: RunConfig, artifact: Path, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"parts": ("trajectory",)})
    lone = AdapterArtifact.load(artifact).save(tmp_path / "adapter")
    request = AnalyzeRequest("lone", run, config, str(lone))
    found = analysed(request, session)
    assert "train with evaluate.trail: true" in found.notes["trajectory"]


def test_only_the_first_worker_analyses(session: Session, run: RunConfig) -> None:
    other = Session(session.loaded, session.prepared, session.train, session.val, Worker(rank=1, world=2))
    request = AnalyzeRequest("mine", run, CONFIG, "/nowhere")
    assert request.analyse(other) is None


def test_a_part_that_runs_out_of_memory_is_noted_and_the_others_are_done(
    session: Session, run: RunConfig, artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("rayft.analysis.sharpness.adapter_sharpness", out)
    config = CONFIG.model_copy(update={"parts": ("sharpness", "spectra")})
    found = analyze(session, run, AdapterArtifact.load(artifact), config, name="one")
    assert "set analyze.examples lower" in found.notes["sharpness"]
    assert found.spectra


def test_the_gap_compares_equal_numbers_of_examples_from_conversations(
    run: RunConfig, tmp_path: Path
) -> None:
    def turns(number: int, answers: int) -> list[dict[str, str]]:
        asked = [{"role": "user", "content": f"{number}-{turn}?"} for turn in range(answers)]
        return [one for question in asked for one in (question, {"role": "assistant", "content": "5"})]

    files = {}
    # One answer in training, three in each test conversation, which this template lays out anew each time.
    for part, answers, start in (("train", 1, 0), ("val", 1, 100), ("test", 3, 200)):
        files[part] = str(tmp_path / f"{part}.jsonl")
        rows = [{"messages": turns(start + number, answers)} for number in range(8)]
        Path(files[part]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    base = save_base(tmp_path / "base", templates.QWEN3)
    changes = {
        "model": ModelConfig(name=str(base)),
        "data": DataConfig(source="jsonl", files=PartFiles(**files), max_length=256),
    }
    run = RunConfig(**{**{name: getattr(run, name) for name in RunConfig.model_fields}, **changes})
    session = Session.open(run, Worker())
    adapter = random_adapter("a", linear_shapes(session.loaded.model), rank=2)
    config = AnalyzeConfig(parts=("gap",), samples=6)
    found = analyze(session, run, adapter, config, name="a")
    assert found.gap is not None
    assert found.gap.n == 6
