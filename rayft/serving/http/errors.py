"""Answers to errors, in the form of OpenAI's interface: a status, and a body with the message."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from rayft.errors import BadRequestError, RayftError, RequestError
from rayft.serving.http.body import where
from rayft.serving.http.responses import ErrorAnswer
from rayft.serving.presence import cause_of

__all__ = ["EXPECTED", "LOST", "RETRY_SECONDS", "answer_error", "describe_error"]

RETRY_SECONDS = 2
"""Value of `Retry-After` if too many requests are waiting or no replica is up."""

LOST = "the replica that was to answer was lost; try again"
"""Message if a replica ends or can't be reached while it answers."""

LONGEST_MESSAGE = 4000
"""Most characters of a message: it may quote a name or a list of any length."""

EXPECTED = (HTTPException, RequestValidationError, RayftError, RayTaskError)
"""Exceptions that the ingress does not log: the answer, or the log of the replica, says what was wrong."""


async def answer_error(request: Request, error: Exception) -> JSONResponse:
    """Return the answer to an error; an exception handler of FastAPI."""
    status, body = describe_error(error)
    headers = {}
    if status in (429, 503):
        headers["Retry-After"] = str(RETRY_SECONDS)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if status == 405:
        # Starlette's own error names the methods of the first route with this path only.
        headers["Allow"] = ", ".join(_methods(request))
    return JSONResponse(body, status_code=status, headers=headers)


def describe_error(error: Exception) -> tuple[int, ErrorAnswer]:
    """Return the status and the body that answer an error, in whichever process it was raised."""
    cause = cause_of(error)
    if isinstance(cause, RequestValidationError):
        cause = _bad_request(cause)
    if isinstance(cause, RequestError):
        return cause.status, _body(cause.status, str(cause), cause.param, cause.code)
    if isinstance(cause, HTTPException):
        return cause.status_code, _body(cause.status_code, str(cause.detail), None, None)
    if isinstance(cause, RayftError):
        return 503, _body(503, str(cause), None, "unavailable")
    if isinstance(cause, (RayActorError, DeploymentUnavailableError)):
        return 503, _body(503, LOST, None, "unavailable")
    message = f"{type(cause).__name__} inside the server; see its log"
    return 500, _body(500, message, None, "internal_error")


def _body(status: int, message: str, param: str | None, code: str | None) -> ErrorAnswer:
    if len(message) > LONGEST_MESSAGE:
        message = f"{message[:LONGEST_MESSAGE]} …"
    return {
        "error": {
            "message": message,
            "type": "invalid_request_error" if status < 500 else "server_error",
            "param": param,
            "code": code,
        }
    }


def _methods(request: Request) -> list[str]:
    """List the methods that the path of a request accepts."""
    scope, routes = dict(request.scope), request.app.routes
    return [
        method
        for method in ("DELETE", "GET", "PATCH", "POST", "PUT")
        if any(route.matches({**scope, "method": method})[0] is Match.FULL for route in routes)
    ]


def _bad_request(error: RequestValidationError) -> BadRequestError:
    """Name the field at fault; the error's `param` is its path in the body, as in `messages[0].content`."""
    # One mistake may cause others: a field is most often missing because its name is misspelt.
    problem = min(error.errors(), key=lambda one: one["type"] == "missing")
    path = _path(error.body, problem["loc"][1:])
    if problem["type"] == "missing":
        path.append(str(problem["loc"][-1]))
    elif problem["type"] == "field":
        path.append(problem["ctx"]["field"])
    place = where(path)
    what = f"'{place}' is missing" if problem["type"] == "missing" else f"'{place}': {problem['msg']}"
    return BadRequestError(what, param=place or None)


def _path(data: Any, location: Sequence[str | int]) -> list[str | int]:
    """Return the path to a value in the body, without the tags of unions that pydantic adds to it."""
    found: list[str | int] = []
    for part in location:
        inside = part in data if isinstance(data, dict) else isinstance(data, list) and isinstance(part, int)
        if inside:
            data = data[part]
            found.append(part)
    return found
