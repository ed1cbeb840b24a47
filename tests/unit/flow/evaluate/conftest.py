"""Data, a configuration and adapters to evaluate."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from rayft.artifacts import AdapterArtifact
from rayft.flow.config import load_config
from rayft.flow.sweep.folder import make_folder
from rayft.flow.sweep.identity import current_identity
from rayft.models.fingerprint import fingerprint
from rayft.models.load import ModelConfig, load_model
from rayft.models.targets import linear_shapes
from rayft.models.tiny import save_tiny_llama
from rayft.squeeze.rank import squeeze
from tests.unit.serving.adapters import random_adapter

SCORER = """
def grade(answer: str, expected: str, question: str) -> float:
    return sum(map(ord, answer)) % 7 / 6
"""
CONFIG = """
name: answers
output: out
model: {{name: {model}}}
data: {{source: jsonl, name: rows.jsonl, val: 6, test: 12, max_length: 128,
  scorer: {{kind: python, function: "own.py:grade"}}}}
scale: {{device: cpu, dtype: float32, threads: 1}}
evaluate: {{max_new_tokens: 4}}
sweep: {{methods: {{lora: {{ranks: [2], lr: [1.0e-2]}}}}}}
"""


@dataclass(frozen=True)
class Here:
    """A working directory with data, a configuration and adapters."""

    folder: Path
    model: Path

    def save(self, name: str, artifact: AdapterArtifact) -> str:
        return str(artifact.save(self.folder / name))

    def adapter(self, name: str, rank: int = 4, base: str | None = None) -> AdapterArtifact:
        model = load_model(ModelConfig(name=str(self.model)), torch.float32).model
        made = random_adapter(name, dict(linear_shapes(model)), base or fingerprint(model), rank)
        meta = made.meta.model_copy(update={"base_model": str(self.model)})
        return AdapterArtifact(made.modules, meta=meta)

    def squeezed(self, name: str) -> AdapterArtifact:
        return squeeze(self.adapter(name))

    def sweep(self) -> Path:
        """Begin the sweep of the configuration, and return its output folder."""
        config = load_config("config.yaml")
        make_folder(config, config.folder, current_identity(config.run()), keep=False)
        return config.folder

    def hub(self, monkeypatch: pytest.MonkeyPatch) -> str:
        """Make a hub whose `org/model` is another model, and the model of this folder in its branch `old`."""
        hub = self.folder / "hub" / "models--org--model"
        save_tiny_llama(hub / "snapshots" / ("a" * 40), seed=7)
        shutil.copytree(self.model, hub / "snapshots" / ("b" * 40))
        (hub / "refs").mkdir()
        (hub / "refs" / "main").write_text("a" * 40)
        (hub / "refs" / "old").write_text("b" * 40)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(self.folder / "hub"))
        return "org/model"


@pytest.fixture
def here(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    rows = [{"prompt": f"How many in box {box}?", "completion": "5"} for box in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "own.py").write_text(SCORER)
    (tmp_path / "config.yaml").write_text(CONFIG.format(model=tiny_folder))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Here(tmp_path, tiny_folder)
