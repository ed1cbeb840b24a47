"""Sharpness: SAM's step and the Hessian against quadratics and a dense Hessian."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from rayft.analysis import sharpness
from rayft.analysis.hessian import HessianOperator, hessian_trace, top_eigenvalues
from rayft.analysis.sharpness import adapter_curvature, adapter_sharpness, ascent
from rayft.data.example import Example
from rayft.data.pack import collate_rows, rows_of
from rayft.data.template import encode_all
from rayft.errors import BaseMismatchError, DataError, ModelError, ResourceError
from rayft.evaluate.loss import batch_loss, mean_loss, target_losses
from rayft.methods.base import AdapterLinear, LoraFactors, MethodConfig
from rayft.models.inject import inject
from rayft.models.tiny import TINY
from rayft.numerics import assert_close, generator
from rayft.squeeze.factored_svd import factored_svd, sorted_factors
from tests.unit.analysis.models import adapter_for, batches_for, load


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def quadratic(eigenvalues: list[float]):
    """½ wᵀ H w + gᵀ w as two terms, over parameters of two shapes."""
    size = len(eigenvalues)
    q, _ = torch.linalg.qr(torch.randn(size, size, generator=generator("q"), dtype=torch.float64))
    hessian = (q * double(*eigenvalues)) @ q.t()
    slope = torch.randn(size, generator=generator("slope"), dtype=torch.float64)
    parameters = [
        torch.randn(shape, generator=generator("w", *shape), dtype=torch.float64).requires_grad_()
        for shape in ((2, 3), (size - 6,))
    ]

    def terms():
        w = torch.cat([parameter.reshape(-1) for parameter in parameters])
        yield 0.5 * w @ hessian @ w
        yield slope @ w

    return hessian, slope, parameters, terms


SPECTRUM = [9.0, 4.0, 1.0, 0.5, 0.25, 0.1, -2.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_products_equal_those_with_a_known_hessian() -> None:
    hessian, _, parameters, terms = quadratic(SPECTRUM)
    operator = HessianOperator(terms, parameters)
    columns = torch.randn(12, 5, generator=generator("v"), dtype=torch.float64)
    assert operator.shape == (12, 12)
    assert_close(operator @ columns, hessian @ columns, torch.float64, 12)
    assert_close(operator @ columns[:, 2], hessian @ columns[:, 2], torch.float64, 12)


def test_a_gradient_that_is_kept_is_computed_once() -> None:
    hessian, _, parameters, terms = quadratic(SPECTRUM)
    called = []

    def counted():
        called.append(1)
        yield from terms()

    operator = HessianOperator(counted, parameters, keep=True)
    vectors = torch.randn(12, 3, generator=generator("v"), dtype=torch.float64)
    for _ in range(3):
        assert_close(operator @ vectors, hessian @ vectors, torch.float64, 12)
    assert len(called) == 1


@pytest.mark.parametrize("count", [1, 3])
def test_the_largest_eigenvalues_of_a_known_hessian_are_found(count: int) -> None:
    _, _, parameters, terms = quadratic(SPECTRUM)
    found = top_eigenvalues(HessianOperator(terms, parameters), count, seed=2)
    # Largest, not largest in size: −2 comes after 1.
    assert_close(double(*found), double(*SPECTRUM[:count]), torch.float32, 12)


def test_eigenvalues_that_do_not_converge_are_an_error_of_ours() -> None:
    _, _, parameters, terms = quadratic(SPECTRUM)

    class Noise(HessianOperator):
        """What products in too few bits come to."""

        def __matmul__(self, vectors: torch.Tensor) -> torch.Tensor:
            return torch.full_like(vectors, torch.nan)

    with pytest.raises(ModelError, match=r"fewer analyze\.eigenvalues"):
        top_eigenvalues(Noise(terms, parameters), 2, seed=0)


def test_the_trace_of_a_known_hessian_is_estimated() -> None:
    # Of rank 3: three vectors span its range, and nothing is left to chance.
    low = [5.0, 2.0, -1.0] + [0.0] * 9
    _, _, parameters, terms = quadratic(low)
    found = hessian_trace(HessianOperator(terms, parameters), 9, seed=2)
    assert_close(double(found), double(6.0), torch.float64, 12, depth=4)
    _, _, parameters, terms = quadratic(SPECTRUM)
    operator = HessianOperator(terms, parameters)
    state = torch.get_rng_state()
    estimates = [hessian_trace(operator, 6, seed) for seed in range(40)]
    assert torch.equal(torch.get_rng_state(), state)
    assert hessian_trace(operator, 6, 3) == estimates[3]
    mean, spread = torch.tensor(estimates).mean(), torch.tensor(estimates).std()
    assert abs(float(mean) - sum(SPECTRUM)) < 4 * float(spread) / 40**0.5


def test_impossible_numbers_of_eigenvalues_are_refused() -> None:
    _, _, parameters, terms = quadratic(SPECTRUM)
    operator = HessianOperator(terms, parameters)
    for count in (0, 12):
        with pytest.raises(DataError, match="ask for 1 to 11"):
            top_eigenvalues(operator, count, 0)


@pytest.mark.parametrize("products", [0, 4, 12])
def test_products_that_can_not_estimate_a_trace(products: int) -> None:
    _, _, parameters, terms = quadratic(SPECTRUM)
    with pytest.raises(DataError, match="a multiple of 3"):
        hessian_trace(HessianOperator(terms, parameters), products, 0)


def test_without_curvlinops_the_error_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "curvlinops", None)
    _, _, parameters, terms = quadratic(SPECTRUM)
    with pytest.raises(ResourceError, match=r"pip install --no-deps (.*)") as caught:
        hessian_trace(HessianOperator(terms, parameters), 3, 0)
    pinned = (Path(__file__).parents[3] / "requirements" / "analysis.txt").read_text().splitlines()
    wanted = str(caught.value).partition("--no-deps ")[2].split()
    assert wanted == [line for line in pinned if not line.startswith("#")]


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_step_is_the_best_of_many_to_first_order(adaptive: bool) -> None:
    _, slope, parameters, terms = quadratic(SPECTRUM)
    gradients = torch.autograd.grad(sum(terms()), parameters)
    weights = [parameter.detach() for parameter in parameters]
    step = torch.cat([e.flatten() for e in ascent(weights, gradients, 0.3, adaptive=adaptive)])
    flat = torch.cat([g.flatten() for g in gradients])
    sizes = torch.cat([w.flatten() for w in weights]).abs() if adaptive else torch.ones_like(slope)
    assert_close((step / sizes).norm(), double(0.3).squeeze(), torch.float64, 12)
    others = torch.randn(5000, 12, generator=generator("others"), dtype=torch.float64)
    others = 0.3 * others / others.norm(dim=1, keepdim=True) * sizes
    rises = others @ flat
    assert float(rises.max()) < float(step @ flat)
    # And near it: 5000 draws in 12 dimensions come within a third of the best.
    assert float(rises.max()) > 0.67 * float(step @ flat)


def test_a_zero_gradient_gives_no_step() -> None:
    (step,) = ascent([double(1.0, 2.0)], [double(0.0, 0.0)], 0.3)
    assert step.tolist() == [0, 0]


@pytest.fixture
def llama(tiny_folder):
    loaded = load(tiny_folder)
    return loaded.model, batches_for(loaded)


def dense_hessian(model, batches, modules) -> torch.Tensor:
    """From weights that hold W0 + B A, by autograd's own, of an unwrapped model."""
    balanced = {name: sorted_factors(factored_svd(f), 1.0, torch.float64) for name, f in modules.items()}
    start = torch.cat([t.flatten() for f in balanced.values() for t in (f.a, f.b)])
    sizes = [t.numel() for f in balanced.values() for t in (f.a, f.b)]
    base = {name: model.get_submodule(name).weight.detach() for name in modules}

    def loss(flat: torch.Tensor) -> torch.Tensor:
        parts = iter(flat.split(sizes))
        weights = {}
        for name, f in balanced.items():
            a = next(parts).view_as(f.a)
            weights[f"{name}.weight"] = base[name] + next(parts).view_as(f.b) @ a

        def forward(**given):
            return functional_call(model, weights, kwargs=given)

        found = torch.cat([target_losses(model, batch, forward) for batch in batches])
        return found.double().mean()

    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.functional.hessian(loss, start)


