"""The dense updates of PEFT's adapters: ΔW of each layer, where its forward pass is that of W + ΔW.

    y = x (W + ΔW)ᵀ + b        ΔW (O × I) as PEFT's layer states it

PEFT has some thirty classes, and the `get_delta_weight` of a layer does not always return what its forward
pass adds: OFT's is a rotation, HiRA's lacks the factor W, DoRA's the magnitude. So each layer is tried: on
random rows x, layer(x) must equal the base's output plus x ΔWᵀ, to rounding. A layer that doesn't is
refused.

With PEFT 0.21 these pass: AdaMSS, C3A, DeFT, DeLoRA, FourierFT, FRoD, GraLoRA, LoHa, LoKr, MiSS, OSF,
PEANuT, PSOFT, PVeRA, RandLoRA, SHiRA, Supertuning, TinyLoRA, UniLoRA, VB-LoRA, VeRA, WaveFT. These do not:
BEFT, BOFT, GLoRA, HiRA, HRA, IA³, Lily, OFT, RoAd, and DoRA, whose ΔW has full rank.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rayft.artifacts import CONFIG_FILE, WEIGHTS_FILE
from rayft.artifacts.lora_settings import read_json
from rayft.artifacts.read import FLOATS, INDICES, read_meta, read_weights
from rayft.errors import ArtifactError, MethodError
from rayft.numerics import generator, relative_error, tolerance
from rayft.peft.folder import PeftFolder
from rayft.peft.layers import stated_delta
from rayft.peft.method import PREFIX, peft_method

__all__ = ["ROUNDINGS", "Answer", "answer_of", "checked_delta", "no_lora", "read_dense"]

ROWS = 8
"""Random inputs on which each layer is tried."""
ROUNDINGS = 16
"""Roundings to float32 one after the other in a layer: C3A has two Fourier transforms, VeRA two scalings."""
WAY_OUT = "train lora (or peft:PiSSA, peft:MiSS) instead, or serve it with PEFT itself"

Answer = tuple[torch.Tensor, torch.Tensor]
"""Rows x (N × I), and the output of the base's layer for them (N × O)."""


def read_dense(folder: Path) -> PeftFolder:
    """Read an adapter without factors that PEFT saved, with or without `rayft.json`.

    Raises:
        ArtifactError: if the folder is damaged, or its class has no ΔW, as far as that is known without
            its base.
    """
    file, settings = folder / CONFIG_FILE, read_json(folder)
    name = _name(settings["peft_type"].upper(), settings, file)
    _check_values(file, settings)
    tensors = read_weights(folder, FLOATS | INDICES)
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ArtifactError(
                f"{folder / WEIGHTS_FILE}: {key} holds NaN or Inf, so nothing can be extracted; train again "
                "with a lower learning rate"
            )
    meta = read_meta(folder, settings).model_copy(update={"method": name})
    saved = PeftFolder(settings, tensors, meta)
    if settings.get("bias", "none") not in ("none", False):
        raise no_lora(folder, saved, "it trains biases, which no LoRA factor holds")
    return saved


def answer_of(layer: nn.Module, path: str, inputs: int, seed: int) -> Answer:
    """Compute a layer's output for random rows, which are drawn for its path and a seed.

    Args:
        layer: a linear layer of the base.
        path: of the layer in the model.
        inputs: I.
        seed: decides the rows.
    """
    x = torch.randn(ROWS, inputs, generator=generator(seed, path, "rows"))
    with torch.no_grad():
        x = x.to(next(layer.parameters()).device)
        return x, layer(x)


def checked_delta(layer: nn.Module, answer: Answer) -> torch.Tensor | None:
    """Return ΔW (O × I) of a layer of PEFT; None if its forward pass is not that of W + ΔW.

    Args:
        layer: PEFT's layer.
        answer: rows, and the output of the base's layer in its place.
    """
    x, before = answer
    with torch.no_grad(), warnings.catch_warnings():
        # FRoD's sparse tensors make torch warn.
        warnings.simplefilter("ignore")
        try:
            stated = stated_delta(layer)
            after = layer(x)
        # What PEFT's thirty implementations raise where they have no ΔW.
        except (
            AttributeError,
            NotImplementedError,
            RuntimeError,
            TypeError,
            ValueError,
            IndexError,
        ):
            return None
        allowed = tolerance(torch.float32, x.shape[1], ROUNDINGS)
        # PEFT lays ΔW out as the weight is stored, which is I × O for a Conv1D, or as O × I.
        for delta in (stated, stated.mT) if stated.ndim == 2 else ():
            if delta.shape == (before.shape[1], x.shape[1]):
                expected = before + x @ delta.t()
                if relative_error(after, expected) <= allowed:
                    return delta
    return None


def no_lora(folder: Path, saved: PeftFolder, reason: str) -> ArtifactError:
    """Make the error of an adapter that can't become a LoRA."""
    return ArtifactError(
        f"{folder / CONFIG_FILE}: '{saved.meta.method}' can't become a LoRA: {reason}; {WAY_OUT}"
    )


def _name(kind: str, settings: Mapping[str, Any], file: Path) -> str:
    """Return the method's name, `peft:<Class>`, of a class that adapts layers and has no factors.

    Raises:
        ArtifactError: for any other class.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    classes = {str(key.value): config.__name__ for key, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    tuners = {str(key.value): tuner for key, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()}
    if kind not in classes:
        raise ArtifactError(
            f"{file}: the installed PEFT knows no '{kind}'; install the version that wrote it"
        )
    if kind == "LORA":
        if settings.get("use_dora"):
            raise ArtifactError(
                f"{file}: DoRA can't become a LoRA: its update has full rank and depends on the norm of the "
                f"merged weight, and dropping the magnitude left 80% error; {WAY_OUT}"
            )
        raise ArtifactError(f"{file}: this is a LoRA already: squeeze it as it is")
    short = classes[kind].removesuffix("Config")
    if not issubclass(tuners.get(kind, object), BaseTuner):
        raise ArtifactError(f"{file}: {short} adapts no linear layers, so it has no ΔW; {WAY_OUT}")
    try:
        return peft_method(PREFIX + short).name
    except MethodError:
        return PREFIX + short


def _check_values(file: Path, settings: Mapping[str, Any]) -> None:
    """Refuse nulls in fields for which PEFT has no null, and a `modules_to_save` that is no list of names."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[settings["peft_type"].upper()]):
        if field.name in settings and settings[field.name] is None and field.default is not None:
            raise ArtifactError(f"{file}: {field.name} is null, which PEFT has no meaning for; leave it out")
    saved = settings.get("modules_to_save")
    if saved is not None and not (isinstance(saved, list) and all(isinstance(name, str) for name in saved)):
        raise ArtifactError(f"{file}: modules_to_save is no list of names but {saved!r}; correct it")
