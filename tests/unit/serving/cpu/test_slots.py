"""Adapters of one model: whose tokens they change, and what they share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from rayft.artifacts import AdapterArtifact, ArtifactMeta
from rayft.errors import SqueezeError
from rayft.methods.base import LoraFactors
from rayft.models.targets import linear_shapes
from rayft.numerics import assert_close
from rayft.serving.engine.cpu import slots as slots_module
from rayft.serving.engine.cpu.slots import Slots

WIDTH, HIDDEN = 16, 24
FLOAT = torch.float64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down_proj = nn.Linear(HIDDEN, WIDTH)
        self.out = Conv1D(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return y + self.out(y)  # type: ignore[no-any-return]


@pytest.fixture
def model() -> Block:
    torch.manual_seed(0)
    return Block().double().eval()


def adapter(
    model: nn.Module, rank: int, *, squeezed: bool = False, selector: bool = False
) -> AdapterArtifact:
    modules = {}
    for path, (outputs, inputs) in linear_shapes(model).items():
        columns = tuple(torch.randperm(inputs)[:rank].tolist()) if selector else None
        a = (
            torch.eye(inputs, dtype=FLOAT)[list(columns)]
            if columns
            else torch.randn(rank, inputs, dtype=FLOAT)
        )
        modules[path] = LoraFactors(a, torch.randn(outputs, rank, dtype=FLOAT), 0.3, columns)
    values = {path: (1.0,) * rank for path in modules} if squeezed else {}
    return AdapterArtifact(modules, meta=ArtifactMeta(singular_values=values))


def merged(model: Block, adapter: AdapterArtifact | None, x: torch.Tensor) -> torch.Tensor:
    """The model's output with an adapter in its weights."""
    twin: Any = Block().double().eval()
    twin.load_state_dict(model.state_dict())
    for path, found in adapter.modules.items() if adapter else ():
        layer, delta = twin.get_submodule(path), found.scale * found.b @ found.a
        layer.weight.data += delta.T if isinstance(layer, Conv1D) else delta
    out: torch.Tensor = twin(x)
    return out


@torch.no_grad()
def test_each_token_has_its_own_adapter(model: Block) -> None:
    adapters = {
        None: None,
        "one": adapter(model, 3),
        "two": adapter(model, 5),
        "selector": adapter(model, 4, selector=True),
    }
    x = torch.randn(1, 9, WIDTH, dtype=FLOAT)
    expected = {name: merged(model, one, x) for name, one in adapters.items()}
    slots = Slots(model, FLOAT)
    for name, one in adapters.items():
        if name and one:
            slots.load(name, one)
    owners = [None, "one", "one", "two", "one", None, "selector", "two", "one"]
    slots.assign([slots.slot(owner) for owner in owners])
    y = model(x)
    for row, owner in enumerate(owners):
        assert_close(y[0, row], expected[owner][0, row], FLOAT, HIDDEN, depth=8)
    # The next forward has other tokens and other owners.
    slots.assign([slots.slot("two")] * 2)
    assert_close(model(x[:, :2]), expected["two"][:, :2], FLOAT, HIDDEN, depth=8)


@torch.no_grad()
def test_a_batch_of_the_base_touches_no_adapter(model: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, WIDTH, dtype=FLOAT)
    expected = model(x)
    slots = Slots(model, FLOAT)
    slots.load("one", adapter(model, 2))
    monkeypatch.delattr(slots_module, "segment_lora")
    slots.assign([0, 0, 0])
    assert torch.equal(model(x), expected)


def test_a_layer_that_computes_other_rows_than_the_tokens_is_noticed(model: Block) -> None:
    Slots(model, FLOAT).assign([0, 0])
    with pytest.raises(AssertionError, match="computes 3 rows for 2 tokens"):
        model(torch.randn(3, WIDTH, dtype=FLOAT))


@torch.no_grad()
def test_adapters_are_cast_to_the_models_dtype(model: Block) -> None:
    single, x = model.float(), torch.randn(1, WIDTH)
    one, selector = adapter(single, 3), adapter(single, 4, selector=True)
    expected = [merged(single, each, x.double()) for each in (one, selector)]
    slots = Slots(single, torch.float32)
    slots.load("one", slots.cast(one))
    slots.load("selector", slots.cast(selector))
    for name, found in zip(("one", "selector"), expected, strict=True):
        slots.assign([slots.slot(name)])
        assert_close(single(x), found, torch.float32, HIDDEN, depth=8)


@torch.no_grad()
def test_an_unloaded_adapter_is_gone(model: Block) -> None:
    x = torch.randn(1, WIDTH, dtype=FLOAT)
    slots, first, second = Slots(model, FLOAT), adapter(model, 2, squeezed=True), adapter(model, 2)
    slots.assign([0])
    expected = model(x), merged(model, second, x)
    slots.load("one", first)
    old = [slots.slot("one"), slots.slot("one", 1)]
    slots.unload("one")
    with pytest.raises(KeyError):
        slots.slot("one")
    for slot in old:
        slots.assign([slot])
        assert torch.equal(model(x), expected[0])
    slots.load("one", second)
    slots.assign([slots.slot("one")])
    assert_close(model(x), expected[1], FLOAT, HIDDEN, depth=8)


@torch.no_grad()
def test_a_lower_rank_shares_the_adapters_memory(model: Block) -> None:
    whole = adapter(model, 4, squeezed=True)
    x = torch.randn(2, WIDTH, dtype=FLOAT)
    expected = [merged(model, one, x) for one in (whole.at_rank(2), whole)]
    slots = Slots(model, FLOAT)
    slots.load("one", whole)
    full, low = slots.slot("one"), slots.slot("one", 2)
    assert (slots.slot("one", 2), slots.slot("one", 99), slots.slot(None, 2)) == (low, full, 0)
    assert low != full
    for table in slots._tables.values():
        part, all_of_it = table[low], table[full]
        assert part.a is not None
        assert all_of_it.a is not None
        assert (part.a.shape[0], part.b.shape[1]) == (2, 2)
        assert part.a.data_ptr() == all_of_it.a.data_ptr()
        assert part.b.data_ptr() == all_of_it.b.data_ptr()
    slots.assign([low, full])
    y = model(x)
    for row in range(2):
        assert_close(y[row], expected[row][row], FLOAT, HIDDEN, depth=8)
    slots.unload("one")
    assert not any(slots._tables.values())


def test_a_lower_rank_needs_a_squeezed_adapter(model: Block) -> None:
    slots = Slots(model, FLOAT)
    slots.load("plain", adapter(model, 4))
    with pytest.raises(SqueezeError, match="never squeezed"):
        slots.slot("plain", 2)
