"""How sharp the minimum is that an adapter lies in: SAM's one step, and the Hessian.

    max_{‖e‖≤ρ} L(w + e) − L(w)  to first order at  e = ρ·g/‖g‖        Foret et al. 2021, arXiv:2010.01412
    max_{‖e/|w|‖≤ρ} …                               e = ρ·w²g/‖w g‖    Kwon et al. 2021, arXiv:2102.11600
    H v = ∂/∂w (gᵀ v)                               two backward passes; for eigenvalues and trace

w are the numbers of A and B, balanced first: ΔW = U S Vᵀ gives B = U√S, A = √S Vᵀ, the scale in them.
So ΔW alone decides everything here; without that B → cB, A → A/c would make any minimum look sharp.
The adapter is one of plain operations, since rayft's own differentiate once, and at least float32.
Attention is PyTorch's plain one meanwhile (`SDPBackend.MATH`), since the fused differentiate once too.

Shapes: D numbers of the adapter, K vectors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from rayft.analysis.landscape import layers_for, swapped
from rayft.data.pack import AnyBatch
from rayft.errors import DataError, ModelError, ResourceError
from rayft.evaluate.loss import batch_loss, targets_of
from rayft.methods.base import Adapter, LoraFactors
from rayft.numerics import derive_seed
from rayft.squeeze.factored_svd import factored_svd, sorted_factors

__all__ = [
    "Curvature",
    "HessianOperator",
    "ReplayedOperator",
    "Sharpness",
    "adapter_curvature",
    "adapter_sharpness",
    "ascent",
    "hessian_trace",
    "top_eigenvalues",
]


TWICE = ("eager", "sdpa")
"""Implementations of attention that differentiate twice. Others' second derivative is silently 0."""

ONCE = ("derivative for", "once_differentiable", "not have been used in the graph")
"""What PyTorch says where something differentiates once only."""