def test_the_curvature_of_an_adapter_is_that_of_the_dense_hessian(llama) -> None:
    model, batches = llama
    modules = adapter_for(model, "layers.1.mlp.up_proj")
    expected = dense_hessian(model, batches, modules)
    values = torch.linalg.eigvalsh(expected).flip(0)
    found = adapter_curvature(model, batches, modules, count=3, products=93)
    assert found.parameters == len(expected) == 96
    assert found.targets == sum(len(batch.targets) for batch in batches)
    # The loss is float32, and so are the second derivatives of some twenty steps after it.
    assert_close(double(*found.eigenvalues), values[:3], torch.float32, 96, depth=20)
    # Four standard errors of Hutchinson's part, had 31 vectors found only the ten largest (Hutch++).
    rest = float(values.abs().sort(descending=True).values[10:].norm())
    assert abs(found.trace - float(values.sum())) < 4 * (2 / 31) ** 0.5 * rest


def test_products_with_an_adapters_hessian_are_the_dense_ones(llama) -> None:
    model, batches = llama
    modules = adapter_for(model, "layers.1.self_attn")
    expected = dense_hessian(model, batches, modules)
    vector = torch.randn(len(expected), generator=generator("v"), dtype=torch.float64)
    with sharpness._balanced(model, batches, modules) as (parameters, terms, _), sdpa_kernel(SDPBackend.MATH):
        for keep in (False, True):
            operator = HessianOperator(terms, parameters, keep=keep)
            for sign in (1, -1):
                found = operator @ (sign * vector)
                assert_close(found, sign * expected @ vector, torch.float32, len(expected), depth=20)


