"""Measure a training step of every method, relative to its floor and to PEFT, in one run on one GPU.

    python benchmarks/bench_train_step.py [--shapes 135m,1b,8b] [--cases cla,lora,…] [--commit HASH]
    python benchmarks/bench_train_step.py --fused [--places 1b/16x512/graph] [--trainer]
    python benchmarks/bench_train_step.py --profile [--shapes 1b] [--cases floor,lora]

The floor is the frozen base: forward, and backward to its input. The step of a method is forward, backward,
and fused AdamW over the trained parameters. The weights are random in bfloat16, the rank is 16 on all
linears, there is no activation checkpointing, and the loss is over all tokens. Cases take turns, `ROUNDS`
times, so that a drifting clock affects all of them. In `…/graph` the whole step, also of the floor, is
captured once and replayed as a CUDA graph; elsewhere the launches of kernels dominate small steps.
In `1x8192` and `1x16384` a row has 8 examples of equal length, which attend by segments. Beside them are LoRA
and PEFT's LoRA with a mask of all pairs of tokens, and PEFT's with a row for each example (`…_unpacked`).
`--fused` measures the floor, `cla` and LoRA with a plain base and with a fused one (`…_fused`), whose loss is
rayft's; all are compared with the plain floor. With `--trainer` both also train by rayft's `Trainer`
(`lora_trainer`, `cla_trainer`: DeepSpeed ZeRO-2, float32 masters, packed rows), whose whole steps are timed.
`--profile` lists the kernels that a replayed step spends its time in, compared with the floor.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.capture import capture
from benchmarks.records import record, save
from rayft.data.pack import Batch
from rayft.data.section import DataConfig
from rayft.data.template import Encoded
from rayft.evaluate.loss import batch_loss
from rayft.methods import METHODS
from rayft.methods.base import Chain, ChainConfig, MethodConfig
from rayft.models.attention import attend_by_segments, dense_mask, mask_for
from rayft.models.fuse import fuse, unfuse
from rayft.models.inject import advance, clear, inject, wrap
from rayft.models.load import LoadedModel
from rayft.train.run import OptimConfig, RunConfig, ScaleConfig
from rayft.train.session import Session
from rayft.train.trainer import Reporter, Trainer
from rayft.train.worker import Worker

RANK, ROUNDS, LINKS = 16, 2, 4
SHAPES: dict[str, dict[str, Any]] = {
    "135m": {"hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536,
             "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152},
    "1b": {"hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192,
           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000},
    "8b": {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336,
           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
BATCHES = {
    "135m": [(4, 512), (16, 512)], "1b": [(4, 512), (16, 512), (1, 8192), (1, 16384)], "8b": [(4, 512)],
}  # fmt: skip
RATIOS = ("time_over_floor", "memory_over_floor")
EXAMPLES = 8
"""Examples in the only row of a batch."""
LONG = ("floor", "lora", "cla", "lora_masked", "peft_lora_bf16_masked", "peft_lora_bf16_unpacked")
"""The cases of batches of one row."""
FUSED = ("floor", "floor_fused", "cla", "cla_fused", "lora", "lora_fused")
TRAINED = ("cla_trainer", "lora_trainer")
FUSED_PLACES = (
    "135m/4x512/graph", "1b/16x512/graph", "1b/1x8192", "1b/1x8192/graph", "1b/1x16384", "1b/1x16384/graph"
)  # fmt: skip
FEW = ("lora", "asym", "paca", "cla", "rcla", "c3la")
"""The methods that are measured at shapes other than 1 B."""
OURS = ("lora", "lora_plus", "asym", "cola", "rac", "paca", "cla", "rcla", "c3la", "c3la_link4", "rc3la")
PEFT_CASES = ("peft_lora", "peft_lora_bf16")

Step = Callable[[], None]


@dataclass
class Timings:
    """Milliseconds of each timed step, and the peak of the allocator in GiB."""

    ms: list[float] = field(default_factory=list)
    gib: float = 0.0


def build(shape: str, device: str = "cuda") -> Any:
    """Return a random Llama on a device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    options = {**SHAPES[shape], "attn_implementation": "sdpa"}
    config = LlamaConfig(**options, max_position_embeddings=2**14)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.requires_grad_(False)
    model.train()
    wrap(model)
    attend_by_segments(model)
    return model


