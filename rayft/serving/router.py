"""Which replica answers a request: one that has its adapter warm (on the device), unless it is too busy.

Ray Serve's controller asks each replica now and then which `model`s are warm in it (`Catalog.warm`) and tells
the routers, one in each process that asks replicas. A cold adapter counts as warm where the router has just
sent a request for it, until the replica can have told so itself: a burst for it must not load it everywhere.
A replica also tells which `model`s it can't load (`Catalog.lacking`): they go to others, if any has them.
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
from rayft.serving.http.schemas import ChatRequest, CompletionRequest

__all__ = ["AdapterRouter", "Standing", "ranked"]

RECENT_SECONDS = 3.0
"""How long an adapter that no replica calls warm counts as warm where it was sent."""

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Standing:
    """How one replica stands towards one request."""

    warm: bool
    """Whether the request's adapter is on its device."""
    queue: int
    """Requests that it runs, keeps waiting, or is about to be sent."""
    loading: int = 0
    """Cold adapters that it was sent lately."""


def ranked(standings: Mapping[Key, Standing], slack: int) -> list[Key]:
    """Order replicas, the one to try first first.

    Warm ones come first, unless more than `slack` requests are ahead of those of the least busy replica. Of
    equals the less busy comes first, then the one that was sent fewer cold adapters, then any.
    """
    least = min((standing.queue for standing in standings.values()), default=0)

    def cost(key: Key) -> tuple[bool, int, int, float]:
        one = standings[key]
        preferred = one.warm and one.queue <= least + slack
        return not preferred, one.queue, one.loading, random.random()

    return sorted(standings, key=cost)


class AdapterRouter(RequestRouter):
    """Routes `generate` by the request's adapter, and everything else to the least busy replica."""

    def initialize_state(self, **kwargs: Any) -> None:
        """Take the settings.

        Args:
            kwargs: `slack`, how many more requests than the least busy replica a warm one may have; `called`,
                the name of the deployment.
        """
        self._slack, self._called = int(kwargs["slack"]), kwargs["called"]
        self._sent: dict[ReplicaID, dict[str, float]] = {}
        """Replica → cold `model` that it was sent lately → when, in seconds."""
        self._placed: dict[Future[RunningReplica], ReplicaID] = {}
        """Request → replica that it goes to: chosen, but not sent yet, so in no queue's length."""

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take the replicas that are running now; Ray Serve calls this when they change."""
        super().update_replicas(replicas)
        # Ray Serve pickles this class by value, with the variables of this module but not of another one.
        presence.heard(self, self._called)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Rank all replicas; Ray Serve tries one after the other until one accepts the request."""
        if pending_request is not None:
            # Between two rounds in which no replica had room.
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
        """Count a request as its replica's until it is sent, or given up.

        Ray Serve chooses for all requests of a burst before it sends, and so counts, the first of them.
        """
        if request not in self._placed:
            # Called after what waits for the choice, and sends the request at once, has run.
            request.add_done_callback(self._placed.pop)
        self._placed[request] = replica_id

    def _warm(
        self, replicas: Mapping[ReplicaID, RunningReplica], model: str | None, draw: float
    ) -> set[ReplicaID]:
        """Find the replicas that say they have a request's adapter, or else those that may have it by now."""
        if not any(model in replica.routing_stats.get("warm", ()) for replica in replicas.values()):
            return {replica_id for replica_id, sent in self._sent.items() if model in sent}
        return _telling(replicas, "warm", model, draw)


def _telling(
    replicas: Mapping[ReplicaID, RunningReplica], what: str, model: str | None, draw: float
) -> set[ReplicaID]:
    """Return the replicas that list a request's `model` and draw under `what` in their report."""
    reports = {replica_id: replica.routing_stats.get(what, {}) for replica_id, replica in replicas.items()}
    return {
        replica_id
        for replica_id, report in reports.items()
        if model in report and report[model][0] <= draw < report[model][1]
    }


def _asked(pending: PendingRequest | None) -> tuple[str | None, float]:
    """Read a request's `model` but for its rank, and its draw; there is none in what asks for no text."""
    match pending.args if pending else ():
        case [ChatRequest() | CompletionRequest() as request, float() as draw]:
            return parse_model(request.model).model, draw
    return None, 0.0
