"""Sends requests to the replicas by Ray Serve. Those that come at the same time may travel in one call.

A call costs ingress and replica together about 0.8 ms of CPU time, and all the rest of a request and its
answer 0.5 ms (measured on two cores). Clients that are answered in one batch send their next requests at the
same time. With a call for each, the first token of every one would wait until all calls are made.
"""

from __future__ import annotations

import asyncio
import pickle
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ray.serve.handle import DeploymentHandle

from rayft.errors import ResourceError
from rayft.serving.answers import Incoming, Ticket
from rayft.serving.http.errors import LOST
from rayft.serving.http.schemas import ChatRequest, CompletionRequest, TextRequest

__all__ = ["Asked", "Call", "Calls"]

LAST_SECONDS = 10.0
"""Time that the last part of an answer may take after the replica has ended."""

LARGE = 2**20
"""Bytes from which requests are passed by Ray's objects; a call by gRPC may have 4 MiB at most."""


@dataclass(frozen=True)
class Asked:
    """A request, as a replica receives it."""

    model: str
    """Its `model`."""
    pickled: bytes
    """All of it; its size decides how it is sent."""
    draw: float
    """Number in [0, 1) that decides between the two versions of a canary."""
    ticket: Ticket
    """Where the answer is to be sent."""

    @classmethod
    def of(cls, request: TextRequest, ticket: Ticket) -> Asked:
        """Prepare a request."""
        # Drawn here, so that router and replica choose the same version during a canary.
        return cls(request.model, pickle.dumps(request), random.random(), ticket)

    @property
    def request(self) -> ChatRequest | CompletionRequest:
        """The request."""
        found: ChatRequest | CompletionRequest = pickle.loads(self.pickled)  # noqa: S301  (the ingress's)
        return found


@dataclass(eq=False)
class Call:
    """One call of a replica."""

    asked: list[Asked] = field(default_factory=list)
    answers: list[Incoming] = field(default_factory=list)
    size: int = 0
    """Bytes of the requests."""
    made: Any = None
    """Ray Serve's call, once it was made."""
    left: int = 0
    """Number of answers that nobody waits for any more."""

    def add(self, asked: Asked, answer: Incoming) -> None:
        """Add a request."""
        self.asked.append(asked)
        self.answers.append(answer)
        self.size += len(asked.pickled)

    def leave(self) -> None:
        """Stop waiting for one of the answers; the call is cancelled when nobody waits for any."""
        self.left += 1
        if self.made is not None and self.left == len(self.asked):
            self.made.cancel()

    async def make(self, method: Any) -> None:
        """Call a method of a replica, and wait until it has answered; if it fails, so do the answers."""
        if self.left == len(self.asked):
            return
        try:
            self.made = method.remote(self.asked)
            ends: Sequence[Exception | None] = await self.made
        except asyncio.CancelledError:
            # Also if the replica has cancelled it, because its connection was lost.
            self._fail(ResourceError(LOST))
            raise
        except Exception as error:  # noqa: BLE001  (whoever reads the answers handles it)
            self._fail(error)
            return
        for answer, end in zip(self.answers, ends, strict=True):
            if end is not None:
                answer.fail(end)
        # In case that a last part is lost on its way; answers that have ended ignore this.
        asyncio.get_running_loop().call_later(LAST_SECONDS, self._fail, ResourceError(LOST))

    def _fail(self, error: Exception) -> None:
        for answer in self.answers:
            answer.fail(error)


class Calls:
    """Makes the calls."""

    def __init__(self, replica: DeploymentHandle[Any]) -> None:
        # By gRPC, which costs half of what Ray's objects cost. With Ray 2.60 it loses some cancellations, but
        # the inbox cancels requests itself.
        self._by_value = replica.options(_by_reference=False, request_serialization="pickle").answer
        self._by_reference = replica.answer
        self._next: Call | None = None
        self._making = set[asyncio.Task[None]]()

    def add(self, request: TextRequest, answer: Incoming, *, alone: bool) -> Call:
        """Send a request.

        Args:
            request: the request.
            answer: receives the answer.
            alone: whether it needs a call of its own. Otherwise it is sent with others that come in the same
                turn of the event loop.

        Returns:
            The call with which it is sent.
        """
        asked = Asked.of(request, answer.ticket)
        call = None if alone else self._next
        if call is None or call.size + len(asked.pickled) >= LARGE:
            call = Call()
            if not alone:
                self._next = call
            # It starts once the event loop has run what is ready now.
            making = asyncio.create_task(self._make(call))
            self._making.add(making)
            making.add_done_callback(self._making.discard)
        call.add(asked, answer)
        return call

    async def _make(self, call: Call) -> None:
        if call is self._next:
            self._next = None
        await call.make(self._by_reference if call.size >= LARGE else self._by_value)