@contextmanager
def prepared(model: Any, case: str) -> Iterator[list[torch.nn.Parameter]]:
    """Insert the adapters of a case, yield the trained parameters, and remove the adapters again."""
    if case.endswith("_fused"):
        with prepared(model, case.removesuffix("_fused")) as trainable:
            fuse(model)
            try:
                yield trainable
            finally:
                unfuse(model)
        return
    case = case.removesuffix("_masked").removesuffix("_unpacked")
    if case == "floor":
        yield []
    elif case in PEFT_CASES:
        with with_peft(model, case) as trainable:
            yield trainable
    else:
        name = case.partition("_link")[0]
        chain = ChainConfig(links=LINKS) if isinstance(METHODS[name], Chain) else None
        config = MethodConfig(name=name, rank=RANK, chain=chain)
        inject(model, config, seed=0)
        for link in range(1, LINKS if "_link" in case else 1):
            advance(model, 0, link)
        try:
            yield [parameter for parameter in model.parameters() if parameter.requires_grad]
        finally:
            clear(model)


@contextmanager
def with_peft(model: Any, case: str) -> Iterator[list[torch.nn.Parameter]]:
    """Insert PEFT's layers over plain linears that share the weights of the base."""
    from peft import LoraConfig, inject_adapter_in_model

    wrapped = {name: m for name, m in model.named_modules() if type(m).__name__ == "AdapterLinear"}
    for name, module in wrapped.items():
        linear = torch.nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        linear.weight = module.weight
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)
    config = LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=sorted({n.rsplit(".", 1)[1] for n in wrapped})
    )
    inject_adapter_in_model(config, model)
    if case == "peft_lora":
        # The default of get_peft_model (autocast_adapter_dtype) has adapters in float32.
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
    trainable = [p for name, p in model.named_parameters() if "lora_" in name]
    try:
        yield trainable
    finally:
        for name, module in wrapped.items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module)
        model.requires_grad_(False)


