"""Loss landscapes of an adapter, L(W0 + ΔW + α·D1 + β·D2). Li et al. 2018, arXiv:1712.09913.

Many points share one forward: the batch is copied K times, and each adapted layer adds to copy k

    x ΔWᵀ + Σ_j c_kj x D_jᵀ                                 c (K × J), J = 1 or 2

with W0 + ΔW never multiplied out: in bfloat16 the weights' rounding would swallow small updates.

Shapes: K points at once, J directions, N tokens of a copy, R ranks of all factors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional

from rayft.analysis.directions import Direction
from rayft.artifacts import AdapterArtifact
from rayft.data.pack import AnyBatch, Batch, ClassBatch, ImageBatch
from rayft.errors import DataError, MethodError, ModelError
from rayft.evaluate.loss import target_losses
from rayft.methods.base import Adapter, AdapterLinear, LoraFactors
from rayft.models.inject import check_fits, wrap
from rayft.models.targets import linears
from rayft.peft.layers import put_aside

__all__ = [
    "grid_1d",
    "grid_2d",
    "grid_around",
    "layers_for",
    "losses",
    "repeated",
    "swapped",
]


def grid_1d(size: int, extent: float) -> torch.Tensor:
    """Return (size, 1) points from −extent to extent; an odd size has the adapter itself in the middle."""
    return torch.linspace(-extent, extent, size, dtype=torch.float64)[:, None]


def grid_2d(size: int, extent: float) -> torch.Tensor:
    """Return (size², 2) points of a square from −extent to extent; the second coordinate runs first."""
    axis = grid_1d(size, extent)[:, 0]
    return torch.cartesian_prod(axis, axis)


def grid_around(coordinates: torch.Tensor, size: int, margin: float = 0.25) -> torch.Tensor:
    """Return (size², 2) points of a rectangle around a path (T × 2), with a margin on every side."""
    low, high = coordinates.double().amin(0), coordinates.double().amax(0)
    room = margin * (high - low)
    first, second = (
        torch.linspace(float(start), float(stop), size, dtype=torch.float64)
        for start, stop in zip(low - room, high + room, strict=True)
    )
    return torch.cartesian_prod(first, second)


def losses(
    model: nn.Module,
    batches: Sequence[AnyBatch],
    modules: Mapping[str, LoraFactors],
    directions: Sequence[Direction],
    points: torch.Tensor,
    points_at_once: int,
) -> torch.Tensor:
    """Evaluate L(W0 + ΔW + Σ_j c_j D_j) at points: the mean over all targets of all batches, in nats.

    Adapters in the model, and the modes of its modules, are restored afterwards. A trained head takes part as
    it is in the model.

    Args:
        model: the base, wrapped here if it isn't; evaluated in evaluation mode, without gradients.
        batches: on the model's device; the same targets at every point.
        modules: the adapter: module path → factors of ΔW.
        directions: J of them, of modules that the adapter has.
        points: c (P × J).
        points_at_once: how many copies of a batch share a forward pass; halved whenever memory runs out.

    Returns:
        (P,) float64, on the CPU.

    Raises:
        BaseMismatchError: if the adapter doesn't fit the model.
        MethodError: if an adapter in the model can't be taken out and put back.
        ModelError: if a layer mixes the rows of a batch, and points_at_once is above 1.
        DataError: if there are no batches, or points and directions don't match.
    """
    assert points_at_once >= 1
    if not batches:
        raise DataError("a loss needs at least one batch")
    if points.ndim != 2 or points.shape[1] != len(directions):
        raise DataError(f"points are {tuple(points.shape)}, where {len(directions)} coordinates are wanted")
    layers = layers_for(model, modules)
    adapters = {
        name: _PointsAdapter(name, layer, modules[name], [direction.get(name) for direction in directions])
        for name, layer in layers.items()
    }
    with swapped(model, adapters), torch.inference_mode():
        return _in_chunks(
            lambda chunk: _mean_losses(model, batches, adapters.values(), chunk), points, points_at_once
        )


def layers_for(model: nn.Module, modules: Mapping[str, LoraFactors]) -> dict[str, AdapterLinear]:
    """Return the layers that an adapter is for, and wrap the model if it isn't yet.

    Raises:
        BaseMismatchError: if the adapter doesn't fit the model.
        MethodError: if an adapter in the model can't be taken out and put back.
    """
    check_fits(model, AdapterArtifact(modules))
    adapters = [getattr(layer, "adapter", None) for layer in linears(model).values()]
    changing = any(adapter and type(adapter).restore is not Adapter.restore for adapter in adapters)
    if changing or put_aside(model) is not None:
        raise MethodError(
            "what is in the model changed the model itself, so it can't be put aside: export it, clear the "
            "model, and analyse what was exported"
        )
    wrap(model)
    found = linears(model)
    return {name: layer for name in modules if isinstance(layer := found[name], AdapterLinear)}


@contextmanager
def swapped(model: nn.Module, adapters: Mapping[str, Adapter]) -> Iterator[None]:
    """Put these adapters and no others into a wrapped model in evaluation mode; restore everything after."""
    layers = {n: layer for n, layer in linears(model).items() if isinstance(layer, AdapterLinear)}
    before = {name: layer.adapter for name, layer in layers.items()}
    modes = [(module, module.training) for module in model.modules()]
    try:
        for name, layer in layers.items():
            layer.adapter = adapters.get(name)
        model.eval()
        yield
    finally:
        for name, layer in layers.items():
            layer.adapter = before[name]
        for module, training in modes:
            module.training = training


def repeated(batch: AnyBatch, times: int) -> AnyBatch:
    """Repeat all rows of a batch, in order, `times` times, with their targets."""
    if isinstance(batch, ImageBatch):
        return ImageBatch(batch.pixel_values.repeat(times, 1, 1, 1), batch.labels.repeat(times))
    ids = batch.input_ids
    if isinstance(batch, ClassBatch):
        return ClassBatch(
            ids.repeat(times, 1), batch.attention_mask.repeat(times, 1), batch.labels.repeat(times)
        )
    # The index is into the flattened B·T tokens, so that copy k begins at k·B·T.
    starts = torch.arange(times, device=ids.device)[:, None] * ids.numel()
    return Batch(
        input_ids=ids.repeat(times, 1),
        position_ids=batch.position_ids.repeat(times, 1),
        # Copy k begins where copy k − 1 ends.
        offsets=torch.cat([batch.offsets[:1], (batch.offsets[1:] + starts.int()).flatten()]),
        completion_index=(batch.completion_index + starts).flatten(),
        targets=batch.targets.repeat(times),
    )


class _PointsAdapter(Adapter):
    """ΔW + Σ_j c_kj D_j for the rows of copy k, in plain operations; nothing in it trains.

    Factored directions are stacked with ΔW's factors, h = x Aᵀ scaled by each rank's coefficient. Dense
    directions are summed to E_k = Σ_j c_kj D_j, which takes one matrix product for each copy and not for each
    direction.
    """

    def __init__(
        self,
        name: str,
        layer: AdapterLinear,
        factors: LoraFactors,
        directions: Sequence[torch.Tensor | LoraFactors | None],
    ) -> None:
        super().__init__()
        self.name, self.factors = name, factors
        device, dtype = layer.weight.device, layer.dtype
        low = [factors]
        self.owner, dense, self.dense_columns = [0] * factors.rank, [], []
        for number, direction in enumerate(directions):
            if isinstance(direction, LoraFactors) and direction.compact:
                low.append(direction)
                self.owner += [number + 1] * direction.rank
            elif direction is not None:
                dense.append(direction.delta() if isinstance(direction, LoraFactors) else direction)
                self.dense_columns.append(number)
        self.a_RI = torch.cat([f.a.to(device, dtype) for f in low])
        self.b_OR = torch.cat([(f.scale * f.b).to(device, dtype) for f in low], 1)
        self.dense_JOI = torch.stack([d.to(device, dtype) for d in dense]) if dense else None

    def move(self, points_KJ: torch.Tensor, rows: int) -> None:
        """Set the points of the next forward pass, whose batch has `rows` rows in each copy."""
        # In float32 at least, since a coordinate rounded to bfloat16 would be another point.
        dtype = torch.promote_types(self.a_RI.dtype, torch.float32)
        self.points_KJ, self.rows = points_KJ.to(self.a_RI.device, dtype), rows
        ones = self.points_KJ.new_ones(len(points_KJ), 1)
        self.by_rank_K1R = torch.cat([ones, self.points_KJ], 1)[:, None, self.owner]

    def forward(
        self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute base and updates, or the updates alone if no weight is given."""
        copies = len(self.points_KJ)
        if copies > 1 and x.shape[0] % (copies * self.rows):
            raise ModelError(
                f"{self.name} gets {x.shape[0]} rows for {copies} copies of {self.rows}: it mixes the "
                "rows of a batch, so its copies can't be different points; use points_at_once=1"
            )
        x_KNI = x.reshape(copies, -1, x.shape[-1])
        h_KNR = functional.linear(x_KNI, self.a_RI)
        y_KNO = functional.linear((h_KNR * self.by_rank_K1R).to(x.dtype), self.b_OR)
        if self.dense_JOI is not None:
            moved = self.points_KJ[:, self.dense_columns]
            e_KOI = torch.tensordot(moved, self.dense_JOI.to(moved.dtype), 1).to(x.dtype)
            y_KNO = torch.baddbmm(y_KNO, x_KNI, e_KOI.mT)
        y = y_KNO.view(*x.shape[:-1], y_KNO.shape[-1])
        return y if weight is None else functional.linear(x, weight, bias) + y

    def to_lora(self) -> LoraFactors:
        """Return ΔW, the point (0, 0)."""
        return self.factors


def _in_chunks(
    evaluate: Callable[[torch.Tensor], torch.Tensor], points: torch.Tensor, at_once: int
) -> torch.Tensor:
    found: list[torch.Tensor] = []
    done = 0
    while done < len(points):
        chunk = points[done : done + at_once]
        try:
            found.append(evaluate(chunk))
        except torch.OutOfMemoryError:
            if len(chunk) == 1:
                raise
            at_once = len(chunk) // 2
        else:
            done += len(chunk)
    return torch.cat(found).cpu()


def _mean_losses(
    model: nn.Module, batches: Sequence[AnyBatch], adapters: Iterable[_PointsAdapter], points_KJ: torch.Tensor
) -> torch.Tensor:
    total, targets = torch.zeros(()), 0
    for batch in batches:
        for adapter in adapters:
            adapter.move(points_KJ, len(batch.input_ids))
        found = target_losses(model, repeated(batch, len(points_KJ))).view(len(points_KJ), -1)
        total, targets = total.to(found.device) + found.double().sum(1), targets + found.shape[1]
    return total / targets
