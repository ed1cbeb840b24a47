"""Middleware for Ray Serve's HTTP proxy that refuses headers on which the proxy would fail.

Before a request reaches the ingress, the proxy decodes some headers as UTF-8 (request id, session,
multiplexed model, time limit), and answers 500 if that fails. This middleware answers 400 instead, in the
form of other errors.

Ray Serve's processes find it by an environment variable (`PROXY_ENVIRONMENT`). `rayft serve` sets the
variable for the controller that it starts; files for `serve deploy` set it under `controller_options`.
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
"""The headers that the proxy decodes."""

LONGEST_SECONDS = 10**6
"""Largest time limit that is accepted: event loops refuse to wait much longer."""


def middlewares() -> list[Middleware]:
    """Return the middlewares that Ray Serve adds to its HTTP proxy."""
    return [Middleware(HeaderCheck)]


class HeaderCheck:
    """Answers 400 to a request with a header on which the proxy would fail."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check the headers of a request, and pass it on."""
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
        BadRequestError: if one is not UTF-8, or the time limit is not a number; it names the first one.
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
