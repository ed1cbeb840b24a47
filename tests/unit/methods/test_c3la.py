"""c³LA's windows, one after the other, cover every input; the last one wraps."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rayft.errors import TargetError
from rayft.methods.base import AdapterLinear, LayerShape, MethodConfig
from rayft.methods.c3la import METHOD, WindowChain, windows
from rayft.numerics import assert_close, generator


def built(inputs: int, rank: int) -> AdapterLinear:
    layer = AdapterLinear(nn.Linear(inputs, 3, dtype=torch.float64).requires_grad_(False))
    layer.adapter = METHOD.build(layer, MethodConfig(name="c3la", rank=rank), generator(0))
    return layer


def chain(inputs: int, rank: int, links: int) -> AdapterLinear:
    """A chain whose links have all been trained; link j's B is full of j."""
    layer = built(inputs, rank)
    assert isinstance(layer.adapter, WindowChain)
    for link in range(1, links + 1):
        if link > 1:
            layer.adapter.advance(generator("unused"))
        layer.adapter.lora_B.data.fill_(link)
    return layer


@pytest.mark.parametrize(
    ("inputs", "rank", "expected"),
    [
        (6, 2, [0, 1, 2, 3, 4, 5]),
        (5, 2, [0, 1, 2, 3, 4, 0]),
        (7, 5, [0, 1, 2, 3, 4, 5, 6, 0, 1, 2]),
        (4, 4, [0, 1, 2, 3]),
    ],
)
def test_the_windows(inputs: int, rank: int, expected: list[int]) -> None:
    most = windows(LayerShape(outputs=3, inputs=inputs), rank)
    assert most == len(expected) // rank
    adapter = chain(inputs, rank, most).adapter
    assert isinstance(adapter, WindowChain)
    assert adapter.columns.tolist() == expected
    assert set(expected) == set(range(inputs))


def test_a_column_of_two_links_gets_both_their_shares() -> None:
    layer = chain(5, 2, 3)
    assert layer.adapter is not None
    # Links 1 and 3 both select input 0; α is 2·rank, so s = 2.
    expected = 2.0 * torch.tensor([1 + 3, 1, 2, 2, 3]).double().expand(3, 5)
    assert torch.equal(layer.adapter.delta(layer.weight), expected)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert_close(y, x @ (layer.weight + expected).t() + layer.bias, torch.float64, 5, depth=4)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert_close(gradient, (layer.weight + expected).sum(0).expand(4, 5), torch.float64, 5, depth=4)


def test_disjoint_links_are_the_blocks_of_one_wide_cla() -> None:
    adapter = chain(6, 2, 3).adapter
    assert adapter is not None
    factors = adapter.to_lora()
    assert torch.equal(factors.a, torch.eye(6, dtype=torch.float64))
    assert factors.b[0].tolist() == [1, 1, 2, 2, 3, 3]


def test_a_chain_ends_where_every_input_was_selected() -> None:
    with pytest.raises(TargetError, match=r"a chain of 4 links of rank 2 .* h\.0 \(3x5\) .* at most 3 links"):
        METHOD.check(LayerShape(outputs=3, inputs=5), 2, "h.0", links=4)


def test_nothing_is_drawn() -> None:
    one, other = built(6, 2).adapter, built(6, 2).adapter
    assert isinstance(one, WindowChain)
    assert isinstance(other, WindowChain)
    one.advance(generator(1))
    other.advance(generator(2))
    assert one.columns.tolist() == other.columns.tolist() == [0, 1, 2, 3]
