from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError
from tokenizers import decoders
from tokenizers.processors import TemplateProcessing

from rayft.errors import (
    ArtifactError,
    BadRequestError,
    ContextLengthError,
    ModelError,
    RequestTimeoutError,
    ResourceError,
    UnknownModelError,
)
from rayft.models.load import ModelConfig
from rayft.numerics import assert_close
from rayft.serving import replica as replica_module
from rayft.serving.config import ServeConfig
from rayft.serving.control.sources import find
from rayft.serving.control.state import Served, loaded
from rayft.serving.engine.api import GenerationRequest, Progress, TokenLogprob
from rayft.serving.engine.cpu.engine import CpuEngine
from rayft.serving.http.responses import Completion
from rayft.serving.http.schemas import ChatRequest, CompletionRequest, Message
from rayft.serving.http.streaming import TextForm, collected, events
from rayft.serving.messages import Delta
from rayft.serving.replica import Replica
from tests.unit.serving.adapters import expected, reference


@pytest.fixture(scope="module")
def make_replica(tiny_folder: Path) -> Iterator[Callable[..., Replica]]:
    made: list[Replica] = []

    def make(**options: Any) -> Replica:
        options = {"model": ModelConfig(name=str(tiny_folder)), "dtype": "float32", **options}
        config = ServeConfig(**options)
        made.append(Replica(config, "cpu", "one"))
        return made[-1]

    yield make
    for replica in made:
        # Ray Serve calls this when it stops a replica.
        replica.__del__()


@pytest.fixture(scope="module")
def replica(make_replica: Callable[..., Replica], adapter_folders: dict[str, str]) -> Replica:
    made = make_replica(max_new_tokens=100, cache_tokens=512)
    asyncio.run(made.catch_up(state_of(adapter_folders)))
    return made


def state_of(adapters: dict[str, str], number: int = 1) -> Served:
    served = Served()
    for name, folder in adapters.items():
        served = loaded(served, find(name, folder, None, folder, "1GB", pinned=False))
    return replace(served, number=number)


def answer(replica: Replica, request: ChatRequest | CompletionRequest) -> list[Delta]:
    async def collect() -> list[Delta]:
        return [delta async for delta in replica.generate(request)]

    return asyncio.run(collect())


def text(prompt: Any = "hello", model: str = "base", **extra: Any) -> CompletionRequest:
    return CompletionRequest(model=model, prompt=prompt, **{"temperature": 0.0, "max_tokens": 20, **extra})


def test_an_answer_starts_with_an_empty_delta_and_ends_with_a_reason(
    replica: Replica, tiny_tokenizer: Any
) -> None:
    deltas = answer(replica, text())
    length = len(tiny_tokenizer("hello")["input_ids"])
    assert deltas[0] == Delta("", length, 0)
    assert (deltas[-1].finish, deltas[-1].completion_tokens) == ("length", 20)
    assert [delta.finish for delta in deltas[:-1]] == [None] * (len(deltas) - 1)


def test_a_request_that_takes_too_long_ends_and_frees_its_place(make_replica: Callable[..., Replica]) -> None:
    # One token takes far less than the limit on a busy machine, 8 · 450 tokens far more on a fast one.
    replica = make_replica(max_new_tokens=2000, cache_tokens=4096, max_seconds=1.0, max_running=1)
    with pytest.raises(RequestTimeoutError, match=r"not ready after 1 seconds.*max_seconds"):
        answer(replica, text(max_tokens=450, n=8))
    stats = asyncio.run(replica.stats())
    assert stats["engine"]["running"] == 0
    assert stats["traffic"]["base"]["errors"] == 1
    assert answer(replica, text(max_tokens=1))[-1].finish == "length"


def test_chat_goes_through_the_template(replica: Replica, tiny_tokenizer: Any) -> None:
    request = ChatRequest(
        model="small", messages=[Message(role="user", content="hi")], temperature=0, max_tokens=9
    )
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    as_text = answer(replica, text(prompt, "small", max_tokens=9))
    assert "".join(d.text for d in answer(replica, request)) == "".join(d.text for d in as_text)


