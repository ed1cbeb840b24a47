"""Read the body of a request as plain JSON: after authentication, before FastAPI validates it.

Plain JSON here means: UTF-8, valid Unicode in every key and string, no duplicate key in an object, numbers
that fit 64 bits, and a limited depth. No later step (pickling a request for a replica, tokenizing it, writing
its text into an error or a log) can then fail on the encoding, the depth or the size of a value.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NoReturn, TypeVar, get_type_hints

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from rayft.config import lone_surrogate
from rayft.errors import BadRequestError, TooLargeError
from rayft.serving.http.auth import Guard

__all__ = ["MAX_DEPTH", "AnswerRoute", "GuardedRoute", "read_json", "where"]

Parsed = TypeVar("Parsed")

MAX_DEPTH = 32
"""Largest number of objects and arrays within one another."""

LARGE = 2**20
"""Size of a body in bytes from which another thread parses and checks it: 15 MB of empty lists take 5 s."""

LONGEST_NUMBER = 400
"""Most characters of an integer that is parsed; a 64-bit float that is written out has fewer."""


class GuardedRoute(APIRoute):
    """A route that authenticates the caller, then reads the body, and only then lets FastAPI handle the rest.

    FastAPI alone would read and parse the body before it resolves the dependencies that authenticate.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Wrap FastAPI's handler of the route."""
        handle, guards = super().get_route_handler(), self.guards()
        has_body = self.body_field is not None

        async def guarded(request: Request) -> Response:
            for guard in guards:
                await guard(request)
            return await handle(await _JsonRequest.read(request) if has_body else request)

        return guarded

    def guards(self) -> list[Guard]:
        """Return the route's dependencies that authenticate."""
        return [one.call for one in self.dependant.dependencies if isinstance(one.call, Guard)]


class AnswerRoute(GuardedRoute):
    """A guarded route whose endpoint takes the request, its caller, the gateway and the body.

    FastAPI only describes the route. To resolve these arguments it would take longer than the endpoint.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return a handler that calls the endpoint as FastAPI would."""
        [guard], endpoint = self.guards(), self.endpoint
        model: type[BaseModel] = get_type_hints(endpoint)["body"]

        async def answered(request: Request) -> Response:
            caller = await guard(request)
            body = await _parsed_by(validated, await read_body(request))
            found: Response = await endpoint(request, caller, request.app.state.gateway, body)
            return found

        def validated(content: bytes) -> BaseModel:
            data = read_json(content)
            try:
                return model.model_validate(data)
            except ValidationError as error:
                problems = [{**one, "loc": ("body", *one["loc"])} for one in error.errors(include_url=False)]
                raise RequestValidationError(problems, body=data) from error

        return answered


class _JsonRequest(Request):
    """A request whose body has been read and checked."""

    _read: bytes
    _parsed: dict[str, Any]

    @classmethod
    async def read(cls, request: Request) -> _JsonRequest:
        """Read and check the body of a request.

        Raises:
            TooLargeError: as `read_body`.
            BadRequestError: as `read_body` and `read_json`.
        """
        body = await read_body(request)
        # FastAPI parses only what is declared as JSON; `curl -d` and others declare something else.
        headers = [(name, value) for name, value in request.headers.raw if name != b"content-type"]
        scope = {**request.scope, "headers": [*headers, (b"content-type", b"application/json")]}
        # What follows the body is only that the client leaves.
        made = cls(scope, request.receive)
        made._read, made._parsed = body, await _parsed_by(read_json, body)
        return made

    async def body(self) -> bytes:
        """Return the bytes of the body."""
        return self._read

    async def json(self) -> Any:
        """Return the parsed body."""
        return self._parsed


