"""A decoder layer of vLLM's linears with adapters, on a CPU, and what it computes in float64.

Importing this module skips the tests that do so if vLLM is not installed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from rayft.artifacts import AdapterArtifact
from rayft.errors import RayftError
from rayft.kernels.grouped_lora import DECODE
from rayft.kernels.segment_lora import SlotFactors, reference
from rayft.numerics import assert_close
from rayft.serving.engine.vllm.files import Channel

pytest.importorskip("vllm")
linear = pytest.importorskip("vllm.model_executor.layers.linear")
LoRAMapping = pytest.importorskip("vllm.lora.layers.utils").LoRAMapping
LoRARequest = pytest.importorskip("vllm.lora.request").LoRARequest
worker = pytest.importorskip("rayft.serving.engine.vllm.worker")

HIDDEN, WIDE, HEADS, SHARED_HEADS, SIZE, EXPERTS = 32, 48, 8, 2, 4, 6
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
FUSED = {
    f"{ATTENTION}.qkv_proj": ("q_proj", "k_proj", "v_proj"),
    f"{ATTENTION}.o_proj": ("o_proj",),
    f"{MLP}.gate_up_proj": ("gate_proj", "up_proj"),
    f"{MLP}.down_proj": ("down_proj",),
    f"{MLP}.router": ("router",),
}
SHAPES = {
    f"{ATTENTION}.q_proj": (HEADS * SIZE, HIDDEN),
    f"{ATTENTION}.k_proj": (SHARED_HEADS * SIZE, HIDDEN),
    f"{ATTENTION}.v_proj": (SHARED_HEADS * SIZE, HIDDEN),
    f"{ATTENTION}.o_proj": (HIDDEN, HEADS * SIZE),
    f"{MLP}.gate_proj": (WIDE, HIDDEN),
    f"{MLP}.up_proj": (WIDE, HIDDEN),
    f"{MLP}.down_proj": (HIDDEN, WIDE),
    f"{MLP}.router": (EXPERTS, HIDDEN),
}
BIASED = (f"{ATTENTION}.qkv_proj",)
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
BYTES = 2**20

Tensors = Mapping[str, torch.Tensor]


class Quantised(linear.UnquantizedLinearMethod):  # type: ignore[misc, name-defined]
    """A method of layers whose weights are not what they are multiplied by: here they are halved."""

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> Any:
        return super().apply(layer, 2 * x, bias)


def parts_of(fused: str) -> list[str]:
    """Return the layers of the model's files that a layer fuses."""
    return [f"{fused.rpartition('.')[0]}.{name}" for name in FUSED[fused]]


def new_weights() -> dict[str, torch.Tensor]:
    found = {name: torch.randn(shape) / shape[1] ** 0.5 for name, shape in SHAPES.items()}
    return found | {f"{name}.bias": torch.randn(SHAPES[name][0]) for name in parts_of(*BIASED)}


def module_at(root: nn.Module, path: str, layer: nn.Module) -> None:
    """Put a layer at a path, and make the modules above it."""
    *above, name = path.split(".")
    for part in above:
        if not hasattr(root, part):
            root.add_module(part, nn.Module())
        root = getattr(root, part)
    root.add_module(name, layer)


def new_model(weights: Tensors) -> nn.Module:
    """Make a decoder layer of vLLM's linears, loaded by vLLM."""
    model = nn.Module()
    model.packed_modules_mapping = PACKED  # type: ignore[assignment]
    layers = {
        "qkv_proj": linear.QKVParallelLinear(HIDDEN, SIZE, HEADS, SHARED_HEADS, bias=True),
        "o_proj": linear.RowParallelLinear(HEADS * SIZE, HIDDEN, bias=False, reduce_results=False),
        "gate_up_proj": linear.MergedColumnParallelLinear(HIDDEN, [WIDE, WIDE], bias=False),
        "down_proj": linear.RowParallelLinear(WIDE, HIDDEN, bias=False, reduce_results=False),
        "router": linear.ReplicatedLinear(HIDDEN, EXPERTS, bias=False),
    }
    for fused in FUSED:
        layer = layers[fused.rpartition(".")[2]]
        names = parts_of(fused)
        shards: list[Any] = list("qkv") if len(names) == 3 else [*range(len(names))]
        for name, shard in zip(names, shards, strict=True):
            for parameter, weight in ((layer.weight, name), (getattr(layer, "bias", None), f"{name}.bias")):
                if parameter is not None:
                    parameter.weight_loader(parameter, weights[weight], *([shard] if len(names) > 1 else []))
        module_at(model, fused, layer)
    return model


