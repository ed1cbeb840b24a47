from __future__ import annotations

import asyncio
import pickle
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError

from rayft.errors import (
    BadRequestError,
    RequestError,
    ResourceError,
    TooManyRequestsError,
    UnknownModelError,
)
from rayft.serving.answers import Inbox, Outbox
from rayft.serving.control.state import Served, parse_model
from rayft.serving.http import calls as calls_module
from rayft.serving.http import gateway as module
from rayft.serving.http.auth import ANYONE, Caller
from rayft.serving.http.calls import Asked
from rayft.serving.http.errors import describe_error
from rayft.serving.http.gateway import Gateway
from rayft.serving.http.schemas import CompletionRequest
from rayft.serving.messages import Delta


class Handle:
    """A handle of replicas that answer by a function; it records the calls by reference and by value."""

    def __init__(self, answer: Callable[..., Awaitable[None]]) -> None:
        self.calls: list[str] = []
        self.made: list[_Call] = []
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
            self.made.append(_Call(asyncio.ensure_future(self._answer(*arguments))))
            return self.made[-1]

        return SimpleNamespace(answer=SimpleNamespace(remote=remote))


class _Call:
    def __init__(self, task: asyncio.Future[None]) -> None:
        self._task = task

    def __await__(self) -> Any:
        return self._task.__await__()

    def cancel(self) -> None:
        self._task.cancel()

    @property
    def cancelled(self) -> bool:
        return self._task.cancelled()


async def silent(asked: Sequence[Asked]) -> list[None]:
    return [None for _ in asked]


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
    monkeypatch.setattr(calls_module, "LAST_SECONDS", 0.1)

    _, found, error = asyncio.run(asyncio.wait_for(asked(silent, request()), 5))
    assert (found, str(error)) == ([], "the replica that was to answer was lost; try again")


@pytest.mark.parametrize(
    ("prompt", "how"), [("a" * 1000, "value"), ("a" * 2 * 10**6, "reference"), ([7] * 10**6, "reference")]
)
def test_large_requests_are_passed_by_reference(
    prompt: Any, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls_module, "LAST_SECONDS", 0.1)

    handle, _, _ = asyncio.run(asyncio.wait_for(asked(silent, request(prompt)), 10))
    assert handle.calls == [how]


class Echo:
    """A replica that answers each request with its prompt, but refuses the prompt `bad`."""

    def __init__(self) -> None:
        self.together: list[list[str]] = []
        self._outbox = Outbox()

    async def answer(self, asked: Sequence[Asked]) -> list[None]:
        self.together.append([one.request.prompts[0] for one in asked])
        await asyncio.gather(*(self._outbox.send(one.ticket, self._deltas(one)) for one in asked))
        return [None for _ in asked]

    async def _deltas(self, one: Asked) -> AsyncGenerator[Delta, None]:
        if one.request.prompts[0] == "bad":
            raise BadRequestError("the prompt is bad", param="prompt")
        yield Delta("", 1, 0)
        await asyncio.sleep(0.05)
        yield Delta(one.request.prompts[0], 1, 1, "length")


async def asked_at_once(handle: Any, prompts: Sequence[str], places: int | None) -> list[str | BaseException]:
    inbox = await Inbox.open("127.0.0.1")
    gateway = Gateway(handle, handle, (1.0, 20.0), inbox, places)

    async def text(prompt: str) -> str:
        _, deltas = await gateway.generate(ANYONE, request(prompt))
        return "".join([delta.text async for delta in deltas])

    try:
        async with asyncio.timeout(10):
            return await asyncio.gather(*map(text, prompts), return_exceptions=True)
    finally:
        inbox.close()


@pytest.mark.parametrize(
    ("running", "places", "together"),
    [(1, 9, [["a", "b", "c"]]), (2, 9, [["a"], ["b"], ["c"]]), (1, None, [["a"], ["b"], ["c"]])],
)
def test_requests_that_come_together_are_sent_together_if_there_is_one_replica(
    running: int, places: int | None, together: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "running", lambda _: running)
    replica = Echo()
    found = asyncio.run(asked_at_once(Handle(replica.answer), ["a", "b", "c"], places))
    assert found == ["a", "b", "c"]
    assert replica.together == together


def test_a_request_that_is_refused_does_not_affect_those_sent_with_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "running", lambda _: 1)
    replica = Echo()
    first, refused, last = asyncio.run(asked_at_once(Handle(replica.answer), ["a", "bad", "c"], 9))
    assert (first, last) == ("a", "c")
    assert isinstance(refused, RequestError)
    assert (str(refused), refused.status, refused.param) == ("the prompt is bad", 400, "prompt")
    assert len(replica.together) == 1


def test_requests_sent_together_are_refused_beyond_the_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "running", lambda _: 1)
    found = asyncio.run(asked_at_once(Handle(Echo().answer), "abcde", 3))
    assert found[:3] == ["a", "b", "c"]
    assert [type(one) for one in found[3:]] == [TooManyRequestsError] * 2


