"""LoRA+: a higher learning rate for B. Hayou et al. 2024, arXiv:2402.12354.

    ΔW = s·B·A        A (R × I): Kaiming-uniform (a = √5)        B (O × R): 0
    lr_A = lr         lr_B = λ·lr,  λ = 16 where `lr_ratio` is not given
Trainable: R(I + O) a layer.   Export to LoRA: exact, it is one.

Layer and gradients are LoRA's; only the optimizer's groups differ.
"""

from __future__ import annotations

from rayft.methods.base import Method
from rayft.methods.lora import build, low_rank, trained

__all__ = ["METHOD"]

METHOD = Method(
    name="lora_plus",
    build=build,
    trained=trained,
    max_rank=low_rank,
    b_learns_faster=True,
    free_factors=True,
)
