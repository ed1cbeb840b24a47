"""Read and write an optimizer's state of each parameter: fp32 master weight, Adam's moments, step count.

In DeepSpeed 0.19, ZeRO 0 leaves this state to torch's AdamW, which keeps it for each parameter. ZeRO 1 and 2
keep flat fp32 partitions, one of each parameter group on each worker, and AdamW's state belongs to these
partitions. `deepspeed.utils.safe_*` reads and writes a parameter's part of them; all workers must take part.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from rayft.squeeze.anneal import Moments
from rayft.train.deepspeed import DeepSpeedEngine

__all__ = [
    "Holder",
    "Master",
    "load_masters",
    "read_masters",
    "replace_master",
    "save_masters",
    "write_masters",
]


@dataclass(frozen=True)
class Master:
    """The optimizer's state of one parameter."""

    weight: torch.Tensor
    """In float32, whichever dtype the model has."""
    moments: Moments | None
    """Adam's moments; None before its first step."""
    steps: float = 0.0
    """Number of steps that Adam uses for its bias correction."""


class Holder(ABC):
    """What stands in for an engine where a run's parameters are a part of an engine's."""

    module: nn.Module
    """The run's model."""

    @abstractmethod
    def masters(self) -> dict[str, Master]:
        """Return a copy of the state of all parameters that train: parameter path → its state."""

    @abstractmethod
    def set_masters(self, masters: Mapping[str, Master]) -> None:
        """Set the state of parameters before their first step."""


def read_masters(engine: DeepSpeedEngine | Holder, names: Sequence[str] | None = None) -> dict[str, Master]:
    """Copy the state of trainable parameters from an engine under ZeRO 0, 1 or 2.

    All workers must call it, and each gets the whole state.

    Args:
        engine: the engine; what stands in for one gives the state of all its parameters.
        names: paths of the parameters; by default all that train.
    """
    if isinstance(engine, Holder):
        return engine.masters()
    parameters = {
        name: parameter
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad and (names is None or name in names)
    }
    if engine.zero_optimization_stage() == 0:
        return {name: _read_own(engine, parameter) for name, parameter in parameters.items()}
    _link(engine)
    states, partitions = engine.optimizer.optimizer.state, _partitions(engine)
    return {
        name: _read_partition(parameter, states.get(partitions[id(parameter)]))
        for name, parameter in parameters.items()
    }


def write_masters(engine: DeepSpeedEngine | Holder, masters: Mapping[str, Master]) -> None:
    """Set weights and moments in an engine that has taken no step yet (all workers must call it).

    Parameters of a group share their step count, so under ZeRO 1 and 2 their masters must have the same.

    Args:
        engine: under ZeRO 0, 1 or 2.
        masters: parameter path → its state, in the parameter's shape.
    """
    if isinstance(engine, Holder):
        engine.set_masters(masters)
        return
    parameters = dict(engine.module.named_parameters())
    if engine.zero_optimization_stage() == 0:
        for name, master in masters.items():
            _write_own(engine, parameters[name], master)
        return
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if any(master.moments for master in masters.values()):
        partitions, steps = _partitions(engine), dict[int, float]()
        for name, master in masters.items():
            partition = id(partitions[id(parameters[name])])
            steps[partition] = max(master.steps, steps.get(partition, 0.0))
        _begin_states(engine, steps)
    for name, master in masters.items():
        safe_set_full_fp32_param(parameters[name], master.weight)
        if master.moments:
            safe_set_full_optimizer_state(parameters[name], master.moments.mean, "exp_avg")
            safe_set_full_optimizer_state(parameters[name], master.moments.square, "exp_avg_sq")


def replace_master(engine: DeepSpeedEngine, parameter: nn.Parameter, master: Master) -> bool:
    """Replace the whole state of one parameter in an engine that may have taken steps.

    Args:
        engine: of one worker, under ZeRO 0 or 2.
        parameter: the only one of its group.
        master: its new state.

    Returns:
        Whether it was possible. It is not if there are moments, and no room for them yet.
    """
    if engine.zero_optimization_stage() == 0:
        engine.optimizer.state.pop(parameter, None)
        _write_own(engine, parameter, master)
        return True
    partition = _partitions(engine)[id(parameter)]
    state = engine.optimizer.optimizer.state.get(partition)
    if master.moments and not state:
        return False
    count = parameter.numel()
    parameter.data.copy_(master.weight)
    partition.data[:count].copy_(master.weight.flatten())
    if state:
        state["step"].fill_(master.steps if master.moments else 0.0)
        for key, name in (("exp_avg", "mean"), ("exp_avg_sq", "square")):
            if master.moments:
                state[key][:count].copy_(getattr(master.moments, name).flatten())
            else:
                state[key].zero_()
    return True


def save_masters(masters: Mapping[str, Master], others: Mapping[str, torch.Tensor], file: Path) -> None:
    """Write a run's state to a file of safetensors.

    Args:
        masters: what trains.
        others: what the adapters keep beside it (frozen factors, a chain's past links): path → value.
        file: where to.
    """
    tensors = {f"state/{name}": value for name, value in others.items()}
    for name, master in masters.items():
        tensors[f"weight/{name}"] = master.weight
        if master.moments:
            tensors |= {f"mean/{name}": master.moments.mean, f"square/{name}": master.moments.square}
    steps = {name: master.steps for name, master in masters.items()}
    copied = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(copied, file, {"steps": json.dumps(steps)})


def load_masters(file: Path) -> tuple[dict[str, Master], dict[str, torch.Tensor]]:
    """Read a file that `save_masters` wrote; return what trains, and what the adapters keep beside it."""
    with safe_open(file, "pt") as opened:
        names = {*opened.keys()}
        steps: dict[str, float] = json.loads(opened.metadata()["steps"])
        masters = {
            name: Master(
                opened.get_tensor(f"weight/{name}"),
                Moments(opened.get_tensor(f"mean/{name}"), opened.get_tensor(f"square/{name}"))
                if f"mean/{name}" in names
                else None,
                count,
            )
            for name, count in steps.items()
        }
        others = {
            name.removeprefix("state/"): opened.get_tensor(name)
            for name in names
            if name.startswith("state/")
        }
    return masters, others


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
            "exp_avg": master.moments.mean.to(parameter.device, copy=True),
            "exp_avg_sq": master.moments.square.to(parameter.device, copy=True),
        }


def _partitions(engine: DeepSpeedEngine) -> dict[int, torch.Tensor]:
    """Return the fp32 partition of each parameter's group: id of the parameter → this worker's partition."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "bf16_groups"):
        # bfloat16 under ZeRO 1.
        groups, partitions = optimizer.bf16_groups, optimizer.fp32_groups_flat_partition
    else:
        groups, partitions = optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups
    pairs = zip(groups, partitions, strict=True)
    return {id(parameter): partition for group, partition in pairs for parameter in group}


def _read_partition(parameter: nn.Parameter, state: Mapping[str, torch.Tensor] | None) -> Master:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    weight = safe_get_full_fp32_param(parameter)
    if not state:
        return Master(weight, None)
    mean, square = (safe_get_full_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq"))
    return Master(weight, Moments(mean, square), float(state["step"]))


def _begin_states(engine: DeepSpeedEngine, steps: Mapping[int, float]) -> None:
    """Create the state that AdamW would create for each partition at its first step, and link it.

    Args:
        engine: the engine.
        steps: id of a partition → its step count.
    """
    optimizer = engine.optimizer.optimizer
    for group in optimizer.param_groups:
        for partition in group["params"]:
            optimizer.state[partition] = {
                "step": torch.tensor(steps.get(id(partition), 0.0)),
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
