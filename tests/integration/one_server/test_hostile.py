"""Requests that no client should send: a running server refuses them, and its replica continues."""

from __future__ import annotations

import json
import math
import re
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray.serve as ray_serve
import torch
from ray import cloudpickle
from safetensors.torch import load_file, save_file

from rayft.artifacts.meta import CONFIG_FILE, META_FILE, WEIGHTS_FILE
from rayft.errors import UnknownModelError
from rayft.serving.build import APPLICATION
from rayft.serving.http.errors import describe_error
from rayft.serving.http.schemas import CompletionRequest
from tests.integration.one_server.server import BODY_BYTES, USER_KEY
from tests.integration.one_server.server import Server as Shared
from tests.integration.serving import HEADERS, Base, description, replica_stats

pytestmark = [pytest.mark.ray, pytest.mark.slow]

HALF = "\ud83d"
"""Half of an emoji."""
SHORT: dict[str, Any] = {"model": "base", "max_tokens": 2, "temperature": 0}
"""Greedy, so that the answers of the random model don't end early by chance."""
CHAT: dict[str, Any] = {**SHORT, "messages": [{"role": "user", "content": "hi"}]}
TEXT: dict[str, Any] = {**SHORT, "prompt": "hi"}
PATHS = {"chat/completions": CHAT, "completions": TEXT}

FULL: dict[str, Any] = {
    "model": "still",
    "stream": True,
    "stream_options": {"include_usage": True},
    "max_tokens": 2,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "seed": 1,
    "n": 1,
    "stop": ["a"],
    "stop_token_ids": [3],
    "response_format": {"type": "text", "json_schema": None},
    "user": "me",
    "metadata": {"a": "b"},
    "tools": [],
}
"""A request that sets all supported fields; its values are replaced one by one."""
FULL_BODIES: dict[str, dict[str, Any]] = {
    "chat/completions": {
        **FULL,
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": "b", "reasoning_content": "c"},
            {"role": "user", "content": "hi"},
        ],
        "logprobs": True,
        "top_logprobs": 1,
        "chat_template_kwargs": {"enable_thinking": False, "a": ["b"]},
    },
    "completions": {**FULL, "prompt": ["hi", "ho"], "logprobs": 1, "echo": True},
    "adapters": {"name": "fresh", "source": "/nowhere", "weight": 0.5, "pinned": False},
}
ODD: tuple[Any, ...] = (
    HALF, f"a{HALF}", "\0", "", "x" * 10_000, "\u202e\ufeff", None, True, 0, -1, 2**63 - 1, 10**30, 0.5,
    -1e308,
    [], {}, [[]], [None], [HALF], {"a": 1}, {HALF: 1}, {"": {}}, [True] * 200, "../../etc/passwd",
)  # fmt: skip
"""Values that replace each value of a request in turn."""


@dataclass(frozen=True)
class Server:
    url: str
    base: Base
    replica: int
    client: httpx.Client

    def send(self, method: str, path: str, body: bytes | None = None, **headers: str) -> httpx.Response:
        found = {**HEADERS, "Content-Type": "application/json", **headers}
        return self.client.request(method, f"{self.url}{path}", content=body, headers=found)

    def post(self, path: str, body: bytes | dict[str, Any]) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.send("POST", f"/v1/{path}", content)

    def raw(
        self, *lines: bytes, body: bytes = b"", key: bool = True, seconds: float = 30
    ) -> tuple[int, bytes]:
        """Send the bytes of a request, and return the status and the body of the answer."""
        authorization = [f"Authorization: {HEADERS['Authorization']}".encode()] if key else []
        head = b"\r\n".join(
            [lines[0], b"Host: here", b"Connection: close", *authorization, *lines[1:], b"", b""]
        )
        address = httpx.URL(self.url)
        with socket.create_connection((address.host, address.port or 80), timeout=seconds) as connection:
            connection.sendall(head + body)
            answer = b""
            while part := connection.recv(65536):
                answer += part
        status, _, rest = answer.partition(b"\r\n")
        return int(status.split()[1]), rest.partition(b"\r\n\r\n")[2]


@pytest.fixture(scope="module")
def started(restored: Shared) -> Iterator[Server]:
    with httpx.Client(timeout=60) as client:
        yield Server(restored.url, restored.base, restored.replica, client)


@pytest.fixture
def server(started: Server) -> Iterator[Server]:
    """The server; after each test its replica must be the same process, and answer."""
    yield started
    assert [one["pid"] for one in replica_stats()] == [started.replica]
    answer = started.post("completions", TEXT)
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 2


