"""OpenAI's HTTP interface: requests are read here and answered by the replicas."""

# Ray Serve pickles the routes by value while this module is still being imported, with the globals
# that their code uses: names must be defined above them, and annotations must not be strings (so no
# `from __future__ import annotations`).
import time
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

import ray.serve as ray_serve
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray.exceptions import RayTaskError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from rayft.errors import RequestError, UnknownModelError
from rayft.serving.answers import ChatForm, Form, TextForm, collected, describe_error, events
from rayft.serving.messages import Delta, ModelCard
from rayft.serving.schemas import ChatRequest, CompletionRequest, parse_request

__all__ = ["Ingress", "IngressDeployment", "api"]

api = FastAPI(title="rayft", openapi_url=None)


@api.exception_handler(Exception)
@api.exception_handler(HTTPException)
@api.exception_handler(RequestError)
@api.exception_handler(RayTaskError)
async def _answer_error(_: Request, error: Exception) -> JSONResponse:
    status, body = describe_error(error)
    return JSONResponse(body, status_code=status)


@ray_serve.ingress(api)
class Ingress:
    """The routes."""

    def __init__(self, replica: DeploymentHandle[Any]) -> None:
        self._replica = replica
        self._streaming = replica.options(stream=True)
        self._created = int(time.time())

    @api.get("/healthz")
    async def healthz(self) -> dict[str, Any]:
        """Say that a replica answers, what its engine has done, and what it refused to load."""
        return {"status": "ok", **await self._replica.stats.remote()}

    @api.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        """List the base and the adapters."""
        cards = await self._replica.models.remote()
        return {"object": "list", "data": [self._model(card) for card in cards]}

    @api.get("/v1/models/{name:path}")
    async def model(self, name: str) -> dict[str, Any]:
        """Describe one of them."""
        for card in await self._replica.models.remote():
            if card.id == name:
                return self._model(card)
        raise UnknownModelError(f"no model '{name}' is served here; see /v1/models", param="model")

    @api.post("/v1/chat/completions")
    async def chat(self, request: Request) -> Response:
        """Continue a conversation."""
        parsed = parse_request(ChatRequest, await request.body())
        return await self._answer(parsed, ChatForm(parsed.model))

    @api.post("/v1/completions")
    async def completions(self, request: Request) -> Response:
        """Continue a text."""
        parsed = parse_request(CompletionRequest, await request.body())
        return await self._answer(parsed, TextForm(parsed.model))

    async def _answer(self, request: ChatRequest | CompletionRequest, form: Form) -> Response:
        deltas: AsyncIterator[Delta] = aiter(self._streaming.generate.remote(request))  # type: ignore[arg-type]
        # The first delta says that the request was accepted: before it an error still has a status.
        first = await anext(deltas)
        if request.stream:
            counts = request.stream_options is not None and request.stream_options.include_usage
            body = events(form, first, deltas, counts)
            fresh = {"Cache-Control": "no-cache"}
            return StreamingResponse(body, media_type="text/event-stream", headers=fresh)
        return JSONResponse(form.whole(await collected(first, deltas)))

    def _model(self, card: ModelCard) -> dict[str, Any]:
        about = {key: value for key, value in asdict(card).items() if value is not None}
        return {**about, "object": "model", "created": self._created, "owned_by": "rayft"}


IngressDeployment = ray_serve.deployment(name="Ingress")(Ingress)
"""What Ray Serve runs; `rayft.serving.build` sets its size and resources."""