def test_an_operation_that_differentiates_once_is_refused(llama) -> None:
    model, batches = llama
    inject(model, MethodConfig(name="lora", rank=1, targets=["v_proj"]), seed=0)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    operator = HessianOperator(lambda: iter([batch_loss(model, batches[0])[0]]), parameters)
    with pytest.raises(ModelError, match="differentiated twice"), sdpa_kernel(SDPBackend.MATH):
        operator @ torch.ones(operator.shape[0], dtype=torch.float64)


@pytest.mark.parametrize("adaptive", [False, True])
def test_sharpness_is_the_loss_where_the_step_leads(llama, adaptive: bool) -> None:
    model, batches = llama
    modules = adapter_for(model)
    found = adapter_sharpness(model, batches, modules, 0.1, adaptive=adaptive)
    start = {name: sorted_factors(factored_svd(f), 1.0, torch.float64) for name, f in modules.items()}

    def loss_at(factors: dict[str, LoraFactors]) -> float:
        inject(model, MethodConfig(name="lora", rank=1), seed=0, start=factors)
        total, targets = mean_loss(model, batches)
        return total / targets

    before = loss_at(start)
    assert_close(double(found.before), double(before), torch.float32, 100)
    # rayft's own gradients, of the same factors.
    total = sum(batch_loss(model, batch)[0] for batch in batches) / found.targets
    layers = {name: model.get_submodule(name).adapter for name in modules}
    total.backward()
    weights = [w for layer in layers.values() for w in (layer.lora_A, layer.lora_B)]
    steps = ascent([w.detach() for w in weights], [w.grad for w in weights], 0.1, adaptive=adaptive)
    moved, parts = {}, iter(steps)
    for name, factors in start.items():
        moved[name] = LoraFactors(factors.a + next(parts), factors.b + next(parts), 1.0)
    assert_close(double(found.after), double(loss_at(moved)), torch.float32, 100)
    assert found.difference == found.after - found.before
    assert found.difference > 0


