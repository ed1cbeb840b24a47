"""What every fine-tuning method must do: one function a promise, each raising AssertionError.

`run_all(method, case)` runs them all; test_methods.py does so over the registry, test_mutants.py
over methods broken on purpose, and the documentation's toy method goes through it too.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from rayft.artifacts import AdapterArtifact, ArtifactMeta
from rayft.errors import MethodError, TargetError
from rayft.methods.base import AdapterLinear, LayerShape, LoraFactors, Method, MethodConfig
from rayft.methods.lora import LoraAdapter
from rayft.numerics import assert_close, generator

TOKENS = 6


@dataclass(frozen=True)
class Case:
    """One layer that a method is tried on."""

    outputs: int
    inputs: int
    rank: int
    dtype: torch.dtype
    alpha: float = 5.0
    rslora: bool = False
    bias: bool = True

    def __str__(self) -> str:
        kind = ("-rslora" if self.rslora else "") + ("" if self.bias else "-nobias")
        return f"{self.outputs}x{self.inputs}-r{self.rank}-{str(self.dtype).removeprefix('torch.')}{kind}"

    @property
    def shape(self) -> LayerShape:
        return LayerShape(outputs=self.outputs, inputs=self.inputs)

    def config(self, method: Method) -> MethodConfig:
        return MethodConfig(name=method.name, rank=self.rank, alpha=self.alpha, rslora=self.rslora)

    @property
    def scale(self) -> float:
        """s by the definition, not by the code under test."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


SIZES = [
    (7, 5, 3, {}),
    (5, 7, 5, {}),
    (3, 1, 1, {}),
    (33, 16, 4, {"rslora": True}),
    (9, 9, 2, {"bias": False}),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
CASES = [Case(o, i, r, dtype, **extra) for o, i, r, extra in SIZES for dtype in DTYPES]


def linear(case: Case) -> nn.Linear:
    """A frozen base layer with random weights."""
    base = nn.Linear(case.inputs, case.outputs, bias=case.bias, dtype=torch.float64)
    for parameter in base.parameters():
        parameter.data.normal_(generator=generator("base", str(case), tuple(parameter.shape)))
    return base.to(case.dtype).requires_grad_(False)


def built(method: Method, case: Case, seed: int = 0) -> AdapterLinear:
    """A layer with a fresh adapter."""
    layer = AdapterLinear(linear(case))
    layer.adapter = method.build(layer, case.config(method), generator("adapter", seed))
    return layer


def perturb(layer: AdapterLinear) -> AdapterLinear:
    """Stand in for training: move every parameter that trains."""
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            step = torch.empty(parameter.shape, dtype=torch.float64)
            parameter.data += step.normal_(generator=generator("step", name)).to(parameter.dtype)
    return layer


def trained_layer(method: Method, case: Case) -> AdapterLinear:
    """A layer whose adapter does something."""
    return perturb(built(method, case))


def inputs(case: Case, *lead: int) -> torch.Tensor:
    """Random inputs (…, I)."""
    x = torch.empty(*(lead or (TOKENS,)), case.inputs, dtype=torch.float64)
    return x.normal_(generator=generator("x", str(case))).to(case.dtype)


def exact_output(layer: AdapterLinear, case: Case, x: torch.Tensor) -> torch.Tensor:
    """linear(x, W0 + ΔW) in float64, ΔW from the adapter's own account of itself."""
    exact = copy.deepcopy(layer).double()
    base = linear(case).double()
    assert exact.adapter is not None
    weight = base.weight + exact.adapter.delta(base.weight)
    return functional.linear(x.double(), weight, base.bias)


def close(actual: torch.Tensor, expected: torch.Tensor, case: Case) -> None:
    # Four roundings: the base's product, x·Aᵀ, its product with B, and their sum.
    assert_close(actual, expected, case.dtype, case.inputs + case.rank + TOKENS, depth=4)


def starts_as_identity(method: Method, case: Case) -> None:
    layer, x = built(method, case), inputs(case)
    expected = functional.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer(x), expected), "the fresh layer is not its base"


