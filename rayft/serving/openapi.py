"""The interface as an OpenAPI document, made from the request types."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from rayft import __version__
from rayft.serving.schemas import ChatRequest, CompletionRequest, LoadRequest

__all__ = ["openapi"]

BODIES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/adapters": LoadRequest,
}
ROUTES = (
    ("get", "/healthz"), ("get", "/readyz"), ("get", "/v1/models"), ("get", "/v1/models/{name}"),
    ("post", "/v1/chat/completions"), ("post", "/v1/completions"), ("get", "/v1/adapters"),
    ("post", "/v1/adapters"), ("get", "/v1/adapters/{name}"), ("delete", "/v1/adapters/{name}"),
    ("post", "/v1/adapters/{name}/promote"), ("post", "/v1/adapters/{name}/rollback"),
)  # fmt: skip
STATUSES = {
    200: "what was asked for",
    201: "served on all replicas",
    400: "the request is wrong",
    401: "no known key",
    403: "a key that may not do this",
    404: "not served here",
    405: "another verb",
    503: "no room, or no replica",
}


def openapi() -> dict[str, Any]:
    """Describe the interface (OpenAPI 3.1)."""
    inputs, schemas = models_json_schema(
        [(body, "validation") for body in BODIES.values()], ref_template="#/components/schemas/{model}"
    )
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    answers = {
        str(status): {"description": what, "content": {"application/json": {"schema": {"type": "object"}}}}
        for status, what in STATUSES.items()
    }
    # Streams are events.
    events = {"text/event-stream": {"schema": {"type": "string"}}}
    answers["200"]["content"] = {**answers["200"]["content"], **events}  # type: ignore[dict-item]
    paths: dict[str, Any] = {}
    for verb, path in ROUTES:
        operation: dict[str, Any] = {
            "responses": answers,
            "parameters": [name] if "{name}" in path else [],
        }
        if verb == "post" and path in BODIES:
            schema = inputs[BODIES[path], "validation"]
            operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        paths.setdefault(path, {})[verb] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "rayft", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }
