"""The HTTP application: OpenAI's interface and the routes that change what is served."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from typing import Annotated, Any

import ray.serve as ray_serve
from fastapi import APIRouter, Depends, FastAPI, Path, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from ray.exceptions import RayError
from ray.serve.handle import DeploymentHandle
from starlette.types import Receive, Scope, Send

from rayft import __version__
from rayft.errors import RayftError, RequestError
from rayft.serving.answers import Inbox, Incoming
from rayft.serving.control.state import Deployed
from rayft.serving.http.auth import Administrator, Caller, KeyConfig, KnownCaller, identify
from rayft.serving.http.body import AnswerRoute, GuardedRoute
from rayft.serving.http.errors import EXPECTED, RETRY_SECONDS, answer_error
from rayft.serving.http.gateway import Gateway
from rayft.serving.http.responses import (
    AdapterDeleted,
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
from rayft.serving.http.schemas import ChatRequest, CompletionRequest, LoadRequest
from rayft.serving.http.server import HttpServer
from rayft.serving.http.streaming import ChatForm, Form, TextForm, collected, events
from rayft.serving.messages import NAME
from rayft.serving.presence import NoReplicaError

__all__ = ["Ingress", "IngressDeployment", "IngressOptions", "create_app"]

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": what}
    for status, what in {
        400: "The request is malformed or can't be fulfilled.",
        401: "The request has no known key.",
        403: "The key does not permit this operation.",
        404: "This name is not served here.",
        405: "The path does not support this method.",
        413: "The body is too large.",
        429: "Too many requests are waiting.",
        503: "No replica is up, or there is no room.",
        504: "The request took too long.",
    }.items()
}
"""The errors that any route may answer."""

STREAM: dict[int | str, dict[str, Any]] = {
    # OpenAPI 3.1 can't describe the content of single events.
    200: {"description": "The answer, whole or as a stream.", "content": {"text/event-stream": {}}}
}

router = APIRouter(route_class=GuardedRoute, responses=ERRORS)
answers = APIRouter(route_class=AnswerRoute, responses=ERRORS)


async def _gateway(request: Request) -> Gateway:
    found: Gateway = request.app.state.gateway
    return found


Replicas = Annotated[Gateway, Depends(_gateway)]

# Both only describe the parameter: a name of another form is not served, and so answered 404.
ModelName = Annotated[str, Path(json_schema_extra={"minLength": 1})]
AdapterName = Annotated[str, Path(json_schema_extra={"pattern": f"^{NAME}$"})]


@router.get("/", include_in_schema=False)
async def page() -> HTMLResponse:
    """Return the page that shows the adapters to a person."""
    return HTMLResponse(files("rayft.serving.http").joinpath("page.html").read_text(encoding="utf-8"))


@router.get("/-/healthz", include_in_schema=False)
async def alive() -> PlainTextResponse:
    """Answer what Ray Serve's proxies answer, by which KubeRay finds the pods that take requests."""
    return PlainTextResponse("success")


@router.get("/healthz")
async def healthz(request: Request, gateway: Replicas) -> Health:
    """Report that this process is alive and, to callers with a key, what the engine of a replica has done."""
    engine: Any = await gateway.engine() if _has_key(request) else None
    return {"status": "ok", "engine": engine}


@router.get("/readyz", response_model=Readiness, responses={503: {"model": NotReady}})
async def readyz(request: Request, gateway: Replicas) -> Any:
    """Report whether requests can be answered, which takes the director and a replica."""
    try:
        return await gateway.readiness()
    except (RayError, RayftError) as error:
        body: NotReady = {"status": "not ready", "reason": _reason(request, error)}
        return JSONResponse(body, status_code=503, headers={"Retry-After": str(RETRY_SECONDS)})


@router.get("/v1/models")
async def list_models(caller: KnownCaller, gateway: Replicas) -> ModelList:
    """List the base and the adapters that the caller may use; of a canary's two versions, the older one."""
    newest_first = reversed(await gateway.models(caller))
    return {"object": "list", "data": [*{entry["id"]: entry for entry in newest_first}.values()][::-1]}


@router.get("/v1/models/{name:path}")
async def describe_model(caller: KnownCaller, gateway: Replicas, name: ModelName) -> ModelEntry:
    """Describe one model: `base`, or an adapter as `name`, `name@version`, `name@alias`, `name@r8`."""
    return await gateway.model(caller, name)


