"""Read and write an optimizer's state of each parameter: fp32 master weight, Adam's moments, step count.

In DeepSpeed 0.19, ZeRO 0 leaves this state to torch's AdamW, which keeps it for each parameter. ZeRO 1 and 2
keep flat fp32 partitions, one of each parameter group on each worker, and AdamW's state belongs to these
partitions. `deepspeed.utils.safe_*` reads and writes a parameter's part of them; all workers must take part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from rayft.squeeze.anneal import Moments
from rayft.train.deepspeed import DeepSpeedEngine

__all__ = ["Master", "read_masters", "write_masters"]


@dataclass(frozen=True)
class Master:
    """The optimizer's state of one parameter."""

    weight: torch.Tensor
    """In float32, whichever dtype the model has."""
    moments: Moments | None
    """Adam's moments; None before its first step."""
    steps: float = 0.0
    """Number of steps that Adam uses for its bias correction."""


def read_masters(engine: DeepSpeedEngine) -> dict[str, Master]:
    """Copy the state of all trainable parameters from an engine under ZeRO 0, 1 or 2.

    All workers must call it, and each gets the whole state.
    """
    read = _read_own
    if engine.zero_optimization_stage() > 0:
        _link(engine)
        read = _read_partitions
    return {n: read(engine, p) for n, p in engine.module.named_parameters() if p.requires_grad}


def write_masters(engine: DeepSpeedEngine, masters: Mapping[str, Master]) -> None:
    """Set weights and moments in an engine that has taken no step yet (all workers must call it).

    Args:
        engine: under ZeRO 0, 1 or 2.
        masters: parameter path → its state, in the parameter's shape.
    """
    parameters = dict(engine.module.named_parameters())
    if engine.zero_optimization_stage() == 0:
        for name, master in masters.items():
            _write_own(engine, parameters[name], master)
        return
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    steps = max(master.steps for master in masters.values())
    if any(master.moments for master in masters.values()):
        _begin_states(engine, steps)
    for name, master in masters.items():
        safe_set_full_fp32_param(parameters[name], master.weight)
        if master.moments:
            safe_set_full_optimizer_state(parameters[name], master.moments.mean, "exp_avg")
            safe_set_full_optimizer_state(parameters[name], master.moments.square, "exp_avg_sq")


def _read_own(engine: DeepSpeedEngine, parameter: nn.Parameter) -> Master:
    weight, state = parameter.detach().float().clone(), engine.optimizer.state.get(parameter)
    if not state:
        return Master(weight, None)
    moments = Moments(state["exp_avg"].clone(), state["exp_avg_sq"].clone())
    return Master(weight, moments, float(state["step"]))


def _write_own(engine: DeepSpeedEngine, parameter: nn.Parameter, master: Master) -> None:
    parameter.data.copy_(master.weight)
    if master.moments:
        engine.optimizer.state[parameter] = {
            "step": torch.tensor(master.steps),
            "exp_avg": master.moments.mean.clone(),
            "exp_avg_sq": master.moments.square.clone(),
        }


def _read_partitions(engine: DeepSpeedEngine, parameter: nn.Parameter) -> Master:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    weight = safe_get_full_fp32_param(parameter)
    state = next(iter(engine.optimizer.optimizer.state.values()), None)
    if not state:
        return Master(weight, None)
    mean, square = (safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq"))
    return Master(weight, Moments(mean, square), float(state["step"]))


def _begin_states(engine: DeepSpeedEngine, steps: float) -> None:
    """Create the state that AdamW would create for each partition at its first step, and link it."""
    optimizer = engine.optimizer.optimizer
    for group in optimizer.param_groups:
        for partition in group["params"]:
            optimizer.state[partition] = {
                "step": torch.tensor(steps),
                "exp_avg": torch.zeros_like(partition),
                "exp_avg_sq": torch.zeros_like(partition),
            }
    _link(engine)


def _link(engine: DeepSpeedEngine) -> None:
    """Link each parameter to its part of the optimizer's state.

    DeepSpeed does this once, during the first step of the first parameter group, when later groups have no
    state yet (LoRA+ has two groups). Restoring a checkpoint removes the links.
    """
    engine.optimizer._hp_optimizer_states_linked = False
    engine.optimizer._lazy_init_hp_params_optimizer_state()
