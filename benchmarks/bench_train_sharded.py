"""A base of 8 B parameters trained on several GPUs under ZeRO-2 and ZeRO-3, against one GPU.

    python benchmarks/bench_train_sharded.py [--gpus 2] [--shape 8b] [--steps 10] [--folder FOLDER]
                                             [--commit HASH]

Each case loads the base, trains lora of rank 16 on rows of 512 tokens, evaluates, saves the adapter and
squeezes it, in one process a GPU; every case takes the same 8 rows a step. Recorded are

    ms_per_step            median over the steps after the second
    gib_per_gpu            the allocator's peak, the largest of all GPUs, training and evaluating
    loss_relative_error    largest difference from one GPU's losses, of all steps and the validation
    gib_loading            the allocator's peak while the base is loaded, the largest of all GPUs
    host_gib_loading       largest sum over all processes of the proportional set size while they load, less
                           what they have before

A base with random weights is written to FOLDER first, unless one is there.
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
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

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
"""At ten times this rate the 8 B base's losses jump up and down, which multiplies what rounding changes."""


@dataclass(frozen=True)
class Case:
    """One way to train: a ZeRO stage on a number of GPUs."""

    shape: str
    zero: int
    gpus: int

    @property
    def name(self) -> str:
        """The case's name in the results."""
        return f"{self.shape}/zero{self.zero}/{self.gpus}gpu{'s' if self.gpus > 1 else ''}"


def write_base(shape: str, folder: Path) -> Path:
    """Write a Llama with random weights in bfloat16, made on the device, and a tokenizer of bytes."""
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
    """Write sentences of made-up words, which an adapter learns to repeat."""
    file, draw = folder / "repeat.jsonl", random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 7))) for _ in range(400)]
    lines = []
    for number in range(480):
        text = " ".join(draw.choices(words, k=draw.randint(10, 45)))
        lines.append(json.dumps({"prompt": f"{number}. Repeat: {text}", "completion": text[:120]}))
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def make_run(case: Case, base: Path, data: Path, steps: int, lr: float = LR) -> RunConfig:
    """Describe a case's run."""
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
    """Keep how long each step took."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep the time of a step."""
        self.seconds.append(metrics["step_seconds"])


def work(rank: int, run: RunConfig, folder: Path, started: Any) -> None:
    """Train as one of a case's workers, and leave what was measured in the folder."""
    world, cuda = run.scale.workers, run.scale.device == "cuda"
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    if cuda:
        torch.cuda.set_device(rank)
        torch.zeros(1, device="cuda")
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world)
    worker = Worker.current(f"cuda:{rank}" if cuda else "cpu")
    # What loading imports, and the communicator, are in memory before the measurement begins.
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
    """Run a case in processes of its own."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, context = Path(temporary), mp.get_context("spawn")
        started = context.Barrier(case.gpus + 1)
        run = make_run(case, base, data, steps)
        group = mp.spawn(work, (run, folder, started), nprocs=case.gpus, join=False)
        assert group is not None
        with suppress(threading.BrokenBarrierError):
            started.wait(300)
            before = peak = host_bytes(group.pids())
            # The workers wait at the barrier's second turn once all have loaded.
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
    """Add up the processes' proportional set sizes: pages that several map count once."""
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
    """Turn what was measured into results; `one` is one GPU's."""
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
    # One GPU holds the fp32 masters of the adapters alone, so that ZeRO-2 is what trains without sharding.
    for zero, gpus in ((2, 1), (2, arguments.gpus), (3, arguments.gpus)):
        case = Case(arguments.shape, zero, gpus)
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
