"""Load a base that ZeRO-3 partitions, so that no worker ever holds the whole base.

All workers build the model without values. Then, for one parameter after the other, the first worker reads
the values from their file and broadcasts them, and each worker keeps its part. Some files, such as those of
classifiers, can be read only by transformers; the first worker then loads the whole model into host memory,
which is the only whole copy among all workers.
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
from rayft.train.deepspeed import partitioner
from rayft.train.run import RunConfig
from rayft.train.worker import Worker

__all__ = ["load_partitioned"]

Read = Callable[[str], torch.Tensor]
"""Returns the values of a parameter by its name, on the CPU."""


def load_partitioned(run: RunConfig, worker: Worker) -> LoadedModel:
    """Load a run's base in parts and wrap its linear layers (all workers call it together).

    Classification heads are not partitioned, because each trial begins by setting them.

    Raises:
        ModelError: on all workers, if any of them can't find or load the base.
        TrainError: if the workers build different models.
    """
    read: Read | None = None
    with worker.together():
        loaded = load_empty(run.model, run.scale.torch_dtype)
        if worker.rank == 0:
            loaded, read = _open(run, loaded)
    # Before the weights are partitioned, because the sizes of some layers are known from their weights alone.
    wrap(loaded.model)
    _fill(loaded.model, run, worker, read)
    recall(loaded.model, worker.agreed(remembered(loaded.model)))
    return replace(loaded, fingerprint=worker.agreed(loaded.fingerprint))


def _open(run: RunConfig, empty: LoadedModel) -> tuple[LoadedModel, Read]:
    """Prepare to read the base's values, directly from its files if possible."""
    files = weight_files(run.model, empty.model)
    if files is not None:
        return replace(empty, fingerprint=files.fingerprint), files.read
    whole = load_model(run.model, run.scale.torch_dtype)
    # `pop` removes each tensor when it is read, so that it does not stay in memory after it was sent.
    tensors = {name: tensor.data for name, tensor in whole.model.named_parameters()}
    return whole, tensors.pop


def _fill(model: nn.Module, run: RunConfig, worker: Worker, read: Read | None) -> None:
    """Broadcast the first worker's values, and partition every parameter that is not part of a head.

    Args:
        model: the model without parameter values; its buffers have theirs.
        run: says how the parameters are partitioned.
        worker: this process.
        read: returns the values of a parameter; None on all workers but the first.
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
        TrainError: if they have not.
    """
    own = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in _tensors(model)]
    first = worker.agreed(own)
    with worker.together():
        if first != own:
            raise TrainError(
                "the workers build different models from the same files: install the same version of "
                "transformers on all nodes"
            )


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _places(model: nn.Module) -> dict[str, list[tuple[nn.Module, str]]]:
    """Map each parameter to the modules that have it, with its name there; tied layers have it in several."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            found.setdefault(id(parameter), []).append((module, leaf))
    return {name: found[id(parameter)] for name, parameter in model.named_parameters()}
