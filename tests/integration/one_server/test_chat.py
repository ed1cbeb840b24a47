"""`rayft chat --url` gets the answers that the server gives to anyone else."""

from __future__ import annotations

import asyncio

import pytest

import rayft
from rayft.errors import ModelError, ResourceError
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
    with pytest.raises(ModelError, match="does not serve 'larg@r2'; did you mean 'large'"):
        open_served(one_server.url, ["base", "larg@r2"])
    large, base = open_served(f"{one_server.url}/v1", ["large@r2", "base"])
    with pytest.raises(ResourceError, match=r"the server refuses \(404\): .*large"):
        answer(large)
    with pytest.raises(ResourceError, match=r"the server refuses \(400\): .*max_tokens"):
        answer(base, tokens=10**6)


@pytest.mark.usefixtures("_key")
def test_a_program_talks_to_the_server(one_server: Server) -> None:
    large, base = (answer(model)[0] for model in open_served(one_server.url, ["large", "base"]))
    with rayft.chat("large", "base", url=one_server.url, temperature=0, max_tokens=TOKENS) as chat:
        assert chat.answers(QUESTION[0]["content"]) == (large, base)


def test_a_key_is_needed(one_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYFT_KEY", raising=False)
    with pytest.raises(ResourceError, match=r"\(401\).*put a key of this server into RAYFT_KEY"):
        open_served(one_server.url, ["base"])
    monkeypatch.setenv("RAYFT_KEY", USER_KEY)
    # A server lists only what the key may ask.
    with pytest.raises(ModelError, match="does not serve 'large'; valid are base, squeezed"):
        open_served(one_server.url, ["large"])
    assert answer(open_served(one_server.url, ["squeezed"])[0])[0]
