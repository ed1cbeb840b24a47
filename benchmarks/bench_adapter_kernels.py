"""Measure the cost of many adapters in one batch, relative to the base's own linears, in one run on one GPU.

    python benchmarks/bench_adapter_kernels.py [--loads decode32x8,…] [--commit HASH]
    python benchmarks/bench_adapter_kernels.py --tune [--loads decode32x32]

The benchmark has all linears of a Llama shape of 1.0 B parameters (16 layers of q, k, v, o, gate, up, down;
bfloat16, random numbers), with adapters of ranks 4, 8, 16, 64 in turn on each. Each case is captured once and
replayed as a CUDA graph. The cases take turns, `ROUNDS` times. Layers share buffers of x and y, as in a
model. Each layer has its own weights and factors, which together are larger than a GPU's cache.

    base                  the linears alone
    N_adapters            the adapters alone, added to y by our kernels (and the batch's preparation)
    padded_N              the adapters alone, all padded to rank 64 and multiplied as one batch
    peft_N                the adapters alone, one after the other: PEFT's way with a mixed batch, but
                          without its Python overhead, since it is replayed
    base_then_N_adapters  the linears, then the adapters
    N_adapters_then_base  the adapters first, the linears' products accumulated onto them
    limit_N               the time to transfer the factors, x and y at `BANDWIDTH`; limit_factors_N, of the
                          factors alone. `bytes_over_limit` is the time over limit_N

`--tune` tries other constants and prints their times.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.capture import capture
from benchmarks.records import record, save
from rayft.kernels.grouped_lora import DECODE, AdapterTable, Group, Rows, Tuning, grouped_lora
from rayft.kernels.segment_lora import SlotFactors

LAYERS, HIDDEN, FFN, KV = 16, 2048, 8192, 512
KINDS = {
    "qkv": Group(HIDDEN, {"q": HIDDEN, "k": KV, "v": KV}),
    "o": Group(HIDDEN, {"o": HIDDEN}),
    "gate_up": Group(HIDDEN, {"gate": FFN, "up": FFN}),
    "down": Group(FFN, {"down": HIDDEN}),
}
RANKS, WIDEST, SLOTS = (4, 8, 16, 64), 64, 33
ROUNDS, SAMPLES = 3, 10
BANDWIDTH = 3.0e12
"""Bytes per second that the memory of an H100 reaches in practice."""

Step = Callable[[], None]


@dataclass(frozen=True)
class Load:
    """The rows of a batch and their adapters: in turn (decoding), or a block of rows each (prefill)."""

    rows: int
    adapters: int

    @property
    def place(self) -> str:
        """The name of the shape in results."""
        return f"1b/{self.rows}{'rows' if self.rows <= DECODE else 'tokens'}"

    def slots(self) -> torch.Tensor:
        """Return the slot of each row."""
        turns = torch.arange(self.rows) % self.adapters + 1
        return (turns if self.rows <= DECODE else turns.sort().values).int()


SUMS = ("base_then_{}_adapters", "{}_adapters_then_base")
"""Cases that include the products with the base."""
LOADS = {"decode32x8": Load(32, 8), "decode32x32": Load(32, 32), "prefill4096x8": Load(4096, 8)}
CHANGES: dict[str, list[dict[str, Any]]] = {
    "decode": [
        {"tile": 16}, {"overlap": False},
        {"inputs": 128, "stages": 3}, {"least": 256}, {"least": 1024}, {"programs": 528}, {"programs": 132},
        {"shrink_warps": 2}, {"shrink_warps": 8}, {"stages": 3},
        {"outputs": 64}, {"outputs": 256}, {"expand_warps": 4},
    ],
    "prefill": [
        {"overlap": False}, {"inputs": 128, "shrink_warps": 8}, {"tile": 128}, {"outputs": 128},
        {"outputs": 128, "expand_warps": 8}, {"ranks": 64},
    ],
}  # fmt: skip


class Linears:
    """The weights of all linears, the factors of the adapters, and buffers of x and y for a load."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        groups = [
            Group(kind.inputs, {f"{layer}.{name}": size for name, size in kind.outputs.items()})
            for layer in range(LAYERS)
            for kind in KINDS.values()
        ]
        self.table = AdapterTable(SLOTS, groups, dtype=torch.bfloat16, device="cuda")
        self.weights = [
            [normal(size, group.inputs, scale=0.02) for size in group.outputs.values()] for group in groups
        ]
        for slot, rank in zip(range(1, SLOTS), itertools.cycle(RANKS)):
            self.table.set(slot, {name: factors(rank, *shape) for name, shape in self.table.shapes.items()})
        self.buffers(LOADS["decode32x8"])

    def buffers(self, load: Load) -> None:
        """Create x and y for a load. Groups of the same kind share them."""
        self.load, self.slots = load, load.slots().cuda()
        x = {size: normal(load.rows, size) for size in (HIDDEN, FFN)}
        ys = [
            [torch.zeros(load.rows, size, device="cuda", dtype=torch.bfloat16) for size in k.outputs.values()]
            for k in KINDS.values()
        ]
        self.x = [x[group.inputs] for group in self.table.groups]
        self.ys = [y for _ in range(LAYERS) for y in ys]

    def rows(self, tuning: Tuning | None = None) -> Rows:
        """Return the rows of the load in the form of the kernels."""
        rows = Rows(self.table, self.load.rows, tuning)
        rows.slots.copy_(self.slots)
        return rows

    def each(self) -> Iterator[tuple[int, torch.Tensor, list[torch.Tensor], list[torch.Tensor]]]:
        """Yield index, x, outputs and weights of each group."""
        yield from zip(range(len(self.x)), self.x, self.ys, self.weights, strict=True)