def packed(model: Any, case: str, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the tokens of a batch in the form of a case, and what else the model is given.

    Batches of several rows are one example a row, without anything else.
    """
    rows, tokens = ids.shape
    if rows > 1:
        return ids, {}
    if case.endswith("_unpacked"):
        return ids.view(EXAMPLES, -1), {}
    length = tokens // EXAMPLES
    offsets = torch.arange(0, tokens + 1, length, dtype=torch.int32, device=ids.device)
    masked = case.endswith("_masked")
    mask = dense_mask(offsets, 1, tokens) if masked else mask_for(model, offsets, 1, tokens)
    positions = torch.arange(length, device=ids.device).repeat(1, EXAMPLES)
    return ids, {"attention_mask": mask, "position_ids": positions}


def make_step(
    model: Any, case: str, ids: torch.Tensor, trainable: list[torch.nn.Parameter], *, graph: bool
) -> Step:
    """Return a function that runs one training step, or replays it."""
    ids, given = packed(model, case, ids)
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True, capturable=graph) if trainable else None
    batch = every_token(ids)

    def loss() -> torch.Tensor:
        if not case.endswith("_fused"):
            return model(inputs_embeds=embeddings, labels=ids, use_cache=False, **given).loss  # type: ignore[no-any-return]
        total, count = batch_loss(
            model, batch, lambda **_: model(inputs_embeds=embeddings, use_cache=False, **given)
        )
        return total / count

    def step() -> None:
        embeddings.grad = None
        if optimizer:
            optimizer.zero_grad(set_to_none=True)
        loss().backward()
        if optimizer:
            optimizer.step()

    return capture(step).replay if graph else step


def every_token(ids: torch.Tensor) -> Batch:
    """Return rows (B, T) as a batch in which all tokens but each row's first are learnt."""
    rows, tokens = ids.shape
    place = torch.arange(rows * tokens, device=ids.device)
    return Batch(
        input_ids=ids,
        position_ids=torch.arange(tokens, device=ids.device).expand(rows, tokens),
        offsets=torch.arange(0, rows * tokens + 1, tokens, dtype=torch.int32, device=ids.device),
        completion_index=place.view(rows, tokens)[:, :-1].flatten(),
        targets=ids[:, 1:].flatten(),
    )


class Seconds(Reporter):
    """Keeps how long each step took."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep the seconds of a step."""
        self.found.append(metrics["step_seconds"])


def run_of(
    method: MethodConfig, batch: tuple[int, int], steps: int, device: str, *, graphs: bool = True
) -> RunConfig:
    """Return a run over batches of some rows and tokens, on a GPU as CUDA graphs if that is wanted."""
    rows, tokens = batch
    on_gpu = device != "cpu"
    return RunConfig(
        data=DataConfig(source="jsonl", name="random.jsonl", max_length=tokens),
        method=method,
        optim=OptimConfig(lr=1e-4, steps=steps, rows_per_step=rows),
        scale=ScaleConfig(
            device="cuda" if on_gpu else "cpu",
            dtype="bfloat16",
            zero=2,
            accumulation=1,
            activation_checkpointing=False,
            graphs=on_gpu and graphs,
        ),
    )


def session_of(model: Any, count: int, tokens: int, device: str) -> Session:
    """Return a session with random examples of some tokens, all of which are learnt."""
    numbers = torch.randint(0, model.config.vocab_size, (count, tokens)).tolist()
    examples = [Encoded(tuple(line), tuple(line)) for line in numbers]
    prepared: Any = SimpleNamespace(parts=SimpleNamespace(digest="", labels=()))
    loaded = LoadedModel(model, None, "", tokens)
    return Session(loaded, prepared, examples, examples[:1], Worker(device=device))


def train(
    model: Any,
    batch: tuple[int, int],
    steps: int,
    *,
    name: str = "lora",
    device: str = "cuda",
    graphs: bool = True,
) -> list[float]:
    """Train a method by rayft's trainer, and return the milliseconds of its steps.

    Such rows let a step compute what a bare one does.
    """
    rows, tokens = batch
    run = run_of(MethodConfig(name=name, rank=RANK), batch, steps, device, graphs=graphs)
    # A row alone holds several examples, as in the bare step.
    examples = EXAMPLES if rows == 1 else 1
    session = session_of(model, 4 * rows * examples, tokens // examples, device)
    reporter = Seconds()
    join_group("nccl" if device != "cpu" else "gloo")
    with tempfile.TemporaryDirectory() as folder:
        Trainer(run, session, reporter, Path(folder) / "run").fit()
    return [1e3 * seconds for seconds in reporter.found]


def join_group(backend: str) -> None:
    """Initialise a process group of this process alone, once: DeepSpeed keeps the first one that it meets."""
    if not dist.is_initialized():
        os.environ.update(LOCAL_RANK="0", RANK="0", WORLD_SIZE="1")
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]


def measure_trainer(
    model: Any, name: str, batch: tuple[int, int], steps: int, found: Timings, *, graph: bool
) -> None:
    """Time the steps of a trainer after its first three, with a fused base."""
    fuse(model)
    try:
        found.ms += train(model, batch, steps + 3, name=name, graphs=graph)[3:]
    finally:
        unfuse(model)
        gc.collect()
        torch.cuda.empty_cache()


def measure(
    model: Any, case: str, batch: tuple[int, int], steps: int, found: Timings, *, graph: bool
) -> None:
    """Time `steps` steps of a case after warming up."""
    ids = torch.randint(0, model.config.vocab_size, batch, device="cuda")
    with prepared(model, case) as trainable:
        step = make_step(model, case, ids, trainable, graph=graph)
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(steps):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            end.synchronize()
            found.ms.append(start.elapsed_time(end))
        if not graph:
            found.gib = torch.cuda.max_memory_allocated() / 2**30
    del step, trainable
    gc.collect()
    torch.cuda.empty_cache()


def run_shape(
    shape: str, cases: Sequence[str], long: Sequence[str], steps: int, places: Sequence[str]
) -> Iterator[dict[tuple[str, str], Timings]]:
    """Yield the timings of all cases of one shape, for each batch: (case, place) → timings.

    Args:
        shape: the base.
        cases: what is measured for batches of several rows.
        long: what is measured for batches of one row.
        steps: timed steps of a round.
        places: patterns of the places.
    """
    model = build(shape)
    for batch in BATCHES[shape]:
        name = f"{shape}/{batch[0]}x{batch[1]}"
        for graph in (False, True):
            place = name + ("/graph" if graph else "")
            if not any(fnmatch(place, pattern) for pattern in places):
                continue
            found: dict[tuple[str, str], Timings] = {}
            for _ in range(ROUNDS):
                for case in cases if batch[0] > 1 else long:
                    key = (case, place)
                    timings = found.setdefault(key, Timings())
                    try:
                        if case.endswith("_trainer"):
                            method = case.removesuffix("_trainer")
                            measure_trainer(model, method, batch, steps, timings, graph=graph)
                        else:
                            measure(model, case, batch, steps, timings, graph=graph)
                    except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
                        print(f"{key}: {type(error).__name__}: {str(error)[:300]}", flush=True)
                        found.pop(key)
                        clear(model)
                        gc.collect()
                        torch.cuda.empty_cache()
            _show(found, place)
            yield found


def _show(found: dict[tuple[str, str], Timings], name: str) -> None:
    floor = found.get(("floor", name))
    for (case, place), timings in found.items():
        if place == name and floor and timings.ms:
            ms, base = statistics.median(timings.ms), statistics.median(floor.ms)
            memory = f"{timings.gib:7.2f} GiB {timings.gib / floor.gib:6.3f}x" if timings.gib else ""
            print(f"{name:18} {case:16} {ms:8.2f} ms {ms / base:6.3f}x {memory}", flush=True)


def kernels_of(step: Step, replays: int = 5) -> dict[str, list[float]]:
    """Return the milliseconds and launches of each kernel in a replayed step."""
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(replays):
            step()
        torch.cuda.synchronize()
    spent: dict[str, list[float]] = {}
    for event in profiler.key_averages():
        name = event.key.removeprefix("void ").partition("<")[0].partition("(")[0][:60]
        kernel = spent.setdefault(name, [0.0, 0.0])
        kernel[0] += event.self_device_time_total / 1e3 / replays
        kernel[1] += event.count / replays
    return spent


def profile(shape: str, cases: list[str], replays: int = 5) -> list[dict[str, Any]]:
    """Print the milliseconds and launches of each kernel in a replayed step of the smallest batch."""
    model, batch, rows = build(shape), BATCHES[shape][0], []
    ids = torch.randint(0, model.config.vocab_size, batch, device="cuda")
    for case in cases:
        with prepared(model, case) as trainable:
            step = make_step(model, case, ids, trainable, graph=True)
            spent = kernels_of(step, replays)
        whole = sum(ms for ms, _ in spent.values())
        print(f"{case}: {whole:.2f} ms, {sum(count for _, count in spent.values()):.0f} launches", flush=True)
        for name, (ms, count) in sorted(spent.items(), key=lambda item: -item[1][0])[:24]:
            print(f"  {ms:8.3f} ms {count:6.0f}  {name}", flush=True)
            at = f"{case}/{shape}/{batch[0]}x{batch[1]}/graph/{name}"
            rows.append(record("train_step_profile", at, "ms", ms, "ms", n=replays))
            rows.append(record("train_step_profile", at, "launches", count, "", n=replays))
        del step, trainable
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def records(found: dict[tuple[str, str], Timings], commit: str | None, bench: str) -> list[dict[str, Any]]:
    """Return the results of timings."""
    rows = []
    ratios = ("over_unfused", "memory_over_unfused") if bench == "train_floor" else RATIOS
    for (case, place), timings in found.items():
        floor = found.get(("floor", place))
        if not timings.ms or floor is None:
            continue
        name, base = f"{case}/{place}", statistics.median(floor.ms)
        cuts = statistics.quantiles(timings.ms, n=10)
        spread = {"p20": cuts[1], "p80": cuts[7], "n": len(timings.ms)}
        middle = statistics.median(timings.ms)
        rows.append(record(bench, name, "ms", middle, "ms", **spread))
        rows.append(record(bench, name, ratios[0], middle / base, "ratio"))
        if timings.gib:
            rows.append(record(bench, name, "gib", timings.gib, "GiB"))
            rows.append(record(bench, name, ratios[1], timings.gib / floor.gib, "ratio"))
    return [{**row, "commit": commit or row["commit"]} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", help="default: 135m,1b,8b; with --fused 135m,1b")
    parser.add_argument("--cases", help="default: all at the 1b shape, and those of FEW at the others")
    parser.add_argument(
        "--places", help="patterns of the places to measure, such as 1b/16x512/graph; default: all"
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--fused", action="store_true", help="compare plain bases with fused ones")
    parser.add_argument("--trainer", action="store_true", help="with --fused: time rayft's trainer too")
    parser.add_argument("--profile", action="store_true", help="list the kernels of a step")
    parser.add_argument("--commit")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU")
    bench, rows = "train_floor" if arguments.fused else "train_step", []
    places = arguments.places.split(",") if arguments.places else FUSED_PLACES if arguments.fused else ["*"]
    for shape in (arguments.shapes or ("135m,1b" if arguments.fused else "135m,1b,8b")).split(","):
        given = arguments.cases.split(",") if arguments.cases else None
        if arguments.profile:
            kernels = profile(shape, given or ["floor", "cla", "lora", "peft_lora_bf16"])
            save(
                "train_step_profile",
                [{**row, "commit": arguments.commit or row["commit"]} for row in kernels],
            )
            continue
        cases = given or ["floor", *PEFT_CASES, *(OURS if shape == "1b" else FEW)]
        long: Sequence[str] = LONG
        if arguments.fused:
            cases = long = [*(given or FUSED), *(TRAINED if arguments.trainer else ())]
        for found in run_shape(shape, cases, long, arguments.steps, places):
            rows += records(found, arguments.commit, bench)
            # Save after each batch, so that an interrupted run loses one batch at most.
            save(bench, rows)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
