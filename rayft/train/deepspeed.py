"""DeepSpeed: its configuration, its engine, the optimizer step, and gathering parameters for ZeRO-3.

Numerics: the loss is a sum over completion tokens divided by their number in the whole optimizer
step. The engine averages gradients over workers and divides by the accumulation steps, so each
micro-batch loss is multiplied by both beforehand.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, KeysView, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import nn

from rayft.config import in_one_line, nearest
from rayft.data.pack import AnyBatch
from rayft.errors import ConfigError, TrainError
from rayft.evaluate.loss import batch_loss, targets_of
from rayft.models.methods import method
from rayft.train.course import HalfDoneError
from rayft.train.run import RunConfig
from rayft.train.worker import Worker

__all__ = [
    "DeepSpeedEngine",
    "Later",
    "StepResult",
    "build_engine",
    "check_settings",
    "check_written",
    "checkpoint_bytes",
    "destroy",
    "engine_config",
    "gathered",
    "kept",
    "later",
    "optimizer_step",
    "partitioner",
    "release",
    "set_lr",
    "trained_state",
]

DeepSpeedEngine = Any
"""`deepspeed.DeepSpeedEngine`; the package has no types."""


@dataclass(frozen=True)
class StepResult:
    """The numbers of an optimizer step."""

    loss: float
    """Mean loss, nats per completion token."""
    grad_norm: float
    """Before clipping."""
    tokens: int
    """Tokens of all workers' micro-batches."""
    padding: float = 0.0
    """Share of padding in this worker's packed rows."""
    seconds: float = 0.0
    """Duration of the step, which several runs may have taken together."""
    share: float = 1.0
    """The run's share of the tokens of such a step."""


Later = Callable[[], StepResult]
"""Waits until the device has taken a step that was launched, and returns its numbers.

They are read after the next step was launched, so that the device always has work.
"""


def engine_config(run: RunConfig) -> dict[str, Any]:
    """Derive DeepSpeed's configuration from a run's, and merge `run.deepspeed` over it."""
    scale, accumulation = run.scale, run.scale.accumulation or 1
    micro = run.optim.rows_per_step // (scale.workers * accumulation)
    zero: dict[str, Any] = {"stage": scale.zero}
    if scale.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": scale.device == "cuda"}
    if scale.zero == 3:
        zero["stage3_param_persistence_threshold"] = 0
        # After the first step DeepSpeed searches, in Python, this number of parameters ahead of each module
        # for a reuse: by default all of a small model, which took 10 s with 30 layers.
        zero["stage3_max_reuse_distance"] = 10**7
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": run.optim.clip,
        "zero_optimization": zero,
        # We pass torch's AdamW, because DeepSpeed's own Adam compiles C++ when it is first used.
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


def check_settings(run: RunConfig) -> None:
    """Check, before workers are started, that DeepSpeed accepts `run.deepspeed` and ignores no part of it.

    Raises:
        ConfigError: with what DeepSpeed says, or with the setting that it does not know.
    """
    if not run.deepspeed:
        return
    if run.scale.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import DeepSpeedConfig

    given = _Asked(engine_config(run))
    try:
        DeepSpeedConfig(given)
    except ValidationError as error:
        raise ConfigError(f"deepspeed: DeepSpeed refuses {in_one_line(error)}") from error
    except (AssertionError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"deepspeed: DeepSpeed can't read these settings: {error}") from error
    for name in run.deepspeed:
        if name not in given.asked:
            raise ConfigError(f"deepspeed: DeepSpeed has no setting '{name}'{nearest(name, given.asked)}")


