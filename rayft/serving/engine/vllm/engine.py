"""The engine on GPUs: vLLM's AsyncLLM with rayft's adapters in it."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count
from math import isnan
from pathlib import Path
from typing import Any, TypeVar

import torch

from rayft.artifacts import AdapterArtifact, ModuleShapes
from rayft.errors import ArtifactError, BadRequestError, ModelError, RayftError, RequestError, ResourceError
from rayft.kernels.grouped_lora import WIDEST
from rayft.numerics import derive_seed
from rayft.serving.engine.api import (
    NOT_FINITE,
    STOPPED,
    EngineLimits,
    EngineStats,
    GenerationRequest,
    NoRoomError,
    Progress,
    TokenLogprob,
    check_prompt,
)
from rayft.serving.engine.vllm.files import SWITCH_SECONDS, Channel
from rayft.serving.engine.vllm.plugin import ANSWERS, CONFIG, ERROR_FILE, check_release
from rayft.serving.engine.vllm.schemas import check_schema
from rayft.serving.engine.vllm.shard import parts_of

__all__ = ["VllmEngine", "VllmOptions", "installed"]

T = TypeVar("T")

EXTENSION = "rayft.serving.engine.vllm.worker.WorkerExtension"
POLL_SECONDS = 0.005
"""Interval at which the engine looks whether the workers have read an adapter, which costs them nothing."""
ASK_SECONDS = 1.0
"""Time after which it asks them between two steps, in case that one of them has ended; and interval at which
it looks whether they can still answer."""
BLOCK = 16
"""Tokens in a block of the KV cache."""
NO_MEMORY = (
    "out of memory",
    "OutOfMemory",
    "No available memory",
    "Free memory",
    "has no memory",
    "larger than the available",
)
"""Parts of vLLM's messages about too little memory."""
ERRORS: Mapping[str, type[RayftError]] = {
    found.__name__: found for found in (ArtifactError, NoRoomError, ResourceError)
}


@dataclass(frozen=True)
class VllmOptions:
    """How vLLM runs a model."""

    model: str
    """Folder or hub id."""
    revision: str | None
    """Branch, tag or commit of a hub model."""
    dtype: torch.dtype
    """Dtype of weights and arithmetic."""
    adapter_bytes: int
    """Memory for adapters on each GPU."""
    gpus: int = 1
    """Number of GPUs that share the model (tensor parallelism)."""
    memory: float = 0.9
    """Share of each GPU's memory that the engine takes."""
    fp8: bool = False
    """Whether the base's linear layers are quantised to fp8 when it is loaded."""
    end: int | None = None
    """The tokenizer's token for the end of a sequence."""
    untested: bool = False
    """Whether releases of vLLM are allowed that were not tried on a GPU."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of vLLM's `AsyncEngineArgs`."""


