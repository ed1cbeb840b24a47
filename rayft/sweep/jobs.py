"""Jobs: what a search, or another layer, asks lanes to do, and what comes back.

Requests and results travel through the broker in pickled form, so that the broker's process need not import
their modules, which import torch.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

from rayft.errors import DiskFullError, ResourceError

__all__ = ["Event", "Job", "NewGroupError", "Outcome", "Request"]

FATAL = {"disk": DiskFullError, "lanes": ResourceError}
"""Why no job can succeed any more (the disk is full, no lane can start) → the error that ends the sweep."""

ResultT = TypeVar("ResultT")
ResultT_co = TypeVar("ResultT_co", covariant=True)
RequestT_co = TypeVar("RequestT_co", covariant=True)


class NewGroupError(Exception):
    """Raised by a request that only a new worker group can continue, from the last checkpoint on.

    Any worker may raise it, or several for the same reason; the others of its group may wait for it.

    Attributes:
        request: what the new group does in place of the request.
    """

    def __init__(self, reason: str, request: Request[Any]) -> None:
        super().__init__(reason)
        self.request = request


class Request(Protocol[ResultT_co]):
    """Something that a lane can do; its class must be importable, because requests are pickled."""

    @property
    def kind(self) -> str:
        """What the request is, in one word for people: `train`, `score`, `analyse`."""

    @property
    def resumable(self) -> bool:
        """Whether the request saves checkpoints and continues from the last one.

        An interrupted sweep waits for the checkpoint of a resumable job. A lane that computes nothing for too
        long is restarted only if its job is resumable.
        """

    @property
    def folders(self) -> Sequence[Path]:
        """Folders in which the request writes; if a disk is full, the error names one of them."""

    def __call__(self, lane: Any, /) -> ResultT_co | None:
        """Do it in a lane (`rayft.sweep.lane.Lane`). All workers call it; the first one's result counts.

        Raises:
            RayftError: if the job has failed; on all workers (`RayftError.everywhere`), or on any, in which
                case the group ends.
            NewGroupError: if a new group has to continue it.
        """


@dataclass(frozen=True)
class Event:
    """Something that happened to a job."""

    kind: Literal["report", "final", "failed", "interrupted"]
    step: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Of a report, or of the end of a trial."""
    payload: bytes = b""
    """The pickled result of a job that ended well; `Job.result` reads it."""
    error: str = ""
    """Why the job failed."""
    fatal: str = ""
    """A key of `FATAL`, if no other job can succeed either."""
    number: int = field(default=0, compare=False)
    """Its place among the job's events, from 1."""

    def raise_fatal(self) -> None:
        """Raise the error that ends the whole sweep, if the event is one.

        Raises:
            DiskFullError, ResourceError: if no job can succeed any more.
        """
        if self.fatal:
            raise FATAL[self.fatal](self.error)


@dataclass(frozen=True)
class Outcome(Generic[ResultT]):
    """How a job ended: with a result, or with an error."""

    result: ResultT | None = None
    error: str = ""
    """Why there is no result."""


@dataclass(frozen=True)
class Job(Generic[RequestT_co, ResultT]):
    """A request on its way to a lane: `Job[Request, Result]`."""

    id: str
    kind: str
    """As `Request.kind`."""
    payload: bytes
    """The pickled request."""
    resumable: bool = False
    """As `Request.resumable`."""
    lane: str | None = None
    """The only lane that may take the job; by default any lane may."""
    pack: str = ""
    """What jobs have in common that a lane can do together; empty if it does this one alone."""

    @staticmethod
    def of(id: str, request: Request[ResultT], *, pack: str = "") -> Job[Request[ResultT], ResultT]:
        """Make a job of a request."""
        return Job(id, request.kind, pickle.dumps(request), request.resumable, pack=pack)

    @property
    def request(self) -> RequestT_co:
        """The request."""
        # The bytes come from this cluster, as all that Ray itself unpickles.
        return pickle.loads(self.payload)  # type: ignore[no-any-return]  # noqa: S301

    def result(self, event: Event) -> ResultT:
        """Return the result that a final event carries."""
        return pickle.loads(event.payload)  # type: ignore[no-any-return]  # noqa: S301

    def outcome(self, event: Event) -> Outcome[ResultT]:
        """Return how the job ended.

        Args:
            event: its last event.

        Raises:
            DiskFullError, ResourceError: if no job can succeed any more.
        """
        event.raise_fatal()
        if event.kind == "final":
            return Outcome(self.result(event))
        return Outcome(error=event.error or "it was interrupted")
