"""Measure adapters in vLLM on one GPU, beside vLLM without LoRA and vLLM's own LoRA of the same release.

    python benchmarks/bench_serve_vllm.py [--parts inprocess,many,kernels,async,load,http,tier]

Also `--parts profile`, `few` to leave `stock` out, and `sglang`, which needs SGLang's folder.

The model is a Llama shape of 1.0 B parameters (random weights, bfloat16); adapters have the ranks 4, 8, 16
and 64 in turn, on all linear layers. Three processes hold one engine each on the same GPU and take turns,
`ROUNDS` times: `base` (no LoRA), `stock` (vLLM's LoRA, max_loras 32, max_lora_rank 64) and `rayft`. While
one works the others wait. Ratios are of the same round; a result is their median with its 95 % bootstrap
interval.

    inprocess  vLLM's `LLM` in one process: 32 requests of 128 tokens in and 256 out, of the base, with 8 and
               with 32 adapters: tokens per second, milliseconds of a decode step, and of the prefill
    many       rayft alone: the decode step with 8 active adapters of rank 4, and 8, 256, 2048 on the device:
               the median time between steps, which a busy host's stalls don't change, and the GPU's time
    kernels    names and counts of the GPU kernels in a decode step of base rows, for `base` and `rayft`
    async      the same as `inprocess`, tokens per second, through AsyncLLM (`rayft`: through `VllmEngine`)
    profile    GPU time of a prefill by kernel, for `base` and `rayft`
    load       time to load an adapter of 100 MB, to the first token of one that has to be loaded, and between
               tokens of 32 requests while one is loaded each second
    http       64 clients, 128 tokens in and 256 out, against `vllm serve` without adapters and `rayft serve`
               (base rows, and 32 adapters), streaming and not: tokens per second, time to the first token
    sglang     the same as `http`, against `vllm serve` without adapters, `rayft serve` with 32 adapters, and
               SGLang's server without adapters and with the same 32. SGLang needs other versions of packages
               than vLLM: `--sglang` names the folder that it is installed in (`pip install --target`)
    tier       `rayft serve` with 12 adapters of 100 MB and room for 4 on the device: time to the first token
               of one that was evicted, and of one that is there; and the time between the parts of 32 streams
               of the base: alone (`quiet`), while one request a second asks for an adapter that is there
               (`asked`), while one asks for an evicted one (`loading`), and while one is read from its folder
               under a new name, asked for, and deleted (`reading`)
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
import traceback
import urllib.request
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._C._autograd import DeviceType

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.bench_train_step import SHAPES
from benchmarks.records import record, save

START = time.monotonic()
ROUNDS = 7
ROWS, PROMPT, NEW = 32, 128, 256
RANKS = (4, 8, 16, 64)
KINDS = ("base", "stock", "rayft")
CASES = (0, 8, 32)
MANY, MANY_ROUNDS = (8, 256, 2048), 8
INPROCESS = ("inprocess", "many", "kernels", "profile", "few")
MEMORY = {"base": 0.15, "stock": 0.2, "rayft": 0.45}
ARENA = 22 * 10**9
CACHE = 2 * 10**9
"""Bytes of the KV cache. With a given size, vLLM does not measure free memory while other engines start."""
WORK = Path("/tmp/rayft-bench-vllm")  # noqa: S108
CLIENTS, TURNS = 64, 3
PORTS = {"vllm": 9001, "rayft": 9002, "sglang": 9003, "sglang_lora": 9004}
SERVED = {
    "http": (9, [("vllm", "base"), ("rayft", "base"), ("rayft", "32_adapters")]),
    "sglang": (
        5,
        [("vllm", "base"), ("rayft", "32_adapters"), ("sglang", "base"), ("sglang_lora", "32_adapters")],
    ),
}
"""Rounds, and servers with what is asked of them, of the parts that compare servers."""
OVER = {"vllm": ("vllm", "base"), "sglang": ("sglang_lora", "32_adapters")}
"""What ratios are over."""
NAMES = {0: "base", 8: "8_adapters", 32: "32_adapters"}
EVICTING, STREAMED, TIER_ROUNDS = 12, 2000, 3
"""Adapters of which few fit, tokens of a stream, and comparisons of the part `tier`."""


def prepare() -> None:
    """Write the base and the adapters, once."""
    if (WORK / "ready").exists():
        return
    from transformers import LlamaConfig, LlamaForCausalLM

    from rayft.models.targets import linear_shapes

    shutil.rmtree(WORK, ignore_errors=True)
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES["1b"], max_position_embeddings=4096, eos_token_id=None)
    with torch.device("cuda"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None
    model.save_pretrained(WORK / "base")
    tokenizer().save_pretrained(WORK / "base")
    shapes = linear_shapes(model)
    del model
    for number in range(32):
        adapter(shapes, RANKS[number % len(RANKS)]).save(WORK / f"a{number}")
    adapter(shapes, 4).save(WORK / "rank4")
    adapter(shapes, 72).save(WORK / "large")
    torch.cuda.empty_cache()
    (WORK / "ready").touch()


def tokenizer() -> Any:
    """Return a tokenizer with a word for each of the model's tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(SHAPES["1b"]["vocab_size"])}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0", pad_token="w1")


def adapter(shapes: dict[str, tuple[int, int]], rank: int) -> Any:
    """Return a random adapter."""
    from rayft.artifacts import AdapterArtifact, ArtifactMeta
    from rayft.methods.base import LoraFactors

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).mul_(0.02).cpu()

    modules = {path: LoraFactors(normal(rank, i), normal(o, rank), 1.0) for path, (o, i) in shapes.items()}
    return AdapterArtifact(modules, meta=ArtifactMeta(base_model="1b"))


def prompts() -> list[list[int]]:
    """Return the same prompts in every process."""
    chosen = random.Random(0)
    return [[chosen.randrange(5, 32000) for _ in range(PROMPT)] for _ in range(ROWS)]


def options(kind: str) -> dict[str, Any]:
    """Return vLLM's arguments."""
    known: dict[str, Any] = {
        "model": str(WORK / "base"),
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "max_model_len": 1024,
        "max_num_seqs": ROWS,
        "gpu_memory_utilization": MEMORY[kind],
        "kv_cache_memory_bytes": CACHE,
        "enable_prefix_caching": False,
        "seed": 0,
    }
    if kind != "base":
        known |= {"enable_lora": True, "max_loras": 32, "max_lora_rank": 64}
    if kind == "rayft":
        known["additional_config"] = {"rayft": {"adapter_bytes": ARENA}}
        known["worker_extension_cls"] = "rayft.serving.engine.vllm.worker.WorkerExtension"
    return known


