"""`rayft export` writes what was asked for, whole or not at all, and replaces only what it wrote itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from rayft.artifacts import AdapterArtifact, ArtifactMeta
from rayft.cli import app
from rayft.errors import (
    ArtifactError,
    BaseMismatchError,
    ConfigError,
    DiskFullError,
    ModelError,
    RayftError,
    RegistryError,
    TrackingError,
)
from rayft.flow.export import run
from rayft.flow.export.run import export_adapter
from rayft.models.fingerprint import fingerprint
from rayft.models.load import ModelConfig
from rayft.models.tiny import save_tiny_bert, save_tiny_gpt2, save_tiny_qwen
from rayft.numerics import assert_close
from rayft.registry.store import MlflowRegistry
from rayft.tracking import TrackerSpec
from rayft.tracking.mlflow import MlflowTracker
from tests.disks import PAGE, Disk
from tests.unit.flow.answers import CONFIG
from tests.unit.flow.export.adapters import random_adapter

TOKENS = torch.tensor([[5, 80, 17, 121, 9, 33]])


@pytest.fixture
def adapter(tiny_folder: Path, tmp_path: Path) -> Path:
    """An adapter of the tiny Llama, with ranks and scales that differ."""
    return random_adapter(ModelConfig(name=str(tiny_folder)), step=1).save(tmp_path / "adapter")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def logits(folder: Path | str, lora: Path | None = None) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    if lora is not None:
        model = PeftModel.from_pretrained(model, lora)
    with torch.no_grad():
        return model(TOKENS).logits  # type: ignore[no-any-return]


def test_one_command_writes_all_forms(adapter: Path, tiny_folder: Path, tmp_path: Path) -> None:
    out, before = tmp_path / "out", contents(adapter)
    shown = CliRunner().invoke(
        app,
        ["export", str(adapter), "--merged", str(out / "merged"), "--vllm", str(out / "vllm"), "--gguf",
         str(out / "a.gguf"), "--card", str(out / "vllm"), "--base-name", "org/small"],
    )  # fmt: skip
    assert shown.exit_code == 0, shown.output
    assert sorted(path.name for path in out.iterdir()) == ["a.gguf", "merged", "vllm"]
    expected = logits(tiny_folder, adapter)
    assert_close(logits(out / "merged"), expected, torch.float32, 200, 30)
    assert_close(logits(tiny_folder, out / "vllm"), expected, torch.float32, 200, 30)
    config = json.loads((out / "vllm" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/small"
    assert "base_model: org/small" in (out / "vllm" / "README.md").read_text()
    assert contents(adapter) == before
    text = " ".join(shown.output.split())
    assert "rounding to float32 loses" in text
    assert "vLLM serves it with --max-lora-rank 8 or more" in text
    assert "all modules were padded with zeros to rank 5" in text
    assert "others can't find it" not in text


def test_the_merged_folder_records_its_origin(adapter: Path, tmp_path: Path) -> None:
    found = export_adapter(adapter, merged=tmp_path / "merged")
    record = json.loads((tmp_path / "merged" / "rayft_merge.json").read_text())
    assert record["adapter"] == AdapterArtifact.load(adapter).content_hash
    assert found.rounding is not None
    assert record["lost_by_rounding"] == found.rounding.total
    assert not any("score the merged model" in note for note in found.notes)
    assert {*record["files"], "rayft_merge.json"} == contents(tmp_path / "merged").keys()


PLACES: dict[str, str] = {"merged": "merged", "vllm": "vllm", "gguf": "a.gguf", "card": "card.md"}


@pytest.mark.parametrize("form", PLACES)
def test_what_is_there_is_replaced_only_if_an_export_wrote_it(
    form: str, adapter: Path, tmp_path: Path
) -> None:
    place = tmp_path / "out" / PLACES[form]
    export_adapter(adapter, **{form: place})
    first = contents(tmp_path / "out")
    with pytest.raises(ConfigError, match=f"--{form} .* exists already; .*--overwrite"):
        export_adapter(adapter, **{form: place})
    export_adapter(adapter, **{form: place}, overwrite=True)
    assert contents(tmp_path / "out") == first
    # Something of a user's.
    if place.is_dir():
        (place / "notes.txt").write_text("mine")
    else:
        place.write_text("mine")
    before = contents(tmp_path / "out")
    with pytest.raises(ArtifactError, match="not replaced"):
        export_adapter(adapter, **{form: place}, overwrite=True)
    assert contents(tmp_path / "out") == before
    if place.is_dir():
        shutil.rmtree(place)
        place.mkdir()
        export_adapter(adapter, **{form: place})
        shutil.move(place, tmp_path / "elsewhere")
    else:
        place.unlink()
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="not replaced"):
        export_adapter(adapter, **{form: place}, overwrite=True)


def test_a_folder_of_a_model_is_not_replaced(adapter: Path, tiny_folder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    with pytest.raises(ArtifactError, match="no folder of a model that rayft merged"):
        export_adapter(adapter, merged=model, overwrite=True)


def test_a_folder_with_its_card_is_replaced_with_it(adapter: Path, tmp_path: Path) -> None:
    place = tmp_path / "vllm"
    export_adapter(adapter, vllm=place, card=place)
    export_adapter(adapter, vllm=place, card=place / "README.md", overwrite=True)
    (place / "README.md").write_text("mine")
    with pytest.raises(ArtifactError, match=r"holds README\.md, which rayft did not write"):
        export_adapter(adapter, vllm=place, overwrite=True)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "nothing to export: add --merged DIR"),
        ({"merged": "x", "vllm": "x"}, "are one place, or one is in the other"),
        ({"merged": "x", "vllm": "x/y"}, "are one place, or one is in the other"),
        ({"merged": "x", "card": "x"}, "are one place, or one is in the other"),
        ({"vllm": "x", "gguf": "x/a.gguf"}, "are one place, or one is in the other"),
        ({"vllm": "adapter"}, "over or into the adapter"),
        ({"merged": "adapter/merged"}, "over or into the adapter"),
        ({"merged": "."}, "over or into the adapter"),
        ({"vllm": "adapter/adapter_config.json/x"}, "over or into the adapter"),
        ({"gguf": "adapter/adapter_config.json/x"}, "is a file, not a folder"),
    ],
)
def test_places_are_checked_before_anything_is_read(
    options: dict[str, str], match: str, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "open_source", None)
    before = contents(tmp_path)
    for overwrite in (False, True):
        with pytest.raises(RayftError, match=match):
            export_adapter(Path("adapter"), **options, overwrite=overwrite)
    assert contents(tmp_path) == before


def _dora(folder: Path, model: Any) -> None:
    config = LoraConfig(r=2, use_dora=True, target_modules=["q_proj"])
    get_peft_model(model, config).save_pretrained(folder)


def _experts(folder: Path, model: Any) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.up_proj.weight"])
    get_peft_model(model, config).save_pretrained(folder)


def _loha(folder: Path, model: Any) -> None:
    get_peft_model(model, LoHaConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)


def _output(folder: Path, model: Any) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    get_peft_model(model, config).save_pretrained(folder)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (_dora, "is a DoRA adapter"),
        (_experts, r"trains mlp\.up_proj\.weight \(target_parameters\)"),
        (_loha, "an adapter without LoRA factors; extract a LoRA from it"),
        (_output, "trains lm_head"),
        (lambda folder, model: model.save_pretrained(folder), "a whole model; extract a LoRA from it"),
        (lambda folder, model: folder.mkdir(), r"has no adapter_config\.json"),
    ],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_what_is_no_plain_lora_is_refused(
    make: Callable[[Path, Any], None], match: str, tiny_model: Any, tmp_path: Path
) -> None:
    make(tmp_path / "source", tiny_model)
    with pytest.raises(ArtifactError, match=match):
        export_adapter(
            tmp_path / "source", merged=tmp_path / "m", vllm=tmp_path / "v", card=tmp_path / "c.md"
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("form", ["merged", "gguf", "vllm"])
def test_another_base_is_refused(form: str, adapter: Path, tiny_model: Any, tmp_path: Path) -> None:
    other = save_tiny_qwen(tmp_path / "qwen")
    with pytest.raises(BaseMismatchError, match="use it with its own base"):
        export_adapter(adapter, **{form: tmp_path / "out"}, base=str(other))
    artifact = AdapterArtifact.load(adapter)
    meta = artifact.meta.model_copy(update={"base_fingerprint": fingerprint(tiny_model)})
    own = AdapterArtifact(artifact.modules, meta=meta).save(tmp_path / "own")
    export_adapter(own, **{form: tmp_path / "out"})
    meta = artifact.meta.model_copy(update={"base_fingerprint": "0" * 16})
    stranger = AdapterArtifact(artifact.modules, meta=meta).save(tmp_path / "stranger")
    with pytest.raises(BaseMismatchError, match="was made for the base"):
        export_adapter(stranger, **{form: tmp_path / "other"})
    assert not (tmp_path / "other").exists()


def test_a_base_that_is_stored_quantised_is_refused(adapter: Path, tiny_folder: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="is stored quantised"):
        export_adapter(adapter, merged=tmp_path / "merged", base=str(base))
    assert not (tmp_path / "merged").exists()


def test_an_unknown_architecture_stops_the_other_forms_too(tmp_path: Path) -> None:
    base = ModelConfig(name=str(save_tiny_gpt2(tmp_path / "gpt2")))
    random_adapter(base).save(tmp_path / "adapter")
    with pytest.raises(ArtifactError, match="GPT2LMHeadModel is an architecture"):
        export_adapter(
            tmp_path / "adapter", gguf=tmp_path / "a.gguf", vllm=tmp_path / "v", merged=tmp_path / "m"
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "gpt2"]


def test_an_adapter_without_a_base_needs_one_to_be_merged(
    adapter: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    AdapterArtifact(AdapterArtifact.load(adapter).modules, meta=ArtifactMeta()).save(tmp_path / "bare")
    with pytest.raises(ArtifactError, match="names no base; name it with --base"):
        export_adapter(tmp_path / "bare", merged=tmp_path / "merged")
    found = export_adapter(tmp_path / "bare", vllm=tmp_path / "vllm")
    assert "the base is written as no name" in found.notes[0]
    assert "target_modules lists whole paths" in found.notes[-1]
    config = json.loads((tmp_path / "vllm" / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(AdapterArtifact.load(adapter).modules)
    export_adapter(tmp_path / "bare", merged=tmp_path / "merged", base=str(tiny_folder))


def test_names_that_others_cant_find_are_reported(adapter: Path, tmp_path: Path) -> None:
    (note, *_) = export_adapter(adapter, vllm=tmp_path / "a").notes
    assert "not the name of a hub model" in note
    (note, *_) = export_adapter(adapter, vllm=tmp_path / "b", base_name="tiny-llama").notes
    assert "'tiny-llama', a name that only rayft knows" in note
    # A base that is not here: the adapter's own is, and tells which modules there are.
    found = export_adapter(adapter, vllm=tmp_path / "c", base="org/absent")
    assert all("can't find it" not in note and "whole paths" not in note for note in found.notes)
    config = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/absent"
    assert "q_proj" in config["target_modules"]


def test_a_classifier_is_exported_with_its_head(tmp_path: Path) -> None:
    base = ModelConfig(name=str(save_tiny_bert(tmp_path / "bert")), task="sequence_classification")
    heads = {"classifier.weight": torch.randn(5, 24), "classifier.bias": torch.randn(5)}
    plain = random_adapter(base)
    AdapterArtifact(plain.modules, heads, plain.meta).save(tmp_path / "adapter")
    found = export_adapter(tmp_path / "adapter", merged=tmp_path / "merged", vllm=tmp_path / "vllm")
    assert any("classification head" in note for note in found.notes)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["id2label"].keys() == {*"01234"}
    assert torch.equal(
        AdapterArtifact.load(tmp_path / "vllm").heads["classifier.weight"], heads["classifier.weight"]
    )


def test_a_registered_adapter_is_exported_by_its_alias(
    adapter: Path, tiny_folder: Path, tmp_path: Path, spec: TrackerSpec
) -> None:
    registry = MlflowRegistry(spec.uri)
    with MlflowTracker(spec) as tracker:
        registry.register("sums", tracker.run("trial", "t0"), adapter, {})
    registry.alias("sums", "champion", 1)
    arguments = ["export", "models:/sums@champion", "--merged", str(tmp_path / "merged"), "--uri", spec.uri]
    shown = CliRunner().invoke(app, [*arguments, "--card", str(tmp_path / "card.md")])
    assert shown.exit_code == 0, shown.output
    assert_close(logits(tmp_path / "merged"), logits(tiny_folder, adapter), torch.float32, 200, 30)
    assert "\n# sums\n" in (tmp_path / "card.md").read_text()
    with pytest.raises(RegistryError, match="has no alias 'other'"):
        export_adapter("models:/sums@other", card=tmp_path / "other.md", uri=spec.uri)
    # A sweep's configuration names its registry.
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    (sweep / "config.yaml").write_text(f"# sweep 0123\n{CONFIG}\ntracking: {{uri: '{spec.uri}'}}\n")
    export_adapter("models:/sums@champion", vllm=tmp_path / "vllm", sweep=sweep)
    # What the user gives counts more.
    with pytest.raises(TrackingError, match=r"elsewhere\.db is not there"):
        export_adapter(
            "models:/sums@champion",
            card=tmp_path / "other.md",
            sweep=sweep,
            uri=f"sqlite:///{tmp_path}/elsewhere.db",
        )
    (sweep / "config.yaml").write_text("# sweep 0123\nof: another release\n")
    with pytest.raises(ConfigError, match="unknown key 'of'"):
        export_adapter("models:/sums@champion", vllm=tmp_path / "w", sweep=sweep)


def test_paths_may_begin_with_the_home_folder(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    places = {form: f"~/out/{name}" for form, name in PLACES.items()}
    found = export_adapter("~/adapter", **places)
    assert found.places.merged == tmp_path / "out" / "merged"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(PLACES.values())
    with pytest.raises(ConfigError, match="--gguf is empty"):
        export_adapter(adapter, gguf="")


def test_a_base_that_was_quantised_in_training_is_reported(adapter: Path, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    shutil.copytree(adapter, sweep / "trials" / "k" / "adapter")
    config = yaml.safe_load(CONFIG)
    config["model"] = {"name": "tiny-llama", "quantize": "nf4"}
    (sweep / "config.yaml").write_text(f"# sweep 0123\n{yaml.safe_dump(config)}")
    found = export_adapter(sweep / "trials" / "k" / "adapter", merged=tmp_path / "merged")
    assert any("was trained on the base quantised to nf4" in note for note in found.notes)
    (sweep / "config.yaml").write_text("# sweep 0123\nof: another release\n")
    found = export_adapter(sweep / "trials" / "k" / "adapter", merged=tmp_path / "merged", overwrite=True)
    (note,) = (note for note in found.notes if "quantised" in note)
    assert "quantised base is not known, because" in note
    assert "unknown key 'of'" in note
    found = export_adapter(sweep / "trials" / "k" / "adapter", vllm=tmp_path / "vllm")
    assert not any("config.yaml" in note for note in found.notes)


def test_a_classifier_is_checked_against_its_base_whatever_class_that_was_saved_as(tmp_path: Path) -> None:
    folder = save_tiny_bert(tmp_path / "bert")
    settings = json.loads((folder / "config.json").read_text())
    settings["architectures"] = ["BertForMaskedLM"]
    (folder / "config.json").write_text(json.dumps(settings))
    base = ModelConfig(name=str(folder), task="sequence_classification")
    plain = random_adapter(base, ["query"])
    heads = {"classifier.weight": torch.randn(3, 24), "classifier.bias": torch.randn(3)}
    AdapterArtifact(plain.modules, heads, plain.meta).save(tmp_path / "adapter")
    found = export_adapter(tmp_path / "adapter", vllm=tmp_path / "vllm")
    assert json.loads((tmp_path / "vllm" / "adapter_config.json").read_text())["target_modules"] == ["query"]
    assert not any("not checked" in note for note in found.notes)
    wrong = {name.replace("query", "quarry"): factors for name, factors in plain.modules.items()}
    AdapterArtifact(wrong, heads, plain.meta).save(tmp_path / "wrong")
    with pytest.raises(BaseMismatchError, match="quarry"):
        export_adapter(tmp_path / "wrong", vllm=tmp_path / "other")


def test_the_base_is_read_at_the_adapters_revision(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, commit = tmp_path / "hub" / "models--org--model", "a" * 40
    shutil.copytree(tiny_folder, hub / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    artifact = random_adapter(ModelConfig(name=str(tiny_folder)), ["q_proj"])
    meta = artifact.meta.model_copy(update={"base_model": "org/model"})
    AdapterArtifact(artifact.modules, meta=meta).save(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "revision": commit}))
    found = export_adapter(tmp_path / "adapter", vllm=tmp_path / "vllm")
    assert not any("not on this machine" in note for note in found.notes)
    written = json.loads((tmp_path / "vllm" / "adapter_config.json").read_text())
    assert written["target_modules"] == ["q_proj"]
    assert written["revision"] == commit
    export_adapter(tmp_path / "adapter", card=tmp_path / "card.md")
    text = (tmp_path / "card.md").read_text()
    assert text.count(f'from_pretrained("org/model", revision="{commit}"') == 2
    assert f"--revision {commit}" in text
    assert f"revision: {commit}" in text
    # It is no revision of another base.
    export_adapter(tmp_path / "adapter", vllm=tmp_path / "other", card=tmp_path / "other", base_name="org/b")
    assert "revision" not in json.loads((tmp_path / "other" / "adapter_config.json").read_text())
    assert "revision" not in (tmp_path / "other" / "README.md").read_text()


def test_a_base_that_no_one_asked_for_may_be_damaged(
    adapter: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    artifact = AdapterArtifact.load(adapter)
    meta = artifact.meta.model_copy(update={"base_model": str(base)})
    AdapterArtifact(artifact.modules, meta=meta).save(tmp_path / "mine")
    (base / "config.json").write_text("{")
    found = export_adapter(tmp_path / "mine", vllm=tmp_path / "vllm")
    assert "can't be read on this machine" in found.notes[-1]
    with pytest.raises(ModelError, match="can't load"):
        export_adapter(tmp_path / "mine", vllm=tmp_path / "other", base=str(base))
    with pytest.raises(ModelError, match=r"no model '\./gone'"):
        export_adapter(adapter, vllm=tmp_path / "other", base="./gone")
    assert not (tmp_path / "other").exists()


def test_a_disk_without_room_is_noticed_before_the_base_is_read(
    adapter: Path, tiny_folder: Path, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.leave((tiny_folder / "model.safetensors").stat().st_size // 2)
    monkeypatch.setattr(run, "merge", None)
    with pytest.raises(DiskFullError, match="and the merged model needs"):
        export_adapter(adapter, merged=disk.folder / "merged")
    assert not [*disk.folder.iterdir()]


@pytest.mark.parametrize(
    ("forms", "what"),
    [
        (["gguf"], "the file for llama.cpp needs"),
        (["vllm"], "the folder for vLLM needs"),
        (["vllm", "gguf"], "the file for llama.cpp and the folder for vLLM need"),
    ],
)
def test_the_room_for_every_form_is_checked_before_the_first_is_written(
    forms: list[str], what: str, adapter: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = run.gguf_bytes(AdapterArtifact.load(adapter))
    # Of two forms, each fits alone.
    disk.leave(size // 2 if len(forms) == 1 else size * 3 // 2)
    monkeypatch.setattr(run, "write_gguf", None)
    monkeypatch.setattr(run, "write_folder", None)
    with pytest.raises(DiskFullError, match=f"free, and {what} "):
        export_adapter(adapter, **{form: disk.folder / PLACES[form] for form in forms})
    assert not [*disk.folder.iterdir()]


@pytest.mark.parametrize("form", PLACES)
def test_a_full_disk_leaves_nothing_behind(
    form: str, adapter: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_check_room", lambda sizes: None)
    # The test file of the checks fits in, and nothing that is exported.
    monkeypatch.setattr("rayft.flow.export.places.check_folder", lambda folder, setting: None)
    (disk.folder / "mine").write_bytes(b"x" * PAGE)
    disk.leave(0 if form == "card" else 2 * PAGE)
    with pytest.raises(DiskFullError):
        export_adapter(adapter, **{form: disk.folder / PLACES[form]})
    assert [path.name for path in disk.folder.iterdir()] == ["mine"]
