"""OpenAI's HTTP interface: requests are read here and answered by the replicas."""

# Ray Serve pickles the routes by value while this module is still being imported, with the globals
# that their code uses: names must be defined above them, and annotations must not be strings (so no
# `from __future__ import annotations`).
import random
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.resources import files
from typing import Any

import ray.serve as ray_serve
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.metrics import Counter
from starlette.exceptions import HTTPException
from starlette.routing import Match

from rayft.errors import (
    RayftError,
    RequestError,
    RequestTimeoutError,
    ResourceError,
    TooLargeError,
    TooManyRequestsError,
    UnknownModelError,
)
from rayft.serving.answers import ChatForm, Form, TextForm, collected, describe_error, events
from rayft.serving.keys import Caller, ForbiddenError, KeyConfig, identify
from rayft.serving.messages import BASE_NAME, Delta, ModelCard
from rayft.serving.openapi import openapi
from rayft.serving.presence import NoReplicaError, Waiting
from rayft.serving.schemas import ChatRequest, CompletionRequest, LoadRequest, parse_request
from rayft.serving.state import parse_model

__all__ = ["Ingress", "IngressDeployment", "api"]

TRAFFIC = ("requests", "tokens", "errors")
RETRY_SECONDS = 2
"""When to try again where too many wait, or no replica is up."""

DIRECTOR_SECONDS = 10.0
"""How long the director may take to say what is served."""

EACH_SECONDS = 10.0
"""How long all replicas may take to answer, where each of them is asked."""

api = FastAPI(title="rayft", openapi_url=None)


@api.exception_handler(Exception)
@api.exception_handler(HTTPException)
@api.exception_handler(RequestError)
@api.exception_handler(RequestValidationError)
@api.exception_handler(ResourceError)
@api.exception_handler(RayTaskError)
async def _answer_error(request: Request, error: Exception) -> JSONResponse:
    status, body = describe_error(error)
    headers = {}
    if status in (429, 503):
        headers["Retry-After"] = str(RETRY_SECONDS)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if status == 405:
        # Starlette's own error names the verbs of the first route that has this path, not of all.
        headers["Allow"] = ", ".join(_verbs(request))
    return JSONResponse(body, status_code=status, headers=headers)


def _verbs(request: Request) -> list[str]:
    """List the verbs that the path of a request takes."""
    scope, routes = dict(request.scope), request.app.routes
    return [
        verb
        for verb in ("DELETE", "GET", "PATCH", "POST", "PUT")
        if any(route.matches({**scope, "method": verb})[0] is Match.FULL for route in routes)
    ]


def _first(cards: list[ModelCard]) -> list[ModelCard]:
    """Leave out a name's canary: the version that was there before stands for it."""
    return list({card.id: card for card in reversed(cards)}.values())[::-1]


