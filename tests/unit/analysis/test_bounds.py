"""Each bound against a case worked out by hand, by enumeration or with exact integers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch

from rayft.analysis.bounds import (
    Bound,
    LipschitzTerms,
    information_bound,
    lipschitz_terms,
    norm_bound,
    norm_budget,
    norm_complexity,
    sigma_of_clipped,
    stored_numbers,
)
from rayft.errors import MethodError, ReportError
from rayft.methods import METHODS
from rayft.methods.base import Chain, LayerShape, LoraFactors
from rayft.numerics import assert_close, generator, tolerance

ROBERTA = {f"layer.{i}.{name}": LayerShape(768, 768) for i in range(12) for name in ("query", "value")}
MRPC = 3668
MIXED = {"attention": LayerShape(outputs=6, inputs=10), "up": LayerShape(outputs=20, inputs=6)}


def assert_equal(actual: float, expected: float, roundings: int = 10) -> None:
    assert_close(
        torch.tensor(actual, dtype=torch.float64),
        torch.tensor(expected, dtype=torch.float64),
        torch.float64,
        roundings,
    )


def of_method(name: str, bits: int = 32, links: int = 1) -> Bound:
    return information_bound(stored_numbers(METHODS[name], ROBERTA, 16, links), bits, MRPC, sigma=0.5)


@pytest.mark.parametrize(
    ("names", "links", "expected"),
    [
        ("lora lora_plus", 1, "42.2"),
        ("cla rcla asym paca", 1, "29.9"),
        ("cola", 6, "103"),
        ("c3la rc3la rac", 6, "73.1"),
    ],
)
def test_the_papers_methods_have_the_papers_counts(names: str, links: int, expected: str) -> None:
    for name in names.split():
        bound = of_method(name, links=links)
        assert f"{bound.value:.3g}" == expected
        assert bound.vacuous


def test_bounds_of_two_sizes_differ_by_the_root_of_the_ratio() -> None:
    assert_equal(of_method("lora").value / of_method("cla").value, math.sqrt(2))
    assert_equal(of_method("c3la", links=6).value / of_method("cla").value, math.sqrt(6))
    assert_equal(of_method("cla").value / of_method("cla", bits=16).value, math.sqrt(2))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_bound(name: str) -> None:
    links = 3 if isinstance(METHODS[name], Chain) else 1
    ranks = {"attention": 2, "up": 4}
    by_hand = {
        "full": 6 * 10 + 20 * 6,
        "both": 2 * (6 + 10) + 4 * (20 + 6),
        "outputs": 2 * 6 + 4 * 20,
    }
    kind = {"full": "full", "lora": "both", "lora_plus": "both", "cola": "both"}.get(name, "outputs")
    numbers = stored_numbers(METHODS[name], MIXED, ranks, links)
    assert numbers == links * by_hand[kind]
    expected = math.sqrt(2 * 4.0 * math.log(2) * 8 * numbers / 50)
    assert_equal(information_bound(numbers, bits=8, samples=50, sigma=2.0).value, expected)


def test_one_rank_is_that_rank_everywhere() -> None:
    lora = METHODS["lora"]
    assert stored_numbers(lora, MIXED, 2) == stored_numbers(lora, MIXED, {"attention": 2, "up": 2})


def test_a_count_without_rank_or_chain_is_refused() -> None:
    with pytest.raises(MethodError, match="up has no rank"):
        stored_numbers(METHODS["lora"], MIXED, {"attention": 2})
    with pytest.raises(MethodError, match="'lora' can't have 2 links"):
        stored_numbers(METHODS["lora"], MIXED, 2, links=2)


def test_a_bound_is_vacuous_from_the_loss_range_on() -> None:
    # With N numbers of 1/(8 ln2) bits in N samples the bound is σ/2, a quarter of the range.
    bits = 1 / (8 * math.log(2))
    bound = information_bound(100, bits, 100, sigma_of_clipped(1.0, 5.0))
    assert_equal(bound.value, 1.0)
    assert not bound.vacuous
    assert not information_bound(1599, bits, 100, 2.0).vacuous
    assert information_bound(1601, bits, 100, 2.0).vacuous
    assert information_bound(100, bits, 100, 2.0, loss_range=0.9).vacuous


def test_a_method_that_stores_nothing_has_a_bound_of_0() -> None:
    bound = information_bound(0, 32, 100, 0.5)
    assert (bound.log10, bound.value, bound.vacuous) == (-math.inf, 0.0, False)


def test_a_bound_that_no_float_holds_has_its_logarithm() -> None:
    assert Bound(log10=400.0, vacuous=True).value == math.inf


@pytest.mark.parametrize(
    ("numbers", "bits", "samples", "sigma"), [(-1, 8, 5, 1), (1, 0, 5, 1), (1, 8, 0, 1), (1, 8, 5, 0)]
)
def test_an_impossible_information_bound_is_refused(
    numbers: int, bits: float, samples: int, sigma: float
) -> None:
    with pytest.raises(ReportError):
        information_bound(numbers, bits, samples, sigma)


def test_an_empty_interval_has_no_sigma() -> None:
    with pytest.raises(ReportError):
        sigma_of_clipped(1.0, 1.0)


def enumerated(
    kept: Sequence[float],
    added: Sequence[float],
    activation: Sequence[float],
    zero: Sequence[float],
    radius: float,
) -> float:
    """Sum over every choice of W0 or ΔW in the layers after each start (the input, or some σ_l(0))."""
    total = 0.0
    for start, size in enumerate([radius, *zero]):
        after = range(start, len(kept))
        for choice in itertools.product((False, True), repeat=len(after)):
            if any(choice):
                factors = [
                    activation[i] * (added[i] if new else kept[i])
                    for i, new in zip(after, choice, strict=True)
                ]
                total += size * math.prod(factors)
    return total


NETS = [([2.0, 0.5], [0.25, 3.0]), ([1.5, 0.7, 2.0], [0.3, 0.0, 1.1]), ([3.0], [0.5])]


@pytest.mark.parametrize(("base", "update"), NETS)
@pytest.mark.parametrize("zero", [(0.0, 0.0, 0.0), (0.4, 1.3, 0.6)])
def test_the_recursion_equals_the_sum_over_all_choices(
    base: list[float], update: list[float], zero: tuple[float]
) -> None:
    layers = len(base)
    activation, zeros = [1.1, 0.25, 2.0][:layers], list(zero[:layers])
    found = lipschitz_terms(
        base, update, 1.7, loss_lipschitz=3.0, activation_lipschitz=activation, zero_norms=zeros
    )
    by_update = enumerated(base, update, activation, zeros, 1.7)
    by_base = enumerated(update, base, activation, zeros, 1.7)
    assert_equal(found.log10_update, math.log10(2 * 3.0 * by_update), 30)
    assert_equal(found.log10_base, math.log10(2 * 3.0 * by_base), 30)


@pytest.mark.parametrize(("base", "update"), NETS)
def test_the_recursion_equals_the_closed_form(base: list[float], update: list[float]) -> None:
    found = lipschitz_terms(base, update, 1.7, loss_lipschitz=3.0, activation_lipschitz=0.5)
    both = math.prod(a + d for a, d in zip(base, update, strict=True))
    front = 2 * 3.0 * 1.7 * 0.5 ** len(base)
    assert_equal(found.log10_update, math.log10(front * (both - math.prod(base))), 30)
    assert_equal(found.log10_base, math.log10(front * (both - math.prod(update))), 30)


def test_hundreds_of_layers_neither_overflow_nor_cancel() -> None:
    layers = 400
    found = lipschitz_terms([1000.0] * layers, [1.0] * layers, 1.0)
    # Integers of 1200 digits are exact.
    assert_equal(found.log10_update, math.log10(2 * (1001**layers - 1000**layers)), 4 * layers)
    assert_equal(found.log10_base, math.log10(2 * (1001**layers - 1)), 4 * layers)
    tiny = lipschitz_terms([1.0] * layers, [1e-30] * layers, 1.0)
    # (1 + d)^L − 1 is L·d to the first order, and 0 when it is computed as a difference.
    assert_equal(tiny.log10_update, math.log10(2 * layers) - 30, 4 * layers)


def test_no_update_and_no_base_are_minus_infinity() -> None:
    assert lipschitz_terms([2.0, 3.0], [0.0, 0.0], 1.0).log10_update == -math.inf
    assert lipschitz_terms([0.0, 0.0], [2.0, 3.0], 1.0).log10_base == -math.inf
    nothing = LipschitzTerms(-math.inf, -math.inf)
    assert lipschitz_terms([0.0], [0.0], 1.0) == nothing
    assert lipschitz_terms([1.0], [1.0], 0.0) == nothing


def test_impossible_norms_are_refused() -> None:
    with pytest.raises(ReportError, match="each layer"):
        lipschitz_terms([1.0, 2.0], [1.0], 1.0)
    with pytest.raises(ReportError, match="finite"):
        lipschitz_terms([math.nan], [1.0], 1.0)
    with pytest.raises(ReportError, match="finite"):
        lipschitz_terms([1.0], [-1.0], 1.0)


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_a_real_network_moves_no_further(shift: float) -> None:
    draw = generator("relu net")
    sizes = [5, 7, 6, 3]
    base, update = (
        [scale * torch.randn(o, i, generator=draw, dtype=torch.float64) for i, o in itertools.pairwise(sizes)]
        for scale in (1.0, 0.2)
    )
    x = torch.randn(500, sizes[0], generator=draw, dtype=torch.float64)
    x = 2.0 * x / x.norm(dim=1, keepdim=True)

    def forward(weights: Sequence[torch.Tensor]) -> torch.Tensor:
        y = x
        for weight in weights:
            y = (y @ weight.t()).relu() + shift
        return y

    norms = [[float(torch.linalg.matrix_norm(w, 2)) for w in weights] for weights in (base, update)]
    zero = [shift * math.sqrt(size) for size in sizes[1:]]
    terms = lipschitz_terms(*norms, 2.0, zero_norms=zero)
    together = forward([w + d for w, d in zip(base, update, strict=True)])
    assert float((together - forward(base)).norm(dim=1).max()) <= 10**terms.log10_update / 2
    assert float((together - forward(update)).norm(dim=1).max()) <= 10**terms.log10_base / 2


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_a_network_of_positive_numbers_moves_just_as_far(shift: float) -> None:
    base, update = [2.0, 0.5, 3.0], [0.1, 0.2, 0.3]

    def forward(weights: Sequence[float]) -> float:
        y = 1.5
        for weight in weights:
            y = max(weight * y, 0.0) + shift
        return y

    terms = lipschitz_terms(base, update, 1.5, zero_norms=[shift] * 3)
    together = forward([w + d for w, d in zip(base, update, strict=True)])
    assert_equal(terms.log10_update, math.log10(2 * (together - forward(base))), 30)
    assert_equal(terms.log10_base, math.log10(2 * (together - forward(update))), 30)


def random_factors(outputs: int, inputs: int, rank: int, scale: float) -> LoraFactors:
    draw = generator("budget", outputs, inputs, rank)
    a = torch.randn(rank, inputs, generator=draw, dtype=torch.float64)
    b = torch.randn(outputs, rank, generator=draw, dtype=torch.float64)
    return LoraFactors(a, b, scale)


def test_the_budget_is_the_nuclear_norm_and_the_least_of_all_factors() -> None:
    factors = random_factors(9, 7, 3, -0.5)
    budget = norm_budget(factors)
    assert_equal(budget, float(torch.linalg.svdvals(factors.delta()).sum()))
    assert_equal(norm_budget(LoraFactors(factors.a / 8, factors.b * 8, factors.scale)), budget)
    assert budget < 0.5 * float(factors.a.norm() * factors.b.norm())
    assert norm_budget(LoraFactors(factors.a, torch.zeros_like(factors.b), 1.0)) == 0


def exact_complexity(x: torch.Tensor, outputs: int, budget: float) -> float:
    """Average ρ‖Σ εᵢxᵢᵀ‖₂/N over all 2^(N·O) matrices of signs: the class's own, without contraction."""
    total = 0.0
    signs = list(itertools.product((-1.0, 1.0), repeat=len(x) * outputs))
    for drawn in signs:
        m = torch.tensor(drawn, dtype=torch.float64).view(outputs, len(x)) @ x
        total += float(torch.linalg.matrix_norm(m, 2))
    return budget * total / len(signs) / len(x)


