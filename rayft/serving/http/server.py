"""The HTTP server in the ingress's process."""

from __future__ import annotations

import asyncio
import errno
import socket
import time

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from rayft.errors import ResourceError

__all__ = ["HttpServer", "bound"]

RETRY_SECONDS = 0.2
"""Interval at which an address that is in use is tried again."""

WAITING = 2048
"""Most connections that wait to be accepted."""

KEEP_SECONDS = 75
"""Time for which a connection without requests is kept."""


LONGEST_HEAD = 2**16
"""Most bytes of a request's line and headers; more are accepted only if they come at once."""


class _Protocol(HttpToolsProtocol):
    """uvicorn's protocol with two additions.

    It limits the bytes that are neither a complete head nor part of a body, for which httptools has no limit.
    When a client that has sent several requests on a connection leaves, the request that is answered learns
    that; uvicorn tells only the last one.
    """

    _waiting = 0
    """Number of bytes since the last complete head or part of a body."""
    _answering: RequestResponseCycle | None = None
    """The request that is answered; others that the client has sent meanwhile wait for its end."""

    def data_received(self, data: bytes) -> None:
        self._waiting += len(data)
        super().data_received(data)
        if self._waiting > LONGEST_HEAD and not self.transport.is_closing():
            self.send_400_response(f"The headers have more than {LONGEST_HEAD} bytes.")

    def on_headers_complete(self) -> None:
        self._waiting = 0
        super().on_headers_complete()
        if not self.pipeline:
            self._answering = self.cycle

    def on_response_complete(self) -> None:
        if self.pipeline:
            self._answering, _ = self.pipeline[-1]
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self.pipeline.clear()
        if self._answering is not None:
            self._answering.disconnected = not self._answering.response_complete
            self._answering.message_event.set()
        super().connection_lost(exc)

    def on_body(self, body: bytes) -> None:
        self._waiting = 0
        super().on_body(body)


class HttpServer:
    """Serves an application at an address until it is stopped."""

    def __init__(self, server: uvicorn.Server, task: asyncio.Task[None]) -> None:
        self._server, self._task = server, task

    @classmethod
    async def start(cls, app: ASGIApp, host: str, port: int, drain_seconds: float) -> HttpServer:
        """Listen at an address.

        Args:
            app: the application.
            host: address to listen on.
            port: port to listen on.
            drain_seconds: time that running requests have when the server stops. A server that is being
                replaced may have the address that long, so an address in use is tried again for as long.

        Raises:
            ResourceError: if the address can't be listened on.
        """
        listener = await _listener(host, port, drain_seconds)
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=_Protocol,
                lifespan="off",
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_SECONDS,
                timeout_graceful_shutdown=max(1, round(drain_seconds)),
            )
        )
        task = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started and not task.done():
            await asyncio.sleep(0.01)
        found = cls(server, task)
        found.check()
        return found

    def check(self) -> None:
        """Check that the server runs.

        Raises:
            ResourceError: if it has ended.
        """
        if self._task.done():
            raise ResourceError("the HTTP server has ended; see the log of the ingress")

    async def stop(self) -> None:
        """Stop listening, and wait until running requests are answered."""
        self._server.should_exit = True
        await asyncio.wait([self._task])


async def _listener(host: str, port: int, seconds: float) -> socket.socket:
    deadline = time.monotonic() + seconds
    while True:
        try:
            made = bound(host, port)
            made.listen(WAITING)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() >= deadline:
                raise ResourceError(
                    f"can't listen on {host}:{port} ({error}); set another port, or stop what listens there. "
                    "If that is Ray Serve's own proxy, set proxy_location: Disabled in the file for `serve "
                    "deploy`"
                ) from error
            await asyncio.sleep(RETRY_SECONDS)
        else:
            return made


def bound(host: str, port: int) -> socket.socket:
    """Return a socket with an address, as servers bind it.

    Raises:
        socket.gaierror: if there is no such address.
        OSError: if the address can't be had.
    """
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        # An address whose last connection has just ended counts as free.
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit this: those of clients that have vanished would otherwise stay open.
        made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        made.bind(address)
    except OSError:
        made.close()
        raise
    return made
