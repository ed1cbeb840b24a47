"""What is rehearsed: the first steps of runs, on a small stand-in for their base."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rayft.data.pack import Batch
from rayft.models.packed import PackedAdapter
from rayft.train import packed, rehearsal
from rayft.train.run import RunConfig
from rayft.train.slots import Sizing
from tests.unit.train.runs import changed, with_method

ROWS, TOKENS = 2, 512
"""Rows of a run's step, and their tokens."""


class Passes:
    """Records the passes of packed models: the shape, whether gradients are kept, and the slots' methods."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shapes: list[tuple[tuple[int, ...], bool]] = []
        self.ranks: list[list[int]] = []
        self._computed = packed.target_losses
        monkeypatch.setattr(packed, "target_losses", self)

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        self.shapes.append(((*batch.input_ids.shape,), torch.is_grad_enabled()))
        layer = next(module for module in model.modules() if isinstance(module, PackedAdapter))
        self.ranks.append([adapter.lora_B.shape[1] for adapter in layer.adapters.values()])  # type: ignore[union-attr,index]
        return self._computed(model, batch)


def runs_of(run: RunConfig) -> list[RunConfig]:
    return [
        with_method(run, "lora"),
        changed(with_method(run, "cla", seed=1), method={"rank": 8}),
        with_method(run, "paca"),
        with_method(run, "c3la"),
    ]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Methods of the runs that are trained alone, instead of which nothing is done."""
    names: list[str] = []
    monkeypatch.setattr(rehearsal, "_train_alone", lambda run, *_: names.append(run.method.name))
    return names


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level("INFO", "rayft.train.rehearsal")
    return caplog


def test_a_step_and_a_validation_of_the_slots_are_computed(
    run: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
    alone: list[str],
    logged: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    passes = Passes(monkeypatch)
    rehearsal.rehearse(runs_of(run), 3, "cpu", tmp_path)
    # The third run that can share a step comes after one that can't.
    assert passes.ranks == 2 * [[4, 8, 4]]
    assert passes.shapes == [((3 * ROWS, TOKENS), True), ((3 * rehearsal.EXAMPLES, TOKENS), False)]
    assert alone == ["paca"]
    assert "validation of 3 runs" in logged.text
    # Neither a step that can't be taken nor a run that ends by an error.
    assert "run " not in logged.text


def test_what_is_found_out_is_tried_and_so_are_other_numbers(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    together: list[int] = []
    monkeypatch.setattr(rehearsal, "_size", lambda *_: Sizing(16))
    monkeypatch.setattr(rehearsal, "_train_together", lambda runs, *_, **__: together.append(len(runs)))
    many = [with_method(run, "lora", seed=seed) for seed in range(20)]
    rehearsal.rehearse(many, None, "cpu", tmp_path)
    assert together == [16, 4]
    together.clear()
    rehearsal.rehearse(many[:3], None, "cpu", tmp_path)
    assert together == [3]
    together.clear()
    rehearsal.rehearse(many, 16, "cpu", tmp_path)
    assert together == [16]


def test_runs_that_take_turns_are_rehearsed_once_a_method_and_rank(
    run: RunConfig, alone: list[str], tmp_path: Path
) -> None:
    # `full` is left out: the lane loads its base again after it.
    more = [with_method(run, "full"), with_method(run, "lora", seed=3), changed(run, method={"rank": 8})]
    rehearsal.rehearse([*runs_of(run), *more], 1, "cpu", tmp_path)
    assert alone == ["lora", "cla", "paca", "c3la", "lora"]


def test_a_run_alone_takes_a_step_and_is_validated(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answered: list[str] = []
    answer = rehearsal.Trainer.answer

    def recorded(trainer: rehearsal.Trainer, asked: Any) -> Any:
        answered.append(type(asked).__name__)
        return answer(trainer, asked)

    monkeypatch.setattr(rehearsal.Trainer, "answer", recorded)
    rehearsal.rehearse([changed(run, optim={"steps": 1})], 1, "cpu", tmp_path)
    assert answered == ["Step", "Validation"]


def test_kernels_are_compiled_by_a_pass_that_leaves_nothing(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch, logged: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    grads: list[bool] = []
    captured = packed.Pack._capture

    def after(pack: packed.Pack, engine: Any, micro: Any) -> None:
        own: Sequence[Any] = pack._built
        grads.append(any(p.grad is not None for slot in own for p in slot.module.parameters()))
        captured(pack, engine, micro)

    monkeypatch.setattr(rehearsal, "_is_gpu", lambda _: True)
    monkeypatch.setattr(rehearsal, "compiling_ahead", nullcontext)
    monkeypatch.setattr(packed.Pack, "_capture", after)
    passes = Passes(monkeypatch)
    monkeypatch.setattr(rehearsal, "target_losses", passes)
    rehearsal.rehearse(runs_of(run)[:2], 2, "cpu", tmp_path)
    assert [learns for _, learns in passes.shapes] == [True, True, False]
    assert grads == [False]
    assert "compiled" in logged.text


def test_without_a_compiler_kernels_are_left_to_the_step(
    run: RunConfig, monkeypatch: pytest.MonkeyPatch, logged: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    def missing() -> None:
        raise ImportError("no triton")

    monkeypatch.setattr(rehearsal, "_is_gpu", lambda _: True)
    monkeypatch.setattr(rehearsal, "compiling_ahead", missing)
    rehearsal.rehearse(runs_of(run)[:2], 2, "cpu", tmp_path)
    assert "no triton" in logged.text
    assert "validation of 2 runs" in logged.text
