"""Measure a training step of several trials that are packed on one base, in one run on one GPU.

    python benchmarks/bench_packed_step.py [--shapes 135m,1b] [--rounds 2] [--commit HASH]
    python benchmarks/bench_packed_step.py --trainer [--shapes 135m,1b] [--rounds 2] [--steps 10]
    python benchmarks/bench_packed_step.py --profile [--shapes 135m]

K trials train as one batch. They alternate between lora and cla, and have ranks of 4, 8, 16 and 32, on all
linears. Beside them are, all with rank 16 and as CUDA graphs: one trial's step over K times the rows, with
lora and with cla (`over_single` is relative to their mean); the steps of K trials one after the other, half
of them lora's and half cla's (`over_lanes`); and the frozen base (`over_floor`). A step is forward,
backward, and fused AdamW over everything that trains; see bench_train_step.py for the rest. `--profile`
lists the kernels that the packed step and the ones beside it spend their time in.

`--trainer` measures the steps that a sweep's lane takes: by `Trainer` and `Pack`, so with DeepSpeed's ZeRO-2,
float32 masters, clipping and packed rows, on a fused base; its results are those of `packed_trainer`. `slots`
are K trials in a pack. Beside them are a trial of rank 16 over K times the rows, alone in a pack (`slot`, to
which `over_slot` is relative) and by a trainer without one (`trainer`); and a trainer over the rows of one
trial (`alone`), whose step counts K times in `over_turns`. It also runs on a CPU, without graphs.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.bench_train_step import (
    RANK,
    build,
    join_group,
    kernels_of,
    make_step,
    prepared,
    run_of,
    session_of,
)
from benchmarks.records import record, save
from rayft.errors import RayftError
from rayft.kernels.grouped_linear import Plan, Term, grouped_linear
from rayft.methods.base import Adapter, AdapterLinear, LoraFactors, MethodConfig
from rayft.methods.cla import SelectorAdapter
from rayft.models.fuse import fuse
from rayft.models.inject import clear, inject
from rayft.train.packed import Courses, Pack
from rayft.train.placement import Placement
from rayft.train.run import RunConfig
from rayft.train.session import Session
from rayft.train.trainer import Reporter, Trainer, TrainResult

METHODS, RANKS = ("lora", "cla"), (4, 8, 16, 32)
"""Of trial 0, 1, …, in turns; each method gets each rank."""
PLACES = [
    ("135m", 8, (2, 512)), ("135m", 16, (2, 512)), ("135m", 8, (4, 512)), ("135m", 16, (4, 512)),
    ("1b", 8, (4, 256)),
]  # fmt: skip
"""Shape, K, and the rows and tokens of one trial's batch."""
CASES = ("packed", "floor", "lora", "cla", "lora alone", "cla alone")
"""`alone`: over the rows of one trial; the others are over those of K trials."""
TRAINED = ("slots", "slot/lora", "slot/cla", "trainer/lora", "trainer/cla", "alone/lora", "alone/cla")
"""The cases of `--trainer`."""
WARM_UP, WINDOW = 4, 5
"""Of trainers: untimed steps, in which each row is read once; and steps that are timed together."""
Step = Callable[[], object]


