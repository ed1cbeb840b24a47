"""A killed run continues with the same result; a stopped run keeps what it has trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rayft.artifacts import AdapterArtifact
from rayft.squeeze.anneal import AnnealConfig
from rayft.train.run import RunConfig
from rayft.train.session import Session
from rayft.train.trainer import Reporter, Trainer
from rayft.train.worker import Worker
from tests.reporter import RecordingReporter
from tests.unit.train.runs import CHAINS, DieAt, StopAt, by_family, changed, with_method

NO_CHAINS = ("asym", "cla", "lora", "lora_plus", "paca", "rcla")


def by_step(run: RunConfig, name: str, **sections: object) -> RunConfig:
    """Return a run of nine steps; a chain has three links of three steps."""
    return with_method(run, name, optim={"steps": 9}, evaluate={"every": None}, **sections)


def assert_resumes(
    run: RunConfig, folder: Path, deaths: tuple[int, ...], session: Session | None = None
) -> None:
    """Kill a run after each of some steps, and compare its result with that of an uninterrupted run."""
    one = Trainer(run, session or Session.open(run, Worker()), Reporter(), folder / "whole", deaths).fit()
    for step in deaths:
        with pytest.raises(KeyboardInterrupt):
            Trainer(run, session or Session.open(run, Worker()), DieAt(step), folder / "cut", deaths).fit()
        assert (
            json.loads((folder / "cut" / "checkpoint" / f"step-{step:06d}" / "state.json").read_text())[
                "step"
            ]
            == step
        )
    reporter = RecordingReporter()
    other = Trainer(run, session or Session.open(run, Worker()), reporter, folder / "cut", deaths).fit()
    assert [step for step, _ in reporter.logged] == list(range(deaths[-1] + 1, 10))
    assert one.train_curve == other.train_curve
    assert one.val_curve == other.val_curve
    assert one.content_hash == other.content_hash
    assert (one.trainable, one.parameters) == (other.trainable, other.parameters)


@pytest.mark.parametrize("name", by_family(CHAINS))
def test_a_chain_resumes_wherever_it_was_killed(
    run: RunConfig, session: Session, tmp_path: Path, name: str
) -> None:
    # Inside the first link, at its end, inside the second link, at its end.
    assert_resumes(by_step(run, name), tmp_path, (2, 3, 5, 6), session)


@pytest.mark.parametrize("name", by_family(NO_CHAINS))
def test_methods_that_are_no_chains_resume(
    run: RunConfig, session: Session, tmp_path: Path, name: str
) -> None:
    assert_resumes(by_step(run, name), tmp_path, (5,), session)


@pytest.mark.parametrize("name", by_family(["cola", "rc3la", "lora_plus", "paca"], ["rc3la", "paca"]))
def test_a_bfloat16_run_resumes_with_its_float32_weights(run: RunConfig, tmp_path: Path, name: str) -> None:
    run = by_step(run, name, scale={"dtype": "bfloat16", "zero": 2})
    assert_resumes(run, tmp_path, (5, 6), Session.open(run, Worker()))


@pytest.mark.parametrize("name", by_family(["rac", "c3la"], ["c3la"]))
def test_a_chain_resumes_under_zero_3(run: RunConfig, tmp_path: Path, name: str) -> None:
    assert_resumes(by_step(run, name, scale={"zero": 3}), tmp_path, (5, 6))


@pytest.mark.parametrize(
    ("name", "scale", "deaths"),
    [
        # At the end of the first phase, inside the second phase, at its end.
        ("lora", {}, (3, 5, 6)),
        ("lora_plus", {"dtype": "bfloat16", "zero": 2}, (3, 5)),
    ],
)
def test_an_annealed_run_resumes_wherever_it_was_killed(
    run: RunConfig, tmp_path: Path, name: str, scale: dict[str, object], deaths: tuple[int, ...]
) -> None:
    run = changed(
        by_step(run, name, scale=scale),
        method={"rank": 8, "rank_pattern": {"k_proj": 3}},
        anneal=AnnealConfig(rank=2),
    )
    assert_resumes(run, tmp_path, deaths, Session.open(run, Worker()))


def test_a_run_with_dropout_resumes(run: RunConfig, session: Session, tmp_path: Path) -> None:
    run = by_step(run, "c3la")
    assert_resumes(changed(run, method={"dropout": 0.5}), tmp_path, (5,), session)


@pytest.mark.parametrize("name", by_family(CHAINS))
@pytest.mark.parametrize(("step", "links"), [(3, 1), (5, 2)])
def test_a_stopped_chain_saves_its_trained_links(
    run: RunConfig, session: Session, tmp_path: Path, name: str, step: int, links: int
) -> None:
    run = by_step(run, name)
    result = Trainer(run, session, StopAt(step), tmp_path, (step,)).fit()
    assert not result.finished
    assert result.steps == step
    artifact = AdapterArtifact.load(result.folder)
    assert {factors.rank for factors in artifact.modules.values()} == {4 * links}
    assert all(torch.isfinite(factors.b).all() for factors in artifact.modules.values())
    assert all(part.any() for factors in artifact.modules.values() for part in factors.b.split(4, 1))
