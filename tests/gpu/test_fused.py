"""Fused bases on a GPU: as near to float32 as plain ones, compiled once, and the same by CUDA graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from rayft.data.pack import Batch
from rayft.data.section import DataConfig
from rayft.evaluate.loss import batch_loss, target_losses
from rayft.kernels.linear_cross_entropy import linear_cross_entropy, reference
from rayft.methods.base import MethodConfig
from rayft.models.attention import attend_by_segments
from rayft.models.fuse import fuse, is_fused, plainly
from rayft.models.inject import inject
from rayft.models.load import ModelConfig
from rayft.numerics import relative_error
from rayft.train.fused import fuse_checked
from rayft.train.graphs import capture_stream, graphed
from rayft.train.run import EvaluateConfig, OptimConfig, RunConfig, ScaleConfig
from rayft.train.session import Session
from rayft.train.trainer import Reporter, Trainer, TrainResult
from rayft.train.worker import Worker
from tests.gpu.sums import sums

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="operations are compiled for GPUs"),
]

FURTHER = 1.5
"""Most that a fused model may be from float32, times the distance of the plain one."""
ROWS, WIDTH, VOCABULARY = 2, 256, 4096
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
    "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def model_of(kind: str) -> Any:
    """Return a random frozen model in bfloat16, with adapters that do something."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SIZES)).bfloat16()
    model.requires_grad_(False)
    inject(model, MethodConfig(rank=8), seed=0)
    with torch.no_grad():
        for parameter in trained(model):
            parameter.add_(torch.randn_like(parameter) * 0.02)
    attend_by_segments(model)
    return model.train()


