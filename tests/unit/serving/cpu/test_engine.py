"""What the engine for CPUs does beyond the contract of all engines: scored prompts, above all."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rayft.artifacts import AdapterArtifact
from rayft.errors import RequestError, ResourceError
from rayft.methods.base import LoraFactors
from rayft.models.load import LoadedModel
from rayft.numerics import assert_close
from rayft.serving.engine.api import EngineLimits, GenerationRequest, Progress
from rayft.serving.engine.cpu import scheduler
from rayft.serving.engine.cpu.engine import CpuEngine
from rayft.serving.engine.cpu.scheduler import Chunk
from tests.unit.serving.adapters import expected, reference
from tests.unit.serving.conftest import cpu_engine
from tests.unit.serving.test_engines import ask, ask_all, load_all, tokens_of


def check_prompt_scores(model: Any, request: GenerationRequest, step: Progress) -> None:
    """Compare the log-probabilities of a prompt with those of a forward of the whole prompt."""
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([request.prompt])).logits[0].log_softmax(-1)
    first, *entries = step.prompt
    assert first is None
    assert [entry.token for entry in entries if entry] == list(request.prompt[1:])
    for place, entry in enumerate(entries):
        assert entry is not None
        assert request.logprobs is not None
        best = expected[place].topk(request.logprobs)
        found = torch.tensor([entry.logprob, *(value for _, value in entry.top)])
        wanted = torch.cat((expected[place, entry.token, None], best.values))
        assert_close(found, wanted, torch.float32, 64, 8)
        assert [token for token, _ in entry.top] == best.indices.tolist()


@pytest.fixture
def engine(loaded: LoadedModel, adapter_folders: dict[str, str]) -> Iterator[CpuEngine]:
    """An engine that processes up to 16 tokens at once, and has a cache for 256."""
    made = cpu_engine(loaded, EngineLimits(8, 16, 256))
    load_all(made, adapter_folders)
    yield made
    made.stop()


def test_sampling_leaves_the_generators_of_the_program_alone(engine: CpuEngine, tiny_tokenizer: Any) -> None:
    before = random.getstate(), torch.get_rng_state()
    ask_all(engine, [GenerationRequest(tokens_of(tiny_tokenizer, "hello"), 4, temperature=1.0)])
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_prompts_are_scored_as_by_a_plain_forward(
    engine: CpuEngine, tiny_folder: Path, tiny_tokenizer: Any, adapter_folders: dict[str, str]
) -> None:
    prompts = [tokens_of(tiny_tokenizer, text) for text in ("hello", "a long prompt, " * 4)]
    prompts.append(prompts[0][:1])
    jobs = [
        GenerationRequest(prompt, length, name, logprobs=count, score_prompt=True)
        for prompt, length, count in zip(prompts, (5, 0, 1), (2, 1, 0), strict=True)
        for name in (None, "small", "picks")
    ]
    plain = [GenerationRequest(job.prompt, 5, job.adapter, logprobs=2) for job in jobs]
    *found, alone, first = ask_all(engine, [*jobs, *plain[:2]])
    for job, step in zip(jobs, found, strict=True):
        check_prompt_scores(reference(tiny_folder, adapter_folders.get(job.adapter or "")), job, step)
        assert (step.generated, len(step.tokens), step.finish) == (job.max_tokens, job.max_tokens, "length")
    # The answers are those without scores.
    assert [alone.prompt, first.prompt] == [(), ()]
    assert [alone.tokens, first.tokens] == [found[0].tokens, found[1].tokens]
    assert [entry.token for entry in found[0].logprobs] == list(found[0].tokens)


def test_a_preempted_prompt_is_scored_once(
    engine: CpuEngine, tiny_folder: Path, tiny_tokenizer: Any, adapter_folders: dict[str, str]
) -> None:
    # The first grows to over 64 tokens while a part of the second prompt is processed; then both need
    # more than the cache has. The others are preempted while they generate.
    prompts = [tokens_of(tiny_tokenizer, "ab" * size)[:size] for size in (60, 150, 70, 70)]
    assert [len(prompt) for prompt in prompts] == [60, 150, 70, 70]
    names = (None, "small", "picks", None)
    jobs = [
        GenerationRequest(prompt, 70, name, logprobs=1, score_prompt=True)
        for prompt, name in zip(prompts, names, strict=True)
    ]
    found = ask_all(engine, jobs)
    for job, step in zip(jobs, found, strict=True):
        check_prompt_scores(reference(tiny_folder, adapter_folders.get(job.adapter or "")), job, step)
    read = sum(len(prompt) + step.generated - 1 for prompt, step in zip(prompts, found, strict=True))
    assert engine.stats().tokens > read + 64, "some were processed again"


def test_scored_prompts_are_processed_in_chunks(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = cpu_engine(loaded, EngineLimits(8, 512, 2048))
    scored: list[int] = []
    run = engine._runner.run

    def recording(batch: list[Chunk]) -> torch.Tensor:
        scored.append(sum(chunk.size for chunk in batch if chunk.sequence.scoring))
        return run(batch)

    monkeypatch.setattr(engine._runner, "run", recording)
    monkeypatch.setattr(scheduler, "MAX_SCORED", 20)
    try:
        prompts = [tuple(range(5, 5 + size)) for size in (50, 30, 2)]
        jobs = [GenerationRequest(prompt, 0, logprobs=1, score_prompt=True) for prompt in prompts]
        found = ask_all(engine, [*jobs, GenerationRequest(prompts[0], 2)])
    finally:
        engine.stop()
    assert [len(step.prompt) for step in found] == [50, 30, 2, 0]
    assert max(scored) == 20


def test_a_prompt_whose_scores_are_no_numbers_fails_alone(
    engine: CpuEngine, adapter_folders: dict[str, str]
) -> None:
    factors = AdapterArtifact.load(adapter_folders["small"]).modules
    huge = {path: LoraFactors(1e20 * f.a, 1e5 * f.b, 1.0) for path, f in factors.items()}
    asyncio.run(engine.load("huge", AdapterArtifact(huge)))
    prompt = tuple(range(5, 50))
    bad = GenerationRequest(prompt, 0, "huge", logprobs=1, score_prompt=True)
    with pytest.raises(RequestError, match="NaN"):
        ask_all(engine, [bad])
    assert len(ask_all(engine, [replace(bad, adapter=None)])[0].prompt) == len(prompt)


def test_a_score_that_is_no_number_fails_its_request_alone(
    engine: CpuEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = engine._runner._forward

    def damaged(batch: Any) -> torch.Tensor:
        logits = forward(batch)
        if batch.chunks[-1].sequence.scoring:
            logits[-3] = torch.nan
        return logits

    monkeypatch.setattr(engine._runner, "_forward", damaged)
    job = GenerationRequest((5, 6, 7, 8, 9), 1)
    assert ask_all(engine, [job])[0].generated == 1
    with pytest.raises(RequestError, match="NaN"):
        ask_all(engine, [replace(job, logprobs=1, score_prompt=True)])


def test_the_end_token_has_a_log_probability_too(
    engine: CpuEngine, tiny_folder: Path, tiny_tokenizer: Any
) -> None:
    prompt = tokens_of(tiny_tokenizer, "hello")
    free = expected(tiny_folder, None, prompt)
    stops = frozenset({free[5]})
    jobs = [GenerationRequest(prompt, 20, stop_tokens=stops, logprobs=count) for count in (2, None)]
    scored, silent, short = ask_all(engine, [*jobs, GenerationRequest(prompt, 2, logprobs=2)])
    assert scored.end is not None
    assert scored.end.token == scored.end.top[0][0] == free[5]
    assert scored.end.logprob == scored.end.top[0][1]
    assert silent.end is short.end is None


def test_without_a_seed_each_request_draws_its_own(engine: CpuEngine) -> None:
    job = GenerationRequest((5, 6, 7), 20, temperature=2.0)
    first, second = ask_all(engine, [job, job])
    assert first.tokens != second.tokens


def test_an_adapter_whose_load_was_cancelled_can_be_loaded_again(
    engine: CpuEngine, adapter_folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, cast = AdapterArtifact.load(adapter_folders["small"]), engine._slots._cast
    begun, go_on = threading.Event(), threading.Event()

    def slowly(factors: LoraFactors) -> LoraFactors:
        begun.set()
        go_on.wait()
        return cast(factors)

    async def cancelled() -> None:
        loading = asyncio.create_task(engine.load("again", artifact))
        await asyncio.to_thread(begun.wait)
        loading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await loading
        go_on.set()

    monkeypatch.setattr(engine._slots, "_cast", slowly)
    # It waits for the thread, too.
    asyncio.run(cancelled())
    asyncio.run(engine.load("again", artifact))
    again, small = ask_all(engine, [GenerationRequest((5, 6, 7), 9, name) for name in ("again", "small")])
    assert again.tokens == small.tokens


def test_a_client_whose_loop_is_closed_stops_no_one(engine: CpuEngine) -> None:
    async def leave() -> None:
        await anext(engine.submit(GenerationRequest((5, 6), 900)))

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave())
    loop.close()
    assert ask_all(engine, [GenerationRequest((5, 6), 5)])[0].generated == 5


def test_an_engine_that_fails_tells_all_clients(engine: CpuEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(batch: list[Chunk]) -> torch.Tensor:
        raise ValueError("out of order")

    monkeypatch.setattr(engine._runner, "run", failing)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)

    async def both() -> list[Any]:
        jobs = [ask(engine, GenerationRequest((5, 6), 5)) for _ in range(2)]
        return await asyncio.gather(*jobs, return_exceptions=True)

    errors = asyncio.run(both())
    assert isinstance(errors[0], RequestError)
    assert "the engine failed: ValueError: out of order" in str(errors[0])
    # The second one may come after the engine has stopped.
    assert isinstance(errors[1], RequestError | ResourceError)
    assert not engine.stats().alive
    # It reports its error at its end, which must not be after this test.
    engine._thread.join(30)
