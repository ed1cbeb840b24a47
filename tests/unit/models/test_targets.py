"""Which layers are adapted, and at which rank each."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from rayft.artifacts import AdapterArtifact, ArtifactMeta
from rayft.errors import TargetError
from rayft.methods.base import ChainConfig, MethodConfig
from rayft.models.inject import advance, attach, export, inject
from rayft.numerics import assert_close

IDS = torch.arange(2, 34).unsqueeze(0)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def adapted(model: Any, config: MethodConfig) -> set[str]:
    """Return the last parts of the names of the modules that a configuration adapts."""
    return {name.rsplit(".", 1)[-1] for name in inject(model, config, seed=0).modules}


def test_targets_as_in_the_paper_and_otherwise(tiny_model: Any) -> None:
    everything = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert adapted(tiny_model, MethodConfig(rank=2)) == everything
    assert adapted(tiny_model, MethodConfig(rank=2, targets=("q_proj", "v_proj"))) == {"q_proj", "v_proj"}
    assert adapted(tiny_model, MethodConfig(rank=2, targets=r".*\.mlp\..*")) == {
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    one = inject(tiny_model, MethodConfig(rank=2, targets=("layers.1.mlp.up_proj",)), seed=0)
    assert one.modules == ("model.layers.1.mlp.up_proj",)
    assert one.trainable == 2 * (32 + 64)


PATTERN = {"q_proj": 2, r".*layers\.1\.mlp\..*": 5, "down_proj": 7}


def expected(name: str) -> int:
    if name.endswith("q_proj"):
        return 2
    if "layers.1.mlp." in name:
        return 5
    return 7 if name.endswith("down_proj") else 3


@pytest.mark.parametrize(("name", "rslora"), [("lora", False), ("cla", True), ("paca", False), ("rac", True)])
def test_a_rank_for_each_module_goes_to_peft_and_back(
    tiny_model: Any, tmp_path: Path, name: str, rslora: bool
) -> None:
    plain, fresh = copy.deepcopy(tiny_model), copy.deepcopy(tiny_model)
    links = 2 if name == "rac" else 1
    chain = ChainConfig(links=2) if links == 2 else None
    config = MethodConfig(name=name, rank=3, alpha=6.0, rslora=rslora, rank_pattern=PATTERN, chain=chain)
    inject(tiny_model, config, seed=1)
    for link in range(links):
        if link:
            advance(tiny_model, 1, link)
        for parameter in tiny_model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.05 * torch.randn(parameter.shape))
    folder = export(tiny_model, ArtifactMeta(method=name)).save(tmp_path / "adapter")
    artifact = AdapterArtifact.load(folder)
    for path, factors in artifact.modules.items():
        rank = expected(path)
        assert factors.rank == links * rank
        assert math.isclose(factors.scale, 6.0 / (math.sqrt(rank) if rslora else rank))
    attach(fresh, artifact)
    peft = PeftModel.from_pretrained(plain, str(folder)).eval()
    for model in (fresh, peft):
        # Two layers of seven products each stand between tokens and logits.
        assert_close(logits(model), logits(tiny_model), torch.float32, 64, depth=16)
    peft.save_pretrained(str(tmp_path / "theirs"))
    again = AdapterArtifact.load(tmp_path / "theirs")
    assert {n: f.rank for n, f in again.modules.items()} == {n: f.rank for n, f in artifact.modules.items()}
    attach(fresh, again)
    assert_close(logits(fresh), logits(tiny_model), torch.float32, 64, depth=16)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"rank_pattern": {"q_porj": 2}},
            "rank_pattern 'q_porj' fits no adapted module; did you mean 'q_proj'",
        ),
        (
            {"rank_pattern": {"q_proj": 2}, "targets": ("v_proj",)},
            "rank_pattern 'q_proj' fits no adapted module",
        ),
        (
            {"rank_pattern": {"k_proj": 17}},
            r"rank 17 is above what model.layers.0.self_attn.k_proj \(16x32\)",
        ),
    ],
)
def test_patterns_that_fit_nothing_or_no_layer(tiny_model: Any, change: dict[str, Any], match: str) -> None:
    with pytest.raises(TargetError, match=match):
        inject(tiny_model, MethodConfig(rank=3, **change), seed=0)


def test_a_pattern_of_the_usual_rank_fits(tiny_model: Any) -> None:
    inject(tiny_model, MethodConfig(rank=3, rank_pattern={"q_proj": 3}), seed=0)
