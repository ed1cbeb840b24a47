"""Products with the Hessian of a loss, and estimates of its eigenvalues and trace from them.

    H v = ∂/∂w (gᵀ v)                               two backward passes

Shapes: D parameters' numbers, K vectors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch

from rayft.errors import DataError, ModelError, ResourceError
from rayft.numerics import derive_seed
from rayft.train.graphs import capture_stream

__all__ = [
    "HessianOperator",
    "ReplayedOperator",
    "hessian_operator",
    "hessian_trace",
    "require_curvlinops",
    "top_eigenvalues",
]

ONCE = ("derivative for", "once_differentiable", "not have been used in the graph")
"""Parts of PyTorch's messages for an operation that can be differentiated once only."""


class HessianOperator:
    """The Hessian of Σ terms as a linear operator, as curvlinops' estimators take one: by `@`.

    Args:
        terms: computes the terms of the loss anew at each call, one graph at a time.
        parameters: of one dtype and on one device; with `keep`, they must not change after the first product.
        keep: whether to compute loss and gradient once for all products and to hold the graphs of all terms
            together; else they are computed anew for each `@`, and one term's graph is held at a time.
    """

    def __init__(
        self,
        terms: Callable[[], Iterator[torch.Tensor]],
        parameters: Sequence[torch.Tensor],
        *,
        keep: bool = False,
    ) -> None:
        self._terms, self._parameters, self._keep = terms, list(parameters), keep
        self._kept: list[dict[int, torch.Tensor]] | None = None
        size = sum(parameter.numel() for parameter in parameters)
        self.shape = (size, size)
        self.dtype, self.device = parameters[0].dtype, parameters[0].device

    def __matmul__(self, vectors: torch.Tensor) -> torch.Tensor:
        """Multiply by D numbers, or by D × K, whose K columns share each term's first backward pass.

        Raises:
            ModelError: if an operation can't be differentiated twice.
        """
        columns = vectors.reshape(len(vectors), -1).detach()
        found = torch.zeros_like(columns)
        try:
            for gradients in self._gradients():
                for number, column in enumerate(self._products(gradients, columns.t())):
                    found[:, number] += column
                # Free this term's graph before the next one is built, unless all are kept.
                del gradients
        except RuntimeError as error:
            if not any(sign in str(error) for sign in ONCE):
                raise
            raise ModelError(f"the model can't be differentiated twice: {error}") from error
        return found.view(vectors.shape)

    def _gradients(self) -> Iterable[dict[int, torch.Tensor]]:
        """Return each term's gradients that can be differentiated again: parameter's index → gradient."""
        if not self._keep:
            return map(self._gradient, self._terms())
        if self._kept is None:
            self._kept = [*map(self._gradient, self._terms())]
        return self._kept

    def _gradient(self, term: torch.Tensor) -> dict[int, torch.Tensor]:
        firsts: Sequence[Any] = torch.autograd.grad(
            term, self._parameters, create_graph=True, allow_unused=True
        )
        # A term may leave parameters out (an expert that no token chose), or be linear in them.
        return {n: first for n, first in enumerate(firsts) if first is not None and first.requires_grad}

    def _products(self, gradients: Mapping[int, torch.Tensor], rows: torch.Tensor) -> Iterator[torch.Tensor]:
        if not gradients:
            return
        parameters = [self._parameters[n] for n in gradients]
        for row in rows:
            parts = list(row.split([parameter.numel() for parameter in self._parameters]))
            along = [parts[n].view_as(self._parameters[n]) for n in gradients]
            # Unused parameters are an error: behind an operation that differentiates once, all would be 0.
            second = torch.autograd.grad([*gradients.values()], parameters, along, retain_graph=True)
            products = [torch.zeros_like(part) for part in parts]
            for number, product in zip(gradients, second, strict=True):
                products[number] = product.reshape(-1)
            yield torch.cat(products)


class ReplayedOperator:
    """An operator whose product with one vector is a CUDA graph, one launch instead of thousands.

    Args:
        operator: on a GPU, with `keep`, and not used yet, so that all of it runs on the capture's stream; the
            tensors that it reads must stay at their addresses.
    """

    def __init__(self, operator: HessianOperator) -> None:
        self.shape, self.dtype, self.device = operator.shape, operator.dtype, operator.device
        # The operator holds the tensors that the graph reads.
        self._operator = operator
        self._vector = torch.zeros(self.shape[0], dtype=self.dtype, device=self.device)
        self._graph = torch.cuda.CUDAGraph()
        with capture_stream():
            for _ in range(2):
                operator @ self._vector  # Everything must have run once before a capture.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._product = operator @ self._vector

    def __matmul__(self, vectors: torch.Tensor) -> torch.Tensor:
        """Multiply by D numbers, or by D × K, one column after the other."""
        found = torch.empty_like(vectors.reshape(len(vectors), -1))
        for number, column in enumerate(vectors.detach().reshape(len(vectors), -1).t()):
            self._vector.copy_(column)
            self._graph.replay()
            found[:, number] = self._product
        return found.view(vectors.shape)


def hessian_operator(
    terms: Callable[[], Iterator[torch.Tensor]], parameters: Sequence[torch.Tensor]
) -> HessianOperator | ReplayedOperator:
    """Return the fastest operator that the device has memory for."""
    if parameters[0].device.type != "cuda":
        # On a CPU running out of memory ends the process, so nothing larger is tried.
        return HessianOperator(terms, parameters)
    try:
        return _replayed(HessianOperator(terms, parameters, keep=True))
    except torch.OutOfMemoryError:
        pass
    torch.cuda.empty_cache()
    # Without a graph: each product computes the loss anew, for which attention reads on the host where the
    # segments begin, and that can't be captured.
    return HessianOperator(terms, parameters)


def _replayed(operator: HessianOperator) -> HessianOperator | ReplayedOperator:
    try:
        return ReplayedOperator(operator)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        logging.getLogger(__name__).info("products with the Hessian are not captured: %s", error)
        return operator


def top_eigenvalues(operator: HessianOperator | ReplayedOperator, count: int, seed: int) -> list[float]:
    """Find the largest eigenvalues (falling) by Lanczos.

    A residual is at most √ε of its eigenvalue, ε being float32's. That bounds the eigenvalue's error; an
    eigenvalue that is separated from others has an error of the order of ε.

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
    curvlinops = require_curvlinops()
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


def require_curvlinops() -> Any:
    """Import curvlinops, which is optional.

    Raises:
        ResourceError: if it isn't there, with what to install.
    """
    try:
        return import_module("curvlinops")
    except ImportError as error:
        raise ResourceError(
            f"a Hessian's trace is estimated by curvlinops, which can't be imported ({error}): pip install "
            "--no-deps curvlinops-for-pytorch==3.0.1 einconv==0.1.0 linear_operator==0.6.1 opt_einsum==3.4.0"
        ) from error
