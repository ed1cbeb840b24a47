"""Answers over real connections between an inbox and outboxes of one process."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from rayft import errors
from rayft.errors import BadRequestError, RayftError, RequestError, ResourceError
from rayft.serving import answers as module
from rayft.serving.answers import PARTS, Inbox, Incoming, Outbox, Ticket
from rayft.serving.http.errors import describe_error
from rayft.serving.messages import Delta, TokenScore


def run(scenario: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(20):
            await scenario

    asyncio.run(limited())


@asynccontextmanager
async def opened() -> AsyncIterator[tuple[Inbox, Outbox]]:
    inbox = await Inbox.open("127.0.0.1")
    yield inbox, Outbox()
    inbox.close()


class Source:
    """Parts of an answer that is generated; counts what was taken, and knows whether it was closed."""

    def __init__(self, *parts: Delta, endless: bool = False) -> None:
        self.parts, self.endless = parts, endless
        self.closed = asyncio.Event()

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        try:
            for part in self.parts:
                yield part
                await asyncio.sleep(0)
            while self.endless:
                await asyncio.sleep(3600)
        finally:
            self.closed.set()


def part(text: str, index: int = 0, **more: Any) -> Delta:
    return Delta(text, 3, len(text), index=index, **more)


async def received(incoming: Incoming) -> list[Delta]:
    return [delta async for delta in incoming]


def test_every_part_arrives_unchanged_and_in_order() -> None:
    scores = (
        TokenScore("a", (97,), None),
        TokenScore("é", (195, 169), -math.inf, (TokenScore("b", (98,), -0.1),)),
    )
    parts = [
        part("", fingerprint="f" * 16),
        part("line\nbreak \u2028 \N{GRINNING FACE} \x00", scores=scores),
        part("x", 1, reasoning="because", finish="length"),
        part("y", finish="stop"),
    ]

    async def scenario() -> None:
        async with opened() as (inbox, outbox):
            expected = inbox.expect()
            _, found = await asyncio.gather(
                outbox.send(expected.ticket, Source(*parts).deltas()), received(expected)
            )
            assert found == parts

    run(scenario())


def test_answers_at_the_same_time_reach_those_who_wait_for_them() -> None:
    async def scenario() -> None:
        async with opened() as (inbox, outbox):
            other = Outbox()
            waiting = [inbox.expect() for _ in range(50)]
            sent = [
                (outbox if number % 2 else other).send(
                    one.ticket, Source(*(part(f"{number}.{turn}") for turn in range(20))).deltas()
                )
                for number, one in enumerate(waiting)
            ]
            *found, _ = await asyncio.gather(*map(received, waiting), asyncio.gather(*sent))
            for number, deltas in enumerate(found):
                assert [delta.text for delta in deltas] == [f"{number}.{turn}" for turn in range(20)]

    run(scenario())


@pytest.mark.parametrize("parts", [0, 1])
def test_an_answer_that_nobody_waits_for_is_no_longer_generated(parts: int) -> None:
    """Whether its first part had come before that or not."""

    async def scenario() -> None:
        async with opened() as (inbox, outbox):
            incoming, kept = inbox.expect(), inbox.expect()
            source, other = Source(part("a"), endless=True), Source(part("b"), endless=True)
            if not parts:
                incoming.close()
            sending = asyncio.create_task(outbox.send(incoming.ticket, source.deltas()))
            staying = asyncio.create_task(outbox.send(kept.ticket, other.deltas()))
            if parts:
                assert (await anext(incoming)).text == "a"
                incoming.close()
            await source.closed.wait()
            with pytest.raises(asyncio.CancelledError):
                await sending
            assert (await anext(kept)).text == "b"
            assert not other.closed.is_set()
            incoming.close()
            kept.close()
            with suppress(asyncio.CancelledError):
                await staying
            assert not inbox._waiting

    run(scenario())


def test_a_lost_replica_fails_its_answers_alone() -> None:
    async def scenario() -> None:
        async with opened() as (inbox, outbox):
            lost, kept = inbox.expect(), inbox.expect()
            sending = asyncio.create_task(outbox.send(lost.ticket, Source(part("a"), endless=True).deltas()))
            other = asyncio.create_task(Outbox().send(kept.ticket, Source(part("b"), endless=True).deltas()))
            assert (await anext(lost)).text == "a"
            assert (await anext(kept)).text == "b"
            (line,) = outbox._lines.values()
            line.writer.transport.abort()
            with pytest.raises(ResourceError, match="was lost; try again"):
                await anext(lost)
            assert not other.done()
            for task in (sending, other):
                task.cancel()

    run(scenario())


def test_a_lost_ingress_ends_what_is_generated_for_it() -> None:
    async def scenario() -> None:
        async with opened() as (inbox, outbox):
            incoming, source = inbox.expect(), Source(part("a"), endless=True)
            sending = asyncio.create_task(outbox.send(incoming.ticket, source.deltas()))
            await anext(incoming)
            assert incoming.writer is not None
            incoming.writer.transport.abort()
            await source.closed.wait()
            with pytest.raises(asyncio.CancelledError):
                await sending
            # The next answer makes a new connection.
            again = inbox.expect()
            _, found = await asyncio.gather(
                outbox.send(again.ticket, Source(part("b")).deltas()), received(again)
            )
            assert [delta.text for delta in found] == ["b"]

    run(scenario())


def test_an_answer_fails_after_the_parts_that_have_come() -> None:
    async def scenario() -> None:
        async with opened() as (inbox, _):
            incoming = inbox.expect()
            incoming.take(part("a"))
            incoming.fail(ValueError("late"))
            assert (await anext(incoming)).text == "a"
            with pytest.raises(ValueError, match="late"):
                await anext(incoming)
            assert not len(inbox)

    run(scenario())


def test_an_answer_that_has_come_whole_does_not_count_although_it_is_read_slowly() -> None:
    async def scenario() -> None:
        async with opened() as (inbox, outbox):
            whole, failed, other = inbox.expect(), inbox.expect(), inbox.expect()
            await outbox.send(whole.ticket, Source(part("a"), part("b")).deltas())
            failed.fail(ValueError("late"))
            while len(inbox) > 1:
                await asyncio.sleep(0.01)
            assert [delta.text for delta in await received(whole)] == ["a", "b"]
            other.close()
            assert not len(inbox)

    run(scenario())


def test_an_answer_that_is_left_before_its_first_part_ends_at_once() -> None:
    async def scenario() -> None:
        async with opened() as (inbox, outbox):
            left, kept = inbox.expect(), inbox.expect()
            source, other = Source(endless=True), Source(part("b"), endless=True)
            sending = asyncio.create_task(outbox.send(left.ticket, source.deltas()))
            staying = asyncio.create_task(outbox.send(kept.ticket, other.deltas()))
            assert (await anext(kept)).text == "b"
            left.close()
            await source.closed.wait()
            with pytest.raises(asyncio.CancelledError):
                await sending
            assert not other.closed.is_set()
            staying.cancel()

    run(scenario())


class Unknown(Exception):  # noqa: N818
    """An exception that can't be unpickled where its module is not installed."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("an error of the replica was unpickled",)


