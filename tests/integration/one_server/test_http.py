"""Requests of the real `openai` client to a real Ray Serve application."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from rayft.errors import ResourceError
from rayft.serving.build import preflight
from rayft.serving.config import ServeConfig
from tests.integration.one_server.server import Server as Shared
from tests.integration.serving import HEADERS

pytestmark = [pytest.mark.ray, pytest.mark.slow]

MESSAGES: Any = [{"role": "user", "content": "Where is Paris?"}]


@dataclass(frozen=True)
class Server:
    url: str
    adapters: dict[str, str]
    client: OpenAI

    def ask(self, model: str, **extra: Any) -> str:
        options = {"temperature": 0, "max_tokens": 24, **extra}
        made = self.client.chat.completions.create(model=model, messages=MESSAGES, **options)
        return str(made.choices[0].message.content)

    def engine(self) -> dict[str, int]:
        found: dict[str, int] = httpx.get(f"{self.url}/healthz", headers=HEADERS).json()["engine"]
        return found

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/{path}", headers=HEADERS, **body)


@pytest.fixture(scope="module")
def server(restored: Shared) -> Server:
    key = HEADERS["Authorization"].removeprefix("Bearer ")
    client = OpenAI(base_url=f"{restored.url}/v1", api_key=key, max_retries=0)
    return Server(restored.url, restored.adapters, client)


def test_models_are_listed_with_their_descriptions(server: Server, tiny_folder: Path) -> None:
    listed = {model.id: model for model in server.client.models.list().data}
    assert list(listed) == ["base", *server.adapters]
    large: Any = server.client.models.retrieve("large")
    assert large == listed["large"]
    assert (large.rank, large.method, large.base, large.squeezed) == (8, "lora", str(tiny_folder), False)
    assert large.bytes == (Path(large.root) / "adapter_model.safetensors").stat().st_size
    for name, found in (("squeezed@r2", "squeezed"), ("large@1", "large"), (str(tiny_folder), "base")):
        assert server.client.models.retrieve(name) == listed[found]
    for name in ("nobody", "large@2", "large@champion", "large@r2", "squeezed@r0", "base@1", "base@r2"):
        with pytest.raises(openai.NotFoundError):
            server.client.models.retrieve(name)


def test_each_model_gives_the_same_answer_alone_and_in_a_mixed_batch(server: Server) -> None:
    models = ["base", *server.adapters, "squeezed@r2"]
    alone = [server.ask(model) for model in models]
    assert len(set(alone)) == len(models)
    with ThreadPoolExecutor(3 * len(models)) as pool:
        together = list(pool.map(server.ask, models * 3))
    assert together == alone * 3
    assert server.engine()["max_slots_in_forward"] >= 4


def test_the_bases_own_name_denotes_the_base(server: Server, tiny_folder: Path) -> None:
    assert server.ask(str(tiny_folder)) == server.ask("base")


def test_the_chunks_of_a_chat_join_to_its_answer(server: Server) -> None:
    chunks = list(
        server.client.chat.completions.create(
            model="small",
            messages=MESSAGES,
            temperature=0,
            max_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == server.ask("small")
    assert len(chunks) >= 3
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    usage = chunks[-1].usage
    assert usage is not None
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_long_answer_comes_in_many_chunks(server: Server) -> None:
    options: Any = {"model": "picks", "prompt": "hello", "temperature": 0, "max_tokens": 400}
    chunks = list(server.client.completions.create(**options, stream=True))
    generated = server.client.completions.create(**options).usage.completion_tokens
    # Tokens of 20 ms come in one chunk; a token takes about one here.
    assert generated < 100 or 4 < len(chunks) <= generated + 1


def test_a_completion_is_the_same_whole_and_streamed(server: Server) -> None:
    options: Any = {"model": "picks", "prompt": "hello", "temperature": 0, "max_tokens": 24}
    whole = server.client.completions.create(**options)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 24
    assert whole.choices[0].finish_reason == "length"
    stream = server.client.completions.create(**options, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text


def test_choices_and_log_probabilities_have_openais_form(server: Server) -> None:
    options: Any = {"model": "small", "messages": MESSAGES, "max_tokens": 5, "temperature": 1.2, "seed": 1}
    whole = server.client.chat.completions.create(**options, n=2, logprobs=True, top_logprobs=2)
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 10
    streamed: dict[int, str] = {}
    tokens: dict[int, int] = {}
    for chunk in server.client.chat.completions.create(**options, n=2, logprobs=True, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + (choice.delta.content or "")
            found = choice.logprobs.content if choice.logprobs else None
            tokens[choice.index] = tokens.get(choice.index, 0) + len(found or [])
    assert streamed == {choice.index: choice.message.content for choice in whole.choices}
    assert tokens == {0: 5, 1: 5}
    for choice in whole.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert [len(token.top_logprobs) for token in choice.logprobs.content] == [2] * 5
    texts = server.client.completions.create(
        model="base", prompt=["hello", "hi"], max_tokens=4, temperature=0, logprobs=1
    )
    assert [choice.index for choice in texts.choices] == [0, 1]
    scores = texts.choices[1].logprobs
    assert scores is not None
    assert scores.tokens is not None
    assert scores.text_offset is not None
    assert len(scores.tokens) == len(scores.text_offset) == 4


def test_a_stream_is_made_of_server_sent_events(server: Server) -> None:
    body = {"model": "base", "messages": MESSAGES, "max_tokens": 3, "stream": True}
    answer = server.post("chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])


def test_seed_and_stop_take_effect(server: Server) -> None:
    assert server.ask("base", temperature=1.2, seed=7) == server.ask("base", temperature=1.2, seed=7)
    assert server.ask("base", temperature=1.2, seed=7) != server.ask("base", temperature=1.2, seed=8)
    whole = server.ask("base")
    stop = whole[-3:]
    assert server.ask("base", stop=[stop]) == whole[: whole.index(stop)]


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_model_is_a_404(server: Server, stream: bool) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        server.client.chat.completions.create(model="nobody", messages=MESSAGES, stream=stream)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert "served are base, small" in caught.value.message
    with pytest.raises(openai.NotFoundError, match="never squeezed"):
        server.ask("small@r2")


@pytest.mark.parametrize(
    ("body", "param", "word"),
    [
        ({"content": b'{"model": '}, None, "not valid JSON"),
        ({"content": b"[]"}, None, "JSON object"),
        ({"json": {"messages": MESSAGES}}, "model", "'model' is missing"),
        ({"json": {"model": "base"}}, "messages", "'messages' is missing"),
        ({"json": {"model": "base", "messages": MESSAGES, "tools": [{}]}}, "tools", "not supported"),
        (
            {
                "json": {
                    "model": "base",
                    "messages": [{"role": "user", "content": "x" * 2000}],
                    "stream": True,
                }
            },
            "messages",
            "context length is 1024",
        ),
    ],
)
def test_a_wrong_request_is_a_400_with_the_reason(
    server: Server, body: Any, param: str | None, word: str
) -> None:
    answer = server.post("chat/completions", **body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert word in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_unknown_paths_and_methods_are_errors_in_the_same_form(server: Server) -> None:
    for answer, status in (
        (httpx.get(f"{server.url}/v2"), 404),
        (httpx.get(f"{server.url}/v1/completions"), 405),
    ):
        assert answer.status_code == status
        assert answer.json()["error"]["type"] == "invalid_request_error"
    assert httpx.put(f"{server.url}/v1/adapters").headers["allow"] == "GET, POST"


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_leave_free_their_places(server: Server, stream: bool) -> None:
    # One choice alone would be finished before the server notices that its client has left.
    body = {"model": "base", "prompt": "hello", "n": 16, "max_tokens": 1000, "stream": stream}
    for _ in range(4):
        before = server.engine()["forwards"]
        with (
            suppress(httpx.ReadTimeout),
            httpx.stream(
                "POST", f"{server.url}/v1/completions", json=body, headers=HEADERS, timeout=0.5
            ) as answer,
        ):
            next(answer.iter_lines())
        until = time.monotonic() + 20
        while server.engine()["running"] and time.monotonic() < until:
            time.sleep(0.05)
        assert server.engine()["running"] == 0
        assert server.engine()["forwards"] - before < 900


def test_the_port_of_a_running_server_is_in_use(server: Server) -> None:
    port = httpx.URL(server.url).port
    assert port is not None
    with pytest.raises(ResourceError, match=f"port {port} .*in use"):
        preflight(ServeConfig(port=port))
