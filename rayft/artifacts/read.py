"""Read the folder of a PEFT LoRA: its tensors, what they train, and every check that needs no base."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Collection, Mapping, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch

from rayft.artifacts.lora_settings import NOT_SUPPORTED, OUTPUT_LAYERS, LoraSettings
from rayft.artifacts.meta import CONFIG_FILE, META_FILE, PREFIX, WEIGHTS_FILE, ArtifactMeta, settings_text
from rayft.config import in_one_line
from rayft.errors import ArtifactError
from rayft.methods.base import LoraFactors
from rayft.numerics import relative_error, tolerance

__all__ = ["FLOATS", "INDICES", "assemble", "check_selector", "check_spectrum", "read_meta", "read_weights"]

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Safetensors' names of the types whose numbers are the weights; other types need scales."""
INDICES = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types in which some of PEFT's classes keep indices and masks; a LoRA has none."""
LARGEST_HEADER = 100_000_000
"""Largest size of a file's header in bytes; safetensors has the same limit."""
LARGEST_META = 2**27
"""Largest size of `rayft.json` in bytes; 5 million singular values have 100 MB."""
FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<which>[AB])(?:\.default)?\.weight")
OTHERS = {
    r"(?P<module>.+)\.lora_embedding_[AB](?:\..+)?": "the embedding {module} (LoRA)",
    r"(?P<module>.+?)(?:\.token_adapter)?\.trainable_tokens_\w+(?:\..+)?": "rows of the embedding {module}",
    r"(?P<module>.+)\.lora_magnitude_vector(?:\..+)?": "the magnitude of {module} (DoRA)",
    r"(?P<module>.+)\.lora_B(?:\.\w+)?\.bias": "the bias of {module} (lora_bias)",
    r"(?P<module>.+)\.bias": "the bias of {module}",
}
"""Parts of the names of tensors that PEFT saves beside plain factors → what they train."""


def read_weights(folder: Path, kinds: Mapping[str, torch.dtype] = FLOATS) -> dict[str, torch.Tensor]:
    """Read the tensors into memory: PEFT's name → tensor.

    The file is not mapped, because a map shows what is written into the file later, and a process that reads
    a map of a file that was truncated is killed (SIGBUS). Nor are its bytes given to safetensors. It copies
    them while it holds Python's lock (37 ms for 100 MB), and a server that loads an adapter could send no
    answers meanwhile.

    Args:
        folder: the adapter folder.
        kinds: safetensors' names of the types that a tensor may have.

    Raises:
        ArtifactError: naming the file, and the tensor if its type is none that adapters are computed with.
    """
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickled = " (adapter_model.bin is a pickle, which is never read: save it as safetensors)"
        extra = pickled if (folder / "adapter_model.bin").exists() else ""
        raise ArtifactError(f"{folder} has no {WEIGHTS_FILE}{extra}; export the adapter again")
    try:
        with path.open("rb") as file:
            header = _header(file)
            _check_types(path, header, kinds)
            return _tensors(file, header, kinds)
    # A damaged header may name any type, shape or offset.
    except (OSError, struct.error, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ArtifactError(f"{path} is truncated or damaged ({error}); copy or export it again") from error


def _header(file: BufferedReader) -> dict[str, Any]:
    """Read the header of a safetensors file: name → dtype, shape and data_offsets (bytes behind the header).

    Raises:
        struct.error, ValueError, AttributeError: if it is damaged.
    """
    (size,) = struct.unpack("<Q", file.read(8))
    if size > LARGEST_HEADER:
        raise ValueError("its header has no valid size")
    header: dict[str, Any] = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return header


def _tensors(
    file: BufferedReader, header: Mapping[str, Any], kinds: Mapping[str, torch.dtype]
) -> dict[str, torch.Tensor]:
    """Read the tensors behind a header, each into memory of its own.

    Raises:
        OSError, ValueError, LookupError, TypeError, RuntimeError: if they are not what the header says.
    """
    found, place, begin = {}, 0, file.tell()
    size = os.fstat(file.fileno()).st_size - begin
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, end = entry["data_offsets"]
        if first != place or end > size:
            raise ValueError(f"{name} does not follow the tensor before it")
        memory = torch.empty(end - first, dtype=torch.uint8, device="cpu")
        target: Any = memory.numpy()
        if file.readinto(target) != len(memory):
            raise ValueError(f"{name} is cut off")
        found[name] = memory.view(kinds[entry["dtype"]]).view(entry["shape"])
        if [*found[name].shape] != entry["shape"]:
            raise ValueError(f"{name} has the shape {entry['shape']}")
        place = end
    if place != size:
        raise ValueError(f"it has {size} bytes behind its header, and its tensors {place}")
    return found


def read_meta(folder: Path, settings: Mapping[str, object]) -> ArtifactMeta:
    """Read `rayft.json`; if there is none, fill in what PEFT's configuration holds.

    Args:
        folder: the adapter folder.
        settings: the content of `adapter_config.json`.
    """
    path = folder / META_FILE
    if not path.is_file():
        task = "sequence_classification" if settings.get("task_type") == "SEQ_CLS" else "causal_lm"
        if settings.get("task_type") is None and settings.get("modules_to_save"):
            # PEFT has no name for the task of image classifiers; without a name, a head means that it is one.
            task = "image_classification"
        base = settings.get("base_model_name_or_path") or ""
        transposed = bool(settings.get("fan_in_fan_out"))
        try:
            return ArtifactMeta.model_validate({"task": task, "base_model": base, "transposed": transposed})
        except ValueError as error:
            raise ArtifactError(
                f"{folder / CONFIG_FILE}: base_model_name_or_path is no name but {base!r}; correct it"
            ) from error
    try:
        return ArtifactMeta.model_validate_json(settings_text(path, LARGEST_META))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{path} does not fit its format ({in_one_line(error)}); export the adapter again"
        ) from error