@pytest.mark.parametrize(("samples", "outputs", "inputs"), [(4, 2, 3), (3, 3, 2), (6, 1, 4), (2, 4, 5)])
def test_the_complexity_holds_and_is_not_loose(samples: int, outputs: int, inputs: int) -> None:
    x = torch.randn(samples, inputs, generator=generator("x", samples, outputs), dtype=torch.float64)
    exact = math.sqrt(2) * 3.0 * exact_complexity(x, outputs, 0.7)
    bound = norm_complexity(0.7, outputs, x.square().sum(1), lipschitz=3.0)
    assert exact <= bound <= exact * math.sqrt(2 * min(samples, outputs, inputs))


def test_the_complexity_of_one_input_is_exact() -> None:
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    bound = norm_complexity(0.7, 3, x.square().sum(1))
    assert_equal(bound, math.sqrt(2) * exact_complexity(x, 3, 0.7))
    assert_equal(bound, math.sqrt(2) * 0.7 * math.sqrt(3) * 5)


def test_no_update_in_the_budget_follows_the_signs_further() -> None:
    x = torch.randn(5, 4, generator=generator("updates"), dtype=torch.float64)
    targets = torch.randn(5, 3, generator=generator("targets"), dtype=torch.float64)
    losses = []
    for seed in range(400):
        rank, draw = 1 + seed % 3, generator("update", seed)
        a = torch.randn(rank, 4, generator=draw, dtype=torch.float64)
        found = LoraFactors(a, torch.randn(3, rank, generator=draw, dtype=torch.float64), 1.0)
        delta = found.delta() * (2.0 / norm_budget(found))
        # 1-Lipschitz in the layer's output.
        losses.append((x @ delta.t() - targets).norm(dim=1))
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=5)), dtype=torch.float64)
    reached = float((signs @ torch.stack(losses).t()).amax(1).mean()) / 5
    assert 0 < reached <= norm_complexity(2.0, 3, x.square().sum(1))


