"""Measures are correlated over all runs, and again over each method's best settings alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayft.analysis.record import AdapterAnalysis, Gap
from rayft.analysis.section import AnalyzeConfig
from rayft.data.section import DataConfig
from rayft.flow.analyze.source import Item
from rayft.flow.analyze.summarize import known, summarize
from rayft.methods.section import MethodConfig
from rayft.models.load import ModelConfig
from rayft.train.run import OptimConfig, RunConfig
from tests.unit.report.example import example

RATES = (1e-4, 1e-3)


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
                item = Item(f"{name}-lr{rate:g}-s{seed}", run, Path("nowhere"), "")
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


def test_each_methods_best_settings_are_correlated_alone_too() -> None:
    items, found, losses = sweep(["lora", "cla", "asym"])
    config = AnalyzeConfig(parts=("gap",))
    chosen = {item.name for item in items if item.run.optim.lr == RATES[0]}
    summary = summarize(items, found, config, losses, chosen)
    assert {(one.n, one.groups) for one in summary.predictors} == {(12, 6)}
    assert {(one.n, one.groups) for one in summary.chosen} == {(6, 3)}
    assert summary.predictors[0].held_out == pytest.approx(1.0)
    assert [one.measure for one in summary.chosen] == ["update_norm"], "losses are the same at one rate"
    for few in (set(), {items[0].name, items[1].name}, set(losses)):
        beside = summarize(items, found, config, losses, few)
        assert len(beside.predictors) == len(summary.predictors)
        assert not beside.chosen, "none, too few, or all there are"


def test_a_sweep_gives_the_losses_of_its_trials_and_the_best_settings() -> None:
    record = example()
    losses, chosen = known(record)
    expected = {one.id: one.kept_val_loss for one in record.trials if one.kept_val_loss is not None}
    assert losses == pytest.approx(expected, nan_ok=True)
    assert chosen == {name for one in record.methods for name in one.trials}
