"""The models that targets need in this process: checked without weights, then loaded one after the other."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from rayft.errors import BaseMismatchError, ResourceError
from rayft.flow.target import Target
from rayft.models.fingerprint import source_fingerprint
from rayft.models.inject import attach, check_fits, clear, wrap
from rayft.models.load import LoadedModel, ModelConfig, load_model, load_skeleton, resolve
from rayft.models.quantize import quantization
from rayft.train.run import ScaleConfig

__all__ = ["check_model", "device_of", "loaded", "put_on", "together"]


def device_of(scale: ScaleConfig) -> str:
    """Return the device of a settled section on this machine.

    Raises:
        ResourceError: if it is a GPU, and there is none.
    """
    if scale.device != "cuda":
        return "cpu"
    if not torch.cuda.is_available():
        raise ResourceError("scale.device is cuda, but no GPU is here: write --set scale.device=cpu")
    return "cuda:0"


def check_model(config: ModelConfig, scale: ScaleConfig, targets: Sequence[Target]) -> Any:
    """Check that a model can be loaded and that adapters fit it, and return it without its weights.

    Args:
        config: the model.
        scale: a settled section.
        targets: those that need the model.

    Raises:
        BaseMismatchError: if an adapter was made for another base: by its fingerprint, modules or heads.
        ModelError: if the model can't be found.
        ResourceError: if it is to be quantised, and bitsandbytes is not installed.
    """
    skeleton = load_skeleton(config)
    if config.quantize:
        quantization(config.quantize, skeleton, scale.torch_dtype)
    adapters = [(target.name, target.adapter) for target in targets if target.adapter is not None]
    known = source_fingerprint(skeleton, resolve(config), config.revision) if adapters else None
    for name, adapter in adapters:
        try:
            check_fits(skeleton, adapter, known or "")
        except BaseMismatchError as error:
            raise BaseMismatchError(f"{name} can't be used with {config.name}: {error}") from error
    return skeleton


def together(configs: Sequence[ModelConfig]) -> dict[ModelConfig, list[int]]:
    """Return the targets that share a model: the model → their numbers."""
    found: dict[ModelConfig, list[int]] = {}
    for number, config in enumerate(configs):
        found.setdefault(config, []).append(number)
    return found


@contextmanager
def loaded(config: ModelConfig, scale: ScaleConfig) -> Iterator[LoadedModel]:
    """Yield a model in memory, ready for adapters, and free it afterwards.

    Args:
        config: the model.
        scale: a settled section: device, dtype and threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(scale.threads or threads)
    try:
        model = load_model(config, scale.torch_dtype, device_of(scale))
        wrap(model.model)
        yield model
        del model
    finally:
        torch.set_num_threads(threads)
        # Before the next one is loaded.
        gc.collect()


def put_on(model: LoadedModel, target: Target) -> None:
    """Let a model in memory be a target: take out the adapter that is in it, and put in the target's."""
    clear(model.model)
    if target.adapter is not None:
        attach(model.model, target.adapter)
    model.model.eval()
