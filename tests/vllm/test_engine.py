"""The engine over workers on a CPU, in place of vLLM's processes; tests/gpu has it over vLLM itself."""

from __future__ import annotations

import asyncio
import math
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch

from rayft.artifacts import AdapterArtifact
from rayft.errors import ArtifactError, BadRequestError, ModelError, RequestError, ResourceError
from rayft.kernels.grouped_lora import WIDEST
from rayft.numerics import derive_seed
from rayft.serving.engine.api import EngineLimits, GenerationRequest, NoRoomError, Progress, TokenLogprob
from rayft.serving.engine.vllm import engine as engines
from rayft.serving.engine.vllm.engine import VllmEngine, VllmOptions, _Answer, _start_error
from rayft.serving.engine.vllm.files import SWITCH_SECONDS
from rayft.serving.engine.vllm.plugin import ANSWERS, ERROR_FILE
from tests.unit.serving.adapters import random_adapter
from tests.vllm.layers import BYTES, MLP, SHAPES, configuration, managed, new_model, new_weights, worker

arg_utils = pytest.importorskip("vllm.engine.arg_utils")
AsyncLLM = pytest.importorskip("vllm.v1.engine.async_llm").AsyncLLM
EngineDeadError = pytest.importorskip("vllm.v1.engine.exceptions").EngineDeadError
VLLMValidationError = pytest.importorskip("vllm.exceptions").VLLMValidationError
Logprob = pytest.importorskip("vllm.logprobs").Logprob
loggers = pytest.importorskip("vllm.v1.metrics.loggers")
outputs = pytest.importorskip("vllm.outputs")
sampling = pytest.importorskip("vllm.sampling_params")
stats = pytest.importorskip("vllm.v1.metrics.stats")
UsageContext = pytest.importorskip("vllm.usage.usage_lib").UsageContext

SMALL = BYTES // 4
OPTIONS = VllmOptions("base", None, torch.float32, SMALL, end=7)
LIMITS = EngineLimits(max_running=8, max_batch_tokens=256, cache_tokens=1000)
END = 2

Start = Callable[..., VllmEngine]


class Llm:
    """What the engine uses of AsyncLLM, over workers in this process."""

    # The limits by which vLLM checks requests.
    model_config = SimpleNamespace(
        max_model_len=128,
        max_logprobs=20,
        logits_processors=None,
        is_diffusion=False,
        get_vocab_size=lambda: 64,
    )
    vllm_config = SimpleNamespace(
        speculative_config=None,
        structured_outputs_config=SimpleNamespace(backend="xgrammar", enable_in_reasoning=False),
    )

    def __init__(self, arguments: Any, stat_loggers: Sequence[Any]) -> None:
        self.arguments, self.stat_loggers = arguments, stat_loggers
        config = configuration(arguments.additional_config["rayft"]["adapter_bytes"])
        self.managers = [
            managed(
                new_model(
                    new_weights(),
                ),
                config,
            )
        ]
        self.errored = self.stopped = False
        self.asked: list[dict[str, Any]] = []
        self.called: list[str] = []
        self.closed: list[str] = []
        self.answers: list[Any] = []
        """What requests are answered with; an exception is raised."""

    def get_tokenizer(self) -> Any:
        return object()

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        if self.errored:
            raise EngineDeadError
        self.called.append(method)
        found = []
        for manager in self.managers:
            extension = worker.WorkerExtension()
            extension.model_runner = SimpleNamespace(lora_manager=manager)
            found.append(getattr(extension, method)(*args))
        return found

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, *, lora_request: Any = None
    ) -> AsyncIterator[Any]:
        # As vLLM does when it is awaited.
        config = self.vllm_config.structured_outputs_config
        sampling_params.verify(self.model_config, None, config, self.get_tokenizer())
        self.asked.append({"prompt": prompt, "params": sampling_params, "lora": lora_request})
        try:
            for answer in self.answers:
                if isinstance(answer, Exception):
                    raise answer
                yield answer
        finally:
            self.closed.append(request_id)

    def shutdown(self) -> None:
        self.stopped = True

    @property
    def free(self) -> list[int]:
        return [manager.free_bytes for manager in self.managers]


