"""What Ray Serve's HTTP proxy does with a request before it reaches the ingress.

The proxy decodes some headers as UTF-8 by itself (request id, session, multiplexed model, time limit), and
answers 500 where that fails. This middleware refuses such a request with a 400 in the form of other errors.

Ray Serve's processes find it by an environment variable (`PROXY_ENVIRONMENT`): `rayft serve` sets it for the
controller that it starts, and files for `serve deploy` do under `controller_options`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from rayft.errors import BadRequestError
from rayft.serving.http.errors import describe_error

__all__ = ["HeaderCheck", "check_headers", "middlewares"]

TIMEOUT = "x-request-timeout-seconds"
DECODED = (
    TIMEOUT,
    "serve-multiplexed-model-id",
    "traceparent",
    "x-request-disconnect-disabled",
    "x-request-id",
    "x-session-id",
)
"""Headers that the proxy decodes."""

LONGEST_SECONDS = 10**6
"""Largest limit of time: event loops refuse to wait much longer."""


def middlewares() -> list[Middleware]:
    """List what Ray Serve wraps its HTTP proxy in."""
    return [Middleware(HeaderCheck)]


class HeaderCheck:
    """Answers 400 to requests with a header that the proxy would fail on."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, and pass it on."""
        if scope["type"] == "http":
            try:
                check_headers(scope["headers"])
            except BadRequestError as error:
                status, body = describe_error(error)
                await JSONResponse(body, status_code=status)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def check_headers(headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Check the headers that the proxy decodes.

    Raises:
        BadRequestError: naming the first one that is not UTF-8, or no time limit.
    """
    for name, value in headers:
        header = name.decode("latin-1").lower().replace("_", "-")
        if header not in DECODED:
            continue
        try:
            text = value.decode()
        except UnicodeDecodeError as error:
            raise BadRequestError(
                f"the header '{header}' is not UTF-8; send it without those bytes"
            ) from error
        if header == TIMEOUT and not _seconds(text) <= LONGEST_SECONDS:
            raise BadRequestError(
                f"the header '{header}' must be a number of up to {LONGEST_SECONDS:,} seconds"
            )


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