def starts_with_b_zero(method: Method, case: Case) -> None:
    if not method.exports_lora:
        return
    adapter = built(method, case).adapter
    assert adapter is not None
    factors = adapter.to_lora()
    assert not factors.b.any(), "B does not start at 0"
    assert factors.a.any(), "A starts at 0, so nothing would ever train"


def computes_w_plus_delta(method: Method, case: Case) -> None:
    layer, x = trained_layer(method, case), inputs(case)
    y = layer(x)
    assert y.dtype == case.dtype, f"{case.dtype} went in and {y.dtype} came out"
    assert not torch.equal(y, functional.linear(x, *_base(case))), "the trained adapter does nothing"
    close(y, exact_output(layer, case, x), case)


def keeps_leading_shape(method: Method, case: Case) -> None:
    layer = trained_layer(method, case)
    for lead in ((2, 3), (1, 2, 2), (0,), (0, 4)):
        x = inputs(case, *lead)
        y = layer(x)
        assert y.shape == (*lead, case.outputs), f"{tuple(x.shape)} became {tuple(y.shape)}"
        close(y, exact_output(layer, case, x), case)
    vector = inputs(case)[0]
    assert layer(vector).shape == (case.outputs,)


def leaves_inputs_alone(method: Method, case: Case) -> None:
    layer, x = trained_layer(method, case), inputs(case)
    before_x, before_w = x.clone(), layer.weight.detach().clone()
    layer(x.requires_grad_(True)).sum().backward()
    assert torch.equal(x, before_x), "forward or backward changed x"
    assert torch.equal(layer.weight, before_w), "forward or backward changed the weight"


def trains_what_it_declares(method: Method, case: Case) -> None:
    layer = trained_layer(method, case)
    count = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    expected = method.trained(case.shape, case.rank)
    assert count == expected, f"{count} numbers train, the formula says {expected}"
    if method.shares_base:
        assert not layer.weight.requires_grad, "the base is shared, yet it trains"
    layer(inputs(case)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.any())
        assert reached == parameter.requires_grad, (
            f"{name}: trains {parameter.requires_grad}, reached {reached}"
        )


def gradients_are_right(method: Method, case: Case) -> None:
    """Against plain autograd through linear(x, W0 + ΔW) at lower precision, gradcheck in float64."""
    layer = trained_layer(method, case)
    names = [name for name, parameter in layer.named_parameters() if parameter.requires_grad]
    if case.dtype == torch.float64:
        _gradcheck(layer, case, names)
        return
    x, exact_x = inputs(case).requires_grad_(True), inputs(case).double().requires_grad_(True)
    exact = copy.deepcopy(layer).double()
    weights = torch.linspace(-1, 1, TOKENS * case.outputs).view(TOKENS, -1)
    (layer(x) * weights.to(case.dtype)).sum().backward()
    (exact(exact_x) * weights.to(case.dtype).double()).sum().backward()
    _close_gradient(x, exact_x, case)
    for name in names:
        _close_gradient(layer.get_parameter(name), exact.get_parameter(name), case)


def _close_gradient(actual: torch.Tensor, expected: torch.Tensor, case: Case) -> None:
    assert actual.grad is not None
    assert expected.grad is not None
    assert actual.grad.dtype == case.dtype
    length = case.inputs + case.outputs + case.rank + TOKENS
    assert_close(actual.grad, expected.grad, case.dtype, length, depth=4)


