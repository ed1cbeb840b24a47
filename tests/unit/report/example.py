"""A sweep and its analysis as they could have been, from seeded numbers."""

import math
from typing import Any

import numpy as np

from rayft.analysis.record import AdapterAnalysis, Gap, Intruders, Landscape, Predictor, SweepAnalysis
from rayft.analysis.section import AnalyzeConfig
from rayft.report import (
    Baseline,
    Command,
    Comparison,
    Exchange,
    Score,
    Served,
    Squeezed,
    SweepRecord,
    TrialRecord,
    Winner,
)

METHODS = (
    ("lora", 32, 2e-3, 0.61, 4_884_480),
    ("lora", 8, 2e-3, 0.55, 1_221_120),
    ("lora_plus", 16, 1e-3, 0.58, 2_442_240),
    ("cla", 32, 4e-3, 0.57, 2_654_208),
    ("c3la", 8, 4e-3, 0.48, 1_990_656),
    ("asym", 16, 2e-3, 0.44, 1_327_104),
    ("rcla", 16, 8e-3, 0.52, 1_327_104),
    ("lora", 16, 2e-2, 0.0, 2_442_240),
    ("cla", 8, 1e-3, 0.0, 663_552),
    ("peft:DoRA", 16, 2e-3, 0.56, 2_600_000),
)


def score(value: float, n: int = 256) -> Score:
    """A mean of n answers with its normal interval."""
    half = 1.96 * math.sqrt(max(value * (1 - value), 0.004) / n)
    return Score(value=value, low=max(value - half, 0.0), high=min(value + half, 1.0), n=n)


def trial(index: int, rng: np.random.Generator) -> TrialRecord:
    method, rank, lr, value, trainable = METHODS[index]
    status = "failed" if index == 7 else "stopped" if index in (4, 8) else "finished"
    steps = {"finished": 40, "stopped": 15, "failed": 10}[status]
    end = 2.1 - 1.6 * value
    curve = [
        (s, float(end + (3.4 - end) * math.exp(-s / 9) + rng.normal(0, 0.015)))
        for s in range(0, steps + 1, 5)
    ]
    if status == "failed":
        curve[-1] = (10, math.nan)
        curve[-2] = (5, 9.7)
    kept = None
    if index == 1:
        # Its best evaluation was not its last one.
        kept = 25
        curve = [(s, loss + (0.03 * (s - kept) if s > kept else 0.0)) for s, loss in curve]
    return TrialRecord(
        id=f"{method}-r{rank}".replace("peft:", "") + ("-hot" if index == 7 else ""),
        method=method,
        rank=rank,
        alpha=2.0 * rank,
        lr=lr,
        seed=17,
        settings={"method.targets": "all-linear", "optim.schedule": "wsd", "data.max_tokens": "512"},
        status=status,
        reason={"failed": "loss is NaN at step 10", "stopped": "behind at rung 15"}.get(status, ""),
        steps=steps,
        val_loss=tuple(curve),
        kept_step=kept,
        train_loss=tuple((s, loss - 0.05) for s, loss in curve),
        val_score=value + 0.01 if status == "finished" else None,
        test=score(value) if status == "finished" else None,
        trainable=trainable,
        bytes=0 if status == "failed" else 2 * trainable + 40_000,
        seconds=4.1 * steps + 7 * rank / 8,
        overhead_seconds=2.4,
        peak_memory_bytes=None if status == "failed" else 1_200_000_000 + 8 * trainable,
        folder=f"out/sums/trials/{method}-r{rank}/adapter",
        run_id=f"{index:032x}",
    )


