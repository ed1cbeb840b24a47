"""Small models with batches and an adapter, for the tests of sharpness."""

from __future__ import annotations

import torch

from rayft.data.example import Example, Message
from rayft.data.pack import collate_rows, rows_of
from rayft.data.template import encode_all
from rayft.methods.base import LoraFactors
from rayft.models.load import LoadedModel, ModelConfig, load_model
from rayft.models.targets import linear_shapes
from rayft.numerics import generator


def load(folder, name: str = "tiny-llama", dtype: torch.dtype = torch.float64) -> LoadedModel:
    labels = {"task": "sequence_classification", "num_labels": 3} if name == "tiny-bert" else {}
    return load_model(ModelConfig.model_validate({"name": str(folder), **labels}), dtype)


def batches_for(loaded: LoadedModel) -> list:
    examples = [
        Example(messages=(Message("user", "ab" * n), Message("assistant", "c" * (5 - n)))) for n in (1, 3, 2)
    ]
    rows = rows_of(encode_all(examples, loaded.tokenizer, 60), 60)
    return [collate_rows(rows[:1], 0), collate_rows(rows[1:], 0)]


def adapter_for(model, part: str = "_proj", rank: int = 1) -> dict[str, LoraFactors]:
    found = {}
    for name, (outputs, inputs) in linear_shapes(model).items():
        if part in name:
            draw = generator("adapter", name)
            a = torch.randn(rank, inputs, generator=draw, dtype=torch.float64) / 8
            found[name] = LoraFactors(a, torch.randn(outputs, rank, generator=draw).double(), 0.5)
    return found
