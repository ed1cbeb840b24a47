"""LoRA+: a higher learning rate for B. Hayou et al. 2024, arXiv:2402.12354.

    ΔW = s·B·A        A (R × I): Kaiming-uniform (a = √5)        B (O × R): 0
    lr_A = lr         lr_B = λ·lr,  λ = 16 where `lr_ratio` is not given
Trainable: R(I + O) a layer.   Export to LoRA: exact, it is one.

Layer and gradients are LoRA's; only the optimizer's groups differ.
"""

from __future__ import annotations

from dataclasses import dataclass

from rayft.methods.base import MethodConfig, ParameterGroup
from rayft.methods.lora import LoraMethod, build, low_rank, trained

__all__ = ["LR_RATIO", "METHOD"]

LR_RATIO = 16.0
"""Ratio λ of B's learning rate to A's (section 5 of the paper)."""


@dataclass(frozen=True)
class LoraPlus(LoraMethod):
    """LoRA with two learning rates."""

    def ignored(self) -> dict[str, str]:
        """Return the settings that would do nothing; LoRA+ uses `lr_ratio`."""
        return {setting: why for setting, why in super().ignored().items() if setting != "lr_ratio"}

    def parameter_group(self, parameter: str, config: MethodConfig) -> ParameterGroup:
        """Return λ as the learning rate's factor for each B."""
        is_b = parameter.endswith(".lora_B")
        return ParameterGroup(config.lr_ratio or LR_RATIO) if is_b else ParameterGroup()


METHOD = LoraPlus(name="lora_plus", build=build, trained=trained, max_rank=low_rank)
