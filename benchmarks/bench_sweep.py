"""Measure a whole sweep, and the same trials by Ray Tune, Ray Train, PEFT and DeepSpeed as users write it.

    python benchmarks/bench_sweep.py [--parts cold,hand_cold,warm,hand,tune,shared] [--shape 135m]

Sixteen trials (lora and cla, four ranks, two rates) of 60 steps of 4 rows of 512 tokens, each evaluated three
times, none stopped; nothing is set but the space. `cold`: `rayft sweep` without prepared data, probes and
compiled kernels. `warm`: with them. `hand_cold` and `hand`: the same with the best settings given. `tune`: a
few trials one after the other, whose marginal time counts. `shared`: several of them share the GPU. Weights
are random. Tune's trials train LoRA in place of cla.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.records import gpu_name, record, save

BENCH, OVERHEAD = "sweep_makespan", "sweep_overhead"
SHAPES: dict[str, dict[str, Any]] = {
    "135m": {"hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536,
             "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152},
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192,
           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512},
}  # fmt: skip
BEST = (
    "scale.graphs=true",
    "scale.fused=true",
    "scale.accumulation=1",
    "scale.activation_checkpointing=false",
)
BEST_SLOTS = {"135m": 16, "1b": 1}
"""The number of slots with which a shape trains fastest."""
TUNE_TRIALS = 4
RANKS, RATES = (4, 8, 16, 32), (1e-3, 3e-4)


def make_base(folder: Path, shape: str) -> None:
    """Write a Llama with random weights and a tokenizer of bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rayft.models.tiny import byte_tokenizer

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=2048)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def make_data(file: Path, count: int) -> None:
    """Write questions and answers of some hundred bytes."""
    draw = random.Random(0)
    words = [f"w{number}" for number in range(200)]
    with file.open("w", encoding="utf-8") as out:
        for _ in range(count):
            asked = [draw.choice(words) for _ in range(draw.randint(10, 40))]
            line = {"prompt": " ".join(asked), "completion": " ".join(sorted(asked)[:3])}
            out.write(json.dumps(line) + "\n")


