"""Compare all methods on real tasks: which is best at equal rank, and at equal stored parameters?

    python benchmarks/bench_methods_quality.py --prepare DATA         # writes the tasks of reasoning-gym as
    JSONL python benchmarks/bench_methods_quality.py --data DATA --out OUT  # trains and scores, or continues
    python benchmarks/bench_methods_quality.py --report               # writes results of finished trials

The base is SmolLM2-135M-Instruct, and the tasks are four of reasoning-gym. For each method, task and budget,
the learning rate is chosen on the validation part with one seed. Two more seeds are trained at that rate, and
all three are scored on the test part, as is the base without an adapter. The budgets are `equal_rank`, rank
16 (for a chain, of each of its 4 links), and `equal_params`, the rank at which the stored parameters of the
whole model (of all links) are nearest to those of LoRA at rank 16. Trials run in lanes, several on one GPU.
The result and the scores of each finished trial are saved in `results/methods_quality_trials.json`. An
interrupted run therefore continues where it stopped, also on another machine; a trial without its adapter and
test score is trained again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.records import RESULTS, record, save
from benchmarks.trials import TASKS, LaneRunner, TrialStore, device_kind, prepare, task_data
from rayft.evaluate.compare import over_seeds
from rayft.flow.cluster import cluster
from rayft.methods import METHODS
from rayft.methods.base import Chain, ChainConfig, LayerShape, MethodConfig
from rayft.models.load import ModelConfig, load_skeleton
from rayft.models.targets import linear_shapes
from rayft.train.run import EvaluateConfig, OptimConfig, RunConfig, ScaleConfig

MODEL = "smollm2-135m-instruct"
RANK, LINKS, SEEDS = 16, 4, (0, 1, 2)
TRIALS = RESULTS / "methods_quality_trials.json"
"""File of all trials: the result of training, and the scores."""
LR = {
    "full": (2e-5, 6e-5, 2e-4),
    "lora": (5e-4, 1.5e-3, 4e-3),
    "lora_plus": (1e-4, 3e-4, 1e-3),
    "cola": (5e-4, 1.5e-3, 4e-3),
    "asym": (1e-3, 3e-3, 1e-2),
    "rac": (1e-3, 3e-3, 1e-2),
    "paca": (1e-3, 3e-3, 1e-2),
    "cla": (5e-4, 1.5e-3, 5e-3),
    "rcla": (5e-4, 1.5e-3, 5e-3),
    "c3la": (5e-4, 1.5e-3, 5e-3),
    "rc3la": (5e-4, 1.5e-3, 5e-3),
}
"""Learning rates to try, about a factor of three apart. Those of paca are twice those of cla, since s = 2.

