"""The record of a sweep shows its findings, and the commands that follow."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rayft.data.section import DataConfig, PartFiles
from rayft.evaluate.compare import over_seeds
from rayft.flow.config import load_config
from rayft.flow.scoring import Measured
from rayft.flow.sweep.preflight import Plan, preflight
from rayft.flow.sweep.record import Findings, build_record
from rayft.methods.base import ChainConfig, MethodConfig
from rayft.report.record import Score
from rayft.report.render import html
from rayft.squeeze.anneal import AnnealConfig
from rayft.sweep.search import Trial
from rayft.sweep.space import Point
from rayft.train.identity import identify
from rayft.train.run import OptimConfig, RunConfig
from rayft.train.trainer import TrainResult

RESULT = TrainResult(
    finished=True,
    steps=3,
    val_loss=1.0,
    rank=16,
    val_curve=[(3, 1.0)],
    train_curve=[(1, 2.0)],
    trainable=10,
    bytes=20,
    seconds={"train": 1.0, "evaluate": 0.5, "overhead": 0.1},
    peak_memory=30,
    folder="adapter",
)


QUESTIONS = 40


def of(method: str, seed: int, loss: float) -> Trial:
    run = RunConfig(
        data=DataConfig(source="jsonl", name="rows.jsonl"), method=MethodConfig(name=method), seed=seed
    )
    name = f"{method}-lr0.001-s{seed}"
    return Trial(Point(key=name, name=name, run=run), replace(RESULT, val_loss=loss))


@pytest.fixture(scope="module")
def plan(models: Path, server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Plan]:
    folder = tmp_path_factory.mktemp("plan")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYFT_CACHE", str(models))
        patch.setenv("MLFLOW_TRACKING_URI", server)
        yield preflight(load_config("tiny", [f"output={folder / 'out'}"]))


def findings(**shares: float) -> Findings:
    """Findings of three seeds of each method, which answer a share of the test questions; the first wins."""
    found = Findings(baselines={"base": Measured({"val": [0.0], "test": [0.0] * QUESTIONS})})
    for number, (method, share) in enumerate(shares.items()):
        for seed in range(3):
            trial = of(method, seed, 0.1 * number + 0.3)
            answers = np.random.default_rng(10 * number + seed).random(QUESTIONS) < share
            found.trials.append(trial)
            found.scores[trial.point.name] = Measured(
                {"val": [share], "test": answers.astype(float).tolist()}
            )
    found.winner = found.trials[0]
    return found


def test_methods_are_compared_over_seeds_and_questions(plan: Plan) -> None:
    found = findings(cla=0.9, lora=0.3)
    cla, lora = build_record(plan, found, {}).methods
    assert (cla.method, cla.settings, cla.tried) == ("cla", "cla-lr0.001", 1)
    assert cla.trials == ("cla-lr0.001-s0", "cla-lr0.001-s1", "cla-lr0.001-s2")
    assert (lora.val_loss, lora.against, lora.difference) == (pytest.approx(0.4), None, None)
    one, other = (np.array([found.scores[name].parts["test"] for name in row.trials]) for row in (cla, lora))
    assert (cla.test.value, cla.test.n) == (one.mean(), QUESTIONS)
    expected = over_seeds([one], [other])
    assert cla.against == "lora"
    assert cla.difference == Score(
        value=expected.value, low=expected.ci_low, high=expected.ci_high, n=QUESTIONS
    )
    assert cla.difference.low > 0


def test_a_record_says_which_step_a_trial_kept(plan: Plan) -> None:
    found = findings(lora=0.6)
    result = replace(RESULT, steps=6, val_curve=[(3, 1.0), (6, 2.0)], kept_step=3)
    found.trials[1] = replace(found.trials[1], result=result)
    _, best, last = build_record(plan, found, {}).trials
    assert (best.kept_step, best.kept_val_loss) == (3, 1.0)
    assert last.kept_step is None


def test_a_sampled_baseline_is_compared_on_the_questions_that_it_answered(plan: Plan) -> None:
    found = findings(lora=0.6, cla=0.4)
    name = found.trials[0].point.name
    asked = found.scores[name].parts["test"][::4]
    found.baselines["base"] = Measured({"val": [0.0], "test": [*asked]})
    record = build_record(plan, found, {})
    (same,) = [one for one in record.comparisons if (one.name, one.against) == (name, "base")]
    assert (same.difference.value, same.difference.n) == (0.0, 10)
    assert "The base answered 10 of the 40 questions." in html(record)
    assert "The base answered" not in html(build_record(plan, findings(lora=0.6), {}))


def test_without_lora_the_methods_are_compared_with_the_best(plan: Plan) -> None:
    cla, asym = build_record(plan, findings(cla=0.9, asym=0.2), {}).methods
    assert (cla.method, cla.against, asym.against) == ("cla", None, "cla")


def test_data_given_as_files_is_named_by_them(plan: Plan) -> None:
    data = DataConfig(source="jsonl", files=PartFiles(train="train.jsonl", test="test.jsonl"))
    run = plan.run.model_copy(update={"data": data})
    config = plan.config.model_copy(update={"data": data, "question": ""})
    now = replace(plan, config=config, run=run, identity=identify(run, plan.parts))
    record = build_record(now, findings(lora=0.6), {})
    assert record.task == "train.jsonl, test.jsonl (jsonl)"
    assert record.question == "Which adapter of tiny-llama is best at train.jsonl, test.jsonl?"


def test_a_single_method_is_not_compared(plan: Plan) -> None:
    assert build_record(plan, findings(cla=0.9), {}).methods == ()


@pytest.mark.parametrize("rule", ["val_loss", "val_score"])
def test_the_record_keeps_the_rule_of_the_sweep(plan: Plan, rule: str) -> None:
    config = plan.config.model_copy(
        update={"sweep": plan.config.sweep.model_copy(update={"select_by": rule})}
    )
    record = build_record(replace(plan, config=config), findings(cla=0.9), {})
    assert record.select_by == rule
    assert record.winner is not None
    assert f"best {rule.replace('_', ' ')}" in record.winner.why


def test_the_command_to_serve_is_shown_if_there_is_something_to_serve(plan: Plan) -> None:
    served = "Serve the result"
    assert served not in {one.what for one in build_record(plan, findings(cla=0.9), {}).commands}
    (plan.output / "winner").mkdir(parents=True)
    assert served in {one.what for one in build_record(plan, findings(cla=0.9), {}).commands}


@pytest.mark.parametrize(("finished", "rank"), [(True, 8), (False, 16)])
def test_an_annealed_trial_that_was_stopped_has_the_rank_it_had(
    plan: Plan, finished: bool, rank: int
) -> None:
    run = RunConfig(
        data=DataConfig(source="jsonl", name="rows.jsonl"),
        method=MethodConfig(rank=32),
        anneal=AnnealConfig(rank=8),
        optim=OptimConfig(steps=60),
    )
    point = Point(key="lora-r32to8-1", name="lora-r32to8", run=run)
    trial = Trial(point=point, result=replace(RESULT, finished=finished))
    assert build_record(plan, Findings(trials=[trial]), {}).trials[0].rank == rank


@pytest.mark.parametrize(("kept_step", "rank"), [(None, 24), (2, 16)])
def test_a_chain_that_kept_what_it_had_before_its_last_link_has_the_rank_of_that(
    plan: Plan, kept_step: int | None, rank: int
) -> None:
    run = RunConfig(
        data=DataConfig(source="jsonl", name="rows.jsonl"),
        method=MethodConfig(name="rac", rank=8, chain=ChainConfig(links=3)),
        optim=OptimConfig(steps=6),
    )
    result = replace(RESULT, val_curve=[(2, 1.0), (6, 2.0)], kept_step=kept_step, rank=rank)
    trial = Trial(Point(key="a", name="a", run=run), result)
    assert build_record(plan, Findings(trials=[trial]), {}).trials[0].rank == rank


def test_the_rank_of_a_stopped_trial_is_not_that_of_a_single_module(plan: Plan) -> None:
    run = RunConfig(
        data=DataConfig(source="jsonl", name="rows.jsonl"),
        method=MethodConfig(rank=4, rank_pattern={"q_proj": 16}),
    )
    trial = Trial(Point(key="a", name="a", run=run), replace(RESULT, finished=False))
    assert build_record(plan, Findings(trials=[trial]), {}).trials[0].rank == 4


@pytest.mark.parametrize(
    ("uri", "command"),
    [
        (
            f"sqlite:///{Path.cwd()}/runs/demo/mlflow.db",
            "mlflow ui --backend-store-uri sqlite:///runs/demo/mlflow.db",
        ),
        (
            "sqlite:////data/my runs/mlflow.db",
            "mlflow ui --backend-store-uri 'sqlite:////data/my runs/mlflow.db'",
        ),
        (
            "postgresql://me:secret@db/runs",
            "mlflow ui --backend-store-uri 'postgresql://me:***@db/runs'",
        ),
        ("http://tracking:5000", "python -m webbrowser http://tracking:5000"),
        ("databricks", ""),
    ],
)
def test_the_command_that_shows_the_runs_has_no_password(plan: Plan, uri: str, command: str) -> None:
    at = replace(plan, tracker=replace(plan.tracker, uri=uri))
    commands = {one.what: one.command for one in build_record(at, findings(cla=0.9), {}).commands}
    assert commands.get("Compare the runs", "") == command
    shown = "#/experiments/7/runs?viewStateShareKey=abc&workflowType=machine_learning"
    at = replace(at, tracker=replace(at.tracker, experiment_id="7"))
    commands = {one.what: one.command for one in build_record(at, findings(cla=0.9), {}, "abc").commands}
    if uri.startswith("http"):
        assert commands["Compare the runs"] == f"python -m webbrowser 'http://tracking:5000/{shown}'"
    elif command:
        assert commands["Compare the runs"] == command
        assert commands["  and open"] == f"http://127.0.0.1:5000/{shown}"