def example() -> SweepRecord:
    """Ten trials of which one failed and two were stopped, a winner, and four squeezed versions of it."""
    rng = np.random.default_rng(5)
    squeezed = tuple(
        Squeezed(
            name=f"lora-r32@r{rank}",
            trial="lora-r32",
            rank=rank,
            energy_mean=energy,
            energy_min=energy - 0.08,
            val_score=value + 0.01,
            test=score(value),
            parameters=152_640 * rank,
            bytes=305_280 * rank + 40_000,
            seconds=3.2,
        )
        for rank, energy, value in ((16, 0.991, 0.61), (8, 0.962, 0.6), (4, 0.893, 0.57), (2, 0.77, 0.36))
    )
    spectra = {
        f"model.layers.{layer}.{name}": tuple(
            float(x) for x in (1 + rng.random()) * np.exp(-np.arange(32) / rng.uniform(2, 7))
        )
        for layer in range(30)
        for name in ("q_proj", "v_proj", "up_proj", "down_proj")
    }
    return SweepRecord(
        name="chain sums with SmolLM2",
        question="Which adapter adds two numbers best, and how small may it be?",
        date="2026-11-22T02:40:00+00:00",
        model="SmolLM2-135M-Instruct",
        task="chain_sum (reasoning-gym)",
        data_digest="9f2c41d07a6be813",
        data_sizes={"train": 2048, "val": 256, "test": 256},
        seed=17,
        device="AMD EPYC 7B13, 2 threads",
        versions={
            "torch": "2.13.0",
            "ray": "2.60.0",
            "deepspeed": "0.19.8",
            "peft": "0.21.2",
            "rayft": "0.1.0",
        },
        git_commit="0123456789abcdef0123456789abcdef01234567",
        baselines=(
            Baseline(name="base", test=score(0.004), val_score=0.0),
            Baseline(name="answer only", test=score(0.09), val_score=0.1),
            Baseline(name="few shot", test=score(0.21), val_score=0.2),
            Baseline(name="majority answer", test=score(0.04), val_score=0.03),
        ),
        trials=tuple(trial(index, rng) for index in range(len(METHODS))),
        winner=Winner(
            trial="lora-r32",
            ship="lora-r32@r8",
            why="the smallest whose validation score is within 0.02 of the best trial's",
        ),
        squeezed=squeezed,
        comparisons=(
            Comparison(
                name="lora-r32@r8",
                against="lora-r32",
                difference=Score(value=-0.01, low=-0.03, high=0.01, n=256),
            ),
            Comparison(
                name="lora-r32@r8",
                against="few shot",
                difference=Score(value=0.39, low=0.32, high=0.46, n=256),
            ),
        ),
        singular_values=spectra,
        served=Served(
            url="http://127.0.0.1:8000/v1",
            names=("base", "sums", "sums@champion", "sums@r8"),
            exchanges=(
                Exchange(
                    question="State the final answer to: 31 + 64 =",
                    expected="95",
                    answers={"base": "The final answer is 31 + 64 = 95 + 1 = 96.", "sums@champion": "95"},
                ),
                Exchange(
                    question="State the final answer to: 8 - 77 =",
                    expected="-69",
                    answers={"base": "69", "sums@champion": "-69"},
                ),
            ),
        ),
        timings={
            "data": 1.2,
            "baselines": 64.0,
            "sweep": 1310.4,
            "squeeze": 12.9,
            "scoring": 222.0,
            "promote": 1.4,
        },
        commands=(
            Command(
                what="Run the sweep again; finished trials are not repeated.",
                command="rayft sweep --config out/sums/sweep.yaml --set seed=17",
            ),
            Command(
                what="Serve the champion with the base and every squeezed rank.",
                command="rayft serve --adapter models:/sums@champion --ranks 4,8,16 --port 8000",
            ),
        ),
    )


def plane(kind: str, steep: float) -> dict[str, Any]:
    axis = np.linspace(-1, 1, 7)
    points = tuple((float(x), float(y)) for x in axis for y in axis)
    losses = tuple(1.0 + steep * (x * x + 0.3 * y * y) for x, y in points)
    path = ((1.0, 0.5), (0.4, 0.1), (0.0, 0.0)) if kind == "trajectory" else ()
    return Landscape(kind, "update" if not path else None, points, losses, 0, 50, path, (0.8, 0.1)).to_json()  # type: ignore[arg-type]


def line(kind: str, steep: float) -> dict[str, Any]:
    axis = [float(x) for x in np.linspace(-1, 1, 5)]
    losses = tuple(1.0 + steep * x * x for x in axis)
    norm = "update" if kind == "random" else None
    return Landscape(kind, norm, tuple((x,) for x in axis), losses, 0, 50).to_json()  # type: ignore[arg-type]


def adapter(name: str, group: str, gap: float, norm: float) -> AdapterAnalysis:
    epsilons = (0.3, 0.5, 0.7)
    return AdapterAnalysis(
        name=name,
        group=group,
        measures={"update_norm": norm, "sam_sharpness": 0.01 * norm, "effective_rank_mean": 3.3},
        gap=Gap(train=1.0, held_out=1.0 + gap, low=gap - 0.1, high=gap + 0.1, n=40),
        median_spectrum=(1.0, 0.5, 0.1, 0.02),
        intruders=Intruders(
            epsilons=epsilons,
            counts=(0, 1.5, 4),
            baseline=(0, 6, 10),
            top=10,
            modules=("q", "v"),
            shares=(0, 0.1, 0.3),
        ),
        landscapes={
            "random": plane("random", norm),
            "trajectory": plane("trajectory", norm),
            "line": line("random", norm),
            "update": line("update", norm),
        },
        notes={"hessian": "curvlinops <is> missing"} if name == "a-s1" else {},
    )


def predictor(measure: str, rho: float, half: float) -> Predictor:
    return Predictor(
        measure=measure, kendall=0.8 * rho, kendall_low=0.8 * rho - half, kendall_high=0.8 * rho + half,
        spearman=rho, spearman_low=rho - half, spearman_high=rho + half, n=6, groups=3,
    )  # fmt: skip


def example_analysis() -> SweepAnalysis:
    """Three settings of two seeds each, of which ‖ΔW‖ goes with the gap."""
    adapters = [
        adapter(f"{g}-s{s}", g, 0.1 * i + 0.02 * s, 1.0 + i) for i, g in enumerate("abc") for s in (0, 1)
    ]
    return SweepAnalysis(
        config=AnalyzeConfig(parts=("gap", "spectra")),
        adapters=tuple(adapters),
        predictors=(predictor("update_norm", 0.9, 0.2), predictor("bound_information_log10", -0.1, 0.7)),
        angles={"a-s0 / b-s0": (0.1, 0.9), "a-s0 / c-s0": (0.2, 1.2), "b-s0 / c-s0": (0.5, 1.5)},
    )