@pytest.mark.parametrize("by", [8.0, -0.3])
@pytest.mark.parametrize("adaptive", [False, True])
def test_rescaled_factors_are_as_sharp(llama, by: float, adaptive: bool) -> None:
    model, batches = llama
    modules = adapter_for(model, rank=2)
    other = {name: LoraFactors(f.a / by, f.b * by * 2, f.scale / 2) for name, f in modules.items()}
    one = adapter_sharpness(model, batches, modules, adaptive=adaptive)
    same = adapter_sharpness(model, batches, other, adaptive=adaptive)
    assert_close(double(same.before, same.after), double(one.before, one.after), torch.float32, 100)


def test_rescaled_factors_are_as_curved(llama) -> None:
    model, batches = llama
    modules = adapter_for(model, "layers.1.mlp.up_proj")
    other = {name: LoraFactors(f.a / 8, f.b * 8, f.scale) for name, f in modules.items()}
    one, same = (adapter_curvature(model, batches, given, 2, 9).eigenvalues for given in (modules, other))
    assert_close(double(*same), double(*one), torch.float32, 96, depth=20)


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-bert"])
def test_other_models_have_a_curvature_too(tmp_path, name: str) -> None:
    loaded = load(TINY[name](tmp_path), name, torch.float32)
    if name == "tiny-bert":
        examples = [Example(text="a" * n, label=n % 3, label_name="x") for n in (1, 3, 2)]
        batches = [collate_rows(rows_of(encode_all(examples, loaded.tokenizer, 60), 60), 0)]
    else:
        batches = batches_for(loaded)
    part = "layer.1.attention.self.query" if name == "tiny-bert" else "h.1.attn.c_attn"
    modules = {n: f for n, f in adapter_for(loaded.model, part).items()}
    found = adapter_curvature(loaded.model, batches, modules, 2, 9)
    assert found.eigenvalues[0] > found.eigenvalues[1]


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("measure", [adapter_sharpness, adapter_curvature])
def test_adapters_in_the_model_are_restored(llama, monkeypatch, measure, fails: bool) -> None:
    model, batches = llama
    inject(model, MethodConfig(name="lora", rank=2, targets=["q_proj"]), seed=0)
    model.train()
    attention = model.config._attn_implementation
    layers = {n: module for n, module in model.named_modules() if isinstance(module, AdapterLinear)}
    adapters = {name: layer.adapter for name, layer in layers.items()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = adapter_for(model, "v_proj")
    monkeypatch.setattr(sharpness, "require_curvlinops", lambda: None)
    monkeypatch.setattr(sharpness, "hessian_trace", lambda *args: 0.0)
    if fails:
        monkeypatch.setattr(sharpness, "batch_loss", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            measure(model, batches, modules)
    else:
        measure(model, batches, modules)
    assert {name: layer.adapter for name, layer in layers.items()} == adapters
    assert all(module.training for module in model.modules())
    assert model.config._attn_implementation == attention
    after = model.state_dict()
    assert set(after) == set(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_attention_that_differentiates_once_is_refused(llama, monkeypatch) -> None:
    model, batches = llama
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    monkeypatch.setattr(sharpness, "require_curvlinops", lambda: None)
    with pytest.raises(ModelError, match=r"flash_attention_2 .*set_attn_implementation\('sdpa'\)"):
        adapter_curvature(model, batches, adapter_for(model))


def test_mistakes_are_refused(llama) -> None:
    model, batches = llama
    modules = adapter_for(model)
    with pytest.raises(DataError, match="at least one batch"):
        adapter_sharpness(model, [], modules)
    with pytest.raises(BaseMismatchError):
        adapter_sharpness(model, batches, {"elsewhere": next(iter(modules.values()))})
