"""What is correlated with what: over all runs, and over each method's best setting alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayft.analysis.record import AdapterAnalysis, Gap
from rayft.analysis.section import AnalyzeConfig
from rayft.data.section import DataConfig
from rayft.flow import analyze
from rayft.flow.analyze import summarize
from rayft.flow.analyze_source import Item
from rayft.methods.section import MethodConfig
from rayft.models.load import ModelConfig
from rayft.train.run import OptimConfig, RunConfig

RATES = (1e-4, 1e-3)


@pytest.fixture(autouse=True)
def _without_angles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analyze, "_angles", lambda items: {})


def sweep(methods: list[str]) -> tuple[list[Item], list[AdapterAnalysis], dict[str, float]]:
    items, found, losses = [], [], {}
    for number, name in enumerate(methods):
        for rate in RATES:
            for seed in (0, 1):
                run = RunConfig(
                    model=ModelConfig(name="m"),
                    data=DataConfig(name="chain_sum", train=9, val=9, test=9),
                    method=MethodConfig(name=name),
                    optim=OptimConfig(lr=rate),
                    seed=seed,
                )
                item = Item(f"{name}-lr{rate:g}-s{seed}", run, Path(), "")
                gap = 0.1 * number + 100 * rate + 0.01 * seed
                items.append(item)
                found.append(
                    AdapterAnalysis(
                        name=item.name, group=item.group, measures={"update_norm": gap},
                        gap=Gap(train=1.0, held_out=1.0 + gap, low=gap - 0.1, high=gap + 0.1, n=9),
                    )
                )  # fmt: skip
                losses[item.name] = 0.5 + rate
    return items, found, losses


def test_each_methods_best_setting_by_its_mean_validation_loss() -> None:
    items, found, _ = sweep(["lora", "cla", "asym"])
    losses = {item.name: 0.5 for item in items}
    losses["lora-lr0.001-s0"] = 0.1
    losses["lora-lr0.001-s1"] = 1.2
    losses["cla-lr0.0001-s0"] = losses["asym-lr0.0001-s1"] = 0.6
    best = analyze._best_settings(items, losses)
    groups = {item.name: item.group for item in items}
    assert best == {groups["lora-lr0.0001-s0"], groups["cla-lr0.001-s0"], groups["asym-lr0.001-s0"]}
    summary = summarize(items, found, AnalyzeConfig(parts=("gap",)), losses)
    assert {(one.n, one.groups) for one in summary.predictors} == {(12, 6)}
    assert {(one.n, one.groups) for one in summary.chosen} == {(6, 3)}
    assert summary.predictors[0].held_out == pytest.approx(1.0)


def test_without_a_choice_there_is_nothing_beside_it() -> None:
    items, found, losses = sweep(["lora", "cla"])
    one_rate = [i for i, item in enumerate(items) if item.run.optim.lr == RATES[0]]
    config = AnalyzeConfig(parts=("gap",))
    summary = summarize([items[i] for i in one_rate], [found[i] for i in one_rate], config, losses)
    assert summary.predictors
    assert not summary.chosen
    # An adapter from elsewhere has no validation loss: the first setting stands for its method.
    assert len(analyze._best_settings(items, {})) == 2
    few = summarize(items[:4], found[:4], config, losses)
    assert few.predictors
    assert not few.chosen, "two runs are too few"
