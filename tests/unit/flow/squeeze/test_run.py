"""`rayft squeeze` makes what was asked for, refuses what would lose files, and leaves the source as it is."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from peft import LoHaConfig, LoraConfig, get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from rayft.artifacts import AdapterArtifact, folder_bytes
from rayft.cli import app
from rayft.errors import (
    ArtifactError,
    BaseMismatchError,
    ConfigError,
    RayftError,
    SqueezeError,
    TrainError,
)
from rayft.flow.display import Display
from rayft.flow.hold import hold
from rayft.flow.origin import find_origin
from rayft.flow.scoring import Measured
from rayft.flow.squeeze.make import SqueezedAdapter
from rayft.flow.squeeze.request import squeeze_request
from rayft.flow.squeeze.run import Squeezes, measure, squeeze_folder
from rayft.flow.target import Place, find_place
from rayft.numerics import assert_close
from rayft.squeeze.rank import retained_energy
from tests.unit.flow.answers import CONFIG


@pytest.fixture(autouse=True)
def _untracked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def adapter(tiny_model: Any, tmp_path: Path) -> Path:
    """A LoRA that PEFT made and saved: ranks and alphas by pattern, rsLoRA."""
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        use_rslora=True,
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"v_proj": 4},
        alpha_pattern={"down_proj": 3},
        init_lora_weights=False,
    )
    folder = tmp_path / "by-peft"
    get_peft_model(tiny_model, config).save_pretrained(folder)
    return folder


def squeezed(folder: Path, out: Path, **options: Any) -> Squeezes:
    place = find_place(str(folder), "", out)
    return squeeze_folder(squeeze_request(place, out, **options), Console(quiet=True))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def untouched(adapter: Path) -> Iterator[None]:
    before = contents(adapter)
    yield
    assert contents(adapter) == before


@pytest.mark.usefixtures("untouched")
def test_every_target_gets_a_folder_of_its_own(adapter: Path, tmp_path: Path) -> None:
    source, out = AdapterArtifact.load(adapter), tmp_path / "out"
    found = squeezed(adapter, out, ranks=[4, 2], energies=[0.9], budgets=["20kB"])
    assert sorted(path.name for path in out.glob("[!.]*")) == ["b20kB", "e0.9", "r2", "r4"]
    assert [item.label for item in found.made] == ["r4", "r2", "e0.9", "b20kB"]
    assert folder_bytes(out / "b20kB") <= 20_000
    assert min(retained_energy(AdapterArtifact.load(out / "e0.9")).values()) >= 0.9
    for rank in (4, 2):
        small = AdapterArtifact.load(out / f"r{rank}")
        for name, factors in source.modules.items():
            u, s, vt = torch.linalg.svd(factors.delta().double())
            kept = min(rank, factors.rank)
            assert small.modules[name].rank == kept
            assert_close(small.modules[name].delta(), (u[:, :kept] * s[:kept]) @ vt[:kept], torch.float32, 64)


def test_the_command_shows_what_it_made(adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shown = CliRunner().invoke(app, ["squeeze", str(adapter), "--rank", "2", "--out", str(out)])
    assert shown.exit_code == 0, shown.output
    assert (out / "r2" / "adapter_config.json").is_file()


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "no target is given: add --rank 8"),
        ({"ranks": [4, 9]}, "rank 9 is not between 1 and the adapter's own rank, 8"),
        ({"ranks": [0]}, "rank 0 is not between 1 and"),
        ({"energies": [1.2]}, r"energy 1.2 is not in \(0, 1\]"),
        ({"budgets": ["tiny"]}, "'tiny' is no size"),
        ({"budgets": ["3kB"]}, "rank 1 in all 6 modules takes|header alone take"),
        ({"keep_score": 1.5}, r"--keep-score 1.5 is not in \(0, 1\]"),
        ({"keep_score": 0.9}, "need the base and the data: give a configuration that names them"),
        ({"ranks": [2], "steps": 3}, "need the base and the data"),
        ({"ranks": [2], "steps": 0}, "--steps 0 trains nothing"),
        ({"ranks": [2], "lr": 1e-3}, "--lr is the learning rate of --steps"),
    ],
)
def test_targets_that_cant_be_met_are_refused_before_anything_is_written(
    adapter: Path, tmp_path: Path, options: dict[str, Any], match: str
) -> None:
    with pytest.raises(SqueezeError, match=match):
        squeezed(adapter, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def mine(adapter: Path, tmp_path: Path) -> Path:
    """A folder of adapters: r4, squeezed from another one, and r2 beside it with somebody's logs."""
    folder = tmp_path / "mine"
    squeezed(adapter, folder, ranks=[4, 2])
    (folder / "r2" / "checkpoint").mkdir()
    (folder / "r2" / "train.log").write_text("mine")
    return folder


