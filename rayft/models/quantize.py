"""Load a base in 4 or 8 bits with bitsandbytes: only linear layers, not heads and the output layer."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any, Literal

import torch
from torch import nn

from rayft.errors import ResourceError
from rayft.models.targets import heads

__all__ = ["Quantize", "prepare", "quantization"]

Quantize = Literal["nf4", "int8"]


def quantization(kind: Quantize, skeleton: nn.Module, dtype: torch.dtype) -> Any:
    """Return transformers' setting for a quantised base.

    Args:
        kind: `nf4` (normal floats of 4 bits, block scales quantised again) or `int8`.
        skeleton: the unquantised model, on the meta device.
        dtype: what 4-bit layers compute in.

    Raises:
        ResourceError: if bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ResourceError(
            "model.quantize needs the package bitsandbytes, which is not installed: run "
            "`pip install 'rayft[quant]'`"
        )
    # It logs that it has a faster kernel for CPUs with AVX512-BF16, which `prepare` turns off.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    from transformers import BitsAndBytesConfig

    # transformers leaves the output layer of a language model alone by itself, but quantises a
    # classification head that has a bias: it skips the last parameter's name, which then is no module's.
    kept = [*heads(skeleton)] or None
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=kept,
    )


def prepare(model: nn.Module) -> None:
    """Make a quantised model compute the same in training and evaluation, and log less."""
    # Without gradients and where a CPU has AVX512-BF16, a 4-bit layer repacks its weight for a bfloat16
    # kernel, in place and for good (bitsandbytes 0.50): training then computes with rounded scales,
    # and sizes that are no multiples of 64 fail.
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  (mypy takes modules' attributes for tensors)
    # 8-bit layers log for each product that inputs are cast to float16, which is how they work.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
