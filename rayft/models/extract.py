"""Dense updates as LoRAs, by their leading singular values: of a full fine-tune, or of an adapter of PEFT's.

    ΔW ≈ B·A,  B (O × k), A (k × I)        layer by layer

`extract_full`: ΔW = W_tuned − W_base (O × I, float32). Both checkpoints stay on disk; in memory are one
layer's ΔW and a block of rows of each checkpoint. Other changes that training made (to embeddings, norms,
biases, the output layer, layers that are no targets) have no place in a LoRA. They are measured, so that
users of the adapter know what it lacks. Heads travel whole.

`extract_peft`: ΔW as PEFT's layers state it, of adapters that have no factors. It is checked on each layer
(`rayft.peft.dense`), and only what the rank cuts off is lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rayft.artifacts import CONFIG_FILE, AdapterArtifact, ArtifactMeta
from rayft.artifacts import PREFIX as BASE
from rayft.artifacts.lora_settings import NOT_SUPPORTED
from rayft.errors import ArtifactError, BaseMismatchError, MethodError
from rayft.models.checkpoint import Checkpoint, Stored
from rayft.models.difference import open_pair, pairs, whole
from rayft.models.heads import head_parameters
from rayft.models.inject import attach
from rayft.models.load import ModelConfig, load_model
from rayft.models.targets import is_transposed, linear_shapes, linears
from rayft.peft.dense import answer_of, checked_delta, no_lora, read_dense
from rayft.peft.folder import PeftFolder
from rayft.peft.layers import layers_inside
from rayft.squeeze.dense import DenseSqueeze

__all__ = ["Extraction", "Progress", "extract_full", "extract_peft"]

Progress = Callable[[str, int, int], None]
"""Called after each module with its path, the number of modules done, and the number of all."""


@dataclass(frozen=True)
class Extraction:
    """An adapter made of a dense update, and the changes that it does not hold."""

    artifact: AdapterArtifact
    """The adapter, squeezed: its columns are sorted by singular value, and `meta` has the spectrum."""
    lost: Mapping[str, float]
    """Parameters that changed and are in none of its modules, largest change first: name → ‖ΔW‖ / ‖W‖,
    which is infinite where the base has no such parameter."""
    unchanged: tuple[str, ...]
    """Target modules whose ΔW is exactly 0, which the adapter leaves out."""


def extract_full(
    base: ModelConfig,
    tuned: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    targets: str | tuple[str, ...] = "all-linear",
    tuned_revision: str | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Progress | None = None,
) -> Extraction:
    """Make a LoRA of a full fine-tune.

    Args:
        base: the model that the fine-tune started from; `task` and `num_labels` are the fine-tune's, and the
            weights are read unquantised.
        tuned: folder, registered name or hub id of the fine-tuned model.
        rank: of each module, or min(O, I) where that is lower.
        energy: in place of the rank, the share of each module's ‖ΔW‖² to retain, in (0, 1].
        targets: as in `method.targets`: `all-linear`, a regular expression, or last parts of names.
        tuned_revision: branch, tag or commit of a hub model.
        seed: decides the random numbers of the SVD.
        device: that computes.
        dtype: of the factors.
        progress: called after each module.

    Raises:
        SqueezeError: if not one of rank and energy is given, it is out of range, or nothing changed.
        TargetError: if targets match nothing.
        BaseMismatchError: if a tensor has another shape in the base.
        ModelError: if a checkpoint is missing, damaged, lacks a tensor, or holds NaN or Inf.
    """
    with open_pair(base, tuned, targets, tuned_revision) as pair:
        made = DenseSqueeze(pair.shapes, rank=rank, energy=energy, seed=seed, device=device, dtype=dtype)
        for done, name in enumerate(pair.shapes, 1):
            # ΔW gets no name here, because the last one would stay in memory while the next is read.
            made.add(name, pair.update(name))
            if progress:
                progress(name, done, len(pair.shapes))
        heads = {name: whole(pair.after.parameters[name]) for name in head_parameters(pair.skeleton)}
        inside = {f"{name}.weight" for name in pair.shapes} | heads.keys()
        lost = _lost(pair.skeleton, pair.before, pair.after, inside)
    meta = ArtifactMeta(
        method="full", task=base.task, base_model=base.name, base_revision=base.revision or "",
        base_fingerprint=pair.before.fingerprint(),
        transposed=any(map(pair.turned, pair.shapes)),
    )  # fmt: skip
    return Extraction(made.artifact(meta, heads), lost, tuple(made.unchanged))


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
    """Make a LoRA of an adapter in PEFT's own format.

    Args:
        folder: that PEFT saved, with or without `rayft.json`.
        base: the model that it was trained on, which is loaded whole, unquantised and in float32.
        rank: of each module, or min(O, I) where that is lower.
        energy: in place of the rank, the share of each module's ‖ΔW‖² to retain, in (0, 1].
        seed: decides the random numbers.
        device: that computes.
        dtype: of the factors.
        progress: called after each module.

    Raises:
        SqueezeError: if not one of rank and energy is given, it is out of range, or all updates are 0.
        ArtifactError: if the folder is damaged, or a layer's forward pass is not that of W + ΔW.
        BaseMismatchError: if it is for another base.
        ModelError: if the base can't be loaded.
    """
    folder = Path(folder)
    saved = read_dense(folder)
    loaded = load_model(base.model_copy(update={"quantize": None}), torch.float32, device)
    model = loaded.model
    _check_peft_base(saved, model, loaded.fingerprint, folder)
    shapes, plain = linear_shapes(model), linears(model)
    answers = {name: answer_of(layer, name, shapes[name][1], seed) for name, layer in plain.items()}
    layers = _put_in(model, saved, folder)
    adapted = {name: shapes[name] for name in layers}
    made = DenseSqueeze(adapted, rank=rank, energy=energy, seed=seed, device=device, dtype=dtype)
    for done, (name, layer) in enumerate(layers.items(), 1):
        # ΔW gets no name here, because the last one would stay in memory while the next is computed.
        made.add(name, _delta(saved, folder, name, checked_delta(layer, answers[name])))
        if progress:
            progress(name, done, len(layers))
    meta = ArtifactMeta(
        method=saved.meta.method, task=base.task, base_model=base.name, base_revision=base.revision or "",
        base_fingerprint=loaded.fingerprint,
        data_digest=saved.meta.data_digest, parent=saved.content_hash,
        transposed=any(is_transposed(plain[name]) for name in layers),
    )  # fmt: skip
    return Extraction(made.artifact(meta, saved.heads), {}, tuple(made.unchanged))


def _lost(skeleton: Any, before: Checkpoint, after: Checkpoint, inside: set[str]) -> dict[str, float]:
    """Measure the changes outside the adapter, with one block of rows in memory."""
    olds, news = {**before.others, **before.parameters}, {**after.others, **after.parameters}
    # An output layer that the base ties to its embedding, and the fine-tune does not, started as that.
    for output, embedding in (getattr(skeleton, "_tied_weights_keys", None) or {}).items():
        if output not in olds and embedding in olds:
            olds[output] = olds[embedding]
    changes = {}
    for name, new in news.items():
        if name in inside:
            continue
        old = olds.get(name)
        change = math.inf if old is None or old.shape != new.shape else _change(old, new)
        if change:
            changes[name] = change
    return dict(sorted(changes.items(), key=lambda item: -item[1]))


def _change(before: Stored, after: Stored) -> float:
    """Compute ‖W_tuned − W‖ / ‖W‖ in float64."""
    difference = norm = 0.0
    for _, old, new in pairs(before, after):
        difference += float((new.double() - old.double()).square().sum())
        norm += float(old.double().square().sum())
    if not difference:
        return 0.0
    return math.sqrt(difference / norm) if norm else math.inf


def _delta(saved: PeftFolder, folder: Path, name: str, delta: torch.Tensor | None) -> torch.Tensor:
    if delta is None:
        raise no_lora(folder, saved, f"PEFT gives no ΔW of {name} by which its layer is x (W + ΔW)ᵀ + b")
    return delta


def _check_peft_base(saved: PeftFolder, model: nn.Module, fingerprint: str, folder: Path) -> None:
    made_for = saved.meta.base_fingerprint
    if made_for and made_for != fingerprint:
        raise BaseMismatchError(
            f"{folder} was made for the base {saved.meta.base_model or 'unknown'} ({made_for}), not for this "
            f"one ({fingerprint}); give its own base"
        )
    leaves = {name for name, module in model.named_modules() if not next(module.children(), None)}
    adapted = {key.removeprefix(BASE).rsplit(".", depth)[0] for key in saved.adapter for depth in (1, 2)}
    _check_linear(adapted & leaves, saved, model, folder)
    lacking = sorted(saved.heads.keys() - head_parameters(model).keys())
    if lacking:
        modules = ", ".join(dict.fromkeys(name.rpartition(".")[0] for name in lacking))
        raise BaseMismatchError(
            f"{folder} trains {modules} whole (modules_to_save), which is no classification head of this "
            f"base; if it was trained for another task, set model.task. {NOT_SUPPORTED}"
        )


def _put_in(model: nn.Module, saved: PeftFolder, folder: Path) -> dict[str, nn.Module]:
    """Have PEFT put its layers in, and return them: module path → layer."""
    try:
        saved.peft_config()
        attach(model, saved)
    except BaseMismatchError:
        raise
    # PEFT checks few of its fields; a value of a wrong type fails wherever it is first used.
    except (MethodError, TypeError, ValueError, AttributeError, KeyError, RuntimeError) as error:
        raise ArtifactError(f"{folder / CONFIG_FILE} does not make an adapter: {error}") from error
    layers = layers_inside(model)
    _check_linear(layers.keys(), saved, model, folder)
    return layers


def _check_linear(adapted: Set[str], saved: PeftFolder, model: nn.Module, folder: Path) -> None:
    outside = sorted(adapted - linear_shapes(model).keys())
    if outside:
        raise no_lora(folder, saved, f"it adapts {outside[0]}, which is no linear layer inside the model")
