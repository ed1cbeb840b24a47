"""How sharp the minimum around an adapter is: the rise of the loss in SAM's step, and the Hessian.

    max_{‖e‖≤ρ} L(w + e) − L(w)  to first order at  e = ρ·g/‖g‖        Foret et al. 2021, arXiv:2010.01412
    max_{‖e/|w|‖≤ρ} …                               e = ρ·w²g/‖w g‖    Kwon et al. 2021, arXiv:2102.11600
    H v = ∂/∂w (gᵀ v)                               two backward passes; for eigenvalues and trace

w are the numbers of A and B, balanced first: ΔW = U S Vᵀ gives B = U√S, A = √S Vᵀ, with the scale in them.
So the results depend on ΔW alone; otherwise B → cB, A → A/c could make any minimum look sharp. The adapter
consists of plain operations in float32 or more, since rayft's own operators can be differentiated once only.
For the same reason attention is PyTorch's plain implementation (`SDPBackend.MATH`) and not a fused one, and
the base's modules are not fused.

Shapes: D numbers of the adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from rayft.analysis.hessian import hessian_operator, hessian_trace, require_curvlinops, top_eigenvalues
from rayft.analysis.landscape import layers_for, swapped
from rayft.data.pack import AnyBatch
from rayft.errors import DataError, ModelError
from rayft.evaluate.loss import batch_loss, targets_of
from rayft.methods.base import Adapter, LoraFactors
from rayft.models.attention import NAME as SEGMENTS
from rayft.models.fuse import plainly
from rayft.squeeze.factored_svd import decomposed, sorted_factors

__all__ = [
    "Curvature",
    "Sharpness",
    "adapter_curvature",
    "adapter_sharpness",
    "ascent",
]


TWICE = ("eager", "sdpa", SEGMENTS)
"""Implementations of attention that differentiate twice; the second derivative of others is silently 0."""


@dataclass(frozen=True)
class Sharpness:
    """Mean loss over the targets (nats) at an adapter, and after one step of ascent."""

    before: float
    after: float
    rho: float
    """Length of the step; `adaptive` decides in which norm."""
    adaptive: bool
    """Whether the step is measured relative to each number (ASAM)."""
    targets: int

    @property
    def difference(self) -> float:
        """How much the loss rises, in nats."""
        return self.after - self.before


@dataclass(frozen=True)
class Curvature:
    """The Hessian of the mean loss (nats) over an adapter's D numbers."""

    eigenvalues: tuple[float, ...]
    """The largest ones, in falling order."""
    trace: float
    """An unbiased estimate."""
    parameters: int
    """D."""
    targets: int


def adapter_sharpness(
    model: nn.Module,
    batches: Sequence[AnyBatch],
    modules: Mapping[str, LoraFactors],
    rho: float = 0.05,
    *,
    adaptive: bool = False,
) -> Sharpness:
    """Measure how much the loss rises in SAM's step, or ASAM's, over the balanced factors.

    The gradient is that of all batches together, and the loss after the step is over the same batches.
    Adapters in the model are restored afterwards.

    Args:
        model: the base, wrapped here if it isn't.
        batches: on the model's device.
        modules: the adapter: module path → factors.
        rho: ρ, the length of the step over all modules; the papers use 0.05, and 0.5 for ASAM.
        adaptive: whether to take ASAM's step.

    Raises:
        BaseMismatchError: if the adapter doesn't fit the model.
        DataError: if there are no batches.
        MethodError: if an adapter in the model can't be taken out and put back.
    """
    with _balanced(model, batches, modules) as (parameters, terms, targets):
        before, gradients = 0.0, [torch.zeros_like(parameter) for parameter in parameters]
        for term in terms():
            before += float(term.detach())
            found = torch.autograd.grad(term, parameters, allow_unused=True, materialize_grads=True)
            for total, gradient in zip(gradients, found, strict=True):
                total += gradient
        with torch.no_grad():
            steps = ascent([p.detach() for p in parameters], gradients, rho, adaptive=adaptive)
            for parameter, step in zip(parameters, steps, strict=True):
                parameter.add_(step)
            after = sum(map(float, terms()))
    return Sharpness(before, after, rho, adaptive, targets)


