"""A folder for vLLM: PEFT computes the same with it, and its configuration needs no patterns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rayft.artifacts import AdapterArtifact
from rayft.errors import SqueezeError
from rayft.flow.export.vllm import served_rank, target_names, uniform, write_folder
from rayft.methods.base import LoraFactors
from rayft.models.load import ModelConfig, load_skeleton
from rayft.models.tiny import TINY
from rayft.numerics import assert_close, generator
from rayft.squeeze.rank import at_ranks, retained_energy, squeeze
from tests.unit.flow.export.adapters import random_adapter

TOKENS = torch.tensor([[5, 80, 17, 121, 9, 33]])
LENGTH, DEPTH = 200, 30
"""Terms of a logit's sums, and roundings on the way to it."""


def every(base: ModelConfig) -> list[str]:
    return [name for name, _ in load_skeleton(base).named_modules() if name]


def logits(base: ModelConfig, folder: Path) -> tuple[torch.Tensor, set[str]]:
    """Return the logits of a base with an adapter, and the modules that PEFT has put it into."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.name), folder)
    adapted = {name for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}
    with torch.no_grad():
        return model(TOKENS).logits, adapted


@pytest.mark.parametrize(
    ("kind", "chosen", "targets"),
    [
        ("tiny-llama", ["q_proj", "down_proj"], ["down_proj", "q_proj"]),
        ("tiny-llama", [], ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]),
        # Both the attention and the MLP have a c_proj.
        ("tiny-gpt2", ["attn.c_proj", "c_fc"], ["attn.c_proj", "mlp.c_fc"]),
        # Not in both layers.
        ("tiny-qwen", ["0.self_attn.q_proj"], ["model.layers.0.self_attn.q_proj"]),
    ],
)
def test_peft_adapts_the_same_modules_and_computes_the_same(
    kind: str, chosen: list[str], targets: list[str], tmp_path: Path
) -> None:
    base = ModelConfig(name=str(TINY[kind](tmp_path / "base")))
    artifact = random_adapter(base, chosen, step=1)
    plain = uniform(artifact)
    found = target_names(plain.modules, every(base), ())
    assert found == targets
    (tmp_path / "out").mkdir()
    write_folder(plain, found, tmp_path / "out")
    expected, modules = logits(base, artifact.save(tmp_path / "adapter"))
    actual, same = logits(base, tmp_path / "out")
    assert modules == same == artifact.modules.keys()
    assert_close(actual, expected, torch.float32, LENGTH, DEPTH)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == plain.rank
    assert config["lora_alpha"] / config["r"] == next(iter(plain.modules.values())).scale
    assert not config["use_rslora"]
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    # It is an adapter like any other.
    assert AdapterArtifact.load(tmp_path / "out").content_hash == plain.content_hash


def test_paths_that_end_other_paths_become_a_regular_expression() -> None:
    paths = ["0.q", "1.q"]
    found = target_names(paths, ["0.q", "1.q", "vision.0.q", "other"], ())
    assert found == r"0\.q|1\.q"
    assert target_names(paths, ["0.q", "1.q", "other"], ()) == ["q"]
    # A head that is trained whole is no target.
    assert target_names(["0.dense"], ["0.dense", "classifier.dense"], ["classifier"]) == ["dense"]


def test_a_single_part_is_its_own_name() -> None:
    assert target_names(["proj"], ["proj", "head"], ()) == ["proj"]


def factors(rank: int, scale: float, dtype: torch.dtype) -> LoraFactors:
    draw = generator(rank, scale)
    a, b = torch.randn(rank, 7, generator=draw), torch.randn(5, rank, generator=draw)
    return LoraFactors(a.to(dtype), b.to(dtype), scale)


def test_the_update_stays_what_it_was() -> None:
    modules = {
        "most": factors(4, 0.3, torch.bfloat16), "like": factors(4, 0.3, torch.bfloat16),
        "half": factors(4, 0.15, torch.bfloat16), "less": factors(2, 0.3, torch.bfloat16),
        "odd": factors(3, 0.7, torch.bfloat16),
    }  # fmt: skip
    plain = uniform(AdapterArtifact(modules))
    for name, before in modules.items():
        after = plain.modules[name]
        assert (after.rank, after.scale) == (4, 0.3)
        exact = before.scale * before.b.double() @ before.a.double()
        assert_close(after.scale * after.b.double() @ after.a.double(), exact, torch.float32, 4)
    # Nothing is copied or converted that need not be.
    assert plain.modules["most"].b is modules["most"].b
    assert plain.modules["half"].b.dtype == torch.bfloat16
    assert plain.modules["odd"].b.dtype == torch.float32


def test_a_column_of_zeros_retains_no_energy(tmp_path: Path) -> None:
    modules = {"steep": factors(4, 0.3, torch.float32), "flat": factors(6, 0.3, torch.float32)}
    whole = squeeze(AdapterArtifact(modules))
    cut = at_ranks(whole, {"steep": 1, "flat": 4})
    uniform(cut).save(tmp_path / "out")
    padded = AdapterArtifact.load(tmp_path / "out")
    assert {factors.rank for factors in padded.modules.values()} == {4}
    assert padded.squeezed
    assert retained_energy(padded) == pytest.approx(retained_energy(cut))
    assert retained_energy(squeeze(padded, rank=1)) == pytest.approx(retained_energy(squeeze(whole, rank=1)))
    with pytest.raises(SqueezeError, match="steep is at rank 4 already"):
        squeeze(padded, energy=0.999)


def test_a_selector_stays_one_unless_it_is_padded(tmp_path: Path) -> None:
    a = torch.eye(6)[:2]
    modules = {
        "x.long": LoraFactors(torch.eye(6)[:3], torch.ones(4, 3), 1.0, (0, 1, 2)),
        "x.short": LoraFactors(a, torch.ones(4, 2), 1.0, (0, 1)),
    }
    plain = uniform(AdapterArtifact(modules))
    assert plain.modules["x.long"].columns == (0, 1, 2)
    assert plain.modules["x.short"].columns is None
    plain.save(tmp_path / "out")
    loaded = AdapterArtifact.load(tmp_path / "out")
    assert torch.equal(loaded.modules["x.short"].delta(), modules["x.short"].delta())


@pytest.mark.parametrize(("rank", "most"), [(1, 1), (2, 8), (16, 16), (17, 32), (400, 512), (513, None)])
def test_the_rank_that_vllm_needs(rank: int, most: Any) -> None:
    assert served_rank(rank) == most