async def read_body(request: Request) -> bytes:
    """Read the body of a request.

    Raises:
        BadRequestError: if it is compressed.
        TooLargeError: if it has more bytes than `app.state.max_body_bytes`.
        HTTPException: if the client leaves before its end. Nobody reads the answer to it.
    """
    coding = request.headers.get("content-encoding", "identity")
    if coding.strip().lower() != "identity":
        raise BadRequestError(
            f"the body is compressed (Content-Encoding: {coding[:60]!a}), which this server does not read; "
            "send it as it is"
        )
    most, body = request.app.state.max_body_bytes, bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise TooLargeError(
                    f"the body has more than the {most:,} bytes that this server accepts; send less at once, "
                    "or raise max_body_bytes"
                )
    except ClientDisconnect as error:
        raise HTTPException(499, "the client has left") from error
    return bytes(body)


async def _parsed_by(parse: Callable[[bytes], Parsed], body: bytes) -> Parsed:
    """Parse a body; a large one in another thread, so that other requests continue meanwhile."""
    return parse(body) if len(body) < LARGE else await asyncio.to_thread(parse, body)


def where(path: Sequence[str | int]) -> str:
    """Return the path to a value in the body in the notation that clients use: `messages[0].content`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text


def read_json(body: bytes) -> dict[str, Any]:
    """Parse a body that must be a JSON object.

    Raises:
        BadRequestError: if it is not plain JSON; its `param` is the path to the value at fault.
    """
    try:
        # RFC 8259 allows only UTF-8; `json.loads` would detect UTF-16 too, and accept surrogates.
        data = _parsed(body.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadRequestError(
            f"the body is not valid JSON: it is not UTF-8 (byte {error.start}: {error.reason})"
        ) from error
    except RecursionError as error:
        raise BadRequestError(_too_deep("the body")) from error
    except ValueError as error:
        raise BadRequestError(f"the body is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        kinds = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
        raise BadRequestError(f"the body must be a JSON object, not {kinds.get(type(data), 'a number')}")
    _check(data, [])
    return data


def _parsed(text: str) -> Any:
    hooks: dict[str, Any] = {"parse_constant": _no_constant, "object_pairs_hook": _object}
    try:
        return json.loads(text, **hooks)
    except ValueError:
        # Python refuses some long integers. A hook for all of them would cost more than the rest for a prompt
        # of token ids.
        return json.loads(text, parse_int=_integer, **hooks)


def _integer(digits: str) -> int | float:
    # Infinity stands for an integer that is too long; `_check`, which knows its path, refuses it.
    return int(digits) if len(digits) <= LONGEST_NUMBER else math.inf


def _no_constant(name: str) -> NoReturn:
    raise BadRequestError(f"the body is not valid JSON: {name} is not a JSON number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise BadRequestError(f"the key {twice!a} occurs twice in one object; send it once")
    return found


def _check(value: object, path: list[str | int]) -> None:
    """Check a value and all values inside it."""
    if isinstance(value, str):
        _check_text(value, path)
    elif isinstance(value, dict | list):
        if len(path) >= MAX_DEPTH:
            raise BadRequestError(_too_deep(f"'{where(path[:1])}'"), param=where(path[:1]))
        if isinstance(value, list) and _all_fit(value):
            return
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(key, str):
                _check_text(key, path, "a key of ")
            _check(inner, [*path, key])
    elif isinstance(value, int | float):
        fits = math.isfinite(value) if isinstance(value, float) else -(2**63) <= value < 2**63
        if not fits:
            raise BadRequestError(
                f"'{where(path)}' is a number that does not fit into 64 bits", param=where(path)
            )


def _all_fit(values: list[Any]) -> bool:
    """Return whether all are integers of 64 bits: token ids, which would take long to check one by one."""
    return set(map(type, values)) == {int} and min(values) >= -(2**63) and max(values) < 2**63


def _check_text(text: str, path: Sequence[str | int], what: str = "") -> None:
    if problem := lone_surrogate(text):
        place = where(path)
        named = f"'{place}'" if place else "the body"
        raise BadRequestError(f"{what}{named} is not valid Unicode: {problem}", param=place or None)


def _too_deep(what: str) -> str:
    return f"{what} is nested more than {MAX_DEPTH} levels deep"
