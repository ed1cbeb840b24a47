"""Train at a high rank and squeeze, or train at the low rank? A test of LoRA-Squeeze, with equal steps.

    python benchmarks/bench_squeeze_quality.py --prepare DATA         # writes the tasks of reasoning-gym as
    JSONL python benchmarks/bench_squeeze_quality.py --data DATA --out OUT  # trains and scores, or continues
    python benchmarks/bench_squeeze_quality.py --report               # writes results of finished trials

The base is SmolLM2-135M-Instruct, with four tasks of reasoning-gym, ranks 1, 2, 4 and 8, and three seeds. All
ways to a rank have the same number of optimizer steps:

    direct   trained at the rank; the learning rate is chosen for each rank post     trained at rank 64 (the
    learning rate is chosen there) and squeezed; also to rank 16, the limit of a
             server
    budget   the same, but squeezed to the bytes of `post` with a rank for each module
    cont     trained at rank 64 for three quarters of the steps, squeezed, then trained at the rank
    in       the rank falls from 64 during training, in equal phases, and Adam's moments are projected

The learning rate is chosen for each task on the validation part with the first seed. Three rates are tried
for `direct` and the source, and one beyond if the best is at the end of the three. Two are tried for `cont`
and `in`: that of the source, and that of `direct` at the rank (a third of it if both are equal). The test
part is scored at the chosen rate with three seeds. Scores and differences to `direct` have an interval over
seeds and questions. The results of trials are saved in `results/squeeze_quality_trials.json`, so that an
interrupted run continues where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.records import RESULTS, record, save
from benchmarks.trials import TASKS, LaneRunner, TrialStore, device_kind, prepare, task_data
from rayft.artifacts import AdapterArtifact
from rayft.evaluate.compare import over_seeds
from rayft.flow.cluster import cluster
from rayft.methods.base import MethodConfig
from rayft.models.load import ModelConfig
from rayft.squeeze.anneal import AnnealConfig
from rayft.squeeze.budget import weight_bytes
from rayft.squeeze.rank import squeeze
from rayft.train.run import EvaluateConfig, OptimConfig, RunConfig, ScaleConfig

MODEL = "smollm2-135m-instruct"
SOURCE, RANKS, SEEDS = 64, (1, 2, 4, 8), (0, 1, 2)
WAYS = ("direct", "post", "budget", "cont", "in")
SQUEEZED = ("post", "budget")
CAP = 16
"""The largest rank that a server supports: vLLM's default (`max_lora_rank`)."""
LR = (5e-4, 1.5e-3, 4e-3)
"""Learning rates to try for `direct` and for the source, a factor of three apart."""
TRIALS = RESULTS / "squeeze_quality_trials.json"

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Cell:
    """A way to a rank on a task. Rank 64 is the source."""

    way: str
    task: str
    rank: int


