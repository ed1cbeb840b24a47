"""PEFT's adapters without factors become LoRAs where their layers are W + ΔW, and only there."""

from __future__ import annotations

import copy
import functools
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.c3a import layer as c3a
from safetensors.torch import load_file, save_file

from rayft.artifacts import CONFIG_FILE, META_FILE, WEIGHTS_FILE, AdapterArtifact, ArtifactMeta
from rayft.errors import ArtifactError, BaseMismatchError, MethodError, SqueezeError
from rayft.methods.base import MethodConfig
from rayft.models.extract import extract_peft
from rayft.models.inject import attach, export, inject
from rayft.models.load import LoadedModel, ModelConfig, load_model
from rayft.models.methods import method
from rayft.models.targets import linear_shapes
from rayft.numerics import assert_close, generator, relative_error, tolerance
from rayft.peft.dense import ROUNDINGS
from rayft.peft.folder import PeftFolder
from rayft.peft.method import PeftMethod

ACCEPTED = {
    "AdaMSS", "C3A", "DeLoRA", "Deft", "FRoD", "FourierFT", "GraLoRA", "LoHa", "LoKr", "MiSS", "OSF",
    "PEANuT", "PSOFT", "PVeRA", "RandLoRA", "SHiRA", "Supertuning", "TinyLoRA", "UniLoRA", "VBLoRA",
    "VeRA", "WaveFT",
}  # fmt: skip
REFUSED = {"BEFT", "BOFT", "GLoRA", "HRA", "HiRA", "IA3", "Lily", "OFT", "RoAd"}
FACTORS = {"LoRA", "PiSSA"}
CONV1D = ("Deft", "FRoD", "FourierFT", "VeRA")
OPTIONS: dict[str, dict[str, Any]] = {"FourierFT": {"n_frequency": 100}, "WaveFT": {"n_frequency": 64}}
TARGETS = r".*0\.(self_attn\.(q|v)_proj|mlp\.down_proj|attn\.c_attn|attn\.c_proj)"
"""Of a square, a tall and a wide layer: one each, and only those, so that each class takes little time."""
WIDEST = 120


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYFT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@functools.cache
def base(name: str) -> LoadedModel:
    """A base that all tests share; they change copies of it."""
    return load_model(ModelConfig(name=name), torch.float32)


def fresh(name: str) -> Any:
    return copy.deepcopy(base(name).model)


def settings(short: str) -> MethodConfig:
    name = f"peft:{short}"
    ranked = {"rank": 4} if method(name).rank(MethodConfig()) is not None else {}
    return MethodConfig(name=name, targets=TARGETS, options=OPTIONS.get(short, {}), **ranked)