def _gradcheck(layer: AdapterLinear, case: Case, names: list[str]) -> None:
    def run(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    values = [layer.get_parameter(name).detach().clone().requires_grad_(True) for name in names]
    try:
        torch.autograd.gradcheck(run, (inputs(case).requires_grad_(True), *values))
    except RuntimeError as error:
        raise AssertionError(f"gradcheck: {error}") from error


def exports_its_delta(method: Method, case: Case) -> None:
    layer, x = trained_layer(method, case), inputs(case)
    assert layer.adapter is not None
    if not method.exports_lora:
        with pytest.raises(MethodError, match="no low-rank factors"):
            layer.adapter.to_lora()
        return
    factors = layer.adapter.to_lora()
    assert factors.b.shape == (case.outputs, factors.rank)
    assert factors.a.shape == (factors.rank, case.inputs)
    assert factors.scale == case.scale, f"scale {factors.scale}, by definition {case.scale}"
    assert not factors.a.requires_grad
    assert not factors.b.requires_grad
    assert factors.a.dtype == factors.b.dtype == case.dtype
    again = AdapterLinear(linear(case), LoraAdapter(factors.a, factors.b, factors.scale))
    close(again(x), layer(x), case)
    if factors.columns is not None:
        selector = functional.one_hot(torch.tensor(factors.columns), case.inputs).to(case.dtype)
        assert torch.equal(factors.a, selector), "A is not the selector of its columns"


def survives_the_disk(method: Method, case: Case) -> None:
    if not method.exports_lora:
        return
    adapter = trained_layer(method, case).adapter
    assert adapter is not None
    saved = AdapterArtifact({"layer": adapter.to_lora()}, meta=ArtifactMeta(method=method.name))
    with tempfile.TemporaryDirectory() as folder:
        loaded = AdapterArtifact.load(saved.save(Path(folder) / "adapter"))
    _same_factors(saved.modules["layer"], loaded.modules["layer"])
    assert loaded.content_hash == saved.content_hash, "the disk changed its identity"


def _same_factors(saved: LoraFactors, loaded: LoraFactors) -> None:
    assert torch.equal(saved.a, loaded.a)
    assert torch.equal(saved.b, loaded.b)
    assert saved.a.dtype == loaded.a.dtype
    assert saved.columns == loaded.columns
    # α = s·rank is what the file holds, so s may come back one unit in the last place off.
    assert math.isclose(saved.scale, loaded.scale, rel_tol=2 * torch.finfo(torch.float64).eps)


def keeps_state_dict_keys(method: Method, case: Case) -> None:
    layer = trained_layer(method, case)
    base = set(linear(case).state_dict())
    keys = set(layer.state_dict())
    assert base <= keys, f"the base's keys {base - keys} are gone"
    foreign = {key for key in keys - base if not key.startswith("adapter.")}
    assert not foreign, f"{foreign} are neither the base's nor the adapter's"
    other = built(method, case, seed=1)
    other.load_state_dict(layer.state_dict())
    x = inputs(case)
    assert torch.equal(other(x), layer(x)), "a state dict does not carry the whole adapter"


def is_decided_by_its_generator(method: Method, case: Case) -> None:
    first = built(method, case).state_dict()
    torch.rand(3)
    second = built(method, case).state_dict()
    for key, value in first.items():
        assert torch.equal(value, second[key]), f"{key} depends on more than the generator"


def refuses_too_high_a_rank(method: Method, case: Case) -> None:
    limit = method.max_rank(case.shape)
    assert limit >= 1
    method.check(case.shape, limit, "some.module")
    with pytest.raises(TargetError, match=rf"rank {limit + 1} is above what some\.module"):
        method.check(case.shape, limit + 1, "some.module")


def _base(case: Case) -> tuple[torch.Tensor, torch.Tensor | None]:
    base = linear(case)
    return base.weight, base.bias


Check = Callable[[Method, Case], None]

CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        starts_as_identity,
        starts_with_b_zero,
        computes_w_plus_delta,
        keeps_leading_shape,
        leaves_inputs_alone,
        trains_what_it_declares,
        gradients_are_right,
        exports_its_delta,
        survives_the_disk,
        keeps_state_dict_keys,
        is_decided_by_its_generator,
        refuses_too_high_a_rank,
    )
}


def run_all(method: Method, case: Case) -> None:
    """Run the whole suite on one layer.

    Raises:
        AssertionError: naming the promise that is broken.
    """
    for name, check in CHECKS.items():
        try:
            check(method, case)
        except pytest.fail.Exception as failure:
            raise AssertionError(f"{method.name} on {case}: {name}: {failure}") from failure
        except AssertionError as error:
            raise AssertionError(f"{method.name} on {case}: {name}: {error}") from error
