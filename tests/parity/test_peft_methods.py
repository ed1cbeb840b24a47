"""Every method's export in PEFT: chains, ranks by module, GPT-2's transposed layers; and PEFT's own steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers import GPT2Config, GPT2LMHeadModel

from rayft.artifacts import AdapterArtifact, ArtifactMeta
from rayft.methods import METHODS
from rayft.methods.base import AdapterLinear, Chain, ChainConfig, LayerShape, MethodConfig
from rayft.models.inject import advance, attach, clear, export, inject
from rayft.models.targets import linear_shapes
from rayft.numerics import assert_close, generator
from rayft.train.deepspeed import parameter_groups

IDS = torch.randint(0, 250, (2, 9), generator=generator("ids"))
HIDDEN = 64
EXPORTING = [name for name, method in METHODS.items() if method.exports_lora]
CHAINS = [name for name in EXPORTING if isinstance(METHODS[name], Chain)]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def same(one: torch.Tensor, other: torch.Tensor) -> None:
    # Two layers of seven products each stand between tokens and logits.
    assert_close(one, other, torch.float32, HIDDEN, depth=16)


def differ(one: torch.Tensor, other: torch.Tensor) -> None:
    assert (one - other).norm() > other.norm() * torch.finfo(torch.float32).eps * 1000


def move(model: torch.nn.Module, *step: int) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            draw = torch.empty(parameter.shape).normal_(0, 0.2, generator=generator("move", name, *step))
            parameter.data += draw.to(parameter.dtype)


def trained(model: Any, config: MethodConfig) -> torch.Tensor:
    """Inject, train every link a little, and give the logits."""
    base = logits(model)
    inject(model, config, seed=1)
    for link in range(config.links):
        if link:
            before = logits(model)
            advance(model, 1, link)
            same(logits(model), before)
        move(model, link)
    after = logits(model)
    differ(after, base)
    return after


def through_peft(plain: Any, model: Any, name: str, folder: Path) -> tuple[torch.Tensor, AdapterArtifact]:
    artifact = export(model, ArtifactMeta(method=name))
    loaded = PeftModel.from_pretrained(plain, str(artifact.save(folder))).eval()
    return logits(loaded), artifact


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", CHAINS)
def test_chains_are_one_lora(tiny_model: Any, tmp_path: Path, name: str, rslora: bool) -> None:
    plain, fresh = copy.deepcopy(tiny_model), copy.deepcopy(tiny_model)
    # 32 and 64 inputs in windows of 24: the second wraps on the former.
    chain = ChainConfig(links=2)
    ours = trained(
        tiny_model,
        MethodConfig(
            name=name, rank=24, alpha=4.0, rslora=rslora, chain=chain, targets=("o_proj", "down_proj")
        ),
    )
    theirs, artifact = through_peft(plain, tiny_model, name, tmp_path / "adapter")
    same(theirs, ours)
    assert {factors.rank for factors in artifact.modules.values()} == {48}
    attach(fresh, AdapterArtifact.load(tmp_path / "adapter"))
    same(logits(fresh), ours)


@pytest.mark.parametrize("name", EXPORTING)
def test_ranks_by_module(tiny_model: Any, tmp_path: Path, name: str) -> None:
    plain = copy.deepcopy(tiny_model)
    chain = ChainConfig(links=2) if isinstance(METHODS[name], Chain) else None
    pattern = {"q_proj": 5, r".*layers\.1\.mlp\..*": 1}
    ours = trained(tiny_model, MethodConfig(name=name, rank=3, alpha=4.0, rank_pattern=pattern, chain=chain))
    theirs, artifact = through_peft(plain, tiny_model, name, tmp_path / "adapter")
    same(theirs, ours)
    links = 2 if chain else 1
    ranks = {
        module.rsplit(".", 1)[-1]: f.rank for module, f in artifact.modules.items() if "layers.0" in module
    }
    assert ranks["q_proj"] == 5 * links
    assert ranks["k_proj"] == ranks["up_proj"] == 3 * links
    assert artifact.modules["model.layers.1.mlp.up_proj"].rank == links


def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=250, n_positions=16, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2, pad_token_id=0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).requires_grad_(False).eval()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("name", EXPORTING)
def test_transposed_layers(tmp_path: Path, name: str) -> None:
    model, plain = gpt2(), gpt2()
    base = logits(model)
    chain = ChainConfig(links=2) if isinstance(METHODS[name], Chain) else None
    ours = trained(model, MethodConfig(name=name, rank=3, alpha=4.0, chain=chain))
    theirs, artifact = through_peft(plain, model, name, tmp_path / "adapter")
    assert len(artifact.modules) == 8
    same(theirs, ours)
    clear(model)
    assert torch.equal(logits(model), base)


def test_counts_over_transposed_layers() -> None:
    model = gpt2()
    injected = inject(model, MethodConfig(name="cla", rank=3), seed=0)
    shapes = {name: LayerShape(*shape) for name, shape in linear_shapes(model).items()}
    assert shapes["transformer.h.0.mlp.c_fc"] == LayerShape(outputs=128, inputs=32)
    assert injected.trainable == sum(METHODS["cla"].trained(shape, 3) for shape in shapes.values())


def peft_twin(model: Any, plain: Any) -> Any:
    """PEFT's LoRA of the same size, started from our factors, all in float64."""
    config = LoraConfig(r=3, lora_alpha=4, target_modules="all-linear")
    twin = get_peft_model(plain, config, autocast_adapter_dtype=False).double()
    for name, layer in adapters(model).items():
        theirs = twin.base_model.model.get_submodule(name)
        theirs.lora_A["default"].weight.data.copy_(layer.lora_A)
        theirs.lora_B["default"].weight.data.copy_(layer.lora_B)
    return twin