def refused(answer: httpx.Response, param: str | None = None) -> str:
    """Check that an answer is an error in OpenAI's form, and return its message."""
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    if param is not None:
        assert error["param"] == param, error
    return str(error["message"])


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"model": HALF}, "model", ["Unicode", "U+D83D"]),
        ({"model": f"still@{HALF}"}, "model", ["Unicode"]),
        ({"messages": [{"role": "user", "content": HALF}]}, "messages[0].content", ["Unicode"]),
        ({"user": {"a": [HALF]}}, "user.a[0]", ["Unicode"]),
        ({"max_token": 5}, "max_token", ["did you mean 'max_tokens'"]),
        ({"guided_json": {}}, "guided_json", ["not supported"]),
        ({"continue_final_message": True}, "continue_final_message", ["not supported"]),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content", ["string"]),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
            ["images are not supported"],
        ),
        ({"stop_token_ids": [10**6]}, "stop_token_ids", ["not a token of this model"]),
        (
            {"chat_template_kwargs": {"tokenize": False}},
            "chat_template_kwargs.tokenize",
            ["set by the server"],
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_error_names_what_is_wrong(
    server: Server, change: dict[str, Any], param: str, words: Sequence[str], stream: bool
) -> None:
    answer = server.post("chat/completions", {**CHAT, "stream": stream, **change})
    assert answer.status_code == 400
    message = refused(answer, param)
    assert all(word in message for word in words)


def test_vllms_options_take_effect(server: Server) -> None:
    def written(**options: Any) -> str:
        answer = server.post("chat/completions", {**CHAT, "max_tokens": 8, **options})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["message"]["content"])

    greedy, free = written(temperature=0), {"temperature": 2, "seed": 5}
    assert written(**free, top_k=1) == written(**free, min_p=1) == greedy
    assert written(**free) == written(**free, top_k=-1) != greedy
    assert written(temperature=0, repetition_penalty=0.01) != greedy
    assert written(temperature=0, chat_template_kwargs={"enable_thinking": False}) == greedy


@pytest.mark.parametrize(
    "body",
    [
        b"", b"\0", b"{", b"[]", b"null", b'"a"', b"NaN", b"\xff\xfe", b"\xef\xbb\xbf",
        b"[" * 100_000, b'{"a":' * 100_000, b"[" * 100_000 + b"]" * 100_000,
        json.dumps(CHAT).encode()[:-1] + b',"metadata":' + b"[" * 900 + b"]" * 900 + b"}",
        json.dumps(CHAT).encode()[:-1] + b',"seed":' + b"9" * 10_000 + b"}",
        json.dumps(CHAT).encode()[:-1] + b',"temperature":1e400}',
        json.dumps(CHAT).encode()[:-1] + b',"temperature":NaN}',
        json.dumps(CHAT).encode()[:-1] + b',"model":"still"}',
        json.dumps(CHAT).encode().replace(b"hi", b"\xed\xa0\xbd"),
        json.dumps(CHAT).encode().replace(b"hi", b"\xff"),
        json.dumps(CHAT).encode("utf-16"),
        json.dumps(CHAT).encode("utf-32"),
    ],
    ids=lambda body: ascii(body[:24]),
)  # fmt: skip
@pytest.mark.parametrize("path", [*PATHS, "adapters"])
def test_a_body_that_is_not_a_plain_json_object_is_a_400(server: Server, path: str, body: bytes) -> None:
    answer = server.post(path, body)
    assert answer.status_code == 400
    refused(answer)


@pytest.mark.parametrize("path", [*PATHS, "adapters"])
def test_a_body_that_is_too_large_is_a_413(server: Server, path: str) -> None:
    for body in (b"x" * (BODY_BYTES + 1), json.dumps({"model": "x" * 5_000_000}).encode()):
        answer = server.post(path, body)
        assert answer.status_code == 413
        assert "max_body_bytes" in refused(answer)
    assert server.post(path, b" " * BODY_BYTES).status_code == 400


