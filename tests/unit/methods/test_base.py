"""The scale's definition, the layer that takes a linear's place, and the registry."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional

from rayft.config import parse
from rayft.errors import ConfigError, MethodError, TargetError
from rayft.methods import METHODS
from rayft.methods.base import Adapter, AdapterLinear, LayerShape, LoraFactors, MethodConfig
from rayft.methods.lora import LoraAdapter
from rayft.models.methods import method
from rayft.numerics import assert_close, generator
from tests.contract.cases import Quantised


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"rank": 8, "alpha": 16.0}, 2.0),
        ({"rank": 8, "alpha": 4.0}, 0.5),
        ({"rank": 16}, 2.0),
        ({"rank": 16, "alpha": 8.0, "rslora": True}, 2.0),
        ({"rank": 9, "rslora": True}, 6.0),
        ({"rank": 3, "alpha": 1.0, "rslora": True}, 1 / math.sqrt(3)),
    ],
)
def test_the_scale_is_alpha_over_the_rank_or_its_root(options: dict[str, float], scale: float) -> None:
    assert MethodConfig.model_validate(options).scale == scale


@pytest.mark.parametrize(
    "bad", [{"rank": 0}, {"alpha": 0.0}, {"alpha": -1.0}, {"targets": ""}, {"targets": []}]
)
def test_impossible_settings_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        parse(MethodConfig, bad)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        MethodConfig().rank = 3


def test_a_method_is_found_by_its_name() -> None:
    assert method("cla") is METHODS["cla"]
    with pytest.raises(MethodError, match=r"^unknown method 'lroa'; did you mean 'lora'\?$"):
        method("lroa")


def test_a_rank_too_high_names_the_module_and_the_limit() -> None:
    shape = LayerShape(outputs=7, inputs=5)
    expected = r"rank 6 is above what layers\.0\.q_proj \(7x5\) can hold with 'lora': use a rank of at most 5"
    with pytest.raises(TargetError, match=expected):
        METHODS["lora"].check(shape, 6, "layers.0.q_proj")
    METHODS["lora"].check(shape, 5, "layers.0.q_proj")


@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_takes_over_the_linears_own_parameters(bias: bool) -> None:
    linear = nn.Linear(5, 7, bias=bias)
    layer = AdapterLinear(linear)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert list(layer.state_dict()) == list(linear.state_dict())
    x = torch.randn(2, 3, 5)
    assert torch.equal(layer(x), functional.linear(x, linear.weight, linear.bias))
    assert layer.shape == LayerShape(outputs=7, inputs=5)
    assert repr(layer).startswith("AdapterLinear(in_features=5, out_features=7")


def test_an_adapter_can_be_taken_out_again() -> None:
    linear = nn.Linear(5, 7)
    layer = AdapterLinear(linear, LoraAdapter(torch.ones(2, 5), torch.ones(7, 2), 1.0))
    x = torch.randn(3, 5)
    assert not torch.equal(layer(x), linear(x))
    assert set(layer.state_dict()) == {"weight", "bias", "adapter.lora_A", "adapter.lora_B"}
    layer.adapter = None
    assert torch.equal(layer(x), linear(x))


def test_factors_multiply_to_the_scaled_delta() -> None:
    factors = LoraFactors(a=torch.tensor([[1.0, 2.0]]), b=torch.tensor([[3.0], [4.0]]), scale=0.5)
    assert factors.rank == 1
    assert torch.equal(factors.delta(), torch.tensor([[1.5, 3.0], [2.0, 4.0]]))


def test_gpt2s_conv1d_is_a_linear_layer_stored_transposed() -> None:
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(7, 5).requires_grad_(False)
    layer = AdapterLinear(conv)
    assert layer.shape == LayerShape(outputs=7, inputs=5)
    assert layer.weight is conv.weight
    assert torch.equal(layer.matrix, conv.weight.t())
    assert layer.matrix.data_ptr() == conv.weight.data_ptr()
    x = torch.randn(2, 3, 5)
    assert_close(layer(x), conv(x), torch.float32, 5)
    layer.adapter = METHODS["lora"].build(layer, MethodConfig(rank=2), generator(0))
    assert_close(layer(x), conv(x), torch.float32, 5)


def test_a_quantised_layer_computes_its_own_product() -> None:
    base = Quantised(nn.Linear(5, 7).requires_grad_(False))
    layer = AdapterLinear(base, dtype=torch.bfloat16)
    x = torch.randn(3, 5)
    assert torch.equal(layer(x), base(x))
    assert layer.dtype == torch.bfloat16
    assert set(layer.state_dict()) == {"weight", "bias"}
    with pytest.raises(MethodError, match="a quantised weight can't be read as a matrix"):
        _ = layer.matrix
    adapter = LoraAdapter(torch.ones(2, 5), torch.ones(7, 2), 0.5)
    layer.adapter = adapter
    assert_close(layer(x), base(x) + x.sum(1, keepdim=True), torch.float32, 5, depth=4)


def test_a_quantised_layer_computes_in_the_default_dtype_unless_given() -> None:
    assert AdapterLinear(Quantised(nn.Linear(5, 7))).dtype == torch.get_default_dtype()
    assert AdapterLinear(nn.Linear(5, 7, dtype=torch.float64)).dtype == torch.float64


def test_an_adapter_that_is_no_chain_has_no_next_link() -> None:
    adapter = LoraAdapter(torch.ones(2, 5), torch.ones(7, 2), 0.5)
    with pytest.raises(MethodError, match="LoraAdapter is no chain, so it has no next link"):
        adapter.advance(generator(0))


def test_an_adapter_must_implement_forward() -> None:
    class Half(Adapter):
        def to_lora(self) -> LoraFactors:
            raise AssertionError

    with pytest.raises(TypeError, match="forward"):
        Half()  # type: ignore[abstract]