def adapters(model: Any) -> dict[str, Any]:
    layers = ((name, module) for name, module in model.named_modules() if isinstance(module, AdapterLinear))
    return {name: layer.adapter for name, layer in layers if layer.adapter is not None}


def plain_adam(twin: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=LR, weight_decay=0.0)


def lora_plus_adam(twin: Any, ratio: float = 16.0) -> torch.optim.Optimizer:
    return create_loraplus_optimizer(twin, torch.optim.AdamW, lr=LR, loraplus_lr_ratio=ratio)


LR = 1e-3
STEPS = 4


@pytest.mark.parametrize(
    ("name", "ratio", "theirs"),
    [
        ("lora", None, plain_adam),
        ("lora_plus", None, lora_plus_adam),
        ("lora_plus", 5.0, partial(lora_plus_adam, ratio=5.0)),
    ],
    ids=["lora", "lora_plus", "lora_plus-5"],
)
def test_steps_are_pefts(
    tiny_model: Any, name: str, ratio: float | None, theirs: Callable[[Any], torch.optim.Optimizer]
) -> None:
    plain = copy.deepcopy(tiny_model).double()
    model = tiny_model.double()
    config = MethodConfig(name=name, rank=3, alpha=4.0, lr_ratio=ratio)
    inject(model, config, seed=1)
    twin = peft_twin(model, plain)
    run: Any = SimpleNamespace(method=config, optim=SimpleNamespace(lr=LR, weight_decay=0.0))
    optimizers = [torch.optim.AdamW(parameter_groups(run, model), lr=LR), theirs(twin)]
    for _ in range(STEPS):
        for one, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            one(IDS, labels=IDS).loss.backward()
            optimizer.step()
    for module, adapter in adapters(model).items():
        layer = twin.base_model.model.get_submodule(module)
        for ours, other in ((adapter.lora_A, layer.lora_A), (adapter.lora_B, layer.lora_B)):
            # Each step carries the rounding of the last one through a model of sixteen roundings and back.
            assert_close(ours, other["default"].weight, torch.float64, HIDDEN, depth=STEPS * 32)
        assert adapter.lora_B.detach().any()
