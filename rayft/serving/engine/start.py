"""Starts the engine that a configuration asks for: vLLM on GPUs, rayft's own on CPUs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from rayft.artifacts import ModuleShapes
from rayft.errors import ConfigError, ModelError
from rayft.kernels.grouped_lora import WIDEST
from rayft.models.attention import longest_sequence
from rayft.models.fingerprint import source_fingerprint
from rayft.models.load import context_length, load_encoder, load_model, load_skeleton, resolve
from rayft.models.targets import linear_shapes
from rayft.numerics import fastest_cpu_dtype
from rayft.serving.config import ServeConfig
from rayft.serving.control.admission import BaseModel
from rayft.serving.engine.api import Engine, EngineLimits, end_tokens
from rayft.squeeze.budget import parse_bytes

__all__ = ["EngineName", "Started", "check_engine", "describe", "start_engine"]

EngineName = Literal["vllm", "cpu"]

ON_CPU = {"max_batch_tokens": 512, "cache_tokens": 8192}
"""Limits of the engine on CPUs that the configuration leaves open. vLLM chooses its own."""
OF_VLLM = ("gpus", "gpu_memory", "fp8", "vllm_untested")
"""Settings that mean nothing to the engine on CPUs."""
DEVICE_BYTES = 2 * 10**9
"""Memory for adapters on a GPU if the configuration sets no limit."""


@dataclass(frozen=True)
class Started:
    """An engine that is ready, and what it serves."""

    engine: Engine
    base: BaseModel
    tokenizer: Any
    context: int
    """Longest sequence of one request, in tokens."""
    dtype: torch.dtype
    """Dtype of weights and arithmetic."""
    device_bytes: int | None
    """Memory for adapters on the device; None for no limit."""


def _compute_dtype(config: ServeConfig, engine: EngineName) -> torch.dtype:
    """Return the dtype of weights and arithmetic."""
    if config.dtype == "auto":
        return torch.bfloat16 if engine == "vllm" else fastest_cpu_dtype()
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]


def check_engine(config: ServeConfig, engine: EngineName) -> None:
    """Check that the engine can run, without starting it.

    Raises:
        ConfigError: if a setting does not go with the engine.
        ResourceError: if the engine is vLLM, which is not installed or of a release that is not supported.
    """
    if config.model.task != "causal_lm":
        raise ConfigError(
            f"model.task: {config.model.task} is not served, only language models are; leave model.task out"
        )
    if engine == "cpu":
        for name in OF_VLLM:
            if getattr(config, name) != ServeConfig.model_fields[name].default:
                raise ConfigError(f"{name} is a setting of vLLM, which serves on GPUs; leave it out on a CPU")
        return
    from rayft.serving.engine.vllm.engine import installed
    from rayft.serving.engine.vllm.plugin import check_release

    check_release(installed(), untested=config.vllm_untested)
    if config.model.quantize is not None:
        raise ConfigError(
            f"model.quantize: {config.model.quantize} is not served by vLLM; leave it out, or set fp8: true "
            "for a base in 8 bits"
        )


def describe(config: ServeConfig, engine: EngineName, skeleton: nn.Module | None = None) -> BaseModel:
    """Describe the base, reading no more than the headers and some rows of its files.

    Args:
        config: names the base.
        engine: the engine that serves it.
        skeleton: the base without its weights; made here by default.

    Raises:
        ModelError: if the base can't be found, or its files lack its parameters.
    """
    skeleton = skeleton or load_skeleton(config.model)
    identity = source_fingerprint(skeleton, resolve(config.model), config.model.revision)
    if identity is None:
        if engine == "vllm":
            raise ModelError(
                f"the files of {config.model.name} don't hold its parameters under their names in "
                "transformers; load it there and save it by save_pretrained, then serve that folder"
            )
        identity = load_model(config.model, torch.bfloat16).fingerprint
    widest = WIDEST if engine == "vllm" else None
    return BaseModel(config.model.name, identity, linear_shapes(skeleton), widest)


def start_engine(config: ServeConfig, engine: EngineName) -> Started:
    """Load the base and start the engine.

    Raises:
        ConfigError: if a setting does not go with the engine.
        ModelError: if the base can't be loaded, or not be run by the engine.
        ResourceError: if vLLM can't be used, or memory is lacking.
    """
    check_engine(config, engine)
    return (_on_gpu if engine == "vllm" else _on_cpu)(config)


def _on_cpu(config: ServeConfig) -> Started:
    from rayft.serving.engine.cpu.engine import CpuEngine

    dtype = _compute_dtype(config, "cpu")
    loaded = load_model(config.model, dtype, "cpu")
    if config.model.quantize is None:
        _own_memory(loaded.model)
    base = BaseModel(config.model.name, loaded.fingerprint, linear_shapes(loaded.model))
    limits = EngineLimits(
        config.max_running,
        config.max_batch_tokens or ON_CPU["max_batch_tokens"],
        config.cache_tokens or ON_CPU["cache_tokens"],
    )
    ends = end_tokens(loaded.model.generation_config, loaded.tokenizer)
    room = None if config.device_bytes is None else parse_bytes(config.device_bytes)
    longest = longest_sequence(loaded.model.config) or loaded.context
    context = min(loaded.context, limits.cache_tokens, longest)
    return Started(CpuEngine(loaded.model, ends, limits), base, loaded.tokenizer, context, dtype, room)


def _on_gpu(config: ServeConfig) -> Started:
    from transformers import GenerationConfig

    from rayft.serving.engine.vllm.engine import VllmEngine, VllmOptions

    skeleton, source = load_skeleton(config.model), resolve(config.model)
    base = describe(config, "vllm", skeleton)
    tokenizer = load_encoder(config.model, skeleton.config)
    try:
        generation = GenerationConfig.from_pretrained(source, revision=config.model.revision or "main")
    except OSError:
        generation = skeleton.generation_config
    dtype = _compute_dtype(config, "vllm")
    room = DEVICE_BYTES if config.device_bytes is None else parse_bytes(config.device_bytes)
    options = VllmOptions(
        source,
        config.model.revision,
        dtype,
        adapter_bytes=room,
        gpus=config.gpus,
        memory=config.gpu_memory,
        fp8=config.fp8,
        end=tokenizer.eos_token_id,
        untested=config.vllm_untested,
    )
    limits = EngineLimits(config.max_running, config.max_batch_tokens or 0, config.cache_tokens or 0)
    engine = VllmEngine(options, limits, end_tokens(generation, tokenizer))
    served = _served(base, engine.linears)
    context = min(engine.context, context_length(config.model, skeleton.config, tokenizer))
    return Started(engine, served, tokenizer, context, dtype, room)


def _served(base: BaseModel, linears: ModuleShapes) -> BaseModel:
    """Add which layers can't have adapters in the engine: those that it lacks, or has in another shape."""
    lacking = {name for name, shape in base.shapes.items() if linears.get(name) != tuple(shape)}
    return replace(base, unserved=frozenset(lacking))


def _own_memory(model: torch.nn.Module) -> None:
    """Copy the weights out of the memory maps of the base's files.

    A map shows what is written into the file later, and a process that reads the map of a truncated file is
    killed (SIGBUS).
    """
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