def configuration(folder: Path, trials: int, steps: int, rows: int = 4) -> Path:
    """Write the sweep's configuration: the base, the data, and the space."""
    rates = [*RATES][: max(1, trials // (2 * len(RANKS)))]
    space = {"ranks": [*RANKS], "lr": rates}
    content = {
        "model": {"name": str(folder / "base")},
        "data": {
            "source": "jsonl",
            "name": str(folder / "data.jsonl"),
            "val": 64,
            "test": 64,
            "max_length": 512,
        },
        "optim": {"steps": steps, "rows_per_step": rows},
        "evaluate": {"every": steps // 3, "val_examples": 64, "base_examples": 64},
        "sweep": {"methods": {"lora": space, "cla": space}, "grace": steps, "trials": trials},
        "squeeze": {"ranks": []},
        "output": str(folder / "out"),
    }  # fmt: skip
    place = folder / "sweep.yaml"
    place.write_text(yaml.safe_dump(content), encoding="utf-8")
    return place


CACHES = {"RAYFT_CACHE": "cache", "TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}


STAGE = re.compile(r"  (?P<name>\S.*): (?P<seconds>[0-9.]+) s")
"""A line of the log at the end of a stage."""


def run_sweep(
    folder: Path, config: Path, settings: Sequence[str] = ()
) -> tuple[float, dict[str, float], dict[str, float]]:
    """Run `rayft sweep` in a process of its own; return its seconds, those of its stages, and the lanes'."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    environment = {**os.environ, **{name: str(folder / place) for name, place in CACHES.items()}}
    options = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-m", "rayft.cli", "sweep", str(config), *options]
    said: list[tuple[float, str]] = []
    started = time.monotonic()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, encoding="utf-8") as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append((time.monotonic() - started, line))
            print(line, end="", flush=True)
    seconds = time.monotonic() - started
    if process.returncode:
        raise SystemExit(process.returncode)
    left = json.loads((folder / "out" / "sweep.json").read_text(encoding="utf-8"))
    lanes = {f"lanes/{what}": spent for what, spent in left["spent"].items()}
    return seconds, stages_of(said, seconds), lanes


def stages_of(said: Sequence[tuple[float, str]], seconds: float) -> dict[str, float]:
    """Divide the time of a sweep.

    Args:
        said: the lines of its log, and how many seconds after its start each of them came.
        seconds: the whole time.

    Returns:
        Part → seconds: the stages as the log gives them, and what is before, between and after them.
    """
    begin = next(at for at, line in said if line.rstrip().endswith("…"))
    ended = [(at, found) for at, line in said if (found := STAGE.fullmatch(line.rstrip()))]
    stages = {found["name"]: float(found["seconds"]) for _, found in ended}
    last = ended[-1][0]
    return {
        "before the first stage": begin,
        **stages,
        "between the stages": last - begin - sum(stages.values()),
        "after the last stage": seconds - last,
    }


def run_tune(folder: Path, trials: int, share: float, steps: int) -> dict[str, Any]:
    """Run the trials by Tune; return its line of results."""
    command = [
        sys.executable, str(Path(__file__).with_name("sweep_by_tune.py")), "--base", str(folder / "base"),
        "--data", str(folder / "data.jsonl"), "--trials", str(trials), "--share", str(share),
        "--steps", str(steps),
    ]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def whole(ended: list[float], at_once: int, trials: int) -> float:
    """Return the time of all trials: that of the first round, and the marginal time of the rounds after it.

    Args:
        ended: when each trial ended, sorted.
        at_once: number of trials that ran at the same time.
        trials: number of trials of a sweep.
    """
    first = ended[at_once - 1]
    if trials <= at_once:
        return first
    marginal = (ended[-1] - first) / len(ended[at_once:])
    return first + marginal * (trials - at_once)


class Bench:
    """Measures parts of the benchmark, and keeps their results."""

    def __init__(self, folder: Path, shape: str, trials: int, steps: int, rows: int) -> None:
        self._folder, self._shape, self._trials, self._steps = folder, shape, trials, steps
        self._config = configuration(folder, trials, steps, rows)
        self._kept = folder / f"{shape}-{trials}.json"
        self.seconds: dict[str, float] = {}
        """Part → seconds, also of earlier calls with the same folder."""
        if self._kept.is_file():
            self.seconds = json.loads(self._kept.read_text(encoding="utf-8"))
        self.records: list[dict[str, Any]] = []

    def sweep(self, case: str) -> None:
        """Measure rayft; for the cold cases without what earlier sweeps have left in the caches."""
        if case.endswith("cold"):
            for place in CACHES.values():
                shutil.rmtree(self._folder / place, ignore_errors=True)
        settings = (*BEST, f"sweep.slots={BEST_SLOTS[self._shape]}") if case.startswith("hand") else ()
        seconds, stages, lanes = run_sweep(self._folder, self._config, settings)
        self._add(case, seconds)
        for stage, spent in {**stages, **lanes}.items():
            print(f"  {stage}: {spent:.1f} s", flush=True)
            self.records.append(record(OVERHEAD, f"{self._shape}/{case}/{stage}", "seconds", spent, "s"))

    def tune(self, case: str, share: float) -> None:
        """Measure Tune, whose trials take a share of the GPU."""
        at_once = round(1 / share)
        further = max(at_once, TUNE_TRIALS - 1) if at_once < self._trials else 0
        count = at_once + further
        took = run_tune(self._folder, count, share, self._steps)
        self._add(case, whole(took["ended"], at_once, self._trials), n=count)

    def compare(self) -> None:
        """Add how many times as long others took: Tune, its fastest way first, then settings by hand."""
        others = {case: took for case, took in self.seconds.items() if case.startswith("tune")}
        fastest = sorted(others, key=others.__getitem__)
        if fastest and "cold" in self.seconds:
            ours, theirs = self.seconds["cold"], others[fastest[0]]
            case = self._case(gpu_name(self.records[0]["device"]).lower())
            found = [
                ("seconds", ours, "s"),
                ("rival_seconds", theirs, "s"),
                ("over_rival", theirs / ours, "x"),
            ]
            self.records += [record(BENCH, case, *values) for values in found]
        for case, by_hand in (("cold", "hand_cold"), ("warm", "hand")):
            for name in (*fastest, by_hand):
                if {case, name} <= self.seconds.keys():
                    ratio = self.seconds[name] / self.seconds[case]
                    print(f"{name} over {case}: {ratio:.2f}x", flush=True)
                    self.records.append(record(BENCH, self._case(case), f"{name}_over", ratio, "x"))

    def _add(self, case: str, seconds: float, **more: Any) -> None:
        self.seconds[case] = seconds
        self._kept.write_text(json.dumps(self.seconds), encoding="utf-8")
        print(f"{case}: {seconds:.1f} s", flush=True)
        self.records.append(record(BENCH, self._case(case), "seconds", seconds, "s", **more))

    def _case(self, case: str) -> str:
        return f"{self._trials}_trials/{self._shape}/{case}"


def main() -> None:
    """Measure the parts that were chosen, and save them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", default="cold,warm,tune,shared")
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=4, help="of a step")
    parser.add_argument("--shape", default="135m")
    parser.add_argument("--shares", default="0.25", help="of a GPU, in `shared`: 0.5,0.25")
    parser.add_argument("--folder", help="keeps base, data, caches and what was measured between calls")
    parser.add_argument("--commit")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.folder or scratch).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "base").is_dir():
            make_base(folder / "base", options.shape)
            make_data(folder / "data.jsonl", 2400)
        bench = Bench(folder, options.shape, options.trials, options.steps, options.rows)
        for part in options.parts.split(","):
            if part in ("cold", "hand_cold", "warm", "hand"):
                bench.sweep(part)
            elif part == "tune":
                bench.tune(part, 1.0)
            else:
                for share in map(float, options.shares.split(",")):
                    bench.tune(f"tune_{round(1 / share)}_a_gpu", share)
            # After each part, so that an interrupted run loses one part at most.
            keep(bench.records, options.commit)
        bench.compare()
        keep(bench.records, options.commit)


def keep(records: list[dict[str, Any]], commit: str | None) -> None:
    """Save results."""
    extra = {"commit": commit} if commit else {}
    for name in (BENCH, OVERHEAD):
        save(name, [item | extra for item in records if item["bench"] == name])


if __name__ == "__main__":
    main()
