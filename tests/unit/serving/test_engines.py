"""What every engine promises, run against the engine for CPUs; tests/gpu is about vLLM."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rayft.artifacts import AdapterArtifact
from rayft.errors import BadRequestError, RequestError, ResourceError
from rayft.methods.base import LoraFactors
from rayft.models.load import LoadedModel
from rayft.models.targets import linear_shapes
from rayft.numerics import assert_close
from rayft.serving.engine.api import Engine, GenerationRequest, Progress
from tests.unit.serving.adapters import LENGTH, chain_of, expected, generated, random_adapter, reference
from tests.unit.serving.conftest import MakeEngine

PROMPTS = [
    "the capital of France is",
    "a",
    "one two three four five six seven eight nine ten",
    "Hello!",
    "\n",
]


async def ask(engine: Engine, request: GenerationRequest) -> Progress:
    async with aclosing(engine.submit(request)) as steps:
        found = [step async for step in steps]
    assert [step.finish for step in found[:-1]] == [None] * (len(found) - 1)
    return found[-1]


def ask_all(engine: Engine, wanted: Sequence[GenerationRequest]) -> list[Progress]:
    async def together() -> list[Progress]:
        return await asyncio.gather(*[ask(engine, request) for request in wanted])

    return asyncio.run(together())


def load_all(engine: Engine, folders: dict[str, str]) -> None:
    for name, folder in folders.items():
        asyncio.run(engine.load(name, AdapterArtifact.load(folder)))


def tokens_of(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text)["input_ids"])


def test_a_mixed_batch_gives_each_row_what_its_adapter_alone_gives(
    make_engine: MakeEngine, tiny_folder: Path, tiny_tokenizer: Any, adapter_folders: dict[str, str]
) -> None:
    engine = make_engine(max_running=16)
    load_all(engine, adapter_folders)
    names: list[str | None] = [None, *adapter_folders]
    wanted = [(name, tokens_of(tiny_tokenizer, PROMPTS[i])) for i, name in enumerate(names)]
    # The same prompt for all as well: only the adapter can make a difference then.
    wanted += [(name, tokens_of(tiny_tokenizer, PROMPTS[0])) for name in names]
    jobs = [GenerationRequest(prompt, LENGTH, name) for name, prompt in wanted]

    found = [step.tokens for step in ask_all(engine, jobs)]

    folders = {None: None, **adapter_folders}
    assert found == [expected(tiny_folder, folders[name], prompt) for name, prompt in wanted]
    assert len(set(found[len(names) :])) == len(names)
    assert engine.stats().max_slots_in_forward == len(names)
    assert engine.stats().max_requests_in_forward == len(jobs)


def test_eight_ranks_two_selectors_and_a_chain_share_a_batch(
    make_engine: MakeEngine, loaded: LoadedModel, tiny_folder: Path, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    shapes = linear_shapes(loaded.model)
    made = {f"r{rank}": random_adapter(f"r{rank}", shapes, rank=rank) for rank in (1, 2, 3, 5, 8, 12, 16, 32)}
    made |= {f"cla{rank}": random_adapter(f"cla{rank}", shapes, rank=rank, selector=True) for rank in (3, 9)}
    made["chain"] = chain_of([random_adapter(f"link{link}", shapes, rank=4) for link in range(3)])
    folders = {name: str(artifact.save(tmp_path / name)) for name, artifact in made.items()}
    engine = make_engine(max_running=16)
    load_all(engine, folders)
    names: list[str | None] = [None, *folders]
    prompts = [tokens_of(tiny_tokenizer, PROMPTS[i % len(PROMPTS)]) for i in range(len(names))]
    jobs = [GenerationRequest(prompt, LENGTH, name) for name, prompt in zip(names, prompts, strict=True)]
    found = ask_all(engine, jobs)
    assert engine.stats().max_slots_in_forward == len(names)
    for name, prompt, step in zip(names, prompts, found, strict=True):
        assert step.tokens == expected(tiny_folder, folders.get(name or ""), prompt), name


def test_prompts_that_are_processed_in_chunks_are_answered_right(
    make_engine: MakeEngine, tiny_folder: Path, tiny_tokenizer: Any, adapter_folders: dict[str, str]
) -> None:
    engine = make_engine(max_batch_tokens=16)
    load_all(engine, adapter_folders)
    prompt = tokens_of(tiny_tokenizer, "a long prompt, " * 10)
    assert len(prompt) > 5 * 16
    names: list[str | None] = [None, "small", "picks"]
    found = ask_all(engine, [GenerationRequest(prompt, LENGTH, name) for name in names])
    for name, step in zip(names, found, strict=True):
        assert step.tokens == expected(tiny_folder, adapter_folders.get(name or ""), prompt)


def test_preempted_requests_are_answered_right(
    make_engine: MakeEngine, tiny_folder: Path, tiny_tokenizer: Any, adapter_folders: dict[str, str]
) -> None:
    # Each grows to 125 tokens, so the cache holds two of the four to their end.
    engine = make_engine(cache_tokens=256)
    load_all(engine, adapter_folders)
    prompt = tokens_of(tiny_tokenizer, "hello")
    names: list[str | None] = [None, *list(adapter_folders)[:3]]
    greedy = [GenerationRequest(prompt, 120, name) for name in names]
    found = ask_all(engine, greedy)
    for name, step in zip(names, found, strict=True):
        assert step.tokens == expected(tiny_folder, adapter_folders.get(name or ""), prompt, 120)
    # The model processed more tokens than they have: some were preempted.
    assert engine.stats().tokens > len(names) * (len(prompt) + 119)
    sampled = [
        GenerationRequest(prompt, 120, name, temperature=0.8, seed=3, repetition_penalty=penalty)
        for name, penalty in zip(names, (1.0, 1.1, 1.0, 1.3), strict=True)
    ]
    assert ask_all(engine, sampled) == [ask_all(engine, [job])[0] for job in sampled]


def test_a_request_reports_growing_tokens_and_why_it_ended(
    make_engine: MakeEngine, loaded: LoadedModel, tiny_tokenizer: Any
) -> None:
    engine = make_engine()
    prompt = tokens_of(tiny_tokenizer, "hello")

    async def steps() -> list[Progress]:
        return [step async for step in engine.submit(GenerationRequest(prompt, 50))]

    found = asyncio.run(steps())
    assert found[-1].finish == "length"
    assert (found[-1].generated, len(found[-1].tokens)) == (50, 50)
    assert all(found[-1].tokens[: len(step.tokens)] == step.tokens for step in found)


def test_an_end_token_ends_a_request_and_is_not_given(
    make_engine: MakeEngine, loaded: LoadedModel, tiny_folder: Path, tiny_tokenizer: Any
) -> None:
    prompt = tokens_of(tiny_tokenizer, "hello")
    free = expected(tiny_folder, None, prompt)
    loaded.model.generation_config.eos_token_id = [free[5], 0]
    step = ask_all(make_engine(), [GenerationRequest(prompt, LENGTH)])[0]
    cut = free.index(free[5])
    assert (step.tokens, step.generated, step.finish) == (free[:cut], cut + 1, "stop")


def test_a_requests_own_stop_tokens_end_it_and_no_other(
    make_engine: MakeEngine, tiny_folder: Path, tiny_tokenizer: Any
) -> None:
    prompt = tokens_of(tiny_tokenizer, "hello")
    free = expected(tiny_folder, None, prompt)
    stops = frozenset({free[5], free[9]})
    cut = min(free.index(token) for token in stops)
    jobs = [
        GenerationRequest(prompt, LENGTH, stop_tokens=stops, logprobs=1),
        GenerationRequest(prompt, LENGTH),
        GenerationRequest(prompt, cut + 1, stop_tokens=stops),
        GenerationRequest(prompt, cut, stop_tokens=stops),
    ]
    stopped, other, just, short = ask_all(make_engine(), jobs)
    assert (stopped.tokens, stopped.generated, stopped.finish) == (free[:cut], cut + 1, "stop")
    assert [entry.token for entry in stopped.logprobs] == list(free[:cut])
    assert other.tokens == free
    assert (just.tokens, just.finish) == (free[:cut], "stop")
    assert (short.tokens, short.finish) == (free[:cut], "length")


def test_a_repetition_penalty_counts_the_prompt_and_what_was_generated(
    make_engine: MakeEngine, tiny_folder: Path, tiny_tokenizer: Any, adapter_folders: dict[str, str]
) -> None:
    engine = make_engine()
    load_all(engine, adapter_folders)
    prompt = tokens_of(tiny_tokenizer, "one two three four")
    jobs = [
        GenerationRequest(prompt, LENGTH, name, repetition_penalty=penalty)
        for name in (None, "small")
        for penalty in (1.0, 1.3, 4.0)
    ]
    found = [step.tokens for step in ask_all(engine, jobs)]
    wanted = []
    for job in jobs:
        model = reference(tiny_folder, adapter_folders.get(job.adapter or ""))
        wanted.append(generated(model, prompt, LENGTH, repetition_penalty=job.repetition_penalty))
    assert found == wanted
    assert len(set(found)) == len(jobs)


def test_the_narrowest_choice_is_the_likeliest_token(
    make_engine: MakeEngine, tiny_folder: Path, tiny_tokenizer: Any
) -> None:
    prompt = tokens_of(tiny_tokenizer, "hello")
    jobs = [
        GenerationRequest(prompt, LENGTH, temperature=2.0, seed=1, top_k=1),
        GenerationRequest(prompt, LENGTH, temperature=2.0, seed=2, min_p=1.0),
        GenerationRequest(prompt, LENGTH, temperature=2.0, seed=3),
    ]
    narrow, also, free = ask_all(make_engine(), jobs)
    assert narrow.tokens == also.tokens == expected(tiny_folder, None, prompt)
    assert free.tokens != narrow.tokens


def test_seeded_draws_do_not_depend_on_the_batch(make_engine: MakeEngine, tiny_tokenizer: Any) -> None:
    engine = make_engine(max_running=16)
    prompt = tokens_of(tiny_tokenizer, "hello")
    jobs = [GenerationRequest(prompt, 30, temperature=1.0, top_p=0.95, seed=seed) for seed in range(4)]
    options: list[dict[str, Any]] = [
        {"top_k": 20},
        {"min_p": 0.05},
        {"repetition_penalty": 1.2},
        {"top_k": 50, "min_p": 0.01, "repetition_penalty": 0.9, "top_p": 0.9},
    ]
    jobs += [GenerationRequest(prompt, 30, temperature=1.0, seed=9, **some) for some in options]
    jobs.append(GenerationRequest(prompt, 30))
    jobs.append(GenerationRequest(prompt, 30, repetition_penalty=1.2))
    together = ask_all(engine, jobs)
    assert together == [ask_all(engine, [job])[0] for job in jobs]
    assert len({step.tokens for step in together}) == len(jobs)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_adapter_that_overflows_spoils_no_other_row(
    make_engine: MakeEngine,
    loaded: LoadedModel,
    adapter_folders: dict[str, str],
    tiny_tokenizer: Any,
    temperature: float,
) -> None:
    factors = random_adapter("huge", linear_shapes(loaded.model)).modules
    huge = {path: LoraFactors(1e20 * f.a, 1e5 * f.b, 1.0) for path, f in factors.items()}
    engine = make_engine()
    load_all(engine, adapter_folders)
    asyncio.run(engine.load("huge", AdapterArtifact(huge)))
    prompt = tokens_of(tiny_tokenizer, "hello")
    good = [GenerationRequest(prompt, LENGTH, name) for name in (None, "small", "picks")]
    alone = ask_all(engine, good)

    async def together() -> list[Progress | BaseException]:
        bad = GenerationRequest(prompt, LENGTH, "huge", temperature=temperature)
        return await asyncio.gather(*[ask(engine, job) for job in (bad, *good)], return_exceptions=True)

    failed, *found = asyncio.run(together())
    assert isinstance(failed, RequestError)
    assert "NaN" in str(failed)
    assert found == alone
    assert engine.stats().alive


def test_a_closed_request_frees_its_place(make_engine: MakeEngine, tiny_tokenizer: Any) -> None:
    engine = make_engine(max_running=1)
    prompt = tokens_of(tiny_tokenizer, "hello")

    async def scenario() -> Progress:
        async with aclosing(engine.submit(GenerationRequest(prompt, 900))) as steps:
            await anext(steps)
            assert engine.stats().running == 1
        assert engine.stats().running == 0
        # There is one place: this would wait for 900 steps if the first one still held it.
        before = engine.stats().forwards
        answer = await ask(engine, GenerationRequest(prompt, 5))
        assert engine.stats().forwards - before < 50
        return answer

    assert asyncio.run(scenario()).generated == 5


def test_a_stopped_engine_refuses(make_engine: MakeEngine, tiny_tokenizer: Any) -> None:
    engine = make_engine()
    engine.stop()
    assert not engine.stats().alive
    with pytest.raises(ResourceError, match="stopped"):
        ask_all(engine, [GenerationRequest(tokens_of(tiny_tokenizer, "a"), 2)])


def test_an_unloaded_adapter_is_gone(
    make_engine: MakeEngine, loaded: LoadedModel, tiny_tokenizer: Any
) -> None:
    engine = make_engine()
    adapter = random_adapter("passing", linear_shapes(loaded.model), rank=8)
    held = [weakref.ref(factors.b) for factors in adapter.modules.values()]
    asyncio.run(engine.load("passing", adapter))
    prompt = tokens_of(tiny_tokenizer, "a")
    ask_all(engine, [GenerationRequest(prompt, 2, "passing")])
    del adapter
    gc.collect()
    assert all(found() is not None for found in held)
    engine.unload("passing")
    gc.collect()
    assert not any(found() is not None for found in held)
    with pytest.raises(KeyError):
        ask_all(engine, [GenerationRequest(prompt, 2, "passing")])


def test_a_token_that_only_the_tokenizer_has_is_refused(make_engine: MakeEngine, tiny_tokenizer: Any) -> None:
    engine, size = make_engine(), len(tiny_tokenizer)
    with pytest.raises(BadRequestError, match=rf"the token {size}, .* 0 to {size - 1}"):
        engine.submit(GenerationRequest((5, size, 6), 2))
    (last,) = ask_all(engine, [GenerationRequest((5, size - 1, 6), 2)])
    assert last.finish


def test_a_json_schema_is_refused(make_engine: MakeEngine, tiny_tokenizer: Any) -> None:
    request = GenerationRequest(tokens_of(tiny_tokenizer, "a"), 2, json_schema='{"type": "object"}')
    with pytest.raises(BadRequestError, match=r"can't make an answer follow .* engine: vllm") as caught:
        ask_all(make_engine(), [request])
    assert caught.value.param == "response_format"


def test_log_probabilities_are_the_models_own(
    make_engine: MakeEngine, tiny_folder: Path, tiny_tokenizer: Any, adapter_folders: dict[str, str]
) -> None:
    engine = make_engine()
    load_all(engine, adapter_folders)
    prompt = tokens_of(tiny_tokenizer, "the capital")
    jobs = [
        GenerationRequest(prompt, 6, "small", temperature=1.5, seed=4, logprobs=3),
        GenerationRequest(prompt, 6, None, logprobs=0),
        GenerationRequest(prompt, 6, "large"),
    ]
    drawn, greedy, silent = ask_all(engine, jobs)
    assert silent.logprobs == ()
    for name, step, count in (("small", drawn, 3), (None, greedy, 0)):
        model: Any = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
        if name is not None:
            model = PeftModel.from_pretrained(model, adapter_folders[name])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + step.tokens])).logits[0, len(prompt) - 1 : -1]
        expected_ones = logits.log_softmax(-1)
        assert [entry.token for entry in step.logprobs] == list(step.tokens)
        found = torch.tensor([entry.logprob for entry in step.logprobs])
        assert_close(found, expected_ones[range(len(found)), list(step.tokens)], torch.float32, 64, 8)
        for row, entry in enumerate(step.logprobs):
            best = expected_ones[row].topk(count).indices.tolist() if count else []
            assert [token for token, _ in entry.top] == best
