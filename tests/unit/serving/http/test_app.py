"""The application without Ray Serve: what is checked in which order, and how it describes itself."""

from __future__ import annotations

import asyncio
import gzip
import json
import subprocess
import sys
from contextlib import suppress
from typing import Any

import pytest
from fastapi import Request, Response
from fastapi.testclient import TestClient

from rayft.serving.http.app import _until_left
from rayft.serving.http.body import LARGE, read_json
from tests.unit.serving.http.recording import ADMIN, USER, RecordingGateway

TEXT: dict[str, Any] = {"model": "base", "prompt": "hi"}
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/adapters")


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("path", PATHS)
def test_the_body_is_not_read_before_the_caller_is_known(guarded: TestClient, path: str) -> None:
    for headers in ({}, bearer("another-key-of-nobody")):
        answer = guarded.post(path, content=b"{", headers=headers)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert guarded.post(path, content=b"x" * 101, headers=headers).status_code == 401


def test_a_users_key_is_refused_before_the_body_of_an_admins_request_is_read(guarded: TestClient) -> None:
    for content in (b"{", b"x" * 101, b'{"name": 3}'):
        answer = guarded.post("/v1/adapters", content=content, headers=bearer(USER))
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "insufficient_permissions"
    assert guarded.post("/v1/adapters", content=b"{", headers=bearer(ADMIN)).status_code == 400


@pytest.mark.parametrize("path", PATHS)
def test_a_body_has_a_largest_size(guarded: TestClient, path: str) -> None:
    answer = guarded.post(path, content=b" " * 101, headers=bearer(ADMIN))
    assert answer.status_code == 413
    assert "more than the 100 bytes" in answer.json()["error"]["message"]
    assert guarded.post(path, content=b" " * 100, headers=bearer(ADMIN)).status_code == 400


@pytest.mark.parametrize(
    "kind", [None, "application/json", "application/x-www-form-urlencoded", "text/plain", "a", b"\xff"]
)
def test_a_body_is_json_whatever_its_content_type(
    client: TestClient, gateway: RecordingGateway, kind: Any
) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    answer = client.post("/v1/completions", content=json.dumps(TEXT), headers=headers)
    assert answer.status_code == 200
    assert gateway.requests[-1].prompt == "hi"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("coding", ["gzip", "zstd, br"])
def test_a_compressed_body_is_refused_by_its_coding(client: TestClient, path: str, coding: str) -> None:
    answer = client.post(path, content=gzip.compress(b"{}"), headers={"Content-Encoding": coding})
    assert answer.status_code == 400
    assert f"is compressed (Content-Encoding: '{coding}')" in answer.json()["error"]["message"]
    plain = client.post("/v1/completions", json=TEXT, headers={"Content-Encoding": "Identity"})
    assert plain.status_code == 200


def test_an_answer_is_whole_or_a_stream(client: TestClient) -> None:
    whole = client.post("/v1/completions", json=TEXT).json()
    assert whole["choices"] == [{"index": 0, "text": "hi", "logprobs": None, "finish_reason": "stop"}]
    assert whole["usage"] == {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    streamed = client.post("/v1/completions", json={**TEXT, "stream": True})
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert streamed.text.endswith("data: [DONE]\n\n")


def test_an_adapter_below_no_root_is_refused(guarded: TestClient) -> None:
    body = {"name": "a", "source": "/elsewhere/a"}
    answer = guarded.post("/v1/adapters", json=body, headers=bearer(ADMIN))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "source")


def test_the_methods_of_a_path_are_named(client: TestClient) -> None:
    answer = client.put("/v1/adapters")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, POST")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/adapters"])
def test_a_large_body_is_parsed_beside_the_event_loop(
    client: TestClient, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loops: list[bool] = []

    def read(text: bytes) -> dict[str, Any]:
        with suppress(RuntimeError):
            loops.append(asyncio.get_running_loop() is not None)
        return read_json(text)

    monkeypatch.setattr("rayft.serving.http.body.read_json", read)
    assert client.post(path, content=b'{"a": 1}').status_code == 400
    assert loops == [True]
    assert client.post(path, content=b'{"a": [' + b"[]," * (LARGE // 3) + b"[]]}").status_code == 400
    assert loops == [True]


def test_the_description_has_every_status_key_and_body(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    statuses = {"400", "401", "403", "404", "405", "413", "429", "503", "504"}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            good = "201" if (path, method) == ("/v1/adapters", "post") else "200"
            assert set(operation["responses"]) == {good, *statuses}, (path, method)
            assert ("security" in operation) == path.startswith("/v1"), (path, method)
            assert ("requestBody" in operation) == (method == "post" and path in PATHS), (path, method)
            for status in statuses - ({"503"} if path == "/readyz" else set()):
                schema = operation["responses"][status]["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorAnswer"}
    streams = document["paths"]["/v1/completions"]["post"]["responses"]["200"]["content"]
    assert set(streams) == {"application/json", "text/event-stream"}
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_the_application_needs_no_torch() -> None:
    # Without it the process of the ingress takes 0.3 GB less and starts some seconds earlier.
    code = "import sys, rayft.serving.http.app; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_client_that_leaves_when_its_answer_is_ready_does_not_interrupt_the_response() -> None:
    async def scenario() -> None:
        ready, whole = asyncio.Event(), Response()

        async def receive() -> dict[str, str]:
            await ready.wait()
            return {"type": "http.disconnect"}

        async def answer() -> Response:
            # Waits after `receive` does, so that it also ends after it, in the same turn.
            await asyncio.sleep(0.01)
            await ready.wait()
            return whole

        asyncio.get_running_loop().call_later(0.05, ready.set)
        assert await _until_left(Request({"type": "http"}, receive), answer()) is whole
        await asyncio.sleep(0.01)

    asyncio.run(scenario())


@pytest.mark.parametrize("path", PATHS)
def test_a_client_that_leaves_while_it_sends_its_body_is_no_error(client: TestClient, path: str) -> None:
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}
    asyncio.run(client.app(scope, receive, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == 499