def ascent(
    parameters: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    rho: float,
    *,
    adaptive: bool = False,
) -> list[torch.Tensor]:
    """Return e = ρ·g/‖g‖, or ρ·w²g/‖w g‖, with the norm over all tensors together; 0 if the gradient is 0."""
    sizes = [p.abs() if adaptive else torch.ones_like(p) for p in parameters]
    scaled = [size * gradient for size, gradient in zip(sizes, gradients, strict=True)]
    norm = torch.stack([part.double().square().sum().cpu() for part in scaled]).sum().sqrt()
    length = rho / float(norm) if norm else 0.0
    return [length * size * part for size, part in zip(sizes, scaled, strict=True)]


def adapter_curvature(
    model: nn.Module,
    batches: Sequence[AnyBatch],
    modules: Mapping[str, LoraFactors],
    count: int = 5,
    products: int = 30,
    seed: int = 0,
) -> Curvature:
    """Measure the Hessian's largest eigenvalues and its trace over the balanced factors.

    A product with the Hessian takes about as long as three training steps over the batches; eigenvalues
    take some 20 to 100 of them. On a GPU loss and gradient are computed once if memory has room for their
    graphs, and the rest of a product is captured and replayed as a CUDA graph if the model allows it.
    Adapters in the model are restored afterwards.

    Args:
        model: the base, wrapped here if it isn't; eager or PyTorch's own ("sdpa") attention.
        batches: on the model's device.
        modules: the adapter: module path → factors.
        count: how many eigenvalues.
        products: with the Hessian, for the trace: a multiple of 3.
        seed: of the random vectors that both estimates start from.

    Raises:
        BaseMismatchError: if the adapter doesn't fit the model.
        DataError: if there are no batches, or `count` or `products` don't suit the adapter's size.
        MethodError: if an adapter in the model can't be taken out and put back.
        ModelError: if an operation of the model can't be differentiated twice.
        ResourceError: if curvlinops isn't installed.
    """
    require_curvlinops()
    attention = getattr(getattr(model, "config", None), "_attn_implementation", "eager")
    if attention not in TWICE:
        raise ModelError(
            f"{attention} can't be differentiated twice: call model.set_attn_implementation('sdpa') first"
        )
    with _balanced(model, batches, modules) as (parameters, terms, targets), sdpa_kernel(SDPBackend.MATH):
        operator = hessian_operator(terms, parameters)
        eigenvalues = top_eigenvalues(operator, count, seed)
        trace = hessian_trace(operator, products, seed)
    return Curvature(tuple(eigenvalues), trace, operator.shape[0], targets)


class _PlainAdapter(Adapter):
    """x (W0 + B A)ᵀ + bias in operations that can be differentiated any number of times; B A in A's dtype."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)

    def forward(
        self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute base and update, or the update alone if no weight is given."""
        y = functional.linear(functional.linear(x.to(self.a.dtype), self.a), self.b).to(x.dtype)
        return y if weight is None else functional.linear(x, weight, bias) + y

    def to_lora(self) -> LoraFactors:
        """Return the balanced factors."""
        return LoraFactors(self.a.detach(), self.b.detach(), 1.0)


@contextmanager
def _balanced(
    model: nn.Module, batches: Sequence[AnyBatch], modules: Mapping[str, LoraFactors]
) -> Iterator[tuple[list[nn.Parameter], Callable[[], Iterator[torch.Tensor]], int]]:
    """Put the balanced adapter in; yield its parameters, the mean loss's terms, and the number of targets."""
    if not batches:
        raise DataError("a loss needs at least one batch")
    adapters: dict[str, Adapter] = {}
    layers, svds = layers_for(model, modules), decomposed(modules)
    for name, layer in layers.items():
        dtype = torch.promote_types(layer.dtype, torch.float32)
        found = sorted_factors(svds[name], 1.0, dtype)
        adapters[name] = _PlainAdapter(found.a.to(layer.weight.device), found.b.to(layer.weight.device))
    parameters = [parameter for adapter in adapters.values() for parameter in adapter.parameters()]
    targets = sum(len(targets_of(batch)) for batch in batches)

    def terms() -> Iterator[torch.Tensor]:
        for batch in batches:
            yield batch_loss(model, batch)[0] / targets

    with swapped(model, adapters), plainly(model):
        yield parameters, terms, targets