def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).mul_(scale)


def factors(rank: int, outputs: int, inputs: int) -> SlotFactors:
    return SlotFactors(b=normal(outputs, rank, scale=0.02), scale=2.0, a=normal(rank, inputs, scale=0.02))


def grouped(linears: Linears, rows: Rows, *, before: bool = False, after: bool = False) -> None:
    """Run our kernels, with the products of the base before them, after them or without them."""
    rows.prepare()
    for group, x, ys, weights in linears.each():
        if before:
            base(x, ys, weights, beta=0)
        grouped_lora(x, ys, rows, group, accumulate=not after)
        if after:
            base(x, ys, weights, beta=1)


def base(x: torch.Tensor, ys: list[torch.Tensor], weights: list[torch.Tensor], *, beta: int) -> None:
    for y, weight in zip(ys, weights, strict=True):
        if beta:
            y.addmm_(x, weight.t())
        else:
            torch.mm(x, weight.t(), out=y)


def all_base(linears: Linears) -> None:
    for _, x, ys, weights in linears.each():
        base(x, ys, weights, beta=0)


def loop(linears: Linears, members: dict[int, torch.Tensor]) -> None:
    """Run PEFT's mixed batch: for each adapter, its rows are gathered, multiplied and added."""
    for group, x, ys, _ in linears.each():
        for part, y in enumerate(ys):
            table = linears.table.layer(group, part)
            for slot, index in members.items():
                one = table[slot]
                assert one.a is not None
                update = functional.linear(functional.linear(x.index_select(0, index), one.a), one.b)
                y.index_add_(0, index, update.mul_(one.scale))


Stacks = list[list[tuple[torch.Tensor, torch.Tensor]]]


def stacks(linears: Linears) -> Stacks:
    """Return the adapters of every linear as A (S × R × I) and B (S × O × R), padded to one rank."""
    made: Stacks = []
    for group, x, ys, _ in linears.each():
        made.append([])
        for part, y in enumerate(ys):
            a = x.new_zeros(linears.load.adapters, WIDEST, x.shape[1])
            b = x.new_zeros(linears.load.adapters, y.shape[1], WIDEST)
            for slot, one in linears.table.layer(group, part).items():
                if slot <= linears.load.adapters:
                    assert one.a is not None
                    a[slot - 1, : len(one.a)], b[slot - 1, :, : len(one.a)] = one.a, one.scale * one.b
            made[-1].append((a, b))
    return made


def padded(linears: Linears, made: Stacks) -> None:
    """Run one batched product: rows gather their factors (decoding) or are equal blocks (prefill)."""
    index, load = linears.slots - 1, linears.load
    for group, x, ys, _ in linears.each():
        for (a, b), y in zip(made[group], ys, strict=True):
            if load.rows <= DECODE:
                h = torch.bmm(a.index_select(0, index), x.unsqueeze(2))
                y.add_(torch.bmm(b.index_select(0, index), h).squeeze(2))
            else:
                h = torch.bmm(x.view(load.adapters, -1, x.shape[1]), a.transpose(1, 2))
                y.view(load.adapters, -1, y.shape[1]).baddbmm_(h, b.transpose(1, 2))