class InProcess:
    """vLLM's `LLM`, its engine in the same process."""

    def __init__(self, kind: str) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        self._llm = LLM(**options(kind))
        self._requests = [LoRARequest(f"a{n}", n + 1, str(WORK / f"a{n}")) for n in range(32)]
        if kind != "base":
            for request in self._requests:
                self._llm.llm_engine.add_lora(request)
        self._request: Callable[..., Any] = LoRARequest

    def close(self) -> None:
        """Do nothing: the process ends."""

    def measure(self, adapters: int) -> dict[str, float]:
        """Measure a case: tokens/s, milliseconds of a decode step and of the prefill."""
        chosen = [self._requests[n % adapters] for n in range(ROWS)] if adapters else None
        return self._timed(chosen)

    def many(self, _: int) -> dict[str, dict[str, list[float]]]:
        """Measure the decode step with 8 active adapters of rank 4; others come and go on the device.

        Returns:
            Number on the device → milliseconds of a step, by the clock (`step`) and on the GPU (`gpu`).
        """
        found = {f"{count}": {"step": list[float](), "gpu": list[float]()} for count in MANY}
        numbers = [request.lora_int_id for request in self._requests]
        self._llm.collective_rpc("rayft_unload", args=(numbers,))
        every = [self._request(f"m{n}", 1000 + n, str(WORK / "rank4")) for n in range(max(MANY))]
        there = 0
        # Up and down again, so that a drifting clock affects all of them.
        for count in (*MANY, *reversed(MANY)):
            for request in every[there:count]:
                self._llm.llm_engine.add_lora(request)
            if gone := [request.lora_int_id for request in every[count:there]]:
                self._llm.collective_rpc("rayft_unload", args=(gone,))
            there = count
            # Spread over all that are there.
            active = [every[(n % 8) * (count // 8)] for n in range(ROWS)]
            self._generate(active, NEW)
            found[f"{count}"]["step"] += [self._between_steps(active) for _ in range(MANY_ROUNDS)]
            spent = self._on_gpu(active, 33).total() - self._on_gpu(active, 1).total()
            found[f"{count}"]["gpu"].append(spent / 32)
        return found

    def profile(self, adapters: int) -> dict[str, float]:
        """Sum up the GPU time of a prefill by kernel, in milliseconds, and the time of the whole."""
        chosen = [self._requests[n % adapters] for n in range(ROWS)] if adapters else None
        self._generate(chosen, 1)
        took, _ = self._generate(chosen, 1)
        spent = self._on_gpu(chosen, 1)
        return {"whole": took * 1e3, "gpu": spent.total(), **dict(spent.most_common(14))}

    def kernels(self, _: int) -> dict[str, float]:
        """Count the GPU kernels of base rows by name, over a short generation."""
        self._generate(None, 8)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self._generate(None, 8)
            torch.cuda.synchronize()
        # Inductor names a kernel after the operators around it.
        names = (event.name.replace("adapted_linear_", "") for event in profile.events())
        kinds = [name.rsplit("_", 1)[0] if name.startswith("triton_") else name for name in names]
        return dict(collections.Counter(kind for kind in kinds if "Memcpy" not in kind))

    def _on_gpu(self, chosen: list[Any] | None, tokens: int) -> collections.Counter[str]:
        """Return the GPU's milliseconds of a generation, by kernel."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self._generate(chosen, tokens)
            torch.cuda.synchronize()
        spent: collections.Counter[str] = collections.Counter()
        for event in profile.events():
            if event.device_type == DeviceType.CUDA:
                spent[event.name[:60]] += event.device_time / 1e3
        return spent

    def _between_steps(self, chosen: list[Any] | None) -> float:
        """Return the median of the milliseconds from one decode step to the next."""
        engine, times = self._llm.llm_engine, list[float]()
        step = engine.step

        def timed() -> Any:
            times.append(time.perf_counter())
            return step()

        with mock.patch.object(engine, "step", timed):
            self._generate(chosen, NEW)
        # The first ones are of the prefill.
        return statistics.median(later - one for one, later in pairwise(times[4:])) * 1e3

    def _timed(self, chosen: list[Any] | None) -> dict[str, float]:
        first = statistics.median(self._generate(chosen, 1)[0] for _ in range(3))
        whole, made = self._generate(chosen, NEW)
        return {"tokens": made / whole, "step": (whole - first) / (NEW - 1) * 1e3, "prefill": first * 1e3}

    def _generate(self, chosen: list[Any] | None, tokens: int) -> tuple[float, int]:
        from vllm import SamplingParams

        asked = [{"prompt_token_ids": ids} for ids in prompts()]
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0, detokenize=False)
        begin = time.perf_counter()
        outputs = self._llm.generate(asked, params, lora_request=chosen, use_tqdm=False)
        took = time.perf_counter() - begin
        return took, sum(len(output.outputs[0].token_ids) for output in outputs)


class Async:
    """AsyncLLM, its engine in another process; rayft's through `VllmEngine`."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._runner = asyncio.Runner()
        self._runner.run(self._start())

    async def _start(self) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.lora.request import LoRARequest
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.async_llm import AsyncLLM

        if self._kind == "rayft":
            from rayft.artifacts import AdapterArtifact
            from rayft.serving.engine.api import EngineLimits
            from rayft.serving.engine.vllm.engine import VllmEngine, VllmOptions

            known = options("rayft")
            extra = {name: known[name] for name in ("max_model_len", "seed", "kv_cache_memory_bytes")}
            extra["enable_prefix_caching"] = False
            made = VllmOptions(
                known["model"], None, torch.bfloat16, ARENA // 4, memory=MEMORY["rayft"], extra=extra
            )
            self._engine: Any = VllmEngine(made, EngineLimits(ROWS, 0, 0), [])
            self._large = AdapterArtifact.load(WORK / "large")
            begin = time.perf_counter()
            for number in range(32):
                await self._engine.load(f"a{number}", AdapterArtifact.load(WORK / f"a{number}"))
            print(f"rayft: 32 adapters read and loaded in {time.perf_counter() - begin:.1f} s", flush=True)
            return
        self._engine = AsyncLLM.from_engine_args(
            AsyncEngineArgs(**options(self._kind)), usage_context=UsageContext.OPENAI_API_SERVER
        )
        self._requests = [LoRARequest(f"a{n}", n + 1, str(WORK / f"a{n}")) for n in range(32)]
        if self._kind == "stock":
            for request in self._requests:
                await self._engine.add_lora(request)

    def close(self) -> None:
        """End the engine's process."""
        (self._engine.stop if self._kind == "rayft" else self._engine.shutdown)()

    def measure(self, adapters: int) -> dict[str, float]:
        """Measure a case: tokens/s."""
        return self._runner.run(self._measure(adapters))

    async def _measure(self, adapters: int) -> dict[str, float]:
        begin = time.perf_counter()
        await asyncio.gather(*[self._one(n, n % adapters if adapters else None) for n in range(ROWS)])
        return {"tokens": ROWS * NEW / (time.perf_counter() - begin)}

    async def _one(self, row: int, adapter: int | None, tokens: int = NEW) -> list[float]:
        """Generate for one row; return when each part came."""
        times: list[float] = []
        if self._kind == "rayft":
            from rayft.serving.engine.api import GenerationRequest

            job = GenerationRequest(
                tuple(prompts_once()[row]), tokens, None if adapter is None else f"a{adapter}"
            )
            async for _ in self._engine.submit(job):
                times.append(time.perf_counter())
            return times
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=tokens, ignore_eos=True, temperature=0, detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip
        async for _ in self._engine.generate(
            {"prompt_token_ids": prompts_once()[row]}, params, f"{time.perf_counter_ns()}-{row}",
            lora_request=None if adapter is None else self._requests[adapter],
        ):  # fmt: skip
            times.append(time.perf_counter())
        return times

    def load(self, _: int) -> dict[str, float]:
        """Measure loads, and the time between tokens without and with one each second."""
        return self._runner.run(self._load())

    async def _load(self) -> dict[str, float]:
        from rayft.serving.engine.api import GenerationRequest

        found: dict[str, float] = {}
        took, first = [], []
        for number in range(6):
            begin = time.perf_counter()
            await self._engine.load(f"large{number}", self._large)
            took.append(time.perf_counter() - begin)
            async for _ in self._engine.submit(GenerationRequest(tuple(range(5, 133)), 1, f"large{number}")):
                first.append(time.perf_counter() - begin)
                break
            self._engine.unload(f"large{number}")
        size = sum(f.a.nbytes + f.b.nbytes for f in self._large.modules.values())
        found |= {"mb": size / 1e6, "ms": statistics.median(took) * 1e3}
        found["first_token_ms"] = statistics.median(first) * 1e3

        async def gaps() -> list[float]:
            rows = await asyncio.gather(*[self._one(n, n, 800) for n in range(ROWS)])
            return sorted(b - a for row in rows for a, b in pairwise(row[20:]))

        async def turning() -> None:
            number = 0
            while True:
                begin = time.perf_counter()
                name = f"turning{number}"
                await self._engine.load(name, self._large)
                loads.append(time.perf_counter() - begin)
                self._engine.unload(name)
                number += 1
                await asyncio.sleep(max(0, 1 - (time.perf_counter() - begin)))

        loads: list[float] = []
        for turn in range(3):
            quiet = await gaps()
            task = asyncio.create_task(turning())
            busy = await gaps()
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            for name, values in (("quiet", quiet), ("loading", busy)):
                for share in (50, 99):
                    key = f"{name}_p{share}_ms/{turn}"
                    found[key] = values[min(len(values) - 1, len(values) * share // 100)] * 1e3
        found["ms_under_load"] = statistics.median(loads) * 1e3
        return found


_prompts: list[list[int]] = []


def prompts_once() -> list[list[int]]:
    """Return the prompts, made once in each process."""
    if not _prompts:
        _prompts.extend(prompts())
    return _prompts


def child(kind: str, how: str, pipe: Connection) -> None:
    """Hold one engine, and measure what the parent asks for."""
    try:
        engine = (InProcess if how == "inprocess" else Async)(kind)
        # Once without measuring: what is compiled at first use.
        for case in CASES if kind != "base" else (0,):
            engine.measure(case)
    except BaseException:  # noqa: BLE001  (the process ends)
        # The end of a process waits for its own processes first, and they may run on.
        traceback.print_exc()
        os._exit(1)
    pipe.send("ready")
    while (asked := pipe.recv()) is not None:
        what, case = asked
        pipe.send(getattr(engine, what)(case))
    engine.close()


class Children:
    """The processes with an engine each."""

    def __init__(self, how: str, kinds: Sequence[str] = KINDS) -> None:
        context = get_context("spawn")
        self.kinds = tuple(kinds)
        self._pipes: dict[str, Connection] = {}
        self._processes = []
        for kind in kinds:
            mine, theirs = context.Pipe()
            process = context.Process(target=child, args=(kind, how, theirs))
            process.start()
            self._pipes[kind] = mine
            self._processes.append(process)
        for kind, process in zip(kinds, self._processes, strict=True):
            self._wait(kind, process)

    def _wait(self, kind: str, process: Any) -> None:
        while not self._pipes[kind].poll(1):
            if not process.is_alive():
                raise SystemExit(f"{kind} ended with {process.exitcode}")
        print(f"{kind}: {self._pipes[kind].recv()} after {time.monotonic() - START:.0f} s", flush=True)

    def ask(self, kind: str, what: str, case: int = 0) -> dict[str, Any]:
        """Let one measure."""
        self._pipes[kind].send((what, case))
        found: dict[str, Any] = self._pipes[kind].recv()
        return found

    def close(self) -> None:
        """End all processes."""
        for pipe, process in zip(self._pipes.values(), self._processes, strict=True):
            pipe.send(None)
            process.join(30)
            if process.is_alive():
                process.kill()


def rounds(children: Children) -> dict[tuple[str, int], list[dict[str, float]]]:
    """Measure all cases of all engines, in turn."""
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    pairs = [(kind, case) for kind in children.kinds for case in CASES if kind != "base" or case == 0]
    order = random.Random(0)
    for _ in range(ROUNDS):
        order.shuffle(pairs)
        for kind, case in pairs:
            found.setdefault((kind, case), []).append(children.ask(kind, "measure", case))
    return found


def interval(values: Sequence[float]) -> dict[str, float]:
    """Return the 95 % bootstrap interval of a median."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(2000))
    return {"ci_low": medians[50], "ci_high": medians[-51], "n": len(values)}


MS = {"step": "ms", "prefill": "prefill_ms"}
"""What is measured → the metric of its milliseconds."""


def compared(how: str, found: dict[tuple[str, int], list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Turn the rounds into results, and print them."""
    records: list[dict[str, Any]] = []
    place = f"1b/{ROWS}rows" + ("" if how == "inprocess" else f"/{how}")

    def put(case: str, metric: str, values: Sequence[float], unit: str) -> None:
        middle = statistics.median(values)
        records.append(record("serve_vllm", case, metric, round(middle, 4), unit, **interval(values)))
        print(f"{case:40} {metric:22} {middle:10.3f} {unit}", flush=True)

    base = found["base", 0]
    put(f"vllm/base/{place}", "tokens_per_s", [one["tokens"] for one in base], "1/s")
    for (kind, case), values in found.items():
        if kind == "base":
            continue
        name = f"{NAMES[case]}/{place}"
        if kind == "stock":
            put(f"stock/{name}", "tokens_per_s", [one["tokens"] for one in values], "1/s")
            if "prefill" in values[0]:
                put(f"stock/{name}", MS["prefill"], [one["prefill"] for one in values], "ms")
            continue
        put(name, "tokens_per_s", [one["tokens"] for one in values], "1/s")
        for metric in ("step", "prefill"):
            if metric in values[0]:
                put(name, MS[metric], [one[metric] for one in values], "ms")
                ratios = [mine[metric] / theirs[metric] for mine, theirs in zip(values, base, strict=True)]
                put(name, f"{metric}_over_vllm", ratios, "x")
        ratios = [theirs["tokens"] / mine["tokens"] for mine, theirs in zip(values, base, strict=True)]
        put(name, "time_over_vllm", ratios, "x")
        if ("stock", case) not in found:
            continue
        stock = found["stock", case]
        ratios = [mine["tokens"] / theirs["tokens"] for mine, theirs in zip(values, stock, strict=True)]
        put(name, "tokens_over_stock", ratios, "x")
    return records


def inprocess(parts: Sequence[str]) -> list[dict[str, Any]]:
    """Run the parts with vLLM's `LLM`."""
    alone = {*parts} & {*INPROCESS} == {"many"}
    kinds = ("rayft",) if alone else ("base", "rayft") if "few" in parts else KINDS
    children, records = Children("inprocess", kinds), []
    if "inprocess" in parts:
        records += compared("inprocess", rounds(children))
    if "profile" in parts:
        for kind, case in (("base", 0), ("rayft", 0), ("rayft", 8), ("rayft", 32)):
            print(f"prefill of {kind}, {case} adapters:", flush=True)
            for name, spent in children.ask(kind, "profile", case).items():
                print(f"    {name:62} {spent:8.3f} ms", flush=True)
    if "kernels" in parts:
        base, rayft = (children.ask(kind, "kernels") for kind in ("base", "rayft"))
        more = {name: (base.get(name, 0), rayft.get(name, 0)) for name in {*base, *rayft}}
        differing = {name: counts for name, counts in more.items() if counts[0] != counts[1]}
        print("kernels of base rows that differ:", json.dumps(differing, indent=1)[:4000], flush=True)
        records.append(record("serve_vllm", "base/kernels", "differing", len(differing), "kernels"))
    if "many" in parts:
        found = children.ask("rayft", "many")
        for count, each in found.items():
            name = f"{count}_on_device/1b/{ROWS}rows"
            print(f"{name}:", {kind: [round(value, 3) for value in values] for kind, values in each.items()})
            for kind, metric in (("step", MS["step"]), ("gpu", "gpu_ms")):
                middle, first = statistics.median(each[kind]), found[str(MANY[0])][kind]
                ratios = [mine / other for mine, other in zip(each[kind], first, strict=True)]
                over, spread = statistics.median(ratios), interval(ratios)
                records += [
                    record("serve_vllm", name, metric, round(middle, 4), "ms", **interval(each[kind])),
                    record("serve_vllm", name, f"{kind}_over_8", round(over, 4), "x", **spread),
                ]
                print(f"{name:40} {metric} {middle:.3f}, {over:.3f} of that with {MANY[0]}", flush=True)
    children.close()
    return records


def asynchronous(parts: Sequence[str]) -> list[dict[str, Any]]:
    """Run the parts with AsyncLLM."""
    children, records = Children("async", KINDS if "async" in parts else ("rayft",)), []
    if "async" in parts:
        records += compared("async", rounds(children))
    if "load" in parts:
        for name, value in children.ask("rayft", "load").items():
            print(f"load {name:30} {value:.3f}", flush=True)
            unit = "MB" if name == "mb" else "ms"
            records.append(record("serve_vllm", "load", name, round(value, 4), unit))
    children.close()
    return records


def rayft_server(part: str) -> None:
    """Serve with rayft until the process is ended."""
    from rayft.models.load import ModelConfig
    from rayft.serving.build import run
    from rayft.serving.config import ServeConfig

    names = {
        "http": {f"a{n}": str(WORK / f"a{n}") for n in range(32)},
        "tier": {f"large{n}": str(WORK / "large") for n in range(EVICTING)},
    }
    config = ServeConfig(
        model=ModelConfig(name=str(WORK / "base")),
        engine="vllm",
        adapters=names[part],
        port=PORTS["rayft"],
        gpu_memory=0.4,
        max_running=CLIENTS,
        max_new_tokens=STREAMED,
        device_bytes="2GB" if part == "http" else "500MB",
        fetched=str(WORK / "fetched"),
        roots=(str(WORK),),
    )
    run(config)


def vllm_server() -> list[str]:
    """Return the command of vLLM's own server."""
    return [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(WORK / "base"),
        "--served-model-name", "base", "--port", str(PORTS["vllm"]), "--max-model-len", "1024",
        "--max-num-seqs", str(CLIENTS), "--gpu-memory-utilization", "0.3", "--dtype", "bfloat16",
    ]  # fmt: skip


def sglang_server(kind: str) -> list[str]:
    """Return the command of SGLang's server, `sglang_lora` with adapters. It chooses its kernels itself."""
    command = [
        sys.executable, "-m", "sglang.launch_server", "--model-path", str(WORK / "base"),
        "--served-model-name", "base", "--port", str(PORTS[kind]), "--context-length", "1024",
        "--max-running-requests", str(CLIENTS), "--cuda-graph-max-bs-decode", str(CLIENTS),
        "--max-total-tokens", str(CLIENTS * 1024), "--dtype", "bfloat16", "--grammar-backend", "none",
    ]  # fmt: skip
    if kind == "sglang_lora":
        command += ["--enable-lora", "--max-loras-per-batch", "32", "--max-lora-rank", "64"]
        command += ["--lora-paths", *[f"a{n}={WORK / f'a{n}'}" for n in range(32)]]
    return command


def start_server(kind: str, sglang: str | None) -> subprocess.Popen[bytes]:
    """Start a server of the parts `http` and `sglang`."""
    if kind == "vllm":
        return subprocess.Popen(vllm_server())
    if kind == "rayft":
        return subprocess.Popen([sys.executable, __file__, "--serve", "http"])
    return subprocess.Popen(sglang_server(kind), env={**os.environ, "PYTHONPATH": sglang or ""})


async def clients(kind: str, models: Sequence[str], stream: bool, seed: int) -> list[tuple[float, float]]:
    """Let one client for each model send requests, each after the answer to the one before.

    Returns:
        For each request, the seconds until it began to be answered and until it ended.
    """
    import aiohttp

    chosen = random.Random(seed)

    async def one(session: aiohttp.ClientSession, model: str) -> list[tuple[float, float]]:
        return [await ask(session, model) for _ in range(TURNS)]

    async def ask(session: aiohttp.ClientSession, model: str) -> tuple[float, float]:
        body = question(model, chosen, NEW, stream=stream)
        begin, first = time.perf_counter(), 0.0
        async with session.post(url(kind), json=body) as answer:
            assert answer.status == 200, await answer.text()
            if not stream:
                used = (await answer.json())["usage"]
                assert used["completion_tokens"] == NEW, used
                return 0.0, time.perf_counter() - begin
            async for line in answer.content:
                if not first and has_text(line):
                    first = time.perf_counter() - begin
        return first, time.perf_counter() - begin

    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        found = await asyncio.gather(*[one(session, model) for model in models])
        return [answer for each in found for answer in each]


def client(pipe: Connection) -> None:
    """Be some of the clients."""
    while (asked := pipe.recv()) is not None:
        function, *arguments = asked
        pipe.send(asyncio.run(function(*arguments)))


def start_clients() -> list[Connection]:
    """Start the processes in which clients run."""
    context, pipes = get_context("spawn"), []
    for _ in range(8):
        mine, other = context.Pipe()
        context.Process(target=client, args=(other,), daemon=True).start()
        pipes.append(mine)
    return pipes


def compare_servers(part: str, sglang: str | None = None) -> list[dict[str, Any]]:
    """Compare the servers of a part.

    Args:
        part: `http` or `sglang`.
        sglang: folder of SGLang's packages.
    """
    rounds, cases = SERVED[part]
    servers = {kind: start_server(kind, sglang) for kind in dict(cases)}
    for kind, server in servers.items():
        wait_for(PORTS[kind], server)
        print(f"{kind} answers after {time.monotonic() - START:.0f} s", flush=True)
    pipes = start_clients()
    found: dict[tuple[str, str, bool], list[dict[str, float]]] = {}
    # The first round warms up.
    for turn in range(rounds + 1):
        for stream in (False, True):
            first = turn % len(cases)
            for kind, case in cases[first:] + cases[:first]:
                values = requests(pipes, kind, case, stream=stream, seed=1000 * turn)
                print(f"{turn} {kind} {case} {stream}: {values}", flush=True)
                if turn:
                    found.setdefault((kind, case, stream), []).append(values)
    for pipe in pipes:
        pipe.send(None)
    for server in servers.values():
        server.terminate()
    return served(part, found)


def wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    """Wait until a server answers."""
    until = time.monotonic() + 300
    while True:
        if server.poll() is not None:
            raise SystemExit(f"The server of port {port} ended with {server.returncode}.")
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=2).read()
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(1)
        else:
            return


def requests(
    pipes: Sequence[Connection], kind: str, case: str, *, stream: bool, seed: int
) -> dict[str, float]:
    """Let all clients send their requests, and wait for all answers."""
    before = "base:" if kind == "sglang_lora" else ""
    names = [f"{before}a{n % 32}" if case == "32_adapters" else "base" for n in range(CLIENTS)]
    share = CLIENTS // len(pipes)
    begin = time.perf_counter()
    for index, pipe in enumerate(pipes):
        mine = names[index * share : (index + 1) * share]
        pipe.send((clients, kind, mine, stream, seed + index + 50 * stream))
    answers = [one for pipe in pipes for one in pipe.recv()]
    took = time.perf_counter() - begin
    first = statistics.median(one[0] for one in answers)
    return {"tokens": CLIENTS * TURNS * NEW / took, "first": first * 1e3}


def served(part: str, found: dict[tuple[str, str, bool], list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Turn the rounds into results, and print them."""
    records = []
    for (kind, case, stream), values in found.items():
        name = f"{part}/{kind}/{case}/{'stream' if stream else 'whole'}/{CLIENTS}clients"
        metrics = {"tokens_per_s": [one["tokens"] for one in values]}
        if stream:
            metrics["first_token_ms"] = [one["first"] for one in values]
        for other, (its_kind, its_case) in OVER.items():
            if theirs := found.get((its_kind, its_case, stream)):
                pairs = list(zip(values, theirs, strict=True))
                metrics[f"rate_over_{other}"] = [one["tokens"] / two["tokens"] for one, two in pairs]
                if stream:
                    metrics[f"first_token_over_{other}"] = [one["first"] / two["first"] for one, two in pairs]
        for metric, each in metrics.items():
            unit = "x" if "over" in metric else "ms" if "ms" in metric else "1/s"
            middle = statistics.median(each)
            records.append(record("serve_vllm", name, metric, round(middle, 4), unit, **interval(each)))
            print(f"{name:48} {metric:22} {middle:10.3f} {unit}", flush=True)
    return records


async def streams(count: int, seed: int) -> list[float]:
    """Stream answers of the base; return the seconds from one part of an answer to the next."""
    import aiohttp

    chosen = random.Random(seed)

    async def one(session: aiohttp.ClientSession) -> list[float]:
        times = []
        async with session.post(url("rayft"), json=question("base", chosen, STREAMED)) as answer:
            assert answer.status == 200, await answer.text()
            async for line in answer.content:
                if has_text(line):
                    times.append(time.perf_counter())
        return [later - earlier for earlier, later in pairwise(times[20:])]

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=120)) as session:
        rows = await asyncio.gather(*[one(session) for _ in range(count)])
    return [gap for row in rows for gap in row]


def url(kind: str) -> str:
    """Return where a server answers."""
    return f"http://127.0.0.1:{PORTS[kind]}/v1/completions"


def question(model: str, chosen: random.Random, tokens: int, *, stream: bool = True) -> dict[str, Any]:
    """Return the body of a request."""
    ids = [chosen.randrange(5, 32000) for _ in range(PROMPT)]
    return {"model": model, "prompt": ids, "max_tokens": tokens, "temperature": 0, "stream": stream}


def has_text(line: bytes) -> bool:
    """Return whether a line of a stream has a part of the answer."""
    return line.startswith(b"data: {") and bool(json.loads(line[6:])["choices"][0]["text"])


def first_token(client: Any, model: str, chosen: random.Random) -> float:
    """Return the milliseconds until an answer begins, over a connection that is open already."""
    begin = time.perf_counter()
    with client.stream("POST", url("rayft"), json=question(model, chosen, 4)) as answer:
        lines = answer.iter_lines()
        first = next(time.perf_counter() for line in lines if has_text(line.encode()))
        collections.deque(lines, maxlen=0)
    return (first - begin) * 1e3


def between(pipes: Sequence[Connection], seed: int, ask: Callable[[], object] | None) -> list[float]:
    """Stream answers of the base.

    Args:
        pipes: lead to the clients that stream.
        seed: of the prompts.
        ask: called each second; None for nothing.

    Returns:
        The seconds between parts of an answer, sorted.
    """
    for index, pipe in enumerate(pipes):
        pipe.send((streams, ROWS // len(pipes), seed + index))
    while not all(pipe.poll() for pipe in pipes):
        begin = time.perf_counter()
        if ask is not None:
            ask()
        time.sleep(max(0.0, (0.05 if ask is None else 1.0) - (time.perf_counter() - begin)))
    return sorted(gap for pipe in pipes for gap in pipe.recv())


def evicted_and_loaded(client: Any, pipes: Sequence[Connection]) -> dict[str, float]:
    """Measure the part `tier`: name → milliseconds."""
    chosen, found = random.Random(0), dict[str, float]()
    # In turn, so that each one was evicted since it was used; the first round warms up.
    evicted = itertools.cycle(f"large{number}" for number in range(EVICTING))
    new = (f"new{number}" for number in itertools.count())

    def first() -> float:
        return first_token(client, next(evicted), chosen)

    def read() -> None:
        """Serve an adapter that the server has not read yet, and end that."""
        adapters, name = f"http://127.0.0.1:{PORTS['rayft']}/v1/adapters", next(new)
        body = {"name": name, "source": str(WORK / "large")}
        client.post(adapters, json=body).raise_for_status()
        first_token(client, name, chosen)
        client.delete(f"{adapters}/{name}").raise_for_status()

    for _ in range(EVICTING):
        first()
    pairs = []
    for name in itertools.islice(evicted, 24):
        pairs.append([first_token(client, name, chosen) for _ in range(2)])
    found["evicted_first_token_ms"], found["there_first_token_ms"] = map(
        statistics.median, zip(*pairs, strict=True)
    )
    between(pipes, 0, first)
    for turn in range(TIER_ROUNDS):
        resident = next(evicted)
        first_token(client, resident, chosen)
        again = partial(first_token, client, resident, chosen)
        for name, ask in (("quiet", None), ("asked", again), ("loading", first), ("reading", read)):
            gaps = between(pipes, 100 * turn, ask)
            for share in (50, 99):
                found[f"{name}_p{share}_ms/{turn}"] = gaps[len(gaps) * share // 100] * 1e3
    return found


def tier() -> list[dict[str, Any]]:
    """Measure adapters that the device has no room for, through rayft's server."""
    import httpx

    server = subprocess.Popen([sys.executable, __file__, "--serve", "tier"])
    wait_for(PORTS["rayft"], server)
    pipes = start_clients()
    with httpx.Client(timeout=60) as client:
        found = evicted_and_loaded(client, pipes)
    for pipe in pipes:
        pipe.send(None)
    server.terminate()
    for name, value in found.items():
        print(f"tier {name:30} {value:.3f}", flush=True)
    return [record("serve_vllm", "tier/1b", name, round(value, 4), "ms") for name, value in found.items()]


def main() -> None:
    """Run the parts, and save the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default="inprocess,many,kernels,async,load,http,tier")
    parser.add_argument("--commit", help="commit that is measured, where there is no git")
    parser.add_argument("--serve", help="serve with rayft for this part (used by http, sglang and tier)")
    parser.add_argument("--sglang", help="folder of SGLang's packages, for the part sglang")
    arguments = parser.parse_args()
    if arguments.serve:
        rayft_server(arguments.serve)
        return
    parts = arguments.parts.split(",")
    if "sglang" in parts and not arguments.sglang:
        parser.error("The part sglang needs --sglang, the folder that SGLang is installed in.")
    prepare()
    for known, run in ((INPROCESS, inprocess), (("async", "load"), asynchronous)):
        if set(known) & set(parts):
            keep(run(parts), arguments.commit)
    for part in SERVED:
        if part in parts:
            keep(compare_servers(part, arguments.sglang), arguments.commit)
    if "tier" in parts:
        keep(tier(), arguments.commit)


def keep(records: list[dict[str, Any]], commit: str | None) -> None:
    """Save results."""
    save("serve_vllm", [{**item, "commit": commit} for item in records] if commit else records)


if __name__ == "__main__":
    main()
