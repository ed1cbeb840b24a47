"""The content of `rayft.json`, and the names of an adapter's files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict

from rayft.config import Section
from rayft.errors import ArtifactError

__all__ = [
    "CONFIG_FILE",
    "META_FILE",
    "PREFIX",
    "TASK_TYPES",
    "WEIGHTS_FILE",
    "ArtifactMeta",
    "ModuleShapes",
    "settings_text",
    "stored_revision",
]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
META_FILE = "rayft.json"
PREFIX = "base_model.model."
"""Prefix of module paths in PEFT's files."""
TASK_TYPES = {"causal_lm": "CAUSAL_LM", "sequence_classification": "SEQ_CLS", "image_classification": None}
"""Task of the model → PEFT's name of the task; PEFT has none for images."""

ModuleShapes = Mapping[str, tuple[int, int]]
"""Linear layers of a base model: module path → (outputs, inputs)."""


class ArtifactMeta(Section):
    """The content of `rayft.json`."""

    # A score may be NaN, which JSON lacks, and null could not be read back.
    model_config = ConfigDict(ser_json_inf_nan="strings")

    format: Literal[1] = 1
    """Version of this file's format."""
    method: str = "lora"
    """The method that trained it."""
    task: Literal["causal_lm", "sequence_classification", "image_classification"] = "causal_lm"
    """Task of the model."""
    base_model: str = ""
    """Hub id, folder or registered name of the base."""
    base_revision: str = ""
    """Revision of the base on the hub that it was trained on; empty for `main`, or if it is not known."""
    base_fingerprint: str = ""
    """Fingerprint of the base's weights; empty if unknown."""
    data_digest: str = ""
    """Digest of the data it was trained on; empty if unknown."""
    parent: str = ""
    """Content hash of the adapter that this one was squeezed from; empty if none."""
    made: str = ""
    """Command, source and target that made it; others replace it only if the user asks for that."""
    transposed: bool = False
    """Whether the base's layers store their weights as inputs × outputs (GPT-2's Conv1D)."""
    columns: dict[str, tuple[int, ...]] = {}
    """Inputs that a selector method reads: module → columns."""
    singular_values: dict[str, tuple[float, ...]] = {}
    """Singular values of ΔW at full rank, largest first: module → values; filled by a squeeze."""
    tail_energy: dict[str, float] = {}
    """Of a dense ΔW, whose singular values were not all computed: module → Σσ² of the others."""
    metrics: dict[str, float] = {}
    """Scores and sizes measured when it was made."""


def stored_revision(meta: ArtifactMeta, named: object, revision: object) -> str | None:
    """Return the revision of the base on the hub that an adapter stores; None if it stores none.

    Args:
        meta: the content of `rayft.json`, or what stands for it.
        named: the base that PEFT's settings name.
        revision: the revision that PEFT's settings name, which is one of that base.
    """
    if meta.base_revision:
        return meta.base_revision
    return str(revision) if revision and named == meta.base_model else None


def settings_text(path: Path, most: int) -> str:
    """Return the text of a file of settings, unless it is too large.

    JSON of empty objects takes 26 times its size in memory once it is parsed.

    Raises:
        ArtifactError: if it has more than `most` bytes.
        OSError, UnicodeDecodeError: if it can't be read, or is not UTF-8.
    """
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ArtifactError(f"{path} has more than {most:,} bytes; export the adapter again")
    return data.decode("utf-8")
