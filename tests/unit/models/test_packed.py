"""Adapters of several slots in one model."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rayft.kernels.grouped_linear import Plan
from rayft.methods.base import Adapter, AdapterLinear, MethodConfig
from rayft.models import packed as module
from rayft.models.inject import inject, wrap
from rayft.models.packed import Layout, pack, skeleton
from rayft.models.targets import linears
from rayft.numerics import assert_close


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """The plans that are made."""
    found: list[Plan] = []

    class Counted(Plan):
        def __init__(self, terms: object) -> None:
            super().__init__(terms)  # type: ignore[arg-type]
            found.append(self)

    monkeypatch.setattr(module, "Plan", Counted)
    return found


@pytest.mark.parametrize("training", [True, False])
def test_a_division_of_the_rows_is_planned_once(made: list[Plan], *, training: bool) -> None:
    base = torch.nn.Sequential(AdapterLinear(torch.nn.Linear(6, 5)))
    slots = {number: skeleton(base) for number in (3, 4)}
    for number, own in slots.items():
        inject(own, MethodConfig(rank=2, targets=("0",)), number)
        for layer in linears(own).values():
            torch.nn.init.normal_(layer.adapter.lora_B)  # type: ignore[union-attr,arg-type]
    layout = Layout()
    pack(base, slots, layout)
    x = torch.randn(4, 7, 6)

    def compute(owners: list[int], width: int, *, train: bool) -> torch.Tensor:
        base.train(train)
        layout.enter(owners, width)
        return base(x[: len(owners), :width])  # type: ignore[no-any-return]

    # As many other divisions as are kept, such as those of a validation, leave the plan of training alone.
    first = compute([3, 3, 4, 4], 7, train=training)
    for width in range(1, 7):
        for owners in ([3, 4], [3, 3, 4], [3, 4, 4]):
            compute(owners, width, train=not training)
    assert len(made) == 19
    assert torch.equal(compute([3, 3, 4, 4], 7, train=training), first)
    assert len(made) == 19
    for number, part in ((3, first[:2]), (4, first[2:])):
        alone = slots[number].eval()(x[2 * number - 6 :][:2])
        assert_close(part, alone, torch.float32, 6)
    # Those that were used last are kept.
    compute([3, 4, 4], 6, train=not training)
    assert len(made) == 19
    compute([3, 4], 1, train=not training)
    assert len(made) == 20


class _Counts(torch.nn.Linear):
    """A layer that says itself how it is copied."""

    copies = 0

    def __deepcopy__(self, memo: dict[int, object]) -> _Counts:
        _Counts.copies += 1
        return _Counts(self.in_features, self.out_features)


def test_a_skeleton_shares_tensors_and_nothing_else() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes)).eval()  # type: ignore[arg-type]
    wrap(base)
    base.register_buffer("places", torch.arange(3))
    heard: list[object] = []
    base.lm_head.register_forward_pre_hook(lambda layer, _: heard.append(layer))
    base.first = base.model.layers[0]
    own = skeleton(base)
    for one, other in ((base, own), (own, base)):
        mine = dict(one.named_modules(remove_duplicate=False))
        others = dict(other.named_modules(remove_duplicate=False))
        assert [*mine] == [*others]
        assert all(type(mine[name]) is type(others[name]) for name in mine)
        assert not {*map(id, mine.values())} & {*map(id, others.values())}
    assert own.first is own.model.layers[0]
    for name, tensor in [*base.named_parameters(), *base.named_buffers()]:
        shared = own.get_parameter(name) if name in dict(base.named_parameters()) else own.get_buffer(name)
        assert shared is tensor
    # Its containers are its own.
    inject(own, MethodConfig(rank=2), 0)
    own.lm_head.register_forward_hook(lambda *_: None)
    own.config.use_cache = False
    assert not any("lora" in name for name, _ in base.named_parameters())
    assert not base.lm_head._forward_hooks
    assert base.config.use_cache
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(own(input_ids=ids).logits, base(input_ids=ids).logits)
    assert heard == [own.lm_head, base.lm_head]


def test_a_module_that_copies_itself_is_asked_to() -> None:
    base = torch.nn.Sequential(_Counts(3, 2), torch.nn.Linear(2, 2))
    own = skeleton(base)
    assert _Counts.copies == 1
    assert type(own[0]) is _Counts
    assert own[1].weight is base[1].weight


def test_a_skeleton_of_a_skeleton_keeps_the_handles_of_hooks() -> None:
    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=16
    )
    base = LlamaForCausalLM(config)
    base.enable_input_require_grads()
    own = skeleton(skeleton(base))
    ids = torch.tensor([[1, 2]])
    assert own.get_input_embeddings()(ids).requires_grad
    own.disable_input_require_grads()
    own.requires_grad_(requires_grad=False)
    assert not own.get_input_embeddings()(ids).requires_grad
    assert base.get_input_embeddings()(ids).requires_grad


def test_a_slot_that_has_all_rows_computes_them_as_alone(made: list[Plan]) -> None:
    base = torch.nn.Sequential(AdapterLinear(torch.nn.Linear(6, 5)))
    slots = {number: skeleton(base) for number in (0, 1)}
    for number, own in slots.items():
        inject(own, MethodConfig(rank=2, targets=("0",)), number)
        torch.nn.init.normal_(own[0].adapter.lora_B)
    layout = Layout()
    pack(base, slots, layout)
    x = torch.randn(4, 7, 6)
    layout.enter([1] * 4, 7)
    assert torch.equal(base(x), slots[1](x))
    assert not made
    layout.enter([0, 1, 1, 1], 7)
    assert_close(base(x)[1:], slots[1](x[1:]), torch.float32, 6)
    assert len(made) == 1


def test_an_adapter_without_terms_is_added_to_its_own_rows(made: list[Plan]) -> None:
    base = torch.nn.Sequential(AdapterLinear(torch.nn.Linear(6, 5)))
    slots = {number: skeleton(base) for number in (0, 1, 2)}
    for number, own in slots.items():
        inject(own, MethodConfig(rank=2, targets=("0",)), number)
        torch.nn.init.normal_(own[0].adapter.lora_B)
    slots[1][0].adapter.terms = lambda rows: Adapter.terms(slots[1][0].adapter, rows)
    layout = Layout()
    pack(base, slots, layout)
    x = torch.randn(4, 7, 6)
    layout.enter([0, 1, 1, 2], 7)
    # A captured graph is replayed with batches of every width.
    layout.widths[1] = 3
    y = base(x)
    y.square().sum().backward()
    (plan,) = made
    assert [term.rows.start for term in plan.terms] == [0, 21]
    for number, rows in ((0, slice(1)), (1, slice(1, 3)), (2, slice(3, 4))):
        adapter = slots[number][0].adapter
        packed = adapter.lora_B.grad.clone()
        adapter.zero_grad()
        alone = slots[number](x[rows])
        alone.square().sum().backward()
        assert_close(y[rows], alone, torch.float32, 6)
        assert_close(packed, adapter.lora_B.grad, torch.float32, 64)