REFUSED: dict[str, tuple[str, str, str, str]] = {
    # What is squeezed, --rank, --out, in the folder `mine`.
    "another adapter with logs": ("r4", "2", ".", r"r2 holds checkpoint, train\.log, which rayft did not"),
    "the source itself": ("r4", "4", ".", "r4 would be written over or into the source"),
    "by another spelling": ("r4", "4", "../mine/./r2/..", "over or into the source"),
    "through a link": ("link", "4", ".", "over or into the source"),
    "to a link": ("r4", "4", "linked", "over or into the source"),
    "into the source": ("r4", "2", "r4", "over or into the source"),
    "deeper": ("r4", "2", "r4/deep/er", "over or into the source"),
    "around the source": ("e0.5/inside", "0.5", ".", "over or into the source"),
    "an adapter made from another": ("other", "4", ".", "r4 holds an adapter that this command did not make"),
    "a file": ("r4", "1", ".", "r1 is a file that rayft did not make"),
    "a folder of PEFT's": ("r4", "3", ".", r"r3 holds README\.md, which rayft did not write"),
    "a link that somebody made": ("r4", "2", "links", "r2 is a link that rayft did not make"),
    "below a file": ("r4", "2", "r1/below", "r1 is a file, not a folder"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_squeeze_overwrites_nothing_that_it_did_not_make(
    adapter: Path, mine: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target, out, match = REFUSED[kind]
    shutil.copytree(adapter, mine / "r3")
    shutil.copytree(adapter, mine / "e0.5" / "inside")
    other = AdapterArtifact.load(adapter)
    for factors in other.modules.values():
        factors.b.mul_(2)
    other.save(mine / "other")
    (mine / "r1").write_text("mine")
    (mine / "link").symlink_to(mine / "r4")
    (mine / "linked").symlink_to(mine)
    (mine / "links").mkdir()
    (mine / "links" / "r2").symlink_to(mine / "other")
    before = contents(mine)
    monkeypatch.chdir(mine)
    monkeypatch.setattr("rayft.flow.squeeze.run.squeeze", None)  # Nothing is computed before.
    options: dict[str, Any] = {"energies": [0.5]} if target == "0.5" else {"ranks": [int(target)]}
    for overwrite in (False, True):
        if overwrite and kind == "an adapter made from another":
            continue
        with pytest.raises(RayftError, match=match):
            squeezed(Path(source), Path(out), **options, overwrite=overwrite)
        assert contents(mine) == before


def test_one_target_that_would_overwrite_something_stops_all(mine: Path) -> None:
    before = contents(mine)
    with pytest.raises(ArtifactError, match="r2 holds checkpoint"):
        squeezed(mine / "r4", mine, ranks=[1, 2])
    assert contents(mine) == before
    with pytest.raises(SqueezeError, match=r"two targets would both be written to .*e0\.5"):
        squeezed(mine / "r4", mine, energies=[0.5, 0.5000000001])


def test_the_same_command_replaces_what_it_made(adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    squeezed(adapter, out, ranks=[4, 2])
    before = contents(out)
    squeezed(adapter, out, ranks=[2, 4])
    assert contents(out) == before
    # An adapter that 0.1.0 made says what it was squeezed from, and no more.
    meta = json.loads((out / "r2" / "rayft.json").read_text())
    assert meta.pop("made") == f"squeeze {AdapterArtifact.load(adapter).content_hash} to r2"
    (out / "r2" / "rayft.json").write_text(json.dumps(meta))
    squeezed(adapter, out, ranks=[2])
    assert contents(out) == before
    # From r4 it would be another adapter, though of the same rank.
    with pytest.raises(SqueezeError, match="replace it with --overwrite"):
        squeezed(out / "r4", out, ranks=[2])
    shown = CliRunner().invoke(
        app, ["squeeze", str(out / "r4"), "--rank", "2", "--out", str(out), "--overwrite"]
    )
    assert shown.exit_code == 0, shown.output
    assert AdapterArtifact.load(out / "r2").meta.made.startswith("squeeze ")
    assert contents(out) != before


def test_an_extraction_replaces_only_its_own_results(tuned: Path, tiny_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    squeezed(tuned, out, ranks=[2], base=str(tiny_folder))
    squeezed(tuned, out, ranks=[2, 3], base=str(tiny_folder))
    other = shutil.copytree(tuned, tmp_path / "other")
    tensors = weights(tuned)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SqueezeError, match="r2 holds an adapter that this command did not make"):
        squeezed(other, out, ranks=[2], base=str(tiny_folder))


def test_names_are_checked_against_the_base_that_the_adapter_names(
    adapter: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    file, weights_file = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    config, tensors = json.loads(file.read_text()), load_file(weights_file)
    for named, note in (("org/absent", "its base org/absent is not here"), ("", "names no base")):
        file.write_text(json.dumps({**config, "base_model_name_or_path": named}))
        assert note in squeezed(adapter, tmp_path / "out", ranks=[2]).note
    file.write_text(json.dumps({**config, "base_model_name_or_path": str(tiny_folder)}))
    assert squeezed(adapter, tmp_path / "out", ranks=[2]).note == ""
    save_file({key.replace("layers.1", "layers.7"): one for key, one in tensors.items()}, weights_file)
    with pytest.raises(BaseMismatchError, match=r"the base has no linear layer model\.layers\.7"):
        squeezed(adapter, tmp_path / "other", ranks=[2])
    assert not (tmp_path / "other").exists()


def test_another_base_is_refused_by_module_and_size(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(BaseMismatchError, match="use it with its own base"):
        squeezed(adapter, tmp_path / "out", ranks=[2], base="tiny-qwen")
    assert not (tmp_path / "out").exists()


def _truncate(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _poison(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = torch.inf
    save_file(tensors, file)


def _dora(folder: Path) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_dora": True}))


def _other_rank(folder: Path) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "r": 5}))


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "has no adapter_config.json"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
        (_truncate, "is truncated or damaged"),
        (_poison, "holds NaN or Inf"),
        (_dora, "dropping the magnitude would change the model"),
        (_other_rank, "config and weights are not of the same adapter"),
    ],
)
def test_the_error_about_a_damaged_folder_names_the_damage(
    adapter: Path, tmp_path: Path, damage: Any, match: str
) -> None:
    damage(adapter)
    with pytest.raises(ArtifactError, match=match):
        squeezed(adapter, tmp_path / "out", ranks=[2])
    assert not (tmp_path / "out").exists()


@pytest.fixture
def tuned(tiny_folder: Path, tmp_path: Path) -> Path:
    """A fine-tune of the tiny model: an update of rank 3 in its projections, and a norm that moved."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "up_proj" in name:
                left, right = torch.randn(parameter.shape[0], 3), torch.randn(3, parameter.shape[1])
                parameter += 0.1 * left @ right
        model.model.norm.weight += 0.5
    model.save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned"


def test_a_tuned_model_becomes_a_lora(tuned: Path, tiny_folder: Path, tmp_path: Path) -> None:
    found = squeezed(tuned, tmp_path / "out", ranks=[3, 1], base=str(tiny_folder))
    assert "1 parameters outside its modules that training changed, model.norm.weight most" in found.note
    made, base, after = AdapterArtifact.load(tmp_path / "out" / "r3"), *map(weights, (tiny_folder, tuned))
    assert {name.rsplit(".", 1)[1] for name in made.modules} == {"q_proj", "up_proj"}
    for name, factors in made.modules.items():
        delta = after[f"{name}.weight"] - base[f"{name}.weight"]
        # The difference of two float32 weights carries their rounding, which is of the weights' size.
        noise = float(after[f"{name}.weight"].norm() / delta.norm())
        assert_close(factors.delta(), delta, torch.float32, 64, depth=4 * max(1, round(noise)))
    assert AdapterArtifact.load(tmp_path / "out" / "r1").rank == 1


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(folder / "model.safetensors"))


def test_a_tuned_model_needs_its_base_and_takes_no_score(tuned: Path, tmp_path: Path) -> None:
    with pytest.raises(SqueezeError, match="name the base with --base"):
        squeezed(tuned, tmp_path / "out", ranks=[3])
    with pytest.raises(SqueezeError, match="extract a LoRA first"):
        squeezed(tuned, tmp_path / "out", keep_score=0.9)
    with pytest.raises(SqueezeError, match="one kind at a time"):
        squeezed(tuned, tmp_path / "out", ranks=[3], energies=[0.9], base="tiny-llama")


def test_an_adapter_without_factors_becomes_a_lora(
    tiny_model: Any, tiny_folder: Path, tmp_path: Path
) -> None:
    config = LoHaConfig(r=2, alpha=4, target_modules=["q_proj"], init_weights=False)
    model = get_peft_model(tiny_model, config)
    model.save_pretrained(tmp_path / "loha")
    squeezed(tmp_path / "loha", tmp_path / "out", ranks=[4], base=str(tiny_folder))
    made = AdapterArtifact.load(tmp_path / "out" / "r4")
    for name, factors in made.modules.items():
        delta = model.base_model.model.get_submodule(name).get_delta_weight("default")
        # A Hadamard product of two of rank 2 is of rank 4.
        assert_close(factors.delta(), delta.detach(), torch.float32, 64, depth=4)


def test_the_squeeze_of_an_unknown_adapter_is_tracked_without_a_parent(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    squeezed(adapter, tmp_path / "out", ranks=[2])
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("rayft")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.tags["rayft.kind"] == "squeezed"
    assert "mlflow.parentRunId" not in run.data.tags
    assert len([name for name in run.data.metrics if name.startswith("retention/")]) == 6
    assert run.data.metrics["adapter_bytes"] == folder_bytes(tmp_path / "out" / "r2")


def test_a_folder_that_another_command_writes_to_is_refused(adapter: Path, tmp_path: Path) -> None:
    with hold(tmp_path / "out", "--out"), pytest.raises(ConfigError, match="is writing to"):
        squeezed(adapter, tmp_path / "out", ranks=[2])


def test_an_adapter_that_cant_be_scored_is_reported_and_the_rest_is_scored(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, said = squeezed(adapter, tmp_path / "out", ranks=[4, 2]), io.StringIO()
    request = squeeze_request(Place(str(adapter), adapter, None), tmp_path / "out", ranks=[4, 2])
    damaged = {found.made[1].name}

    def score(_executor: None, items: Sequence[SqueezedAdapter], parts: tuple[str, ...]) -> Any:
        return {
            item.name: Measured(error="it is damaged")
            if item.name in damaged
            else Measured({parts[0]: [1.0]})
            for item in items
        }

    def score_all() -> None:
        display = Display(Console(file=said, width=200))
        measure(request, None, found, tmp_path, None, display)  # type: ignore[arg-type]

    monkeypatch.setattr("rayft.flow.squeeze.run.score_squeezed", score)
    score_all()
    assert found.scores[found.made[0].name].mean("test") == 1.0
    assert f"{found.made[1].name} can't be scored, and is left out: it is damaged" in said.getvalue()
    for names in ({item.name for item in found.made}, {found.source.name}):
        damaged = names
        with pytest.raises(TrainError, match="can't be scored: it is damaged"):
            score_all()


class _Reached(Exception):  # noqa: N818  (it says that lanes would start now)
    pass


@pytest.mark.usefixtures("prepared")
def test_a_configuration_without_a_sweep_names_base_and_data(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    rows = [json.dumps({"prompt": f"How many in box {box}?", "completion": "5"}) for box in range(12)]
    (tmp_path / "answers.jsonl").write_text("\n".join(rows))
    (tmp_path / "my.yaml").write_text(CONFIG.partition("sweep:")[0])
    monkeypatch.chdir(tmp_path)

    def executor(*arguments: Any) -> None:
        assert arguments[3:] == (3, "squeeze")
        raise _Reached

    monkeypatch.setattr("rayft.flow.squeeze.run.cluster", lambda *_, **__: nullcontext())
    monkeypatch.setattr("rayft.flow.squeeze.run.EXECUTORS", {"lane": executor})
    with pytest.raises(_Reached):
        squeezed(adapter, tmp_path / "out", keep_score=0.9, config=tmp_path / "my.yaml")


def test_a_damaged_record_of_the_sweep_is_reported(adapter: Path, tmp_path: Path) -> None:
    own = shutil.copytree(adapter, tmp_path / "sweep" / "trials" / "k" / "adapter")
    (tmp_path / "sweep" / "config.yaml").write_text(f"# sweep 0123\n{CONFIG}")
    assert not find_origin(own, AdapterArtifact.load(own), None).note
    (tmp_path / "sweep" / "sweep.json").write_text("{")
    origin = find_origin(own, AdapterArtifact.load(own), None)
    assert re.search(r"of the adapter's trial was not used: .*sweep\.json is damaged", origin.note)
    with pytest.raises(SqueezeError, match=r"sweep\.json is damaged.*Give the learning rate .* with --lr"):
        squeezed(own, tmp_path / "out", ranks=[2], steps=3)


def test_results_are_named_by_whole_paths_for_workers_elsewhere(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (made,) = squeezed(adapter, Path("out"), ranks=[2]).made
    assert made.folder == tmp_path / "out" / "r2"