class Bench:
    """The trials of all cells: their names, runs and learning rates."""

    def __init__(
        self, arguments: argparse.Namespace, device: Literal["cpu", "cuda"], store: TrialStore
    ) -> None:
        self.arguments, self.device, self.store = arguments, device, store
        self.steps: int = arguments.steps
        self.rest = self.steps // 4
        """Number of steps of `cont` after the squeeze."""

    def key(self, cell: Cell, lr: float, seed: int) -> str:
        """Return the name of a trial, which depends only on its settings."""
        model = Path(self.arguments.model).stem.lower().partition("-")[0]
        return f"{model}/{cell.task}/{cell.way}-r{cell.rank}-lr{lr:g}-s{seed}-n{self.steps}"

    def source(self, task: str) -> Cell:
        """Return the cell of the source, which `post` squeezes and whose learning rate `in` tries."""
        return Cell("direct", task, SOURCE)

    def grid(self, cell: Cell) -> tuple[float, ...]:
        """Return the learning rates to try first."""
        if cell.way == "direct":
            return LR
        best = self.best_lr(self.source(cell.task))
        if best is None or cell.way in SQUEEZED:
            return () if best is None else (best,)
        direct = self.best_lr(Cell("direct", cell.task, cell.rank))
        return (best, float(f"{best / 3:.1g}") if direct in (None, best) else direct)

    def edge(self, cell: Cell) -> list[float]:
        """Return the learning rate beyond the grid to try, if the best one is at the end of the grid."""
        best, ends = (
            self.best_lr(cell),
            {LR[0]: float(f"{LR[0] / 3:.1g}"), LR[-1]: float(f"{3 * LR[-1]:.2g}")},
        )
        return [ends[best]] if cell.way == "direct" and best in ends else []

    def best_lr(self, cell: Cell) -> float | None:
        """Return the learning rate with the best validation score, or the lower loss if scores are equal."""
        ends = (float(f"{LR[0] / 3:.1g}"), float(f"{3 * LR[-1]:.2g}")) if cell.way == "direct" else ()
        found = []
        for lr in (*self.grid(cell), *ends):
            key = self.key(cell, lr, SEEDS[0])
            values, result = self.store.score(key, "val"), self.store.result(key)
            if values:
                found.append((sum(values) / len(values), -result["val_loss"] if result else 0.0, lr))
        return max(found)[2] if found else None

    def matrix(self, cell: Cell) -> Matrix | None:
        """Return the test scores of a cell, (seeds, questions), or None if some are missing."""
        lr = self.best_lr(cell)
        scores = [self.store.score(self.key(cell, lr, seed), "test") for seed in SEEDS] if lr else []
        return np.array(scores) if scores and all(scores) else None

    def run(self, cell: Cell, lr: float, seed: int, start: str | None = None) -> RunConfig:
        """Return the run of a trial. `start` is the squeezed adapter that `cont` continues from."""
        gpu = self.device == "cuda"
        steps = {"cont": self.rest, "short": self.steps - self.rest}.get(cell.way, self.steps)
        rank = SOURCE if cell.way in ("in", "short") else cell.rank
        return RunConfig(
            model=ModelConfig(name=self.arguments.model),
            data=task_data(self.arguments.data, cell.task),
            method=MethodConfig(name="lora") if start else MethodConfig(name="lora", rank=rank),
            anneal=AnnealConfig(rank=cell.rank, stages=4) if cell.way == "in" else None,
            start=start,
            optim=OptimConfig(lr=lr, steps=steps, rows_per_step=2 if gpu else 1, warmup=2, schedule="linear"),
            scale=ScaleConfig(
                device=self.device, dtype="bfloat16", zero=2, threads=1,
                graphs=gpu, gpu_share=1 / self.arguments.lanes if gpu else 1.0,
            ),
            evaluate=EvaluateConfig(
                checkpoint_seconds=3600, max_new_tokens=24, batch_size=200, val_examples=50
            ),
            seed=seed,
        )  # fmt: skip


def run_task(bench: Bench, runner: LaneRunner, task: str) -> None:
    """Run all ways to all ranks on one task."""
    source = bench.source(task)
    direct = [Cell("direct", task, rank) for rank in RANKS]
    chosen_on_val(bench, runner, [source, *direct])
    lr = bench.best_lr(source)
    assert lr is not None, f"the source of {task} failed at every learning rate"
    annealed = [Cell("in", task, rank) for rank in RANKS]
    chosen_on_val(bench, runner, annealed)
    squeezed(bench, runner, task, lr)
    trained_on(bench, runner, task, lr)
    for cell in cells(task):
        scores = bench.matrix(cell)
        if scores is not None:
            print(
                f"{cell.way:7} {task:20} r{cell.rank:<3} lr {bench.best_lr(cell):g} {scores.mean(1)}",
                flush=True,
            )


def chosen_on_val(bench: Bench, runner: LaneRunner, wanted: Sequence[Cell]) -> None:
    """Choose learning rates with the first seed, then train the other seeds and score the test part."""
    runner.train(
        {bench.key(c, lr, SEEDS[0]): bench.run(c, lr, SEEDS[0]) for c in wanted for lr in bench.grid(c)},
        "val",
    )
    edges = [(cell, lr) for cell in wanted for lr in bench.edge(cell)]
    runner.train({bench.key(c, lr, SEEDS[0]): bench.run(c, lr, SEEDS[0]) for c, lr in edges}, "val")
    best = [(cell, lr) for cell in wanted if (lr := bench.best_lr(cell)) is not None]
    runner.train({bench.key(c, lr, seed): bench.run(c, lr, seed) for c, lr in best for seed in SEEDS}, "test")


def squeezed(bench: Bench, runner: LaneRunner, task: str, lr: float) -> None:
    """Squeeze the sources and score them (`post`, `budget`)."""
    source = bench.source(task)
    wanted = [(Cell(way, task, rank), seed) for way in SQUEEZED for rank in (*RANKS, CAP) for seed in SEEDS]
    missing = [
        (cell, seed) for cell, seed in wanted if bench.store.score(bench.key(cell, lr, seed), "test") is None
    ]
    seeds = sorted({seed for _, seed in missing})
    runner.train({bench.key(source, lr, seed): bench.run(source, lr, seed) for seed in seeds}, None)
    adapters = {}
    for cell, seed in missing:
        key = bench.key(cell, lr, seed)
        folder = lower(bench, runner, bench.key(source, lr, seed), key, cell)
        adapters[key] = (bench.run(source, lr, seed), folder)
    runner.score(adapters, "val")
    runner.score(adapters, "test")