def output(tokens: Sequence[int], finish: str | None = None, **given: Any) -> Any:
    """Return what vLLM sends of a request."""
    made = outputs.CompletionOutput(0, "", [*tokens], None, given.pop("logprobs", None), finish_reason=finish)
    return outputs.RequestOutput(
        "0", None, None, given.pop("prompt_logprobs", None), [made], finish is not None, **given
    )


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Start:
    """Return a function that starts an engine over `Llm`, with some options changed."""

    def make(**changed: Any) -> VllmEngine:
        # vLLM looks for a model that is no folder.
        return VllmEngine(replace(OPTIONS, model=str(tmp_path), **changed), LIMITS, [END])

    def from_engine_args(arguments: Any, usage_context: Any, stat_loggers: Any = None) -> Llm:
        # vLLM chooses the size of a step by it.
        assert usage_context is UsageContext.OPENAI_API_SERVER
        return Llm(arguments, stat_loggers)

    monkeypatch.setattr(AsyncLLM, "from_engine_args", from_engine_args)
    monkeypatch.setattr(engines, "installed", lambda: "0.26.0")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    return make


def run(start: Start, scenario: Callable[[VllmEngine, Any], Awaitable[Any]]) -> Any:
    """Run a scenario with an engine and its `Llm`."""

    async def made() -> Any:
        engine = start()
        return await scenario(engine, engine._llm)

    return asyncio.run(made())


async def ask(engine: VllmEngine, request: GenerationRequest) -> list[Progress]:
    async with aclosing(engine.submit(request)) as steps:
        return [step async for step in steps]


def test_the_threads_of_the_replica_and_of_the_worker_give_way_often(start: Start) -> None:
    before = sys.getswitchinterval()

    async def scenario(engine: VllmEngine, llm: Any) -> None:
        assert sys.getswitchinterval() == pytest.approx(SWITCH_SECONDS)
        sys.setswitchinterval(before)
        worker.WorkerManager(llm.vllm_config, torch.device("cpu"))
        assert sys.getswitchinterval() == pytest.approx(SWITCH_SECONDS)

    try:
        run(start, scenario)
    finally:
        sys.setswitchinterval(before)


def test_vllm_takes_the_arguments(start: Start) -> None:
    async def scenario(engine: VllmEngine, llm: Any) -> None:
        found = llm.arguments
        assert isinstance(found, arg_utils.AsyncEngineArgs)
        assert (found.dtype, found.max_num_seqs, found.max_num_batched_tokens) == ("float32", 8, 256)
        assert (found.num_gpu_blocks_override, found.block_size) == (63, 16), "1000 tokens in blocks of 16"
        assert (found.enable_lora, found.max_loras) == (True, 8)
        assert found.enable_prefix_caching is True
        assert found.quantization is None
        assert found.max_lora_rank == WIDEST
        assert found.structured_outputs_config["disable_any_whitespace"], "JSON on one line"
        module, _, name = found.worker_extension_cls.rpartition(".")
        assert (module, name) == (worker.__name__, worker.WorkerExtension.__name__)
        assert found.additional_config["rayft"]["adapter_bytes"] == SMALL
        assert engine.linears == SHAPES
        assert engine.context == 128
        assert ANSWERS not in os.environ
        assert not llm.stopped

    run(start, scenario)


def test_vllm_quantises_an_fp8_base(start: Start) -> None:
    async def scenario(_: VllmEngine, llm: Any) -> None:
        assert llm.arguments.quantization == "fp8"

    run(lambda: start(fp8=True), scenario)


