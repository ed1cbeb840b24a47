"""Bounds on the generalisation gap G (expected minus training loss), as numbers.

Three bounds, of the method, of the whole network and of one layer:

    information   G ≤ √(2 σ² ln2 · bits · numbers / N)         Xu & Raginsky 2017, arXiv:1705.07809, Theorem 1
    Lipschitz     G(W0 + ΔW) ≤ min(G(W0) + Φ_ΔW, G(ΔW) + Φ_W0)      Cadenhead et al. 2026, arXiv:2606.13767
    norm          G ≤ 2·√2·L·ρ·√(O Σ‖xᵢ‖²)/N + 3·range·√(ln(2/δ)/2N)      Maurer 2016, arXiv:1605.00251

They are reported and never used to rank: on the paper's own Table 3 the information bounds of its
methods correlate with the measured gaps by 0.04 (Spearman's, mean of ten rows), and most are vacuous.

Shapes: N samples, I inputs, O outputs, R rank.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rayft.errors import MethodError, ReportError
from rayft.methods.base import Chain, LayerShape, LoraFactors, Method
from rayft.squeeze.factored_svd import factored_svd

__all__ = [
    "Bound",
    "LipschitzTerms",
    "information_bound",
    "lipschitz_terms",
    "norm_bound",
    "norm_budget",
    "norm_complexity",
    "sigma_of_clipped",
    "stored_numbers",
]


@dataclass(frozen=True)
class Bound:
    """An upper bound on the generalisation gap, in the loss's own unit."""

    log10: float
    """Its decimal logarithm; −inf where the bound is 0."""
    vacuous: bool
    """Whether it is no smaller than the range of the clipped loss, which no gap exceeds anyway."""

    @property
    def value(self) -> float:
        """The bound itself; inf where no float holds it."""
        return math.inf if self.log10 > math.log10(sys.float_info.max) else 10.0**self.log10


@dataclass(frozen=True)
class LipschitzTerms:
    """The two perturbation terms of Theorem 1, as decimal logarithms; −inf where one is exactly 0."""

    log10_update: float
    """Φ_ΔW: the most that adding ΔW can increase the gap of W0."""
    log10_base: float
    """Φ_W0: the most that adding W0 can increase the gap of a network of ΔW alone."""


def information_bound(
    numbers: int, bits: float, samples: int, sigma: float, *, loss_range: float | None = None
) -> Bound:
    """Bound the expected gap by the information that the stored numbers can hold on the data.

    arXiv:2606.13767, Table 1.

    I(W; S) ≤ H(W) ≤ bits·numbers·ln2, whatever the training. Factors that are frozen must not have been
    drawn from the data.

    Args:
        numbers: trained numbers that are kept, over all modules (`stored_numbers`).
        bits: of one of them, as it is stored.
        samples: N, independent examples that were trained on.
        sigma: the loss is σ-sub-Gaussian, in the loss's unit (`sigma_of_clipped`).
        loss_range: largest minus smallest loss; 2σ, as for a clipped loss, where not given.

    Raises:
        ReportError: if a number is below 0, or one that has to be positive is not.
    """
    _check_positive(bits=bits, samples=samples, sigma=sigma)
    if numbers < 0:
        raise ReportError(f"numbers is {numbers}; a method stores none or more")
    squared = 2 * sigma**2 * math.log(2) * bits * numbers / samples
    return _bound(math.sqrt(squared), 2 * sigma if loss_range is None else loss_range)


def sigma_of_clipped(low: float, high: float) -> float:
    """Return the σ of a loss clipped to [low, high], which is (high − low)/2 (Hoeffding's lemma).

    Raises:
        ReportError: if the interval is empty.
    """
    _check_positive(**{"high - low": high - low})
    return (high - low) / 2


