"""Layers that add each token's adapter, on a CPU and against float64; tests/gpu has kernels and graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional

from rayft.kernels.grouped_lora import DECODE, AdapterTable, Group
from rayft.kernels.segment_lora import SlotFactors, reference
from rayft.numerics import assert_close, relative_error
from rayft.serving.engine.vllm import adapters
from rayft.serving.engine.vllm.adapters import AdaptedLinear, Batch, Site
from rayft.serving.engine.vllm.shard import Part

INPUTS, SIZES = 32, {"q": 24, "k": 8, "v": 8}
MIXED = [3, 0, 7, 9, 9, 3, 0, 11]
"""Slots of tokens: 7 has all parts, 3 and 9 only some, 0 is the base, and 11 is empty."""
LENGTHS = pytest.mark.parametrize("tokens", [len(MIXED), DECODE + 9], ids=["decode", "prefill"])
WEIGHTS = pytest.mark.parametrize("dense", [True, False], ids=["dense", "quantised"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)

Adapters = Mapping[int, Mapping[str, SlotFactors]]


@dataclass
class Fused:
    """A layer that fuses q, k and v, with adapters in three slots."""

    table: AdapterTable
    batch: Batch
    linear: AdaptedLinear
    weight: torch.Tensor
    bias: torch.Tensor
    adapters: dict[int, Mapping[str, SlotFactors]]

    def assign(self, slots: Sequence[int]) -> None:
        self.batch.assign(np.array(slots, dtype=np.int32))

    def expected(self, x: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
        y = functional.linear(x.double(), self.weight.double(), self.bias.double())
        found = []
        for name, part in zip(SIZES, y.split([*SIZES.values()], dim=1), strict=True):
            known = {slot: factors[name] for slot, factors in self.adapters.items() if name in factors}
            found.append(reference(x, part, slots, known))
        return torch.cat(found, dim=1)

    def check(self, y: torch.Tensor, x: torch.Tensor, slots: Sequence[int]) -> None:
        assert_close(y, self.expected(x, slots), self.table.dtype, INPUTS, depth=3)


def lora(outputs: int, rank: int, dtype: torch.dtype) -> SlotFactors:
    b, a = torch.randn(outputs, rank, dtype=dtype), torch.randn(rank, INPUTS, dtype=dtype)
    return SlotFactors(b=b, scale=0.5, a=a)


def selector(outputs: int, columns: Sequence[int], dtype: torch.dtype) -> SlotFactors:
    b = torch.randn(outputs, len(columns), dtype=dtype)
    return SlotFactors(b=b, scale=2.0, columns=torch.tensor(columns))


def fused(dtype: torch.dtype = torch.float32, *, dense: bool = True, captured: Sequence[int] = ()) -> Fused:
    table = AdapterTable(16, [Group(INPUTS, SIZES)], dtype=dtype, device="cpu")
    known: dict[int, Mapping[str, SlotFactors]] = {
        3: {"q": lora(24, 4, dtype), "v": lora(8, 4, dtype)},
        7: {name: lora(size, 19, dtype) for name, size in SIZES.items()},
        9: {"k": selector(8, [30, 1, 5], dtype)},
    }
    for slot, factors in known.items():
        table.set(slot, factors)
    bias = torch.randn(sum(SIZES.values()), dtype=dtype)
    weight = torch.randn(len(bias), INPUTS, dtype=dtype)
    parts = tuple(Part(name, (size, INPUTS), (0, size), (0, INPUTS)) for name, size in SIZES.items())
    site = Site(0, parts, partial(product, weight), (lambda: weight) if dense else None)
    batch = Batch(table, tokens=DECODE + 64, requests=8, captured=captured)
    return Fused(table, batch, AdaptedLinear(site, batch), weight, bias, known)


@LENGTHS
@WEIGHTS
@DTYPES
def test_each_token_has_its_own_adapter(dtype: torch.dtype, dense: bool, tokens: int) -> None:
    made = fused(dtype, dense=dense)
    slots = (MIXED * DECODE)[:tokens]
    x = torch.randn(tokens, INPUTS, dtype=dtype)
    made.assign(slots)
    found = made.linear(x, made.bias)
    made.check(found, x, slots)
    assert found.dtype == dtype
    assert relative_error(found, functional.linear(x, made.weight, made.bias)) > 0.1


@LENGTHS
@WEIGHTS
def test_tokens_without_an_adapter_have_the_bases_product(dense: bool, tokens: int) -> None:
    made = fused(dense=dense)
    slots = (MIXED * DECODE)[:tokens]
    x = torch.randn(tokens, INPUTS)
    made.assign(slots)
    rows = [row for row, slot in enumerate(slots) if slot in (0, 11)]
    expected = functional.linear(x, made.weight, made.bias)[rows]
    assert_close(made.linear(x, made.bias)[rows], expected, torch.float32, INPUTS)


@LENGTHS
@WEIGHTS
def test_a_step_without_adapters_is_exactly_the_bases(
    dense: bool, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = fused(dense=dense)
    made.assign([7] * tokens)
    made.linear(torch.randn(tokens, INPUTS), made.bias)
    monkeypatch.setattr(adapters, "grouped_lora", lambda *_, **__: pytest.fail("adapters are computed"))
    made.batch.assign(None)
    x = torch.randn(tokens, INPUTS)
    assert torch.equal(made.linear(x, made.bias), functional.linear(x, made.weight, made.bias))


@LENGTHS
def test_an_input_of_three_dimensions_keeps_them(tokens: int) -> None:
    slots = (MIXED * DECODE)[: 2 * tokens]
    x = torch.randn(2, tokens, INPUTS)
    made = fused(captured=[2 * tokens])
    made.assign(slots)
    found = made.linear(x, made.bias)
    assert found.shape == (2, tokens, 40)
    made.check(found.view(2 * tokens, -1), x.view(2 * tokens, -1), slots)


def test_tokens_that_a_graph_adds_are_the_bases() -> None:
    made = fused(captured=[4, 16])
    made.assign([7] * 12)
    made.assign([3, 9])
    # A graph of 16 tokens is replayed with 2.
    x = torch.randn(16, INPUTS)
    made.check(made.linear(x, made.bias), x, [3, 9] + [0] * 14)


def test_there_is_room_for_the_largest_captured_step() -> None:
    made = fused(captured=[2 * DECODE])
    made.assign([7] * (2 * DECODE))
    x = torch.randn(2 * DECODE, INPUTS)
    made.check(made.linear(x, made.bias), x, [7] * (2 * DECODE))


def test_a_step_of_unloaded_adapters_uses_none_of_the_step_before() -> None:
    made = fused()
    made.assign([7, 7, 3])
    made.assign([0, 0, 0])
    x = torch.randn(3, INPUTS)
    made.check(made.linear(x, made.bias), x, [0, 0, 0])


def test_a_step_like_the_last_one_with_adapters_is_seen_after_one_without() -> None:
    made = fused()
    x = torch.randn(3, INPUTS)
    for slots in ([7, 7, 3], None, [7, 7, 3], [7, 3, 3], None, [7, 7, 3]):
        made.batch.assign(None if slots is None else np.array(slots, dtype=np.int32))
        made.check(made.linear(x, made.bias), x, slots or [0, 0, 0])


def test_a_slot_that_holds_another_adapter_is_seen_in_an_equal_step() -> None:
    made = fused()
    x = torch.randn(3, INPUTS)
    for factors in ({"k": lora(8, 2, torch.float32)}, {}, {"q": lora(24, 5, torch.float32)}):
        made.table.set(3, factors)
        made.adapters[3] = factors
        made.assign([3, 7, 3])
        made.check(made.linear(x, made.bias), x, [3, 7, 3])


class Three(nn.Module):
    """Three layers with adapters, one after the other."""

    def __init__(self, layers: Sequence[Fused]) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer.linear(x, layer.bias)[:, :INPUTS]) + x
        return x


def product(weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return functional.linear(x, weight, bias)


def three() -> tuple[Batch, Three, Adapters]:
    """Return a module of three layers, which share a batch, and the adapters of the first and the last."""
    names = "abc"
    groups = [Group(INPUTS, {name: INPUTS}) for name in names]
    table = AdapterTable(16, groups, dtype=torch.float32, device="cpu")
    known = {
        1: {name: lora(INPUTS, 3, torch.float32) for name in "ac"},
        2: {"a": selector(INPUTS, [4, 0], torch.float32)},
    }
    for slot, factors in known.items():
        table.set(slot, factors)
    batch = Batch(table, tokens=64, requests=8, captured=())
    layers = []
    for index, name in enumerate(names):
        weight, bias = torch.randn(INPUTS, INPUTS) / INPUTS**0.5, torch.randn(INPUTS)
        part = Part(name, (INPUTS, INPUTS), (0, INPUTS), (0, INPUTS))
        site = Site(index, (part,), partial(product, weight))
        layers.append(Fused(table, batch, AdaptedLinear(site, batch), weight, bias, {}))
    return batch, Three(layers), known


def compute_three(x: torch.Tensor, model: Three, slots: Sequence[int], known: Adapters) -> torch.Tensor:
    x = x.double()
    for layer, name in zip(model.layers, "abc", strict=True):
        y = functional.linear(x, layer.weight.double(), layer.bias.double())
        own = {slot: factors[name] for slot, factors in known.items() if name in factors}
        x = torch.tanh(reference(x, y, slots, own)) + x
    return x


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_compiled_graph_serves_all_steps(backend: str) -> None:
    torch.compiler.reset()
    batch, model, known = three()
    counted = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counted)
    x = torch.randn(4, INPUTS)
    for slots in ([1, 2, 0, 1], None, [2, 2, 2, 2], [0, 0, 0, 1]):
        batch.assign(None if slots is None else np.array(slots, dtype=np.int32))
        expected = compute_three(x, model, slots or [0] * 4, known)
        assert_close(compiled(x), expected, torch.float32, INPUTS, depth=9)
    assert counted.frame_count == 1


def test_steps_of_any_length_are_traced_once() -> None:
    torch.compiler.reset()
    batch, model, known = three()
    counted = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counted, dynamic=True)
    for tokens in (4, 7, 19):
        slots = ([1, 2, 0] * tokens)[:tokens]
        batch.assign(np.array(slots, dtype=np.int32))
        x = torch.randn(tokens, INPUTS)
        assert_close(compiled(x), compute_three(x, model, slots, known), torch.float32, INPUTS, depth=9)
    assert counted.frame_count == 1


def test_layers_that_are_alike_have_one_graph() -> None:
    batch, model, _ = three()
    batch.assign(None)
    traced: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        traced.append(graph.code)
        return graph

    for layer in model.layers:
        torch.compiler.reset()
        torch.compile(layer.linear, fullgraph=True, backend=backend)(torch.randn(4, INPUTS), layer.bias)
    assert len(traced) == 3
    assert len({*traced}) == 1


def test_a_copy_of_a_layers_handle_stands_for_it_too() -> None:
    made = fused()
    # A copy must not be taken for a layer that is gone, whose address it could get.
    others = [fused() for _ in range(200)]
    others.clear()
    made.assign(MIXED)
    x = torch.randn(len(MIXED), INPUTS)
    copies = [made.linear._handle.clone() for _ in range(500)]
    for copy in copies:
        found = torch.ops.rayft.adapted_linear(x, copy, made.bias, 40)
        assert torch.equal(found, made.linear(x, made.bias))


@pytest.mark.parametrize("shape", [(8, INPUTS), (2, 4, INPUTS)], ids=str)
def test_the_operator_is_what_it_is_declared_to_be(shape: tuple[int, ...]) -> None:
    made = fused()
    made.assign(MIXED)
    torch.library.opcheck(
        torch.ops.rayft.adapted_linear.default,
        (torch.randn(shape), made.linear._handle, made.bias, 40),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_a_step_without_adapters_leaves_no_slots_behind() -> None:
    table = AdapterTable(4, [Group(8, {"one": 8})], dtype=torch.float32, device="cpu")
    batch = Batch(table, tokens=6, requests=4, captured=())
    batch.assign(np.array([1, 2, 0], dtype=np.int32))
    assert batch.slots.tolist() == [1, 2, 0, 0, 0, 0]
    batch.assign(None)
    assert not batch.active
    assert not batch.slots.any()
    batch.assign(np.array([1, 2, 0], dtype=np.int32))
    assert batch.slots.tolist() == [1, 2, 0, 0, 0, 0]
