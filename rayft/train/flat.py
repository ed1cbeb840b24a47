"""DeepSpeed over flat parameters: one for each parameter group, of which the models' parameters are parts.

DeepSpeed spends time on each parameter, in Python: LoRA in the 210 linear layers of a model of 135 M has 420,
whose step took 145 ms where the passes took 13 (H200, 4 rows of 512 tokens, CUDA graphs). It sees one flat
parameter for each group instead. A model's parameters are views of the flat one's memory; their gradients are
moved into a flat one after the backward pass or its CUDA graph, and handed to the engine from there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from rayft.kernels.adamw import adamw
from rayft.models.methods import method
from rayft.numerics import moved
from rayft.squeeze.anneal import Moments
from rayft.train.deepspeed import DeepSpeedEngine, build_engine, destroy, parameter_groups
from rayft.train.masters import Holder, Master, read_masters, replace_master, write_masters
from rayft.train.run import RunConfig

__all__ = ["FlatEngine", "Part", "RunEngine", "clipped_here", "flattens", "has_masters"]

ALIGNED = 8
"""Parts of a flat parameter begin at multiples of this, so that kernels can read them in vectors."""


def flattens(run: RunConfig) -> bool:
    """Return whether a run's parameters are parts of flat ones.

    They are not where a whole model trains, which would need its gradients twice; under ZeRO-3, which gathers
    each parameter where it is used; or with settings of DeepSpeed's own, which may be about parameters.
    """
    return has_masters(run) and not run.scale.offload


def has_masters(run: RunConfig) -> bool:
    """Return whether masters and moments are the whole state of a run, few enough to copy to one worker."""
    whole = method(run.method.name).saves_model
    return not (whole or run.scale.zero == 3 or run.deepspeed)


def clipped_here(run: RunConfig) -> RunConfig:
    """Return a run whose engine leaves it to `FlatEngine.clip` to measure and clip gradients.

    DeepSpeed knows one norm for all that it trains, and the host waits for the device to compute it.
    """
    settings: dict[str, Any] = {"gradient_clipping": 0.0}
    if run.scale.zero:
        settings["zero_optimization"] = {"compute_grad_norm": False}
        if run.scale.dtype == "bfloat16":
            settings["bf16"] = {"check_grad_overflow": False}
    return run.model_copy(update={"deepspeed": settings})


class Part:
    """A parameter group of a model: one flat parameter, and where each of its parameters is in it."""

    def __init__(self, group: Mapping[str, Any], names: Mapping[nn.Parameter, str]) -> None:
        self.lr_factor, self.weight_decay = group["lr_factor"], group["weight_decay"]
        self.parameters: dict[str, nn.Parameter] = {names[one]: one for one in group["params"]}
        self._starts: dict[str, int] = {}
        self.size = 0
        for name, parameter in self.parameters.items():
            self._starts[name] = self.size
            self.size += -(-parameter.numel() // ALIGNED) * ALIGNED
        values = {name: parameter.detach() for name, parameter in self.parameters.items()}
        self.flat = nn.Parameter(self.joined(values, group["params"][0].dtype))
        self.grad = torch.zeros_like(self.flat)
        self._grads = [*self.cut(self.grad).values()]
        self.arrived = False
        """Whether a pass has written its gradients into the flat one (`rayft.train.graphs`)."""

    @property
    def gradients(self) -> dict[nn.Parameter, torch.Tensor]:
        """Each parameter's part of the flat gradient."""
        return dict(zip(self.parameters.values(), self._grads, strict=True))

    def joined(self, values: Mapping[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """Return a flat tensor with a value for each parameter."""
        device = next(iter(self.parameters.values())).device
        flat = torch.zeros(self.size, device=device, dtype=dtype)
        for name, view in self.cut(flat).items():
            view.copy_(values[name])
        return flat

    def cut(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return each parameter's part of a flat tensor, in its shape."""
        return {
            name: flat[self._starts[name] :][: parameter.numel()].view(parameter.shape)
            for name, parameter in self.parameters.items()
        }

    def link(self) -> None:
        """Let the parameters be parts of the flat one, whose memory an engine has chosen."""
        for name, view in self.cut(self.flat.data).items():
            self.parameters[name].data = view

    def take_over(self, other: Part) -> None:
        """Use the flat parameter of another part, of the same size, whose parameters have been released."""
        self.flat, self.grad = other.flat, other.grad
        self._grads = [*self.cut(self.grad).values()]
        self.link()

    def release(self) -> None:
        """Move the parameters, with their values, to memory of their own, and forget them."""
        for parameter in self.parameters.values():
            parameter.grad = None
            parameter.data = parameter.data.clone()
        self.parameters = {}

    def take_gradients(self) -> None:
        """Move the gradients of the parameters into the flat one, unless the pass has written them there."""
        if self.arrived:
            self.arrived = False
            return
        views, found = [], []
        for view, parameter in zip(self._grads, self.parameters.values(), strict=True):
            if parameter.grad is None:
                view.zero_()
            else:
                views.append(view)
                found.append(parameter.grad)
                parameter.grad = None
        if views:
            torch._foreach_copy_(views, found)


class PartialAdamW(torch.optim.AdamW):
    """AdamW that leaves groups alone that take no part in a step, and clips the others' gradients.

    In the next step, the gradient of a group is multiplied by `factors[number]`. Both are entries of the
    group: `factors` is a tensor (n,) on the device, or None for a factor of 1; `number` is an index. Products
    that are NaN count as 0. The step sets `factors` to None.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step the groups that are `active`."""
        assert closure is None
        for group in self.param_groups:
            factors, group["factors"] = group["factors"], None
            if not group["active"]:
                continue
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, factors)

    def _update(
        self, parameter: torch.Tensor, group: Mapping[str, Any], factors: torch.Tensor | None
    ) -> None:
        state = self.state[parameter]
        if not state:
            # As torch's own, which read and write checkpoints.
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        assert parameter.grad is not None
        adamw(
            parameter,
            parameter.grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            factors=factors,
            number=group["number"],
            step=int(state["step"]),
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            decay=group["weight_decay"],
        )


class _Deliver(torch.autograd.Function):
    """A loss whose backward pass returns gradients that were computed before, as an engine expects them."""

    @staticmethod
    def forward(
        ctx: Any, loss: torch.Tensor, grads: Sequence[torch.Tensor], whole: bool, *_: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss."""
        ctx.grads, ctx.whole = grads, whole
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients, times that of the loss, which is 1 for the only micro-batch of a step."""
        # A view that nothing else holds becomes the gradient without a copy.
        found = (grad.view_as(grad) if ctx.whole else grad * outer[0] for grad in ctx.grads)
        return None, None, None, *found


class FlatEngine:
    """A DeepSpeed engine over the trainable parameters of some models.

    Args:
        run: with the engine's settings.
        members: run and model of each; the run's method and optimizer settings decide its groups.

    Raises:
        TrainError: if DeepSpeed rejects the configuration.
        torch.OutOfMemoryError: if gradients, masters or moments do not fit into the device's memory.
    """

    def __init__(self, run: RunConfig, members: Sequence[tuple[RunConfig, nn.Module]]) -> None:
        self.parts = [_parts(*member) for member in members]
        """The parameter groups of each member."""
        groups = [
            {
                "params": [part.flat],
                "lr_factor": part.lr_factor,
                "weight_decay": part.weight_decay,
                "lr": own.optim.lr * part.lr_factor,
                "betas": own.optim.betas,
                "active": True,
                "factors": None,
                "number": 0,
            }
            for (own, _), parts in zip(members, self.parts, strict=True)
            for part in parts
        ]
        self._all = [part for parts in self.parts for part in parts]
        module = nn.ParameterList([part.flat for part in self._all])
        self.deepspeed: DeepSpeedEngine = build_engine(run, module, PartialAdamW(groups))
        self._accumulates = run.scale.accumulation or 1
        self._only = _nothing_to_add(run)
        if self._only:
            # DeepSpeed would replace what `_deliver_reduced` hands over by what it has reduced: nothing.
            self.deepspeed.enable_backward_allreduce = False
        for part in self._all:
            part.link()

    @property
    def groups(self) -> list[list[dict[str, Any]]]:
        """The optimizer's groups of each member."""
        groups = iter(self.deepspeed.optimizer.param_groups)
        return [[next(groups) for _ in parts] for parts in self.parts]

    @property
    def flats(self) -> list[nn.Parameter]:
        """What the engine trains."""
        return [part.flat for part in self._all]

    def masters(self, member: int) -> dict[str, Master]:
        """Copy the state of a member's parameters: parameter path → its state."""
        numbers = self._numbers(member)
        masters = read_masters(self.deepspeed, [str(number) for number in numbers])
        found: dict[str, Master] = {}
        for number, part in zip(numbers, self.parts[member], strict=True):
            found |= _parted(part, masters[str(number)])
        return found

    def set_masters(self, masters: Sequence[Mapping[str, Master]]) -> None:
        """Set the state of the members' parameters; a member whose mapping is empty stays as it is."""
        begun = {
            str(number): _joined(part, own)
            for member, own in enumerate(masters)
            if own
            for number, part in zip(self._numbers(member), self.parts[member], strict=True)
        }
        if begun:
            write_masters(self.deepspeed, begun)

    def release(self, member: int) -> None:
        """Move a member's parameters, with their values, to memory of their own.

        Its place may be taken by another (`replace`); it must not step any more.
        """
        for part in self.parts[member]:
            part.release()

    def replace(self, member: int, run: RunConfig, model: nn.Module, masters: Mapping[str, Master]) -> bool:
        """Put another run into the place of a member that was released, if its groups are as large.

        Args:
            member: the place.
            run: the run.
            model: with its adapters.
            masters: the state of its parameters; empty if they begin with the values that they have.

        Returns:
            Whether it was possible.
        """
        own, former = _parts(run, model), self.parts[member]
        if [(part.size, part.flat.dtype) for part in own] != [
            (part.size, part.flat.dtype) for part in former
        ]:
            return False
        begun = [
            _joined(part, masters) if masters else Master(part.flat.detach().float(), None) for part in own
        ]
        for part, old, master in zip(own, former, begun, strict=True):
            if not replace_master(self.deepspeed, old.flat, master):
                return False
            part.take_over(old)
        for part, group in zip(own, self.groups[member], strict=True):
            group |= {
                "lr_factor": part.lr_factor,
                "weight_decay": part.weight_decay,
                "betas": run.optim.betas,
            }
        self.parts[member] = own
        self._all = [part for parts in self.parts for part in parts]
        return True

    def deliver(self) -> None:
        """Hand the gradients that were taken to the engine."""
        if self._only:
            self._deliver_reduced()
            return
        if self.deepspeed.zero_optimization_stage() > 0:
            # DeepSpeed calls it where the forward pass of its module ends, which is never called here. In
            # bfloat16 under ZeRO 1, the gradient of a micro-batch would be added again with the next one's.
            self.deepspeed.optimizer.backward_prologue()
        flats, grads = self.flats, [part.grad for part in self._all]
        loss, whole = flats[0].new_zeros((), dtype=torch.float32), self._accumulates == 1
        self.deepspeed.backward(_Deliver.apply(loss, grads, whole, *flats))  # type: ignore[no-untyped-call]

    def _deliver_reduced(self) -> None:
        """Hand over the only gradients of a step as if the engine had reduced them.

        They are those of one worker and one micro-batch, so there is nothing to add to them. The engine would
        copy them to a bucket, average, convert and add them, which moves eight times as many bytes as reading
        them once.
        """
        from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup

        for number, part in enumerate(self._all):
            reduced = GradPartitionBufferGroup([part.grad], part.grad)
            self.deepspeed.optimizer.averaged_gradients[number] = reduced
        self.deepspeed.backward(torch.zeros((), device=self._all[0].grad.device, requires_grad=True) + 0)

    def drop_gradients(self) -> None:
        """Forget gradients that a pass has left on the models' parameters."""
        for part in self._all:
            part.arrived = False
            for parameter in part.parameters.values():
                parameter.grad = None

    def gradients(self, member: int) -> list[torch.Tensor]:
        """Return a member's gradient as the engine will use it, after reduction (one worker, ZeRO 0 or 2)."""
        found: list[torch.Tensor] = []
        for number, part in zip(self._numbers(member), self.parts[member], strict=True):
            if self.deepspeed.zero_optimization_stage() > 0:
                found += self.deepspeed.optimizer.averaged_gradients[number]
            else:
                assert part.flat.grad is not None
                found.append(part.flat.grad)
        return found

    def clip(self, most: Mapping[int, float]) -> list[torch.Tensor]:
        """Let the next step clip the gradients of some members, after reduction (one worker).

        If a member's norm is not finite, its whole gradient counts as zero in that step; the loss will tell
        why.

        Args:
            most: number of a member → its largest norm.

        Returns:
            The norm of each before that, a float32 scalar on the device.
        """
        gradients = [self.gradients(member) for member in most]
        every = torch._foreach_norm([*chain(*gradients)], 2, torch.float32)
        parts = iter(every)
        norms = [
            torch.stack([next(parts) for _ in own]).norm() if len(own) > 1 else next(parts)
            for own in gradients
        ]
        whole = torch.stack(norms)
        limits = moved(torch.tensor([*most.values()]), whole.device)
        factors = (limits / (whole + 1e-6)).clamp_(max=1.0)
        for number, member in enumerate(most):
            for group in self.groups[member]:
                # The factor of an infinite norm is 0, whose product with an infinite number is NaN.
                group |= {"factors": factors, "number": number}
        return norms

    def _numbers(self, member: int) -> range:
        """Return the numbers of a member's groups among all groups."""
        first = sum(map(len, self.parts[:member]))
        return range(first, first + len(self.parts[member]))

    def close(self) -> None:
        """Destroy the engine; the parameters keep their values, in memory of their own."""
        for part in self._all:
            part.release()
        engine, self.deepspeed = self.deepspeed, None
        destroy(engine)


class RunEngine(Holder):
    """The engine of a run that trains alone. It is used as DeepSpeed's own.

    Args:
        run: the run.
        model: with the run's adapters.

    Raises:
        TrainError, torch.OutOfMemoryError: as `FlatEngine`.
    """

    def __init__(self, run: RunConfig, model: nn.Module) -> None:
        # Other optimizers of DeepSpeed keep the gradient elsewhere, or a part of it.
        whole = run.scale.zero == 2 or (run.scale.zero == 0 and run.scale.dtype == "float32")
        self._clip = run.optim.clip if run.scale.workers == 1 and whole else None
        engine = run if self._clip is None else clipped_here(run)
        self.module, self._flat = model, FlatEngine(engine, [(run, model)])
        self.norm: torch.Tensor | None = None
        """The gradient norm of the step before clipping; None if only DeepSpeed knows it."""

    def __call__(self, **arguments: Any) -> Any:
        """Compute the model."""
        return self.module(**arguments)

    def backward(self, loss: torch.Tensor) -> None:
        """Compute gradients, and hand them to the engine."""
        loss.backward()
        for part in self._flat.parts[0]:
            part.take_gradients()
        self._flat.deliver()
        if self._clip is not None and self._flat.deepspeed.is_gradient_accumulation_boundary():
            (self.norm,) = self._flat.clip({0: self._clip})

    def step(self) -> None:
        """Take an optimizer step, after the last micro-batch."""
        self._flat.deepspeed.step()

    @property
    def global_steps(self) -> int:
        """Number of optimizer steps that were taken."""
        return int(self._flat.deepspeed.global_steps)

    @property
    def optimizer(self) -> Any:
        """DeepSpeed's optimizer."""
        return self._flat.deepspeed.optimizer

    @property
    def flats(self) -> list[nn.Parameter]:
        """What the engine trains."""
        return self._flat.flats

    @property
    def parts(self) -> list[Part]:
        """The flat parameters, and where the run's are in them."""
        return self._flat.parts[0]

    def zero_optimization_stage(self) -> int:
        """Return the stage of ZeRO."""
        return int(self._flat.deepspeed.zero_optimization_stage())

    def get_global_grad_norm(self) -> Any:
        """Return the gradient norm before clipping."""
        return self._flat.deepspeed.get_global_grad_norm()

    def masters(self) -> dict[str, Master]:
        """Return a copy of the state of all parameters that train."""
        return self._flat.masters(0)

    def set_masters(self, masters: Mapping[str, Master]) -> None:
        """Set the state of parameters before their first step."""
        self._flat.set_masters([masters])

    def leave(self) -> None:
        """Destroy the engine."""
        self._flat.close()


def _nothing_to_add(run: RunConfig) -> bool:
    """Return whether the gradient of a step is that of one micro-batch on one worker, in flat partitions."""
    scale = run.scale
    alone = scale.workers == 1 and (scale.accumulation or 1) == 1
    return alone and scale.zero == 2 and scale.dtype == "bfloat16"


def _parts(run: RunConfig, model: nn.Module) -> list[Part]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [Part(group, names) for group in parameter_groups(run, model)]


def _joined(part: Part, masters: Mapping[str, Master]) -> Master:
    """Return the state of a flat parameter."""
    own = [masters[name] for name in part.parameters]
    weight = part.joined({name: masters[name].weight for name in part.parameters}, torch.float32)
    if any(one.moments is None for one in own):
        return Master(weight, None)
    mean, square = (
        part.joined({name: getattr(masters[name].moments, which) for name in part.parameters}, torch.float32)
        for which in ("mean", "square")
    )
    return Master(weight, Moments(mean, square), max(one.steps for one in own))


def _parted(part: Part, flat: Master) -> dict[str, Master]:
    """Return the state of each parameter of a flat one."""
    weights = part.cut(flat.weight)
    if flat.moments is None:
        return {name: Master(weight.clone(), None) for name, weight in weights.items()}
    means, squares = part.cut(flat.moments.mean), part.cut(flat.moments.square)
    return {
        name: Master(weight.clone(), Moments(means[name].clone(), squares[name].clone()), flat.steps)
        for name, weight in weights.items()
    }
