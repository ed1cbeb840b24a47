"""Carries the parts of answers from the replicas to the ingress.

Ray Serve passes each part of a stream as an object of its own, which costs both processes more time than the
part itself. Here each replica has one connection to the ingress for all its answers, and parts that arise at
the same time travel together. The request travels by Ray Serve, which chooses the replica.

On a connection, a replica sends the ingress's token first, and then lines of JSON: lists of parts, each with
the number of its answer. An answer that ends with an error ends with a line of its own, which says what the
client is told. The ingress sends back the numbers of answers that nobody waits for any more, one in a line;
the replica then stops generating them.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import secrets
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import ray
from pydantic import TypeAdapter

from rayft.errors import RayftError, RequestError, ResourceError
from rayft.serving.http.errors import LOST, describe_error
from rayft.serving.messages import Delta

__all__ = ["Inbox", "Incoming", "Outbox", "Ticket"]

logger = logging.getLogger("ray.serve")

LONGEST_LINE = 2**30
"""Most bytes of a line; the log-probabilities of a long prompt take megabytes."""

HANDSHAKE_SECONDS = 10
"""Time that a new connection has to send the token."""

CONNECT_SECONDS = 5
"""Time that a replica tries to reach the ingress; a firewall may drop packets without an answer."""

GATHERED_SECONDS = 0.001
"""Time in which the parts that arise travel together: one line for each costs both processes more."""

PARTS: TypeAdapter[list[tuple[int, Delta | None]]] = TypeAdapter(list[tuple[int, Delta | None]])
"""A line: numbers of answers, each with a part, or None after the last part."""

FAILED = b"!"
"""Begins a line about an error: the answer's number, then the status, message, param and code of the error.

Not the error itself: the ingress may be unable to unpickle it, or would import torch or vLLM for it."""

KEPT = {
    "SO_KEEPALIVE": 1,
    "TCP_KEEPIDLE": 10,
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 3,
    "TCP_USER_TIMEOUT": 25_000,
}
"""Options by which a connection to a node that has lost its power ends after 25 seconds."""


@dataclass(frozen=True)
class Ticket:
    """Where the parts of one answer are to be sent."""

    host: str
    port: int
    token: str
    number: int


class Inbox:
    """Receives the parts of answers; the ingress has one."""

    _server: asyncio.Server
    _port: int

    def __init__(self, host: str) -> None:
        self._host, self._token = host, secrets.token_hex(16)
        self._waiting: dict[int, Incoming] = {}
        self._connections = set[asyncio.StreamWriter]()
        self._numbers = count()

    @classmethod
    async def open(cls, host: str | None = None) -> Inbox:
        """Listen at a free port of this node's address.

        Args:
            host: another address to listen on.
        """
        inbox = cls(host or ray.util.get_node_ip_address())
        inbox._server = await asyncio.start_server(inbox._connected, inbox._host, 0, limit=LONGEST_LINE)
        inbox._port = int(inbox._server.sockets[0].getsockname()[1])
        return inbox

    def __len__(self) -> int:
        """Return the number of answers that have not ended."""
        return len(self._waiting)

    def expect(self) -> Incoming:
        """Prepare to receive one answer."""
        ticket = Ticket(self._host, self._port, self._token, next(self._numbers))
        self._waiting[ticket.number] = Incoming(ticket, self._waiting, self._connections)
        return self._waiting[ticket.number]

    def close(self) -> None:
        """Stop listening."""
        self._server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection; the answers that it carries fail if it ends."""
        _watch(writer)
        try:
            await self._receive(reader, writer)
        except (OSError, EOFError, ValueError):
            # Not a replica, or one that was lost; a time limit is an OSError too.
            pass
        finally:
            self._connections.discard(writer)
            for one in [one for one in self._waiting.values() if one.writer is writer]:
                one.fail(ResourceError(LOST))
            writer.close()

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Receive what one replica sends, until it closes the connection."""
        async with asyncio.timeout(HANDSHAKE_SECONDS):
            first = await reader.readexactly(len(self._token) + 1)
        if not hmac.compare_digest(first, f"{self._token}\n".encode()):
            return
        self._connections.add(writer)
        while line := await reader.readline():
            if line.startswith(FAILED):
                number, *error = json.loads(line.removeprefix(FAILED))
                if number in self._waiting:
                    self._waiting[number].fail(_described(*error))
                continue
            for number, delta in PARTS.validate_json(line):
                if number in self._waiting:
                    self._waiting[number].take(delta, writer)
                elif delta is not None:
                    writer.write(b"%d\n" % number)


def _watch(writer: asyncio.StreamWriter) -> None:
    """Let a connection end if the other node does not answer."""
    own = writer.get_extra_info("socket")
    for name, value in KEPT.items():
        # Some are Linux's only.
        if hasattr(socket, name):
            own.setsockopt(
                socket.SOL_SOCKET if name.startswith("SO_") else socket.IPPROTO_TCP,
                getattr(socket, name),
                value,
            )


class Incoming:
    """One answer that is being received: an iterator of its parts, which has to be closed."""

    def __init__(
        self,
        ticket: Ticket,
        waiting: dict[int, Incoming],
        connections: Collection[asyncio.StreamWriter] = (),
    ) -> None:
        self.ticket = ticket
        self.writer: asyncio.StreamWriter | None = None
        """The connection to the replica, once a part has come."""
        self._waiting, self._connections = waiting, connections
        self._parts: asyncio.Queue[Delta | Exception | None] = asyncio.Queue()

    def take(self, delta: Delta | None, writer: asyncio.StreamWriter | None = None) -> None:
        """Add a part that was received on a connection, or None after the last one."""
        self.writer = writer
        self._parts.put_nowait(delta)
        if delta is None:
            self._waiting.pop(self.ticket.number, None)

    def fail(self, error: Exception) -> None:
        """Let the iteration end with an error, after the parts that were received."""
        self._parts.put_nowait(error)
        self._waiting.pop(self.ticket.number, None)

    def __aiter__(self) -> AsyncIterator[Delta]:
        return self

    async def __anext__(self) -> Delta:
        """Return the next part.

        Raises:
            ResourceError: if the replica was lost.
            Exception: what `fail` was called with.
        """
        part = await self._parts.get()
        if isinstance(part, Delta):
            return part
        if part is None:
            raise StopAsyncIteration
        # Several answers may end with the same error; each would lengthen its traceback.
        raise part.with_traceback(None)

    def close(self) -> None:
        """Stop waiting for the answer; the replica stops generating it."""
        if self._waiting.pop(self.ticket.number, None):
            # Before its first part, any replica may have it; the others ignore the number.
            for writer in self._connections if self.writer is None else (self.writer,):
                writer.write(b"%d\n" % self.ticket.number)


@dataclass
class _Line:
    """A replica's connection to an ingress."""

    writer: asyncio.StreamWriter
    reading: asyncio.Task[None] | None = None
    tasks: dict[int, asyncio.Task[Any]] = field(default_factory=dict)
    """Number of an answer → the task that generates it."""
    parts: list[tuple[int, Delta | None]] = field(default_factory=list)
    """What the next line will contain."""

    def put(self, number: int, delta: Delta | None) -> None:
        if not self.parts:
            asyncio.get_running_loop().call_later(GATHERED_SECONDS, self._flush)
        self.parts.append((number, delta))

    def fail(self, number: int, error: Exception) -> None:
        self._flush()
        status, body = describe_error(error)
        error_body = body["error"]
        line = [number, status, error_body["message"], error_body["param"], error_body["code"]]
        self.writer.write(FAILED + json.dumps(line).encode() + b"\n")

    def _flush(self) -> None:
        if self.parts:
            parts, self.parts = self.parts, []
            self.writer.write(PARTS.dump_json(parts) + b"\n")


