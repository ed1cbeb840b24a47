"""Measure a training step of several trials that are packed on one base, in one run on one GPU.

    python benchmarks/bench_packed_step.py [--shapes 135m,1b] [--rounds 2] [--commit HASH]
    python benchmarks/bench_packed_step.py --profile [--shapes 135m]

K trials train as one batch. They alternate between lora and cla, and have ranks of 4, 8, 16 and 32, on all
linears. Beside them are, all with rank 16 and as CUDA graphs: one trial's step over K times the rows, with
lora and with cla (`over_single` is relative to their mean); the steps of K trials one after the other, half
of them lora's and half cla's (`over_sequential`); and the frozen base (`over_floor`). A step is forward,
backward, and fused AdamW over everything that trains; see bench_train_step.py for the rest. `--profile`
lists the kernels that the packed step and the ones beside it spend their time in.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.bench_train_step import build, kernels_of, make_step, prepared
from benchmarks.records import record, save
from rayft.kernels.grouped_linear import Plan, Term, grouped_linear
from rayft.methods.base import Adapter, AdapterLinear, LoraFactors, MethodConfig
from rayft.methods.cla import SelectorAdapter
from rayft.models.inject import clear, inject

METHODS, RANKS = ("lora", "cla"), (4, 8, 16, 32)
"""Of trial 0, 1, …, in turns; each method gets each rank."""
PLACES = [
    ("135m", 8, (2, 512)), ("135m", 16, (2, 512)), ("135m", 8, (4, 512)), ("135m", 16, (4, 512)),
    ("1b", 8, (4, 256)),
]  # fmt: skip
"""Shape, K, and the rows and tokens of one trial's batch."""
CASES = ("packed", "floor", "lora", "cla", "lora alone", "cla alone")
"""`alone`: over the rows of one trial; the others are over those of K trials."""


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
        # Trials 0 and 1 have the first rank, 2 and 3 the second, …
        rank = RANKS[trial // 2 % len(RANKS)]
        inject(model, MethodConfig(name=METHODS[trial % 2], rank=rank), seed=trial)
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
        "over_sequential": trials * (ms["lora alone"] + ms["cla alone"]) / 2,
        "over_floor": ms["floor"],
    }
    cuts = statistics.quantiles(times["packed"], n=10)
    spread = {"p20": cuts[1], "p80": cuts[7], "n": len(times["packed"])}
    print(place, " ".join(f"{case} {found:.2f} ms" for case, found in ms.items()), flush=True)
    print(place, " ".join(f"{name} {ms['packed'] / other:.3f}" for name, other in over.items()), flush=True)
    return [
        record("packed_step", place, "ms", ms["packed"], "ms", **spread),
        *(record("packed_step", place, name, ms["packed"] / other, "ratio") for name, other in over.items()),
    ]


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
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--profile", action="store_true", help="list the kernels of a step")
    parser.add_argument("--commit")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU")
    rows: list[dict[str, Any]] = []
    for shape in arguments.shapes.split(","):
        model = build(shape)
        for _, trials, batch in [place for place in PLACES if place[0] == shape]:
            place = f"{trials}_trials/{shape}/{batch[0]}x{batch[1]}"
            if arguments.profile:
                profile(model, place, trials, batch)
                continue
            rows += run(model, place, trials, batch, arguments.rounds, arguments.steps)
            # Save after each place, so that an interrupted run loses one at most.
            save("packed_step", [{**row, "commit": arguments.commit or row["commit"]} for row in rows])
        del model
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
