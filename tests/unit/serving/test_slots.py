"""Which linears compute together, and how slots are given out."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from rayft.errors import ResourceError
from rayft.methods.base import LoraFactors
from rayft.numerics import assert_close
from rayft.serving import slots as slots_module
from rayft.serving.slots import MultiAdapterLinear, Slots

WIDTH, KV, HIDDEN = 16, 8, 24


class Attention(nn.Module):
    """Two siblings that read one input; the third reads another."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, KV, bias=False)
        self.v_proj, self.o_proj = nn.Linear(WIDTH, KV), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, v = self.q_proj(x), self.v_proj(2 * x)
        out: torch.Tensor = self.o_proj(q + torch.cat((self.k_proj(x), v), -1))
        return out


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN)
        self.down_proj = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x)
        out: torch.Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


@pytest.fixture
def model() -> Block:
    torch.manual_seed(0)
    return Block().double().eval()


def factors(model: nn.Module, rank: int) -> dict[str, LoraFactors]:
    return {
        path: LoraFactors(
            torch.randn(rank, module.in_features, dtype=torch.float64),
            torch.randn(module.out_features, rank, dtype=torch.float64),
            0.3,
        )
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, MultiAdapterLinear))
    }


def merged(model: Block, adapter: dict[str, LoraFactors], x: torch.Tensor) -> torch.Tensor:
    """The model's output with an adapter in its weights."""
    twin = Block().double().eval()
    twin.load_state_dict(model.state_dict())
    for path, found in adapter.items():
        linear = twin.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        linear.weight.data += found.scale * found.b @ found.a
    out: torch.Tensor = twin(x)
    return out


@torch.no_grad()
def test_siblings_that_read_another_input_than_they_should_are_still_right(model: Block) -> None:
    one, two = factors(model, 3), factors(model, 5)
    x = torch.randn(7, WIDTH, dtype=torch.float64)
    expected = [model(x), merged(model, one, x), merged(model, two, x)]
    slots = Slots(model)
    slots.load("one", one)
    slots.load("two", two)
    owners = [None, "one", "two", "one", None, "two", "one"]
    for _ in range(2):
        slots.assign([slots.slot(owner) for owner in owners])
        assert slots.in_use
        y = model(x)
        for row, owner in enumerate(owners):
            which = [None, "one", "two"].index(owner)
            assert_close(y[row], expected[which][row], torch.float64, HIDDEN, depth=6)
        x, expected = x.flip(0).contiguous(), [whole.flip(0) for whole in expected]
        owners.reverse()


@torch.no_grad()
def test_siblings_are_computed_together_once(model: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = slots_module.grouped_lora
    monkeypatch.setattr(
        slots_module,
        "grouped_lora",
        lambda x, ys, *rest, **named: (calls.append(len(ys)), real(x, ys, *rest, **named)),
    )
    slots = Slots(model)
    slots.load("one", factors(model, 2))
    slots.assign([slots.slot("one")])
    model(torch.randn(1, WIDTH, dtype=torch.float64))
    # v reads something else than q and k: each of the three runs the group; gate and up share one call.
    assert calls == [3, 3, 3, 1, 2, 1]


@torch.no_grad()
def test_a_batch_of_the_bases_alone_touches_no_adapter(model: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    expected = model(x)
    slots = Slots(model)
    slots.load("one", factors(model, 2))
    monkeypatch.delattr(slots_module, "grouped_lora")
    slots.assign([0, 0, 0])
    assert not slots.in_use
    assert torch.equal(model(x), expected)


def test_slots_are_used_again_and_end(model: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots_module, "SLOTS", 3)
    slots = Slots(model)
    adapter = factors(model, 2)
    slots.load("one", adapter)
    slots.load("two", adapter)
    first = slots.slot("one")
    with pytest.raises(ResourceError, match="2 adapters"):
        slots.load("three", adapter)
    slots.unload("one")
    with pytest.raises(KeyError):
        slots.slot("one")
    slots.load("three", adapter)
    assert slots.slot("three") == first


def test_a_load_that_fails_takes_no_slot(model: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots_module, "SLOTS", 2)
    slots = Slots(model)
    adapter = factors(model, 2)
    with pytest.raises(AssertionError):
        slots.load("bad", {path: LoraFactors(f.a[:, :1], f.b, f.scale) for path, f in adapter.items()})
    slots.load("good", adapter)
