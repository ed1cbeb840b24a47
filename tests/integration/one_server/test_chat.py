"""`rayft chat --url` gets the answers that the server gives to anyone else."""

from __future__ import annotations

import asyncio

import pytest

from rayft.errors import ResourceError
from rayft.flow.chat.models import ChatModel, Options, open_served
from tests.integration.one_server.server import USER_KEY, Server
from tests.integration.serving import HEADERS

pytestmark = pytest.mark.ray

TOKENS = 150
QUESTION = [{"role": "user", "content": "abcdef"}]


def answer(model: ChatModel, tokens: int = TOKENS) -> tuple[str, int]:
    """Return the whole answer, and in how many parts it came."""

    async def collect() -> list[str]:
        return [part.content async for part in model.answer(QUESTION, Options(0.0, tokens)) if part.content]

    parts = asyncio.run(collect())
    return "".join(parts), len(parts)


@pytest.fixture
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYFT_KEY", HEADERS["Authorization"].removeprefix("Bearer "))


@pytest.mark.usefixtures("_key")
def test_answers_are_streamed(one_server: Server) -> None:
    names = ["base", "large", "squeezed@r2"]
    found = [answer(model) for model in open_served(f"{one_server.url}/", names)]
    for name, (text, _) in zip(names, found, strict=True):
        body = {"model": name, "messages": QUESTION, "max_tokens": TOKENS, "temperature": 0}
        whole = one_server.call("POST", "/v1/chat/completions", json=body).json()
        assert text == whole["choices"][0]["message"]["content"]
    # The server sends what it generates within 20 ms as one part.
    assert max(parts for _, parts in found) > 1
    assert len({text for text, _ in found}) == 3


@pytest.mark.usefixtures("_key")
def test_a_refusal_is_passed_on(one_server: Server) -> None:
    unknown, base = open_served(one_server.url, ["unknown", "base"])
    with pytest.raises(ResourceError, match=r"the server refuses \(404\): .*unknown"):
        answer(unknown)
    with pytest.raises(ResourceError, match=r"the server refuses \(400\): .*max_tokens"):
        answer(base, tokens=10**6)


def test_a_key_is_needed(one_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYFT_KEY", raising=False)
    with pytest.raises(ResourceError, match=r"\(401\).*put a key of this server into RAYFT_KEY"):
        open_served(one_server.url, ["base"])
    monkeypatch.setenv("RAYFT_KEY", USER_KEY)
    (large,) = open_served(one_server.url, ["large"])
    with pytest.raises(ResourceError, match=r"the server refuses \(40\d\)"):
        answer(large)
