"""A sweep of one trial over questions in a file, and what its lanes are asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rayft.artifacts import AdapterArtifact
from rayft.flow.sweep.preflight import Plan
from rayft.methods.base import LoraFactors
from rayft.sweep.broker import Event, Job
from rayft.sweep.lane import TrainRequest

__all__ = ["ADAPTER", "CONFIG", "Lanes", "adapter", "request_of", "trial_of"]

ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "rayft.json")
"""Files of an adapter folder."""
CONFIG = """
name: answers
output: out
model: {name: tiny-llama}
data: {source: jsonl, name: answers.jsonl, val: 2, test: 2, max_length: 128}
optim: {steps: 2, rows_per_step: 2, warmup: 0}
scale: {device: cpu, dtype: float32, threads: 1}
sweep: {methods: {lora: {ranks: [2], lr: [1.0e-2]}}}
"""


def adapter(seed: int = 0) -> AdapterArtifact:
    draw = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 4, generator=draw), torch.randn(4, 2, generator=draw)
    return AdapterArtifact({"q": LoraFactors(a, b, 1.0)})


def request_of(plan: Plan) -> TrainRequest:
    """Return the request of the plan's only trial."""
    (point,) = plan.points
    run = point.run.model_dump_json()
    return TrainRequest(point.key, point.name, run, str(plan.output), (), expected=plan.identity)


def trial_of(plan: Plan) -> Path:
    """Return the folder of the plan's only trial."""
    return plan.output / "trials" / plan.points[0].key


class Lanes:
    """An executor whose lanes answer each job at once.

    Args:
        monkeypatch: replaces the functions of Ray that wait for a future.
        answer: name of a job → the values of its final event, or why it failed.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, answer: Callable[[str], dict[str, Any] | str]
    ) -> None:
        self.asked: list[str] = []
        self.answer = answer
        monkeypatch.setattr("ray.nodes", list)
        monkeypatch.setattr("ray.get", self._event)
        monkeypatch.setattr("ray.wait", lambda events, num_returns: (events[-1:], events[:-1]))
        self.broker = SimpleNamespace(next_event=SimpleNamespace(remote=lambda name: name))

    def submit(self, jobs: list[Job]) -> None:
        self.asked += [job.id for job in jobs]

    def _event(self, name: str) -> Event:
        values = self.answer(name)
        if isinstance(values, str):
            return Event("failed", values={"error": values})
        return Event("final", values=values)