class _Asked(dict[str, Any]):
    """A configuration that notes which settings DeepSpeed asks for, which are all that it knows."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        self.asked: set[str] = set()

    def __contains__(self, name: Any) -> bool:
        self.asked.add(name)
        return super().__contains__(name)

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.asked.add(name)
        return super().get(name, default)

    def keys(self) -> Any:
        return KeysView(self)


def build_engine(
    run: RunConfig, model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> DeepSpeedEngine:
    """Build an engine over the trainable parameters, in the process group that is already initialised.

    Args:
        run: with the settings of one run.
        model: what trains.
        optimizer: an optimizer of its trainable parameters; by default AdamW with the run's groups.

    Raises:
        TrainError: if DeepSpeed rejects the configuration.
        torch.OutOfMemoryError: if gradients, masters or moments do not fit into the device's memory.
    """
    deepspeed, optim = _deepspeed(run), run.optim
    if optimizer is None:
        groups = parameter_groups(run, model)
        optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, foreach=True)
    trainable = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    config = engine_config(run)
    # Two buffers of this many numbers are allocated: by default two of a gigabyte, whatever trains.
    config["zero_optimization"].setdefault("reduce_bucket_size", sum(p.numel() for p in trainable))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine, *_ = deepspeed.initialize(
                model=model,
                model_parameters=trainable,
                optimizer=optimizer,
                config=config,
                dist_init_required=False,
            )
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, ValueError, RuntimeError) as error:
        raise TrainError(
            f"DeepSpeed refused the configuration: {error}; look at scale and deepspeed"
        ) from error
    # DeepSpeed's own version writes a tied output layer, the largest matrix of a small model, to every
    # checkpoint.
    engine.module_state_dict = lambda *_, **__: trained_state(engine.module)
    _write_checkpoints(engine)
    return engine


def partitioner(run: RunConfig) -> Callable[[nn.Parameter], None]:
    """Return a function that partitions a parameter as the run's engine will.

    All workers call the function together, for one parameter after the other, each on its device. Each worker
    keeps its part of the first worker's values.
    """
    deepspeed, first = _deepspeed(run), list[Any]()

    def partition(parameter: nn.Parameter) -> None:
        if first:
            first[0].convert_to_zero_parameters([parameter])
            return
        first.append(parameter)
        deepspeed.zero.Init(
            module=nn.ParameterList([parameter]),
            config_dict_or_path=engine_config(run),
            dtype=run.scale.torch_dtype,
        )

    return partition


def _deepspeed(run: RunConfig) -> Any:
    """Import DeepSpeed and set it up for a run's device."""
    if run.scale.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if not dist.is_initialized():
        raise TrainError("torch.distributed is not initialised; run this in a Ray Train worker")
    if run.scale.device == "cpu":
        # This communication backend is compiled on first use (47 s on two cores, and it needs a compiler);
        # gloo does the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


def _write_checkpoints(engine: DeepSpeedEngine) -> None:
    """Let `CheckpointWriter` write an engine's checkpoints, unless `run.deepspeed` chose another writer."""
    from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

    from rayft.train.checkpoint_writer import CheckpointWriter

    if type(engine.checkpoint_engine) is TorchCheckpointEngine:
        engine.checkpoint_engine = CheckpointWriter(engine._config)
    # DeepSpeed copies a script for whole models into each checkpoint, which is of no use for adapters.
    engine._copy_recovery_script = lambda _folder: None


def check_written(engine: DeepSpeedEngine) -> None:
    """Raise the error of the engine's last checkpoint, if writing it failed."""
    check = getattr(engine.checkpoint_engine, "check", None)
    if check is not None:
        check()


def checkpoint_bytes(model: nn.Module) -> int:
    """Estimate the size of a checkpoint in bytes: weights, and the optimizer state of what trains."""
    return sum(
        getattr(parameter, "ds_numel", parameter.numel())
        * (parameter.element_size() + 12 * parameter.requires_grad)
        for parameter in kept(model).values()
    )


def parameter_groups(run: RunConfig, model: nn.Module) -> list[dict[str, Any]]:
    """Group the trainable parameters by learning rate (`lr_factor` times the run's) and weight decay."""
    kind = method(run.method.name)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        group = kind.parameter_group(name, run.method)
        decay = run.optim.weight_decay if group.decays else 0.0
        groups.setdefault((group.lr_factor, decay), []).append(parameter)
    return [
        {"params": parameters, "lr_factor": factor, "weight_decay": decay, "lr": run.optim.lr * factor}
        for (factor, decay), parameters in groups.items()
    ]