class Packed(Adapter):
    """The adapters of all trials in one layer."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan

    def forward(
        self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """Compute base and all adapters together."""
        assert weight is not None
        return grouped_linear(x, weight, bias, self.plan)

    def to_lora(self) -> LoraFactors:
        """Raise, because there are several."""
        raise NotImplementedError


def method_of(trial: int) -> MethodConfig:
    """Return the method of a trial."""
    # Trials 0 and 1 have the first rank, 2 and 3 the second, …
    return MethodConfig(name=METHODS[trial % 2], rank=RANKS[trial // 2 % len(RANKS)])


def term(adapter: Any, rows: slice) -> Term:
    """Return an adapter as a term for some tokens."""
    if isinstance(adapter, SelectorAdapter):
        return Term(rows, adapter.lora_B, adapter.scale, columns=adapter.columns)
    return Term(rows, adapter.lora_B, adapter.scale, a=adapter.lora_A)


@contextmanager
def pack(model: Any, trials: int, tokens: int) -> Iterator[list[torch.nn.Parameter]]:
    """Insert the adapters of all trials, of some tokens each, and yield what trains."""
    layers = [module for module in model.modules() if isinstance(module, AdapterLinear)]
    terms: list[list[Term]] = [[] for _ in layers]
    trained: list[torch.nn.Parameter] = []
    for trial in range(trials):
        inject(model, method_of(trial), seed=trial)
        trained += [parameter for parameter in model.parameters() if parameter.requires_grad]
        rows = slice(trial * tokens, (trial + 1) * tokens)
        for found, layer in zip(terms, layers, strict=True):
            if layer.adapter is not None:
                found.append(term(layer.adapter, rows))
        clear(model)
    for found, layer in zip(terms, layers, strict=True):
        layer.adapter = Packed(Plan(found))
    try:
        yield trained
    finally:
        for layer in layers:
            layer.adapter = None


@contextmanager
def graph_of(model: Any, case: str, trials: int, batch: tuple[int, int]) -> Iterator[Any]:
    """Yield a function that replays the step of a case."""
    name, _, alone = case.partition(" ")
    rows, length = batch[0] * (1 if alone else trials), batch[1]
    ids = torch.randint(0, model.config.vocab_size, (rows, length), device="cuda")
    with pack(model, trials, batch[0] * length) if name == "packed" else prepared(model, name) as trained:
        yield make_step(model, name, ids, trained, graph=True)
    gc.collect()
    torch.cuda.empty_cache()


def measure(step: Any, steps: int) -> list[float]:
    """Return the milliseconds of each step."""
    found = []
    for number in range(steps + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        if number >= 3:
            found.append(start.elapsed_time(end))
    return found


def run(model: Any, place: str, trials: int, batch: tuple[int, int], rounds: int, steps: int) -> Any:
    """Time all cases of one place, in turns, print what they took, and return the results."""
    times: dict[str, list[float]] = {case: [] for case in CASES}
    for _ in range(rounds):
        for case in CASES:
            with graph_of(model, case, trials, batch) as step:
                times[case] += measure(step, steps)
                # The memory of a graph is free before the next one is captured.
                del step
    ms = {case: statistics.median(found) for case, found in times.items()}
    over = {
        "over_single": (ms["lora"] + ms["cla"]) / 2,
        "over_lora": ms["lora"],
        "over_cla": ms["cla"],
        "over_lanes": trials * (ms["lora alone"] + ms["cla alone"]) / 2,
        "over_floor": ms["floor"],
    }
    print(place, " ".join(f"{case} {found:.2f} ms" for case, found in ms.items()), flush=True)
    print(place, " ".join(f"{name} {ms['packed'] / other:.3f}" for name, other in over.items()), flush=True)
    return [
        duration("packed_step", place, times["packed"]),
        *(record("packed_step", place, name, ms["packed"] / other, "ratio") for name, other in over.items()),
    ]


def duration(bench: str, case: str, times: Sequence[float]) -> dict[str, Any]:
    """Return the result of some milliseconds."""
    cuts = statistics.quantiles(times, n=10)
    spread = {"p20": cuts[1], "p80": cuts[7], "n": len(times)}
    return record(bench, case, "ms", statistics.median(times), "ms", **spread)


@contextmanager
def in_slots(session: Session, runs: Sequence[RunConfig], folder: Path) -> Iterator[Step]:
    """Yield a function that takes a step of some runs together, as a sweep's lane does."""
    packed = Pack(session, print, graphs=bool(runs[0].scale.graphs))
    courses = Courses[TrainResult](packed)

    def step() -> None:
        courses.advance()
        for ended in courses.ended().values():
            raise RuntimeError("a trial ended") from (ended if isinstance(ended, Exception) else None)

    with packed.stream():
        try:
            for number, run in enumerate(runs):
                own = Trainer(run, packed.session(), Reporter(), folder / str(number), pack=packed)
                courses.begin(str(number), own.course(), own.clock)
            yield step
            check(packed.placement, runs[0])
        finally:
            courses.close()
            packed.close()


@contextmanager
def by_trainer(session: Session, run: RunConfig, folder: Path) -> Iterator[Step]:
    """Yield a function that takes a step of a run that has the device to itself."""
    trainer = Trainer(run, session, Reporter(), folder)
    course, answer = trainer.course(), None

    def step() -> None:
        nonlocal answer
        answer = trainer.answer(course.send(answer))

    try:
        yield step
        check(trainer.placement, run)
    finally:
        course.close()


def check(found: Placement, run: RunConfig) -> None:
    """Raise an error unless each step was one pass, with graphs on a GPU."""
    if found != Placement(graphs=bool(run.scale.graphs)):
        raise RuntimeError(f"the steps were taken by {found}")


def steps_of(
    session: Session, case: str, trials: int, batch: tuple[int, int], count: int, folder: Path
) -> AbstractContextManager[Step]:
    """Return a context with a function that takes a step of a case, so many times after the first ones."""
    name, _, method = case.partition("/")
    # The last step would wait for its numbers, and be followed by a validation.
    steps, device = WARM_UP + count + 1, session.worker.device
    if name == "slots":
        runs = [run_of(method_of(trial), batch, steps, device) for trial in range(trials)]
        return in_slots(session, runs, folder)
    whole = batch if name == "alone" else (trials * batch[0], batch[1])
    run = run_of(MethodConfig(name=method, rank=RANK), whole, steps, device)
    return in_slots(session, [run], folder) if name == "slot" else by_trainer(session, run, folder)


