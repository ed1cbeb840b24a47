"""Measure training of a base of 8 B parameters on several GPUs with ZeRO-2 and ZeRO-3, against one GPU.

    python benchmarks/bench_train_sharded.py [--gpus 2] [--shape 8b] [--steps 10] [--folder FOLDER]
                                             [--commit HASH]

Each case loads the base, trains lora of rank 16 on rows of 512 tokens, evaluates, saves the adapter and
squeezes it, with one process for each GPU. All cases take the same 8 rows in each step. The results are

    ms_per_step            median over the steps after the second
    gib_per_gpu            peak of the allocator while training and evaluating, the largest of all GPUs
    loss_relative_error    largest difference to the losses of one GPU, over all steps and the validation
    gib_loading            peak of the allocator while the base is loaded, the largest of all GPUs
    host_gib_loading       largest sum over all processes of the proportional set size while they load, less
                           the sum before

A base with random weights is written to FOLDER first, unless there is one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch._C._distributed_c10d import FileStore
from torch.multiprocessing.spawn import spawn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.bench_train_step import SHAPES
from benchmarks.records import record, save
from rayft.artifacts import AdapterArtifact
from rayft.data.source import DataConfig
from rayft.methods.base import MethodConfig
from rayft.models.load import ModelConfig
from rayft.models.tiny import byte_tokenizer
from rayft.numerics import tolerance
from rayft.squeeze.rank import squeeze
from rayft.train.run import EvaluateConfig, OptimConfig, RunConfig, ScaleConfig
from rayft.train.session import Session
from rayft.train.trainer import Reporter, Trainer
from rayft.train.worker import Worker

RANK, SQUEEZED, ROWS, TOKENS, WARM = 16, 4, 8, 512, 2
LR = 1e-4
"""At ten times this rate the losses of the 8 B base are unstable, which multiplies rounding errors."""


@dataclass(frozen=True)
class Case:
    """One way to train: a ZeRO stage on a number of GPUs."""

    shape: str
    zero: Literal[2, 3]
    gpus: int

    @property
    def name(self) -> str:
        """Name of the case in the results."""
        return f"{self.shape}/zero{self.zero}/{self.gpus}gpu{'s' if self.gpus > 1 else ''}"


def write_base(shape: str, folder: Path) -> Path:
    """Write a Llama with random bfloat16 weights, created on the device, and a byte-level tokenizer."""
    if (folder / "config.json").is_file():
        return folder
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        **SHAPES[shape],
        max_position_embeddings=2048,
        tie_word_embeddings=shape == "135m",
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_data(folder: Path) -> Path:
    """Write sentences of random words, which an adapter learns to repeat."""
    file, draw = folder / "repeat.jsonl", random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(400)]
    lines = []
    for number in range(480):
        text = " ".join(draw.choices(words, k=draw.randint(10, 45)))
        lines.append(json.dumps({"prompt": f"{number}. Repeat: {text}", "completion": text[:120]}))
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def make_run(case: Case, base: Path, data: Path, steps: int, lr: float = LR) -> RunConfig:
    """Return the run of a case."""
    cuda = torch.cuda.is_available()
    return RunConfig(
        model=ModelConfig(name=str(base)),
        data=DataConfig(source="jsonl", name=str(data), val=16, test=16, max_length=TOKENS),
        method=MethodConfig(name="lora", rank=RANK),
        optim=OptimConfig(lr=lr, steps=steps, rows_per_step=ROWS, warmup=1),
        scale=ScaleConfig(
            device="cuda" if cuda else "cpu",
            dtype="bfloat16" if cuda else "float32",
            zero=case.zero,
            workers=case.gpus,
            threads=1,
        ),
        evaluate=EvaluateConfig(checkpoint_seconds=3600),
    )


class StepTimes(Reporter):
    """Records the seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the seconds of a step."""
        self.seconds.append(metrics["step_seconds"])


def train_worker(rank: int, run: RunConfig, folder: Path, started: Any) -> None:
    """Train as one of the workers of a case, and write the measurements to the folder."""
    world, cuda = run.scale.workers, run.scale.device == "cuda"
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    if cuda:
        torch.cuda.set_device(rank)
        torch.zeros(1, device="cuda")
    store = FileStore(str(folder / "store"), world)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world)
    worker = Worker.current(f"cuda:{rank}" if cuda else "cpu")
    # Import what loading needs and create the communicator before the measurement begins.
    import deepspeed  # noqa: F401
    import transformers  # noqa: F401

    worker.total(1.0)
    started.wait()
    began = time.perf_counter()
    session = Session.open(run, worker, identify_base=False)
    loaded = time.perf_counter() - began
    loading = torch.cuda.max_memory_allocated() if cuda else 0
    worker.total(1.0)
    started.wait()
    reporter = StepTimes()
    result = Trainer(run, session, reporter, folder / "run").fit()
    found = {
        "loading": loading,
        "loaded_seconds": loaded,
        "peak": result.peak_memory,
        "losses": [loss for _, loss in result.train_curve] + [result.val_loss],
        "seconds": reporter.seconds,
        "folder": result.folder,
    }
    (folder / f"worker{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


def measure(case: Case, base: Path, data: Path, steps: int) -> dict[str, Any]:
    """Run a case in new processes."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, context = Path(temporary), mp.get_context("spawn")
        started = context.Barrier(case.gpus + 1)
        run = make_run(case, base, data, steps)
        group = spawn(train_worker, (run, folder, started), nprocs=case.gpus, join=False)
        assert group is not None
        with suppress(threading.BrokenBarrierError):
            started.wait(300)
            before = peak = host_bytes(group.pids())
            # Once all workers have loaded, they wait at the barrier for the second time.
            while started.n_waiting < case.gpus and all(process.is_alive() for process in group.processes):
                peak = max(peak, host_bytes(group.pids()))
                time.sleep(0.02)
            started.wait(60)
        while not group.join():
            pass
        found = [
            json.loads((folder / f"worker{rank}.json").read_text(encoding="utf-8"))
            for rank in range(case.gpus)
        ]
        _squeeze(AdapterArtifact.load(found[0]["folder"]), folder / "squeezed")
    return {
        "ms": [seconds * 1e3 for seconds in found[0]["seconds"][WARM:]],
        "first": found[0]["seconds"][0],
        "gib": max(one["peak"] for one in found) / 2**30,
        "gib_loading": max(one["loading"] for one in found) / 2**30,
        "host_gib_loading": (peak - before) / 2**30,
        "loaded_seconds": max(one["loaded_seconds"] for one in found),
        "losses": found[0]["losses"],
    }