def test_the_norm_bound_adds_what_the_draw_may_do() -> None:
    squared = torch.full((10_000,), 4.0)
    # Complexity √2·ρ·√(2·4·N)/N = 4ρ/√N.
    bound = norm_bound(0.5, 2, squared, loss_range=1.0, confidence=0.9)
    assert_equal(bound.value, 2 * 0.02 + 3 * math.sqrt(math.log(20) / 20_000))
    assert not bound.vacuous
    assert norm_bound(0.5, 2, squared, loss_range=0.04, confidence=0.9).vacuous
    assert norm_bound(0.5, 2, squared, loss_range=1.0, confidence=0.99).log10 > bound.log10
    assert norm_bound(0.5, 2, squared[:100], loss_range=1.0, confidence=0.9).log10 > bound.log10


def test_an_impossible_norm_bound_is_refused() -> None:
    squared = torch.ones(3)
    for budget, norms in [(-1.0, squared), (1.0, -squared), (1.0, squared[:0]), (math.nan, squared)]:
        with pytest.raises(ReportError):
            norm_complexity(budget, 2, norms)
    with pytest.raises(ReportError, match="confidence"):
        norm_bound(1.0, 2, squared, loss_range=1.0, confidence=1.0)
    with pytest.raises(ReportError, match="loss_range"):
        norm_bound(1.0, 2, squared, loss_range=0.0)


def test_the_tolerance_of_these_tests_is_rounding() -> None:
    with pytest.raises(AssertionError):
        assert_equal(1.0, 1.0 + 3 * tolerance(torch.float64, 10))
