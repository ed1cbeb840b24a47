"""The right trial wins, the right adapter ships, the right ones are served, at the settings that compare."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayft.data.section import DataConfig
from rayft.flow.scoring import Measured
from rayft.flow.selection import (
    best_first,
    candidates,
    choose,
    chosen_settings,
    served_adapters,
    why_not_served,
)
from rayft.flow.squeeze.make import Source, SqueezedAdapter
from rayft.methods.base import MethodConfig
from rayft.report.record import Squeezed, SweepRecord, TrialRecord, Winner
from rayft.sweep.search import Trial
from rayft.sweep.space import Point
from rayft.train.run import OptimConfig, RunConfig
from rayft.train.trainer import TrainResult

QUESTIONS = 40


def trial(method: str, lr: float, seed: int, loss: float, *, finished: bool = True) -> Trial:
    run = RunConfig(
        data=DataConfig(source="jsonl", name="rows.jsonl"),
        method=MethodConfig(name=method),
        optim=OptimConfig(lr=lr, steps=8),
        seed=seed,
    )
    name = f"{method}-lr{lr:g}-s{seed}"
    return Trial(Point(key=name, name=name, run=run), TrainResult(finished, 8, loss, []))


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


def test_methods_are_compared_at_the_settings_that_validate_best(
    trials: list[Trial], scores: dict[str, Measured]
) -> None:
    chosen = chosen_settings(trials, scores, "val_loss")
    assert [(one.method, one.tried) for one in chosen] == [("cla", 2), ("lora", 2)]
    assert [trial.point.name for trial in chosen[0].trials] == [f"cla-lr0.001-s{seed}" for seed in range(3)]
    assert [trial.point.name for trial in chosen[1].trials] == [f"lora-lr0.001-s{seed}" for seed in range(3)]


def test_settings_are_chosen_by_the_validation_score_if_the_sweep_says_so(
    trials: list[Trial], scores: dict[str, Measured]
) -> None:
    for seed in range(3):
        name = f"lora-lr0.01-s{seed}"
        scores[name] = Measured({"val": [1.0] * 9, "test": scores[name].parts["test"]})
    first, second = chosen_settings(trials, scores, "val_score")
    assert (first.method, first.trials[0].point.run.optim.lr) == ("lora", 1e-2)
    assert second.method == "cla"


def test_a_trial_that_is_not_finished_or_not_scored_does_not_count(
    trials: list[Trial], scores: dict[str, Measured]
) -> None:
    assert "rac" not in {one.method for one in chosen_settings(trials, scores, "val_loss")}
    assert chosen_settings(trials, {}, "val_loss") == []


def named(name: str, loss: float, *, method: str = "lora", finished: bool = True) -> Trial:
    one = trial(method, 1e-3, 0, loss, finished=finished)
    assert one.result is not None
    return Trial(replace(one.point, key=name, name=name), replace(one.result, folder=f"trials/{name}"))


@pytest.mark.parametrize(
    ("rule", "order"), [("val_loss", ["early", "b", "a", "c"]), ("val_score", ["c", "b", "a", "early"])]
)
def test_the_winner_is_the_best_by_the_rule_of_the_sweep(rule: Any, order: list[str]) -> None:
    # A loss that is not a number is the worst; the same score is decided by the loss.
    losses, scored = {"a": 0.5, "b": 0.4, "c": math.nan}, {"a": 0.25, "b": 0.25, "c": 1.0}
    every = [*(named(*item) for item in losses.items()), named("stopped", 0.4, finished=False)]
    # One that was stopped can win only if it is better than all that have finished.
    every.append(named("early", 0.3, finished=False))
    scores = {name: Measured({"val": [score]}) for name, score in scored.items()}
    assert [one.point.name for one in candidates(every)] == ["a", "b", "c", "early"]
    assert [one.point.name for one in best_first(every, scores, rule)] == order


def lower(source: Trial, rank: int, *, how: Any = "post") -> SqueezedAdapter:
    label = f"r{rank}" if how == "post" else f"r{rank}+5"
    name = source.point.name
    return SqueezedAdapter(
        name=f"{name}@{label}", source=Source(name, name, source.point.run), how=how, rank=rank,
        folder=Path(f"squeezed/{label}"), parameters=rank, bytes=rank, energy={}, seconds=0.0,
    )  # fmt: skip


def test_the_smallest_version_that_keeps_the_score_ships() -> None:
    winner = named("w", 0.5)
    made = [lower(winner, rank) for rank in (4, 2, 1)]
    reached = {"w": 0.8, "w@r4": 0.9, "w@r2": 0.72, "w@r1": 0.71}
    scores = {name: Measured({"val": [score]}) for name, score in reached.items()}
    chosen = choose(winner, made, scores, "val_loss", keep=0.9)
    assert chosen is not None
    assert (chosen.trial, chosen.ship) == ("w", "w@r2")
    assert chosen.why.startswith("the smallest version of w that keeps 90 % of its validation score; w has ")
    kept = choose(winner, made, scores, "val_loss", keep=2.0)
    assert kept is not None
    assert (kept.ship, kept.why) == ("w", "best val loss of all trials")
    assert choose(None, made, scores, "val_loss", keep=0.9) is None


def test_a_squeezed_version_that_could_not_be_scored_is_not_shipped() -> None:
    winner = named("w", 0.5)
    scores = {"w": Measured({"val": [0.8]}), "w@r2": Measured(error="damaged")}
    chosen = choose(winner, [lower(winner, 2)], scores, "val_loss", keep=0.0)
    assert chosen is not None
    assert chosen.ship == "w"


@pytest.mark.parametrize("extracted", [False, True])
def test_the_reason_explains_what_happens_to_a_winner_without_factors(extracted: bool) -> None:
    winner, other = named("f", 0.3, method="full"), named("l", 0.5)
    made = [lower(winner, 2)] if extracted else []
    scores = {"f": Measured({"val": [0.8]}), "f@r2": Measured({"val": [0.1]})}
    chosen = choose(winner, made, scores, "val_score", keep=0.9)
    assert chosen is not None
    assert chosen.ship == "f"
    why = "from it is known to keep 90 %" if extracted else "neither squeezed nor registered"
    assert why in chosen.why
    said = why_not_served(winner, [winner, other], extracted=extracted)
    assert "f is a whole model: it is saved in trials/f" in said
    assert said.endswith("the best one that can is l in trials/l")


def record(tmp_path: Path, rule: Any = "val_loss", ship: str = "w", winner: str = "lora") -> SweepRecord:
    """A sweep's record: a winner with a squeezed rank and one that was trained further, and three others."""
    folder = str(tmp_path)

    def one(name: str, method: str, loss: float, score: float, status: Any = "finished") -> TrialRecord:
        return TrialRecord(
            id=name, method=method, rank=2, alpha=4.0, lr=1e-3, seed=0, status=status,
            val_loss=((1, 9.0), (2, loss)), val_score=score, folder=f"{folder}/{name}",
        )  # fmt: skip

    return SweepRecord(
        name="sums", question="?", date="2026-01-01", model="base", task="sums", data_digest="0", seed=0,
        device="cpu", select_by=rule, winner=Winner(trial="w", ship=ship, why=""),
        trials=(
            one("w", winner, 0.1, 0.9), one("c1", "cla", 0.3, 0.8), one("c2", "cla", 0.4, 0.85),
            one("a", "asym", 0.01, 1.0, "stopped"),
        ),
        squeezed=(
            Squeezed(name="w@r1", trial="w", rank=1, energy_mean=1.0, energy_min=1.0, folder=f"{folder}/r1"),
            Squeezed(
                name="w@r1+5", trial="w", how="cont", rank=1, energy_mean=1.0, energy_min=1.0,
                folder=f"{folder}/r1+5",
            ),
        ),
    )  # fmt: skip