def stored_numbers(
    method: Method, shapes: Mapping[str, LayerShape], ranks: Mapping[str, int] | int, links: int = 1
) -> int:
    """Count the numbers that a method keeps over all modules: D·R·k of the paper's Table 1.

    What is trained besides the layers (a head, or with `full` the rest of the model) is not counted.

    Args:
        method: one of `rayft.methods.METHODS`.
        shapes: module path → size.
        ranks: one for all modules, or module path → rank (of a chain: of each link).
        links: of a chain; 1 for the other methods.

    Raises:
        MethodError: if a module has no rank, or a method that is no chain is given links.
    """
    if links < 1 or (links > 1 and not isinstance(method, Chain)):
        raise MethodError(f"'{method.name}' can't have {links} links; chains have 1 or more, the others 1")
    if isinstance(ranks, int):
        ranks = dict.fromkeys(shapes, ranks)
    missing = [name for name in shapes if name not in ranks]
    if missing:
        raise MethodError(f"{missing[0]} has no rank; give one for each module, or one for all")
    return sum(method.stored(shape, ranks[name], links) for name, shape in shapes.items())


def lipschitz_terms(
    base_norms: Sequence[float],
    update_norms: Sequence[float],
    radius: float,
    *,
    loss_lipschitz: float = 1.0,
    activation_lipschitz: float | Sequence[float] = 1.0,
    zero_norms: Sequence[float] | None = None,
) -> LipschitzTerms:
    """Bound how far ΔW moves the loss of f = σ_L(W^L … σ_1(W^1 x)) (arXiv:2606.13767, Theorem 1).

    With a = ‖W0‖₂, d = ‖ΔW‖₂, s = ‖σ(0)‖ and K the activation's constant, layer by layer,

        e_l = K_l (a_l e_{l−1} + d_l b_{l−1})                   e_0 = 0
        b_l = K_l (a_l + d_l) b_{l−1} + s_l                     b_0 = C
        Φ_ΔW = 2 L e_L, and Φ_W0 the same with a and d exchanged

    which for s = 0 is 2·L·C·ΠK·[Π(a + d) − Πa]. The paper sums 2^L products; as printed the exponent
    of its index 2^(L−1) does not depend on the layer j and must be 2^(L−j). All in logarithms and
    without a difference, so that nothing overflows or cancels.

    Args:
        base_norms: ‖W0‖₂ of each layer, in the order of the forward pass.
        update_norms: ‖ΔW‖₂ likewise.
        radius: C, the largest norm of an input.
        loss_lipschitz: L, of the loss as a function of the network's output.
        activation_lipschitz: K, one for all layers or one for each.
        zero_norms: ‖σ_l(0)‖ of each layer, as a vector of its outputs; zeros where not given.

    Raises:
        ReportError: if the lists differ in length, or a number is negative or not finite.
    """
    layers = len(base_norms)
    if isinstance(activation_lipschitz, int | float):
        activation_lipschitz = [activation_lipschitz] * layers
    zero_norms = [0.0] * layers if zero_norms is None else zero_norms
    given = [base_norms, update_norms, activation_lipschitz, zero_norms]
    if {len(part) for part in given} != {layers}:
        raise ReportError(
            f"the lists have lengths {[len(part) for part in given]}; give a number for each layer"
        )
    if any(not 0 <= value < math.inf for part in [*given, [radius, loss_lipschitz]] for value in part):
        raise ReportError("norms, the radius and Lipschitz constants must be finite and at least 0")
    base, update, activation, zero = ([_log(value) for value in part] for part in given)
    factor = math.log(2) + _log(loss_lipschitz)
    moved = [
        (factor + _log_error(kept, added, activation, zero, _log(radius))) / math.log(10)
        for kept, added in ((base, update), (update, base))
    ]
    return LipschitzTerms(log10_update=moved[0], log10_base=moved[1])


def _log_error(
    kept: list[float], added: list[float], activation: list[float], zero: list[float], radius: float
) -> float:
    """Compute ln e_L, all arguments being logarithms too."""
    error, size = -math.inf, radius
    for a, d, k, s in zip(kept, added, activation, zero, strict=True):
        error = k + float(np.logaddexp(a + error, d + size))
        size = float(np.logaddexp(k + float(np.logaddexp(a, d)) + size, s))
    return error


