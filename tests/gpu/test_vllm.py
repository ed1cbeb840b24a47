"""vLLM with rayft's adapters on a GPU, against transformers in float64, and under change."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rayft.artifacts import AdapterArtifact, ArtifactMeta
from rayft.errors import ModelError, ResourceError
from rayft.methods.base import LoraFactors
from rayft.models.targets import linear_shapes
from rayft.models.tiny import byte_tokenizer
from rayft.numerics import generator
from rayft.serving.engine.api import EngineLimits, GenerationRequest, NoRoomError, Progress
from rayft.serving.engine.vllm.engine import VllmEngine, VllmOptions
from tests.gpu.naming import VOCABULARY, naming_adapter, new_model
from tests.unit.serving.adapters import window_chain

pytest.importorskip("vllm")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM runs on GPUs"),
]

NO_MULTICAST = {"compilation_config": {"pass_config": {"fuse_allreduce_rms": False}}}
"""NVLink multicast, which the fused all-reduce uses, may not be allowed where others share a host's GPUs."""
RANKS = (1, 2, 4, 8, 16, 24, 64, 256)
MODES: dict[str, dict[str, Any]] = {
    "full graphs": {},
    "piecewise graphs": {"compilation_config": {"cudagraph_mode": "PIECEWISE"}},
    "eager, prompts in pieces": {"enforce_eager": True},
}
PIECE = 128
"""Largest number of tokens in a step where prompts are processed in pieces; the longest ones have 299."""


def random_adapter(
    name: str, rank: int, *, selector: bool = False, squeezed: bool = False, model: Any = None
) -> AdapterArtifact:
    modules = {}
    for path, (outputs, inputs) in linear_shapes(model or new_model()).items():
        random = generator(name, path)
        a = torch.randn(rank, inputs, generator=random) / inputs**0.5
        b = 0.2 * torch.randn(outputs, rank, generator=random) / rank**0.5
        columns = None
        if selector:
            columns = tuple(torch.randperm(inputs, generator=random)[:rank].tolist())
            a = torch.nn.functional.one_hot(torch.tensor(columns), inputs).float()
        modules[path] = LoraFactors(a, b, 0.8, columns)
    values = {path: (1.0,) * rank for path in modules} if squeezed else {}
    return AdapterArtifact(modules, meta=ArtifactMeta(base_model="tiny", singular_values=values))


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as made:
        yield made


def make(
    folder: Path, runner: asyncio.Runner, limits: EngineLimits | None = None, **given: Any
) -> VllmEngine:
    async def start() -> VllmEngine:
        end = byte_tokenizer().eos_token_id
        # With a given size of the cache, other tests may take memory of the GPU meanwhile.
        extra = {"kv_cache_memory_bytes": 10**9, **given.pop("extra", {})}
        options = {"adapter_bytes": 200_000_000, "memory": 0.25, "end": end, "extra": extra, **given}
        made = VllmOptions(str(folder), None, torch.bfloat16, **options)
        return VllmEngine(made, limits or EngineLimits(64, 2048, 32768), [0])

    return runner.run(start())


@pytest.fixture(scope="module")
def engine(folder: Path, runner: asyncio.Runner) -> Iterator[VllmEngine]:
    made = make(folder, runner)
    yield made
    runner.run(stopped(made))


async def stopped(engine: VllmEngine) -> None:
    engine.stop()


async def ask(engine: VllmEngine, request: GenerationRequest) -> Progress:
    async with aclosing(engine.submit(request)) as steps:
        found = [step async for step in steps]
    return found[-1]


def ask_all(runner: asyncio.Runner, engine: VllmEngine, jobs: Sequence[GenerationRequest]) -> list[Progress]:
    async def together() -> list[Progress]:
        return await asyncio.gather(*[ask(engine, job) for job in jobs])

    return runner.run(together())


async def drained(steps: AsyncIterator[Progress]) -> None:
    async for _ in steps:
        pass


async def fill(engine: VllmEngine) -> None:
    """Load adapters until there is no room."""
    for count in range(200):
        await engine.load(f"many{count}", random_adapter("many", 256))