If the lowest or the highest is the best, one rate beyond it is tried too.
"""


@dataclass(frozen=True)
class Setting:
    """A method with a rank on a task."""

    method: str
    task: str
    budget: str
    rank: int


@dataclass(frozen=True)
class Scale:
    """How much to run, and on which device."""

    steps: int
    lanes: int
    lrs: int
    device: Literal["cpu", "cuda"]
    name: str
    """Name of the device in results."""
    commit: str | None
    model: str
    data: Path
    out: Path
    trials: Path


def settings(scale: Scale, tasks: Sequence[str], names: Sequence[str]) -> list[Setting]:
    """Return the settings to compare: each method at both budgets, or once if both have the same rank."""
    shapes = linear_shapes(load_skeleton(ModelConfig(name=scale.model)))
    layers = [LayerShape(*shape) for shape in shapes.values()]
    # Methods that change the base come last, since a lane loads the base again after them.
    names = sorted(names, key=lambda name: name == "full")
    near = {name: matching_rank(name, layers) for name in names if name != "full"}
    found = []
    for task in tasks:
        for name in names:
            found.append(Setting(name, task, "equal_rank", RANK))
            if near.get(name, RANK) != RANK:
                found.append(Setting(name, task, "equal_params", near[name]))
    return found


def matching_rank(name: str, layers: Sequence[LayerShape]) -> int:
    """Return the rank at which a method stores nearly as many parameters as LoRA at rank `RANK`."""
    target = stored("lora", RANK, layers)
    ranks = range(1, min(METHODS[name].max_rank(layer) for layer in layers) + 1)
    return min(ranks, key=lambda rank: abs(stored(name, rank, layers) - target))


def stored(name: str, rank: int, layers: Sequence[LayerShape]) -> int:
    """Return the number of parameters that an adapter stores over the whole model."""
    links = LINKS if isinstance(METHODS[name], Chain) else 1
    return sum(METHODS[name].stored(layer, rank, links) for layer in layers)


def make_run(setting: Setting, lr: float, seed: int, scale: Scale) -> RunConfig:
    """Return the run of a setting."""
    chain = ChainConfig(links=LINKS) if isinstance(METHODS[setting.method], Chain) else None
    gpu = scale.device == "cuda"
    return RunConfig(
        model=ModelConfig(name=scale.model),
        data=task_data(scale.data, setting.task),
        method=MethodConfig(name=setting.method, rank=setting.rank, chain=chain),
        optim=OptimConfig(
            lr=lr, steps=scale.steps, rows_per_step=2 if gpu else 1, warmup=2, schedule="linear"
        ),
        scale=ScaleConfig(
            device=scale.device, dtype="bfloat16", zero=2, threads=1,
            graphs=gpu, gpu_share=1 / scale.lanes if gpu else 1.0,
        ),
        evaluate=EvaluateConfig(checkpoint_seconds=3600, max_new_tokens=24, batch_size=200, val_examples=50),
        seed=seed,
    )  # fmt: skip


class Trials:
    """Results of finished trials, by setting, learning rate and seed."""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self.store = TrialStore(scale.trials, scale.name)

    def key(self, setting: Setting, lr: float, seed: int) -> str:
        """Return the name of a trial, which depends only on its settings."""
        trial = f"{setting.method}-r{setting.rank}-lr{lr:g}-s{seed}-n{self.scale.steps}"
        return f"{self._model()}/{setting.task}/{trial}"

    def best_lr(self, setting: Setting) -> float | None:
        """Return the learning rate with the best validation score, or the lower loss if scores are equal."""
        found = []
        for lr in (*self.grid(setting), *self.beyond(setting)):
            key = self.key(setting, lr, SEEDS[0])
            values, result = self.store.score(key, "val"), self.store.result(key)
            if values and result:
                found.append((sum(values) / len(values), -result["val_loss"], lr))
        return max(found)[2] if found else None

    def grid(self, setting: Setting) -> tuple[float, ...]:
        """Return the learning rates to try first."""
        return LR[setting.method][: self.scale.lrs]

    def beyond(self, setting: Setting) -> tuple[float, float]:
        """Return the rates beyond the grid: a third of the lowest, and three times the highest."""
        grid = self.grid(setting)
        return float(f"{grid[0] / 3:.1g}"), float(f"{grid[-1] * 3:.2g}")

    def base_key(self, task: str) -> str:
        """Return the name of the scores of the base on a task."""
        return f"{self._model()}/{task}/base"

    def matrix(self, setting: Setting) -> np.ndarray[Any, np.dtype[np.float64]] | None:
        """Return the test scores at the best learning rate, (seeds, questions); None if some are missing."""
        lr = self.best_lr(setting)
        scores = [self.store.score(self.key(setting, lr, seed), "test") for seed in SEEDS] if lr else []
        return np.array(scores) if scores and all(scores) else None

    def _model(self) -> str:
        return Path(self.scale.model).stem.lower().partition("-")[0]


class Bench(Trials):
    """Trains and scores in lanes, and saves the results."""

    def __init__(self, scale: Scale) -> None:
        super().__init__(scale)
        run = make_run(Setting("lora", next(iter(TASKS)), "equal_rank", RANK), 1e-3, 0, scale)
        self.runner = LaneRunner(self.store, run.scale, scale.out, scale.lanes, "quality", scale.commit)

    def train(self, wanted: Sequence[tuple[Setting, float, int]], part: str) -> None:
        """Train the trials that are missing, and score them on a part."""
        self.runner.train({self.key(*trial): make_run(*trial, self.scale) for trial in wanted}, part)

    def score_bases(self, tasks: Sequence[str]) -> None:
        """Score the base without an adapter on the test parts of the tasks."""
        runs = {
            task: make_run(Setting("lora", task, "equal_rank", RANK), 1e-3, 0, self.scale) for task in tasks
        }
        self.runner.score({self.base_key(task): (run, None) for task, run in runs.items()}, "test")


def run_all(bench: Bench, wanted: Sequence[Setting], deadline: float) -> None:
    """Run each task: all learning rates with the first seed, then the other seeds at the best rate."""
    tasks = list(dict.fromkeys(setting.task for setting in wanted))
    bench.score_bases(tasks)
    for task in tasks:
        mine = [setting for setting in wanted if setting.task == task]
        if bench.runner.spent > deadline:
            print(f"no time is left for {task}", flush=True)
            return
        bench.train([(setting, lr, SEEDS[0]) for setting in mine for lr in bench.grid(setting)], "val")
        edges = [(setting, edge) for setting in mine for edge in _edge(bench, setting)]
        bench.train([(setting, lr, SEEDS[0]) for setting, lr in edges], "val")
        best = [(setting, bench.best_lr(setting)) for setting in mine]
        bench.train([(setting, lr, seed) for setting, lr in best if lr for seed in SEEDS], "test")
        for setting, lr in best:
            values = [bench.store.score(bench.key(setting, lr, seed), "test") for seed in SEEDS if lr]
            means = " ".join(f"{sum(v) / len(v):.2f}" for v in values if v)
            print(
                f"{setting.method:10} {task:20} {setting.budget:13} r{setting.rank:<3} lr {lr} {means}",
                flush=True,
            )


def _edge(bench: Trials, setting: Setting) -> list[float]:
    """Return the learning rate beyond the grid to try, if the best one is at the end of the grid."""
    best, grid, (below, above) = bench.best_lr(setting), bench.grid(setting), bench.beyond(setting)
    return [beyond for end, beyond in ((grid[0], below), (grid[-1], above)) if best == end]


def records(trials: Trials, wanted: Sequence[Setting]) -> list[dict[str, Any]]:
    """Return the results of trials: for each method, task and budget, then over tasks and against LoRA."""
    shapes = linear_shapes(load_skeleton(ModelConfig(name=trials.scale.model)))
    layers = [LayerShape(*shape) for shape in shapes.values()]
    rows, matrices = [], {}
    for setting in wanted:
        scores, lr = trials.matrix(setting), trials.best_lr(setting)
        if scores is None or lr is None:
            continue
        for budget in _budgets(setting):
            matrices[setting.method, budget, setting.task] = scores
            rows += _records_of(trials, setting, budget, lr, scores, layers)
    for task in dict.fromkeys(setting.task for setting in wanted):
        base = trials.store.score(trials.base_key(task), "test")
        if base:
            found = over_seeds([np.array([base])])
            case = f"base/{task}/equal_rank"
            row = record("methods_quality", case, "score", found.value, "share", ci_low=found.ci_low,
                         ci_high=found.ci_high, n=len(base))  # fmt: skip
            rows.append({**row, **trials.store.origin([trials.base_key(task)])})
    return rows + _over_tasks(trials, matrices)


def _budgets(setting: Setting) -> list[str]:
    """Return the tables that a setting is in. LoRA at rank 16 is the reference of both, so it is in both."""
    same = setting.budget == "equal_rank" and setting.rank == RANK and setting.method in ("lora", "lora_plus")
    return [setting.budget, *(["equal_params"] if same else [])]


def _records_of(
    trials: Trials, setting: Setting, budget: str, lr: float, scores: Any, layers: Sequence[LayerShape]
) -> list[dict[str, Any]]:
    keys = [trials.key(setting, lr, seed) for seed in SEEDS]
    results = [result for key in keys if (result := trials.store.result(key))]
    found = over_seeds([scores])
    count = (
        results[0]["trainable"] if setting.method == "full"
        else stored(setting.method, setting.rank, layers)
    )  # fmt: skip
    known = {"seeds": list(SEEDS), "lr": lr, "n": scores.shape[1]}
    case = f"{setting.method}/{setting.task}/{budget}"
    bounds = {"ci_low": found.ci_low, "ci_high": found.ci_high}
    rows = [record("methods_quality", case, "score", found.value, "share", **bounds, **known)]
    for metric, value, unit in (
        ("trainable", count, "numbers"), ("rank", setting.rank, ""),
        ("seconds", sorted(result["seconds"]["train"] for result in results)[len(results) // 2], "s"),
        ("gib", min(result["peak_memory"] for result in results) / 2**30, "GiB"),
    ):  # fmt: skip
        rows.append(record("methods_quality", case, metric, value, unit, **known))
    # The commit and versions of the trials, which may be older than this run.
    return [{**row, **trials.store.origin(keys)} for row in rows]


def _over_tasks(trials: Trials, matrices: dict[tuple[str, str, str], Any]) -> list[dict[str, Any]]:
    """Average each method over the tasks that all methods have finished, and compare it with LoRA."""
    rows, origin = [], trials.store.origin(trials.store.known)
    names = list(dict.fromkeys((name, budget) for name, budget, _ in matrices))
    tasks = [
        task
        for task in dict.fromkeys(task for _, _, task in matrices)
        if all((*name, task) in matrices for name in names)
    ]
    for name, budget in names if tasks else ():
        mine, lora = ([matrices[who, budget, task] for task in tasks] for who in (name, "lora"))
        known = {"seeds": list(SEEDS), "n": sum(one.shape[1] for one in mine)}
        for metric, found in (("score", over_seeds(mine)), ("over_lora", over_seeds(mine, lora))):
            bounds = {"ci_low": found.ci_low, "ci_high": found.ci_high}
            case = f"{name}/mean/{budget}"
            row = record("methods_quality", case, metric, found.value, "share", **bounds, **known)
            rows.append({**row, **origin})
    return rows


def report(arguments: argparse.Namespace) -> None:
    """Write the results of all saved trials, including those of earlier runs."""
    scale = Scale(
        arguments.steps, arguments.lanes, arguments.lrs, "cpu", device_kind(arguments.trials), None,
        arguments.model, Path(), Path(), arguments.trials,
    )  # fmt: skip
    save("methods_quality", records(Trials(scale), settings(scale, list(TASKS), list(METHODS))), anew=True)


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prepare", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/methods_quality"))
    parser.add_argument("--trials", type=Path, default=TRIALS)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lanes", type=int, default=4)
    parser.add_argument("--lrs", type=int, default=3)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="start no task after this many seconds"
    )
    parser.add_argument("--commit")
    parser.add_argument("--report", action="store_true", help="write the results of finished trials")
    arguments = parser.parse_args()
    if arguments.report:
        report(arguments)
        return
    if arguments.prepare:
        prepare(arguments.prepare)
        return
    cuda = torch.cuda.is_available()
    device = f"1x {torch.cuda.get_device_name()}" if cuda else "cpu"
    scale = Scale(
        arguments.steps, arguments.lanes, arguments.lrs, "cuda" if cuda else "cpu", device, arguments.commit,
        arguments.model, arguments.data, arguments.out, arguments.trials,
    )  # fmt: skip
    wanted = settings(scale, arguments.tasks.split(","), arguments.methods.split(","))
    with cluster(scale.lanes, device=scale.device, gpu_share=1 / scale.lanes if cuda else 1.0):
        bench = Bench(scale)
        bench.runner.executor.start()
        try:
            run_all(bench, wanted, arguments.seconds)
        finally:
            bench.store.save()
            bench.runner.executor.close()
    if arguments.trials == TRIALS:
        report(arguments)


if __name__ == "__main__":
    main()
