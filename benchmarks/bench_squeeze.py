"""Measure how exact and how fast squeezing is, and compare it with PEFT's conversion of the same factors.

    python benchmarks/bench_squeeze.py [--device cpu|cuda] [--adapter FOLDER …] [--layers 32] [--commit HASH]

Exactness: singular values, and ΔW at several ranks, are compared with a dense SVD in float64. Errors are
relative to the largest singular value and to ‖ΔW‖. The factors are random ones of condition 1 to 1e6, and
those of trained adapters. Speed: an adapter with the shapes of Llama-3.1-8B, rank 64, all 224 linears, is
squeezed to rank 16. PEFT's `convert_to_lora` converts the same factors of some of its modules (a dense SVD of
each takes long), and is compared with ours on those modules in the same run. Memory: the peak of the process
(on a GPU, of its allocator) above the memory of the source.
"""

from __future__ import annotations

import argparse
import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.records import record, save
from rayft.artifacts import AdapterArtifact
from rayft.methods.base import LoraFactors
from rayft.numerics import generator
from rayft.squeeze.factored_svd import factored_svd, thin_qr
from rayft.squeeze.rank import squeeze

LAYER = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}  # fmt: skip
"""Outputs and inputs of the linears of one layer of Llama-3.1-8B, which has 32 layers."""
SOURCE, TARGET = 64, 16
SIZES = ((96, 64, 16), (300, 700, 32), (1024, 256, 64))
CONDITIONS = (1.0, 1e3, 1e6)
ROUNDS = 5
TIE = 1e-6
"""Relative difference of two singular values below which the best approximation is not unique."""


def random_factors(outputs: int, inputs: int, rank: int, dtype: torch.dtype, *seed: object) -> LoraFactors:
    """Return random B and A with the size of a trained adapter's factors."""
    draw = generator("bench", *seed)
    a, b = torch.randn(rank, inputs, generator=draw), torch.randn(outputs, rank, generator=draw)
    return LoraFactors((a / inputs**0.5).to(dtype), (0.1 * b / outputs**0.5).to(dtype), 2.0)


def conditioned(outputs: int, inputs: int, rank: int, condition: float, dtype: torch.dtype) -> LoraFactors:
    """Return factors whose ΔW has singular values from 1 down to 1/condition, shared unevenly by B and A."""
    draw = generator("condition", outputs, inputs, rank, condition)
    u, v = (
        torch.linalg.qr(torch.randn(size, rank, generator=draw, dtype=torch.float64))[0]
        for size in (outputs, inputs)
    )
    s = torch.logspace(0, -float(torch.log10(torch.tensor(condition))), rank, dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(rank, rank, generator=draw, dtype=torch.float64))
    b, a = (u * s.pow(0.7)) @ turn, turn.t() @ (s.pow(0.3)[:, None] * v.t())
    return LoraFactors(a.to(dtype), b.to(dtype), 0.5)