@asynccontextmanager
async def loaded(engine: VllmEngine, adapters: dict[str, AdapterArtifact]) -> AsyncIterator[None]:
    for name, adapter in adapters.items():
        await engine.load(name, adapter)
    try:
        yield
    finally:
        for name in adapters:
            engine.unload(name)


def prompt_of(index: int, length: int | None = None) -> tuple[int, ...]:
    random = torch.Generator().manual_seed(index)
    size = length or 3 + 37 * index
    return tuple(torch.randint(5, VOCABULARY, (size,), generator=random).tolist())


class Reference:
    """Log-probabilities by transformers, the adapter in the weights."""

    def __init__(self) -> None:
        self._model = new_model()

    def logprobs(
        self, adapter: AdapterArtifact | None, ids: Sequence[int], dtype: torch.dtype = torch.float64
    ) -> torch.Tensor:
        model: Any = LlamaForCausalLM(self._model.config)
        model.load_state_dict(self._model.state_dict())
        model = model.double().cuda()
        for path, found in (adapter.modules if adapter else {}).items():
            a, b = found.a.bfloat16().double(), found.b.bfloat16().double()
            model.get_submodule(path).weight.data += (found.scale * b @ a).cuda()
        with torch.no_grad():
            logits = model.to(dtype)(torch.tensor([list(ids)], device="cuda")).logits[0]
        return logits.double().log_softmax(-1).cpu()


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


def known_adapters() -> dict[str, AdapterArtifact]:
    made = {f"r{rank}": random_adapter(f"r{rank}", rank) for rank in RANKS}
    made |= {f"cla{k}": random_adapter(f"cla{k}", (5, 16)[k], selector=True) for k in range(2)}
    made["chain"] = window_chain("chain", linear_shapes(new_model()), 7)
    made["squeezed"] = random_adapter("squeezed", 16, squeezed=True)
    return made


def check(
    reference: Reference, adapter: AdapterArtifact | None, request: GenerationRequest, found: Progress
) -> None:
    """Compare the log-probabilities of prompt and answer with float64's, by the error of plain bfloat16."""
    ids = [*request.prompt, *found.tokens]
    exact = reference.logprobs(adapter, ids)
    plain = reference.logprobs(adapter, ids, torch.bfloat16)
    rounding = (plain - exact).abs().max()
    entries = [*found.prompt[1:], *found.logprobs] if request.score_prompt else list(found.logprobs)
    first = 1 if request.score_prompt else len(request.prompt)
    assert len(entries) == len(ids) - first
    for place, entry in enumerate(entries, first):
        assert entry is not None
        assert entry.token == ids[place]
        off = abs(entry.logprob - float(exact[place - 1, entry.token]))
        assert off <= 2 * rounding + 0.02, f"{request.adapter} at {place}: {off} off, rounding is {rounding}"
    for place, token in enumerate(found.tokens, len(request.prompt)):
        # Greedy: no token is much likelier than the one that was taken.
        assert exact[place - 1].max() - exact[place - 1, token] <= 4 * rounding + 0.05
    if adapter is not None:
        base = reference.logprobs(None, ids)
        assert (base - exact).abs().max() > 4 * rounding, f"{request.adapter} makes no difference"


def mixed(*, tokens: int = 24) -> list[tuple[AdapterArtifact | None, GenerationRequest]]:
    """A batch of the base, of all adapters, and of a squeezed one at lower ranks."""
    known = known_adapters()
    wanted: list[tuple[str | None, int | None]] = [(None, None), *((name, None) for name in known)]
    wanted += [("squeezed", 3), ("squeezed", 8), ("squeezed", 99), (None, None)]
    jobs = []
    for index, (name, rank) in enumerate(wanted):
        adapter = known[name] if name else None
        if adapter and rank:
            adapter = adapter.at_rank(min(rank, adapter.rank))
        request = GenerationRequest(
            prompt_of(index % 9), tokens, name, rank, logprobs=1, score_prompt=index % 2 == 0
        )
        jobs.append((adapter, request))
    return jobs