def by_peft(model: Any, config: Any, folder: Path) -> Any:
    """Have PEFT put an adapter in, move it, and save it as anybody would."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = peft.get_peft_model(model, config)
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator("move", name))
        tuned.save_pretrained(folder)
    return tuned.eval()


def saved(short: str, folder: Path, name: str = "tiny-llama") -> Any:
    model, kind, config = fresh(name), method(f"peft:{short}"), settings(short)
    assert isinstance(kind, PeftMethod)
    shapes = {
        path: shape
        for path, shape in linear_shapes(model).items()
        if path.rsplit(".", 1)[-1] in ("q_proj", "v_proj", "down_proj", "c_attn", "c_proj") and ".0." in path
    }
    return by_peft(model, kind.peft_config(config, shapes, 1, transposed=name == "tiny-gpt2"), folder)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=torch.arange(8, 40).reshape(2, 16)).logits)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untouched")
    saved("C3A", folder)
    return folder


def test_this_file_knows_every_method_of_peft() -> None:
    with pytest.raises(MethodError, match="PEFT has") as error:
        method("peft:zzzzzz")
    names = str(error.value).split("PEFT has ")[1].split(" (as")[0].split(", ")
    assert {*names} == ACCEPTED | REFUSED | FACTORS | {"DoRA"}


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # torch's, of FRoD's forward pass
@pytest.mark.parametrize(
    ("short", "name"),
    [*((short, "tiny-llama") for short in sorted(ACCEPTED)), *((short, "tiny-gpt2") for short in CONV1D)],
)
def test_the_lora_is_the_adapter(short: str, name: str, tmp_path: Path) -> None:
    tuned, plain = saved(short, tmp_path / "peft", name), fresh(name)
    before = (tmp_path / "peft" / WEIGHTS_FILE).read_bytes()
    made = extract_peft(tmp_path / "peft", ModelConfig(name=name), energy=1.0)
    assert (tmp_path / "peft" / WEIGHTS_FILE).read_bytes() == before
    assert made.lost == {}
    meta = made.artifact.meta
    assert meta.method == f"peft:{short}"
    assert meta.transposed == (name == "tiny-gpt2")
    assert made.artifact.squeezed
    for path, factors in made.artifact.modules.items():
        x = torch.randn(16, factors.a.shape[1], generator=generator(path))
        layer, original = tuned.base_model.model.get_submodule(path), plain.get_submodule(path)
        with torch.no_grad():
            assert_close(
                layer(x), original(x) + x @ factors.delta().t(), torch.float32, WIDEST, depth=ROUNDINGS
            )
    assert meta.base_fingerprint == base(name).fingerprint
    assert relative_error(logits(tuned), logits(plain)) > 10 * tolerance(torch.float32, WIDEST, ROUNDINGS)
    attach(plain, AdapterArtifact.load(made.artifact.save(tmp_path / "lora")))
    assert_close(logits(plain), logits(tuned), torch.float32, WIDEST, depth=ROUNDINGS)


@pytest.mark.parametrize("short", sorted(REFUSED))
def test_what_is_not_added_to_the_weight_is_refused(short: str, tmp_path: Path) -> None:
    saved(short, tmp_path / "peft")
    match = (
        rf"peft/{CONFIG_FILE}: 'peft:{short}' can't become a LoRA: PEFT gives no ΔW of model\.layers\.0.*lora"
    )
    with pytest.raises(ArtifactError, match=match):
        extract_peft(tmp_path / "peft", ModelConfig(name="tiny-llama"), rank=2)


def test_a_delta_that_the_layer_does_not_add_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved("C3A", tmp_path / "peft")
    right = c3a.C3ALinear.get_delta_weight
    monkeypatch.setattr(c3a.C3ALinear, "get_delta_weight", lambda self, name: 1.01 * right(self, name))
    with pytest.raises(ArtifactError, match="PEFT gives no ΔW"):
        extract_peft(tmp_path / "peft", ModelConfig(name="tiny-llama"), rank=2)


def test_prefixes_of_the_lora_are_near_the_best_of_their_rank(tmp_path: Path) -> None:
    saved("LoHa", tmp_path / "peft")
    llama, calls = ModelConfig(name="tiny-llama"), []
    made = extract_peft(tmp_path / "peft", llama, rank=6, progress=lambda *step: calls.append(step)).artifact
    assert made.rank == 6
    assert [(done, of) for _, done, of in calls] == [(1, 3), (2, 3), (3, 3)]
    full = extract_peft(tmp_path / "peft", llama, energy=1.0).artifact
    for name, factors in made.at_rank(2).modules.items():
        u, s, vt = torch.linalg.svd(full.modules[name].delta().double())
        best = (u[:, :2] * s[:2]) @ vt[:2]
        dense = full.modules[name].delta().double()
        # Not the best one, as it is found at random, but never better, and nearer to the best than rank 1 is.
        error = float((dense - factors.delta()).norm())
        assert (
            float((dense - best).norm()) * (1 - tolerance(torch.float32, WIDEST))
            <= error
            < float(s[1:].norm())
        )
    assert extract_peft(tmp_path / "peft", llama, rank=6).artifact.content_hash == made.content_hash


def test_a_trials_folder_keeps_its_head_and_refuses_another_base(tmp_path: Path) -> None:
    llama = ModelConfig(name="tiny-llama", task="sequence_classification", num_labels=3)
    loaded = load_model(llama, torch.float32)
    inject(loaded.model, settings("C3A"), seed=1)
    for name, parameter in loaded.model.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator(name))
    expected = logits(loaded.model)
    meta = ArtifactMeta(
        method="peft:C3A",
        task=llama.task,
        base_fingerprint=loaded.fingerprint,
        data_digest="ab",
        metrics={"score": 1},
    )
    trained = export(loaded.model, meta)
    assert isinstance(trained, PeftFolder)
    trained.save(tmp_path / "peft")
    made = extract_peft(tmp_path / "peft", llama, energy=1.0).artifact
    assert made.heads.keys() == {"score.weight"}
    assert (made.meta.parent, made.meta.data_digest, made.meta.metrics) == (trained.content_hash, "ab", {})
    attach(loaded.model, made)
    assert_close(logits(loaded.model), expected, torch.float32, WIDEST, depth=ROUNDINGS)
    with pytest.raises(BaseMismatchError, match=r"peft was made for the base .*give its own base"):
        extract_peft(tmp_path / "peft", ModelConfig(name="tiny-qwen"), rank=2)
    with pytest.raises(BaseMismatchError, match=r"trains score whole.*set model\.task"):
        extract_peft(tmp_path / "peft", ModelConfig(name="tiny-llama"), rank=2)


def test_an_adapter_whose_updates_are_all_zero_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoHaConfig(target_modules=["q_proj"], r=2)
        peft.get_peft_model(fresh("tiny-llama"), config).save_pretrained(tmp_path / "peft")
    with pytest.raises(SqueezeError, match="none of 2 linear layers differs"):
        extract_peft(tmp_path / "peft", ModelConfig(name="tiny-llama"), rank=2)


CONFIGS = {
    "DoRA can't become a LoRA: its update has full rank.*80% error; train lora": peft.LoraConfig(
        target_modules=["q_proj"], use_dora=True
    ),
    "this is a LoRA already: squeeze it": peft.LoraConfig(target_modules=["q_proj"]),
    "PromptTuning adapts no linear layers.*train lora": peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2
    ),
    "'peft:LNTuning' can't become a LoRA: it adapts .*norm": peft.LNTuningConfig(
        target_modules=["input_layernorm"]
    ),
    "'peft:TrainableTokens' can't become a LoRA: it adapts model.embed_tokens": peft.TrainableTokensConfig(
        token_indices=[1, 2], target_modules=["embed_tokens"]
    ),
    "it adapts lm_head": peft.C3AConfig(target_modules=["lm_head", "q_proj"], block_size=2),
    "it trains biases": peft.BOFTConfig(target_modules=["q_proj"], bias="boft_only", boft_block_size=4),
}


@pytest.mark.parametrize("match", CONFIGS)
def test_folders_without_updates_of_linear_layers_are_refused(match: str, tmp_path: Path) -> None:
    by_peft(fresh("tiny-qwen"), CONFIGS[match], tmp_path / "peft")
    with pytest.raises(ArtifactError, match=rf"peft/{CONFIG_FILE}: .*{match}"):
        extract_peft(tmp_path / "peft", ModelConfig(name="tiny-qwen"), rank=2)


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    folder, llama = tmp_path / "peft", ModelConfig(name="tiny-llama")
    saved("C3A", folder)
    weights, config = load_file(folder / WEIGHTS_FILE), (folder / CONFIG_FILE).read_text()
    first = next(iter(weights))
    save_file({**weights, first: torch.full_like(weights[first], torch.nan)}, folder / WEIGHTS_FILE)
    with pytest.raises(ArtifactError, match=rf"{WEIGHTS_FILE}: {first} holds NaN or Inf"):
        extract_peft(folder, llama, rank=2)
    save_file({name: value for name, value in weights.items() if name != first}, folder / WEIGHTS_FILE)
    with pytest.raises(BaseMismatchError, match=f"has no {first}"):
        extract_peft(folder, llama, rank=2)
    (folder / WEIGHTS_FILE).write_bytes(b"short")
    with pytest.raises(ArtifactError, match="truncated or damaged"):
        extract_peft(folder, llama, rank=2)
    save_file(weights, folder / WEIGHTS_FILE)
    for change, match in (
        ({"peft_type": "NEWEST"}, "knows no 'NEWEST'; install"),
        ({"surprise": 1}, "surprise"),
    ):
        (folder / CONFIG_FILE).write_text(json.dumps({**json.loads(config), **change}))
        with pytest.raises(ArtifactError, match=match):
            extract_peft(folder, llama, rank=2)
    (folder / CONFIG_FILE).write_text("{}")
    with pytest.raises(ArtifactError, match="has no peft_type"):
        extract_peft(folder, llama, rank=2)
    (folder / CONFIG_FILE).unlink()
    with pytest.raises(ArtifactError, match=f"has no {CONFIG_FILE}; give the folder"):
        extract_peft(folder, llama, rank=2)
    assert not (folder / META_FILE).exists()


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        ({}, "give a rank or an energy"),
        ({"rank": 0}, "rank 0 is not between 1 and 32"),
        ({"rank": 99}, "rank 99 is not between 1 and 32"),
        ({"energy": 2.0}, r"not in \(0, 1\]"),
        ({"rank": 2, "energy": 0.9}, "give a rank or an energy"),
    ],
)
def test_impossible_ranks_and_energies_are_refused(request_: Any, match: str, untouched: Path) -> None:
    with pytest.raises(SqueezeError, match=match):
        extract_peft(untouched, ModelConfig(name="tiny-llama"), **request_)