def assemble(
    folder: Path, settings: LoraSettings, tensors: Mapping[str, torch.Tensor], meta: ArtifactMeta
) -> tuple[dict[str, LoraFactors], dict[str, torch.Tensor]]:
    """Sort the tensors into factors by module path, and heads by parameter path.

    Raises:
        ArtifactError: if a tensor is neither, or PEFT would not use it where its name says.
    """
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    heads: dict[str, torch.Tensor] = {}
    others: list[str] = []
    saved = tuple(settings.modules_to_save or ())
    for key, tensor in tensors.items():
        name = _without_prefix(folder, key)
        found = FACTOR.fullmatch(name)
        if found:
            pair = pairs.setdefault(found["module"], {})
            if found["which"] in pair:
                raise ArtifactError(
                    f"{folder}: {key} is there twice, with and without 'default'; keep one of them"
                )
            pair[found["which"]] = tensor
        elif any(part in saved for part in (name.rsplit(".", 1)[0], *name.split("."))):
            heads[name] = tensor
        else:
            others.append(name)
    _check_trained(folder, settings, pairs, heads, others)
    if not pairs:
        raise ArtifactError(f"{folder} holds no LoRA factors; export the adapter again")
    factors = {name: _factors(folder, settings, name, pair, meta) for name, pair in sorted(pairs.items())}
    return factors, heads


def _check_types(path: Path, header: Mapping[str, Any], kinds: Collection[str]) -> None:
    """Refuse, by the file's header, types that safetensors can hold but nothing here computes with."""
    for key, tensor in header.items():
        if (kind := tensor["dtype"]) not in kinds:
            raise ArtifactError(
                f"{path}: {key} is of type {kind}, and adapters are computed with float64, float32, float16 "
                "or bfloat16: save it again in one of these (tensor.to(torch.float32), and its scale "
                "multiplied in, if it has one)"
            )


def _without_prefix(folder: Path, key: str) -> str:
    name = key.removeprefix(PREFIX)
    if name == key or name.startswith("base_model."):
        raise ArtifactError(
            f"{folder}: {key} is no name that PEFT gives a tensor, which begins with '{PREFIX}' once, so "
            "PEFT would leave it out; save the adapter with PeftModel.save_pretrained, or rename its tensors"
        )
    return name


