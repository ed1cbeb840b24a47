"""A sweep of one trial over questions in a file, and what its lanes are asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rayft.artifacts import AdapterArtifact
from rayft.flow.sweep.preflight import Plan
from rayft.methods.base import LoraFactors
from rayft.sweep.jobs import Job, Outcome
from rayft.sweep.request import TrainRequest

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
    return TrainRequest(point.key, point.name, point.run, str(plan.output), (), expected=plan.identity)


def trial_of(plan: Plan) -> Path:
    """Return the folder of the plan's only trial."""
    return plan.output / "trials" / plan.points[0].key


class Lanes:
    """An executor whose lanes answer each job at once.

    Args:
        answer: id of a job → its result, or why it failed.
    """

    def __init__(self, answer: Callable[[str], Any]) -> None:
        self.asked: list[str] = []
        self.answer = answer

    def run(self, jobs: Sequence[Job[Any, Any]]) -> Iterator[tuple[str, Outcome[Any]]]:
        """Yield the outcomes of jobs; the last one ends first."""
        self.asked += [job.id for job in jobs]
        for job in reversed(jobs):
            result = self.answer(job.id)
            yield job.id, Outcome(error=result) if isinstance(result, str) else Outcome(result)