def relative_errors(factors: LoraFactors, device: str) -> tuple[float, float]:
    """Return the largest errors of singular values and of ΔW over ranks, against a dense SVD in float64."""
    dense = factors.scale * (factors.b.double() @ factors.a.double())
    u, s, vt = torch.linalg.svd(dense, full_matrices=False)
    moved = LoraFactors(factors.a.to(device), factors.b.to(device), factors.scale)
    found = factored_svd(moved).s.cpu()
    values = float((found - s[: len(found)]).abs().max() / s[0])
    small = squeeze(AdapterArtifact({"module": moved}))
    worst = 0.0
    for rank in {1, factors.rank // 2, factors.rank} - {0}:
        got = small.at_rank(rank).modules["module"]
        best = (u[:, :rank] * s[:rank]) @ vt[:rank]
        delta = got.scale * (got.b.cpu().double() @ got.a.cpu().double())
        if rank == len(s) or float(s[rank - 1] - s[rank]) > TIE * float(s[0]):
            error = float((delta - best).norm() / best.norm())
        else:
            # If two singular values are equal, either may be cut, so compare the error that remains.
            lost, least = float((dense - delta).norm()), float((dense - best).norm())
            error = abs(lost - least) / float(dense.norm())
        worst = max(worst, error)
    return values, worst


def exactness(device: str, folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the largest error over all cases, for each dtype of the factors."""
    rows = []
    for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        cases = [random_factors(*size, dtype, *size) for size in SIZES]
        cases += [conditioned(*size, condition, dtype) for size in SIZES for condition in CONDITIONS]
        if dtype == torch.float32:
            for folder in folders:
                cases += list(AdapterArtifact.load(folder).modules.values())[:42]
        cases = [LoraFactors(f.a.to(dtype), f.b.to(dtype), f.scale) for f in cases]
        errors = [relative_errors(factors, device) for factors in cases]
        values, deltas = (max(error[i] for error in errors) for i in (0, 1))
        rows.append(record("squeeze_exactness", name, "max_relative_error", max(values, deltas), "ratio",
                           n=len(cases)))  # fmt: skip
        rows.append(record("squeeze_exactness", name, "singular_values", values, "ratio", n=len(cases)))
        rows.append(record("squeeze_exactness", name, "delta", deltas, "ratio", n=len(cases)))
        print(f"{name}: {len(cases)} modules, singular values {values:.1e}, ΔW {deltas:.1e}", flush=True)
    return rows


def llama(layers: int, device: str) -> AdapterArtifact:
    """Return an adapter with the shapes of the 8 B model, in float32."""
    return AdapterArtifact(
        {
            f"model.layers.{layer}.{name}": _to(
                random_factors(*size, SOURCE, torch.float32, layer, name), device
            )
            for layer in range(layers)
            for name, size in LAYER.items()
        }
    )


def _to(factors: LoraFactors, device: str) -> LoraFactors:
    return LoraFactors(factors.a.to(device), factors.b.to(device), factors.scale)


def timed(run: Callable[[], object], device: str, rounds: int) -> list[float]:
    """Return the seconds of several calls, after one warm-up call unless there is only one."""
    seconds = []
    for _ in range(rounds + (rounds > 1)):
        started = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return seconds[-rounds:]


@contextmanager
def peak(device: str) -> Iterator[dict[str, float]]:
    """Measure the peak of memory in a block above the memory before it; `gib` of the yielded object."""
    found: dict[str, float] = {}
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield found
        found["gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
        return
    process, done = psutil.Process(), threading.Event()
    before = most = process.memory_info().rss

    def watch() -> None:
        nonlocal most
        while not done.wait(0.01):
            most = max(most, process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
        found["gib"] = (most - before) / 2**30


def peft_model(modules: Mapping[str, LoraFactors], device: str) -> Any:
    """Return PEFT's LoRA layers with these factors, over base weights of zeros that are not read."""
    from peft import LoraConfig, get_peft_model

    class Base(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, factors in modules.items():
                outputs, inputs = factors.b.shape[0], factors.a.shape[1]
                self.add_module(
                    name.replace(".", "_"), torch.nn.Linear(inputs, outputs, bias=False, device=device)
                )

    names = [name.replace(".", "_") for name in modules]
    model: Any = get_peft_model(Base(), LoraConfig(r=SOURCE, lora_alpha=2 * SOURCE, target_modules=names))
    for name, factors in modules.items():
        layer = model.base_model.model.get_submodule(name.replace(".", "_"))
        layer.lora_A["default"].weight.data.copy_(factors.a)
        layer.lora_B["default"].weight.data.copy_(factors.b)
    return model


def convert_both(artifact: AdapterArtifact, device: str, names: Sequence[str]) -> tuple[float, float, float]:
    """Convert some modules with PEFT and with rayft; return PEFT's seconds, ours, and PEFT's GiB."""
    from peft import convert_to_lora

    some = {name: factors for name, factors in artifact.modules.items() if name.endswith(tuple(names))}
    some = dict(list(some.items())[: len(names)])
    model = peft_model(some, device)
    with peak(device) as memory:
        (theirs,) = timed(lambda: convert_to_lora(model, rank=TARGET), device, 1)
    ours = sorted(timed(lambda: squeeze(AdapterArtifact(some), rank=TARGET), device, ROUNDS))[ROUNDS // 2]
    print(
        f"PEFT on {len(some)} modules: {theirs:.2f} s; ours {ours:.3f} s: {theirs / ours:.0f} times",
        flush=True,
    )
    return theirs, ours, memory["gib"]


def speed(device: str, layers: int, names: Sequence[str]) -> list[dict[str, Any]]:
    """Time the whole adapter, and PEFT's conversion of some of its modules."""
    place = "gpu" if device == "cuda" else "cpu"
    artifact = llama(layers, device)
    with peak(device) as memory:
        squeeze(artifact, rank=TARGET)
    seconds = sorted(timed(lambda: squeeze(artifact, rank=TARGET), device, ROUNDS))
    middle = seconds[len(seconds) // 2]
    print(
        f"{len(artifact.modules)} modules: {middle:.2f} s, {memory['gib']:.2f} GiB above the source",
        flush=True,
    )
    theirs, ours, their_gib = convert_both(artifact, device, names)
    case = f"llama8b_r64_to_r16/{place}"
    spread = {"p20": seconds[0], "p80": seconds[-1], "n": len(seconds)}
    rows = [
        record("squeeze_speed", case, "seconds", middle, "s", **spread),
        record("squeeze_speed", case, "gib", memory["gib"], "GiB"),
        record("squeeze_speed", case, "speedup_over_peft", theirs / ours, "ratio", n=len(names)),
        record("squeeze_speed", f"peft_{len(names)}_modules/{place}", "seconds", theirs, "s"),
        record("squeeze_speed", f"peft_{len(names)}_modules/{place}", "gib", their_gib, "GiB"),
        record("squeeze_speed", f"ours_{len(names)}_modules/{place}", "seconds", ours, "s"),
    ]
    if device == "cuda":
        # Time both kinds of QR on this device, with all modules of one shape as a stack.
        stack = torch.stack(
            [artifact.modules[n].b for n in artifact.modules if n.endswith("up_proj")]
        ).double()
        for way, by_cholesky in (("cholesky", True), ("householder", False)):
            each = sorted(timed(functools.partial(thin_qr, stack, by_cholesky=by_cholesky), device, 3))
            print(f"QR of {tuple(stack.shape)} by {way}: {each[1]:.4f} s", flush=True)
            rows.append(record("squeeze_speed", f"qr_{way}/{place}", "seconds", each[1], "s"))
    return rows


def main() -> None:
    """Measure, and save the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--adapter", type=Path, action="append", default=[], help="folder of a trained adapter"
    )
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument(
        "--peft", default="q_proj,k_proj,gate_proj", help="linears of a layer for PEFT to convert"
    )
    parser.add_argument("--commit", help="commit to record, if the checkout has no git")
    arguments = parser.parse_args()
    rows = [
        *exactness(arguments.device, arguments.adapter),
        *speed(arguments.device, arguments.layers, arguments.peft.split(",")),
    ]
    commit = arguments.commit
    for bench in ("squeeze_exactness", "squeeze_speed"):
        mine = [row for row in rows if row["bench"] == bench]
        save(bench, [{**row, "commit": commit or row["commit"]} for row in mine])


if __name__ == "__main__":
    main()
