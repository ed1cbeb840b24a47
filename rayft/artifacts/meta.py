"""What `rayft.json` holds, and the names of an adapter's files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import ConfigDict

from rayft.config import Section

__all__ = [
    "CONFIG_FILE",
    "META_FILE",
    "PREFIX",
    "TASK_TYPES",
    "WEIGHTS_FILE",
    "ArtifactMeta",
    "ModuleShapes",
]

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
META_FILE = "rayft.json"
PREFIX = "base_model.model."
"""What PEFT puts before a module's path."""
TASK_TYPES = {"causal_lm": "CAUSAL_LM", "sequence_classification": "SEQ_CLS", "image_classification": None}
"""What the model does → PEFT's name of it (it has none for images)."""

ModuleShapes = Mapping[str, tuple[int, int]]
"""Linear layers of a base model: module path → (outputs, inputs)."""


class ArtifactMeta(Section):
    """What `rayft.json` holds."""

    # A score may be NaN; JSON has no word for it, and null would not load again.
    model_config = ConfigDict(ser_json_inf_nan="strings")

    format: Literal[1] = 1
    """Version of this file's format."""
    method: str = "lora"
    """The method that trained it."""
    task: Literal["causal_lm", "sequence_classification", "image_classification"] = "causal_lm"
    """What the model does."""
    base_model: str = ""
    """Hub id, folder or registered name of the base."""
    base_fingerprint: str = ""
    """Fingerprint of the base's weights; empty if unknown."""
    data_digest: str = ""
    """Digest of the data it was trained on; empty if unknown."""
    parent: str = ""
    """Content hash of the adapter that this one was squeezed from; empty if none."""
    made: str = ""
    """Command, source and target that made it; only the same replaces it without being told to."""
    transposed: bool = False
    """Whether the base's layers hold their weights as inputs × outputs (GPT-2's Conv1D)."""
    columns: dict[str, tuple[int, ...]] = {}
    """Inputs that a selector method reads: module → columns."""
    singular_values: dict[str, tuple[float, ...]] = {}
    """Singular values of ΔW at full rank, largest first: module → values; filled by a squeeze."""
    tail_energy: dict[str, float] = {}
    """Where not all singular values were computed (a dense ΔW): module → Σσ² of the others."""
    metrics: dict[str, float] = {}
    """Scores and sizes measured when it was made."""
