from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from ray import cloudpickle
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.request_router import PendingRequest

from rayft.serving import presence
from rayft.serving import router as router_module
from rayft.serving.answers import Ticket
from rayft.serving.http.calls import Asked
from rayft.serving.http.schemas import ChatRequest, CompletionRequest, Message
from rayft.serving.router import RECENT_SECONDS, AdapterRouter, Standing, ranked

SLACK = 4
ALWAYS = (0.0, 1.0)
Reports = dict[str, dict[str, tuple[float, float]] | None]


def asked(model: str, draw: float) -> Asked:
    request = CompletionRequest(model=model, prompt="hello")
    return replace(Asked.of(request, Ticket("127.0.0.1", 1, "token", 0)), draw=draw)


@dataclass
class Running:
    """A replica as routers see it."""

    replica_id: ReplicaID
    routing_stats: dict[str, Any] = field(default_factory=dict)


class Routing:
    """A router, the reports of its replicas (None: no report yet), and the lengths of their queues."""

    def __init__(self, reports: Reports, **queues: int) -> None:
        app = DeploymentID(name="Replica", app_name="rayft")
        self.router = AdapterRouter(
            deployment_id=app, handle_source=DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True
        )
        self.router.initialize_state(slack=SLACK, called="Replica")
        self.loop = asyncio.new_event_loop()
        self.ids = {name: ReplicaID(name, app) for name in reports}
        self.report(reports)
        for name in reports:
            self.busy(name, queues.get(name, 0))

    def report(self, reports: Reports) -> None:
        self.running = [
            Running(self.ids[name], {} if warm is None else {"warm": warm}) for name, warm in reports.items()
        ]

    def busy(self, name: str, queue: int) -> None:
        self.router.replica_queue_len_cache.update(self.ids[name], queue)

    def pending(self, *args: Any) -> PendingRequest:
        metadata = RequestMetadata("id", "internal")
        return PendingRequest(list(args), {}, metadata, future=self.loop.create_future())

    def choose(self, pending: PendingRequest) -> list[str]:
        """Rank the replicas for a request that has not been sent yet."""
        running: Any = self.running
        ranks = self.loop.run_until_complete(self.router.choose_replicas(running, pending))
        assert pending.routing_context.should_backoff
        assert [len(rank) for rank in ranks] == [1] * len(running)
        return [rank[0].replica_id.unique_id for rank in ranks]

    def send(self, pending: PendingRequest) -> None:
        """Do what Ray Serve does once a replica is chosen; tests set the resulting queues by `busy`."""
        pending.future.set_result(None)
        self.loop.run_until_complete(asyncio.sleep(0))

    def order(self, *args: Any) -> list[str]:
        pending = self.pending(*args)
        ranks = self.choose(pending)
        self.send(pending)
        return ranks

    def ask(self, model: str, draw: float = 0.5) -> str:
        """Return the replica that is tried first for a request."""
        return self.order([asked(model, draw)])[0]

    def several(self, model: str, draw: float = 0.5) -> set[str]:
        return {self.ask(model, draw) for _ in range(40)}


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    now = [1000.0]
    monkeypatch.setattr(router_module.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


@pytest.mark.parametrize(
    ("standings", "first"),
    [
        ({"a": (True, 3), "b": (False, 0)}, "a"),
        ({"a": (True, 2), "b": (True, 1), "c": (False, 0)}, "b"),
        ({"a": (True, SLACK), "b": (False, 0)}, "a"),
        ({"a": (True, SLACK + 1), "b": (False, 0)}, "b"),
        ({"a": (True, SLACK + 1), "b": (True, SLACK), "c": (False, 0)}, "b"),
        ({"a": (True, 9), "b": (True, 8), "c": (False, 1), "d": (False, 2)}, "c"),
        ({"a": (True, 9), "b": (False, 5)}, "a"),
        ({"a": (False, 2), "b": (False, 1)}, "b"),
        ({"a": (False, 1, 0), "b": (False, 0, 5)}, "b"),
        ({"a": (False, 0, 2), "b": (False, 0, 1)}, "b"),
    ],
)
def test_a_warm_replica_comes_first_unless_it_is_too_busy(standings: dict[str, Any], first: str) -> None:
    made = {name: Standing(*one) for name, one in standings.items()}
    assert {ranked(made, SLACK)[0] for _ in range(40)} == {first}
    assert set(ranked(made, SLACK)) == set(standings)


def test_an_overloaded_warm_replica_counts_as_cold() -> None:
    busy = {"a": Standing(True, 9), "b": Standing(False, 1), "c": Standing(False, 12)}
    assert ranked(busy, SLACK) == ["b", "a", "c"]
    assert ranked({}, SLACK) == []


def test_equal_replicas_take_turns() -> None:
    for warm in (False, True):
        alike = {name: Standing(warm, 1) for name in "abc"}
        assert {ranked(alike, SLACK)[0] for _ in range(100)} == set("abc")


@pytest.mark.parametrize("model", ["x", "x@1", "x@best", "x@r2", "x@1@r2", "x@best@r8"])
def test_requests_by_any_name_of_an_adapter_go_where_it_is_warm(model: str) -> None:
    warm = {"x": ALWAYS, "x@1": ALWAYS, "x@best": ALWAYS}
    routing = Routing({"a": {"y": ALWAYS}, "b": warm, "c": {}}, b=2)
    assert routing.several(model) == {"b"}
    chat = ChatRequest(model=model, messages=[Message(role="user", content="hello")])
    assert routing.order([Asked.of(chat, Ticket("127.0.0.1", 1, "token", 0))])[0] == "b"


def test_a_request_during_a_canary_goes_where_its_version_is() -> None:
    old, new = {"x": (0.25, 1.0), "x@1": ALWAYS}, {"x": (0.0, 0.25), "x@2": ALWAYS}
    routing = Routing({"a": old, "b": new, "c": {}}, a=1, b=1)
    for draw, replica in ((0.0, "b"), (0.2, "b"), (0.25, "a"), (0.99, "a")):
        assert routing.several("x", draw) == {replica}
        assert routing.several("x@1", draw) == {"a"}
        assert routing.several("x@2@r2", draw) == {"b"}
    # An adapter that is warm nowhere does not go to the same replica.
    routing.report({"a": old, "b": {}, "c": {}})
    assert routing.several("x", 0.1) == {"c"}


def test_requests_for_the_base_go_to_the_least_busy_replica() -> None:
    base = {"base": ALWAYS, "org/tiny": ALWAYS}
    routing = Routing({"a": base, "b": base, "c": base}, a=1)
    for model in ("base", "org/tiny"):
        assert routing.several(model) == {"b", "c"}
    routing.busy("b", 3)
    routing.busy("c", 2)
    assert routing.several("base") == {"a"}


def test_a_burst_is_divided_before_its_first_request_is_sent() -> None:
    routing = Routing({"a": {"x": ALWAYS}, "b": {}})
    burst = [routing.pending([asked("x", 0.5)]) for _ in range(2 * SLACK + 4)]
    first = [routing.choose(one)[0] for one in burst]
    # The warm replica gets requests up to the slack, then the less busy one.
    assert first[: SLACK + 2] == ["a"] * (SLACK + 1) + ["b"]
    assert Counter(first) == {"a": SLACK + 4, "b": SLACK}
    # Sent requests are part of the queues' lengths, and count once.
    for one in burst:
        routing.send(one)
    assert routing.ask("x") == "a"


def test_a_request_that_is_routed_again_or_abandoned_does_not_count_twice() -> None:
    routing = Routing({"a": {"x": ALWAYS}, "b": {}}, a=SLACK)
    waiting = routing.pending([asked("x", 0.5)])
    assert [routing.choose(waiting)[0] for _ in range(3)] == ["a"] * 3
    assert routing.ask("x") == "b"
    waiting.future.cancel()
    routing.loop.run_until_complete(asyncio.sleep(0))
    assert routing.ask("x") == "a"


def test_a_burst_for_a_cold_adapter_loads_it_once(later: Callable[[float], None]) -> None:
    routing = Routing({"a": {}, "b": {}, "c": None})
    first = routing.ask("x")
    # Another cold adapter goes to another replica, although all are equally busy.
    second = routing.ask("y")
    assert first != second
    assert {routing.ask("z"), first, second} == {"a", "b", "c"}
    routing.busy(first, 1)
    later(RECENT_SECONDS / 2)
    assert (routing.several("x"), routing.several("y")) == ({first}, {second})
    routing.busy(first, SLACK + 1)
    assert first not in routing.several("x")


def test_an_adapter_counts_as_warm_for_a_while_where_it_was_sent(later: Callable[[float], None]) -> None:
    routing = Routing({"a": {}, "b": {}}, b=1)
    assert routing.ask("x") == "a"
    routing.busy("a", 2)
    later(RECENT_SECONDS / 2)
    assert routing.several("x") == {"a"}
    # Another request does not prolong this while no replica reports the adapter as warm.
    later(RECENT_SECONDS / 2)
    assert routing.several("x") == {"b"}


def test_a_warm_adapter_does_not_count_as_loading(later: Callable[[float], None]) -> None:
    routing = Routing({"a": {"base": ALWAYS, "x": ALWAYS}, "b": {}}, b=1)
    assert (routing.several("base"), routing.several("x")) == ({"a"}, {"a"})
    routing.busy("b", 0)
    places = []
    for _ in range(40):
        places.append(routing.ask("cold"))
        later(2 * RECENT_SECONDS)
        routing.ask("x")
    assert set(places) == {"a", "b"}


def test_a_replicas_report_overrides_what_was_sent(later: Callable[[float], None]) -> None:
    routing = Routing({"a": {}, "b": {}}, b=1)
    assert routing.ask("x") == "a"
    routing.report({"a": {}, "b": {"x": ALWAYS}})
    assert routing.several("x") == {"b"}
    routing.report({"a": None})
    assert routing.several("x") == {"a"}


def test_a_request_goes_to_a_replica_that_can_load_its_adapter_if_there_is_one() -> None:
    routing = Routing({"a": {"base": ALWAYS}, "b": {"base": ALWAYS}}, b=SLACK + 3)
    routing.running[0].routing_stats["lacking"] = {"x": ALWAYS, "y": (0.0, 0.25)}
    running: Any = routing.running

    def order(model: str, draw: float) -> list[str]:
        pending = routing.pending([asked(model, draw)])
        ranks = routing.loop.run_until_complete(routing.router.choose_replicas(running, pending))
        return [rank[0].replica_id.unique_id for rank in ranks]

    assert order("x", 0.5) == order("x@r2", 0.5) == order("y", 0.1) == ["b"]
    assert order("y", 0.5) == order("base", 0.5) == ["a", "b"]
    routing.running[1].routing_stats["lacking"] = {"x": ALWAYS}
    assert order("x", 0.5) == ["a", "b"]


def test_a_process_knows_whether_a_replica_is_up_once_a_router_knows_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(presence, "_routers", {"Replica": [], "Director": []})
    routing = Routing({"a": {}})

    async def update(*replicas: Any) -> bool | None:
        monkeypatch.setattr(routing.router, "_probe_queue_lens", lambda *_: asyncio.sleep(0))
        routing.router.update_replicas(list(replicas))
        await asyncio.sleep(0)
        return presence.replicas_up("Replica")

    assert presence.replicas_up("Replica") is None
    assert presence.running("Replica") == 0
    assert routing.loop.run_until_complete(update()) is False
    assert presence.running("Replica") == 0
    assert routing.loop.run_until_complete(update(*routing.running)) is True
    assert presence.running("Replica") == 1
    routing.router.on_replica_actor_died(routing.ids["a"])
    assert presence.replicas_up("Replica") is False
    assert presence.replicas_up("Director") is None


def test_a_router_that_was_pickled_by_value_informs_its_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(presence, "_routers", {"Replica": [], "Director": []})
    # Pickled as Ray Serve does, in a process that has routers of its own.
    presence.register(Routing({}).router, "Replica")
    cloudpickle.register_pickle_by_value(router_module)
    try:
        sent = cloudpickle.dumps(AdapterRouter)
    finally:
        cloudpickle.unregister_pickle_by_value(router_module)
    code = (
        "import sys; from ray import cloudpickle; from rayft.serving import presence, router; "
        "made = cloudpickle.loads(sys.stdin.buffer.read()); assert made is not router.AdapterRouter; "
        "assert made.update_replicas.__globals__['presence'] is presence"
    )
    subprocess.run([sys.executable, "-c", code], input=sent, check=True)


def test_a_lost_replica_is_no_longer_counted(later: Callable[[float], None]) -> None:
    routing = Routing({"a": {}, "b": {}}, b=1)
    assert routing.ask("x") == "a"
    routing.report({"b": {}})
    assert routing.several("x") == {"b"}
    routing.report({})
    assert routing.order([asked("x", 0.5)]) == []


def test_a_call_that_generates_no_text_goes_to_the_least_busy_replica() -> None:
    routing = Routing({"a": {"x": ALWAYS}, "b": {}}, a=1)
    for args in ((), (7,), ([],), ("prepare", 0.5)):
        assert routing.order(*args) == ["b", "a"]
