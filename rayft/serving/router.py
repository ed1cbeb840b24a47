"""Routes a request to a replica that has its adapter warm (on the device), unless that replica is too busy.

Ray Serve's controller regularly collects from each replica which `model`s are warm there (`Catalog.warm`),
and passes them to the routers, one in each process that calls replicas. If a router sends a request for a
cold adapter, it counts the adapter as warm on that replica until the replica can have reported it: otherwise
a burst of requests would load the adapter on all replicas. A replica also reports which `model`s it can't
load (`Catalog.lacking`); requests for them go to the other replicas, if any has them.
"""

from __future__ import annotations

import random
import time
from asyncio import Future
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from rayft.serving import presence
from rayft.serving.control.state import parse_model
from rayft.serving.http.calls import Asked

__all__ = ["AdapterRouter", "Standing", "ranked"]

RECENT_SECONDS = 3.0
"""How long an adapter counts as warm on the replica that a request for it was sent to, without a report."""

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Standing:
    """What decides how suitable one replica is for one request."""

    warm: bool
    """Whether the request's adapter is on its device."""
    queue: int
    """Number of requests that it runs, holds waiting, or is about to receive."""
    loading: int = 0
    """Number of cold adapters that it was recently sent requests for."""


def ranked(standings: Mapping[Key, Standing], slack: int) -> list[Key]:
    """Sort replicas, the most suitable first.

    A warm replica comes before a cold one, unless its queue exceeds the shortest queue by more than `slack`
    requests. Otherwise the replica with the shorter queue comes first, then the one with fewer cold adapters,
    then a random one.
    """
    least = min((standing.queue for standing in standings.values()), default=0)

    def cost(key: Key) -> tuple[bool, int, int, float]:
        one = standings[key]
        preferred = one.warm and one.queue <= least + slack
        return not preferred, one.queue, one.loading, random.random()

    return sorted(standings, key=cost)


class AdapterRouter(RequestRouter):
    """Routes `answer` by the request's adapter, and everything else to the least busy replica."""

    def initialize_state(self, **kwargs: Any) -> None:
        """Receive the settings from Ray Serve.

        Args:
            kwargs: `slack`, the number of requests by which the queue of a warm replica may exceed the
                shortest queue; `called`, the name of the deployment.
        """
        self._slack, self._called = int(kwargs["slack"]), kwargs["called"]
        self._sent: dict[ReplicaID, dict[str, float]] = {}
        """Replica → cold `model` that it was recently sent a request for → time of that, in seconds."""
        self._placed: dict[Future[RunningReplica], ReplicaID] = {}
        """Request → the replica chosen for it, which has not received it yet: its queue does not count it."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Receive the running replicas; Ray Serve calls this when they change."""
        super().update_replicas(replicas)
        # Ray Serve pickles this class by value, with copies of this module's variables. The module `presence`
        # is imported by name, so its variables are those of the process.
        presence.register(self, self._called)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Rank all replicas; Ray Serve tries them in this order until one accepts the request."""
        if pending_request is not None:
            # Wait between two rounds in which no replica had room.
            pending_request.routing_context.should_backoff = True
        model, draw = _asked(pending_request)
        replicas = {replica.replica_id: replica for replica in candidate_replicas}
        now = time.monotonic()
        self._sent = {
            replica_id: {
                sent: when
                for sent, when in self._sent.get(replica_id, {}).items()
                if now - when < RECENT_SECONDS
            }
            for replica_id in replicas
        }
        lacking = _telling(replicas, "lacking", model, draw)
        if len(lacking) < len(replicas):
            replicas = {key: replica for key, replica in replicas.items() if key not in lacking}
        warm = self._warm(replicas, model, draw)
        asking = pending_request.future if pending_request else None
        placed = Counter(where for request, where in self._placed.items() if request is not asking)
        standings = {
            replica_id: Standing(
                replica_id in warm,
                (self.replica_queue_len_cache.get(replica_id) or 0) + placed[replica_id],
                len(self._sent[replica_id]),
            )
            for replica_id in replicas
        }
        order = ranked(standings, self._slack)
        if model is not None and order and order[0] not in warm:
            self._sent[order[0]][model] = now
        if asking is not None and order:
            self._place(asking, order[0])
        return [[replicas[replica_id]] for replica_id in order]

    def _place(self, request: Future[RunningReplica], replica_id: ReplicaID) -> None:
        """Count a request for the chosen replica until it is sent or abandoned.

        Ray Serve chooses replicas for all requests of a burst before it sends the first one, and counts a
        request only when it is sent.
        """
        if request not in self._placed:
            # The callback runs after the code that awaits the choice, which sends the request at once.
            request.add_done_callback(self._placed.pop)
        self._placed[request] = replica_id

    def _warm(
        self, replicas: Mapping[ReplicaID, RunningReplica], model: str | None, draw: float
    ) -> set[ReplicaID]:
        """Return the replicas that report a request's adapter as warm, or else those that may have it."""
        if not any(model in replica.routing_stats.get("warm", ()) for replica in replicas.values()):
            return {replica_id for replica_id, sent in self._sent.items() if model in sent}
        return _telling(replicas, "warm", model, draw)


def _telling(
    replicas: Mapping[ReplicaID, RunningReplica], what: str, model: str | None, draw: float
) -> set[ReplicaID]:
    """Return the replicas whose report lists a request's `model` and draw under `what`."""
    reports = {replica_id: replica.routing_stats.get(what, {}) for replica_id, replica in replicas.items()}
    return {
        replica_id
        for replica_id, report in reports.items()
        if model in report and report[model][0] <= draw < report[model][1]
    }


def _asked(pending: PendingRequest | None) -> tuple[str | None, float]:
    """Return a request's `model` without the rank, and its draw; (None, 0) for other calls."""
    match pending.args if pending else ():
        # Requests that are sent together have nothing to route: there is one replica.
        case [[Asked() as asked, *_], *_]:
            return parse_model(asked.model).model, asked.draw
    return None, 0.0