@answers.post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAM)
async def chat_completions(
    request: Request, caller: KnownCaller, gateway: Replicas, body: ChatRequest
) -> Response:
    """Continue a conversation."""
    return await _until_left(request, _answer(gateway, caller, body, ChatForm(body.model)))


@answers.post("/v1/completions", response_model=Completion, responses=STREAM)
async def completions(
    request: Request, caller: KnownCaller, gateway: Replicas, body: CompletionRequest
) -> Response:
    """Continue a text."""
    return await _until_left(request, _answer(gateway, caller, body, TextForm(body.model)))


@router.get("/v1/adapters")
async def list_adapters(caller: KnownCaller, gateway: Replicas) -> AdapterList:
    """List the adapters that the caller may use, with their tiers and traffic."""
    return await gateway.adapters(caller)


@router.post("/v1/adapters", status_code=201)
async def load_adapter(request: Request, _: Administrator, gateway: Replicas, body: LoadRequest) -> Deployed:
    """Serve an adapter under a name, on all replicas or on none."""
    body.check(request.app.state.roots)
    return await gateway.change("load", body.name, body.source, body.weight, body.pinned)


@router.get("/v1/adapters/{name}")
async def describe_adapter(caller: KnownCaller, gateway: Replicas, name: AdapterName) -> AdapterVersions:
    """Describe the versions of one adapter."""
    return {"object": "adapter", "id": name, "versions": await gateway.versions(caller, name)}


@router.delete("/v1/adapters/{name}")
async def unload_adapter(_: Administrator, gateway: Replicas, name: AdapterName) -> AdapterDeleted:
    """Stop serving an adapter; requests that are running with it end first."""
    await gateway.change("unload", name)
    return {"object": "adapter", "id": name, "deleted": True}


@router.post("/v1/adapters/{name}/promote")
async def promote_adapter(_: Administrator, gateway: Replicas, name: AdapterName) -> Deployed:
    """Route all traffic of a name to its canary."""
    return await gateway.change("promote", name)


@router.post("/v1/adapters/{name}/rollback")
async def roll_back_adapter(_: Administrator, gateway: Replicas, name: AdapterName) -> Deployed:
    """Stop serving the canary of a name, or else undo its last change."""
    return await gateway.change("rollback", name)


async def _until_left(request: Request, answer: Awaitable[Response]) -> Response:
    """Wait for an answer, or until the client leaves, which cancels it."""
    task, leaving = asyncio.current_task(), asyncio.ensure_future(request.receive())
    assert task is not None
    waiting = True

    def cancel(_: object) -> None:
        # If both end in the same turn of the event loop, this runs later, when it must not end the response.
        if waiting:
            task.cancel()

    leaving.add_done_callback(cancel)
    try:
        return await answer
    except asyncio.CancelledError:
        if not leaving.done():
            raise
        task.uncancel()
        # Nobody reads the status: 499 is what web servers write into their logs for it.
        return Response(status_code=499)
    finally:
        waiting = False
        leaving.cancel()


async def _answer(
    gateway: Gateway, caller: Caller, request: ChatRequest | CompletionRequest, form: Form
) -> Response:
    """Answer a request whole, or as a stream."""
    first, deltas = await gateway.generate(caller, request)
    form.fingerprint = first.fingerprint
    if request.stream:
        counts = request.stream_options is not None and request.stream_options.include_usage
        return _EventStream(events(form, first, deltas, counts), deltas)
    try:
        return JSONResponse(form.whole(await collected(deltas)))
    finally:
        deltas.close()


class _EventStream(StreamingResponse):
    """Sends an answer as server-sent events, and closes it, also if the client has left before the first."""

    def __init__(self, events: AsyncIterator[str], deltas: Incoming) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._deltas = deltas

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._deltas.close()


def _reason(request: Request, error: Exception) -> str:
    """Return why requests can't be answered; only callers with a key may read it in full, with paths."""
    if _has_key(request):
        return str(error) if isinstance(error, RayftError) else f"{type(error).__name__}: {error}"
    return error.public if isinstance(error, NoReplicaError) else type(error).__name__


def _has_key(request: Request) -> bool:
    """Return whether a request has a known key, or none is configured."""
    with suppress(RequestError):
        identify(request.app.state.keys, request.headers.get("authorization"))
        return True
    return False