def trained_on(bench: Bench, runner: LaneRunner, task: str, lr: float) -> None:
    """Train shorter sources, squeeze them, and continue training at the rank (`cont`)."""
    short, wanted = Cell("short", task, SOURCE), [Cell("cont", task, rank) for rank in RANKS]

    def go(trials: Sequence[tuple[Cell, float, int]], part: str) -> None:
        missing = [t for t in trials if bench.store.score(bench.key(*t), part) is None]
        seeds = sorted({seed for _, _, seed in missing})
        runner.train({bench.key(short, lr, seed): bench.run(short, lr, seed) for seed in seeds}, None)
        runs = {}
        for cell, own, seed in missing:
            key = bench.key(cell, own, seed)
            start = lower(bench, runner, bench.key(short, lr, seed), f"{key}-start", cell)
            runs[key] = bench.run(cell, own, seed, start)
        runner.train(runs, part)

    go([(cell, own, SEEDS[0]) for cell in wanted for own in bench.grid(cell)], "val")
    best = [(cell, own) for cell in wanted if (own := bench.best_lr(cell)) is not None]
    go([(cell, own, seed) for cell, own in best for seed in SEEDS], "test")


def lower(bench: Bench, runner: LaneRunner, source: str, key: str, cell: Cell) -> str:
    """Squeeze a trained adapter, save the energy that it retains, and return its folder."""
    folder = runner.folder(source)
    assert folder is not None, f"{source} left no adapter"
    full = squeeze(AdapterArtifact.load(folder))
    small = full.at_rank(cell.rank)
    if cell.way == "budget":
        small = squeeze(full, budget=weight_bytes(small))
    if cell.way in SQUEEZED:
        bench.store.keep(key, commit=bench.arguments.commit, energy=energy(small), bytes=weight_bytes(small))
    return str(small.save(runner.out / "squeezed" / key.replace("/", "-")))


def energy(small: AdapterArtifact) -> float:
    """Return the share of the whole update's ‖ΔW‖², over all modules, that is retained."""
    spectra = {name: np.square(values) for name, values in small.meta.singular_values.items()}
    kept = sum(float(spectra[name][: factors.rank].sum()) for name, factors in small.modules.items())
    return kept / sum(float(values.sum()) for values in spectra.values())


def cells(task: str) -> list[Cell]:
    """Return the cells of a task, the source first."""
    squeezed_only = [Cell(way, task, CAP) for way in SQUEEZED]
    return [
        Cell("direct", task, SOURCE),
        *(Cell(way, task, rank) for rank in RANKS for way in WAYS),
        *squeezed_only,
    ]


def records(bench: Bench, tasks: Sequence[str]) -> list[dict[str, Any]]:
    """Return the results of trials: each cell, its difference to `direct`, and both over finished tasks."""
    rows = []
    found = {
        cell: scores for task in tasks for cell in cells(task) if (scores := bench.matrix(cell)) is not None
    }
    for cell in found:
        rows += _rows(bench, f"{cell.way}/{cell.task}/r{cell.rank}", [cell], found)
    whole = [task for task in tasks if all(cell in found for cell in cells(task))]
    for example in cells("mean") if whole else ():
        mine = [Cell(example.way, task, example.rank) for task in whole]
        rows += _rows(bench, f"{example.way}/mean/r{example.rank}", mine, found)
    return rows