def norm_budget(factors: LoraFactors) -> float:
    """Return ρ = s‖B‖_F‖A‖_F of the balanced factors, which is the nuclear norm of ΔW.

    No other factors of the same ΔW have a smaller ρ, and B → cB, A → A/c does not change it.
    """
    return float(factored_svd(factors).s.sum())


def norm_complexity(
    budget: float, outputs: int, squared_norms: torch.Tensor, lipschitz: float = 1.0
) -> float:
    """Bound the empirical Rademacher complexity of one layer's updates, √2·L·ρ·√(O Σ‖xᵢ‖²)/N.

    The class is x → ℓ(W0 x + s·B·A·x) with s‖B‖_F‖A‖_F ≤ ρ. Maurer's contraction (arXiv:1605.00251)
    leaves √2·L/N · E sup Σᵢ⟨εᵢ, s·B·A·xᵢ⟩ with a sign for every output, and with M = Σ εᵢxᵢᵀ (O × I)
    that supremum is ρ‖M‖₂, attained at rank 1: so the rank does not enter (compare "What does the rank
    buy?", arXiv:2609.32002, of which we know the abstract alone). From there E‖M‖₂ ≤ √(E‖M‖_F²) =
    √(O Σ‖xᵢ‖²), which is too large by at most a factor √(2·min(O, I, N)).

    Args:
        budget: ρ (`norm_budget`).
        outputs: O.
        squared_norms: ‖xᵢ‖² of the layer's inputs, N.
        lipschitz: L, of the loss as a function of this layer's output.

    Raises:
        ReportError: if there are no inputs, or a number is negative or not finite.
    """
    _check_positive(outputs=outputs, samples=squared_norms.numel())
    total = float(squared_norms.double().sum())
    low = float(squared_norms.min())
    if any(not 0 <= value < math.inf for value in (budget, total, low, lipschitz)):
        raise ReportError(
            "the budget, squared norms and the Lipschitz constant must be finite and at least 0"
        )
    return math.sqrt(2 * outputs * total) * lipschitz * budget / squared_norms.numel()


def norm_bound(
    budget: float,
    outputs: int,
    squared_norms: torch.Tensor,
    lipschitz: float = 1.0,
    *,
    loss_range: float,
    confidence: float = 0.95,
) -> Bound:
    """Bound the gap of one layer's update, all other layers held fixed; the rank does not enter.

    2·`norm_complexity` + 3·range·√(ln(2/δ)/2N) with δ = 1 − confidence (Mohri et al. 2018, Theorem 3.3),
    for independent inputs, a budget chosen before the data were seen and layers around this one that
    were not trained on them. An adapter's measured budget is not chosen before, so this is a diagnostic
    of the layer and no guarantee for the model; a sum over layers is no bound either.

    Args:
        budget: ρ (`norm_budget`).
        outputs: O.
        squared_norms: ‖xᵢ‖² of the layer's inputs, N.
        lipschitz: L, of the loss as a function of this layer's output.
        loss_range: largest minus smallest (clipped) loss.
        confidence: with which it holds over the draw of the inputs.

    Raises:
        ReportError: if there are no inputs, or a number is out of its range.
    """
    _check_positive(loss_range=loss_range)
    if not 0 < confidence < 1:
        raise ReportError(f"confidence {confidence} is not between 0 and 1; 0.95 is usual")
    complexity = norm_complexity(budget, outputs, squared_norms, lipschitz)
    deviation = math.sqrt(math.log(2 / (1 - confidence)) / (2 * squared_norms.numel()))
    return _bound(2 * complexity + 3 * loss_range * deviation, loss_range)


def _bound(value: float, loss_range: float) -> Bound:
    _check_positive(loss_range=loss_range)
    return Bound(log10=_log(value) / math.log(10), vacuous=value >= loss_range)


def _log(value: float) -> float:
    return math.log(value) if value else -math.inf


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ReportError(f"{name} is {value}; it must be above 0 and finite")
