"""`RunConfig`: all settings of one training run. What can be computed from others is not a setting."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, JsonValue, field_validator, model_validator

from rayft.config import FORMER, SINCE, Section, content_hash
from rayft.data.source import DataConfig
from rayft.errors import ConfigError
from rayft.methods.base import MethodConfig
from rayft.models.load import ModelConfig
from rayft.models.methods import check_free, method, settled
from rayft.numerics import fastest_cpu_dtype
from rayft.squeeze.anneal import AnnealConfig

__all__ = ["EvaluateConfig", "OptimConfig", "Placement", "RunConfig", "ScaleConfig", "why_alone"]


class OptimConfig(Section):
    """Settings of AdamW and of the learning-rate schedule."""

    lr: float = Field(default=2e-3, gt=0, allow_inf_nan=False)
    """Peak learning rate."""

    steps: int = Field(default=40, ge=1)
    """Optimizer steps."""

    rows_per_step: int = Field(default=1, ge=1)
    """Packed rows (of `data.max_length` tokens) of one optimizer step, over all workers."""

    warmup: int = Field(default=2, ge=0)
    """Steps of linear warm-up, at the start and at each link of a chain (see also `anneal.warmup`)."""

    schedule: Literal["constant", "linear"] = "constant"
    """After the warm-up, the learning rate stays constant, or falls linearly to zero at the last step."""

    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""

    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's two moments."""

    clip: float = Field(default=1.0, gt=0)
    """Largest gradient norm."""

    @field_validator("betas")
    @classmethod
    def _betas_decay(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("are decay rates: 0 or more, and below 1")
        return value

    def lr_at(self, step: int, start: int = 0, warmup: int | None = None) -> float:
        """Return the learning rate of a step (counted from 0).

        Args:
            step: the step.
            start: the first step of its phase (a link of a chain, or a rank of an annealed run).
            warmup: warm-up steps of that phase; by default those of the run.
        """
        decay, ramp = 1.0, self.warmup if warmup is None else warmup
        if self.schedule == "linear" and step >= self.warmup:
            decay = max(0.0, (self.steps - step) / max(1, self.steps - self.warmup))
        if step - start < ramp:
            return self.lr * decay * (step - start + 1) / ramp
        return self.lr * decay


# Each replay returns the same gradient buffers; only ZeRO-2 copies them away between micro-batches.
GRAPHS_ACCUMULATE = "graphs with accumulation above 1 needs zero: 2; set that, or accumulation: 1"


class ScaleConfig(Section):
    """Settings of workers, devices, precision and sharding."""

    workers: int = Field(default=1, ge=1)
    """Processes of one run; on GPUs, one per GPU."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA if there is a GPU."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto`: bfloat16 on a GPU; on a CPU the faster of the two (measured once)."""

    threads: int | None = Field(default=None, ge=1)
    """CPU threads of a worker; by default the machine's cores divided by the number of workers."""

    zero: Literal[0, 1, 2, 3] | None = None
    """DeepSpeed's ZeRO stage; by default 2 in bfloat16 (for its fp32 master weights), else 0."""

    offload: bool = False
    """Keep optimizer states in host memory (ZeRO 1 to 3)."""

    accumulation: int | None = Field(default=None, ge=1, json_schema_extra={FORMER: 1})
    """Micro-batches of one optimizer step, per worker; by default as few as fit into a GPU's memory, and 1 on
    CPUs."""

    activation_checkpointing: bool | None = Field(default=None, json_schema_extra={FORMER: False})
    """Recompute activations in the backward pass instead of keeping them; by default if a step does not fit
    into a GPU's memory otherwise and this is faster than more micro-batches."""

    graphs: bool | None = Field(default=None, json_schema_extra={FORMER: False})
    """Replay training passes as CUDA graphs (rows are padded to full length); by default if a pass is faster
    so, as it is where launching kernels takes longer than running them."""

    fused: bool | None = Field(default=None, json_schema_extra={SINCE: "0.2"})
    """Compute the base's small operations and its loss fused; by default on GPUs, where the model is known
    and a try shows that loss and gradient stay what they were."""

    gpu_share: float = Field(default=1.0, gt=0, le=1)
    """Share of a GPU that a worker reserves; below 1, several lanes of one worker each share a GPU."""

    @model_validator(mode="after")
    def _zero_fits(self) -> ScaleConfig:
        if self.offload and not self.zero:
            raise ValueError("offload needs zero: 1, 2 or 3")
        if self.graphs and (self.device == "cpu" or self.zero == 3 or self.activation_checkpointing):
            raise ValueError(
                "graphs needs a GPU, ZeRO 0 to 2, and no activation_checkpointing; drop it, or change those"
            )
        if self.graphs and (self.accumulation or 1) > 1 and self.zero in (0, 1):
            raise ValueError(GRAPHS_ACCUMULATE)
        if self.fused and (self.device == "cpu" or self.zero == 3):
            raise ValueError("fused needs a GPU and ZeRO 0 to 2; drop it, or change those")
        if self.gpu_share < 1 and (self.device == "cpu" or self.workers > 1):
            raise ValueError("gpu_share below 1 is for GPU lanes of one worker; set workers: 1, or drop it")
        if self.dtype == "bfloat16" and self.zero == 0:
            raise ValueError(
                "zero: 0 keeps no fp32 master weights in bfloat16; use 1, 2 or 3, or dtype: float32"
            )
        return self

    def settled(self, gpus: bool | None = None) -> ScaleConfig:
        """Return the section with every `auto` decided, so that all trials of a sweep run alike.

        Args:
            gpus: whether the workers will have GPUs; by default, whether this machine has one.
        """
        device = self.device
        if device == "auto":
            device = "cuda" if (torch.cuda.is_available() if gpus is None else gpus) else "cpu"
        dtype = self.dtype
        if dtype == "auto":
            fast = torch.bfloat16 if device == "cuda" else fastest_cpu_dtype()
            dtype = "bfloat16" if fast == torch.bfloat16 else "float32"
        threads = self.threads or max(1, len(os.sched_getaffinity(0)) // self.workers)
        zero = self.zero
        if zero is None:
            zero = 2 if dtype == "bfloat16" else 0
        elif zero == 0 and dtype == "bfloat16":
            # `auto` chose bfloat16, but stage 0 was set explicitly, which takes precedence.
            dtype = "float32"
        on_gpu = device == "cuda"
        if on_gpu and self.graphs and (self.accumulation or 1) > 1 and zero < 2:
            raise ConfigError(f"scale: {GRAPHS_ACCUMULATE}")
        update: dict[str, object] = {"device": device, "dtype": dtype, "threads": threads, "zero": zero}
        if not on_gpu:
            # `auto` may have chosen the CPU, where the settings for GPUs have no effect.
            update["gpu_share"] = 1.0
            # Nothing is tried there. On a GPU, the workers decide what is left open.
            update |= {
                "accumulation": self.accumulation or 1,
                "activation_checkpointing": bool(self.activation_checkpointing),
            }
        if not on_gpu or zero == 3:
            update["graphs"] = False
        return self.model_copy(update=update)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The compute dtype; the section must be settled."""
        assert self.dtype != "auto", "settle the section first"
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32


class EvaluateConfig(Section):
    """Settings of when and how a run is evaluated."""

    every: int | None = Field(default=None, ge=1)
    """Steps between validation losses, in addition to those that the search needs; by default only those."""

    val_examples: int | None = Field(default=None, ge=1)
    """Number of validation examples for the loss; by default all."""

    keep: Literal["best", "last"] = Field(default="best", json_schema_extra={SINCE: "0.2"})
    """Which weights a run keeps: those of the evaluation with the least validation loss, or the last ones. An
    annealed run keeps the best of its last rank."""

    patience: int | None = Field(default=None, ge=1, json_schema_extra={SINCE: "0.2"})
    """End a run after this number of evaluations without a new least loss; by default never. A chain ends
    only in its last link, an annealed run at its last rank."""

    trail: bool = False
    """Keep the adapter of every evaluation, so that `rayft analyze` can draw the plane of its trajectory."""

    checkpoint_seconds: float = Field(default=60.0, ge=0)
    """Shortest time between two checkpoints, which are written at evaluations."""

    max_new_tokens: int = Field(default=16, ge=1)
    """Longest answer, in tokens, when a task is scored."""

    base_examples: int = Field(default=200, ge=1, json_schema_extra={SINCE: "0.2"})
    """Most questions of a part that the base answers in each of the three ways in which it is asked."""

    batch_size: int = Field(default=50, ge=1)
    """Questions that are answered together when a task is scored."""

    shots: int = Field(default=2, ge=1)
    """Solved examples in the few-shot prompt of the base."""


OURS = {
    "train_batch_size": "optim.rows_per_step",
    "train_micro_batch_size_per_gpu": "optim.rows_per_step",
    "gradient_accumulation_steps": "scale.accumulation",
    "gradient_clipping": "optim.clip",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "zero_optimization.stage": "scale.zero",
    "bf16.enabled": "scale.dtype",
    "bfloat16": "scale.dtype",
    "fp16": "scale.dtype (float32 or bfloat16)",
    "amp": "scale.dtype",
    "torch_autocast": "scale.dtype",
}
"""What `RunConfig.deepspeed` may not set → the setting that takes its place. DeepSpeed would
ignore it, or change the dtype of a base in memory that other runs use."""


class RunConfig(Section):
    """One training run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig
    method: MethodConfig = MethodConfig()
    anneal: AnnealConfig | None = None
    """Lower the rank from `method.rank` while the run trains (lora, lora_plus)."""
    start: str | None = None
    """Folder of the adapter from whose factors and head the run starts (lora, lora_plus). Modules, ranks and
    scales are those of the adapter. If `method.rank` is set, it must be the adapter's rank; with `anneal` it
    must be set."""
    optim: OptimConfig = OptimConfig()
    scale: ScaleConfig = ScaleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    deepspeed: dict[str, JsonValue] = {}
    """Merged over the DeepSpeed configuration that the other settings imply."""
    seed: int = Field(default=0, ge=0)
    """Determines initial adapters, data order and dropout."""

    @field_validator("deepspeed")
    @classmethod
    def _not_ours(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        inner = ((name, section) for name, section in value.items() if isinstance(section, dict))
        given = {*value, *(f"{name}.{key}" for name, section in inner for key in section)}
        clash = [f"{name} is {ours}" for name, ours in OURS.items() if name in given]
        if clash:
            raise ValueError(f"{', '.join(clash)}; set {'it' if len(clash) == 1 else 'them'} there")
        return value

    @field_validator("start")
    @classmethod
    def _locate_start(cls, value: str | None) -> str | None:
        # Absolute, because workers run in other working directories.
        return None if value is None else str(Path(value).expanduser().absolute())

    @field_validator("method")
    @classmethod
    def _settle_method(cls, value: MethodConfig) -> MethodConfig:
        return settled(value)

    @model_validator(mode="after")
    def _base_is_there(self) -> RunConfig:
        method(self.method.name).check_base(
            quantised=getattr(self.model, "quantize", None) is not None, partitioned=self.scale.zero == 3
        )
        return self

    @model_validator(mode="after")
    def _graphs_fit(self) -> RunConfig:
        if self.scale.graphs and self.model.task != "causal_lm":
            raise ValueError("scale.graphs is for causal language models; set it to false")
        if self.scale.fused and self.model.task != "causal_lm":
            raise ValueError("scale.fused is for causal language models; set it to false")
        return self

    @model_validator(mode="after")
    def _links_divide(self) -> RunConfig:
        chain, steps = self.method.chain, self.optim.steps
        if chain is not None and chain.epochs is None and steps % chain.links:
            fits = [links for links in range(1, steps + 1) if steps % links == 0]
            near = min(fits, key=lambda links: abs(links - chain.links))
            raise ValueError(
                f"a chain of {chain.links} links ('{self.method.name}') doesn't divide optim.steps "
                f"({steps}): take {near} links, or {max(1, round(steps / chain.links)) * chain.links} steps, "
                "or give method.chain.epochs"
            )
        return self

    @model_validator(mode="after")
    def _warms_up(self) -> RunConfig:
        chain, steps, warmup = self.method.chain, self.optim.steps, self.optim.warmup
        if chain is not None and chain.epochs is None:
            steps //= chain.links
        if warmup > steps:
            part = f"a link's {steps} steps" if chain else f"optim.steps ({steps})"
            raise ValueError(
                f"optim.warmup ({warmup}) must be at most {part}, or the learning rate never reaches "
                f"{self.optim.lr:g}: take {steps} or less"
            )
        return self

    @model_validator(mode="after")
    def _anneals(self) -> RunConfig:
        if self.anneal is None:
            return self
        check_free(
            self.method.name,
            "anneal",
            "Train lora, or train it as it is and run `rayft squeeze` afterwards",
        )
        if self.scale.zero == 3:
            raise ValueError(
                "anneal reads weights and moments out of one engine and sets them in the next, at another "
                "rank; ZeRO-3 has them in pieces that are cut for the old rank. Set scale.zero to 0, 1 or 2 "
                "(ZeRO-3 is for large bases; adapters are small), or drop anneal and run `rayft squeeze` "
                "afterwards"
            )
        self.anneal.plan(self.method.rank, self.optim.steps, self.optim.warmup)
        return self

    @model_validator(mode="after")
    def _starts(self) -> RunConfig:
        if self.start is None:
            return self
        check_free(self.method.name, "start", "Drop start, or set method.name to lora")
        plain = MethodConfig()
        for setting in ("targets", "rank_pattern", "alpha", "rslora"):
            if getattr(self.method, setting) != getattr(plain, setting):
                raise ValueError(
                    f"modules, ranks and scales are those of the adapter in start, so method.{setting} does "
                    "nothing: drop it"
                )
        return self

    @property
    def hash(self) -> str:
        """Hash of the settings that determine the results.

        How often checkpoints are written does not. Neither do the threads, of which there are as many as the
        machine that settles the run has cores; a sweep may continue on another one.
        """
        every = {"checkpoint_seconds": EvaluateConfig.model_fields["checkpoint_seconds"].default}
        same = {
            "evaluate": self.evaluate.model_copy(update=every),
            "scale": self.scale.model_copy(update={"threads": None}),
        }
        return content_hash(self.model_copy(update=same))

    @property
    def setting(self) -> str:
        """Hash of all settings but the seed."""
        return content_hash(self.model_copy(update={"seed": 0}))

    @property
    def final_rank(self) -> int:
        """Rank of the resulting adapter, for modules without a rank of their own."""
        return self.method.rank * self.method.links if self.anneal is None else self.anneal.rank

    @model_validator(mode="after")
    def _rows_divide(self) -> RunConfig:
        accumulation = self.scale.accumulation or 1
        if self.optim.rows_per_step % (self.scale.workers * accumulation):
            raise ValueError(
                f"optim.rows_per_step ({self.optim.rows_per_step}) must be a multiple of scale.workers x "
                f"scale.accumulation ({self.scale.workers} x {accumulation})"
            )
        return self


@dataclass(frozen=True)
class Placement:
    """How the steps of a run use their device."""

    accumulation: int = 1
    """Micro-batches of one optimizer step, per worker."""
    activation_checkpointing: bool = False
    graphs: bool = False


def why_alone(run: RunConfig) -> str:
    """Return why a run can't share its steps with others, as a clause; empty if it can."""
    scale = run.scale
    name = run.method.name
    reasons = {
        f"'{name}' changes the base, or has layers of its own": not method(name).packs,
        f"model.task is {run.model.task}": run.model.task != "causal_lm",
        "the base is quantised": run.model.quantize is not None,
        f"scale.workers is {scale.workers}": scale.workers > 1,
        "scale.zero is 3": scale.zero == 3,
        "scale.offload is set": scale.offload,
        "scale.activation_checkpointing is set": bool(scale.activation_checkpointing),
        "deepspeed has settings of its own": bool(run.deepspeed),
    }
    return next((reason for reason, true in reasons.items() if true), "")
