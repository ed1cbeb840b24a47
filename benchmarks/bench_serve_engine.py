"""Measure the cost of adapters in the engine on one GPU: decoding, prefill, and throughput with many.

    python benchmarks/bench_serve_engine.py [--parts step,prefill,peft,many,engines] [--commit HASH]

The model is a Llama shape of 1.0 B parameters (random weights, bfloat16) in the packed engine. Its forwards
are timed as the engine runs them, including the layout on the host and the wait for the logits. Cases take
turns, `ROUNDS` times.

    step     32 requests that have 128 tokens each process one more: all of the base, on an engine without
             adapters and on one with 32; with 8 and with 32 adapters of ranks 4, 8, 16, 64. Each with and
             without a CUDA graph
    prefill  8 prompts of 512 tokens of the base, and with 8 adapters; and one prompt beside 31 requests that
             decode. Each with and without a CUDA graph
    peft     the same step with transformers and PEFT (`adapter_names`, 8 adapters), against the base in
             transformers
    many     tokens per second of 512 requests, 128 at a time, 64 tokens each, with 1, 8, 32, 128, 512
    adapters
             of rank 16, through the engine's queue; and of the base
    engines  the same for 128 requests with 8 adapters, in this engine and in transformers' own batching
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.bench_train_step import SHAPES
from benchmarks.records import record, save
from rayft.methods.base import LoraFactors
from rayft.models.load import LoadedModel
from rayft.models.targets import linear_shapes
from rayft.serving.engine import Engine, EngineLimits, GenerationRequest
from rayft.serving.packed_engine import PackedEngine
from rayft.serving.packed_row import Part, Row
from rayft.serving.paged_forward import PagedForward
from rayft.serving.transformers_engine import TransformersEngine

ROUNDS, STEPS = 3, 40
ROWS, BEHIND, PROMPTS, PROMPT = 32, 128, 8, 512
RANKS = (4, 8, 16, 64)
REQUESTS, AT_ONCE, TOKENS = 512, 128, 64
COUNTS = (1, 8, 32, 128, 512)

Shapes = dict[str, tuple[int, int]]


class NoTokenizer:
    """A tokenizer for a model with random weights, which generates no real text."""

    chat_template = eos_token = eos_token_id = None


def base() -> LoadedModel:
    """Return a model with random weights, whose texts have no end token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES["1b"], max_position_embeddings=4096, eos_token_id=None)
    with torch.device("cuda"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None
    return LoadedModel(model.eval().requires_grad_(requires_grad=False), NoTokenizer(), "", 4096)


def adapter(shapes: Shapes, rank: int) -> dict[str, LoraFactors]:
    """Return a random adapter on the device."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).mul_(0.02)

    return {path: LoraFactors(normal(rank, i), normal(o, rank), 1.0) for path, (o, i) in shapes.items()}


class Bed:
    """An engine whose forwards are called from here, while its own thread is idle."""

    def __init__(self, adapters: int, *, tokens: int = 65536) -> None:
        loaded = base()
        shapes = linear_shapes(loaded.model)
        self.engine = PackedEngine(loaded, EngineLimits(AT_ONCE, PROMPTS * PROMPT, tokens))
        for number, rank in zip(range(adapters), itertools.cycle(RANKS)):
            self.engine.load(f"a{number}", adapter(shapes, rank))
        assert isinstance(self.engine._forward, PagedForward)
        self.forward: PagedForward = self.engine._forward

    def rows(self, count: int, length: int, adapters: int) -> list[Row]:
        """Return requests with the adapters in turn (0: the base)."""
        names = [f"a{number % adapters}" if adapters else None for number in range(count)]
        return [
            Row(
                GenerationRequest((0,), 1, name), self.engine._slots.slot(name), None, None,  # type: ignore[arg-type]
                torch.randint(0, 1000, (length,)).tolist(), self.forward.fresh(),
            )
            for name in names
        ]  # fmt: skip

    def read(self, rows: Sequence[Row]) -> float:
        """Run a forward of the unprocessed tokens of all rows, and return its milliseconds."""
        parts, start = [], 0
        for row in rows:
            parts.append(Part(row, start, start + row.unread))
            start += row.unread
        began = time.perf_counter()
        self.forward.logits(parts)
        ms = 1e3 * (time.perf_counter() - began)
        for part in parts:
            part.row.cache.length += part.new
        return ms

    @contextmanager
    def graphs(self, on: bool) -> Iterator[None]:
        """Set whether forwards are replayed as CUDA graphs."""
        known = self.forward._graphs
        self.forward._graphs = (known or {}) if on else None
        yield
        self.forward._graphs = known

    def steps(self, rows: Sequence[Row], *, graphs: bool) -> list[float]:
        """Decode some tokens, then remove them again."""
        found = []
        with self.graphs(graphs):
            for _ in range(STEPS + 5):
                for row in rows:
                    row.tokens.append(1)
                found.append(self.read(rows))
        for row in rows:
            del row.tokens[-STEPS - 5 :]
            row.cache.length = len(row.tokens)
        return found[5:]

    def prefill(self, adapters: int, *, graphs: bool) -> list[float]:
        """Process prompts, then remove them again."""
        rows, found = self.rows(PROMPTS, PROMPT, adapters), []
        with self.graphs(graphs):
            for _ in range(15):
                found.append(self.read(rows))
                for row in rows:
                    row.cache.length = 0
        for row in rows:
            self.forward.release(row.cache)
        return found[5:]

    def mixed(self, adapters: int, *, graphs: bool) -> list[float]:
        """Process a prompt beside rows that decode, then remove all new tokens again."""
        rows, found = self.rows(ROWS, BEHIND, adapters), []
        self.read(rows)
        rows[0].tokens = [*rows[0].tokens, *[1] * (PROMPT - BEHIND)]
        with self.graphs(graphs):
            for _ in range(15):
                rows[0].cache.length = 0
                for row in rows[1:]:
                    row.cache.length = BEHIND - 1
                found.append(self.read(rows))
        for row in rows:
            self.forward.release(row.cache)
        return found[5:]


def measure(
    bench: str, cases: dict[str, Callable[[], list[float]]], floors: dict[str, str]
) -> list[dict[str, Any]]:
    """Time cases in turns, and return the milliseconds of each and its ratio to its floor."""
    found: dict[str, list[float]] = {case: [] for case in cases}
    for _ in range(ROUNDS):
        for case, run in cases.items():
            found[case] += run()
    rows = []
    for case, ms in found.items():
        middle, cuts = statistics.median(ms), statistics.quantiles(ms, n=10)
        ratio = middle / statistics.median(found[floors[case]])
        rows += [
            record(bench, case, "ms", middle, "ms", p20=cuts[1], p80=cuts[7], n=len(ms)),
            record(bench, case, "time_over_base", ratio, "ratio"),
        ]
        print(f"{case:40} {middle:8.3f} ms [{cuts[1]:.3f}, {cuts[7]:.3f}]  {ratio:.3f}x", flush=True)
    return rows


def step_part() -> list[dict[str, Any]]:
    """Time decoding steps."""
    bare, full = Bed(0), Bed(32)
    beds = {
        "base": (bare, 0),
        "base_only_loaded": (full, 0),
        "8_adapters": (full, 8),
        "32_adapters": (full, 32),
    }
    cases: dict[str, Callable[[], list[float]]] = {}
    floors = {}
    for graphs, place in ((True, f"1b/{ROWS}rows"), (False, f"1b/{ROWS}rows/eager")):
        for name, (bed, adapters) in beds.items():
            rows = bed.rows(ROWS, BEHIND, adapters)
            bed.read(rows)
            cases[f"{name}/{place}"] = partial(bed.steps, rows, graphs=graphs)
            floors[f"{name}/{place}"] = f"base/{place}"
    return measure("serve_decode", cases, floors)


def prefill_part() -> list[dict[str, Any]]:
    """Time prefills."""
    bed = Bed(8)
    cases: dict[str, Callable[[], list[float]]] = {}
    floors = {}
    for kind, run in (
        (f"{PROMPTS * PROMPT}tokens", bed.prefill),
        (f"{ROWS - 1}rows+{PROMPT}tokens", bed.mixed),
    ):
        for graphs, place in ((True, f"1b/{kind}"), (False, f"1b/{kind}/eager")):
            for name, adapters in (("base", 0), ("8_adapters", 8)):
                cases[f"{name}/{place}"] = partial(run, adapters, graphs=graphs)
                floors[f"{name}/{place}"] = f"base/{place}"
    return measure("serve_prefill", cases, floors)


def peft_part() -> list[dict[str, Any]]:
    """Time the step with transformers and PEFT."""
    from peft import LoraConfig, get_peft_model

    model: Any = base().model
    ids = torch.ones(ROWS, 1, dtype=torch.long, device="cuda")

    @torch.inference_mode()
    def steps(model: Any, **options: Any) -> list[float]:
        past = model(torch.ones(ROWS, BEHIND, dtype=torch.long, device="cuda"), use_cache=True, **options)
        cache, found = past.past_key_values, []
        for _ in range(STEPS + 5):
            torch.cuda.synchronize()
            began = time.perf_counter()
            model(ids, past_key_values=cache, use_cache=True, **options)
            torch.cuda.synchronize()
            found.append(1e3 * (time.perf_counter() - began))
        return found[5:]

    plain = steps(model) + steps(model)
    names = [f"a{number}" for number in range(8)]
    targets = sorted({path.rpartition(".")[2] for path in linear_shapes(model)})
    for number, (name, rank) in enumerate(zip(names, itertools.cycle(RANKS))):
        config = LoraConfig(r=rank, target_modules=targets, init_lora_weights=False)
        if number:
            model.add_adapter(name, config)
        else:
            model = get_peft_model(model, config, adapter_name=name)
    model = model.to(torch.bfloat16).eval()
    rows = [names[row % 8] for row in range(ROWS)]
    mixed = steps(model, adapter_names=rows) + steps(model, adapter_names=rows)
    floor, case = (f"{name}/1b/{ROWS}rows" for name in ("peft_base", "peft_mixed"))
    cases = {floor: lambda: plain, case: lambda: mixed}
    return measure("serve_decode", cases, dict.fromkeys(cases, floor))


def many_part() -> list[dict[str, Any]]:
    """Measure tokens per second of the packed engine."""
    return _rates("serve_many", Bed(0).engine, "", COUNTS, REQUESTS)


def engines_part() -> list[dict[str, Any]]:
    """Measure tokens per second of both engines, with fewer requests and adapters."""
    rows = []
    for name, kind in (("packed", PackedEngine), ("transformers", TransformersEngine)):
        engine = kind(base(), EngineLimits(AT_ONCE, PROMPTS * PROMPT, 65536))
        rows += _rates("serve_engines", engine, f"{name}/", (8,), REQUESTS // 4)
        del engine
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def _rates(
    bench: str, engine: Engine, prefix: str, counts: Sequence[int], requests: int
) -> list[dict[str, Any]]:
    shapes = linear_shapes(base().model)
    rows, floor, loaded = [], 0.0, 0

    async def one(adapter: str | None, number: int) -> int:
        job = GenerationRequest(tuple(range(number % 50, number % 50 + 32)), TOKENS, adapter)
        async with aclosing(engine.submit(job)) as steps:
            async for step in steps:
                made = step.generated
        return made

    async def run(count: int) -> float:
        names = [f"m{number % count}" if count else None for number in range(requests)]
        began = time.perf_counter()
        made = await asyncio.gather(*[one(name, number) for number, name in enumerate(names)])
        return sum(made) / (time.perf_counter() - began)

    for count in (0, *counts):
        while loaded < count:
            engine.load(f"m{loaded}", adapter(shapes, 16))
            loaded += 1
        rates = [asyncio.run(run(count)) for _ in range(3)][1:]
        rate = statistics.mean(rates)
        floor = floor or rate
        case = f"{prefix}{count}_adapters/1b" if count else f"{prefix}base/1b"
        rows += [
            record(bench, case, "tokens_per_second", rate, "1/s", n=len(rates)),
            record(bench, case, "over_base", rate / floor, "ratio"),
        ]
        print(f"{case:40} {rate:10,.0f} tokens/s  {rate / floor:.3f}x", flush=True)
    engine.stop()
    return rows


PARTS = {
    "step": step_part,
    "prefill": prefill_part,
    "peft": peft_part,
    "many": many_part,
    "engines": engines_part,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--commit")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a GPU")
    for name in arguments.parts.split(","):
        rows = [{**row, "commit": arguments.commit or row["commit"]} for row in PARTS[name]()]
        # Save after each part, so that an interrupted run loses one part at most.
        save(rows[0]["bench"], rows)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
