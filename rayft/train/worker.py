"""`Worker`: one process of a run, and what it exchanges with the others through torch.distributed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from rayft.errors import RayftError

__all__ = ["Worker"]


@dataclass(frozen=True)
class Worker:
    """One process of a run, and what it exchanges with the others.

    All workers must call `total`, `largest`, `same`, `share`, `agreed` and `together` at the same points.
    """

    rank: int = 0
    world: int = 1
    device: str = "cpu"

    @classmethod
    def current(cls, device: str) -> Worker:
        """Return this process's place in torch.distributed; if that is not initialised, the only worker."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size(), device)
        return cls(device=device)

    @property
    def runs_ahead(self) -> bool:
        """Whether the numbers of a step are read after the next one is launched.

        A CPU has computed a step when it is launched, and several workers exchange their losses at once.
        """
        return self.world == 1 and torch.device(self.device).type == "cuda"

    def total(self, *values: float) -> list[float]:
        """Return the sums of numbers over all workers."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def largest(self, value: int) -> int:
        """Return the largest of all workers' numbers."""
        if self.world == 1:
            return value
        tensor = torch.tensor([value], device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor.item())

    def same(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return rank 0's tensor on all workers.

        What each worker computes may differ by rounding, or by a sign in an SVD.
        """
        tensor = tensor.contiguous()
        if self.world > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def share(self, value: bool) -> bool:
        """Return rank 0's decision on all workers."""
        if self.world == 1:
            return value
        tensor = torch.tensor([int(value)], device=self.device)
        dist.broadcast(tensor, 0)
        return bool(tensor.item())

    def agreed(self, value: Any) -> Any:
        """Return rank 0's value, any object that can be pickled, on all workers."""
        if self.world == 1:
            return value
        box = [value]
        # Ray Train gives GPU groups NCCL alone, which moves objects through the device.
        dist.broadcast_object_list(box, 0)
        return box[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise an error on all workers if the block raises a `RayftError` on any of them.

        Without this, the other workers would wait forever in their next exchange. The block itself must not
        exchange anything after a statement that may fail.

        Raises:
            RayftError: this worker's own error, or else the first one of another worker.
        """
        error: RayftError | None = None
        try:
            yield
        except RayftError as own:
            error = own
        if self.world > 1:
            errors: list[RayftError | None] = [None] * self.world
            dist.all_gather_object(errors, error)
            error = error or next((each for each in errors if each is not None), None)
        if error is not None:
            error.everywhere = True
            raise error