class _Application(FastAPI):
    """FastAPI's application, without its layers around the routes that answer most requests."""

    direct: Mapping[str, Callable[[Request], Coroutine[Any, Any, Response]]] = {}
    """Path → what answers a POST there: FastAPI's middleware and routing would take longer."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        handle = self.direct.get(scope["path"]) if scope.get("method") == "POST" else None
        if handle is None:
            await super().__call__(scope, receive, send)
            return
        scope["app"] = self
        request = Request(scope, receive, send)
        unknown: Exception | None = None
        try:
            response = await handle(request)
        except Exception as error:  # noqa: BLE001  (as FastAPI's own layers do)
            response = await answer_error(request, error)
            unknown = None if isinstance(error, EXPECTED) else error
        await response(scope, receive, send)
        if unknown is not None:
            # The server writes it into the log.
            raise unknown

    def openapi(self) -> dict[str, Any]:
        """Describe the interface without FastAPI's own errors, which `answer_error` replaces by ours."""
        document = super().openapi()
        for operations in document["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        return document


def create_app(
    gateway: Gateway,
    keys: Sequence[KeyConfig] = (),
    roots: Sequence[str] = (),
    max_body_bytes: int = 16 * 10**6,
) -> FastAPI:
    """Create the application.

    Args:
        gateway: calls the replicas and the director.
        keys: the callers' keys as hashes; anyone may call where there are none.
        roots: folders and URL prefixes below which adapters may be loaded.
        max_body_bytes: size of the largest body that is accepted.
    """
    app = _Application(title="rayft", version=__version__, docs_url=None, redoc_url=None)
    app.state.gateway, app.state.keys, app.state.roots = gateway, keys, roots
    app.state.max_body_bytes = max_body_bytes
    app.include_router(answers)
    app.direct = {
        route.path: route.get_route_handler() for route in answers.routes if isinstance(route, AnswerRoute)
    }
    app.include_router(router)
    for kind in (Exception, *EXPECTED):
        app.add_exception_handler(kind, answer_error)
    return app


@dataclass(frozen=True)
class IngressOptions:
    """The ingress's part of a server's configuration."""

    host: str
    port: int
    drain_seconds: float
    """Time that running requests have when the server stops."""
    waiting: tuple[float, float]
    """Seconds that a call waits while no replica is up, and in any case."""
    places: int | None
    """Number of requests that the only replica and its queue hold; None if there may be several replicas."""
    keys: tuple[KeyConfig, ...]
    """The callers' keys, as hashes."""
    roots: tuple[str, ...]
    """Folders and URL prefixes below which adapters may be loaded."""
    max_body_bytes: int
    """Size of the largest body that is accepted."""


class Ingress:
    """The process that clients talk to; Ray Serve starts it, and replaces it if it is lost.

    It listens itself: with Ray Serve's proxy in front, each request and each part of an answer would pass
    through one process more.
    """

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it.
        self,
        replica: DeploymentHandle[Any],
        director: DeploymentHandle[Any],
        options: IngressOptions,
    ) -> None:
        """Start to listen.

        Args:
            replica: handle of the replicas.
            director: handle of the director.
            options: the ingress's part of the server's configuration.

        Raises:
            ResourceError: if the address can't be listened on.
        """
        self._inbox = await Inbox.open()
        gateway = Gateway(replica, director, options.waiting, self._inbox, options.places)
        app = create_app(gateway, options.keys, options.roots, options.max_body_bytes)
        self._server: HttpServer | None = await HttpServer.start(
            app, options.host, options.port, options.drain_seconds
        )
        # As in `Replica.reconfigure`.
        gc.collect()
        gc.freeze()

    def check_health(self) -> None:
        """Let Ray Serve replace the ingress if its server has ended.

        Raises:
            ResourceError: if it has ended.
        """
        if self._server is not None:
            self._server.check()

    async def _stop(self, server: HttpServer) -> None:
        await server.stop()
        self._inbox.close()

    def __del__(self) -> Awaitable[None] | None:
        """Stop listening, and answer running requests; Ray Serve awaits this before it ends the process."""
        server, self._server = getattr(self, "_server", None), None
        return None if server is None else self._stop(server)


IngressDeployment = ray_serve.deployment(name="Ingress")(Ingress)
"""What Ray Serve runs; `rayft.serving.build` sets its size and resources."""
