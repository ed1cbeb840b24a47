"""What is served, as a value: versions of names, where their traffic goes, and how that changes.

A name has one version or, during a canary, two that share its traffic by weight. The version that was
replaced last is remembered, so that one command brings it back.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from rayft.errors import BadRequestError, UnknownModelError
from rayft.serving.messages import BASE_NAME, NAME

__all__ = ["Asked", "Deployed", "Served", "loaded", "parse_model", "promoted", "rolled_back", "unloaded"]


@dataclass(frozen=True)
class Deployed:
    """One version of a served name."""

    name: str
    version: int
    folder: str
    """Adapter folder on the director's node: of what is served, the server's own copy, which replicas on
    other nodes keep below the same path."""
    content_hash: str
    """Identity of its factors: a folder that holds something else by now is not served."""
    source: str
    """What it was asked for as: a folder, `models:/…`, or a URL."""
    aliases: tuple[str, ...] = ()
    pinned: bool = False
    """Whether it stays on the device."""
    score: float | None = None
    """Its validation score, where the registry knows it."""

    @property
    def id(self) -> str:
        """The name that always means this version."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class Served:
    """All that is served; `number` grows with each change."""

    number: int = 0
    versions: tuple[Deployed, ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict)
    """Name → share of its traffic that goes to its newest version, during a canary."""
    previous: Mapping[str, Deployed] = field(default_factory=dict)
    """Name → the version that was replaced last."""

    def of(self, name: str) -> tuple[Deployed, ...]:
        """Give a name's versions, the one that was there first first."""
        return tuple(deployed for deployed in self.versions if deployed.name == name)

    def names(self) -> tuple[str, ...]:
        """List the names."""
        return tuple(dict.fromkeys(deployed.name for deployed in self.versions))

    def pick(self, asked: Asked, draw: float | None = None) -> Deployed:
        """Choose the version that answers a request; a canary's by a draw in [0, 1).

        Raises:
            UnknownModelError: if nothing is served under that name, version or alias.
        """
        mine = self.of(asked.name)
        if not mine:
            known = ", ".join([BASE_NAME, *self.names()])
            raise UnknownModelError(
                f"no model '{asked.text}' is served here; served are {known}", param="model"
            )
        if asked.which is not None:
            for deployed in mine:
                if asked.which == str(deployed.version) or asked.which in deployed.aliases:
                    return deployed
            known = ", ".join(alias for one in mine for alias in (str(one.version), *one.aliases))
            raise UnknownModelError(
                f"'{asked.name}' is not served as '{asked.which}'; of its versions and aliases there are "
                f"{known}",
                param="model",
            )
        draw = random.random() if draw is None else draw
        return mine[-1] if draw < self.weights.get(asked.name, 1.0) else mine[0]

    def models(self) -> dict[str, dict[str, tuple[float, float]]]:
        """List what a request's `model` may be, but for a rank, so that `pick` chooses each version.

        Returns:
            A version's id → `model` → the draws that choose it, from the first number to below the second.
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
    """The `model` of a request, taken apart."""

    text: str
    name: str
    which: str | None = None
    """A version or an alias."""
    rank: int | None = None

    @property
    def model(self) -> str:
        """The text but for the rank, which needs no memory of its own."""
        return self.name if self.which is None else f"{self.name}@{self.which}"


def parse_model(text: str) -> Asked:
    """Read `name`, `name@3`, `name@alias`, `name@r8` or `name@3@r8`; what is none of them is a name."""
    found = re.fullmatch(rf"({NAME})(?:@(?!r\d+(?:@|$))([A-Za-z0-9._-]+))?(?:@r(\d{{1,6}}))?", text)
    if found is None:
        return Asked(text, text)
    return Asked(text, found[1], found[2], int(found[3]) if found[3] else None)


def loaded(served: Served, new: Deployed, weight: float = 1.0) -> Served:
    """Serve a version: alone, or beside the one that is there with a share of the traffic.

    Raises:
        BadRequestError: if a canary has nothing to share with, or is there already.
    """
    mine = served.of(new.name)
    if mine and mine[-1].content_hash == new.content_hash and weight == 1.0:
        same = replace(new, version=mine[-1].version) if new.version == 0 else new
        return _changed(served, new.name, (same,), previous=served.previous.get(new.name))
    before = [*mine, *([served.previous[new.name]] if new.name in served.previous else [])]
    taken = {one.version for one in before if one.content_hash != new.content_hash}
    if new.version == 0 or new.version in taken:
        new = replace(new, version=max((one.version for one in before), default=0) + 1)
    if weight < 1.0:
        if not mine:
            raise BadRequestError(f"'{new.name}' is not served yet, so there is no traffic to share: load it")
        if len(mine) > 1:
            raise BadRequestError(
                f"'{new.name}' has a canary already, {mine[-1].id}: promote it or roll it back first"
            )
        if mine[0].content_hash == new.content_hash:
            raise BadRequestError(f"'{new.name}' is what is served already ({new.content_hash})")
        return _changed(
            served, new.name, (mine[0], new), weight=weight, previous=served.previous.get(new.name)
        )
    return _changed(served, new.name, (new,), previous=mine[0] if mine else None)


def promoted(served: Served, name: str) -> Served:
    """Give all of a name's traffic to its canary.

    Raises:
        BadRequestError: if it has none.
        UnknownModelError: if it is not served.
    """
    mine = _known(served, name)
    if len(mine) < 2:
        raise BadRequestError(f"'{name}' has no canary; load one with a weight below 1")
    return _changed(served, name, (mine[-1],), previous=mine[0])


def rolled_back(served: Served, name: str) -> Served:
    """Take a name's canary back, or else bring back the version that was replaced last.

    Raises:
        BadRequestError: if there is neither.
        UnknownModelError: if it is not served.
    """
    mine = _known(served, name)
    if len(mine) > 1:
        return _changed(served, name, (mine[0],), previous=served.previous.get(name))
    before = served.previous.get(name)
    if before is None:
        raise BadRequestError(f"'{name}' has neither a canary nor a version before this one")
    return _changed(served, name, (before,), previous=mine[0])


def unloaded(served: Served, name: str) -> Served:
    """Serve a name no more.

    Raises:
        UnknownModelError: if it is not served.
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
    """Replace what is served under a name, at its place in the list."""
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
    if weight is not None:
        weights[name] = weight
    if previous is not None:
        before[name] = previous
    return Served(served.number + 1, tuple(every), weights, before)