def served(found: SweepRecord, output: Path) -> list[tuple[str, str, str, str, bool]]:
    return [
        (item.name, item.folder.name, item.registered, item.scored, item.shipped)
        for item in served_adapters(output, found)
    ]


@pytest.mark.parametrize(("rule", "best"), [("val_loss", "c1"), ("val_score", "c2")])
def test_the_winner_and_the_best_of_each_other_method_are_served(
    tmp_path: Path, rule: Any, best: str
) -> None:
    (tmp_path / "winner").mkdir()
    for ship in ("w", "w@r1"):
        # A squeezed rank is a view of the winner.
        assert served(record(tmp_path, rule, ship), tmp_path) == [
            ("sums", "winner", "sums", "w", True),
            ("sums-cla", best, "sums-cla", best, False),
        ]


def test_an_adapter_that_was_trained_further_is_served_beside_the_winner(tmp_path: Path) -> None:
    (tmp_path / "winner").mkdir()
    assert served(record(tmp_path, ship="w@r1+5"), tmp_path)[:2] == [
        ("sums", "winner", "sums-lora", "w", False),
        ("sums-r1-cont5", "r1+5", "sums", "w@r1+5", True),
    ]


def test_a_winner_without_factors_is_served_as_what_was_extracted_from_it(tmp_path: Path) -> None:
    (tmp_path / "r1").mkdir()
    shipped = record(tmp_path, ship="w@r1", winner="full")
    assert served(shipped, tmp_path)[0] == ("sums", "r1", "sums", "w@r1", True)
    assert served(record(tmp_path, winner="full"), tmp_path) == []


def test_nothing_is_served_without_a_winner_or_its_folder(tmp_path: Path) -> None:
    found = record(tmp_path)
    assert served(found, tmp_path) == []
    assert served(found.model_copy(update={"winner": None}), tmp_path) == []