def replay(graph: torch.cuda.CUDAGraph, samples: int = SAMPLES, budget: float = 20.0) -> list[float]:
    """Return milliseconds of a replay, for samples of as many replays as fit into `budget` milliseconds."""

    def sample(times: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / times

    sample(1)
    times = max(1, min(20, int(budget / sample(1))))
    return [sample(times) for _ in range(samples)]


def check(linears: Linears, rows: Rows, members: dict[int, torch.Tensor]) -> None:
    """Raise an error if the kernels and the loop disagree, since times of wrong results mean nothing."""
    results = []
    for step in (partial(loop, linears, members), partial(grouped, linears, rows)):
        for y in itertools.chain(*linears.ys):
            y.zero_()
        step()
        results.append(torch.cat([y.float().flatten() for y in itertools.chain(*linears.ys[: len(KINDS)])]))
    expected, found = results
    error = float((found - expected).norm() / expected.norm())
    assert error < 0.05, f"the kernels' result is {error:.2g} off"


def steps(linears: Linears) -> dict[str, Step]:
    """Return the cases for the load of the present buffers."""
    members = {
        slot: (linears.slots == slot).nonzero().flatten() for slot in range(1, linears.load.adapters + 1)
    }
    rows = linears.rows()
    check(linears, rows, members)
    return {
        "base": partial(all_base, linears),
        "{}_adapters": partial(grouped, linears, rows),
        "padded_{}": partial(padded, linears, stacks(linears)),
        "peft_{}": partial(loop, linears, members),
        SUMS[0]: partial(grouped, linears, rows, before=True),
        SUMS[1]: partial(grouped, linears, rows, after=True),
    }


def bound(linears: Linears) -> tuple[float, float]:
    """Return the bytes of the factors of the load, and the bytes with x read and y read and written."""
    load = linears.load
    sizes = [(rank, *shape) for shape in linears.table.shapes.values() for rank in RANKS]
    weights = sum(2 * rank * (outputs + inputs) for rank, outputs, inputs in sizes)
    weights *= load.adapters // len(RANKS)
    moved = sum(x.nbytes + 2 * sum(y.nbytes for y in ys) for _, x, ys, _ in linears.each())
    return float(weights), float(weights + moved)


def run(linears: Linears, name: str) -> list[dict[str, Any]]:
    """Measure one load."""
    linears.buffers(LOADS[name])
    graphs = {case: capture(step) for case, step in steps(linears).items()}
    found: dict[str, list[float]] = {case: [] for case in graphs}
    for _ in range(ROUNDS):
        for case, graph in graphs.items():
            found[case] += replay(graph)
    rows = []

    def keep(case: str, metric: str, value: float, unit: str, **more: Any) -> None:
        rows.append(record("adapter_kernels", f"{case}/{linears.load.place}", metric, value, unit, **more))

    floor, count = statistics.median(found["base"]), linears.load.adapters
    limits = [1e3 * size / BANDWIDTH for size in bound(linears)]
    for case, ms in zip(("limit_factors", "limit"), limits, strict=True):
        keep(f"{case}_{count}", "ms_per_step", ms, "ms")
        print(f"{name} {case:14} {ms:8.3f} ms", flush=True)
    for case, samples in found.items():
        cuts, middle = statistics.quantiles(samples, n=10), statistics.median(samples)
        added = middle - floor if case in SUMS else middle
        keep(case.format(count), "ms_per_step", middle, "ms", p20=cuts[1], p80=cuts[7], n=len(samples))
        keep(case.format(count), "adapters_over_base", added / floor, "ratio")
        if case not in (*SUMS, "base"):
            keep(case.format(count), "bytes_over_limit", middle / limits[1], "ratio")
        print(
            f"{name} {case.format(count):24} {middle:8.3f} ms [{cuts[1]:.3f}, {cuts[7]:.3f}]  adapters "
            f"{added:7.3f} ms, {100 * added / floor:6.1f} % of the base",
            flush=True,
        )
    return rows


def tune(linears: Linears, name: str) -> None:
    """Try other constants for a load, and change one at a time."""
    linears.buffers(LOADS[name])
    decoding = linears.load.rows <= DECODE
    start = Tuning.choose(linears.load.rows, "cuda")
    found = [
        (attempt(linears, start, change), change)
        for change in ({}, *CHANGES["decode" if decoding else "prefill"])
    ]
    ms, change = min(found, key=lambda item: item[0])
    print(f"{name}: {ms:.3f} ms with {replace(start, **change)}", flush=True)


def attempt(linears: Linears, start: Tuning, change: dict[str, Any]) -> float:
    """Return the milliseconds of the adapters alone with some constants changed.

    In a prefill, the adapters are written before the products of the base. The result is infinity if the
    device refuses the constants.
    """
    try:
        rows = linears.rows(replace(start, **change))
        after = linears.load.rows > DECODE
        ms = statistics.median(replay(capture(partial(grouped, linears, rows, after=after))))
    except Exception as error:  # noqa: BLE001  (Triton has many kinds: out of resources, failed compilation)
        print(f"{change}: {type(error).__name__}: {str(error)[:200]}", flush=True)
        return float("inf")
    print(f"{ms:8.3f} ms  {change or 'as chosen'}", flush=True)
    return ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--loads", default=",".join(LOADS), help="which to measure, of " + ", ".join(LOADS))
    parser.add_argument("--tune", action="store_true", help="try other constants instead of measuring")
    parser.add_argument("--commit")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU")
    linears, rows = Linears(), []
    for name in arguments.loads.split(","):
        if arguments.tune:
            tune(linears, name)
            continue
        rows += [{**row, "commit": arguments.commit or row["commit"]} for row in run(linears, name)]
        # Save after each load, so that an interrupted run loses one load at most.
        save("adapter_kernels", rows)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
