"""Methods compared over their seeds, each at the settings that the validation part chose."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rayft.data.section import DataConfig
from rayft.evaluate.compare import over_seeds
from rayft.flow.method_scores import method_scores
from rayft.flow.scoring import Measured
from rayft.methods.base import MethodConfig
from rayft.sweep.space import Point
from rayft.sweep.tuner import Trial
from rayft.train.run import OptimConfig, RunConfig

QUESTIONS = 40


def plan(select_by: str = "val_loss") -> Any:
    return SimpleNamespace(config=SimpleNamespace(sweep=SimpleNamespace(select_by=select_by)))


def trial(method: str, lr: float, seed: int, loss: float, *, finished: bool = True) -> Trial:
    run = RunConfig(
        data=DataConfig(source="jsonl", name="rows.jsonl"),
        method=MethodConfig(name=method),
        optim=OptimConfig(lr=lr, steps=8),
        seed=seed,
    )
    name = f"{method}-lr{lr:g}-s{seed}"
    return Trial(Point(key=name, name=name, run=run), {"val_loss": loss, "finished": finished})


def answers(share: float, seed: int) -> list[float]:
    return (np.random.default_rng(seed).random(QUESTIONS) < share).astype(float).tolist()


@pytest.fixture
def trials() -> list[Trial]:
    return [
        *(trial("lora", 1e-3, seed, 0.5) for seed in (0, 1, 2)),
        # Better on its best seed, worse on the whole.
        trial("lora", 1e-2, 0, 0.1), *(trial("lora", 1e-2, seed, 0.9) for seed in (1, 2)),
        *(trial("cla", 1e-3, seed, 0.4) for seed in (0, 1, 2)),
        # The best of all, of which one seed alone has finished.
        trial("cla", 1e-2, 0, 0.01), trial("cla", 1e-2, 1, 0.01, finished=False),
        trial("rac", 1e-3, 0, 0.3, finished=False),
    ]  # fmt: skip


@pytest.fixture
def scores(trials: list[Trial]) -> dict[str, Measured]:
    found = {}
    for number, one in enumerate(trials):
        share = 0.9 if one.point.run.method.name == "cla" else 0.3
        found[one.point.name] = Measured({"val": answers(0.5, 99 - number), "test": answers(share, number)})
    return found


def test_methods_stand_at_their_chosen_settings(trials: list[Trial], scores: dict[str, Measured]) -> None:
    cla, lora = method_scores(plan(), trials, scores)
    assert (cla.method, cla.settings, cla.tried) == ("cla", "cla-lr0.001", 2)
    assert (lora.method, lora.settings, lora.tried) == ("lora", "lora-lr0.001", 2)
    assert cla.trials == ("cla-lr0.001-s0", "cla-lr0.001-s1", "cla-lr0.001-s2")
    assert (lora.val_loss, lora.against, lora.difference) == (0.5, None, None)
    assert cla.against == "lora"

    one, other = (np.array([scores[name].parts["test"] for name in row.trials]) for row in (cla, lora))
    assert cla.test.value == one.mean()
    assert cla.test.n == QUESTIONS
    expected = over_seeds([one], [other])
    assert cla.difference is not None
    assert (cla.difference.value, cla.difference.low, cla.difference.high) == (
        expected.value, expected.ci_low, expected.ci_high,
    )  # fmt: skip
    assert cla.difference.low > 0


def test_by_the_validation_score_where_the_sweep_chooses_by_it(
    trials: list[Trial], scores: dict[str, Measured]
) -> None:
    for seed in range(3):
        name = f"lora-lr0.01-s{seed}"
        scores[name] = Measured({"val": [1.0] * 9, "test": scores[name].parts["test"]})
    first, second = method_scores(plan("val_score"), trials, scores)
    assert (first.method, first.settings) == ("lora", "lora-lr0.01")
    assert second.against == "lora"


def test_without_lora_the_best_is_what_others_are_compared_with(
    trials: list[Trial], scores: dict[str, Measured]
) -> None:
    others = [one for one in trials if one.point.run.method.name == "cla"]
    others += [trial("asym", 1e-3, 0, float("nan"))]
    scores["asym-lr0.001-s0"] = Measured({"test": answers(0.2, 3)})
    cla, asym = method_scores(plan(), others, scores)
    assert (cla.method, cla.against) == ("cla", None)
    assert (asym.method, asym.against) == ("asym", "cla")


def test_one_method_is_no_comparison(trials: list[Trial], scores: dict[str, Measured]) -> None:
    assert method_scores(plan(), [one for one in trials if "cla" in one.point.name], scores) == ()
    assert method_scores(plan(), trials, {}) == (), "none was scored"
