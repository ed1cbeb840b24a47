"""DeepSpeed: its configuration derived from ours, its engine, and what ZeRO-3 needs around saving.

Numerics: the loss is a sum over completion tokens divided by their number in the whole optimizer
step. The engine averages gradients over workers and divides by the accumulation steps, so each
micro-batch loss is multiplied by both beforehand.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from rayft.errors import TrainError
from rayft.train.run import RunConfig

__all__ = ["Engine", "build_engine", "destroy", "engine_config", "gathered", "grad_norm", "set_lr"]

Engine = Any
"""deepspeed.DeepSpeedEngine (the package has no types)."""


def engine_config(run: RunConfig) -> dict[str, Any]:
    """Derive DeepSpeed's configuration; `run.deepspeed` is merged over it."""
    scale = run.scale
    micro = run.optim.rows_per_step // (scale.workers * scale.accumulation)
    zero: dict[str, Any] = {"stage": scale.zero}
    if scale.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": scale.device == "cuda"}
    if scale.zero == 3:
        zero["stage3_param_persistence_threshold"] = 0
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": scale.accumulation,
        "gradient_clipping": run.optim.clip,
        "zero_optimization": zero,
        # torch's AdamW: DeepSpeed's own Adam compiles C++ on the spot.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if scale.dtype == "bfloat16":
        # With a ZeRO stage DeepSpeed keeps fp32 master weights and accumulates gradients in fp32.
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return _merge(config, run.deepspeed)


def build_engine(run: RunConfig, model: nn.Module) -> Engine:
    """Make an engine over the trainable parameters, in the process group that is already there.

    Raises:
        TrainError: if DeepSpeed refuses the configuration.
    """
    import deepspeed

    if not dist.is_initialized():
        raise TrainError("torch.distributed is not initialised; run this in a Ray Train worker")
    if run.scale.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # Compiled on first use (47 s on two cores, and a compiler must be there); gloo does the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optim = run.optim
    optimizer = torch.optim.AdamW(
        trainable, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, foreach=True
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine, *_ = deepspeed.initialize(
                model=model,
                model_parameters=trainable,
                optimizer=optimizer,
                config=engine_config(run),
                dist_init_required=False,
            )
    except (AssertionError, ValueError, RuntimeError) as error:
        raise TrainError(
            f"DeepSpeed refused the configuration: {error}; look at scale and deepspeed"
        ) from error
    # Its own version keeps a tied output layer, the largest matrix of a small model, in every checkpoint.
    engine.module_state_dict = partial(_trainable_state, engine)
    return engine


def _trainable_state(engine: Engine, *_: Any, **__: Any) -> dict[str, torch.Tensor]:
    state = engine.module.state_dict(keep_vars=True)
    return {name: value.detach() for name, value in state.items() if value.requires_grad}


def grad_norm(engine: Engine) -> float:
    """Give the global gradient norm before clipping (call between backward and step for ZeRO 0)."""
    if engine.zero_optimization_stage() > 0:
        return float(engine.get_global_grad_norm() or math.nan)
    norms = [p.grad.norm() for p in engine.module.parameters() if p.grad is not None]
    return float(torch.stack(norms).norm()) if norms else math.nan


def set_lr(engine: Engine, lr: float) -> None:
    """Set the learning rate of the coming step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


def destroy(engine: Engine) -> None:
    """Take an engine's hooks and buffers off the model, so that the next one starts clean."""
    engine.destroy()


@contextmanager
def gathered(run: RunConfig, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Make partitioned parameters whole for a while (ZeRO-3; all workers must take part)."""
    if run.scale.zero != 3:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parameters)):
        yield


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        merged[key] = _merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged
