"""Chains: which steps each link trains, how a link starts, and that earlier links stay unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rayft.artifacts import AdapterArtifact
from rayft.config import parse
from rayft.data.loader import RowStream
from rayft.errors import ConfigError
from rayft.methods import METHODS
from rayft.methods.base import AdapterLinear, ChainConfig, LayerShape, MethodConfig
from rayft.models.targets import linear_shapes
from rayft.train import trainer
from rayft.train.phases import link_steps
from rayft.train.run import RunConfig
from rayft.train.session import Session
from rayft.train.trainer import Trainer
from tests.reporter import RecordingReporter
from tests.unit.train.runs import CHAINS, by_family, changed, with_method


def by_epochs(run: RunConfig, links: int, epochs: int, **optim: object) -> RunConfig:
    method = MethodConfig(name="rac", rank=4, chain=ChainConfig(links=links, epochs=epochs))
    return changed(run, method=method, optim=optim)


def test_a_method_that_is_no_chain_has_one_link(run: RunConfig, session: Session) -> None:
    assert link_steps(run, session.row_stream(run)) == [(0, 6)]


def test_links_divide_the_steps_equally(run: RunConfig, session: Session) -> None:
    assert link_steps(with_method(run, "cola"), session.row_stream(run)) == [(0, 2), (2, 4), (4, 6)]
    assert link_steps(with_method(run, "cola", links=1), session.row_stream(run)) == [(0, 6)]


def test_links_by_epochs_begin_with_rows_of_their_own_epochs(run: RunConfig, session: Session) -> None:
    run = by_epochs(run, 3, 2, steps=30)
    schedule = session.row_stream(run)
    found = link_steps(run, schedule)
    # No row of a link's epochs may come before its first step.
    rows_per_epoch = [len(schedule.epoch(epoch)) for epoch in range(6)]
    first_rows = [sum(rows_per_epoch[: 2 * link]) for link in range(3)]
    assert [start for start, _ in found] == [-(-row // 2) for row in first_rows]
    assert [end for _, end in found] == [*(start for start, _ in found[1:]), 30]


def test_epochs_with_different_numbers_of_rows_are_counted_exactly(session: Session) -> None:
    # Examples pack into short rows differently in each order.
    schedule = RowStream(session.train, 260, 1, seed=3)
    counts = [schedule.first_step(epoch + 1) - schedule.first_step(epoch) for epoch in range(12)]
    assert len(set(counts)) > 1, "the data pack alike in every order; this test shows nothing"


def test_epochs_that_exceed_the_steps_are_refused_before_training(
    run: RunConfig, session: Session, tmp_path: Path
) -> None:
    before = {name: value.clone() for name, value in session.loaded.model.state_dict().items()}
    run = by_epochs(run, 3, 4)
    reporter = RecordingReporter()
    with pytest.raises(ConfigError, match=r"link 3 of 'rac' would begin at step \d+ of 6") as caught:
        Trainer(run, session, reporter, tmp_path).fit()
    assert not reporter.logged
    assert session.loaded.model.state_dict().keys() == before.keys()
    # The number of steps that the message recommends works.
    steps = int(str(caught.value).split("raise optim.steps to ")[1].split(",")[0])
    assert len(link_steps(by_epochs(run, 3, 4, steps=steps), session.row_stream(run))) == 3


def test_a_link_shorter_than_a_step_is_refused(run: RunConfig, session: Session) -> None:
    run = by_epochs(run, 3, 1, rows_per_step=64)
    with pytest.raises(
        ConfigError, match="less than one step of 64 rows, so a link of 'rac' would not train"
    ):
        link_steps(run, session.row_stream(run))


def test_a_link_by_epochs_that_ends_before_it_has_warmed_up_is_refused(
    run: RunConfig, session: Session
) -> None:
    rows = session.row_stream(run)
    shortest = min(end - first for first, end in link_steps(by_epochs(run, 2, 1, steps=12), rows))
    assert len(link_steps(by_epochs(run, 2, 1, steps=12, warmup=shortest), rows)) == 2
    with pytest.raises(
        ConfigError, match=rf"must be at most the {shortest} steps .* take {shortest} or less"
    ):
        link_steps(by_epochs(run, 2, 1, steps=12, warmup=shortest + 1), rows)


@pytest.mark.parametrize(
    ("links", "steps", "match"),
    [
        (4, 10, r"4 links \('c3la'\) doesn't divide optim.steps \(10\): take 5 links, or 8 steps"),
        (9, 4, r"9 links \('c3la'\) doesn't divide optim.steps \(4\): take 4 links, or 9 steps"),
    ],
)
def test_a_number_of_links_that_does_not_divide_the_steps_is_refused(
    links: int, steps: int, match: str
) -> None:
    rest = {"data": {"name": "needle_haystack", "train": 8, "val": 2, "test": 2}, "optim": {"steps": steps}}
    with pytest.raises(ConfigError, match=match):
        parse(RunConfig, {**rest, "method": {"name": "c3la", "chain": {"links": links}}})
    parse(RunConfig, {**rest, "method": {"name": "c3la", "chain": {"links": links, "epochs": 1}}})


class _Watch:
    """Records, before each step, the optimizer's moments and the earlier links."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
        self.moments: list[int] = []
        self.engines: set[int] = set()
        self.past: list[dict[str, torch.Tensor]] = []
        self._model, self._step = model, trainer.optimizer_step
        monkeypatch.setattr(trainer, "optimizer_step", self)

    def __call__(self, engine: Any, *args: Any) -> Any:
        states = engine.optimizer.state.values()
        self.moments.append(sum(int(state["step"]) > 0 for state in states if "step" in state))
        self.past.append(dict(self._past()))
        return self._step(engine, *args)

    def _past(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, layer in self._model.named_modules():
            if isinstance(layer, AdapterLinear) and layer.adapter is not None:
                rank = layer.adapter.lora_B.shape[1]
                factors = layer.adapter.to_lora()
                yield name, torch.cat([factors.b[:, :-rank].flatten(), factors.a[:-rank].flatten()])


@pytest.mark.parametrize("name", by_family(CHAINS))
def test_links_start_with_a_new_optimizer_and_stay_unchanged_afterwards(
    run: RunConfig, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run = with_method(run, name, optim={"steps": 9, "warmup": 2, "lr": 0.25e-2})
    watch, reporter = _Watch(monkeypatch, session.loaded.model), RecordingReporter()
    result = Trainer(run, session, reporter, tmp_path).fit()
    # The flat parameter has no moments before a link's first step, and has them before its second.
    assert watch.moments == [0, 1, 1] * 3
    # Each link has its own warm-up.
    assert [metrics["lr"] for _, metrics in reporter.logged] == [0.125e-2, 0.25e-2, 0.25e-2] * 3
    # Earlier links stay bitwise equal.
    for link in range(3):
        first, *others = watch.past[3 * link : 3 * link + 3]
        assert all(torch.equal(first[key], other[key]) for other in others for key in first)
        assert all(bool(value.any()) == (link > 0) for value in first.values())
    artifact = AdapterArtifact.load(result.folder)
    assert {factors.rank for factors in artifact.modules.values()} == {3 * 4}
    for module, factors in artifact.modules.items():
        assert all(part.any() for part in factors.b.split(4, 1)), "a link's B is still zero"
        saved = torch.cat([factors.b[:, :8].flatten(), factors.a[:8].flatten()])
        assert torch.equal(saved, watch.past[-1][module])
    shapes = [LayerShape(*shape) for shape in linear_shapes(session.loaded.model).values()]
    once = sum(METHODS[name].trained(shape, 4) for shape in shapes)
    assert result.trainable == once
    frozen_a = sum(3 * 4 * shape.inputs for shape in shapes) if name == "rac" else 0
    assert result.parameters == 3 * once + frozen_a == artifact.parameters


def test_links_by_epochs_warm_up_at_their_first_steps(
    run: RunConfig, session: Session, tmp_path: Path
) -> None:
    run = by_epochs(run, 2, 1, steps=12)
    reporter = RecordingReporter()
    result = Trainer(changed(run, optim={"warmup": 2}), session, reporter, tmp_path).fit()
    second = link_steps(run, session.row_stream(run))[1][0]
    rates = [metrics["lr"] for _, metrics in reporter.logged]
    assert [step for step, lr in enumerate(rates) if lr < run.optim.lr] == [0, second]
    assert AdapterArtifact.load(result.folder).rank == 2 * 4
