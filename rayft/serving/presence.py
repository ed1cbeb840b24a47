"""Calls from the ingress to the replicas and the director, any of which may be down.

Ray Serve lets a call wait without a limit until a replica of the deployment is up. `Waiting` limits that
time; its error then says why no replica is up, as far as Ray Serve's controller knows. The director is the
only replica of a deployment of its own.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import ray.serve as ray_serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.request_router import RequestRouter
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

from rayft.errors import RequestTimeoutError, ResourceError
from rayft.serving.deployment import APPLICATION

__all__ = [
    "Called",
    "NoReplicaError",
    "Waiting",
    "cause_of",
    "ending",
    "error_of",
    "register",
    "replicas_up",
    "running",
    "start_error",
]

CHECK_SECONDS = 0.25
"""Interval at which a waiting call checks whether a replica is up."""

CONTROLLER_SECONDS = 1.0
"""Time limit for Ray Serve's controller to say why a replica did not start."""

UNKNOWN_SECONDS = 10.0
"""Shortest time that a call waits in a process whose routers do not know yet which replicas are running."""

REASON_SECONDS = 1.0
"""Time for which the controller's answer is reused."""

Result = TypeVar("Result")

Called = Literal["Director", "Replica"]
"""Name of the deployment that a call goes to."""

ABSENT = {
    "Replica": ("no replica is up", "because none starts", "one is starting"),
    "Director": (
        "the director, which knows what is served, is not up", "because it does not start", "it is starting",
    ),
}  # fmt: skip
"""Parts of the error about a deployment that is not up: the fact; what precedes a known reason; what is said
if no reason is known."""


_routers: dict[Called, list[RequestRouter]] = {"Director": [], "Replica": []}
"""The routers of this process that know which replicas of a deployment are running."""


def register(router: RequestRouter, called: Called) -> None:
    """Register a router of this process, once it knows which replicas of a deployment are running."""
    if router not in _routers[called]:
        _routers[called].append(router)


def replicas_up(called: Called) -> bool | None:
    """Return whether a router of this process knows a running replica; None if none has been informed yet."""
    return running(called) > 0 if _routers[called] else None


def running(called: Called) -> int:
    """Return how many replicas of a deployment the routers of this process know to be running."""
    return max((len(router.curr_replicas) for router in _routers[called]), default=0)


class NoReplicaError(ResourceError):
    """No replica of a deployment is up."""

    def __init__(self, called: Called, why: str = "") -> None:
        what, because, else_ = ABSENT[called]
        self.public = f"{what}, {because}" if why else f"{what}; {else_}"
        """The message without the reason, which only callers with a key may read: it may contain paths."""
        super().__init__(f"{self.public}: {why}" if why else self.public)


class Waiting:
    """Waits for answers from the replicas of a deployment, as long as a replica is up."""

    def __init__(
        self, called: Called, absent_seconds: float, seconds: float, refused: Callable[[], object]
    ) -> None:
        """Set the limits.

        Args:
            called: the deployment.
            absent_seconds: how long a call waits while no replica is up.
            seconds: how long a call waits altogether.
            refused: called when a call ends because no replica is up.
        """
        self._called, self._refused = called, refused
        self._absent_seconds, self._seconds = absent_seconds, seconds
        self._reason = _Reason("", -REASON_SECONDS)
        self._asking = asyncio.Lock()

    async def answer(self, call: Awaitable[Result], cancel: Callable[[], object]) -> Result:
        """Return the result of a call.

        Args:
            call: the call.
            cancel: called if the call is abandoned.

        Raises:
            NoReplicaError: if no replica is up, and none starts in time.
            RequestTimeoutError: if no replica answers in time.
        """
        task = asyncio.ensure_future(call)
        started = seen = time.monotonic()
        reason: asyncio.Task[str] | None = None
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=CHECK_SECONDS)
                now = time.monotonic()
                up = replicas_up(self._called)
                if up:
                    seen = now
                elif reason is None:
                    reason = asyncio.create_task(self._why())
                if task.done():
                    break
                if now - seen >= max(self._absent_seconds, 0.0 if up is False else UNKNOWN_SECONDS):
                    raise self._absent(await (reason or self._why()))
                if now - started >= self._seconds:
                    raise RequestTimeoutError(
                        f"no replica took the request within {self._seconds:g} seconds; try again later"
                    )
            return task.result()
        except DeploymentUnavailableError as error:
            raise self._absent(await (reason or self._why())) from error
        finally:
            if reason:
                reason.cancel()
            if not task.done():
                cancel()
                task.cancel()
            # It may end with an error that nobody waits for; if this is cancelled, it may have already.
            task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())

    async def _why(self) -> str:
        """Return why no replica is up; the controller is asked once for all waiting calls."""
        async with self._asking:
            if time.monotonic() - self._reason.when > REASON_SECONDS:
                self._reason = _Reason(await _controllers_reason(), time.monotonic())
            return self._reason.text

    def _absent(self, why: str) -> NoReplicaError:
        self._refused()
        return NoReplicaError(self._called, why)


@dataclass(frozen=True)
class _Reason:
    text: str
    when: float


async def _controllers_reason() -> str:
    try:
        async with asyncio.timeout(CONTROLLER_SECONDS):
            return await asyncio.to_thread(start_error) or ""
    except (TimeoutError, RayError, RayServeException):
        return ""


def start_error() -> str | None:
    """Return why a replica did not start, or None if Ray Serve does not know (see `error_of`)."""
    return error_of(ray_serve.status().applications.get(APPLICATION))


def cause_of(error: Exception) -> Exception:
    """Return the error itself, or if another process raised it there, the error as it was raised."""
    return error.cause if isinstance(error, RayTaskError) else error


def error_of(application: ApplicationStatusOverview | None) -> str | None:
    """Return why a replica did not start, or None if that is not known.

    The reason is the last line of the replica's traceback, which Ray Serve keeps as text, or, if no node has
    room for a replica, Ray Serve's message about the resources that it needs.
    """
    messages = [deployment.message for deployment in application.deployments.values()] if application else []
    lines = [line.strip() for text in messages for line in text.splitlines()]
    errors = [line for line in lines if re.match(r"[\w.]+Error: ", line)]
    unplaced = [line for line in lines if "to be scheduled" in line]
    return next(iter([*reversed(errors), *unplaced]), None)


def ending() -> bool:
    """Return whether this process is a replica of an application that is being deleted."""
    try:
        name = ray_serve.get_replica_context().app_name
    except RayServeException:
        return False
    application = ray_serve.status().applications.get(name)
    return application is None or application.status == ApplicationStatus.DELETING