@dataclass(eq=False)
class _Loaded:
    """An adapter in the workers."""

    artifact: AdapterArtifact
    request: Any
    """vLLM's `LoRARequest` at its own rank."""
    views: dict[int, Any] = field(default_factory=dict)
    """Lower rank → `LoRARequest`."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class VllmEngine:
    """See `rayft.serving.engine.api.Engine`. It is made and used in one event loop.

    vLLM keeps the keys and values of prompts, and finds them again by the adapter's name and the tokens. The
    name that it is given is the content's hash, with the rank, so an adapter that is loaded under the name of
    a former one never answers from the former's cache.
    """

    def __init__(self, options: VllmOptions, limits: EngineLimits, ends: Sequence[int]) -> None:
        """Start the processes of the engine, and load the model in them.

        Args:
            options: how the model is run.
            limits: limits of a step, and the size of the KV cache (0: what the GPU has memory for).
            ends: tokens that end every request.

        Raises:
            ResourceError: if vLLM is not installed, its release is not supported, or memory is lacking.
            ModelError: if vLLM can't run the model.
        """
        version = installed()
        check_release(version, untested=options.untested)
        self._ends, self._end, self._dtype = list(ends), options.end, options.dtype
        self._numbers, self._names = count(1), count()
        self._adapters: dict[str, _Loaded] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._counts = EngineStats(True, 0, 0, 0, 0, 0)
        self._running = 0
        self._loading = asyncio.Lock()
        with tempfile.TemporaryDirectory(prefix="rayft-vllm-") as folder:
            self._llm = _start(options, limits, folder, self._record)
            answers = [
                parts_of(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("*.json"))
            ]
        if len(answers) != options.gpus:
            self._llm.shutdown()
            raise ResourceError(
                f"rayft's plugin is active in {len(answers)} of vLLM's {options.gpus} workers, so adapters "
                "would not be served; install rayft in the environment of vLLM, and leave VLLM_PLUGINS "
                "unset or add rayft to it"
            )
        self.linears: ModuleShapes = {part.name: part.shape for part in answers[0]}
        """Layers that can have adapters, by their names in the model's files: outputs and inputs."""
        self.context = int(self._llm.model_config.max_model_len)
        """Longest sequence that fits into the KV cache and the model's context, in tokens."""
        sys.setswitchinterval(SWITCH_SECONDS)
        self._channel = Channel(answers, self._dtype)
        # One thread: what a cancelled load still does there is done before the next load begins.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rayft-load")
        self._stopped = False

    def submit(self, request: GenerationRequest) -> AsyncGenerator[Progress, None]:
        """Generate, and yield the progress as it comes, or the end; closing it ends the request.

        Raises:
            BadRequestError: at once, if vLLM refuses the request's options or can't follow its JSON schema,
                or the model does not have a token; during the iteration, if vLLM refuses the prompt.
            ResourceError: during the iteration, if the engine has stopped.
            RequestError: during the iteration, if vLLM fails.
        """
        from vllm.exceptions import VLLMValidationError

        if request.json_schema is not None:
            check_schema(request.json_schema)
        # vLLM refuses only tokens that the tokenizer does not have either.
        check_prompt(request.prompt, self._llm.model_config.get_vocab_size())
        config = self._llm.vllm_config
        try:
            params = self._params(request)
            # vLLM does this again, but only when the answer is awaited, and so after it was accepted.
            params.verify(
                self._llm.model_config,
                config.speculative_config,
                config.structured_outputs_config,
                self._llm.get_tokenizer(),
            )
        except (ValueError, VLLMValidationError) as error:
            raise BadRequestError(f"the engine refuses the request: {error}") from error
        return self._generate(request, params)

    async def _generate(self, request: GenerationRequest, params: Any) -> AsyncGenerator[Progress, None]:
        from vllm.exceptions import VLLMValidationError
        from vllm.inputs import TokensPrompt
        from vllm.v1.engine.exceptions import EngineDeadError

        adapter = await self._request(request)
        answer = _Answer(request)
        outputs = self._llm.generate(
            TokensPrompt(prompt_token_ids=list(request.prompt)),
            params,
            f"{next(self._names)}",
            lora_request=adapter,
        )
        self._running += 1
        try:
            async for output in outputs:
                progress = answer.take(output)
                yield progress
                if progress.finish is not None:
                    return
        except EngineDeadError as error:
            raise ResourceError(STOPPED) from error
        except (ValueError, VLLMValidationError) as error:
            raise BadRequestError(f"the engine refuses the request: {error}") from error
        except RayftError:
            raise
        except Exception as error:
            raise RequestError(f"the engine failed: {type(error).__name__}: {error}") from error
        finally:
            self._running -= 1
            # Closing it aborts the request in the engine, before any unload that is sent later.
            await outputs.aclose()

    async def load(self, name: str, artifact: AdapterArtifact) -> None:
        """Copy an adapter to the workers' GPUs while they go on generating.

        Raises:
            NoRoomError: if there is no room for it beside the others.
            ArtifactError: if it can't be served by vLLM.
            ResourceError: if it can't be passed to the workers.
        """
        assert name not in self._adapters, f"{name} is loaded already"
        number = next(self._numbers)
        # One at a time, since the workers copy one at a time.
        async with self._loading:
            path = str(await self._in_thread(self._channel.write, artifact))
            opened = False
            try:
                await self._call("rayft_load", number, path)
                # While they read.
                content = await self._in_thread(lambda: artifact.content_hash)
                problems = await self._until_read(number)
                opened = not any(problems)
            except BaseException:
                self._free([number])
                raise
            finally:
                if not self._stopped:
                    self._thread.submit(self._channel.settle, opened=opened)
        if any(problems):
            # Another worker may have had room.
            await self._call("rayft_unload", [number])
        _check(problems)
        self._adapters[name] = _Loaded(artifact, _lora_request(content, number, path))

    def unload(self, name: str) -> None:
        """Free an adapter that no running request uses, at all its ranks."""
        loaded = self._adapters.pop(name)
        self._free([request.lora_int_id for request in (loaded.request, *loaded.views.values())])

    def stats(self) -> EngineStats:
        """Return whether the engine is alive, and its counts."""
        return replace(self._counts, alive=not self._llm.errored, running=self._running)

    def stop(self) -> None:
        """Fail all running requests, and end the engine's processes."""
        self._llm.shutdown()
        if self._stopped:
            return
        self._stopped = True
        try:
            self._thread.submit(self._channel.close)
        except RuntimeError:
            # The interpreter is ending, and has ended the thread.
            self._channel.close()
        self._thread.shutdown(wait=False)

    async def _request(self, request: GenerationRequest) -> Any:
        """Return vLLM's name of the request's adapter at its rank, and make the view that it may need."""
        if request.adapter is None:
            return None
        loaded = self._adapters[request.adapter]
        rank = request.rank
        if rank is None or rank >= loaded.artifact.rank:
            return loaded.request
        async with loaded.lock:
            if rank not in loaded.views:
                number = next(self._numbers)
                try:
                    _check(await self._call("rayft_view", number, loaded.request.lora_int_id, rank))
                except BaseException:
                    # Some workers may have made it, or may still make it.
                    self._free([number])
                    raise
                name = f"{loaded.request.lora_name}@r{rank}"
                loaded.views[rank] = _lora_request(name, number, loaded.request.lora_path)
        return loaded.views[rank]

    def _params(self, request: GenerationRequest) -> Any:
        from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

        drawn = request.temperature > 0
        ends = self._ends
        if request.json_schema is not None and self._end is not None:
            # The only token that xgrammar knows as the end: others may be text in a string, and end it early.
            ends = [self._end]
        schema = request.json_schema
        return SamplingParams(
            max_tokens=max(request.max_tokens, 1),
            temperature=request.temperature,
            top_p=request.top_p if drawn else 1.0,
            top_k=request.top_k if drawn else 0,
            min_p=request.min_p if drawn else 0.0,
            repetition_penalty=request.repetition_penalty,
            # A request with a seed has a generator of its own, which costs time in each step.
            # vLLM takes -1 for none.
            seed=(derive_seed(-1) if request.seed == -1 else request.seed) if drawn else None,
            logprobs=request.logprobs,
            prompt_logprobs=request.logprobs if request.score_prompt else None,
            stop_token_ids=sorted({*ends, *request.stop_tokens}),
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA if request.progress else RequestOutputKind.FINAL_ONLY,
            structured_outputs=None if schema is None else StructuredOutputsParams(json=schema),
            # Nothing else uses these: vLLM copies them deeply otherwise.
            skip_clone=True,
        )

    async def _in_thread(self, call: Callable[..., T], *arguments: Any) -> T:
        """Call a function in the thread of loads."""
        if self._stopped:
            raise ResourceError(STOPPED)
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *arguments)

    async def _until_read(self, number: int) -> list[list[str]]:
        """Wait until all workers have read an adapter; return what `WorkerManager.loaded` says of it."""
        time = asyncio.get_running_loop().time
        while True:
            ask = time() + ASK_SECONDS
            while not self._stopped and not self._channel.was_read(number) and time() < ask:
                await asyncio.sleep(POLL_SECONDS)
            if self._stopped:
                raise ResourceError(STOPPED)
            answers: list[list[str] | None] = await self._call("rayft_loaded", number)
            found = [answer for answer in answers if answer is not None]
            if len(found) == len(answers):
                return found
            await asyncio.sleep(POLL_SECONDS)

    def _free(self, numbers: Sequence[int]) -> None:
        """Free adapters in the workers; what is sent to them later finds the room."""
        task = asyncio.get_running_loop().create_task(self._unload(numbers))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _unload(self, numbers: Sequence[int]) -> None:
        # An engine that has stopped has freed all.
        with suppress(ResourceError):
            await self._call("rayft_unload", list(numbers))

    async def _call(self, method: str, *arguments: Any) -> list[Any]:
        from vllm.v1.engine.exceptions import EngineDeadError

        call = asyncio.ensure_future(self._llm.collective_rpc(method, args=arguments))
        try:
            while not (await asyncio.wait({call}, timeout=ASK_SECONDS))[0]:
                # vLLM never answers the calls that an engine which ends has not answered.
                if self._llm.errored:
                    raise ResourceError(STOPPED)
            found: list[Any] = call.result()
        except EngineDeadError as error:
            raise ResourceError(STOPPED) from error
        finally:
            call.cancel()
        return found

    def _record(self, tokens: int, requests: int, adapters: int) -> None:
        """Count a step."""
        before = self._counts
        self._counts = replace(
            before,
            forwards=before.forwards + 1,
            tokens=before.tokens + tokens,
            max_requests_in_forward=max(before.max_requests_in_forward, requests),
            max_slots_in_forward=max(before.max_slots_in_forward, adapters),
        )