def host_bytes(pids: list[int]) -> int:
    """Return the sum of the proportional set sizes of processes, in which shared pages count once."""
    total = 0
    for pid in pids:
        with suppress(OSError):
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
            total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return total * 1024


def _squeeze(artifact: AdapterArtifact, folder: Path) -> None:
    squeezed = squeeze(artifact, rank=SQUEEZED)
    squeezed.save(folder)
    assert AdapterArtifact.load(folder).rank == SQUEEZED


def records(case: Case, found: Mapping[str, Any], one: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the results of measurements; `one` has those of one GPU."""
    cuts = statistics.quantiles(found["ms"], n=10)
    spread = {"p20": cuts[1], "p80": cuts[7], "n": len(found["ms"])}
    pairs = zip(found["losses"], one["losses"], strict=True)
    error = max(abs(mine - its) / its for mine, its in pairs)
    values = {
        "gib_per_gpu": (found["gib"], "GiB"),
        "loss_relative_error": (error, "ratio"),
        "gib_loading": (found["gib_loading"], "GiB"),
        "host_gib_loading": (found["host_gib_loading"], "GiB"),
        "first_step_seconds": (found["first"], "s"),
        "loading_seconds": (found["loaded_seconds"], "s"),
    }
    rows = [record("train_sharded", case.name, "ms_per_step", statistics.median(found["ms"]), "ms", **spread)]
    return rows + [record("train_sharded", case.name, m, value, unit) for m, (value, unit) in values.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpus", type=int, default=max(2, torch.cuda.device_count()))
    parser.add_argument("--shape", default="8b", choices=SHAPES)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "rayft-sharded")
    parser.add_argument("--commit")
    arguments = parser.parse_args()
    folder: Path = arguments.folder / arguments.shape
    folder.mkdir(parents=True, exist_ok=True)
    base, data = write_base(arguments.shape, folder / "base"), write_data(folder)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    one: dict[str, Any] = {}
    apart: list[str] = []
    # On one GPU, ZeRO-2 only adds fp32 masters of the adapters, so it is the case without sharding.
    shape, gpus = arguments.shape, arguments.gpus
    for case in (Case(shape, 2, 1), Case(shape, 2, gpus), Case(shape, 3, gpus)):
        found = measure(case, base, data, arguments.steps)
        one = one or found
        rows = [{**row, "commit": arguments.commit or row["commit"]} for row in records(case, found, one)]
        save("train_sharded", rows)
        print(case.name, {row["metric"]: float(f"{row['value']:.4g}") for row in rows}, flush=True)
        print("  losses", [round(loss, 4) for loss in found["losses"]], flush=True)
        error = next(row["value"] for row in rows if row["metric"] == "loss_relative_error")
        allowed = tolerance(torch.bfloat16, SHAPES[arguments.shape]["intermediate_size"])
        if error > allowed:
            apart.append(f"{case.name}: the losses differ by {error:.1e}, allowed are {allowed:.1e}")
    if apart:
        sys.exit("\n".join(apart))


if __name__ == "__main__":
    main()