def test_the_template_receives_the_requests_variables(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{% if enable_thinking %}let me think{% else %}no{% endif %}"
    monkeypatch.setattr(replica._tokenizer, "chat_template", template)

    def prompt(variables: dict[str, Any] | None) -> int:
        message = Message(role="user", content="hi")
        request = ChatRequest(model="base", messages=[message], max_tokens=1, chat_template_kwargs=variables)
        return answer(replica, request)[0].prompt_tokens

    assert [prompt(None), prompt({"enable_thinking": True})] == [len("no"), len("let me think")]


def test_a_requests_options_reach_the_engine(replica: Replica) -> None:
    def written(**extra: Any) -> str:
        return "".join(delta.text for delta in answer(replica, text(max_tokens=30, **extra)))

    greedy = written()
    free = {"temperature": 2.0, "seed": 1}
    assert written(**free, top_k=1) == written(**free, min_p=1.0) == greedy
    assert written(**free, top_k=-1, min_p=0.0, repetition_penalty=1.0) == written(**free, top_k=0) != greedy
    assert written(repetition_penalty=3.0) != greedy


def test_a_stop_token_ends_the_request(replica: Replica, tiny_tokenizer: Any) -> None:
    letters = [token for token in range(len(tiny_tokenizer)) if tiny_tokenizer.decode([token]).isalpha()]
    whole = "".join(delta.text for delta in answer(replica, text(max_tokens=60)))
    end = next(place for place, letter in enumerate(whole) if letter.isascii() and letter.isalpha())
    deltas = answer(replica, text(max_tokens=60, stop_token_ids=letters))
    assert "".join(delta.text for delta in deltas) == whole[:end]
    assert deltas[-1].finish == "stop"
    with pytest.raises(
        BadRequestError, match="'stop_token_ids': 100000 is not a token of this model"
    ) as caught:
        answer(replica, text(stop_token_ids=[3, 100_000]))
    assert caught.value.param == "stop_token_ids"


def test_long_prompts_do_not_block_other_requests(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()
    tokenize = replica_module.prompt_tokens

    def slow(tokenizer: Any, prompt: Any) -> tuple[int, ...]:
        if len(prompt) > 1000:
            begun.set()
            assert go_on.wait(30)
        return tokenize(tokenizer, prompt)

    monkeypatch.setattr(replica_module, "prompt_tokens", slow)

    async def scenario() -> None:
        async def run(request: CompletionRequest) -> list[Delta]:
            return [delta async for delta in replica.generate(request)]

        long = asyncio.create_task(run(text("x" * 30_000)))
        while not begun.is_set():
            await asyncio.sleep(0.01)
        assert (await run(text()))[-1].finish == "length"
        go_on.set()
        with pytest.raises(BadRequestError, match="context length"):
            await long

    asyncio.run(scenario())


def test_a_stop_string_ends_the_request(replica: Replica) -> None:
    whole = "".join(delta.text for delta in answer(replica, text()))
    stop = whole[4:6]
    deltas = answer(replica, text(stop=stop))
    assert "".join(delta.text for delta in deltas) == whole[: whole.index(stop)]
    assert deltas[-1].finish == "stop"
    assert deltas[-1].completion_tokens < 20
    assert asyncio.run(replica.stats())["engine"]["running"] == 0


def test_the_seed_determines_the_samples(replica: Replica) -> None:
    drawn = ["".join(d.text for d in answer(replica, text(temperature=1.5, seed=s))) for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    free = {"".join(d.text for d in answer(replica, text(temperature=1.5))) for _ in range(3)}
    assert len(free) == 3


def test_what_a_fast_engine_generates_in_20_ms_is_sent_in_one_part(
    replica: Replica, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any
) -> None:
    words = "a fast engine " * 100
    tokens = tuple(tiny_tokenizer(words)["input_ids"])
    parts: list[Delta] = []

    async def steps() -> AsyncGenerator[Progress, None]:
        """Generate a token each millisecond, for 0.3 s and until some parts were sent."""
        begun = time.monotonic()
        while (spent := time.monotonic() - begun) < 0.3 or len(parts) < 3:
            made = min(1 + int(spent / 0.001), len(tokens) - 1)
            yield Progress(tokens[:made], made)
            await asyncio.sleep(0.001)
        yield Progress(tokens, len(tokens), "length")

    async def scenario() -> float:
        begun = time.monotonic()
        async with asyncio.timeout(60):
            deltas = replica.generate(text(stream=True))
            await anext(deltas)
            async for delta in deltas:
                parts.append(delta)
        return time.monotonic() - begun

    monkeypatch.setattr(CpuEngine, "submit", lambda *_: steps())
    spent = asyncio.run(scenario())
    # The first and the last part may come between two beats.
    assert len(parts) <= spent / 0.02 + 3
    assert parts[0].completion_tokens == 1, "the first token is sent alone"
    assert "".join(part.text for part in parts) == words
    assert (parts[-1].finish, parts[-1].completion_tokens) == ("length", len(tokens))


def test_the_first_part_does_not_wait_for_the_next_beat(
    replica: Replica, monkeypatch: pytest.MonkeyPatch, tiny_tokenizer: Any
) -> None:
    async def steps() -> AsyncGenerator[Progress, None]:
        yield Progress(tuple(tiny_tokenizer("h")["input_ids"]), 1)

    async def scenario() -> Delta:
        async with aclosing(replica.generate(text(stream=True))) as deltas, asyncio.timeout(60):
            await anext(deltas)
            return await anext(deltas)

    monkeypatch.setattr(replica_module, "MERGED_SECONDS", 1e9)
    monkeypatch.setattr(CpuEngine, "submit", lambda *_: steps())
    assert asyncio.run(scenario()).text == "h"


def test_choices_are_sampled_independently_and_the_first_has_the_requests_seed(replica: Replica) -> None:
    def texts(**extra: Any) -> list[str]:
        made: dict[int, str] = {}
        for delta in answer(replica, text(temperature=1.5, seed=3, **extra)):
            made[delta.index] = made.get(delta.index, "") + delta.text
        return [made[index] for index in sorted(made)]

    alone, many = texts(), texts(n=3)
    assert len(set(many)) == 3
    assert many[0] == alone[0]
    assert texts(n=3) == many
    # Two answers to each of two prompts, in the order of the prompts.
    both = texts(prompt=["hello", "world"], n=2)
    assert both[:2] == many[:2]
    assert both[2] == texts(prompt="world")[0]
    last = answer(replica, text(["hello", "hi"], n=2))[-1]
    assert last.prompt_tokens == sum(answer(replica, text(p))[0].prompt_tokens for p in ("hello", "hi"))


def test_the_tokens_of_the_scores_join_to_the_answer(replica: Replica) -> None:
    deltas = answer(replica, text("caf\u00e9 \u2014", model="large", logprobs=2, temperature=1.4, seed=5))
    scores = [score for delta in deltas for score in delta.scores]
    whole = "".join(delta.text for delta in deltas)
    assert len(scores) == deltas[-1].completion_tokens
    assert bytes(byte for score in scores for byte in score.bytes).decode(errors="replace") == whole
    for one in scores:
        assert len(one.top) == 2
        assert one.top[0].logprob >= max(one.top[1].logprob, one.logprob) - 1e-6
        assert one.logprob <= 0


def completion(replica: Replica, request: CompletionRequest) -> dict[str, Any]:
    """Return the body of the answer."""

    async def written() -> dict[str, Any]:
        deltas = replica.generate(request)
        await anext(deltas)
        return TextForm(request.model).whole(await collected(deltas))

    body = asyncio.run(written())
    TypeAdapter(Completion).validate_python(body)
    return body


def chunks(replica: Replica, request: CompletionRequest) -> list[dict[str, Any]]:
    """Return the choices in the chunks of a streamed answer."""

    async def written() -> list[str]:
        deltas = replica.generate(request)
        first = await anext(deltas)
        return [event async for event in events(TextForm(request.model), first, deltas, counts=False)]

    *data, _ = asyncio.run(written())
    return [json.loads(event.removeprefix("data: "))["choices"][0] for event in data]


def assert_same(found: list[float], wanted: list[float]) -> None:
    """Compare log-probabilities up to rounding, which depends on what else is in the batch."""
    assert_close(torch.tensor(found), torch.tensor(wanted), torch.float32, 64, 8)


@pytest.mark.parametrize("model", ["base", "small", "picks"])
def test_log_likelihoods_are_those_that_lm_eval_reads(
    replica: Replica, tiny_folder: Path, tiny_tokenizer: Any, adapter_folders: dict[str, str], model: str
) -> None:
    questions = [("the capital of France is", " Paris"), ("a", "b"), ("2 + 2 =", " 4, of course")]
    pairs = [[tiny_tokenizer(part)["input_ids"] for part in pair] for pair in questions]
    plain = reference(tiny_folder, adapter_folders.get(model))
    # A continuation that the model itself would write.
    greedy = expected(tiny_folder, adapter_folders.get(model), pairs[1][0], 3)
    pairs.append([pairs[1][0], list(greedy)])
    prompts = [context + continuation for context, continuation in pairs]
    request = text(prompts, model, max_tokens=1, logprobs=1, echo=True, seed=1234)
    body = completion(replica, request)
    for (context, continuation), choice in zip(pairs, body["choices"], strict=True):
        # As lm_eval.models.openai_completions.LocalCompletionsAPI.parse_logprobs does.
        values = choice["logprobs"]["token_logprobs"][len(context) : -1]
        top = choice["logprobs"]["top_logprobs"][len(context) : -1]
        is_greedy = all(value == max(tops.values()) for value, tops in zip(values, top, strict=True))
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
        wanted = logits.log_softmax(-1)[range(len(continuation)), continuation]
        assert_close(torch.tensor(values), wanted, torch.float32, 64, 8)
        assert is_greedy == (logits.argmax(-1).tolist() == continuation)
        assert len(values) == len(continuation)
    assert is_greedy
    assert body["usage"]["prompt_tokens"] == sum(map(len, prompts))
    assert body["usage"]["completion_tokens"] == len(prompts)


def test_an_echo_begins_the_text_and_the_scores_with_the_prompt(
    replica: Replica, tiny_tokenizer: Any
) -> None:
    written = ["<|im_start|>caf\u00e9", "hello"]
    tokens = [tiny_tokenizer(one)["input_ids"] for one in written]
    options: dict[str, Any] = {"temperature": 1.0, "seed": 3, "n": 2, "max_tokens": 4, "model": "small"}
    silent = completion(replica, text(written, **options, logprobs=2))
    for prompts in (written, tokens):
        for asked in (None, 2):
            body = completion(replica, text(prompts, **options, logprobs=asked, echo=True))
            assert body["usage"] == silent["usage"]
            for index, (choice, plain) in enumerate(zip(body["choices"], silent["choices"], strict=True)):
                prompt = tokens[index // 2]
                assert choice["text"] == written[index // 2] + plain["text"]
                if asked is None:
                    assert choice["logprobs"] is None
                    continue
                scores = choice["logprobs"]
                assert {len(values) for values in scores.values()} == {len(prompt) + 4}
                assert scores["tokens"][: len(prompt)] == [tiny_tokenizer.decode([one]) for one in prompt]
                assert scores["tokens"][len(prompt) :] == plain["logprobs"]["tokens"]
                assert_same(scores["token_logprobs"][len(prompt) :], plain["logprobs"]["token_logprobs"])
                assert scores["token_logprobs"][0] is scores["top_logprobs"][0] is None
                assert scores["text_offset"][0] == 0
                values = zip(scores["tokens"], scores["token_logprobs"], scores["top_logprobs"], strict=True)
                for token, value, top in list(values)[1:]:
                    assert token in top
                    assert top[token] >= value
                    assert len(top) <= 3


def test_a_streamed_echo_comes_first(replica: Replica) -> None:
    request = text(["hello", "hi"], max_tokens=5, logprobs=1, echo=True)
    whole = completion(replica, request)["choices"]
    parts = chunks(replica, request)
    for index, prompt in enumerate(["hello", "hi"]):
        mine = [part for part in parts if part["index"] == index]
        assert mine[0]["text"].startswith(prompt)
        assert "".join(part["text"] for part in mine) == whole[index]["text"]
        lists = {
            name: [one for part in mine if part["logprobs"] for one in part["logprobs"][name]]
            for name in whole[index]["logprobs"]
        }
        assert lists["tokens"] == whole[index]["logprobs"]["tokens"]
        assert lists["text_offset"] == whole[index]["logprobs"]["text_offset"]
        assert lists["token_logprobs"][0] is lists["top_logprobs"][0] is None
        assert_same(lists["token_logprobs"][1:], whole[index]["logprobs"]["token_logprobs"][1:])


@pytest.mark.parametrize("echo", [False, True])
def test_a_completion_keeps_the_space_after_its_prompt(
    replica: Replica, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, echo: bool
) -> None:
    tokens = tuple(tiny_tokenizer(" Paris")["input_ids"])

    async def steps(job: GenerationRequest) -> AsyncGenerator[Progress, None]:
        scores = tuple(TokenLogprob(token, -1.0, ()) for token in tokens)
        prompt = tuple(TokenLogprob(token, -1.0, ()) for token in job.prompt) if job.score_prompt else ()
        yield Progress(tokens, len(tokens), "length", scores, prompt)

    # Llama 2's and Mistral's tokenizers omit the first space of what they decode.
    strips = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    monkeypatch.setattr(replica._tokenizer.backend_tokenizer, "decoder", strips)
    monkeypatch.setattr(CpuEngine, "submit", lambda _, job: steps(job))
    (choice,) = completion(replica, text("it is", logprobs=0, echo=echo))["choices"]
    assert choice["text"] == ("it is" if echo else "") + " Paris"
    assert "".join(choice["logprobs"]["tokens"]) == choice["text"]


def test_the_offsets_of_tokens_are_places_in_the_text(
    replica: Replica, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, stop = tuple(tiny_tokenizer("go on \u00e9ND.")["input_ids"]), "\u00e9NDE"
    wanted = [*range(7), 6, 7, 8, 9]

    async def steps(job: GenerationRequest) -> AsyncGenerator[Progress, None]:
        scores = tuple(TokenLogprob(token, -1.0, ()) for token in tokens)
        scored = tuple(TokenLogprob(token, -1.0, ()) for token in job.prompt)
        for size in range(1, len(tokens) + 1):
            finish = "length" if size == len(tokens) else None
            yield Progress(tokens[:size], size, finish, scores[:size], scored if job.score_prompt else ())

    def offsets(request: CompletionRequest) -> list[int]:
        found = completion(replica, request)["choices"][0]["logprobs"]["text_offset"]
        parts = [part["logprobs"] for part in chunks(replica, request)]
        assert [place for part in parts if part for place in part["text_offset"]] == found
        assert len(parts) > 3
        return list(found)

    monkeypatch.setattr(CpuEngine, "submit", lambda _, job: steps(job))
    monkeypatch.setattr(replica_module, "MERGED_SECONDS", 1e-3)
    # The beginning of a stop string is held back, but its tokens have their places.
    asked = text("caf\u00e9", logprobs=0, stop=stop, stream=True)
    assert offsets(asked) == wanted
    echoed = text("caf\u00e9", logprobs=0, stop=stop, stream=True, echo=True)
    prompt = [0, 1, 2, 3, 3]
    assert offsets(echoed) == [*prompt, *(4 + place for place in wanted)]
    # A tokenizer that begins each prompt with a token that is not in the text.
    start = "<|im_start|>"
    begins = TemplateProcessing(f"{start} $A", None, [(start, tiny_tokenizer.convert_tokens_to_ids(start))])
    monkeypatch.setattr(replica._tokenizer.backend_tokenizer, "post_processor", begins)
    assert offsets(echoed) == [0, *prompt, *(4 + place for place in wanted)]


@pytest.mark.parametrize("logprobs", [None, 0, 1])
def test_an_echo_may_generate_nothing(replica: Replica, logprobs: int | None) -> None:
    body = completion(replica, text(["hello", "x"], max_tokens=0, echo=True, logprobs=logprobs))
    assert [(one["text"], one["finish_reason"]) for one in body["choices"]] == [
        ("hello", "length"), ("x", "length"),
    ]  # fmt: skip
    assert body["usage"]["completion_tokens"] == 0
    if logprobs is not None:
        assert [len(one["logprobs"]["tokens"]) for one in body["choices"]] == [5, 1]
        for top in body["choices"][0]["logprobs"]["top_logprobs"][1:]:
            assert 1 <= len(top) <= logprobs + 1


def test_an_echo_has_the_end_token_among_its_scores(
    replica: Replica, tiny_folder: Path, tiny_tokenizer: Any
) -> None:
    prompt = tiny_tokenizer("hello")["input_ids"]
    free = expected(tiny_folder, None, prompt, 6)
    cut = free.index(free[3])
    plain = completion(replica, text(prompt, max_tokens=6, logprobs=1))["choices"][0]["logprobs"]
    body = completion(replica, text(prompt, max_tokens=6, logprobs=1, stop_token_ids=[free[3]], echo=True))
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "stop"
    assert len(choice["logprobs"]["tokens"]) == body["usage"]["total_tokens"] == len(prompt) + cut + 1
    assert choice["logprobs"]["tokens"][-1] == tiny_tokenizer.decode([free[3]])
    assert_same(choice["logprobs"]["token_logprobs"][len(prompt) :], plain["token_logprobs"][: cut + 1])
    assert choice["text"] == "hello" + tiny_tokenizer.decode(list(free[:cut]))


def test_an_end_token_after_a_stop_string_has_no_score(
    replica: Replica, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = tuple(tiny_tokenizer("go STOP")["input_ids"])

    async def steps(job: GenerationRequest) -> AsyncGenerator[Progress, None]:
        scores = [TokenLogprob(token, -1.0, ()) for token in (*job.prompt, *tokens)]
        prompt, own = tuple(scores[: len(job.prompt)]), tuple(scores[len(job.prompt) :])
        yield Progress(tokens, len(tokens) + 1, "stop", own, prompt, end=TokenLogprob(0, -1.0, ()))

    monkeypatch.setattr(CpuEngine, "submit", lambda _, job: steps(job))
    body = completion(replica, text("hello", logprobs=0, echo=True, stop="STOP"))
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("hellogo ", "stop")
    assert len(choice["logprobs"]["tokens"]) == body["usage"]["total_tokens"] == len("hellogo STOP")


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_in_a_form_that_the_engine_does_not_know_is_refused_before_it_begins(
    replica: Replica, stream: bool
) -> None:
    forms: Any = [
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "array"}}},
    ]
    for form in forms:
        before = asyncio.run(replica.stats())["traffic"].get("base", {}).get("requests")
        request = text(response_format=form, stream=stream)
        with pytest.raises(BadRequestError, match="can't make an answer follow a JSON schema") as caught:
            asyncio.run(anext(replica.generate(request)))
        assert caught.value.param == "response_format"
        assert asyncio.run(replica.stats())["traffic"].get("base", {}).get("requests") == before
    assert answer(replica, text(response_format={"type": "text"}))[-1].finish


def test_one_choice_that_fails_fails_the_request(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = CpuEngine.submit

    def failing(engine: CpuEngine, job: Any) -> Any:
        if job.seed == 3:
            raise ResourceError("the engine has stopped")
        return submit(engine, job)

    monkeypatch.setattr(CpuEngine, "submit", failing)
    with pytest.raises(ResourceError, match="stopped"):
        answer(replica, text(n=3, seed=3, max_tokens=3))
    monkeypatch.undo()
    assert asyncio.run(replica.stats())["engine"]["running"] == 0


def test_a_request_with_many_choices_leaves_room_for_others(make_replica: Callable[..., Replica]) -> None:
    replica = make_replica(max_running=2)

    async def scenario() -> None:
        running = 0

        async def many() -> list[Delta]:
            return [delta async for delta in replica.generate(text(["a"] * 8, n=8, max_tokens=20))]

        first = asyncio.create_task(many())
        while running == 0:
            await asyncio.sleep(0.01)
            running = (await replica.stats())["engine"]["running"]
        assert running <= replica_module.TURNS * 2
        async for _ in replica.generate(text(max_tokens=1)):
            pass
        assert not first.done()
        assert {delta.index for delta in await first if delta.finish} == set(range(64))

    asyncio.run(scenario())


def test_without_a_limit_a_chat_generates_as_many_tokens_as_fit(replica: Replica) -> None:
    request = ChatRequest(model="base", messages=[Message(role="user", content="x" * 400)], temperature=0)
    last = answer(replica, request)[-1]
    # The cache of 512 tokens limits the length: after the prompt it has room for fewer than 100 tokens.
    assert last.finish == "stop" or last.prompt_tokens + last.completion_tokens == 512


@pytest.mark.parametrize(("prompt", "tokens"), [("hello", 16), ("x" * 505, 7)])
def test_without_a_limit_a_completion_generates_up_to_16_tokens(
    replica: Replica, prompt: str, tokens: int
) -> None:
    last = answer(replica, text(prompt, max_tokens=None))[-1]
    assert last.finish == "stop" or last.completion_tokens == tokens


@pytest.mark.parametrize(
    ("request_", "error", "param", "word"),
    [
        (text(model="nobody"), UnknownModelError, "model", "served are base"),
        (text("x" * 600), ContextLengthError, "prompt", "this model's maximum context length is 512"),
        (text("x" * 500, max_tokens=13), ContextLengthError, "prompt", "or lower max_tokens$"),
        (
            text("x" * 512, max_tokens=0, echo=True),
            ContextLengthError,
            "prompt",
            "at least one .* the prompt$",
        ),
        (text(max_tokens=101), BadRequestError, "max_tokens", "at most 100"),
        (text(""), BadRequestError, "prompt", "empty"),
    ],
)
def test_a_request_that_can_not_be_answered_is_refused(
    replica: Replica, request_: Any, error: type[BadRequestError], param: str, word: str
) -> None:
    with pytest.raises(error, match=word) as caught:
        answer(replica, request_)
    assert caught.value.param == param


def test_the_longest_request_that_fits_is_answered(replica: Replica) -> None:
    last = answer(replica, text("x" * 500, max_tokens=12))[-1]
    assert last.finish is not None


def test_a_bad_adapter_changes_nothing(
    make_replica: Callable[..., Replica], adapter_folders: dict[str, str]
) -> None:
    made = make_replica()
    good = state_of({"small": adapter_folders["small"]})
    asyncio.run(made.catch_up(good))
    lost = replace(good.versions[0], name="lost", folder="/nowhere")
    with pytest.raises(ArtifactError, match="'lost' is not served"):
        asyncio.run(made.prepare(loaded(good, lost)))
    assert asyncio.run(made.serving()) == good
    assert answer(made, text(model="small"))[-1].finish
    with pytest.raises(UnknownModelError, match="served are base, small"):
        answer(made, text(model="lost"))


class Director:
    """A director that serves nothing, on the base of the first replica."""

    def __init__(self, base: str = "") -> None:
        self.found = base

    def __getattr__(self, method: str) -> Any:
        async def answer(*arguments: Any) -> Any:
            if method == "state":
                return Served()
            if method == "started":
                self.found = self.found or arguments[0]
            return self.found

        handle: Any = type("Method", (), {"remote": staticmethod(answer)})
        return handle


def test_a_replica_with_another_base_than_the_others_does_not_start(
    make_replica: Callable[..., Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def start(director: Director) -> None:
        replica = make_replica()
        monkeypatch.setattr(replica_module.ray_serve, "get_deployment_handle", lambda _: director)
        await replica.reconfigure({})

    first = Director()
    asyncio.run(start(first))
    assert first.found
    asyncio.run(start(Director(first.found)))
    with pytest.raises(ModelError, match="now has another base"):
        asyncio.run(start(Director("f" * 16)))


def test_a_replica_does_not_look_for_cycles_in_what_it_has_imported(
    make_replica: Callable[..., Replica], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica_module.ray_serve, "get_deployment_handle", lambda _: Director())
    gc.unfreeze()

    async def start() -> int:
        await make_replica().reconfigure({})
        return len(gc.get_objects())

    before = len(gc.get_objects())
    try:
        assert asyncio.run(start()) < before / 10
    finally:
        gc.unfreeze()


@pytest.mark.parametrize(
    "error", [DeploymentUnavailableError(DeploymentID("Director", "rayft")), ValueError("unforeseen")]
)
def test_a_replica_follows_the_director_again_after_an_error(
    make_replica: Callable[..., Replica],
    adapter_folders: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    asked = 0

    async def number() -> int:
        nonlocal asked
        asked += 1
        if asked == 1:
            raise error
        return 1

    async def state() -> Served:
        return state_of({"small": adapter_folders["small"]}, number=1)

    async def scenario() -> None:
        replica, director = make_replica(), Director()
        monkeypatch.setattr(replica_module.ray_serve, "get_deployment_handle", lambda _: director)
        monkeypatch.setattr(replica_module, "WATCH_SECONDS", 0.01)
        await replica.reconfigure({})
        # A change that the replica misses.
        director.number, director.state = SimpleNamespace(remote=number), SimpleNamespace(remote=state)
        (watching,) = replica._tasks
        while asked < 3 and not watching.done():
            await asyncio.sleep(0.01)
        assert (await replica.serving()).names() == ("small",)
        watching.cancel()

    asyncio.run(scenario())


def test_no_weight_is_a_memory_map_of_a_file(
    make_replica: Callable[..., Replica], tiny_folder: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(tiny_folder, tmp_path / "base")
    replica = make_replica(model=ModelConfig(name=str(own)))
    assert str(own) not in Path("/proc/self/maps").read_text()
    before = "".join(delta.text for delta in answer(replica, text()))
    os.truncate(own / "model.safetensors", 0)
    assert "".join(delta.text for delta in answer(replica, text())) == before


def test_traffic_is_counted_by_version(replica: Replica) -> None:
    before = asyncio.run(replica.stats())["traffic"].get("middle@1", {"requests": 0, "tokens": 0})
    first, *_ = answer(replica, text(model="middle", max_tokens=5, n=2, temperature=1.0))
    assert len(first.fingerprint) == 16
    did = asyncio.run(replica.stats())["traffic"]["middle@1"]
    assert (did["requests"] - before["requests"], did["tokens"] - before["tokens"]) == (1, 10)
    assert did["errors"] == 0
    assert answer(replica, text())[0].fingerprint == ""


def test_a_dead_engine_is_unhealthy(make_replica: Callable[..., Replica]) -> None:
    replica = make_replica()
    replica.check_health()
    replica.__del__()
    with pytest.raises(ResourceError, match="stopped"):
        replica.check_health()
    with pytest.raises(ResourceError, match="stopped"):
        asyncio.run(replica.problems())


def test_the_traffic_of_removed_versions_is_deleted(
    make_replica: Callable[..., Replica], adapter_folders: dict[str, str]
) -> None:
    replica, served = make_replica(), Served()
    # Each content replaces the previous one, to which a rollback would return.
    for name in ("small", "large", "middle"):
        folder = adapter_folders[name]
        served = loaded(served, find("turning", folder, None, folder, "1GB", pinned=False))
        asyncio.run(replica.catch_up(served))
        answer(replica, text(model="turning", max_tokens=2))
    answer(replica, text(max_tokens=2))
    traffic = asyncio.run(replica.stats())["traffic"]
    assert {key: did["requests"] for key, did in traffic.items()} == {
        "turning@2": 1, "turning@3": 1, "base": 1,
    }  # fmt: skip


def test_the_error_about_a_missing_base_names_the_node(
    make_replica: Callable[..., Replica], tmp_path: Path
) -> None:
    missing = ModelConfig(name=str(tmp_path / "missing"))
    with pytest.raises(ModelError, match=rf"on {re.escape(socket.gethostname())}: .*missing"):
        make_replica(model=missing)
