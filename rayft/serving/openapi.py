"""The interface as an OpenAPI document, made from the types of requests and answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, TypeAdapter

from rayft import __version__
from rayft.serving.messages import NAME
from rayft.serving.response_schemas import (
    AdapterDeleted,
    AdapterDeployed,
    AdapterList,
    AdapterVersions,
    ChatCompletion,
    Completion,
    ErrorAnswer,
    Health,
    ModelEntry,
    ModelList,
    NotReady,
    Readiness,
)
from rayft.serving.schemas import ChatRequest, CompletionRequest, LoadRequest

__all__ = ["openapi"]


@dataclass(frozen=True)
class Operation:
    """One verb of one path."""

    verb: str
    path: str
    answer: Any
    """Type of what is answered if all is well."""
    body: type[BaseModel] | None = None
    status: int = 200
    open: bool = False
    """Whether it needs no key."""
    streams: bool = False
    unavailable: Any = ErrorAnswer
    """Type of what is answered where there is no replica."""


OPERATIONS = (
    Operation("get", "/healthz", Health, open=True),
    Operation("get", "/readyz", Readiness, open=True, unavailable=NotReady),
    Operation("get", "/v1/models", ModelList),
    Operation("get", "/v1/models/{name}", ModelEntry),
    Operation("post", "/v1/chat/completions", ChatCompletion, ChatRequest, streams=True),
    Operation("post", "/v1/completions", Completion, CompletionRequest, streams=True),
    Operation("get", "/v1/adapters", AdapterList),
    Operation("post", "/v1/adapters", AdapterDeployed, LoadRequest, status=201),
    Operation("get", "/v1/adapters/{name}", AdapterVersions),
    Operation("delete", "/v1/adapters/{name}", AdapterDeleted),
    Operation("post", "/v1/adapters/{name}/promote", AdapterDeployed),
    Operation("post", "/v1/adapters/{name}/rollback", AdapterDeployed),
)
ERRORS = {
    400: "the request is wrong",
    401: "no known key",
    403: "a key that may not do this",
    404: "not served here",
    405: "another verb",
    413: "a body that is too large",
    429: "too many requests wait",
    503: "no room, or no replica",
    504: "it took too long",
}


def openapi() -> dict[str, Any]:
    """Describe the interface (OpenAPI 3.1)."""
    found, schemas = TypeAdapter.json_schemas(_types(), ref_template="#/components/schemas/{model}")
    named = {name: schema for (name, _), schema in found.items()}
    paths: dict[str, Any] = {}
    for one in OPERATIONS:
        paths.setdefault(one.path, {})[one.verb] = _described(one, named)
    return {
        "openapi": "3.1.0",
        "info": {"title": "rayft", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _types() -> list[tuple[str, Literal["validation", "serialization"], TypeAdapter[Any]]]:
    """List all that is sent and answered, each type once."""
    sent = {one.body for one in OPERATIONS if one.body is not None}
    answered = {ErrorAnswer, NotReady, *(one.answer for one in OPERATIONS)}
    return [
        *((body.__name__, "validation", TypeAdapter(body)) for body in sorted(sent, key=_name)),
        *((answer.__name__, "serialization", TypeAdapter(answer)) for answer in sorted(answered, key=_name)),
    ]


def _name(kind: type) -> str:
    return kind.__name__


def _described(one: Operation, schemas: Mapping[str, Any]) -> dict[str, Any]:
    """Describe an operation."""
    good: dict[str, Any] = {"application/json": {"schema": schemas[one.answer.__name__]}}
    if one.streams:
        # OpenAPI 3.1 can't describe what single events hold.
        good["text/event-stream"] = {}

    def failure(status: int) -> dict[str, Any]:
        kind = one.unavailable if status == 503 else ErrorAnswer
        return {"application/json": {"schema": schemas[kind.__name__]}}

    described: dict[str, Any] = {
        "responses": {
            str(one.status): {"description": "what was asked for", "content": good},
            **{
                str(status): {"description": what, "content": failure(status)}
                for status, what in ERRORS.items()
            },
        },
        "parameters": [_parameter(one.path)] if "{name}" in one.path else [],
        # Without keys (on this machine's own address alone) none is needed.
        "security": [] if one.open else [{"key": []}],
    }
    if one.body is not None:
        content = {"application/json": {"schema": schemas[one.body.__name__]}}
        described["requestBody"] = {"required": True, "content": content}
    return described


def _parameter(path: str) -> dict[str, Any]:
    """Describe a path's `name`: a model's may be `name@version` or a base's, with slashes."""
    form = {"minLength": 1} if path.startswith("/v1/models") else {"pattern": f"^{NAME}$"}
    return {"name": "name", "in": "path", "required": True, "schema": {"type": "string", **form}}