def test_the_counts_of_steps_are_vllms(start: Start) -> None:
    async def scenario(engine: VllmEngine, llm: Any) -> None:
        counts = llm.stat_loggers[0](None, 0)
        assert isinstance(counts, loggers.StatLoggerBase)
        counts.log_engine_initialized()
        counts.record(None, None)
        for adapters, requests, tokens in (({"a": 2, "b": 1}, 4, 9), ({"a": 2}, 2, 2), ({}, 1, 1)):
            scheduled = stats.SchedulerStats(num_running_reqs=requests, running_lora_adapters=adapters)
            step = stats.IterationStats()
            step.num_generation_tokens = tokens
            counts.record(scheduled, step, None, 0)
        found = engine.stats()
        assert (found.alive, found.forwards, found.tokens) == (True, 3, 12)
        assert (found.max_requests_in_forward, found.max_slots_in_forward) == (4, 3), "the base is one"
        llm.errored = True
        assert not engine.stats().alive

    run(start, scenario)


def test_without_the_plugin_it_does_not_start(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Llm] = []

    def deaf(arguments: Any, usage_context: Any, stat_loggers: Any = None) -> Llm:
        with monkeypatch.context() as context:
            context.delenv(ANSWERS)
            made.append(Llm(arguments, stat_loggers))
        return made[-1]

    monkeypatch.setattr(AsyncLLM, "from_engine_args", deaf)
    with pytest.raises(ResourceError, match=r"active in 0 of vLLM's 1 workers.*VLLM_PLUGINS"):
        run(start, lambda *_: pytest.fail("started"))
    assert made[0].stopped