def answered(
    runner: asyncio.Runner, engine: VllmEngine, requests: Sequence[GenerationRequest]
) -> list[Progress]:
    """Load all adapters, answer requests together, and stop the engine."""

    async def scenario() -> list[Progress]:
        async with loaded(engine, known_adapters()):
            return await asyncio.gather(*[ask(engine, request) for request in requests])

    try:
        return runner.run(scenario())
    finally:
        runner.run(stopped(engine))


@pytest.mark.parametrize("mode", MODES)
def test_a_mixed_batch_has_the_log_probabilities_of_float64(
    folder: Path, runner: asyncio.Runner, reference: Reference, mode: str
) -> None:
    limits = EngineLimits(64, PIECE if "pieces" in mode else 2048, 32768)
    engine = make(folder, runner, limits, extra=MODES[mode])
    jobs = mixed()
    found = answered(runner, engine, [request for _, request in jobs])
    for (adapter, request), progress in zip(jobs, found, strict=True):
        assert progress.finish in {"length", "stop"}
        check(reference, adapter, request, progress)
    assert engine.stats().max_slots_in_forward > 8


def test_requests_that_are_preempted_are_answered_right(
    folder: Path, runner: asyncio.Runner, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.metrics.stats import IterationStats

    steps: list[Any] = []
    make_stats = IterationStats.__init__

    def kept(stats: Any) -> None:
        make_stats(stats)
        steps.append(stats)

    monkeypatch.setattr(IterationStats, "__init__", kept)
    # 24 requests of up to 300 tokens want seven times the cache.
    engine = make(folder, runner, EngineLimits(32, 512, 1024), extra={"enforce_eager": True})
    known = known_adapters()
    names = [None, *known]
    jobs = [GenerationRequest(prompt_of(i, 150), 140, names[i % len(names)], logprobs=1) for i in range(24)]
    found = answered(runner, engine, jobs)
    assert sum(step.num_preempted_reqs for step in steps) > 0
    for job, progress in zip(jobs, found, strict=True):
        check(reference, known[job.adapter] if job.adapter else None, job, progress)


def test_adapters_load_and_unload_while_others_generate(
    engine: VllmEngine, runner: asyncio.Runner, reference: Reference
) -> None:
    known = known_adapters()
    names = [None, "r4", "cla1", "r256"]
    jobs = [GenerationRequest(prompt_of(3), 300, name, logprobs=1) for name in names]

    async def turn(stop: asyncio.Event) -> int:
        turns = 0
        while not stop.is_set():
            async with loaded(engine, {f"passing{turns}": random_adapter(f"p{turns % 5}", 64)}):
                await ask(engine, GenerationRequest((1, 2, 3), 2, f"passing{turns}"))
            turns += 1
        return turns

    async def scenario() -> tuple[list[Progress], int]:
        stop = asyncio.Event()
        async with loaded(engine, {name: known[name] for name in names if name}):
            turning = asyncio.create_task(turn(stop))
            found = await asyncio.gather(*[ask(engine, job) for job in jobs])
            stop.set()
            return found, await turning

    found, turns = runner.run(scenario())
    assert turns >= 3
    for name, job, progress in zip(names, jobs, found, strict=True):
        check(reference, known[name] if name else None, job, progress)


def test_a_reload_under_the_same_name_never_answers_from_the_former_cache(
    engine: VllmEngine, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = new_model().lm_head.weight
    prompt = prompt_of(1, 512)
    generate, cached = engine._llm.generate, []

    async def watched(*arguments: Any, **options: Any) -> AsyncIterator[Any]:
        async with aclosing(generate(*arguments, **options)) as outputs:
            async for output in outputs:
                cached.append(output.num_cached_tokens)
                yield output

    async def scenario() -> list[int]:
        seen = []
        for token in (100, 200, 100, 300):
            async with loaded(engine, {"one": naming_adapter(head, token, 4)}):
                for _ in range(2):
                    seen.append((await ask(engine, GenerationRequest(prompt, 1, "one"))).tokens[0])
        return seen

    monkeypatch.setattr(engine._llm, "generate", watched)
    assert runner.run(scenario()) == [100, 100, 200, 200, 100, 100, 300, 300]
    assert len(cached) == 8, "an answer of one token is one output"
    # The third adapter is the first again, so its content is known.
    assert [count > 0 for count in cached] == [False, True, False, True, True, True, False, True]


def test_a_thousand_adapters_come_and_go_under_traffic(engine: VllmEngine, runner: asyncio.Runner) -> None:
    """Each adapter's tokens name it, so another adapter's, or the base's, can't pass."""
    head = new_model().lm_head.weight
    total, at_once = 1000, 24
    waiting = iter(range(total))

    async def worker() -> int:
        done = 0
        for number in waiting:
            token = 5 + number
            rank = RANKS[number % len(RANKS)]
            name = f"soak{number % at_once}#{number}"
            await engine.load(name, naming_adapter(head, token, rank))
            job = GenerationRequest(prompt_of(number % 4), 12, name)
            for progress in await asyncio.gather(ask(engine, job), ask(engine, job)):
                assert set(progress.tokens) == {token}, f"adapter {number} answered {progress.tokens}"
            engine.unload(name)
            done += 1
        return done

    async def base() -> set[int]:
        job = GenerationRequest(prompt_of(2), 4)
        return {(await ask(engine, job)).tokens[0] for _ in range(60)}

    async def scenario() -> tuple[int, set[int], int]:
        alone = await base()
        assert len(alone) == 1
        before = await free(engine)
        *done, answers = await asyncio.gather(*[worker() for _ in range(at_once)], base())
        return sum(done), answers - alone, before - await free(engine)  # type: ignore[arg-type, operator]

    done, others, lost = runner.run(scenario())
    assert done == total
    assert not others
    assert lost == 0


async def free(engine: VllmEngine) -> int:
    """Bytes of the workers' memory for adapters that are free, once what was unloaded is gone."""
    await asyncio.gather(*engine._tasks)
    return int((await engine._call("rayft_unload", []))[0])


def test_sampling_options_and_stops(engine: VllmEngine, runner: asyncio.Runner) -> None:
    prompt = prompt_of(1)
    one = GenerationRequest(prompt, 40, temperature=1.0, seed=7)
    same = ask_all(runner, engine, [one])[0].tokens
    assert ask_all(runner, engine, [one])[0].tokens == same
    greedy = ask_all(runner, engine, [GenerationRequest(prompt, 40)])[0].tokens
    assert same != greedy
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        hot = GenerationRequest(prompt, 40, temperature=1.0, seed=7, **options)
        assert ask_all(runner, engine, [hot])[0].tokens == greedy
    stop = GenerationRequest(prompt, 40, stop_tokens=frozenset({greedy[5]}))
    found = ask_all(runner, engine, [stop])[0]
    assert (found.finish, found.tokens) == ("stop", greedy[: greedy.index(greedy[5])])
    assert found.generated == len(found.tokens) + 1


def test_a_scored_prompt_without_an_answer(engine: VllmEngine, runner: asyncio.Runner) -> None:
    job = GenerationRequest(prompt_of(2), 0, logprobs=1, score_prompt=True)
    found = ask_all(runner, engine, [job, job])
    assert all(one.tokens == () and one.generated == 0 and one.finish == "length" for one in found)
    assert found[0].prompt[0] is None
    assert [entry.token for entry in found[0].prompt[1:] if entry] == list(job.prompt[1:])


def test_an_answer_follows_a_json_schema(engine: VllmEngine, runner: asyncio.Runner) -> None:
    schema = (
        '{"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"], '
        '"additionalProperties": false}'
    )
    job = GenerationRequest(prompt_of(1), 60, json_schema=schema)
    found = ask_all(runner, engine, [job])[0]
    text = byte_tokenizer().decode(list(found.tokens))
    assert "".join(text.split()) in {'{"a":"x"}', '{"a":"y"}'}


def test_an_adapter_that_does_not_fit_is_refused_and_leaves_nothing(
    engine: VllmEngine, runner: asyncio.Runner
) -> None:
    async def scenario() -> tuple[int, int, int]:
        before = await free(engine)
        with pytest.raises(NoRoomError, match="device_bytes"):
            await fill(engine)
        there = [name for name in engine._adapters if name.startswith("many")]
        for name in there:
            engine.unload(name)
        return len(there), before, await free(engine)

    count, before, after = runner.run(scenario())
    assert count > 3
    assert before == after


def test_a_closed_request_is_aborted(engine: VllmEngine, runner: asyncio.Runner) -> None:
    async def scenario() -> int:
        async with aclosing(engine.submit(GenerationRequest((1, 2, 3), 1500))) as steps:
            await anext(steps)
        await asyncio.sleep(0.5)
        before = engine.stats().tokens
        await asyncio.sleep(0.5)
        return engine.stats().tokens - before

    assert runner.run(scenario()) == 0
    assert engine.stats().running == 0


def test_without_the_plugin_the_engine_refuses_to_start(
    folder: Path, runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "")
    with pytest.raises(ResourceError, match="plugin is active in 0 of"):
        make(folder, runner, extra={"enforce_eager": True})


def test_too_little_memory_says_what_to_lower(folder: Path, runner: asyncio.Runner) -> None:
    with pytest.raises(ResourceError, match="lower device_bytes"):
        make(folder, runner, adapter_bytes=10**12, extra={"enforce_eager": True})


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_give_the_log_probabilities_of_float64(
    folder: Path, runner: asyncio.Runner, reference: Reference
) -> None:
    engine = make(folder, runner, gpus=2, extra=NO_MULTICAST)
    jobs = mixed()
    found = answered(runner, engine, [request for _, request in jobs])
    for (adapter, request), progress in zip(jobs, found, strict=True):
        check(reference, adapter, request, progress)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_answer_as_one_does_with_the_shape_of_8_billion_parameters(
    runner: asyncio.Runner, tmp_path: Path
) -> None:
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=32000, max_position_embeddings=2048, eos_token_id=0,
        bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model: Any = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with torch.device("meta"):
        shapes: Any = LlamaForCausalLM(config)
    del model
    torch.cuda.empty_cache()
    adapters = {
        "r16": random_adapter("r16", 16, model=shapes),
        "cla": random_adapter("cla", 8, selector=True, model=shapes),
    }
    jobs = [
        GenerationRequest(prompt_of(index), 8, name, logprobs=1, score_prompt=True)
        for index in range(4)
        for name in (None, *adapters)
    ]

    async def scenario(engine: VllmEngine) -> list[Progress]:
        async with loaded(engine, adapters):
            return await asyncio.gather(*[ask(engine, job) for job in jobs])

    def answers(gpus: int) -> list[Progress]:
        engine = make(tmp_path, runner, gpus=gpus, memory=0.4, adapter_bytes=10**9, extra=NO_MULTICAST)
        try:
            return runner.run(scenario(engine))
        finally:
            runner.run(stopped(engine))

    def scores(progress: Progress) -> torch.Tensor:
        return torch.tensor([entry.logprob for entry in progress.prompt[1:] if entry is not None])

    one, two = answers(1), answers(2)
    pairs = [(job, scores(mine), scores(other)) for job, mine, other in zip(jobs, one, two, strict=True)]
    off = {job: float((mine - other).abs().max()) for job, mine, other in pairs}
    base = {job.prompt: mine for job, mine, _ in pairs if job.adapter is None}
    # The sums of two halves are rounded otherwise than one sum, for the base too.
    rounding = max(off[job] for job in jobs if job.adapter is None)
    assert 0 < rounding < 0.3
    changed = dict.fromkeys(adapters, 0.0)
    for job, mine, _ in pairs:
        assert off[job] <= 2 * rounding, job.adapter
        if job.adapter:
            change = float((mine - base[job.prompt]).abs().max())
            changed[job.adapter] = max(changed[job.adapter], change)
    assert min(changed.values()) > 5 * rounding, changed
    same = sum(mine.tokens[0] == other.tokens[0] for mine, other in zip(one, two, strict=True))
    assert same >= len(jobs) - 1, "of two almost equally likely tokens either may be chosen"


def test_an_fp8_base_answers_with_its_adapters(
    folder: Path, runner: asyncio.Runner, reference: Reference
) -> None:
    head = new_model().lm_head.weight
    engine = make(folder, runner, fp8=True)
    known = {"r16": random_adapter("r16", 16), "cla": random_adapter("cla", 8, selector=True)}
    names = (None, *known)

    async def scenario() -> tuple[list[Progress], list[Progress]]:
        adapters = {str(token): naming_adapter(head, token, 4) for token in (100, 200)}
        async with loaded(engine, {**adapters, **known}):
            named = [GenerationRequest(prompt_of(1), 8, name) for name in (*adapters, None)]
            scored = [
                GenerationRequest(prompt_of(3), 0, name, logprobs=1, score_prompt=True) for name in names
            ]
            found = await asyncio.gather(*[ask(engine, job) for job in (*named, *scored)])
            return found[:3], found[3:]

    try:
        named, scored = runner.run(scenario())
    finally:
        runner.run(stopped(engine))
    first, second, base = (found.tokens for found in named)
    assert (set(first), set(second)) == ({100}, {200})
    assert not set(base) & {100, 200}

    prompt = prompt_of(3)
    places = torch.arange(len(prompt) - 1), torch.tensor(prompt[1:])
    off, change = {}, {}
    without = reference.logprobs(None, prompt)[places]
    for name, found in zip(names, scored, strict=True):
        adapter = known[name] if name else None
        exact = reference.logprobs(adapter, prompt)[places]
        values = torch.tensor([entry.logprob for entry in found.prompt[1:] if entry], dtype=torch.float64)
        off[name], change[name] = (values - exact).square().mean().sqrt(), (without - exact).abs().max()
    plain = reference.logprobs(None, prompt, torch.bfloat16)[places] - without
    assert off[None] > 2 * plain.square().mean().sqrt(), "the base is not in 8 bits"
    for name in known:
        # The adapters stay in 16 bits, so they add little to the base's error.
        assert off[name] < 2 * off[None], off
        assert change[name] > 5 * off[name], "the adapter makes no difference"


def test_an_unknown_architecture_is_a_model_error(
    folder: Path, runner: asyncio.Runner, tmp_path: Path
) -> None:
    shutil.copytree(folder, tmp_path / "base")
    place = tmp_path / "base" / "config.json"
    settings = json.loads(place.read_text(encoding="utf-8"))
    place.write_text(json.dumps({**settings, "architectures": ["NewForCausalLM"], "model_type": "new"}))
    with pytest.raises(ModelError, match=r"vLLM can't run .*base"):
        make(tmp_path / "base", runner)


def test_a_killed_engine_fails_its_requests_and_says_so(folder: Path, runner: asyncio.Runner) -> None:
    before = set(psutil.Process().children(recursive=True))
    engine = make(folder, runner, extra={"enforce_eager": True})
    started = set(psutil.Process().children(recursive=True)) - before
    core = next(process for process in started if "EngineCore" in " ".join(process.cmdline()))

    async def scenario() -> None:
        async with aclosing(engine.submit(GenerationRequest((1, 2, 3), 1900))) as steps:
            await anext(steps)
            os.kill(core.pid, signal.SIGKILL)
            with pytest.raises(ResourceError, match="stopped"):
                await drained(steps)
        assert not engine.stats().alive
        with pytest.raises(ResourceError, match="stopped"):
            await ask(engine, GenerationRequest((1, 2, 3), 2))
        with pytest.raises(ResourceError, match="stopped"):
            await engine.load("late", random_adapter("late", 4))

    runner.run(scenario())
    runner.run(stopped(engine))
