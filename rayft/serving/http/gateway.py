"""What the routes request from the replicas and the director, which may be lost, busy or still starting."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.metrics import Counter

from rayft.errors import (
    RayftError,
    RequestError,
    RequestTimeoutError,
    ResourceError,
    TooManyRequestsError,
    UnknownModelError,
)
from rayft.serving.answers import Inbox, Incoming
from rayft.serving.control.state import Deployed, Served, parse_model, unserved
from rayft.serving.http.auth import Caller
from rayft.serving.http.calls import Calls
from rayft.serving.http.responses import AdapterEntry, AdapterList, Listed, ModelEntry, Readiness
from rayft.serving.http.schemas import TextRequest
from rayft.serving.messages import BASE_NAME, Delta, ModelCard
from rayft.serving.presence import Waiting, cause_of, running

__all__ = ["Gateway"]

TRAFFIC = ("requests", "tokens", "errors")

DIRECTOR_SECONDS = 10.0
"""Time limit for the director to report what is served."""

TOO_MANY = "too many requests are waiting here; try again later"

EACH_SECONDS = 10.0
"""Time limit for all replicas to answer a call that goes to each of them."""


class Gateway:
    """Calls replicas and the director, and describes what they serve as a caller may see it."""

    def __init__(
        self,
        replica: DeploymentHandle[Any],
        director: DeploymentHandle[Any],
        waiting: tuple[float, float],
        inbox: Inbox,
        places: int | None = None,
    ) -> None:
        """Call nothing yet.

        Args:
            replica: handle of the replicas.
            director: handle of the director.
            waiting: seconds that a call waits while no replica is up, and in any case.
            inbox: receives the answers.
            places: number of requests that the only replica and its queue hold; requests that come at the
                same time are then sent together. None if there may be several replicas: then Ray Serve
                counts and routes the requests one by one.
        """
        # The router in this loop: in a thread of its own each call would cross to it and back.
        replica._init(_run_router_in_separate_loop=False)
        self._replica, self._director = replica, director
        self._calls, self._inbox, self._places = Calls(replica), inbox, places
        refused: Any = Counter(
            "rayft_unavailable_total", "Calls that were refused because no replica was up."
        )
        self._replicas_answer = Waiting("Replica", *waiting, refused.inc)
        self._director_answers = Waiting("Director", waiting[0], DIRECTOR_SECONDS, refused.inc)
        self._created = int(time.time())
        self._readiness: asyncio.Task[Readiness] | None = None

    async def engine(self) -> dict[str, Any] | None:
        """Return what the engine of one replica has done; None if no replica is up."""
        with suppress(RayError, RayftError):
            found: dict[str, Any] = (await self._of_replica("stats"))["engine"]
            return found
        return None

    async def readiness(self) -> Readiness:
        """Return which change is served, and how many versions of adapters some replica can't load.

        Calls at the same time share one result: they need no key, and must not fill the replicas' queue.

        Raises:
            RayftError, RayError: if the director or the replicas don't answer.
        """
        if self._readiness is None or self._readiness.done():
            self._readiness = asyncio.create_task(self._ready())
        return await asyncio.shield(self._readiness)

    async def _ready(self) -> Readiness:
        number = await self._of_director("number")
        await self._of_replica("serving")
        problems = await self._of_each("problems")
        if not problems:
            # All are busy, or the engine of each has stopped: then this says so.
            await self._of_replica("check_health")
        return {"status": "ready", "change": number, "unavailable": len(set().union(*problems))}

    async def models(self, caller: Caller) -> list[ModelEntry]:
        """Describe the base and all versions of adapters that the caller may use."""
        return [{**self._listed(card), "object": "model"} for card in await self._cards(caller)]

    async def model(self, caller: Caller, text: str) -> ModelEntry:
        """Describe the model that answers a request; of a canary's two versions, the older one.

        Args:
            caller: who asks.
            text: the `model` of a request.

        Raises:
            UnknownModelError: if it is not served to this caller, or not at that rank.
        """
        if not caller.may_ask(parse_model(text).name):
            raise _unknown(text)
        with _others_hidden(caller, text):
            meant = await self._of_replica("meant", text)
        for entry in await self.models(caller):
            if (entry["id"], entry.get("version")) == meant:
                return entry
        # It was unloaded between the two calls.
        raise _unknown(text)

    async def adapters(self, caller: Caller) -> AdapterList:
        """Describe all versions of adapters that the caller may use, with their tiers and traffic."""
        about = await self._of_director("adapters")
        served: Served = about["served"]
        data = await self._described(caller, served)
        found: AdapterList = {"object": "list", "data": data, "change": served.number}
        if caller.admin:
            found["refused"] = about["refused"]
        return found

    async def versions(self, caller: Caller, name: str) -> list[AdapterEntry]:
        """Describe the versions of one adapter.

        Raises:
            UnknownModelError: if there is none that the caller may use.
        """
        served = await self._of_director("state")
        found = [one for one in await self._described(caller, served) if one["id"] == name]
        if not found:
            raise UnknownModelError(f"no adapter '{name}' is served here; see /v1/adapters", param="name")
        return found

    async def change(self, method: str, *arguments: Any) -> Deployed:
        """Let the director change what is served; this takes as long as reading an adapter does."""
        await self._of_director("number")
        changed: Deployed = await getattr(self._director, method).remote(*arguments)
        return changed

    async def generate(self, caller: Caller, request: TextRequest) -> tuple[Delta, Incoming]:
        """Let a replica answer a request.

        Returns:
            The first delta, with which a replica accepts the request, and those that follow. They have to be
            closed.

        Raises:
            UnknownModelError: if the request's model is not served to this caller.
            TooManyRequestsError: if too many requests are waiting.
            RequestError, ResourceError: if no replica accepts the request.
        """
        if not caller.may_ask(parse_model(request.model).name):
            raise _unknown(request.model)
        # With one replica there is nothing to route, so requests may be sent together.
        places = self._places if running("Replica") == 1 else None
        if places is not None and len(self._inbox) >= places:
            raise TooManyRequestsError(TOO_MANY)
        deltas = self._inbox.expect()
        call = self._calls.add(request, deltas, alone=places is None)
        # Wait for the first delta: until the request is accepted, an error can still become a status.
        try:
            with _others_hidden(caller, request.model), _full():
                return await self._replicas_answer.answer(anext(deltas), call.leave), deltas
        except BaseException:
            deltas.close()
            raise

    async def _of_replica(self, method: str, *arguments: Any) -> Any:
        """Call one replica; give up soon if none is up."""
        call: Any = getattr(self._replica, method).remote(*arguments)
        with _full():
            return await self._replicas_answer.answer(call, call.cancel)

    async def _of_director(self, method: str) -> Any:
        """Call the director; give up soon if it is not up."""
        call: Any = getattr(self._director, method).remote()
        try:
            return await self._director_answers.answer(call, call.cancel)
        except RequestTimeoutError as error:
            raise ResourceError(
                "the director, which decides what is served, does not answer; try again"
            ) from error

    async def _of_each(self, method: str) -> list[Any]:
        """Call all replicas, and return the answers of those that give one."""
        try:
            call = self._replica.broadcast(method)
            answers = await call.results_async(timeout_s=EACH_SECONDS, return_exceptions=True)
        except (TimeoutError, RayServeException):
            return []
        return [one for one in answers if not isinstance(one, Exception)]

    async def _cards(self, caller: Caller) -> list[ModelCard]:
        """Describe what a caller may use; a version counts as unavailable if no replica can serve it."""
        found: list[ModelCard] = await self._of_replica("models")
        cards = [card for card in found if caller.may_ask(card["id"])]
        if not any("unavailable" in card for card in cards):
            return cards
        everywhere = [card for found in await self._of_each("models") for card in found]
        loaded = {(card["id"], card.get("version")): card for card in everywhere if "unavailable" not in card}
        return [loaded.get((card["id"], card.get("version")), card) for card in cards]

    async def _described(self, caller: Caller, served: Served) -> list[AdapterEntry]:
        """Describe each version of an adapter that a caller may use."""
        replicas = await self._of_each("stats")
        found: list[AdapterEntry] = []
        for card in await self._cards(caller):
            name, version = card["id"], card.get("version")
            if name == BASE_NAME:
                continue
            key = f"{name}@{version}"
            counts = [one["traffic"].get(key, {}) for one in replicas]
            traffic: Any = {what: sum(one.get(what, 0) for one in counts) for what in TRAFFIC}
            share = served.weights.get(name)
            newest = served.of(name)[-1:]
            if share is not None and newest and newest[0].version != version:
                share = 1 - share
            entry: AdapterEntry = {
                **self._listed(card), "object": "adapter", "weight": 1.0 if share is None else share,
                "tiers": [one["tiers"].get(key, "disk") for one in replicas], "traffic": traffic,
            }  # fmt: skip
            entry.pop("unavailable", None)
            if reasons := [one["problems"][key] for one in replicas if key in one["problems"]]:
                entry["unavailable"] = reasons[0]
            found.append(entry)
        return found

    def _listed(self, card: ModelCard) -> Listed:
        """Return a card as an entry of a list, without empty aliases."""
        entry: Listed = {**card, "created": self._created, "owned_by": "rayft"}
        if not entry.get("aliases"):
            entry.pop("aliases", None)
        return entry


def _unknown(model: str) -> UnknownModelError:
    """Return the same error for a name that does not exist as for one that only others' keys may use."""
    return UnknownModelError(f"{unserved(model)}; see /v1/models", param="model")


@contextmanager
def _others_hidden(caller: Caller, model: str) -> Iterator[None]:
    """Replace the error that lists what is served if its caller may not use all of that."""
    try:
        yield
    except (RequestError, RayTaskError) as error:
        # An error in the place of an answer arrives without its class (see `rayft.serving.answers`).
        if caller.adapters is not None and str(cause_of(error)).startswith(unserved(model)):
            raise _unknown(model) from error
        raise


@contextmanager
def _full() -> Iterator[None]:
    """Turn Ray Serve's error about a full queue, which it would answer 503, into one that is answered 429."""
    try:
        yield
    except BackPressureError as error:
        raise TooManyRequestsError(TOO_MANY) from error
