"""Captured passes give the gradients of others; a replay here computes what was captured."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from rayft.train import graphs
from rayft.train import trainer as module
from rayft.train.flat import Part
from rayft.train.packed import Courses, Pack
from rayft.train.run import RunConfig
from rayft.train.session import Session
from rayft.train.trainer import Reporter, Trainer, TrainResult
from rayft.train.worker import Worker
from tests.reporter import RecordingReporter
from tests.unit.train.curves import assert_same_losses
from tests.unit.train.runs import play, with_method


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The passes that were replayed: the name of each one's function."""
    names: list[str] = []

    def capture(body: Any, _: Any) -> Callable[[], None]:
        body()
        passes = body.__self__
        _, kept = passes._moved

        def replay() -> None:
            names.append(body.__name__)
            with torch.enable_grad():
                body()
            # What a graph computes is always in the same memory.
            for former, new in zip(kept, passes._moved[1], strict=False):
                former.copy_(new)

        return replay

    monkeypatch.setattr(graphs, "_capture", capture)
    monkeypatch.setattr(module, "capture_stream", nullcontext)
    for name in ("synchronize", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    return names


@pytest.mark.parametrize(("name", "zero"), [("lora_plus", 2), ("rc3la", 0), ("full", 0)])
def test_a_run_by_graphs_learns_what_it_learns_without(
    run: RunConfig,
    session: Session,
    tmp_path: Path,
    replayed: list[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    zero: int,
) -> None:
    run = with_method(run, name, optim={"rows_per_step": 4}, scale={"zero": zero, "accumulation": 2})
    eager = Trainer(run, session, Reporter(), tmp_path / "eager").fit()
    if name == "full":
        session = Session.open(run, Worker())
    arrived: list[bool] = []
    real = Part.take_gradients

    def take_gradients(part: Part) -> None:
        arrived.append(part.arrived)
        real(part)

    monkeypatch.setattr(Part, "take_gradients", take_gradients)
    scale = run.scale.model_copy(update={"graphs": True})
    reporter = RecordingReporter()
    again = Trainer(run.model_copy(update={"scale": scale}), session, reporter, tmp_path / "graphs").fit()
    (note,) = reporter.notes
    assert re.match(
        "attention by segments of LlamaForCausalLM in float32 can't be .* mask of all pairs", note
    )
    assert replayed == ["_forward", "_backward"] * 2 * run.optim.steps
    assert all(arrived)
    assert bool(arrived) == (name != "full")
    assert_same_losses(eager, again)


@pytest.mark.parametrize(("late", "more"), [("", 0), ("lora_plus", 2)])
def test_packed_runs_by_graphs_learn_what_they_learn_without(
    run: RunConfig,
    session: Session,
    tmp_path: Path,
    replayed: list[str],
    monkeypatch: pytest.MonkeyPatch,
    late: str,
    more: int,
) -> None:
    """Also if the others go on while one of them waits for an answer, which takes more steps."""
    runs = {name: with_method(run, name, seed=seed) for seed, name in enumerate(("lora_plus", "rc3la"))}
    monkeypatch.setattr(module, "graphed", None)
    reporter = RecordingReporter()
    found: list[dict[str, TrainResult]] = []
    for captured in (False, True):
        pack = Pack(session, graphs=captured)
        courses = Courses[TrainResult](pack)
        for name, one in runs.items():
            trainer = Trainer(one, pack.session(), reporter, tmp_path / f"{name}-{captured}", pack=pack)
            courses.begin(name, trainer.course(), trainer.clock)
        play(courses, pack, late if captured else "")
        assert len(reporter.notes) == captured, "a mask of all pairs of tokens is told once, if it is taken"
        found.append(courses.ended())  # type: ignore[arg-type]
    assert replayed == ["_forward", "_backward"] * (run.optim.steps + more)
    for name in runs:
        assert_same_losses(found[0][name], found[1][name])
