"""A stand-in for the replicas and the director, for tests of what the application does with a request."""

from __future__ import annotations

from typing import Any

from rayft.serving.answers import Incoming, Ticket
from rayft.serving.http.auth import Caller
from rayft.serving.http.schemas import TextRequest
from rayft.serving.messages import Delta

ADMIN, USER = "the-key-of-the-admin", "the-key-of-a-user"


class RecordingGateway:
    """Answers every request with one token, and keeps what it received."""

    def __init__(self) -> None:
        self.requests: list[Any] = []

    async def generate(self, caller: Caller, request: TextRequest) -> tuple[Delta, Incoming]:
        self.requests.append(request)
        answer = Incoming(Ticket("", 0, "", 0), {})
        answer.take(Delta("hi", 1, 1, "stop"))
        answer.take(None)
        return Delta("", 1, 0), answer

    async def change(self, method: str, *arguments: Any) -> Any:
        raise AssertionError("no test changes what is served")