def trained(model: Any) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def batch_of(rows: int = ROWS, width: int = WIDTH) -> Batch:
    """Return packed rows of three segments each; a third of the tokens is learnt."""
    torch.manual_seed(1)
    lengths = [width // 2, width // 4, width - width // 2 - width // 4] * rows
    place = torch.arange(0, rows * width - 1, 3)
    return Batch(
        input_ids=torch.randint(1, VOCABULARY, (rows, width)),
        position_ids=torch.cat([torch.arange(length) for length in lengths]).view(rows, width),
        offsets=torch.tensor([0, *lengths]).cumsum(0).int(),
        completion_index=place,
        targets=torch.randint(1, VOCABULARY, place.shape),
    ).to("cuda")


def computed(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the losses, and the adapters' gradients of a weighted sum of them, in one vector."""
    losses = target_losses(model, batch)
    outer = torch.linspace(0.5, 1.5, len(losses), device="cuda") / len(losses)
    gradients = torch.autograd.grad(losses, trained(model), outer)
    return losses.detach(), torch.cat([one.double().flatten() for one in gradients])


def assert_no_further(model: Any, found: tuple[torch.Tensor, torch.Tensor], batch: Batch) -> None:
    """Assert that what a fused model computed is as near to float32 as what the plain one computes."""
    with plainly(model):
        plain = computed(model, batch)
        model.float()
        exact = computed(model, batch)
        model.bfloat16()
    for mine, other, expected in zip(found, plain, exact, strict=True):
        allowed, error = FURTHER * relative_error(other, expected), relative_error(mine, expected)
        assert 0 < error <= allowed, f"{error:.2e}, allowed {allowed:.2e}"


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma", "olmo2", "phi3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_fused_models_are_no_further_from_float32(kind: str, checkpointing: bool) -> None:
    model, batch = model_of(kind), batch_of()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert fuse(model)
    assert_no_further(model, computed(model, batch), batch)


def test_other_shapes_are_not_compiled_again() -> None:
    model = model_of("llama")
    fuse(model)
    batch = batch_of()
    computed(model, batch)
    with torch.inference_mode():
        batch_loss(model, batch)
    before = counters["stats"]["unique_graphs"]
    for rows, width in ((3, 256), (1, 264), (2, 72)):
        batch = batch_of(rows, width)
        found = computed(model, batch)
        with torch.inference_mode():
            batch_loss(model, batch)
    assert counters["stats"]["unique_graphs"] == before
    assert_no_further(model, found, batch)


def test_by_cuda_graphs_they_compute_the_same() -> None:
    model, batch = model_of("llama"), batch_of()
    fuse(model)
    eager = computed(model, batch)
    with capture_stream(), graphed(model, batch):
        found = computed(model, batch)
        again = computed(model, batch)
    for one, other, third in zip(found, eager, again, strict=True):
        assert torch.equal(one, third)
        assert relative_error(one, other) <= 4 * torch.finfo(torch.bfloat16).eps
    assert_no_further(model, found, batch)


def test_a_base_passes_the_check_of_a_session() -> None:
    model = model_of("qwen3").eval()
    tokens = torch.randint(1, VOCABULARY, (513,), device="cuda")
    assert fuse_checked(model, tokens, torch.bfloat16) == ""
    assert is_fused(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_loss_in_chunks_is_as_near_as_that_of_all_logits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(4099, 320, device="cuda", dtype=dtype).requires_grad_()
    weight = torch.randn(5003, 320, device="cuda", dtype=dtype) * 0.1
    targets = torch.randint(0, 5003, (4099,), device="cuda")
    exact = hidden.detach().double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact @ weight.double().t(), targets, reduction="none")
    outer = torch.rand(4099, device="cuda")
    (direction,) = torch.autograd.grad(expected, exact, outer.double())

    def errors(function: Any) -> list[float]:
        losses = function(hidden, weight, targets)
        (gradient,) = torch.autograd.grad(losses, hidden, outer)
        return [relative_error(losses, expected), relative_error(gradient, direction)]

    for mine, plain in zip(errors(linear_cross_entropy), errors(reference), strict=True):
        assert mine <= FURTHER * plain
    first, second = (linear_cross_entropy(hidden, weight, targets) for _ in range(2))
    assert torch.equal(first, second)


def test_the_loss_takes_less_memory_than_the_logits() -> None:
    hidden = torch.randn(16384, 256, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(32000, 256, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(0, 32000, (16384,), device="cuda")
    linear_cross_entropy(hidden, weight, targets)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_cross_entropy(hidden, weight, targets).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 16384 * 32000 * 4 / 4


def train(folder: Path, name: str, **scale: Any) -> tuple[TrainResult, Session]:
    run = RunConfig(
        model=ModelConfig(name="tiny-llama"),
        data=DataConfig(source="jsonl", name=sums(folder), val=10, test=10, max_length=128),
        method=MethodConfig(name=name, rank=4),
        optim=OptimConfig(lr=1e-2, steps=8, rows_per_step=4),
        scale=ScaleConfig(device="cuda", dtype="bfloat16", zero=2, threads=1, accumulation=1, **scale),
        evaluate=EvaluateConfig(every=2),
    )
    session = Session.open(run, Worker(device="cuda:0"))
    return Trainer(run, session, Reporter(), folder / f"{name}-{len(scale)}").fit(), session


@pytest.mark.usefixtures("nccl_group")
@pytest.mark.parametrize("name", ["lora", "cla", "paca", "full"])
@pytest.mark.parametrize(
    "scale", [{"graphs": True}, {"graphs": False, "activation_checkpointing": True}, {"graphs": False}]
)
def test_runs_with_a_fused_base_learn_what_plain_ones_do(
    name: str, scale: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "plain").mkdir()
    plain, other = train(tmp_path / "plain", name, **scale, fused=False)
    found, session = train(tmp_path, name, **scale)
    assert is_fused(session.loaded.model)
    assert not is_fused(other.loaded.model)
    for (_, one), (_, two) in zip(found.train_curve, plain.train_curve, strict=True):
        assert abs(one - two) <= 16 * torch.finfo(torch.bfloat16).eps * abs(two)
