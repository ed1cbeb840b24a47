"""What is served, as an immutable value, and the functions that derive the next one from it.

A name has one version or, during a canary, two versions that share its traffic by weight. `Served` also keeps
the version that was replaced last, so that a rollback can serve it again.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from rayft.errors import BadRequestError, UnknownModelError
from rayft.serving.messages import BASE_NAME, NAME

__all__ = [
    "Asked",
    "Deployed",
    "Served",
    "loaded",
    "parse_model",
    "promoted",
    "rolled_back",
    "unloaded",
    "unserved",
]


@dataclass(frozen=True)
class Deployed:
    """One version of a served name."""

    name: str
    version: int
    folder: str
    """Folder of the adapter on the director's node. Once the version is served, this is the server's own
    copy, which replicas on other nodes keep under the same path."""
    content_hash: str
    """Content hash of its factors; a folder whose content has another hash by now is not served."""
    source: str
    """Where it was loaded from: a folder, `models:/…`, or a URL."""
    aliases: tuple[str, ...] = ()
    """Aliases that the registry has for the version."""
    pinned: bool = False
    """Whether it stays on the device."""
    score: float | None = None
    """Validation score, if the registry has one."""

    @property
    def id(self) -> str:
        """`name@version`, which always denotes this version."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class Served:
    """Everything that is served."""

    number: int = 0
    """Number of the last change."""
    versions: tuple[Deployed, ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict)
    """During a canary: name → share of its traffic that goes to its newest version."""
    previous: Mapping[str, Deployed] = field(default_factory=dict)
    """Name → the version that was replaced last."""
    numbers: Mapping[str, int] = field(default_factory=dict)
    """Name → the largest number of its versions since the name is served; none is given twice."""

    def of(self, name: str) -> tuple[Deployed, ...]:
        """Return the versions of a name, the oldest first."""
        return self._by_name.get(name, ())

    @cached_property
    def _by_name(self) -> dict[str, tuple[Deployed, ...]]:
        found: dict[str, tuple[Deployed, ...]] = {}
        for deployed in self.versions:
            found[deployed.name] = (*found.get(deployed.name, ()), deployed)
        return found

    def names(self) -> tuple[str, ...]:
        """Return the names, in the order in which they were first served."""
        return tuple(self._by_name)

    def pick(self, asked: Asked, draw: float | None = None) -> Deployed:
        """Return the version that answers a request.

        Args:
            asked: the `model` of the request.
            draw: number in [0, 1) that decides between the two versions of a canary; random by default.

        Raises:
            UnknownModelError: if the name, version or alias is not served.
        """
        mine = self.of(asked.name)
        if not mine:
            known = ", ".join([BASE_NAME, *self.names()])
            raise UnknownModelError(f"{unserved(asked.text)}; served are {known}", param="model")
        if asked.which is not None:
            for deployed in mine:
                if asked.which == str(deployed.version) or asked.which in deployed.aliases:
                    return deployed
            known = ", ".join(alias for one in mine for alias in (str(one.version), *one.aliases))
            raise UnknownModelError(
                f"'{asked.name}' is not served as '{asked.which}'; its versions and aliases are {known}",
                param="model",
            )
        draw = random.random() if draw is None else draw
        return mine[-1] if draw < self.weights.get(asked.name, 1.0) else mine[0]

    def models(self) -> dict[str, dict[str, tuple[float, float]]]:
        """Return the values of a request's `model` (without a rank) for which `pick` chooses each version.

        Returns:
            Id of a version → `model` → half-open interval of the draws that choose the version.
        """
        newest = {one.name: one for one in self.versions}
        found: dict[str, dict[str, tuple[float, float]]] = {}
        meant: set[str] = set()
        for one in self.versions:
            share = self.weights.get(one.name, 1.0)
            exact = [f"{one.name}@{which}" for which in (str(one.version), *one.aliases)]
            found[one.id] = {model: (0.0, 1.0) for model in exact if model not in meant}
            found[one.id][one.name] = (0.0, share) if one is newest[one.name] else (share, 1.0)
            meant.update(exact)
        return found


@dataclass(frozen=True)
class Asked:
    """The parts of a request's `model`."""

    text: str
    """The whole `model`."""
    name: str
    which: str | None = None
    """Version or alias, if there is one."""
    rank: int | None = None
    """Rank, if there is one."""

    @property
    def model(self) -> str:
        """The `model` without its rank: all ranks of a version share its memory."""
        return self.name if self.which is None else f"{self.name}@{self.which}"