def test_a_worker_without_the_plugin_is_one_too_many(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    shutdown = MagicMock()
    monkeypatch.setattr(Llm, "shutdown", shutdown)
    # `Llm` has one worker, which answers.
    with pytest.raises(ResourceError, match="active in 1 of vLLM's 2 workers"):
        run(lambda: start(gpus=2), lambda *_: pytest.fail("started"))
    shutdown.assert_called_once_with()


@pytest.mark.parametrize("written", [None, "OutOfMemoryError: CUDA out of memory"])
def test_a_failed_start_has_the_reason_of_the_process_that_failed(
    written: str | None, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        if written is not None:
            (Path(os.environ[ANSWERS]) / ERROR_FILE).write_text(written, encoding="utf-8")
        raise RuntimeError("Engine core initialization failed. See root cause above.")

    monkeypatch.setattr(AsyncLLM, "from_engine_args", fail)
    error, message = (ModelError, "root cause above") if written is None else (ResourceError, written)
    with pytest.raises(error, match=message):
        run(start, lambda *_: pytest.fail("started"))
    assert ANSWERS not in os.environ


@pytest.mark.parametrize(
    "cause",
    [
        "ValueError: No available memory for the cache blocks. Try increasing gpu_memory_utilization",
        "ValueError: Free memory on device cuda:0 (3/80 GiB) on startup is less than desired",
        "ValueError: 4 GiB KV cache is needed, which is larger than the available KV cache memory (1 GiB)",
        "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
        "ResourceError: the GPU has no memory for 9 bytes of adapters beside the base; lower device_bytes",
    ],
)
def test_too_little_memory_names_the_settings(cause: str) -> None:
    error = _start_error(cause, OPTIONS)
    assert isinstance(error, ResourceError)
    for setting in ("device_bytes", "cache_tokens", "gpu_memory", cause, f"{SMALL:,}"):
        assert setting in str(error)


def test_other_reasons_are_the_models() -> None:
    error = _start_error("ValueError: architecture Mamba9 is not supported", OPTIONS)
    assert isinstance(error, ModelError)
    assert "base" in str(error)
    assert "Mamba9" in str(error)


def test_adapters_come_and_go(start: Start) -> None:
    first, second = random_adapter("first", SHAPES), random_adapter("second", SHAPES, rank=9, selector=True)

    async def scenario(engine: VllmEngine, llm: Any) -> None:
        llm.answers = [output([1], "length")]
        before, seen = llm.free, []
        for artifact in (first, second, first):
            await engine.load("one", artifact)
            assert llm.free < before
            await ask(engine, GenerationRequest((1,), 1, "one"))
            request = llm.asked[-1]["lora"]
            assert request.lora_name == artifact.content_hash
            assert request.lora_int_id in llm.managers[0].list_adapters()
            seen.append(request.lora_int_id)
            engine.unload("one")
            await asyncio.gather(*engine._tasks)
            assert llm.free == before
        assert len({*seen}) == 3, "a number stands for one content"
        await ask(engine, GenerationRequest((1,), 1))
        assert llm.asked[-1]["lora"] is None

    run(start, scenario)


def test_a_lower_rank_is_made_once_and_leaves_with_its_adapter(start: Start) -> None:
    artifact = random_adapter("one", SHAPES, rank=6)

    async def scenario(engine: VllmEngine, llm: Any) -> None:
        llm.answers = [output([1], "length")]
        before = llm.free
        await engine.load("one", artifact)
        ranks = (6, 2, 2, 3, None, 9)
        await asyncio.gather(*[ask(engine, GenerationRequest((1,), 1, "one", rank=rank)) for rank in ranks])
        names = sorted(asked["lora"].lora_name for asked in llm.asked)
        own = artifact.content_hash
        assert names == [own] * 3 + [f"{own}@r2"] * 2 + [f"{own}@r3"]
        assert len(llm.managers[0].list_adapters()) == 3
        engine.unload("one")
        await asyncio.gather(*engine._tasks)
        assert llm.free == before
        assert llm.managers[0].list_adapters() == set()

    run(start, scenario)


def test_a_lower_rank_that_a_client_leaves_while_it_is_made_leaves_nothing(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(engine: VllmEngine, llm: Any) -> None:
        await engine.load("one", random_adapter("one", SHAPES, rank=6))
        call, made = llm.collective_rpc, asyncio.Event()

        async def slowly(method: str, args: tuple[Any, ...] = ()) -> list[Any]:
            found: list[Any] = await call(method, args)
            if method == "rayft_view":
                made.set()
                await asyncio.Event().wait()
            return found

        monkeypatch.setattr(llm, "collective_rpc", slowly)
        asking = asyncio.create_task(ask(engine, GenerationRequest((1,), 1, "one", rank=2)))
        await made.wait()
        assert len(llm.managers[0].list_adapters()) == 2
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await asyncio.gather(*engine._tasks)
        assert len(llm.managers[0].list_adapters()) == 1

    run(start, scenario)


@pytest.mark.parametrize(
    ("artifact", "error", "message"),
    [
        (random_adapter("elsewhere", {"elsewhere": (4, 4)}), ArtifactError, "no linear layer elsewhere"),
        (random_adapter("experts", {f"{MLP}.experts.0.w1": (48, 32)}), ArtifactError, "no linear layer .*w1"),
        (random_adapter("output", {"lm_head": (64, 32)}), ArtifactError, "no linear layer lm_head"),
        (random_adapter("narrow", {f"{MLP}.down_proj": (32, 40)}), ArtifactError, "is 32x48 in vLLM's model"),
        # It is too large for the memory too, but that is not looked at.
        (random_adapter("wide", SHAPES, rank=WIDEST + 1), ArtifactError, f"ranks up to {WIDEST}"),
        (random_adapter("large", SHAPES, rank=255), NoRoomError, "does not fit"),
    ],
    ids=["layer", "experts", "output", "shape", "rank", "room"],
)
def test_an_adapter_that_one_worker_refuses_is_in_none(
    artifact: AdapterArtifact, error: type[Exception], message: str, start: Start
) -> None:
    async def scenario(engine: VllmEngine, llm: Any) -> None:
        if error is NoRoomError:
            # Another worker has room.
            llm.managers.insert(0, managed(new_model(new_weights()), configuration(BYTES)))
        else:
            llm.managers.append(llm.managers[0])
        before = llm.free
        with pytest.raises(error, match=message):
            await engine.load("one", artifact)
        await asyncio.gather(*engine._tasks)
        assert llm.free == before
        await engine.load("one", random_adapter("good", SHAPES))

    run(start, scenario)


def test_a_load_that_is_cancelled_leaves_nothing(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(engine: VllmEngine, llm: Any) -> None:
        (manager,), before, copied = llm.managers, llm.free, threading.Event()
        copy = manager._copy

        def slowly(*arguments: Any) -> Any:
            copied.wait()
            return copy(*arguments)

        monkeypatch.setattr(manager, "_copy", slowly)
        loading = asyncio.create_task(engine.load("one", random_adapter("one", SHAPES)))
        while llm.free == before:
            await asyncio.sleep(0.001)
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading
        copied.set()
        await asyncio.gather(*engine._tasks)
        manager._threads.submit(int).result()
        assert llm.free == before
        await engine.load("one", random_adapter("one", SHAPES))

    run(start, scenario)


def test_a_load_that_is_cancelled_while_it_is_written_does_not_disturb_the_next(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (random_adapter(name, SHAPES, rank=6) for name in ("first", "second"))

    async def scenario(engine: VllmEngine, llm: Any) -> None:
        write, begun, go_on = engine._channel.write, threading.Event(), threading.Event()

        def slowly(artifact: AdapterArtifact) -> Path:
            if artifact is first:
                begun.set()
                go_on.wait()
            return write(artifact)

        monkeypatch.setattr(engine._channel, "write", slowly)
        given_up = asyncio.create_task(engine.load("first", first))
        await asyncio.to_thread(begun.wait)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        loading = asyncio.create_task(engine.load("second", second))
        await asyncio.sleep(0.01)
        go_on.set()
        await loading
        (manager,) = llm.managers
        slot = manager._slots[engine._adapters["second"].request.lora_int_id]
        for name, layer in zip(manager._table.shapes, manager._table.layers, strict=True):
            assert torch.equal(layer[slot].b, second.modules[name].b)

    run(start, scenario)


def test_workers_are_asked_once_and_the_loop_computes_nothing(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, threads = random_adapter("one", SHAPES), []

    def content_hash(_: AdapterArtifact) -> str:
        threads.append(threading.current_thread())
        return "0123"

    monkeypatch.setattr(AdapterArtifact, "content_hash", property(content_hash))

    async def scenario(engine: VllmEngine, llm: Any) -> None:
        write = engine._channel.write

        def written(artifact: AdapterArtifact) -> Path:
            threads.append(threading.current_thread())
            return write(artifact)

        monkeypatch.setattr(engine._channel, "write", written)
        (manager,) = llm.managers
        copy = manager._copy

        def slowly(*arguments: Any) -> Any:
            time.sleep(0.05)
            return copy(*arguments)

        monkeypatch.setattr(manager, "_copy", slowly)
        await engine.load("one", artifact)
        assert llm.called == ["rayft_load", "rayft_loaded"]
        assert len(threads) == 2
        assert threading.current_thread() not in threads

    run(start, scenario)


def test_a_worker_that_leaves_no_mark_is_asked(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "ASK_SECONDS", 0.02)

    async def scenario(engine: VllmEngine, llm: Any) -> None:
        monkeypatch.setattr(llm.managers[0]._inbox, "mark", lambda _: None)
        await engine.load("one", random_adapter("one", SHAPES))
        llm.managers[0]._threads.submit(time.sleep, 0.1)
        loading = asyncio.create_task(engine.load("two", random_adapter("two", SHAPES)))
        await asyncio.sleep(0.05)
        llm.errored = True
        with pytest.raises(ResourceError, match="has stopped"):
            await loading

    run(start, scenario)


def test_an_engine_that_was_stopped_loads_nothing(start: Start) -> None:
    async def scenario(engine: VllmEngine, llm: Any) -> None:
        await engine.load("one", random_adapter("one", SHAPES))
        gate = threading.Event()
        llm.managers[0]._threads.submit(gate.wait)
        loading = asyncio.create_task(engine.load("two", random_adapter("two", SHAPES)))
        while llm.called[-1] != "rayft_load":
            await asyncio.sleep(0.001)
        for _ in range(2):
            engine.stop()
        with pytest.raises(ResourceError, match="has stopped"):
            await loading
        with pytest.raises(ResourceError, match="has stopped"):
            await engine.load("three", random_adapter("three", SHAPES))
        gate.set()
        engine._thread.shutdown()
        assert engine._channel._handle is None

    run(start, scenario)


def test_an_engine_that_dies_during_a_call_leaves_nobody_waiting(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "ASK_SECONDS", 0.01)

    async def scenario(engine: VllmEngine, llm: Any) -> None:
        await engine.load("one", random_adapter("one", SHAPES))

        async def unanswered(method: str, args: tuple[Any, ...] = ()) -> list[Any]:
            # As vLLM's: only later calls raise.
            llm.errored = True
            await asyncio.Event().wait()
            return []

        monkeypatch.setattr(llm, "collective_rpc", unanswered)
        async with asyncio.timeout(60):
            with pytest.raises(ResourceError, match="has stopped"):
                await engine.load("two", random_adapter("two", SHAPES))
            with pytest.raises(ResourceError, match="has stopped"):
                await ask(engine, GenerationRequest((1,), 1, "one", rank=1))
            await asyncio.gather(*engine._tasks)

    run(start, scenario)


def test_the_error_of_a_dead_engine_says_so(start: Start) -> None:
    artifact = random_adapter("one", SHAPES)

    async def scenario(engine: VllmEngine, llm: Any) -> None:
        await engine.load("one", artifact)
        llm.errored, llm.answers = True, [EngineDeadError()]
        with pytest.raises(ResourceError, match="has stopped"):
            await engine.load("two", artifact)
        with pytest.raises(ResourceError, match="has stopped"):
            await ask(engine, GenerationRequest((1,), 1, "one"))
        engine.unload("one")
        await asyncio.gather(*engine._tasks)
        engine.stop()
        assert llm.stopped

    run(start, scenario)


@pytest.mark.parametrize(
    ("raised", "error", "message"),
    [
        (ValueError("prompt too long"), BadRequestError, "refuses the request: prompt too long"),
        (VLLMValidationError("prompt too long"), BadRequestError, "refuses the request: prompt too long"),
        (RuntimeError("broken"), RequestError, "engine failed: RuntimeError: broken"),
        (EngineDeadError(), ResourceError, "has stopped"),
    ],
    ids=["refused", "invalid", "failed", "dead"],
)
def test_errors_of_vllm_are_ours(
    raised: Exception, error: type[Exception], message: str, start: Start
) -> None:
    async def scenario(engine: VllmEngine, llm: Any) -> None:
        llm.answers = [output([5]), raised]
        with pytest.raises(error, match=message):
            await ask(engine, GenerationRequest((1,), 9))
        assert engine.stats().running == 0

    run(start, scenario)


def test_parameters_that_vllm_refuses_are_a_bad_request(start: Start) -> None:
    async def scenario(engine: VllmEngine, _: Any) -> None:
        with pytest.raises(BadRequestError, match=r"refuses the request.*top_p"):
            engine.submit(GenerationRequest((1,), 1, temperature=1.0, top_p=1.5))

    run(start, scenario)


@pytest.mark.parametrize(
    ("options", "message", "param"),
    [
        ({"json_schema": '{"type": "strng"}'}, 'Unsupported type "strng"', "response_format"),
        ({"json_schema": '{"not": {}}'}, "'not', which is not supported", "response_format"),
        ({"logprobs": 21}, "logprobs", None),
    ],
    ids=["schema", "part of a schema", "option"],
)
def test_what_vllm_would_refuse_later_is_refused_before_the_request_is_accepted(
    options: dict[str, Any], message: str, param: str | None, start: Start
) -> None:
    async def scenario(engine: VllmEngine, llm: Any) -> None:
        with pytest.raises(BadRequestError, match=message) as caught:
            engine.submit(GenerationRequest((1,), 1, **options))
        assert caught.value.param == param
        assert llm.asked == []

    run(start, scenario)


def test_a_token_that_only_the_tokenizer_has_is_refused(start: Start) -> None:
    async def scenario(engine: VllmEngine, llm: Any) -> None:
        size = llm.model_config.get_vocab_size()
        with pytest.raises(BadRequestError, match=f"the token {size}, .* 0 to {size - 1}"):
            engine.submit(GenerationRequest((1, size), 1))
        llm.answers = [output([1], "length")]
        assert await ask(engine, GenerationRequest((1, size - 1), 1))

    run(start, scenario)


def test_a_request_with_a_schema_reaches_vllm(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    # vLLM imports what it needs for every backend.
    monkeypatch.setitem(sys.modules, "lmformatenforcer", MagicMock())

    async def scenario(engine: VllmEngine, llm: Any) -> None:
        llm.answers = [output([5], "length")]
        await ask(engine, GenerationRequest((1,), 1, json_schema='{"type": "object"}'))
        assert llm.asked[0]["params"].structured_outputs.json == '{"type": "object"}'

    run(start, scenario)


def test_a_closed_request_is_closed_in_vllm(start: Start) -> None:
    async def scenario(engine: VllmEngine, llm: Any) -> None:
        llm.answers = [output([5]), output([6]), output([7])]
        async with aclosing(engine.submit(GenerationRequest((1, 2), 9))) as steps:
            assert (await anext(steps)).tokens == (5,)
            assert engine.stats().running == 1
            assert llm.closed == []
        assert len(llm.closed) == 1
        assert engine.stats().running == 0
        assert llm.asked[0]["prompt"]["prompt_token_ids"] == [1, 2]

    run(start, scenario)


@pytest.mark.parametrize(
    ("request_", "wanted"),
    [
        (
            GenerationRequest((1,), 7),
            {"max_tokens": 7, "temperature": 0.0, "seed": None, "logprobs": None, "prompt_logprobs": None,
             "stop_token_ids": [END], "structured_outputs": None, "repetition_penalty": 1.0},
        ),
        (
            GenerationRequest(
                (1,), 7, temperature=0.7, top_p=0.9, top_k=5, min_p=0.1, seed=3, stop_tokens=frozenset({9, 1})
            ),
            {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 3,
             "stop_token_ids": [1, END, 9]},
        ),
        (GenerationRequest((1,), 7, temperature=0.7, seed=-1), {"seed": derive_seed(-1)}),
        (
            GenerationRequest((1,), 0, logprobs=4, score_prompt=True, repetition_penalty=1.2),
            {"max_tokens": 1, "logprobs": 4, "prompt_logprobs": 4, "repetition_penalty": 1.2},
        ),
        (GenerationRequest((1,), 7, logprobs=0), {"logprobs": 0, "prompt_logprobs": None}),
    ],
    ids=["greedy", "drawn", "vLLM's sign for no seed", "scored", "own log-probability"],
)  # fmt: skip
def test_options_are_vllms(request_: GenerationRequest, wanted: dict[str, Any], start: Start) -> None:
    async def scenario(engine: VllmEngine, _: Any) -> None:
        params = engine._params(request_)
        assert {name: getattr(params, name) for name in wanted} == wanted
        assert params.output_kind is sampling.RequestOutputKind.DELTA
        assert not params.detokenize
        assert params.ignore_eos

    run(start, scenario)


def test_a_schema_is_vllms(start: Start) -> None:
    async def scenario(engine: VllmEngine, _: Any) -> None:
        params = engine._params(GenerationRequest((1,), 7, json_schema='{"type": "object"}'))
        assert params.structured_outputs.json == '{"type": "object"}'
        # What ends an answer is what xgrammar takes for the end, and what the request asks for.
        assert params.stop_token_ids == [OPTIONS.end]
        stops = frozenset({3})
        asked = engine._params(GenerationRequest((1,), 7, json_schema="{}", stop_tokens=stops))
        assert asked.stop_token_ids == [3, OPTIONS.end]

    run(start, scenario)


REQUEST = GenerationRequest((11, 12), 4)


def test_tokens_add_up_until_the_limit() -> None:
    answer = _Answer(REQUEST)
    sent = [output([5]), output([6, 7]), output([]), output([8], "length")]
    steps = [answer.take(one) for one in sent]
    assert [step.tokens for step in steps] == [(5,), (5, 6, 7), (5, 6, 7), (5, 6, 7, 8)]
    assert [step.generated for step in steps] == [1, 3, 3, 4]
    assert [step.finish for step in steps] == [None, None, None, "length"]
    assert steps[-1].end is None


def test_the_end_token_is_counted_and_not_shown() -> None:
    answer = _Answer(replace(REQUEST, logprobs=1))
    answer.take(output([5], logprobs=[{5: Logprob(-0.5, 1)}]))
    last = answer.take(output([6, END], "stop", logprobs=[{6: Logprob(-0.1, 1)}, {END: Logprob(-0.2, 1)}]))
    assert (last.tokens, last.generated, last.finish) == ((5, 6), 3, "stop")
    assert [entry.logprob for entry in last.logprobs] == [-0.5, -0.1]
    assert last.end == TokenLogprob(END, -0.2, ((END, -0.2),))


def test_a_token_that_is_not_among_the_most_likely_is_not_listed_there() -> None:
    answer = _Answer(replace(REQUEST, logprobs=2))
    found = {5: Logprob(-7.0, 40), 8: Logprob(-0.7, 2), 3: Logprob(-0.6, 1)}
    assert answer.take(output([5], logprobs=[found])).logprobs == (
        TokenLogprob(5, -7.0, ((3, -0.6), (8, -0.7))),
    )
    none = _Answer(replace(REQUEST, logprobs=0))
    assert none.take(output([3], logprobs=[{3: Logprob(-0.6, 1)}])).logprobs == (TokenLogprob(3, -0.6, ()),)


def test_the_prompts_log_probabilities_stay() -> None:
    scored = replace(REQUEST, logprobs=1, score_prompt=True)
    answer = _Answer(scored)
    first = answer.take(output([5], prompt_logprobs=[None, {12: Logprob(-0.3, 1)}]))
    assert first.prompt == (None, TokenLogprob(12, -0.3, ((12, -0.3),)))
    assert answer.take(output([6], "length")).prompt == first.prompt


@pytest.mark.parametrize("reason", ["length", "stop"])
def test_without_tokens_to_generate_vllms_one_is_dropped(reason: str) -> None:
    answer = _Answer(replace(REQUEST, max_tokens=0, logprobs=1, score_prompt=True))
    scores = [None, {12: Logprob(-0.3, 1)}]
    found = answer.take(output([5], reason, prompt_logprobs=scores, logprobs=[{5: Logprob(-1.0, 1)}]))
    assert (found.tokens, found.generated, found.finish, found.logprobs) == ((), 0, "length", ())
    assert len(found.prompt) == 2


@pytest.mark.parametrize(
    "given",
    [
        {"logprobs": [{5: Logprob(math.nan, 1)}]},
        {"prompt_logprobs": [None, {12: Logprob(math.nan, 1)}]},
        # vLLM says so if it counts NaN.
        {"metrics": stats.RequestStateStats(is_corrupted=True)},
    ],
    ids=["token", "prompt", "counted"],
)
def test_nan_is_an_error_as_on_a_cpu(given: dict[str, Any]) -> None:
    scored = replace(REQUEST, logprobs=1, score_prompt=True)
    _Answer(scored).take(output([5], logprobs=[{5: Logprob(-1.0, 1)}], metrics=stats.RequestStateStats()))
    with pytest.raises(RequestError, match=r"computed NaN or Inf .* dtype float32"):
        _Answer(scored).take(output([5], **given))


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_a_request_that_vllm_gives_up_is_an_error(reason: str) -> None:
    with pytest.raises(RequestError, match=rf"ended the request \({reason}\)"):
        _Answer(REQUEST).take(output([5], reason))
