from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import httpx
import pytest

from rayft.errors import ResourceError
from rayft.serving.http.server import HttpServer


async def application(scope: Any, receive: Any, send: Any) -> None:
    if scope["path"] == "/slow":
        await asyncio.sleep(0.5)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_server_that_stops_first_answers_what_it_has_received(port: int) -> None:
    async def scenario() -> None:
        server = await HttpServer.start(application, "127.0.0.1", port, 5)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            asked = asyncio.create_task(client.get("/slow"))
            await asyncio.sleep(0.2)
            await server.stop()
            assert (await asked).text == "hello"
            with pytest.raises(httpx.ConnectError):
                await client.get("/")
        with pytest.raises(ResourceError, match="has ended"):
            server.check()

    asyncio.run(scenario())


def test_the_system_ends_connections_of_clients_that_have_vanished(port: int) -> None:
    async def scenario() -> None:
        server = await HttpServer.start(application, "127.0.0.1", port, 5)
        _, client = await asyncio.open_connection("127.0.0.1", port)
        while not (connections := server._server.server_state.connections):
            await asyncio.sleep(0.01)
        (connection,) = connections
        own: Any = connection
        accepted = own.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        client.close()
        await server.stop()

    asyncio.run(scenario())


def test_it_takes_over_the_address_of_a_server_that_is_being_replaced(port: int) -> None:
    async def scenario() -> None:
        old = await HttpServer.start(application, "127.0.0.1", port, 5)
        starting = asyncio.create_task(HttpServer.start(application, "127.0.0.1", port, 5))
        await asyncio.sleep(0.1)
        assert not starting.done()
        await old.stop()
        new = await starting
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"http://127.0.0.1:{port}/")).text == "hello"
        await new.stop()

    asyncio.run(scenario())


def test_an_address_that_stays_in_use_is_named_with_what_to_do(port: int) -> None:
    async def scenario() -> None:
        old = await HttpServer.start(application, "127.0.0.1", port, 5)
        with pytest.raises(
            ResourceError, match=rf"127.0.0.1:{port} .*another port.*proxy_location: Disabled"
        ):
            await HttpServer.start(application, "127.0.0.1", port, 0.3)
        await old.stop()

    asyncio.run(scenario())


def test_an_address_of_another_machine_is_refused_at_once(port: int) -> None:
    with pytest.raises(ResourceError, match=f"can't listen on 192.0.2.1:{port}"):
        asyncio.run(HttpServer.start(application, "192.0.2.1", port, 60))


@pytest.mark.parametrize(
    ("head", "endless"),
    [
        (b"GET /", b"a"),
        (b"GET / HTTP/1.1\r\na: ", b"a"),
        (b"GET / HTTP/1.1\r\n", b"a: b\r\n"),
        (b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2;", b"a"),
        (b"GET /slow HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n", b"a: b\r\n"),
    ],
)
def test_headers_without_an_end_are_refused(port: int, head: bytes, endless: bytes) -> None:
    async def scenario() -> None:
        server = await HttpServer.start(application, "127.0.0.1", port, 5)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(head)
        with suppress(ConnectionError):
            for _ in range(100):
                writer.write(endless * (2**16 // len(endless)))
                await writer.drain()
        with suppress(ConnectionError):
            await asyncio.wait_for(reader.read(), 5)
        assert not server._server.server_state.connections
        writer.close()
        await server.stop()

    asyncio.run(scenario())


def test_a_request_learns_that_the_client_has_left_while_others_wait_for_it(port: int) -> None:
    seen: list[str] = []

    async def waits(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["path"])
        while (message := await receive())["type"] != "http.disconnect":
            pass
        seen.append(message["type"])

    async def scenario() -> None:
        server = await HttpServer.start(waits, "127.0.0.1", port, 5)
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"".join(b"GET /%d HTTP/1.1\r\n\r\n" % number for number in range(3)))
        while not seen:
            await asyncio.sleep(0.01)
        writer.close()
        await asyncio.wait_for(_until(lambda: len(seen) > 1), 5)
        await asyncio.sleep(0.1)
        assert seen == ["/0", "http.disconnect"]
        await server.stop()

    asyncio.run(scenario())


async def _until(ready: Callable[[], bool]) -> None:
    while not ready():
        await asyncio.sleep(0.01)


def test_a_body_may_be_larger_than_headers(port: int) -> None:
    async def received(scope: Any, receive: Any, send: Any) -> None:
        more, size = True, 0
        while more:
            message = await receive()
            more, size = message["more_body"], size + len(message["body"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": str(size).encode()})

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b"a" * 10_000

    async def scenario() -> None:
        server = await HttpServer.start(received, "127.0.0.1", port, 5)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            for content in (b"a" * 400_000, parts()):
                assert (await client.post("/", content=content)).text == "400000"
            assert (await client.get("/", headers={"a": "b" * 20_000})).text == "0"
        await server.stop()

    asyncio.run(scenario())