def unserved(model: str) -> str:
    """Return how the message of an error begins if a request's `model` is the name of nothing here."""
    return f"no model '{model}' is served here"


def parse_model(text: str) -> Asked:
    """Split `name`, `name@3`, `name@alias`, `name@r8` or `name@3@r8`; any other text is a name as a whole."""
    found = re.fullmatch(rf"({NAME})(?:@(?!r[0-9]+(?:@|$))([A-Za-z0-9._-]+))?(?:@r([0-9]{{1,6}}))?", text)
    if found is None:
        return Asked(text, text)
    return Asked(text, found[1], found[2], int(found[3]) if found[3] else None)


def loaded(served: Served, new: Deployed, weight: float = 1.0) -> Served:
    """Serve a version in place of the present one or, with a weight below 1, beside it as a canary.

    Args:
        served: what is served now.
        new: the version. If its number is 0, or is that of another content, it gets the number under which
            its content is served, or else the next free one.
        weight: the version's share of the traffic.

    Raises:
        BadRequestError: if the name is not served, has a canary already, or serves the same content.
    """
    mine, previous = served.of(new.name), served.previous.get(new.name)
    same = next((one for one in mine if one.content_hash == new.content_hash), None)
    before = [*mine, *([previous] if previous else [])]
    taken = {one.version for one in before if one.content_hash != new.content_hash}
    if new.version == 0 or new.version in taken:
        largest = max(served.numbers.get(new.name, 0), *(one.version for one in before), 0)
        new = replace(new, version=same.version if same else largest + 1)
    if weight < 1.0:
        if not mine:
            raise BadRequestError(f"'{new.name}' is not served yet; load it without a weight first")
        if len(mine) > 1:
            raise BadRequestError(
                f"'{new.name}' already has the canary {mine[-1].id}; promote it or roll it back first"
            )
        if mine[0].content_hash == new.content_hash:
            raise BadRequestError(f"'{new.name}' already serves this content ({new.content_hash})")
        return _changed(served, new.name, (mine[0], new), weight=weight, previous=previous)
    if mine and mine[0] is not same:
        previous = mine[0]
    return _changed(served, new.name, (new,), previous=previous)


def promoted(served: Served, name: str) -> Served:
    """Route all traffic of a name to its canary.

    Raises:
        BadRequestError: if the name has no canary.
        UnknownModelError: if the name is not served.
    """
    mine = _known(served, name)
    if len(mine) < 2:
        raise BadRequestError(f"'{name}' has no canary; load one with a weight below 1")
    return _changed(served, name, (mine[-1],), previous=mine[0])


def rolled_back(served: Served, name: str) -> Served:
    """Stop serving the canary of a name or, if it has none, serve the version again that was replaced last.

    Raises:
        BadRequestError: if the name has neither.
        UnknownModelError: if the name is not served.
    """
    mine = _known(served, name)
    if len(mine) > 1:
        return _changed(served, name, (mine[0],), previous=served.previous.get(name))
    before = served.previous.get(name)
    if before is None:
        raise BadRequestError(f"'{name}' has neither a canary nor a previous version")
    return _changed(served, name, (before,), previous=mine[0])


def unloaded(served: Served, name: str) -> Served:
    """Stop serving a name.

    Raises:
        UnknownModelError: if the name is not served.
    """
    _known(served, name)
    return _changed(served, name, (), previous=None)


def _known(served: Served, name: str) -> tuple[Deployed, ...]:
    mine = served.of(name)
    if not mine:
        raise UnknownModelError(f"no adapter '{name}' is served here", param="name")
    return mine


def _changed(
    served: Served,
    name: str,
    versions: tuple[Deployed, ...],
    *,
    weight: float | None = None,
    previous: Deployed | None,
) -> Served:
    """Replace the versions of a name, which keeps its position in the list."""
    every: list[Deployed] = []
    placed = False
    for one in served.versions:
        if one.name != name:
            every.append(one)
        elif not placed:
            every += versions
            placed = True
    if not placed:
        every += versions
    weights = {who: share for who, share in served.weights.items() if who != name}
    before = {who: one for who, one in served.previous.items() if who != name}
    numbers = {who: number for who, number in served.numbers.items() if who != name}
    if versions:
        numbers[name] = max(served.numbers.get(name, 0), *(one.version for one in versions))
    if weight is not None:
        weights[name] = weight
    if previous is not None:
        before[name] = previous
    return Served(served.number + 1, tuple(every), weights, before, numbers)