def configuration(nbytes: int = BYTES, captured: Sequence[int] = ()) -> Any:
    """What the workers read of vLLM's configuration."""
    return SimpleNamespace(
        additional_config={"rayft": {"adapter_bytes": nbytes}},
        model_config=SimpleNamespace(dtype=torch.float32),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=2 * DECODE, max_num_seqs=16),
        compilation_config=SimpleNamespace(cudagraph_capture_sizes=[*captured]),
    )


def managed(model: nn.Module, config: Any = None) -> Any:
    config = config or configuration()
    manager = worker.WorkerManager(config, torch.device("cpu"))
    assert manager.create_lora_manager(model, config) is model
    return manager


def until_loaded(manager: Any, number: int) -> list[str]:
    """Wait as the engine does; return the problem, which is empty if there is none."""
    end = time.monotonic() + 60
    while (answer := manager.loaded(number)) is None:
        assert time.monotonic() < end
        time.sleep(0.001)
    return list(answer)


@contextmanager
def written(manager: Any, artifact: AdapterArtifact) -> Iterator[Path]:
    """Write an adapter for a worker as the engine does."""
    channel = Channel([manager._parts], torch.float32)
    try:
        yield channel.write(artifact)
    finally:
        channel.close()


def load(manager: Any, number: int, artifact: AdapterArtifact) -> list[str]:
    """Load an adapter as the engine does."""
    try:
        with written(manager, artifact) as path:
            manager.begin(number, str(path))
            return until_loaded(manager, number)
    except RayftError as error:
        return [type(error).__name__, str(error)]


@torch.inference_mode()
def activate(manager: Any, numbers: Sequence[int], requests: Sequence[Any] = ()) -> None:
    asked = {LoRARequest(f"n{number}", number, "gone") for number in numbers if number}
    manager.set_active_adapters({*requests} or asked, LoRAMapping(tuple(numbers), tuple(numbers)))


def inputs_of(tokens: int) -> dict[str, torch.Tensor]:
    return {fused: torch.randn(tokens, SHAPES[parts_of(fused)[0]][1]) for fused in FUSED}


@torch.inference_mode()
def outputs_of(model: nn.Module, x: Tensors) -> dict[str, torch.Tensor]:
    """Compute each layer's output with this worker's inputs."""
    found = {}
    for fused in FUSED:
        layer: Any = model.get_submodule(fused)
        here = x[fused]
        if isinstance(layer, linear.RowParallelLinear):
            here = here.chunk(layer.tp_size, dim=1)[layer.tp_rank]
        found[fused] = layer(here)[0]
    return found


def whole(fused: str, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Put the outputs of all workers together; return those of each layer of the files."""
    names, workers = parts_of(fused), len(parts)
    if FUSED[fused] in (("o_proj",), ("down_proj",)):
        return [torch.stack([*parts]).sum(0)]
    if FUSED[fused] == ("router",):
        assert all(torch.equal(part, parts[0]) for part in parts)
        return [parts[0]]
    if len(names) == 2:
        halves = [part.chunk(2, dim=1) for part in parts]
        return [torch.cat(half, dim=1) for half in zip(*halves, strict=True)]
    shared = max(1, workers // SHARED_HEADS)
    width = SHARED_HEADS * SIZE * shared // workers
    thirds = [part.split([HEADS * SIZE // workers, width, width], dim=1) for part in parts]
    query, *others = zip(*thirds, strict=True)
    for other in others:
        for index, part in enumerate(other):
            assert torch.equal(part, other[index // shared * shared]), "workers that share a head differ"
    return [torch.cat(query, dim=1), *(torch.cat(other[::shared], dim=1) for other in others)]


def check(
    results: Sequence[Tensors],
    x: Tensors,
    weights: Tensors,
    numbers: Sequence[int],
    known: Mapping[int, Mapping[str, SlotFactors]],
) -> None:
    """Compare the outputs of all workers with float64."""
    for fused in FUSED:
        found = whole(fused, [result[fused] for result in results])
        for name, y in zip(parts_of(fused), found, strict=True):
            bias = weights.get(f"{name}.bias")
            base = functional.linear(
                x[fused].double(), weights[name].double(), None if bias is None else bias.double()
            )
            own = {number: factors[name] for number, factors in known.items() if name in factors}
            assert_close(y, reference(x[fused], base, numbers, own), torch.float32, WIDE, depth=3)
