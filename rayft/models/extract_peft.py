"""A PEFT adapter with no LoRA factors as a LoRA: the leading singular values of its dense ΔW.

    y = x (W + ΔW)ᵀ + b,  ΔW (O × I) as PEFT's layer gives it        ΔW ≈ B·A,  B (O × k), A (k × I)

PEFT has some thirty classes, and what a layer's `get_delta_weight` gives is not always what its forward
pass adds: OFT's is a rotation, HiRA's lacks the factor W, DoRA's the magnitude. So each layer is asked: on
random rows x, layer(x) must be the base's answer plus x ΔWᵀ, to rounding. What is not is refused.

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

from rayft.artifacts import CONFIG_FILE, WEIGHTS_FILE, ArtifactMeta
from rayft.artifacts import PREFIX as BASE
from rayft.artifacts.lora_settings import NOT_SUPPORTED, read_json
from rayft.artifacts.read import FLOATS, INDICES, read_meta, read_weights
from rayft.errors import ArtifactError, BaseMismatchError, MethodError
from rayft.methods import method
from rayft.methods.rival import PREFIX
from rayft.models import rivals
from rayft.models.extract import Extraction, Progress
from rayft.models.heads import head_parameters
from rayft.models.inject import attach
from rayft.models.load import ModelConfig, load_model
from rayft.models.peft_folder import PeftFolder
from rayft.models.targets import linear_shapes, linears
from rayft.numerics import generator, relative_error, tolerance
from rayft.squeeze.dense import DenseSqueeze

__all__ = ["extract_peft"]

ROWS = 8
"""Random inputs that each layer is asked about."""
ROUNDINGS = 16
"""Of float32 in a layer, one after the other: C3A goes through two Fourier transforms, VeRA two scalings."""
WAY_OUT = "train lora (or peft:PiSSA, peft:MiSS) instead, or serve it with PEFT itself"


class _NoDeltaError(Exception):
    """A layer, by its path, whose forward pass is not that of W + ΔW."""


Answers = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""Module path → x (N × I) and what the base's layer makes of it (N × O)."""