@ray_serve.ingress(api)
class Ingress:
    """The routes."""

    def __init__(
        self,
        replica: DeploymentHandle[Any],
        director: DeploymentHandle[Any],
        keys: tuple[KeyConfig, ...] = (),
        roots: tuple[str, ...] = (),
        max_body_bytes: int = 16 * 10**6,
        waiting: tuple[float, float] = (1.0, 600.0),
    ) -> None:
        self._replica, self._director = replica, director
        self._streaming = replica.options(stream=True)
        self._keys, self._roots = keys, roots
        self._max_body_bytes = max_body_bytes
        refused: Any = Counter(
            "rayft_unavailable_total", "Calls that were refused because no replica was up."
        )
        self._replicas_answer = Waiting("Replica", *waiting, refused.inc)
        self._director_answers = Waiting("Director", waiting[0], DIRECTOR_SECONDS, refused.inc)
        self._created = int(time.time())

    @api.get("/", include_in_schema=False)
    async def page(self) -> HTMLResponse:
        """Show the adapters to a person."""
        return HTMLResponse(files("rayft.serving").joinpath("page.html").read_text(encoding="utf-8"))

    @api.get("/openapi.json", include_in_schema=False)
    async def openapi(self) -> dict[str, Any]:
        """Describe the interface."""
        return openapi()

    @api.get("/healthz")
    async def healthz(self) -> dict[str, Any]:
        """Say that this process lives, and what a replica's engine has done, if one is up."""
        engine = None
        with suppress(RayError, RayftError):
            engine = (await self._of_replica("stats"))["engine"]
        return {"status": "ok", "engine": engine}

    @api.get("/readyz")
    async def readyz(self, request: Request) -> Response:
        """Say whether requests can be answered: a replica and the director do."""
        try:
            number = await self._of_director("number")
            await self._of_replica("serving")
            problems = await self._of_each("problems")
        except (RayError, RayftError) as error:
            body = {"status": "not ready", "reason": self._reason(request, error)}
            return JSONResponse(body, status_code=503, headers={"Retry-After": str(RETRY_SECONDS)})
        return JSONResponse({"status": "ready", "change": number, "unavailable": len(set().union(*problems))})

    @api.get("/v1/models")
    async def models(self, request: Request) -> dict[str, Any]:
        """List the base and the adapters that the caller may ask for."""
        cards = await self._cards(self._caller(request))
        return {"object": "list", "data": [self._model(card) for card in _first(cards)]}

    @api.get("/v1/models/{name:path}")
    async def model(self, request: Request, name: str) -> dict[str, Any]:
        """Describe one of them."""
        for card in await self._cards(self._caller(request)):
            if name == card.id or (card.version and name == f"{card.id}@{card.version}"):
                return self._model(card)
        raise UnknownModelError(f"no model '{name}' is served here; see /v1/models", param="model")

    @api.post("/v1/chat/completions")
    async def chat(self, request: Request) -> Response:
        """Continue a conversation."""
        parsed = parse_request(ChatRequest, await self._body(request))
        return await self._answer(self._caller(request), parsed, ChatForm(parsed.model))

    @api.post("/v1/completions")
    async def completions(self, request: Request) -> Response:
        """Continue a text."""
        parsed = parse_request(CompletionRequest, await self._body(request))
        return await self._answer(self._caller(request), parsed, TextForm(parsed.model))

    @api.get("/v1/adapters")
    async def adapters(self, request: Request) -> dict[str, Any]:
        """List the adapters that the caller may see, with where they are and what they did."""
        caller = self._caller(request)
        about = await self._of_director("adapters")
        data = await self._described(caller, about["served"])
        refused = {"refused": about["refused"]} if caller.admin else {}
        return {"object": "list", "data": data, "change": about["served"].number, **refused}

    @api.post("/v1/adapters", status_code=201)
    async def load(self, request: Request) -> JSONResponse:
        """Serve an adapter under a name, on all replicas or on none."""
        self._admin(request)
        wanted = parse_request(LoadRequest, await self._body(request))
        wanted.check(self._roots)
        made = await self._change("load", wanted.name, wanted.source, wanted.weight, wanted.pinned)
        return JSONResponse(asdict(made), status_code=201)

    @api.get("/v1/adapters/{name}")
    async def adapter(self, request: Request, name: str) -> dict[str, Any]:
        """Describe one name's versions."""
        served = await self._of_director("state")
        found = [one for one in await self._described(self._caller(request), served) if one["id"] == name]
        if not found:
            raise UnknownModelError(f"no adapter '{name}' is served here; see /v1/adapters", param="name")
        return {"object": "adapter", "id": name, "versions": found}

    @api.delete("/v1/adapters/{name}")
    async def unload(self, request: Request, name: str) -> dict[str, Any]:
        """Serve a name no more; what runs with it ends first."""
        self._admin(request)
        await self._change("unload", name)
        return {"object": "adapter", "id": name, "deleted": True}

    @api.post("/v1/adapters/{name}/promote")
    async def promote(self, request: Request, name: str) -> dict[str, Any]:
        """Give all of a name's traffic to its canary."""
        self._admin(request)
        return asdict(await self._change("promote", name))

    @api.post("/v1/adapters/{name}/rollback")
    async def rollback(self, request: Request, name: str) -> dict[str, Any]:
        """Take back a canary, or the last change of a name."""
        self._admin(request)
        return asdict(await self._change("rollback", name))

    def _reason(self, request: Request, error: Exception) -> str:
        """Return why requests can't be answered: in full, with paths, only to those who may ask for text."""
        with suppress(RequestError):
            self._caller(request)
            return str(error) if isinstance(error, RayftError) else f"{type(error).__name__}: {error}"
        return error.public if isinstance(error, NoReplicaError) else type(error).__name__

    def _caller(self, request: Request) -> Caller:
        return identify(self._keys, request.headers.get("authorization"))

    def _admin(self, request: Request) -> None:
        if not self._caller(request).admin:
            raise ForbiddenError("this needs an admin's key")

    async def _body(self, request: Request) -> bytes:
        """Authenticate, then read the body as far as it may go.

        Raises:
            TooLargeError: if it has more bytes than a body may have.
        """
        self._caller(request)
        most, body = self._max_body_bytes, bytearray()
        async for part in request.stream():
            body += part
            if len(body) > most:
                raise TooLargeError(
                    f"the body has more than the {most:,} bytes that this server reads; send less at once, "
                    "or raise max_body_bytes"
                )
        return bytes(body)

    async def _of_replica(self, method: str) -> Any:
        """Ask a replica something; not for long where none is up."""
        call: Any = getattr(self._replica, method).remote()
        return await self._replicas_answer.answer(call, call.cancel)

    async def _of_director(self, method: str) -> Any:
        """Ask the director something; not for long where it is not up."""
        call: Any = getattr(self._director, method).remote()
        try:
            return await self._director_answers.answer(call, call.cancel)
        except RequestTimeoutError as error:
            raise ResourceError(
                "the director, which knows what is served, does not answer; try again"
            ) from error

    async def _change(self, method: str, *arguments: Any) -> Any:
        """Have the director change what is served, which takes as long as reading an adapter takes."""
        await self._of_director("number")
        return await getattr(self._director, method).remote(*arguments)

    async def _of_each(self, method: str) -> list[Any]:
        """Ask all replicas something, and return the answers of those that give one."""
        try:
            call = self._replica.broadcast(method)
            answers = await call.results_async(timeout_s=EACH_SECONDS, return_exceptions=True)
        except (TimeoutError, RayServeException):
            return []
        return [one for one in answers if not isinstance(one, Exception)]

    async def _cards(self, caller: Caller) -> list[ModelCard]:
        """Describe what a caller may ask for; unavailable is what no replica can serve."""
        found: list[ModelCard] = await self._of_replica("models")
        cards = [card for card in found if caller.may_ask(card.id)]
        if not any(card.unavailable for card in cards):
            return cards
        everywhere = [card for found in await self._of_each("models") for card in found]
        loaded = {(card.id, card.version): card for card in everywhere if not card.unavailable}
        return [loaded.get((card.id, card.version), card) for card in cards]

    async def _described(self, caller: Caller, served: Any) -> list[dict[str, Any]]:
        """Describe each version that a caller may see."""
        replicas = await self._of_each("stats")
        found = []
        for card in await self._cards(caller):
            if card.id == BASE_NAME:
                continue
            key = f"{card.id}@{card.version}"
            did = [one["traffic"].get(key, {}) for one in replicas]
            share = served.weights.get(card.id)
            newest = served.of(card.id)[-1:]
            reasons = [one["problems"][key] for one in replicas if key in one["problems"]]
            if share is not None and newest and newest[0].version != card.version:
                share = 1 - share
            told = self._model(replace(card, unavailable=next(iter(reasons), None)))
            found.append({
                **told, "object": "adapter", "weight": 1.0 if share is None else share,
                "tiers": [one["tiers"].get(key, "disk") for one in replicas],
                "traffic": {what: sum(one.get(what, 0) for one in did) for what in TRAFFIC},
            })  # fmt: skip
        return found

    async def _answer(self, caller: Caller, request: ChatRequest | CompletionRequest, form: Form) -> Response:
        name = parse_model(request.model).name
        if not caller.may_ask(name):
            # As if it were not there: a key tells nothing of what others use.
            raise UnknownModelError(f"no model '{request.model}' is served here", param="model")
        # Drawn here, so that router and replica agree on which version a canary's request means.
        call: Any = self._streaming.generate.remote(request, random.random())
        deltas: AsyncIterator[Delta] = aiter(call)
        # The first delta says that the request was accepted: before it an error still has a status.
        try:
            first = await self._replicas_answer.answer(anext(deltas), call.cancel)
        except BackPressureError as error:
            # Caught here: Ray Serve would answer it by itself, with a 503.
            raise TooManyRequestsError("too many requests wait here; try again later") from error
        form.fingerprint = first.fingerprint
        if request.stream:
            counts = request.stream_options is not None and request.stream_options.include_usage
            body = events(form, first, deltas, counts)
            fresh = {"Cache-Control": "no-cache"}
            return StreamingResponse(body, media_type="text/event-stream", headers=fresh)
        return JSONResponse(form.whole(await collected(first, deltas)))

    def _model(self, card: ModelCard) -> dict[str, Any]:
        about = {key: value for key, value in asdict(card).items() if value not in (None, ())}
        return {**about, "object": "model", "created": self._created, "owned_by": "rayft"}


IngressDeployment = ray_serve.deployment(name="Ingress")(Ingress)
"""What Ray Serve runs; `rayft.serving.build` sets its size and resources."""