def trained_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return what a checkpoint must hold: all that trains, and what adapters keep (a chain's past links)."""
    state = model.state_dict(keep_vars=True)
    return {name: v.detach() for name, v in state.items() if v.requires_grad or ".adapter." in name}


def kept(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that a run adds or trains, by name; adapters also hold frozen ones (rac's A)."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad or ".adapter." in n}


def optimizer_step(engine: DeepSpeedEngine, batches: Sequence[AnyBatch], worker: Worker) -> Later:
    """Launch forward, backward and update over this worker's micro-batches (all workers call it).

    The gradient is that of (sum of losses) / (number of targets) over the micro-batches of all workers,
    however the targets are distributed among them.

    Args:
        engine: the engine.
        batches: the micro-batches.
        worker: this process.

    Raises:
        torch.OutOfMemoryError: if the passes do not fit into the device's memory; no parameter has changed.
        HalfDoneError: if the update does not.
    """
    targets = sum(len(targets_of(batch)) for batch in batches)
    tokens = sum(batch.input_ids.numel() for batch in batches)
    targets, tokens = (int(v) for v in worker.total(targets, tokens))
    losses: list[torch.Tensor] = []
    norm: torch.Tensor | None = None
    for number, batch in enumerate(batches, 1):
        loss, _ = batch_loss(engine.module, batch, engine)
        losses.append(loss.detach())
        engine.backward(loss * (worker.world * len(batches) / targets))
        if number == len(batches):
            norm = _norm_before(engine)
        try:
            engine.step()
        except torch.OutOfMemoryError as error:
            raise HalfDoneError(str(error)) from None
    read = later([*losses, _norm_after(engine, losses[0]) if norm is None else norm])

    def result() -> StepResult:
        *sums, norm = read()
        (total,) = worker.total(sum(sums))
        return StepResult(total / targets, norm, tokens)

    if worker.world == 1:
        return result
    # The workers exchange their losses, at a point that all of them reach.
    found = result()
    return lambda: found


def later(values: Sequence[torch.Tensor]) -> Callable[[], list[float]]:
    """Begin to read numbers from a device; the function that is returned waits for them.

    It does not wait for what is launched after this call.
    """
    joined = torch.stack([value.detach().to(values[0].dtype) for value in values])
    if not joined.is_cuda:
        return joined.tolist
    host = torch.empty(joined.shape, dtype=joined.dtype, pin_memory=True)
    host.copy_(joined, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[float]:
        copied.synchronize()
        return host.tolist()

    return read


def _norm_before(engine: DeepSpeedEngine) -> torch.Tensor | None:
    """Return the gradient norm before clipping, once the backward pass has ended.

    It is None if DeepSpeed measures it in the step.
    """
    if (known := getattr(engine, "norm", None)) is not None:
        return known  # type: ignore[no-any-return]
    if engine.zero_optimization_stage() > 0:
        return None
    parameters = getattr(engine, "flats", None) or engine.module.parameters()
    norms = [p.grad.norm() for p in parameters if p.grad is not None]
    return torch.stack(norms).norm() if norms else torch.tensor(math.nan)


def _norm_after(engine: DeepSpeedEngine, like: torch.Tensor) -> torch.Tensor:
    """Return the gradient norm that DeepSpeed has measured in the step, on the device of another tensor."""
    norm = engine.get_global_grad_norm()
    return torch.as_tensor(math.nan if norm is None else norm, device=like.device)


def set_lr(engine: DeepSpeedEngine, lr: float) -> None:
    """Set the learning rate of the next step; each parameter group multiplies it by its own factor."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def destroy(engine: DeepSpeedEngine) -> None:
    """Remove an engine's hooks and buffers from the model, so that the next engine starts clean."""
    engine.destroy()
    # An engine is collected at some later time, and destroys itself again then. That would unlink the model's
    # parameters from the next engine, whose masters and moments would be read as zeros.
    engine.destroy = lambda: None
    for module in engine.module.modules():
        # ZeRO-3 (DeepSpeed 0.19) leaves these closures on the modules. The next engine would run its backward
        # pass through them, with the parameter trace of this engine.
        for left in ("pre_bwd_fn", "post_bwd_fn"):
            module.__dict__.pop(left, None)
    # These hooks of DeepSpeed's outlive `destroy` and refer to the engine, so its master weights and moments
    # would stay in memory as long as the lane. What remains is a reference cycle, which must be collected
    # before the memory of the next trial is measured.
    for hook in ("module_forward_pre_hook", "module_forward_post_hook"):
        handle = getattr(engine, hook, None)
        if handle is not None:
            handle.remove()
    gc.collect()


def release(engine: DeepSpeedEngine) -> None:
    """Partition parameters again that are gathered or being fetched (ZeRO-3; all workers must take part).

    A forward pass that no backward pass follows leaves parameters that were prefetched for one. They can't be
    gathered again, and those fetched in inference mode can't be trained.
    """
    if engine.zero_optimization_stage() == 3:
        engine.optimizer.empty_partition_cache()


@contextmanager
def gathered(engine: DeepSpeedEngine, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Gather partitioned parameters for the block (ZeRO-3; all workers must take part)."""
    if engine.zero_optimization_stage() != 3:
        yield
        return
    import deepspeed

    release(engine)
    with deepspeed.zero.GatheredParameters(list(parameters)):
        yield


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        merged[key] = _merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged
