from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from rayft.errors import ResourceError
from rayft.serving.answers import Inbox
from rayft.serving.http import gateway as module
from rayft.serving.http.auth import ANYONE
from rayft.serving.http.gateway import Gateway
from rayft.serving.http.schemas import CompletionRequest
from rayft.serving.messages import Delta


class Handle:
    """A handle of replicas that answer by a function; it counts the calls by reference and by value."""

    def __init__(self, answer: Callable[..., Awaitable[None]]) -> None:
        self.calls: list[str] = []
        self._answer = answer

    def _init(self, **_: Any) -> None:
        pass

    def options(self, *, _by_reference: bool, request_serialization: str) -> SimpleNamespace:
        assert (_by_reference, request_serialization) == (False, "pickle")
        return self._called("value")

    @property
    def answer(self) -> Any:
        return self._called("reference").answer

    def _called(self, how: str) -> SimpleNamespace:
        def remote(*arguments: Any) -> Any:
            self.calls.append(how)
            task = asyncio.ensure_future(self._answer(*arguments))
            return _Call(task)

        return SimpleNamespace(answer=SimpleNamespace(remote=remote))


class _Call:
    def __init__(self, task: asyncio.Future[None]) -> None:
        self._task = task

    def __await__(self) -> Any:
        return self._task.__await__()

    def cancel(self) -> None:
        self._task.cancel()


def request(prompt: Any = "a") -> CompletionRequest:
    return CompletionRequest(model="base", prompt=prompt, max_tokens=1)


async def asked(
    answer: Callable[..., Awaitable[None]], wanted: CompletionRequest
) -> tuple[Handle, list[Delta], Exception | None]:
    inbox = await Inbox.open("127.0.0.1")
    handle: Any = Handle(answer)
    gateway = Gateway(handle, handle, (1.0, 20.0), inbox)
    found: list[Delta] = []
    try:
        first, deltas = await gateway.generate(ANYONE, wanted)
        found.append(first)
        async for delta in deltas:
            found.append(delta)
    except ResourceError as error:
        return handle, found, error
    finally:
        inbox.close()
    return handle, found, None


def test_a_request_that_the_replica_has_cancelled_fails_at_once() -> None:
    async def cancelled(*_: Any) -> None:
        raise asyncio.CancelledError

    _, found, error = asyncio.run(asyncio.wait_for(asked(cancelled, request()), 5))
    assert (found, str(error)) == ([], "the replica that was to answer was lost; try again")


def test_an_answer_whose_last_part_is_lost_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LAST_SECONDS", 0.1)

    async def silent(*_: Any) -> None:
        pass

    _, found, error = asyncio.run(asyncio.wait_for(asked(silent, request()), 5))
    assert (found, str(error)) == ([], "the replica that was to answer was lost; try again")


@pytest.mark.parametrize(
    ("prompt", "how"), [("a" * 1000, "value"), ("a" * 10**6, "reference"), ([7] * 10**6, "reference")]
)
def test_large_requests_are_passed_by_reference(
    prompt: Any, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LAST_SECONDS", 0.1)

    async def silent(*_: Any) -> None:
        pass

    handle, _, _ = asyncio.run(asyncio.wait_for(asked(silent, request(prompt)), 10))
    assert handle.calls == [how]


STOPPED = ResourceError("the engine has stopped")


@pytest.mark.parametrize(
    ("replicas", "found"),
    [
        ([{}], {"status": "ready", "change": 3, "unavailable": 0}),
        (
            [{"a@1": "deleted"}, {"b@1": "deleted", "a@1": "deleted"}],
            {"status": "ready", "change": 3, "unavailable": 2},
        ),
        ([STOPPED, {"a@1": "deleted"}], {"status": "ready", "change": 3, "unavailable": 1}),
        ([STOPPED], "the engine has stopped"),
        ([STOPPED, STOPPED], "the engine has stopped"),
    ],
)
def test_it_is_ready_while_the_engine_of_a_replica_runs(replicas: list[Any], found: object) -> None:
    async def returned(value: Any) -> Any:
        if isinstance(value, Exception):
            raise value
        return value

    def method(value: Any) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda: _Call(asyncio.ensure_future(returned(value))))

    async def readiness() -> object:
        inbox = await Inbox.open("127.0.0.1")
        replica: Any = SimpleNamespace(
            _init=lambda **_: None,
            options=lambda **_: SimpleNamespace(answer=None),
            answer=None,
            serving=method(None),
            check_health=method(replicas[0]),
            broadcast=lambda _: SimpleNamespace(results_async=lambda **_: returned(replicas)),
        )
        director: Any = SimpleNamespace(number=method(3))
        try:
            return await Gateway(replica, director, (1.0, 20.0), inbox).readiness()
        except ResourceError as error:
            return str(error)
        finally:
            inbox.close()

    assert asyncio.run(readiness()) == found