def test_a_text_as_long_as_a_body_may_be_is_refused(server: Server) -> None:
    refused(server.post("completions", {**TEXT, "prompt": "x" * (BODY_BYTES - 100)}), "prompt")


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Yield the paths of all values in a body."""
    if path:
        yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in inside:
        yield from places(inner, (*path, key))


def put(body: dict[str, Any], path: Sequence[str | int], value: Any) -> dict[str, Any]:
    """Return a copy of a body in which another value is at a path."""
    found = json.loads(json.dumps(body))
    inside: Any = found
    for part in path[:-1]:
        inside = inside[part]
    inside[path[-1]] = value
    return dict(found)


@pytest.mark.parametrize("path", FULL_BODIES)
def test_any_value_at_any_path_is_answered_or_refused(server: Server, path: str) -> None:
    body = FULL_BODIES[path]
    served = {200, 201}
    bodies = [put(body, place, value) for place in places(body) for value in ODD]
    with ThreadPoolExecutor(8) as pool:
        for answer in pool.map(lambda one: server.post(path, one), bodies):
            if answer.status_code not in served:
                refused(answer)
    for key in ("\0", "x" * 1000, HALF, "messages[0]", "__class__"):
        refused(server.post(path, {**body, key: 1}))


@pytest.mark.parametrize(
    "name",
    [
        "%00", "%ff", "%ed%a0%bd", "%f0%9f%98%80", "%", "%zz", "%2e%2e%2f", "..%2f..", "a%2fb", "%0a",
        "%0d%0aX:1", "still%00", "still@%ff", "@", "@r", "still@r99999", "a" * 10_000, "a@" * 1000, "{name}",
        "%25", "still%0a",
    ],
)  # fmt: skip
def test_names_in_paths_are_found_or_not(server: Server, name: str) -> None:
    paths = [f"/v1/models/{name}", f"/v1/adapters/{name}", f"/v1/adapters/{name}/promote"]
    paths += [f"/v1/adapters/{name}/rollback", f"/{name}", f"/v1/{name}"]
    for path in paths:
        for method in ("GET", "POST", "DELETE"):
            status, body = server.raw(f"{method} {path} HTTP/1.1".encode())
            assert status < 500, (method, path, body)


def test_every_method_on_every_path_is_answered(server: Server) -> None:
    methods = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND", "M-SEARCH")
    for path in [
        *description()["paths"],
        "/",
        "/openapi.json",
        "/docs",
        "/v1",
        "//",
        "/v1/adapters/",
        "*",
        "/-/x",
    ]:
        for method in methods:
            status, body = server.raw(f"{method} {path.replace('{name}', 'nobody')} HTTP/1.1".encode())
            assert status < 500, (method, path, body)


@pytest.mark.parametrize(
    "value", [b"\xff", b"\xed\xa0\xbd", b"", b"a" * 20_000, "\N{GRINNING FACE}".encode()]
)
def test_headers_may_have_any_bytes(server: Server, value: bytes) -> None:
    names = [
        "x-request-id", "traceparent",
        "serve_multiplexed_model_id", "authorization", "content-type", "content-encoding",
        "accept", "cookie", "user-agent", "x-forwarded-for", "x-forwarded-proto", "forwarded", "origin",
        "upgrade", "te", "range", "if-none-match", "accept-encoding", "openai-organization", "tracestate",
    ]  # fmt: skip
    content = json.dumps(TEXT).encode()
    for name in names:
        length = f"Content-Length: {len(content)}".encode()
        lines = [b"POST /v1/completions HTTP/1.1", length, name.encode() + b": " + value]
        status, body = server.raw(*lines, body=content, key=name != "authorization")
        assert status < 500, (name, body)
        if status >= 400:
            assert json.loads(body)["error"]["type"] == "invalid_request_error", (name, body)


@pytest.mark.parametrize(
    ("lines", "body"),
    [
        ([b"POST /v1/completions HTTP/1.1", b"Content-Length: 5"], json.dumps(TEXT).encode()),
        ([b"POST /v1/completions HTTP/1.1", b"Content-Length: 500"], json.dumps(TEXT).encode()),
        ([b"POST /v1/completions HTTP/1.1", b"Content-Length: -5"], b"{}"),
        ([b"POST /v1/completions HTTP/1.1", b"Content-Length: many"], b"{}"),
        ([b"POST /v1/completions HTTP/1.1", b"Content-Length: 1", b"Content-Length: 2"], b"{}"),
        ([b"POST /v1/completions HTTP/1.1", b"Transfer-Encoding: chunked"], b"zz\r\n{}\r\n0\r\n\r\n"),
        ([b"POST /v1/completions HTTP/1.1", b"Transfer-Encoding: chunked"], b"ffffffffffffffff1\r\n{}"),
        ([b"POST /v1/completions HTTP/1.1", b"Transfer-Encoding: chunked"], b"2\r\n{}\r\n0\r\n\r\n"),
        ([b"POST /v1/completions HTTP/1.1", b"Transfer-Encoding: rot13"], b"{}"),
        ([b"POST /v1/completions HTTP/1.1", b"Expect: 100-continue", b"Content-Length: 2"], b"{}"),
        ([b"POST /v1/completions?a=%00&b=%ff HTTP/1.1", b"Content-Length: 2"], b"{}"),
        ([b"GET /v1/models HTTP/1.1", b"no colon"], b""),
        ([b"GET /v1/models HTTP/1.1", b": no name"], b""),
        ([b"GET /v1/models HTTP/9.9"], b""),
        ([b"GET /v1/models"], b""),
        ([b"GET /v1/models/\xff HTTP/1.1"], b""),
        ([b"GET http://elsewhere/v1/models HTTP/1.1"], b""),
        ([b"G\xffT /v1/models HTTP/1.1"], b""),
        ([b"GET /v1/models HTTP/1.1", b"Upgrade: websocket", b"Sec-WebSocket-Key: AA=="], b""),
        ([b"GET /v1/adapters/ HTTP/1.1", b"Host: \xff[::"], b""),
        ([b"GET /v1/models/" + b"a" * 100_000 + b" HTTP/1.1"], b""),
        ([b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"], b""),
    ],
    ids=lambda value: ascii(value[-1][:40]) if isinstance(value, list) else "",
)
def test_malformed_http_is_answered_or_refused(server: Server, lines: list[bytes], body: bytes) -> None:
    try:
        status, answer = server.raw(*lines, body=body, seconds=2)
    except TimeoutError:
        # The server was waiting for the rest of the request.
        return
    assert status < 500, answer


def test_an_error_that_quotes_invalid_unicode_does_not_end_the_replica(server: Server) -> None:
    # Without the checks of the ingress, as another caller of the deployment could do.
    handle: Any = ray_serve.get_deployment_handle("Replica", APPLICATION)
    request = CompletionRequest.model_construct(model=HALF, prompt="a", max_tokens=1)
    with pytest.raises(UnknownModelError, match=r"\\ud83d") as caught:
        list(handle.options(stream=True).generate.remote(request, 0.5))
    json.dumps(describe_error(caught.value)[1], ensure_ascii=False).encode()
    assert cloudpickle.dumps(caught.value)


def cast(dtype: torch.dtype) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / WEIGHTS_FILE
        save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)

    return spoil


def relabelled(dtype: str, bits: int) -> Callable[[Path], None]:
    """Claim another dtype in the header of a weights file."""

    def spoil(folder: Path) -> None:
        path = folder / WEIGHTS_FILE
        data = path.read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        header, offset = json.loads(data[8 : 8 + size]), 0
        for name, entry in header.items():
            if name != "__metadata__":
                end = offset + math.prod(entry["shape"]) * bits // 8
                entry.update(dtype=dtype, data_offsets=[offset, end])
                offset = end
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(offset))

    return spoil


def rewritten(name: str, data: bytes) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return spoil


def configured(**changes: Any) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / CONFIG_FILE
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        cast(torch.float8_e4m3fn),
        relabelled("F4", 4),
        relabelled("F6_E2M3", 6),
        relabelled("NEW", 32),
        rewritten(WEIGHTS_FILE, b""),
        rewritten(WEIGHTS_FILE, b"\xff" * 100),
        rewritten(CONFIG_FILE, b"[" * 100_000),
        rewritten(CONFIG_FILE, b"\xff"),
        rewritten(CONFIG_FILE, b'{"r":' + b"9" * 5000 + b"}"),
        rewritten(META_FILE, b"[" * 100_000),
        rewritten(META_FILE, b"\xff"),
        configured(peft_type=HALF),
        configured(init_lora_weights=HALF),
        configured(lora_alpha="8"),
        configured(lora_alpha=[8]),
        configured(alpha_pattern={"(": 3}),
        configured(alpha_pattern=["a"]),
        configured(modules_to_save=5),
    ],
)
def test_an_unreadable_adapter_is_a_400_with_the_reason(
    server: Server, spoil: Callable[[Path], None], request: pytest.FixtureRequest
) -> None:
    # Each has its own folder: Ray Serve's processes may still map the files of the previous one.
    name = re.sub(r"\W", "-", request.node.name)
    folder = Path(server.base.save(name, server.base.adapter("spoilt")))
    spoil(folder)
    answer = server.post("adapters", {"name": "spoilt", "source": str(folder)})
    assert answer.status_code == 400
    assert str(folder) in refused(answer, "source")
    assert server.send("GET", "/v1/adapters/spoilt").status_code == 404


@pytest.mark.parametrize(
    "source", ["~nobody-of-that-name/a", "/a\0b", "models:/a\0", "x" * 4000, "/" + "x" * 4000]
)
def test_invalid_sources_are_refused(server: Server, source: str) -> None:
    refused(server.post("adapters", {"name": "a", "source": source}), "source")


def test_a_link_to_itself_is_refused(server: Server) -> None:
    loop = server.base.root / "loop"
    loop.symlink_to(loop)
    refused(server.post("adapters", {"name": "a", "source": str(loop)}), "source")


@pytest.mark.parametrize("model", ["base@1", "base@r2", "still", "nobody"])
def test_a_users_key_is_told_no_names_of_others(server: Server, model: str) -> None:
    key = f"Bearer {USER_KEY}"
    answers = [
        server.send("GET", f"/v1/models/{model}", Authorization=key),
        server.send(
            "POST", "/v1/completions", json.dumps({**TEXT, "model": model}).encode(), Authorization=key
        ),
    ]
    for answer in answers:
        assert (answer.status_code, refused(answer)) == (
            404,
            f"no model '{model}' is served here; see /v1/models",
        )