def _check_trained(
    folder: Path,
    settings: LoraSettings,
    pairs: Mapping[str, object],
    heads: Mapping[str, object],
    others: list[str],
) -> None:
    """Refuse an adapter that trains more than linear layers inside the model and a classification head."""
    # The top modules that have factors, such as `model` or `bert`; a head is beside them.
    inside = {name.split(".")[0] for name in pairs}
    trained = [f"{name} (LoRA)" for name in pairs if name.rsplit(".", 1)[-1] in OUTPUT_LAYERS]
    trained += [f"{name.rsplit('.', 1)[0]} whole" for name in heads if name.split(".")[0] in inside]
    for name in others:
        known = ((re.fullmatch(pattern, name), what) for pattern, what in OTHERS.items())
        what = next((what.format(module=found["module"]) for found, what in known if found), None)
        if what is None and name.endswith(".weight") and ".lora_" not in name:
            what = f"{name.removesuffix('.weight').removesuffix('.base_layer')} whole"
        if what is None:
            raise ArtifactError(f"{folder}: {name} is no LoRA factor; export the adapter as plain LoRA")
        trained.append(what)
    if trained:
        raise ArtifactError(f"{folder} trains {', '.join(dict.fromkeys(trained))}. {NOT_SUPPORTED}")
    if settings.modules_to_save and not heads:
        raise ArtifactError(
            f"{folder} holds nothing of {', '.join(settings.modules_to_save)}, which {CONFIG_FILE} names in "
            "modules_to_save; export the adapter again"
        )
    stray = next((name for name in pairs if not settings.adapts(name)), None)
    if stray is not None:
        raise ArtifactError(
            f"{folder} has factors of {stray}, which {CONFIG_FILE} does not choose (target_modules, "
            "exclude_modules, layers_to_transform), so PEFT would leave them out; config and weights are "
            "not of the same adapter, or its tensors were renamed"
        )


def _factors(
    folder: Path, settings: LoraSettings, name: str, pair: Mapping[str, torch.Tensor], meta: ArtifactMeta
) -> LoraFactors:
    if set(pair) != {"A", "B"}:
        missing = "B" if "A" in pair else "A"
        raise ArtifactError(f"{folder}: {name} has no lora_{missing}; export the adapter again")
    a, b, rank = pair["A"], pair["B"], settings.rank(name)
    if a.ndim > 2 and b.ndim == a.ndim:
        raise ArtifactError(
            f"{folder} trains {name}, a convolution (lora_A is {tuple(a.shape)}). {NOT_SUPPORTED}"
        )
    if a.ndim != 2 or b.ndim != 2 or not a.shape[0] == b.shape[1] == rank:
        raise ArtifactError(
            f"{folder}: {name} has A {tuple(a.shape)} and B {tuple(b.shape)}, but {CONFIG_FILE} says rank "
            f"{rank}; config and weights are not of the same adapter"
        )
    scale = settings.scale(name)
    if abs(scale) > torch.finfo(torch.float32).max:
        raise ArtifactError(
            f"{folder}: {name} has the scale {scale}, which is no float32; correct lora_alpha"
        )
    return LoraFactors(a, b, scale, columns=meta.columns.get(name))


def check_selector(where: str, factors: LoraFactors) -> None:
    """Refuse columns other than those that A selects: serving gathers by columns, PEFT multiplies by A."""
    columns = factors.columns
    if columns is None:
        return
    rank, inputs = factors.a.shape
    if len(columns) == rank and all(0 <= column < inputs for column in columns):
        selector = torch.zeros_like(factors.a)
        selector[torch.arange(rank), list(columns)] = 1
        if torch.equal(selector, factors.a):
            return
    raise ArtifactError(
        f"{where}: the columns in {META_FILE} are not those that lora_A selects; export the adapter again"
    )


def check_spectrum(where: str, factors: LoraFactors, singular_values: Sequence[float] | None) -> None:
    """Refuse singular values other than those of a module's columns, by which lower ranks are cut.

    PEFT's `save_pretrained` replaces the weights of a folder and leaves `rayft.json` as it was.

    Args:
        where: folder and module, for the message.
        factors: of the module.
        singular_values: of its columns, in their order, and of those that were cut off; None if the module
            has none.

    Raises:
        ArtifactError: if they differ from the columns' by more than rounding to 16 bits explains.
    """
    if singular_values is not None:
        a, b = factors.a.detach(), factors.b.detach()
        # σ of a column is the norm of its product, however A and B share that norm.
        found = torch.linalg.vector_norm(a, dim=1, dtype=torch.float64)
        found *= torch.linalg.vector_norm(b, dim=0, dtype=torch.float64) * abs(factors.scale)
        noted, kept = torch.zeros_like(found), singular_values[: factors.rank]
        noted[: len(kept)] = torch.tensor(kept, dtype=torch.float64)
        # Columns of zeros only fill up a rank.
        noted *= found > 0
        # Whatever their dtype is now, they may have been rounded to 16 bits on their way.
        if relative_error(found, noted) <= tolerance(torch.bfloat16, max(a.shape[1], b.shape[0]), depth=2):
            return
    raise ArtifactError(
        f"{where}: the singular values in {META_FILE} are not those of its columns, so the weights were "
        "replaced after rayft wrote the folder (PEFT's save_pretrained does that, and leaves this file): "
        f"delete {META_FILE} to use the folder as PEFT's plain LoRA, or copy both files again"
    )