def test_the_tracebacks_of_requests_that_fail_together_have_only_their_own_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "running", lambda _: 1)

    async def die(_: Sequence[Asked]) -> None:
        raise ActorDiedError

    found = asyncio.run(asked_at_once(Handle(die), ["a"] * 64, 99))
    for error in found:
        assert isinstance(error, ActorDiedError)
        assert len(traceback.extract_tb(error.__traceback__)) < 20


def test_requests_that_are_large_together_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "running", lambda _: 1)
    each = len(pickle.dumps(request("a" * 4000)))
    monkeypatch.setattr(calls_module, "LARGE", 2 * each + 100)
    replica, prompts = Echo(), ["a" * 4000, "b" * 4000, "c" * 4000, "d" * 20000, "e"]
    handle = Handle(replica.answer)
    assert asyncio.run(asked_at_once(handle, prompts, 9)) == prompts
    assert replica.together == [prompts[:2], prompts[2:3], prompts[3:4], prompts[4:]]
    assert handle.calls == ["value", "value", "reference", "value"]


def test_a_call_is_cancelled_when_nobody_waits_for_any_of_its_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "running", lambda _: 1)

    async def scenario() -> None:
        inbox = await Inbox.open("127.0.0.1")
        handle: Any = Handle(lambda _: asyncio.sleep(3600))
        gateway = Gateway(handle, handle, (1.0, 20.0), inbox, 9)
        first, second = (asyncio.create_task(gateway.generate(ANYONE, request())) for _ in range(2))
        await asyncio.sleep(0.05)
        (call,) = handle.made
        first.cancel()
        await asyncio.sleep(0.05)
        assert not call.cancelled
        second.cancel()
        await asyncio.sleep(0.05)
        assert call.cancelled
        inbox.close()

    asyncio.run(scenario())


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


def replicas(**methods: Callable[..., Awaitable[Any]]) -> Any:
    """Return a handle of replicas, or of the director, with these methods."""

    def called(method: Callable[..., Awaitable[Any]]) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda *given: _Call(asyncio.ensure_future(method(*given))))

    made: Any = {name: called(method) for name, method in methods.items()}
    made.setdefault("answer", None)
    options = SimpleNamespace(answer=made["answer"])
    return SimpleNamespace(_init=lambda **_: None, options=lambda **_: options, **made)


async def with_gateway(replica: Any, director: Any, use: Callable[[Gateway], Awaitable[Any]]) -> Any:
    inbox = await Inbox.open("127.0.0.1")
    try:
        return await use(Gateway(replica, director, (1.0, 20.0), inbox))
    finally:
        inbox.close()


def unknown(model: str) -> RayTaskError:
    """Return the error of a replica that serves an adapter of another caller, and not this model."""
    versions: Any = (SimpleNamespace(name="secret"),)
    try:
        Served(versions=versions).pick(parse_model(model))
    except UnknownModelError as error:
        return RayTaskError("meant", "", error)
    raise AssertionError


@pytest.mark.parametrize("model", ["base@1", "base@r2", "mine"])
def test_an_error_names_no_adapters_of_others(model: str) -> None:
    async def fail(*_: Any) -> Any:
        raise unknown(model)

    async def both(caller: Caller) -> list[str]:
        async def use(gateway: Gateway) -> list[str]:
            body = CompletionRequest(model=model, prompt="a")
            calls = [gateway.model(caller, model), gateway.generate(caller, body)]
            errors: Any = await asyncio.gather(*calls, return_exceptions=True)
            return [describe_error(error)[1]["error"]["message"] for error in errors]

        found: list[str] = await with_gateway(replicas(meant=fail, answer=fail), replicas(), use)
        return found

    for message in asyncio.run(both(Caller("ann", False, ("base", "mine")))):
        assert message == f"no model '{model}' is served here; see /v1/models"
    for message in asyncio.run(both(ANYONE)):
        assert "served are base, secret" in message


def test_a_full_queue_is_answered_429_whatever_is_asked() -> None:
    async def full(*_: Any) -> Any:
        raise BackPressureError(1, 1)

    async def number() -> int:
        return 1

    async def use(gateway: Gateway) -> None:
        for call in (gateway.models(ANYONE), gateway.model(ANYONE, "base"), gateway.readiness()):
            with pytest.raises(TooManyRequestsError):
                await call

    replica = replicas(models=full, meant=full, serving=full)
    asyncio.run(with_gateway(replica, replicas(number=number), use))


def test_questions_at_the_same_time_whether_it_is_ready_are_one() -> None:
    calls: list[int] = []

    async def number() -> int:
        calls.append(1)
        await asyncio.sleep(0.05)
        raise ResourceError(f"failure {len(calls)}")

    async def use(gateway: Gateway) -> None:
        asked = [asyncio.create_task(gateway.readiness()) for _ in range(5)]
        await asyncio.sleep(0.01)
        # One that leaves does not take the answer from the others.
        asked[0].cancel()
        first, *others = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(first, asyncio.CancelledError)
        assert [str(one) for one in others] == ["failure 1"] * 4
        with pytest.raises(ResourceError, match="failure 2"):
            await gateway.readiness()

    asyncio.run(with_gateway(replicas(), replicas(number=number), use))