def windows(step: Step, steps: int, device: str) -> list[float]:
    """Return the mean milliseconds of a step, in each window of some steps after the first ones.

    The host is ahead of the device, so the device records when each window begins and ends.
    """
    for _ in range(WARM_UP):
        step()
    marks = [mark(device)]
    for number in range(1, steps + 1):
        step()
        if number % WINDOW == 0:
            marks.append(mark(device))
    if device == "cpu":
        return [1e3 * (end - start) / WINDOW for start, end in pairwise(marks)]
    marks[-1].synchronize()
    return [start.elapsed_time(end) / WINDOW for start, end in pairwise(marks)]


def mark(device: str) -> Any:
    """Return when a device is done with what it was given: an event that it will record; seconds on a CPU."""
    if device == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def run_by_trainer(
    model: Any, place: str, trials: int, batch: tuple[int, int], rounds: int, steps: int, device: str
) -> list[dict[str, Any]]:
    """Time the cases of `--trainer` at one place, in turns, print what they took, and return the results."""
    times: dict[str, list[float]] = {case: [] for case in TRAINED}
    session = session_of(model, WARM_UP * trials * batch[0], batch[1], device)
    for _ in range(rounds):
        for case in TRAINED:
            # Of the case before, even if that has failed.
            gc.collect()
            torch.cuda.empty_cache()
            started = time.perf_counter()
            with (
                tempfile.TemporaryDirectory() as folder,
                steps_of(session, case, trials, batch, steps, Path(folder)) as step,
            ):
                found = windows(step, steps, device)
                del step
            times[case] += found
            shown = " ".join(f"{ms:.2f}" for ms in found)
            print(f"{place} {case}: {shown} ms ({time.perf_counter() - started:.0f} s)", flush=True)
    ms = {case: statistics.median(found) for case, found in times.items()}
    over = {
        ("slots", "over_slot"): ms["slots"] / ((ms["slot/lora"] + ms["slot/cla"]) / 2),
        ("slots", "over_turns"): ms["slots"] / (trials * (ms["alone/lora"] + ms["alone/cla"]) / 2),
        ("slot/lora", "over_trainer"): ms["slot/lora"] / ms["trainer/lora"],
        ("slot/cla", "over_trainer"): ms["slot/cla"] / ms["trainer/cla"],
    }
    rows = [duration("packed_trainer", f"{case}/{place}", found) for case, found in times.items()]
    for (case, metric), ratio in over.items():
        print(f"{place} {case} {metric} {ratio:.3f}", flush=True)
        rows.append(record("packed_trainer", f"{case}/{place}", metric, ratio, "ratio"))
    return rows


def profile(model: Any, place: str, trials: int, batch: tuple[int, int]) -> None:
    """Print the milliseconds and launches of each kernel in a replayed step."""
    for case in CASES[:4]:
        with graph_of(model, case, trials, batch) as step:
            spent = kernels_of(step)
            del step
        whole, launches = (sum(column) for column in zip(*spent.values(), strict=True))
        print(f"{place} {case}: {whole:.2f} ms, {launches:.0f} launches", flush=True)
        for name, (ms, count) in sorted(spent.items(), key=lambda item: -item[1][0])[:16]:
            print(f"  {ms:8.3f} ms {count:6.0f}  {name}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="135m,1b")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10, help=f"with --trainer, a multiple of {WINDOW}")
    parser.add_argument("--trainer", action="store_true", help="measure the steps that a sweep takes")
    parser.add_argument("--profile", action="store_true", help="list the kernels of a step")
    parser.add_argument("--commit")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not arguments.trainer:
        raise SystemExit("this benchmark needs a GPU")
    if arguments.trainer:
        join_group("gloo" if device == "cpu" else "nccl")
    bench, rows = "packed_trainer" if arguments.trainer else "packed_step", list[dict[str, Any]]()
    for shape in arguments.shapes.split(","):
        model = build(shape, device)
        if arguments.trainer:
            fuse(model)
        for _, trials, batch in [place for place in PLACES if place[0] == shape]:
            place = f"{trials}_trials/{shape}/{batch[0]}x{batch[1]}"
            if arguments.profile:
                profile(model, place, trials, batch)
                continue
            at = (model, place, trials, batch, arguments.rounds, arguments.steps)
            try:
                rows += run_by_trainer(*at, device) if arguments.trainer else run(*at)
            except (RuntimeError, RayftError):
                print(f"{place} failed: {traceback.format_exc()}", flush=True)
                continue
            # Save after each place, so that an interrupted run loses one at most.
            save(bench, [{**row, "commit": arguments.commit or row["commit"]} for row in rows])
        del model
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
