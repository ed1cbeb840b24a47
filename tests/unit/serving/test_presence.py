from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import ray.serve as ray_serve
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import DeploymentUnavailableError

from rayft.errors import RequestTimeoutError, UnknownModelError
from rayft.serving import presence
from rayft.serving.presence import Called, NoReplicaError, Waiting


class Replicas:
    """Whether a replica is up, why none is, and what happened to a call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.up: bool | None = False
        self.reason, self.cancelled, self.refused = "", 0, 0
        monkeypatch.setattr(presence, "replicas_up", lambda _called: self.up)
        monkeypatch.setattr(presence, "start_error", lambda: self.reason or None)
        monkeypatch.setattr(presence, "CHECK_SECONDS", 0.01)

    def ask(
        self, call: Awaitable[Any], absent: float = 0.05, most: float = 60.0, called: Called = "Replica"
    ) -> Any:
        async def run() -> Any:
            return await Waiting(called, absent, most, self.refuse).answer(call, self.cancel)

        return asyncio.run(run())

    def cancel(self) -> None:
        self.cancelled += 1

    def refuse(self) -> None:
        self.refused += 1


@pytest.fixture
def replicas(monkeypatch: pytest.MonkeyPatch) -> Replicas:
    return Replicas(monkeypatch)


async def answer(seconds: float, error: Exception | None = None) -> str:
    await asyncio.sleep(seconds)
    if error:
        raise error
    return "text"


def test_an_answer_is_returned_and_an_error_is_raised(replicas: Replicas) -> None:
    assert replicas.ask(answer(0)) == "text"
    replicas.up = True
    assert replicas.ask(answer(0.2)) == "text"
    with pytest.raises(UnknownModelError, match="nobody"):
        replicas.ask(answer(0, UnknownModelError("nobody")))
    assert (replicas.cancelled, replicas.refused) == (0, 0)


def test_a_call_waits_for_a_limited_time_while_no_replica_is_up(replicas: Replicas) -> None:
    with pytest.raises(NoReplicaError, match="no replica is up; one is starting"):
        replicas.ask(answer(60))
    replicas.reason = "rayft.errors.ModelError: no file"
    with pytest.raises(NoReplicaError, match=r"none starts: .*no file"):
        replicas.ask(answer(60))
    assert (replicas.cancelled, replicas.refused) == (2, 2)
    # A replica that starts in time answers.
    assert replicas.ask(answer(0.05), absent=30) == "text"


def test_a_process_that_does_not_know_the_replicas_yet_waits_longer(
    replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    replicas.up = None
    assert replicas.ask(answer(0.2)) == "text"
    monkeypatch.setattr(presence, "UNKNOWN_SECONDS", 0.1)
    with pytest.raises(NoReplicaError, match="no replica is up"):
        replicas.ask(answer(60))


def test_a_call_that_no_replica_accepts_ends_after_the_limit(replicas: Replicas) -> None:
    replicas.up = True
    with pytest.raises(RequestTimeoutError, match=r"within 0\.05 seconds"):
        replicas.ask(answer(60), most=0.05)
    assert replicas.cancelled == 1


def test_the_error_of_a_call_that_nobody_waits_for_any_more_is_not_reported(replicas: Replicas) -> None:
    reported: list[Any] = []

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: reported.append(context))
        call = asyncio.ensure_future(answer(0, UnknownModelError("nobody", param="model")))
        waiting = asyncio.ensure_future(
            Waiting("Replica", 1.0, 60.0, replicas.refuse).answer(call, replicas.cancel)
        )
        while not call.done():
            await asyncio.sleep(0)
        # The client leaves before the error arrives.
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        del call
        gc.collect()

    asyncio.run(run())
    assert reported == []
    assert replicas.cancelled == 0


def test_ray_serves_own_error_without_replicas_becomes_the_same_error(replicas: Replicas) -> None:
    unavailable = DeploymentUnavailableError(DeploymentID("Replica", "rayft"))
    with pytest.raises(NoReplicaError, match="no replica is up"):
        replicas.ask(answer(0, unavailable))


def test_the_error_about_a_director_that_does_not_start_has_the_reason(replicas: Replicas) -> None:
    with pytest.raises(NoReplicaError, match=r"the director.* is not up; it is starting"):
        replicas.ask(answer(60), called="Director")
    replicas.reason = "rayft.errors.ArtifactError: /nowhere"
    with pytest.raises(
        NoReplicaError, match=r"the director.* because it does not start: .*/nowhere"
    ) as found:
        replicas.ask(answer(60), called="Director")
    assert "nowhere" not in found.value.public


@dataclass
class Status:
    """Return the application's status as Ray Serve's controller reports it, with one message."""

    message: str = ""


def reason(monkeypatch: pytest.MonkeyPatch, **messages: str) -> str | None:
    application = SimpleNamespace(deployments={name: Status(text) for name, text in messages.items()})
    status = SimpleNamespace(applications={presence.APPLICATION: application})
    monkeypatch.setattr(ray_serve, "status", lambda: status)
    return presence.start_error()


def test_the_reason_is_the_last_error_or_else_that_no_node_has_room(monkeypatch: pytest.MonkeyPatch) -> None:
    error = "Traceback\n  File x\nrayft.errors.ModelError: on node-1: no file\n"
    waits = "Deployment 'Replica' has 1 replicas that have taken more than 30s to be scheduled. {\"CPU\": 8}."
    slow = "has 1 replicas that have taken more than 30s to initialize.\nThis may be slow."
    assert reason(monkeypatch) is None
    assert reason(monkeypatch, Replica=slow) is None
    assert reason(monkeypatch, Replica=waits) == waits
    assert reason(monkeypatch, Replica=waits, Director=error) == "rayft.errors.ModelError: on node-1: no file"