def _described(status: int, message: str, param: str | None, code: str) -> RequestError:
    """Return an error that is answered like the one of the replica."""
    error = RequestError(message, param=param)
    error.status, error.code = status, code
    return error


class Outbox:
    """Sends the parts of answers; each replica has one."""

    def __init__(self) -> None:
        self._lines: dict[tuple[str, int, str], _Line] = {}
        self._connecting = asyncio.Lock()

    async def send(self, ticket: Ticket, deltas: AsyncGenerator[Delta, None]) -> None:
        """Send the parts of an answer as they come, and the error if it ends with one.

        Args:
            ticket: where to.
            deltas: the parts; closed in any case.

        Raises:
            ResourceError: if the ingress can't be reached.
            asyncio.CancelledError: if nobody waits for the answer any more, or the ingress was lost.
        """
        async with aclosing(deltas):
            line, task = await self._line(ticket), asyncio.current_task()
            assert task is not None
            line.tasks[ticket.number] = task
            try:
                async for delta in deltas:
                    line.put(ticket.number, delta)
                line.put(ticket.number, None)
            except Exception as error:
                if not isinstance(error, RayftError):
                    logger.exception("an answer ended with an error")
                line.fail(ticket.number, error)
            finally:
                line.tasks.pop(ticket.number, None)

    async def _line(self, ticket: Ticket) -> _Line:
        key = (ticket.host, ticket.port, ticket.token)
        if key in self._lines:
            return self._lines[key]
        async with self._connecting:
            if key not in self._lines:
                try:
                    async with asyncio.timeout(CONNECT_SECONDS):
                        reader, writer = await asyncio.open_connection(ticket.host, ticket.port)
                except OSError as error:
                    why = str(error) or f"no answer within {CONNECT_SECONDS} s"
                    raise ResourceError(
                        f"the replica can't send its answer to {ticket.host}:{ticket.port} ({why}); allow "
                        "connections between the cluster's nodes at all ports"
                    ) from error
                _watch(writer)
                writer.write(f"{ticket.token}\n".encode())
                line = self._lines[key] = _Line(writer)
                line.reading = asyncio.create_task(self._read(key, line, reader))
        return self._lines[key]

    async def _read(self, key: tuple[str, int, str], line: _Line, reader: asyncio.StreamReader) -> None:
        """End the answers that the ingress no longer waits for, and all if it is lost."""
        with suppress(OSError):
            while number := await reader.readline():
                # Once: a second time would interrupt what the first one ends.
                if task := line.tasks.pop(int(number), None):
                    task.cancel()
        del self._lines[key]
        for task in line.tasks.values():
            task.cancel()
        line.writer.close()