OURS = [
    kind
    for kind in map(errors.__dict__.get, errors.__all__)
    if isinstance(kind, type) and issubclass(kind, RayftError)
]


@pytest.mark.parametrize(
    "error",
    [
        *(kind("too long\n \ud800 é") for kind in OURS),
        BadRequestError("too long", param="prompt"),
        ValueError("inside"),
        ValueError(lambda: 0),
        TimeoutError(),
        Unknown("/a/secret/path"),
        ActorDiedError(),
        ResourceError("a" * 10_000),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_arrives_after_the_parts_before_it(error: Exception) -> None:
    """The client is told the same as by the replica's own error; other answers go on."""

    async def failing() -> AsyncGenerator[Delta, None]:
        yield part("a")
        raise error

    async def scenario() -> None:
        async with opened() as (inbox, outbox):
            failed, other = inbox.expect(), inbox.expect()
            await outbox.send(failed.ticket, failing())
            assert (await anext(failed)).text == "a"
            with pytest.raises(RequestError) as caught:
                await anext(failed)
            assert describe_error(caught.value) == describe_error(error)
            _, found = await asyncio.gather(
                outbox.send(other.ticket, Source(part("b")).deltas()), received(other)
            )
            assert [delta.text for delta in found] == ["b"]

    run(scenario())


def test_an_ingress_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONNECT_SECONDS", 0.2)

    async def scenario() -> None:
        with socket.socket() as listener, socket.socket() as first:
            listener.bind(("127.0.0.1", 0))
            listener.listen(0)
            # The system drops further packets then, as a firewall does.
            first.connect(listener.getsockname())
            ticket, source = Ticket(*listener.getsockname(), "token", 0), Source(part("a"))
            with pytest.raises(
                ResourceError, match=r"can't send its answer to .* \(no answer within 0.2 s\)"
            ):
                await Outbox().send(ticket, source.deltas())

    run(scenario())


def test_an_ingress_that_can_not_be_reached_is_named() -> None:
    async def scenario() -> None:
        async with opened() as (inbox, outbox):
            inbox.close()
            ticket, source = inbox.expect().ticket, Source(part("a"))
            with pytest.raises(ResourceError, match=rf"127.0.0.1:{ticket.port} .*allow connections"):
                await outbox.send(ticket, source.deltas())

    run(scenario())


@pytest.mark.parametrize("data", [b"", b"x" * 200, b"\n" * 40, b"[[0,null]]\n", b"\xff" * 33])
def test_a_stranger_can_send_no_parts(data: bytes) -> None:
    async def scenario() -> None:
        async with opened() as (inbox, outbox):
            incoming = inbox.expect()
            reader, writer = await asyncio.open_connection("127.0.0.1", incoming.ticket.port)
            writer.write(data)
            writer.write_eof()
            assert await reader.read() == b""
            # Nor with a wrong token.
            wrong = replace(incoming.ticket, token="0" * 32)
            with suppress(asyncio.CancelledError):
                await outbox.send(wrong, Source(part("forged"), endless=True).deltas())
            assert incoming._parts.empty()

    run(scenario())


def test_parts_that_arise_at_nearly_the_same_time_travel_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GATHERED_SECONDS", 0.2)

    async def later(send: Coroutine[Any, Any, None], rounds: int) -> None:
        for _ in range(rounds):
            await asyncio.sleep(0)
        await send

    async def scenario() -> None:
        async with opened() as (inbox, outbox):
            first = inbox.expect()
            await outbox.send(first.ticket, Source().deltas())
            (line,) = outbox._lines.values()
            await asyncio.sleep(0.4)
            lines: list[bytes] = []
            monkeypatch.setattr(line.writer, "write", lines.append)
            sends = [outbox.send(inbox.expect().ticket, Source(part("a")).deltas()) for _ in range(30)]
            await asyncio.gather(*(later(send, rounds) for rounds, send in enumerate(sends)))
            await asyncio.sleep(0.4)
            assert [len(PARTS.validate_json(one)) for one in lines] == [60]

    run(scenario())


def test_what_is_ended_is_not_interrupted_again() -> None:
    """However many of its parts are on their way when nobody waits for it any more."""
    ended: list[str] = []

    async def deltas(go: asyncio.Event) -> AsyncGenerator[Delta, None]:
        try:
            yield part("first")
            await go.wait()
            while True:
                yield part("more")
                await asyncio.sleep(0.001)
        finally:
            try:
                await asyncio.sleep(0.1)
                ended.append("whole")
            except asyncio.CancelledError:
                ended.append("interrupted")

    async def scenario() -> None:
        async with opened() as (inbox, outbox):
            incoming, go = inbox.expect(), asyncio.Event()
            sending = asyncio.create_task(outbox.send(incoming.ticket, deltas(go)))
            await anext(incoming)
            incoming.close()
            go.set()
            with pytest.raises(asyncio.CancelledError):
                await sending
            assert ended == ["whole"]

    run(scenario())


def test_a_connection_to_a_silent_node_ends() -> None:
    async def scenario() -> None:
        async with opened() as (inbox, outbox):
            incoming = inbox.expect()
            await asyncio.gather(outbox.send(incoming.ticket, Source(part("a")).deltas()), received(incoming))
            (line,) = outbox._lines.values()
            assert incoming.writer is not None
            for writer in (line.writer, incoming.writer):
                own = writer.get_extra_info("socket")
                assert own.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 25_000

    run(scenario())