class _Answer:
    """The progress of one request."""

    def __init__(self, request: GenerationRequest) -> None:
        self._request = request
        self._ids: list[int] = []
        self._scored: list[TokenLogprob] = []
        self._prompt: tuple[TokenLogprob | None, ...] = ()

    def take(self, output: Any) -> Progress:
        """Add what vLLM has sent.

        Raises:
            RequestError: if vLLM has given the request up, or the model has computed NaN.
        """
        # Only known if VLLM_COMPUTE_NANS_IN_LOGITS is set, which costs time in each step.
        if output.metrics is not None and output.metrics.is_corrupted:
            raise RequestError(NOT_FINITE)
        if self._request.score_prompt and output.prompt_logprobs and not self._prompt:
            pairs = zip(self._request.prompt, output.prompt_logprobs, strict=True)
            self._prompt = tuple(self._score(token, found) if found else None for token, found in pairs)
        new = output.outputs[0]
        self._ids += new.token_ids
        if new.logprobs:
            pairs = zip(new.token_ids, new.logprobs, strict=True)
            self._scored += [self._score(token, found) for token, found in pairs]
        reason = new.finish_reason
        if reason not in {None, "stop", "length"}:
            raise RequestError(f"the engine ended the request ({reason}); try again")
        if self._request.max_tokens == 0:
            # vLLM generates at least one token.
            return Progress((), 0, None if reason is None else "length", (), prompt=self._prompt)
        shown = len(self._ids) - (reason == "stop")
        end = self._scored[shown] if reason == "stop" and self._scored else None
        scored = tuple(self._scored[:shown])
        return Progress(
            tuple(self._ids[:shown]),
            len(self._ids),
            reason,
            scored,
            prompt=self._prompt,
            end=end,
            first_token_seconds=output.metrics.first_token_latency if output.metrics else None,
        )

    def _score(self, token: int, found: Mapping[int, Any]) -> TokenLogprob:
        if isnan(found[token].logprob):
            raise RequestError(NOT_FINITE)
        asked = self._request.logprobs or 0
        # vLLM adds the token itself to the most likely ones.
        top = sorted((one.rank, other, one.logprob) for other, one in found.items() if one.rank <= asked)
        return TokenLogprob(token, found[token].logprob, tuple((other, value) for _, other, value in top))


