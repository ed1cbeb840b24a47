"""Loading a base that ZeRO-3 partitions, so that no worker ever has it whole on its device.

The first worker reads the base into host memory, the only whole copy among all workers. The others build the
model without numbers. Then, one parameter after the other, the first worker sends it to all, and each keeps
its part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

from rayft.errors import TrainError
from rayft.models.heads import head_parameters, recall, remembered
from rayft.models.inject import wrap
from rayft.models.load import LoadedModel, load_empty, load_model
from rayft.train.context import Worker
from rayft.train.deepspeed import partitioner
from rayft.train.run import RunConfig

__all__ = ["load_partitioned"]


def load_partitioned(run: RunConfig, worker: Worker) -> LoadedModel:
    """Load a run's base in parts, its linear layers wrapped (all workers call it together).

    Classification heads stay whole, since a trial begins by setting them.

    Raises:
        ModelError: on all workers, if any can't find or load it.
        TrainError: if the workers build different models.
    """
    with worker.together():
        load = load_model if worker.rank == 0 else load_empty
        loaded = load(run.model, run.scale.torch_dtype)
    # First, since some layers' weights are all that tells their sizes.
    wrap(loaded.model)
    _fill(loaded.model, run, worker)
    recall(loaded.model, worker.agreed(remembered(loaded.model)))
    return replace(loaded, fingerprint=worker.agreed(loaded.fingerprint))


def _fill(model: nn.Module, run: RunConfig, worker: Worker) -> None:
    """Send the first worker's numbers to all, and partition every parameter that is no head's."""
    tensors = dict(_tensors(model))
    own = [(name, tuple(tensor.shape)) for name, tensor in tensors.items()]
    told = worker.agreed([(*each, tensors[each[0]].dtype) for each in own])
    with worker.together():
        if [each[:2] for each in told] != own:
            raise TrainError(
                "the workers build different models from the same files: install the same version of "
                "transformers on all nodes"
            )
    places, whole, keep_part = _places(model), head_parameters(model), partitioner(run)
    for name, shape, dtype in told:
        tensor = tensors.pop(name)
        if worker.rank == 0:
            here = tensor
            here.data = tensor.data.to(worker.device)
        else:
            here = torch.empty(shape, dtype=dtype, device=worker.device)
            if isinstance(tensor, nn.Parameter):
                here = nn.Parameter(here, requires_grad=False)
            for module, leaf in places.pop(id(tensor)):
                # Of tied layers all get it.
                setattr(module, leaf, here)
        if isinstance(here, nn.Parameter) and name not in whole:
            keep_part(here)
        else:
            dist.broadcast(here.data, 0)


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Give parameters and buffers by name, tied ones once."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Find where each parameter and buffer is: its id → modules, with its name there."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            places.setdefault(id(tensor), []).append((module, leaf))
    return places