@dataclass(frozen=True)
class Sharpness:
    """Mean loss over the targets (nats) at an adapter and one step of ascent away from it."""

    before: float
    after: float
    rho: float
    """Length of the step, in the norm that `adaptive` says."""
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
    """The largest, falling."""
    trace: float
    """An estimate, unbiased."""
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

    The gradient is that of all batches together, and the loss afterwards that of the same batches.
    What was in the model is put back.

    Args:
        model: the base, wrapped here if it isn't.
        batches: on the model's device.
        modules: the adapter: module path → factors.
        rho: ρ, the length of the step over all modules; the papers' are 0.05, and 0.5 for ASAM.
        adaptive: whether by ASAM.

    Raises:
        BaseMismatchError: if the adapter doesn't fit the model.
        DataError: if there are no batches.
        MethodError: if what is in the model can't be put aside.
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
    """Give e = ρ·g/‖g‖, or ρ·w²g/‖w g‖, the norm over all tensors together; 0 where the gradient is."""
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
    take some 20 to 100 of them. On a GPU the product is captured once and replayed as a CUDA graph, if the
    model can be. What was in the model is put back.

    Args:
        model: the base, wrapped here if it isn't; eager or PyTorch's own ("sdpa") attention.
        batches: on the model's device.
        modules: the adapter: module path → factors.
        count: how many eigenvalues.
        products: with the Hessian, for the trace: a multiple of 3.
        seed: of the vectors that both start from.

    Raises:
        BaseMismatchError: if the adapter doesn't fit the model.
        DataError: if there are no batches, or `count` or `products` don't suit the adapter's size.
        MethodError: if what is in the model can't be put aside.
        ModelError: if an operation of the model can't be differentiated twice.
        ResourceError: if curvlinops isn't installed.
    """
    _curvlinops()
    attention = getattr(getattr(model, "config", None), "_attn_implementation", "eager")
    if attention not in TWICE:
        raise ModelError(
            f"{attention} can't be differentiated twice: call model.set_attn_implementation('sdpa') first"
        )
    with _balanced(model, batches, modules) as (parameters, terms, targets), sdpa_kernel(SDPBackend.MATH):
        operator = _replayed(HessianOperator(terms, parameters))
        eigenvalues = top_eigenvalues(operator, count, seed)
        trace = hessian_trace(operator, products, seed)
    return Curvature(tuple(eigenvalues), trace, operator.shape[0], targets)


class HessianOperator:
    """The Hessian of Σ terms as a linear operator, as curvlinops' estimators take one: by `@`.

    Args:
        terms: computes the terms of the loss anew at each call, one graph at a time.
        parameters: of one dtype and on one device.
    """

    def __init__(
        self, terms: Callable[[], Iterator[torch.Tensor]], parameters: Sequence[torch.Tensor]
    ) -> None:
        self._terms, self._parameters = terms, list(parameters)
        size = sum(parameter.numel() for parameter in parameters)
        self.shape = (size, size)
        self.dtype, self.device = parameters[0].dtype, parameters[0].device

    def __matmul__(self, vectors: torch.Tensor) -> torch.Tensor:
        """Multiply D numbers, or D × K; the K share each term's first backward pass.

        Raises:
            ModelError: if an operation can't be differentiated twice.
        """
        columns = vectors.reshape(len(vectors), -1).detach()
        found = torch.zeros_like(columns)
        for term in self._terms():
            try:
                for number, column in enumerate(self._products(term, columns.t())):
                    found[:, number] += column
            except RuntimeError as error:
                if not any(sign in str(error) for sign in ONCE):
                    raise
                raise ModelError(f"the model can't be differentiated twice: {error}") from error
        return found.view(vectors.shape)

    def _products(self, term: torch.Tensor, rows: torch.Tensor) -> Iterator[torch.Tensor]:
        firsts: Sequence[Any] = torch.autograd.grad(
            term, self._parameters, create_graph=True, allow_unused=True
        )
        # A term may leave parameters out (an expert that no token chose), or be linear in them.
        used = [number for number, first in enumerate(firsts) if first is not None and first.requires_grad]
        if not used:
            return
        gradients, parameters = [firsts[n] for n in used], [self._parameters[n] for n in used]
        for row in rows:
            parts = list(row.split([parameter.numel() for parameter in self._parameters]))
            along = [parts[n].view_as(self._parameters[n]) for n in used]
            # Unused is an error here: behind what differentiates once only, all would silently be 0.
            second = torch.autograd.grad(gradients, parameters, along, retain_graph=True)
            products = [torch.zeros_like(part) for part in parts]
            for number, product in zip(used, second, strict=True):
                products[number] = product.reshape(-1)
            yield torch.cat(products)


class ReplayedOperator:
    """An operator whose product with one vector is a CUDA graph: thousands of launches become one.

    Args:
        operator: on a GPU; what it reads must stay where it is.
    """

    def __init__(self, operator: HessianOperator) -> None:
        self.shape, self.dtype, self.device = operator.shape, operator.dtype, operator.device
        self._vector = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
        self._graph = torch.cuda.CUDAGraph()
        stream, outside = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(outside)
        with torch.cuda.stream(stream):
            for _ in range(2):
                operator @ self._vector  # A capture wants everything to have run once.
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                self._product = operator @ self._vector
        outside.wait_stream(stream)

    def __matmul__(self, vectors: torch.Tensor) -> torch.Tensor:
        """Multiply D numbers, or D × K, one after the other."""
        found = torch.empty_like(vectors.reshape(len(vectors), -1))
        for number, column in enumerate(vectors.detach().reshape(len(vectors), -1).t()):
            self._vector.copy_(column)
            self._graph.replay()
            found[:, number] = self._product
        return found.view(vectors.shape)


def _replayed(operator: HessianOperator) -> HessianOperator | ReplayedOperator:
    if operator.device.type != "cuda":
        return operator
    try:
        return ReplayedOperator(operator)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        logging.getLogger(__name__).info("products with the Hessian are not captured: %s", error)
        return operator


def top_eigenvalues(operator: HessianOperator | ReplayedOperator, count: int, seed: int) -> list[float]:
    """Find the largest eigenvalues (falling) by Lanczos.

    A residual is at most √ε of its eigenvalue, ε being float32's. That bounds the eigenvalue's error; apart
    from others it is of the order of ε.

    Raises:
        DataError: if `count` is not from 1 to below the operator's size.
        ModelError: if Lanczos doesn't converge.
    """
    from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

    size = operator.shape[0]
    if not 1 <= count < size:
        raise DataError(f"{count} eigenvalues of {size} numbers can't be found: ask for 1 to {size - 1}")

    def product(vector: Any) -> Any:
        given = torch.as_tensor(vector.reshape(-1), dtype=operator.dtype, device=operator.device)
        return (operator @ given).cpu().numpy()

    kind = np.float64 if operator.dtype == torch.float64 else np.float32
    start = np.random.default_rng(seed).standard_normal(size, kind)
    linear = LinearOperator(operator.shape, matvec=product, dtype=kind)
    accuracy = float(torch.finfo(torch.float32).eps) ** 0.5
    try:
        found = eigsh(linear, k=count, which="LA", v0=start, tol=accuracy, return_eigenvectors=False)
    except ArpackError as error:
        raise ModelError(
            f"the Hessian's eigenvalues were not found ({error}); fewer analyze.eigenvalues, more "
            "analyze.examples, or dtype: float32 can help"
        ) from error
    return sorted(map(float, found), reverse=True)


def hessian_trace(operator: HessianOperator | ReplayedOperator, products: int, seed: int) -> float:
    """Estimate the trace without bias by Hutch++ (Meyer et al. 2021, arXiv:2010.09649).

    Raises:
        DataError: if `products` is no positive multiple of 3 below the operator's size.
        ResourceError: if curvlinops isn't installed.
    """
    curvlinops = _curvlinops()
    size = operator.shape[0]
    if products % 3 or not 0 < products < size:
        raise DataError(
            f"{products} products can't estimate the trace over {size} numbers: use a multiple of 3 below it"
        )
    device = operator.device
    # curvlinops draws from the global generators.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed(seed, "trace"))
        return float(curvlinops.hutchpp_trace(operator, products))


def _curvlinops() -> Any:
    try:
        return import_module("curvlinops")
    except ImportError as error:
        raise ResourceError(
            f"a Hessian's trace is estimated by curvlinops, which can't be imported ({error}): pip install "
            "--no-deps curvlinops-for-pytorch==3.0.1 einconv==0.1.0 linear_operator==0.6.1 opt_einsum==3.4.0"
        ) from error


class _PlainAdapter(Adapter):
    """x (W0 + B A)ᵀ + bias by operations that differentiate any number of times; B A in A's dtype."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)

    def forward(
        self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute base and update; the update alone without a weight."""
        y = functional.linear(functional.linear(x.to(self.a.dtype), self.a), self.b).to(x.dtype)
        return y if weight is None else functional.linear(x, weight, bias) + y

    def to_lora(self) -> LoraFactors:
        """Give the balanced factors."""
        return LoraFactors(self.a.detach(), self.b.detach(), 1.0)


@contextmanager
def _balanced(
    model: nn.Module, batches: Sequence[AnyBatch], modules: Mapping[str, LoraFactors]
) -> Iterator[tuple[list[nn.Parameter], Callable[[], Iterator[torch.Tensor]], int]]:
    """Put the balanced adapter in; give its numbers, what computes the mean loss's terms, and the targets."""
    if not batches:
        raise DataError("a loss needs at least one batch")
    adapters: dict[str, Adapter] = {}
    for name, layer in layers_for(model, modules).items():
        dtype = torch.promote_types(layer.dtype, torch.float32)
        found = sorted_factors(factored_svd(modules[name]), 1.0, dtype)
        adapters[name] = _PlainAdapter(found.a.to(layer.weight.device), found.b.to(layer.weight.device))
    parameters = [parameter for adapter in adapters.values() for parameter in adapter.parameters()]
    targets = sum(len(targets_of(batch)) for batch in batches)

    def terms() -> Iterator[torch.Tensor]:
        for batch in batches:
            yield batch_loss(model, batch)[0] / targets

    with swapped(model, adapters):
        yield parameters, terms, targets
