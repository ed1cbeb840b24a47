"""Loading a base that ZeRO-3 partitions, so that no worker ever has it whole.

All workers build the model without numbers. Then, one parameter after the other, the first worker reads it
from its file and sends it to all, and each keeps its part. Files that only transformers can read, such as
those of classifiers, the first worker loads into host memory first, the only whole copy among all workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

from rayft.errors import TrainError
from rayft.models.heads import head_parameters, recall, remembered
from rayft.models.inject import wrap
from rayft.models.load import LoadedModel, load_empty, load_model, weight_files
from rayft.train.context import Worker
from rayft.train.deepspeed import partitioner
from rayft.train.run import RunConfig

__all__ = ["load_partitioned"]

Read = Callable[[str], torch.Tensor]
"""Gives the numbers of a parameter by its name, on the CPU."""


def load_partitioned(run: RunConfig, worker: Worker) -> LoadedModel:
    """Load a run's base in parts, its linear layers wrapped (all workers call it together).

    Classification heads stay whole, since a trial begins by setting them.

    Raises:
        ModelError: on all workers, if any can't find or load it.
        TrainError: if the workers build different models.
    """
    read: Read | None = None
    with worker.together():
        loaded = load_empty(run.model, run.scale.torch_dtype)
        if worker.rank == 0:
            loaded, read = _open(run, loaded)
    # First, since some layers' weights are all that tells their sizes.
    wrap(loaded.model)
    _fill(loaded.model, run, worker, read)
    recall(loaded.model, worker.agreed(remembered(loaded.model)))
    return replace(loaded, fingerprint=worker.agreed(loaded.fingerprint))


def _open(run: RunConfig, empty: LoadedModel) -> tuple[LoadedModel, Read]:
    """Prepare to read the base's numbers, from its files where that is possible."""
    files = weight_files(run.model, empty.model)
    if files is not None:
        return replace(empty, fingerprint=files.fingerprint), files.read
    whole = load_model(run.model, run.scale.torch_dtype)
    # Each is taken out when it is read, so that what has been sent is no longer in memory.
    tensors = {name: tensor.data for name, tensor in whole.model.named_parameters()}
    return whole, tensors.pop


def _fill(model: nn.Module, run: RunConfig, worker: Worker, read: Read | None) -> None:
    """Send the first worker's numbers to all, and partition every parameter that is no head's.

    Args:
        model: without numbers, but for the buffers.
        run: how it is partitioned.
        worker: this process.
        read: gives the numbers, on the first worker.
    """
    _check_same(model, worker)
    places, whole, keep_part = _places(model), head_parameters(model).keys(), partitioner(run)
    for name, empty in [*model.named_parameters()]:
        if read is not None:
            value = read(name).to(worker.device, empty.dtype)
        else:
            value = torch.empty(empty.shape, dtype=empty.dtype, device=worker.device)
        parameter = nn.Parameter(value, requires_grad=False)
        del value
        for module, leaf in places[name]:
            setattr(module, leaf, parameter)
        if name in whole:
            dist.broadcast(parameter.data, 0)
        else:
            keep_part(parameter)
    for module in model.modules():
        for leaf, buffer in module.named_buffers(recurse=False):
            here = buffer.to(worker.device)
            dist.broadcast(here, 0)
            module._buffers[leaf] = here


def _check_same(model: nn.Module, worker: Worker) -> None:
    """Check that all workers have built the same model.

    Raises:
        TrainError: if not.
    """
    own = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in _tensors(model)]
    told = worker.agreed(own)
    with worker.together():
        if told != own:
            raise TrainError(
                "the workers build different models from the same files: install the same version of "
                "transformers on all nodes"
            )


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _places(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Find where each parameter is: its name → modules, with its name there; several if layers are tied."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            found.setdefault(id(parameter), []).append((module, leaf))
    return {name: found[id(parameter)] for name, parameter in model.named_parameters()}