def extract_peft(
    folder: str | Path,
    base: ModelConfig,
    *,
    rank: int | None = None,
    energy: float | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> Extraction:
    """Make a LoRA of an adapter in PEFT's own format; nothing of it is lost but what the rank cuts off.

    Args:
        folder: what PEFT saved, with or without `rayft.json`.
        base: the model that it was trained on; loaded whole, unquantised and in float32.
        rank: of each module; one whose min(O, I) is below gets that.
        energy: or the share of each module's ‖ΔW‖² to retain, in (0, 1].
        seed: decides the random numbers.
        device: where it is computed.
        dtype: of the factors.
        progress: told after each module.

    Raises:
        SqueezeError: if not one of rank and energy is given, it is out of range, or all updates are 0.
        ArtifactError: if the folder is damaged, or its class has no ΔW that can be had.
        BaseMismatchError: if it is for another base.
        ModelError: if the base can't be loaded.
    """
    saved = _read(Path(folder))
    loaded = load_model(base.model_copy(update={"quantize": None}), torch.float32, device)
    model = loaded.model
    _check_base(saved, model, loaded.fingerprint, Path(folder))
    shapes, turned, answers = linear_shapes(model), _conv1ds(model), _ask(model, seed)
    layers = _put_in(model, saved, Path(folder))
    shapes = {name: shapes[name] for name in layers}
    made = DenseSqueeze(shapes, rank=rank, energy=energy, seed=seed, device=device, dtype=dtype)
    try:
        _add_all(made, layers, answers, progress)
    except _NoDeltaError as error:
        reason = f"PEFT gives no ΔW of {error} by which its layer is x (W + ΔW)ᵀ + b"
        raise _refusal(Path(folder), saved, reason) from error
    meta = ArtifactMeta(
        method=saved.meta.method, task=base.task, base_model=base.name, base_fingerprint=loaded.fingerprint,
        data_digest=saved.meta.data_digest, parent=saved.content_hash,
        transposed=bool(turned & shapes.keys()),
    )  # fmt: skip
    return Extraction(made.artifact(meta, saved.heads), {}, tuple(made.unchanged))


def _add_all(
    made: DenseSqueeze, layers: Mapping[str, nn.Module], answers: Answers, progress: Progress | None
) -> None:
    for done, (name, layer) in enumerate(layers.items(), 1):
        # No name for ΔW here: the last one would live on while the next is computed.
        made.add(name, _delta(name, layer, answers[name]))
        if progress:
            progress(name, done, len(layers))


def _read(folder: Path) -> PeftFolder:
    """Read a folder and refuse what needs no base to be refused."""
    file, settings = folder / CONFIG_FILE, read_json(folder)
    name = _name(settings["peft_type"].upper(), settings, file)
    _check_values(file, settings)
    tensors = read_weights(folder, (*FLOATS, *INDICES))
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ArtifactError(
                f"{folder / WEIGHTS_FILE}: {key} holds NaN or Inf, so nothing can be extracted; train again "
                "with a lower learning rate"
            )
    meta = read_meta(folder, settings).model_copy(update={"method": name})
    saved = PeftFolder(settings, tensors, meta)
    if settings.get("bias", "none") not in ("none", False):
        raise _refusal(folder, saved, "it trains biases, which no LoRA factor holds")
    return saved


def _name(kind: str, settings: Mapping[str, Any], file: Path) -> str:
    """Give the method's name (`peft:<Class>`), of a class that adapts layers and has no factors."""
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
        return method(PREFIX + short).name
    except MethodError:
        return PREFIX + short


def _check_values(file: Path, settings: Mapping[str, Any]) -> None:
    """Refuse nulls that PEFT's class has no meaning for, and what is read here without PEFT."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[settings["peft_type"].upper()]):
        if field.name in settings and settings[field.name] is None and field.default is not None:
            raise ArtifactError(f"{file}: {field.name} is null, which PEFT has no meaning for; leave it out")
    saved = settings.get("modules_to_save")
    if saved is not None and not (isinstance(saved, list) and all(isinstance(name, str) for name in saved)):
        raise ArtifactError(f"{file}: modules_to_save is no list of names but {saved!r}; correct it")


def _check_base(saved: PeftFolder, model: nn.Module, fingerprint: str, folder: Path) -> None:
    made_for = saved.meta.base_fingerprint
    if made_for and made_for != fingerprint:
        raise BaseMismatchError(
            f"{folder} was made for the base {saved.meta.base_model or 'unknown'} ({made_for}), not for this "
            f"one ({fingerprint}); give its own base"
        )
    leaves = {name for name, module in model.named_modules() if not next(module.children(), None)}
    adapted = {key.removeprefix(BASE).rsplit(".", depth)[0] for key in saved.adapter for depth in (1, 2)}
    outside = sorted((adapted & leaves) - linear_shapes(model).keys())
    if outside:
        raise _refusal(folder, saved, f"it adapts {outside[0]}, which is no linear layer inside the model")
    lacking = sorted(saved.heads.keys() - head_parameters(model).keys())
    if lacking:
        modules = ", ".join(dict.fromkeys(name.rpartition(".")[0] for name in lacking))
        raise BaseMismatchError(
            f"{folder} trains {modules} whole (modules_to_save), which is no classification head of this "
            f"base; if it was trained for another task, set model.task. {NOT_SUPPORTED}"
        )


def _conv1ds(model: nn.Module) -> set[str]:
    return {name for name, layer in linears(model).items() if type(layer).__name__ == "Conv1D"}


def _ask(model: nn.Module, seed: int) -> Answers:
    """Have each linear layer of the base answer random rows."""
    answers = {}
    for name, (_, inputs) in linear_shapes(model).items():
        layer = model.get_submodule(name)
        x = torch.randn(ROWS, inputs, generator=generator(seed, name, "rows"))
        with torch.no_grad():
            x = x.to(next(layer.parameters()).device)
            answers[name] = (x, layer(x))
    return answers


def _put_in(model: nn.Module, saved: PeftFolder, folder: Path) -> dict[str, nn.Module]:
    """Have PEFT put its layers in: path → layer."""
    try:
        saved.peft_config()
        attach(model, saved)
    except BaseMismatchError:
        raise
    # PEFT checks few of its fields; a value of another type fails wherever it is used first.
    except (MethodError, TypeError, ValueError, AttributeError, KeyError, RuntimeError) as error:
        raise ArtifactError(f"{folder / CONFIG_FILE} does not make an adapter: {error}") from error
    layers = rivals.layers(model)
    outside = sorted(layers.keys() - rivals.base_shapes(model).keys())
    if outside:
        raise _refusal(folder, saved, f"it adapts {outside[0]}, which is no linear layer inside the model")
    return layers


def _delta(name: str, layer: Any, answer: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Give ΔW (O × I) of a layer of PEFT.

    Raises:
        _NoDeltaError: where its forward pass is not that of W + ΔW.
    """
    x, before = answer
    with torch.no_grad(), warnings.catch_warnings():
        # FRoD's sparse tensors make torch warn.
        warnings.simplefilter("ignore")
        try:
            dense = rivals.dense(layer)
            after = layer(x)
        # Whatever PEFT's thirty implementations raise where they have no such thing.
        except (
            AttributeError,
            NotImplementedError,
            RuntimeError,
            TypeError,
            ValueError,
            IndexError,
        ) as error:
            raise _NoDeltaError(name) from error
        allowed = tolerance(torch.float32, x.shape[1], ROUNDINGS)
        # As the weight is stored (Conv1D's is inputs × outputs), whichever way round PEFT gives it.
        for delta in (dense, dense.mT) if dense.ndim == 2 else ():
            if delta.shape == (before.shape[1], x.shape[1]):
                expected = before + x @ delta.t()
                if relative_error(after, expected) <= allowed:
                    return delta
    raise _NoDeltaError(name)


def _refusal(folder: Path, saved: PeftFolder, reason: str) -> ArtifactError:
    return ArtifactError(
        f"{folder / CONFIG_FILE}: '{saved.meta.method}' can't become a LoRA: {reason}; {WAY_OUT}"
    )