def _check(problems: Sequence[list[str]]) -> None:
    """Raise the first error with which a worker has answered (class and message, or nothing)."""
    for problem in filter(None, problems):
        raise ERRORS.get(problem[0], ResourceError)(problem[1])


def _start(options: VllmOptions, limits: EngineLimits, folder: str, record: Any) -> Any:
    """Start vLLM.

    Raises:
        ResourceError: if there is too little memory.
        ModelError: if vLLM can't run the model.
    """
    import ray
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Counts(StatLoggerBase):
        """Passes the counts of each step to the engine."""

        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            pass

        def record(
            self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
        ) -> None:
            if scheduler_stats is None or iteration_stats is None:
                return
            adapters = scheduler_stats.running_lora_adapters
            base = scheduler_stats.num_running_reqs > sum(adapters.values())
            tokens = iteration_stats.num_prompt_tokens + iteration_stats.num_generation_tokens
            record(tokens, scheduler_stats.num_running_reqs, len(adapters) + base)

        def log_engine_initialized(self) -> None:
            pass

    loggers: list[Any] = [Counts]
    if ray.is_initialized():
        from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

        class Exported(RayPrometheusStatLogger):
            """Exports vLLM's metrics, without the names of the running adapters."""

            def __init__(self, *arguments: Any, **options: Any) -> None:
                super().__init__(*arguments, **options)
                # Its tag is a list of content hashes, and each combination a series that never ends.
                self.gauge_lora_info = None

        loggers.append(Exported)
    arguments = {
        "model": options.model,
        "revision": options.revision,
        "dtype": str(options.dtype).removeprefix("torch."),
        "tensor_parallel_size": options.gpus,
        "gpu_memory_utilization": options.memory,
        "max_model_len": -1,
        "max_num_seqs": limits.max_running,
        "max_num_batched_tokens": limits.max_batch_tokens or None,
        "num_gpu_blocks_override": -(-limits.cache_tokens // BLOCK) if limits.cache_tokens else None,
        "block_size": BLOCK if limits.cache_tokens else None,
        "enable_prefix_caching": True,
        "quantization": "fp8" if options.fp8 else None,
        "enable_lora": True,
        # Neither costs anything here: no memory is kept for so many adapters or so high a rank.
        "max_loras": limits.max_running,
        "max_lora_rank": WIDEST,
        "worker_extension_cls": EXTENSION,
        # It is part of the key under which vLLM keeps compiled graphs, so its own are never used here.
        "additional_config": {
            CONFIG: {"adapter_bytes": options.adapter_bytes, "untested": options.untested, "version": 1}
        },
        # On one line: some models otherwise write white space without an end.
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        "disable_log_stats": True,
        "enable_log_requests": False,
        **options.extra,
    }
    os.environ[ANSWERS] = folder
    # A copy of this process, with its threads and CUDA, may hang or fail.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    try:
        # As `vllm serve` does: in other contexts a step has at most 2048 tokens, whatever the GPU.
        return AsyncLLM.from_engine_args(
            AsyncEngineArgs(**arguments), usage_context=UsageContext.OPENAI_API_SERVER, stat_loggers=loggers
        )
    except Exception as error:
        reason = Path(folder) / ERROR_FILE
        raise _start_error(
            reason.read_text(encoding="utf-8") if reason.is_file() else str(error), options
        ) from error
    finally:
        del os.environ[ANSWERS]


def _start_error(cause: str, options: VllmOptions) -> RayftError:
    """Return an error that says which setting to change after vLLM did not start."""
    if any(word in cause for word in NO_MEMORY):
        return ResourceError(
            f"the GPU's memory does not hold the base, {options.adapter_bytes:,} bytes of adapters and the "
            "KV cache: lower device_bytes (adapters) or cache_tokens (KV cache), raise gpu_memory, or use "
            f"more gpus; vLLM says: {cause}"
        )
    return ModelError(f"vLLM can't run {options.model}: {cause}")


def installed() -> str:
    """Return the release of vLLM.

    Raises:
        ResourceError: if it is not installed.
    """
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("vllm")
    except PackageNotFoundError as error:
        raise ResourceError(
            "vLLM, which serves on GPUs, is not installed; run `pip install 'rayft[vllm]'`, or set "
            "engine: cpu"
        ) from error


def _lora_request(name: str, number: int, path: str) -> Any:
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora_name=name, lora_int_id=number, lora_path=path)