def _rows(
    bench: Bench, case: str, mine: Sequence[Cell], found: Mapping[Cell, Matrix]
) -> list[dict[str, Any]]:
    way, rank = mine[0].way, mine[0].rank
    scores = [found[cell] for cell in mine]
    lrs = [bench.best_lr(cell) for cell in mine]
    known = {
        "seeds": list(SEEDS),
        "lr": lrs[0] if len(mine) == 1 else None,
        "n": sum(s.shape[1] for s in scores),
    }
    means = {"score": over_seeds(scores)}
    direct = [found[cell] for task in mine if (cell := Cell("direct", task.task, rank)) in found]
    if way != "direct" and len(direct) == len(mine):
        means["over_direct"] = over_seeds(scores, direct)
    if way in SQUEEZED:
        # Each comes from the source of the same seed, so both seeds and questions are paired.
        means["over_source"] = over_seeds(
            [s - found[bench.source(c.task)] for s, c in zip(scores, mine, strict=True)]
        )
    rows = [
        record(
            "squeeze_quality",
            case,
            metric,
            mean.value,
            "share",
            ci_low=mean.ci_low,
            ci_high=mean.ci_high,
            **known,
        )
        for metric, mean in means.items()
    ]
    keys = [bench.key(cell, lr, seed) for cell, lr in zip(mine, lrs, strict=True) if lr for seed in SEEDS]
    for metric, unit in (("energy", "share"), ("bytes", "bytes")) if way in SQUEEZED else ():
        values = [bench.store.known[key][metric] for key in keys]
        rows.append(record("squeeze_quality", case, metric, sum(values) / len(values), unit, **known))
    return [{**row, **bench.store.origin(keys)} for row in rows]


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the score by rank, with one panel for each task."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    scores = {row["case"]: row for row in rows if row["metric"] == "score"}
    tasks = list(dict.fromkeys(case.split("/")[1] for case in scores))
    figure = Figure(figsize=(3.6 * len(tasks), 3.6), layout="constrained", facecolor="white")
    FigureCanvasSVG(figure)
    colours = dict(zip(WAYS, ("#57606a", "#0a60c2", "#7c3aed", "#1a7f37", "#c2410c"), strict=True))
    for axes, task in zip(np.atleast_1d(figure.subplots(1, len(tasks), sharey=True)), tasks, strict=True):
        for shift, way in enumerate(WAYS):
            mine = [
                (rank, scores[f"{way}/{task}/r{rank}"]) for rank in RANKS if f"{way}/{task}/r{rank}" in scores
            ]
            if not mine:
                continue
            x = [rank * 1.05 ** (shift - 2) for rank, _ in mine]
            y = np.array([row["value"] for _, row in mine])
            low, high = (np.array([row[end] for _, row in mine]) for end in ("ci_low", "ci_high"))
            axes.errorbar(
                x, y, [y - low, high - y], color=colours[way], marker="osPD^"[shift], capsize=3, label=way
            )
        source = scores.get(f"direct/{task}/r{SOURCE}")
        if source:
            axes.axhline(source["value"], color="#8c959f", linestyle=":", label=f"rank {SOURCE}")
        axes.set_xscale("log", base=2)
        axes.set_xticks(RANKS, [str(rank) for rank in RANKS])
        axes.set_title(task)
        axes.set_xlabel("rank")
        axes.grid(color="#d0d7de", linewidth=0.6)
    figure.axes[0].set_ylabel("test score, 95 % interval")
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Write the tasks, run them, or write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prepare", type=Path)
    parser.add_argument("--data", type=Path, default=Path())
    parser.add_argument("--out", type=Path, default=Path("runs/squeeze_quality"))
    parser.add_argument("--trials", type=Path, default=TRIALS)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--lanes", type=int, default=6)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="start no task after this many seconds"
    )
    parser.add_argument("--commit")
    parser.add_argument("--report", action="store_true", help="write the results of finished trials")
    arguments = parser.parse_args()
    tasks = arguments.tasks.split(",")
    if arguments.prepare:
        prepare(arguments.prepare)
        return
    if not arguments.report:
        run_all(arguments, tasks)
    if arguments.trials == TRIALS:
        report(arguments)


def run_all(arguments: argparse.Namespace, tasks: Sequence[str]) -> None:
    """Run one task after the other."""
    import torch

    cuda = torch.cuda.is_available()
    device = f"1x {torch.cuda.get_device_name()}" if cuda else "cpu"
    bench = Bench(arguments, "cuda" if cuda else "cpu", TrialStore(arguments.trials, device))
    share = 1 / arguments.lanes if cuda else 1.0
    with cluster(arguments.lanes, device=bench.device, gpu_share=share):
        scale = bench.run(bench.source(tasks[0]), LR[0], 0).scale
        runner = LaneRunner(bench.store, scale, arguments.out, arguments.lanes, "squeeze", arguments.commit)
        runner.executor.start()
        try:
            for task in tasks:
                if runner.spent > arguments.seconds:
                    print(f"no time is left for {task}", flush=True)
                    break
                run_task(bench, runner, task)
        finally:
            bench.store.save()
            runner.executor.close()


def report(arguments: argparse.Namespace) -> None:
    """Write the results of all saved trials, including those of earlier runs."""
    kind = device_kind(TRIALS)
    bench = Bench(arguments, "cpu" if kind == "cpu" else "cuda", TrialStore(TRIALS, kind))
    rows = records(bench, list(TASKS))
    save("squeeze_quality", rows, anew=True)
    plot(rows, RESULTS / "squeeze_quality.svg")


if __name__ == "__main__":
    main()
