"""The adapters that one replica serves, and where they are: on the device, in host memory or on disk.

A change has two steps, so that several replicas make it together or not at all: `prepare` reads and checks
the new adapters, and loads them onto the device as far as there is room; `commit` makes them visible to
requests. A request keeps the adapter that it started with. A replaced adapter is freed when its last request
ends.

The memory on the device and in the host (for a GPU) is limited in bytes. If a limit is exceeded, the
least recently used adapter is moved to the next tier, but never one that a request is using or that is
pinned.

A replica that starts serves what it can load. It keeps the reason why an adapter can't be loaded, answers
requests for that adapter with it, and regularly tries again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Literal

import torch

from rayft.artifacts import AdapterArtifact, check_prefix, folder_bytes
from rayft.errors import ArtifactError, RayftError, ResourceError, SqueezeError, UnknownModelError
from rayft.serving.control.admission import BaseModel, check_adapter
from rayft.serving.control.state import Asked, Deployed, Served, parse_model
from rayft.serving.engine.api import Engine, NoRoomError
from rayft.serving.messages import BASE_NAME, ModelCard

__all__ = ["Catalog", "Lease", "Limits"]

logger = logging.getLogger("ray.serve")

ROOM_SECONDS = 30.0
"""Time limit of a request that waits for room on the device."""


@dataclass(frozen=True)
class Limits:
    """Limits on the memory of adapters, in bytes; None for no limit."""

    device: int | None = None
    host: int | None = None


@dataclass(frozen=True)
class Lease:
    """The adapter that a request uses; it stays on the device until the lease ends."""

    adapter: str | None
    """Name of the adapter in the engine; None for the base."""
    name: str
    """Served name, for metrics."""
    rank: int | None = None
    """Lower rank that was asked for; None for the adapter's own."""
    version: str = ""
    """Version; empty for the base."""
    content_hash: str = ""
    """Content hash; empty for the base."""


@dataclass(eq=False)
class _Entry:
    """An adapter that was read."""

    deployed: Deployed
    card: ModelCard
    key: str
    """Name in the engine."""
    artifact: AdapterArtifact | None
    """The factors in host memory."""
    bytes: int
    """Size on the device."""
    on_device: bool = False
    """Whether the engine has it."""
    leases: int = 0
    """Number of requests that use it."""
    retired: bool = False
    """Whether it was replaced or unloaded, and is freed with its last lease."""
    used: int = 0
    """Number of the last lease: the smallest is the least recently used."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def tier(self) -> Literal["device", "host", "disk"]:
        if self.on_device:
            return "device"
        return "disk" if self.artifact is None else "host"


@dataclass(eq=False)
class _Change:
    """What is to be served, and what was read for it."""

    served: Served
    entries: dict[str, _Entry] = field(default_factory=dict)
    """Id → entry of each version that can be served; entries of what is served already are reused."""
    problems: dict[str, str] = field(default_factory=dict)
    """Id → reason of each version that can't be served."""


def ignore_event(_deployed: Deployed, _what: str) -> None:
    """Do nothing on a load or an eviction."""


async def fetch_nothing(_deployed: Deployed) -> bool:
    """Return False: there is no other node from which a copy could be fetched."""
    return False


class Catalog:
    """The served adapters of one replica."""

    def __init__(
        self,
        base: BaseModel,
        engine: Engine,
        dtype: torch.dtype,
        *,
        keeps: bool = False,
        limits: Limits | None = None,
        on_event: Callable[[Deployed, str], None] = ignore_event,
        fetch: Callable[[Deployed], Awaitable[bool]] = fetch_nothing,
    ) -> None:
        """Serve the base alone.

        Args:
            base: the base that adapters must match.
            engine: generates the answers.
            dtype: dtype of the factors on the device.
            keeps: whether factors on the device are kept in host memory too, within the limit; on a CPU both
                are the same memory.
            limits: limits on the memory of adapters.
            on_event: called at each `load` and `eviction` of a version.
            fetch: called with a version whose folder can't be read; copies the version to this node, or
                returns False if the copy on this node is complete.
        """
        self._base, self._engine, self._on_event, self._fetch = base, engine, on_event, fetch
        self._dtype, self._keeps = dtype, keeps
        self._limits = limits or Limits()
        self._entries: dict[str, _Entry] = {}
        self._problems: dict[str, str] = {}
        self._wanted: Served | None = None
        self._prepared: _Change | None = None
        self._preparing: set[_Change] = set()
        self._taken = 0
        self._numbers, self._uses = count(), count(1)
        self._freed = asyncio.Event()
        self.served = Served()
        """What is served now."""

    async def prepare(self, served: Served) -> None:
        """Read and check all new adapters; what is served does not change yet.

        An adapter that was to be served before and could not be loaded is tried again, and may fail again.
        The director makes one change after the other. So only the last call counts: an earlier one that still
        reads has taken longer than the director waits.

        Args:
            served: what is to be served.

        Raises:
            ArtifactError: as `check_adapter`, or if the content of a folder has changed.
            ResourceError: if there is no room for a pinned adapter, or the change was given up meanwhile.
        """
        self._wanted = served
        change = await self._change(served, all_or_none=True)
        if self._wanted is not served:
            self._free(change.entries)
            raise ResourceError(f"change {served.number} was given up while it was prepared; try again")
        former, self._prepared = self._prepared, change
        if former:
            self._free(former.entries)

    async def commit(self, number: int) -> None:
        """Serve the change with this number; do nothing if it was not prepared."""
        if self._prepared and self._prepared.served.number == number:
            self._serve(self._prepared)

    async def abandon(self, number: int) -> None:
        """Free what was prepared for the change with this number, or is being prepared."""
        self._give_up(number)

    def _give_up(self, number: int) -> None:
        """Free what was prepared for changes up to a number, unless it is served."""
        if self._wanted and self._wanted.number <= number:
            self._wanted = None
        if self._prepared and self._prepared.served.number <= number:
            former, self._prepared = self._prepared, None
            self._free(former.entries)

    async def catch_up(self, served: Served, *, all_or_none: bool = False) -> None:
        """Prepare a change and serve it, unless another one was committed meanwhile.

        Args:
            served: what is to be served.
            all_or_none: whether all adapters must load; otherwise those that can be loaded are served.

        Raises:
            ArtifactError: if all adapters must load and one can't; what was served before remains.
        """
        before = self.served
        change = await self._change(served, all_or_none=all_or_none)
        if self.served is before:
            self._serve(change)
        else:
            self._free(change.entries)

    async def _change(self, served: Served, *, all_or_none: bool) -> _Change:
        """Read and check the adapters of a change; another change may be served meanwhile."""
        change = _Change(served)
        self._preparing.add(change)
        try:
            for deployed in served.versions:
                try:
                    entry = self._same(deployed) or await self._entry(deployed)
                    change.entries[deployed.id] = entry
                    if deployed.pinned:
                        # It may be served already, and have been evicted before it was pinned.
                        await self._bring(entry)
                    self._fit_host()
                except Exception as error:
                    if all_or_none and not self._is_served(deployed):
                        raise
                    change.problems[deployed.id] = self._reason(deployed, error)
        except BaseException:
            self._preparing.discard(change)
            self._free(change.entries)
            raise
        self._preparing.discard(change)
        return change

    def _serve(self, change: _Change) -> None:
        """Make a change visible to requests, and free what is no longer served."""
        for deployed in change.served.versions:
            # One that could not be loaded for the change may have been loaded by `retry` meanwhile.
            if deployed.id in change.problems and (entry := self._same(deployed)):
                change.entries[deployed.id] = entry
                del change.problems[deployed.id]
        former, self._entries, self.served = self._entries, change.entries, change.served
        reused = {name for name, entry in self._entries.items() if entry is former.get(name)}
        known = {name: why for name, why in self._problems.items() if name in reused}
        self._problems = known | change.problems
        # The commit of a change that is served by now, or that another one has replaced, may never come.
        self._give_up(change.served.number)
        self._free(former)
        for deployed in change.served.versions:
            if entry := self._entries.get(deployed.id):
                entry.deployed = deployed
                entry.card["aliases"], entry.card["pinned"] = list(deployed.aliases), deployed.pinned

    def _free(self, entries: Mapping[str, _Entry]) -> None:
        """Retire entries that are neither served nor part of a change that may be served."""
        held = {*self._all()}
        for entry in entries.values():
            if entry not in held:
                self._retire(entry)

    def _all(self) -> list[_Entry]:
        """Return the entries that are served, and those of changes that may be served."""
        wanted = [entry for change in self._coming() for entry in change.entries.values()]
        return list(dict.fromkeys((*self._entries.values(), *wanted)))

    def _coming(self) -> list[_Change]:
        """Return the changes that may be served."""
        return [*self._preparing, *([self._prepared] if self._prepared else ())]

    def _pinned(self, entry: _Entry) -> bool:
        """Return whether an entry is pinned, or a change that may be served pins it."""
        return entry.deployed.pinned or any(
            one.pinned and change.entries.get(one.id) is entry
            for change in self._coming()
            for one in change.served.versions
        )

    def cards(self) -> list[ModelCard]:
        """Describe the base and each version of each adapter."""
        cards: list[ModelCard] = [{"id": BASE_NAME, "root": self._base.name}]
        for deployed in self.served.versions:
            entry = self._entries.get(deployed.id)
            card = entry.card.copy() if entry else self._card(deployed)
            if deployed.id in self._problems:
                card["unavailable"] = self._problems[deployed.id]
            cards.append(card)
        return cards

    def meant(self, model: str) -> tuple[str, int | None]:
        """Return the name and version that the `model` of a request means; of a canary's two, the older one.

        Raises:
            UnknownModelError: if it is not served, or not at that rank.
        """
        if model in self._base_names():
            return BASE_NAME, None
        asked = parse_model(model)
        deployed = self.served.pick(asked, draw=1.0)
        if entry := self._entries.get(deployed.id):
            _check_rank(entry, asked)
        return deployed.name, deployed.version

    def tiers(self) -> dict[str, str]:
        """Return where each version is: id → `device`, `host`, `disk` or `unavailable`."""
        tiers: dict[str, str] = {name: entry.tier for name, entry in self._entries.items()}
        return tiers | dict.fromkeys(self._problems, "unavailable")

    def problems(self) -> dict[str, str]:
        """Return why versions can't be served: id → reason."""
        return dict(self._problems)

    async def retry(self) -> None:
        """Try again to load the adapters that could not be loaded."""
        for deployed in self.served.versions:
            if deployed.id not in self._problems:
                continue
            try:
                if deployed.id in self._entries:
                    await self._read(deployed)
                    self._problems.pop(deployed.id, None)
                    continue
                entry = await self._entry(deployed)
            except Exception as error:  # noqa: BLE001  (any error is the reason)
                if self._is_served(deployed):
                    self._problems[deployed.id] = self._reason(deployed, error)
                continue
            if self._same(deployed) or not self._is_served(deployed):
                # What is served has changed meanwhile.
                self._retire(entry)
            else:
                self._entries[deployed.id] = entry
                self._problems.pop(deployed.id, None)
                self._fit_host()

    def warm(self) -> dict[str, tuple[float, float]]:
        """Return the `model`s that are on the device, and for which draws (see `Served.models`)."""
        found = self._models({name for name, tier in self.tiers().items() if tier == "device"})
        return dict.fromkeys(self._base_names(), (0.0, 1.0)) | found

    def lacking(self) -> dict[str, tuple[float, float]]:
        """Return the `model`s that can't be answered, and for which draws."""
        return self._models(self._problems)

    def _models(self, versions: Collection[str]) -> dict[str, tuple[float, float]]:
        found: dict[str, tuple[float, float]] = {}
        for name, models in self.served.models().items():
            if name in versions:
                for model, (low, high) in models.items():
                    # The two versions of a canary divide the draws, so their intervals join.
                    start, end = found.get(model, (low, high))
                    found[model] = min(low, start), max(high, end)
        return found

    @asynccontextmanager
    async def lease(self, model: str, draw: float | None = None) -> AsyncIterator[Lease]:
        """Load the adapter of a request onto the device, and keep it there until the block ends.

        Args:
            model: the `model` of the request.
            draw: number in [0, 1) that decides between the two versions of a canary; random by default.

        Raises:
            UnknownModelError: if the model is not served.
            ArtifactError: if the adapter can't be loaded.
            ResourceError: if there is no room for it on the device.
        """
        if model in self._base_names():
            yield Lease(None, BASE_NAME)
            return
        asked = parse_model(model)
        deployed = self.served.pick(asked, draw)
        entry = self._entries.get(deployed.id)
        if entry is None:
            raise ArtifactError(self._problems[deployed.id])
        _check_rank(entry, asked)
        entry.leases += 1
        entry.used = next(self._uses)
        try:
            await self._bring(entry)
            yield Lease(entry.key, deployed.name, asked.rank, str(deployed.version), deployed.content_hash)
        finally:
            entry.leases -= 1
            self._freed.set()
            if entry.retired and not entry.leases:
                self._off_device(entry)

    def _base_names(self) -> tuple[str, ...]:
        """Return the `model`s that denote the base; its own name does so unless an adapter has that name."""
        return (BASE_NAME,) if self.served.of(self._base.name) else (BASE_NAME, self._base.name)

    def _same(self, deployed: Deployed) -> _Entry | None:
        """Return the entry of a version that is served with the same content."""
        entry = self._entries.get(deployed.id)
        return entry if entry and entry.deployed.content_hash == deployed.content_hash else None

    def _is_served(self, deployed: Deployed) -> bool:
        """Return whether a version is served with the same content, and pinned if it is to be."""
        same = (one for one in self.served.versions if one.id == deployed.id)
        return any(
            one.content_hash == deployed.content_hash and one.pinned >= deployed.pinned for one in same
        )

    def _reason(self, deployed: Deployed, error: Exception) -> str:
        """Return why a version can't be served, and log it if it is new."""
        why = str(error) if isinstance(error, RayftError) else f"{type(error).__name__}: {error}"
        if self._problems.get(deployed.id) != why:
            logger.warning("%s can't be served: %s", deployed.id, why)
        return why

    async def _entry(self, deployed: Deployed) -> _Entry:
        """Read an adapter, and load it onto the device if it is pinned or there is room."""
        artifact = await self._read(deployed)
        size = sum(f.b.numel() + (0 if f.columns else f.a.numel()) for f in artifact.modules.values())
        card = self._card(deployed, artifact, folder_bytes(deployed.folder))
        key = f"{deployed.id}#{next(self._numbers)}"
        entry = _Entry(deployed, card, key, artifact, size * self._dtype.itemsize)
        limit = self._limits.device
        if limit is not None and entry.bytes > limit:
            raise _too_large(entry, limit)
        if deployed.pinned or limit is None or self._taken + entry.bytes <= limit:
            # Without room in the engine it stays in host memory until a request asks for it.
            with suppress(NoRoomError):
                await self._bring(entry, evict=deployed.pinned)
        return entry

    async def _read(self, deployed: Deployed) -> AdapterArtifact:
        """Read an adapter; if its copy on this node is missing or damaged, fetch the copy first."""
        try:
            return await asyncio.to_thread(self._checked, deployed)
        except ArtifactError:
            if not await self._fetch(deployed):
                raise
            return await asyncio.to_thread(self._checked, deployed)

    def _checked(self, deployed: Deployed) -> AdapterArtifact:
        artifact = check_adapter(deployed.name, deployed.folder, self._base)
        content = artifact.content_hash
        if content != deployed.content_hash:
            raise ArtifactError(
                f"{deployed.folder} has the content {content} now, not {deployed.content_hash} as when "
                f"'{deployed.name}' was loaded; load it again"
            )
        return artifact

    async def _bring(self, entry: _Entry, *, evict: bool = True) -> None:
        """Load an entry onto the device (see `_place`); concurrent calls for it wait for the same load."""
        async with entry.lock:
            if entry.on_device:
                return
            artifact = entry.artifact
            if artifact is None:
                try:
                    artifact = await self._read(entry.deployed)
                except Exception as error:
                    # Its copy is deleted when it is unloaded, which may happen meanwhile.
                    if self._entries.get(entry.deployed.id) is entry:
                        self._problems[entry.deployed.id] = self._reason(entry.deployed, error)
                    raise
                self._problems.pop(entry.deployed.id, None)
            await self._place(entry, artifact, evict=evict)
            entry.artifact = artifact if self._keeps else None
            self._on_event(entry.deployed, "load")
            self._fit_host()

    async def _place(self, entry: _Entry, artifact: AdapterArtifact, *, evict: bool) -> None:
        """Load an adapter into the engine; without room, evict others or wait for them to become idle.

        Raises:
            NoRoomError: if the engine has no room, and `evict` is false.
            ArtifactError: if the engine has no room although no other adapter is loaded.
            ResourceError: if there is no room for it.
        """
        limit = self._limits.device
        deadline = asyncio.get_running_loop().time() + ROOM_SECONDS
        while True:
            if limit is None or self._taken + entry.bytes <= limit:
                self._taken += entry.bytes
                try:
                    await self._engine.load(entry.key, artifact)
                except NoRoomError as error:
                    if self._taken == entry.bytes:
                        # The engine pads factors, so it needs more than was counted.
                        raise _too_large(entry, limit) from error
                    # The engine's memory may be in pieces that are too small, or its slots be in use.
                    if not evict:
                        raise
                else:
                    entry.on_device = True
                    return
                finally:
                    if not entry.on_device:
                        self._taken -= entry.bytes
            await self._make_room(entry, deadline)

    async def _make_room(self, entry: _Entry, deadline: float) -> None:
        """Evict the least recently used adapter, or wait for one to become idle."""
        idle = [
            other
            for other in self._entries.values()
            if other.on_device and not other.leases and not self._pinned(other)
        ]
        if idle:
            victim = min(idle, key=lambda other: other.used)
            self._off_device(victim)
            self._on_event(victim.deployed, "eviction")
            return
        self._freed.clear()
        left = deadline - asyncio.get_running_loop().time()
        try:
            await asyncio.wait_for(self._freed.wait(), max(left, 0.001))
        except TimeoutError as error:
            raise ResourceError(
                f"there is no room for '{entry.deployed.name}' on the device: all adapters there are in "
                "use or pinned; try again, or raise device_bytes"
            ) from error

    def _fit_host(self) -> None:
        """Drop the least recently used factors in host memory beyond the limit; the copy on disk remains."""
        limit = self._limits.host
        held = sorted(
            (entry for entry in self._all() if entry.artifact is not None),
            key=lambda entry: entry.used,
        )
        while limit is not None and held and sum(entry.bytes for entry in held) > limit:
            held.pop(0).artifact = None

    def _retire(self, entry: _Entry) -> None:
        entry.retired = True
        if not entry.leases:
            self._off_device(entry)

    def _off_device(self, entry: _Entry) -> None:
        if not entry.on_device:
            return
        self._engine.unload(entry.key)
        entry.on_device = False
        self._taken -= entry.bytes
        self._freed.set()

    def _card(
        self, deployed: Deployed, artifact: AdapterArtifact | None = None, size: int | None = None
    ) -> ModelCard:
        """Describe a version; without its artifact, leave out what is read from the files."""
        card: ModelCard = {
            "id": deployed.name,
            "root": deployed.folder,
            "base": self._base.name,
            "content_hash": deployed.content_hash,
            "version": deployed.version,
            "aliases": list(deployed.aliases),
            "source": deployed.source,
            "pinned": deployed.pinned,
        }
        if deployed.score is not None:
            card["score"] = deployed.score
        if artifact is None:
            return card
        card["rank"], card["squeezed"] = artifact.rank, artifact.squeezed
        card["method"], card["parameters"] = artifact.meta.method, artifact.parameters
        if size is not None:
            card["bytes"] = size
        if artifact.meta.parent:
            card["parent"] = artifact.meta.parent
        return card


def _too_large(entry: _Entry, limit: int | None) -> ArtifactError:
    room = "" if limit is None else f" ({limit:,})"
    return ArtifactError(
        f"adapter '{entry.deployed.name}' is not served: it takes {entry.bytes:,} bytes, more than "
        f"all adapters may have on the device{room}; squeeze it, or raise device_bytes"
    )


def _check_rank(entry: _Entry, asked: Asked) -> None:
    """Refuse a rank at which the adapter can't be served."""
    if asked.rank is None:
        return
    try:
        check_prefix(asked.rank, entry.card["rank"], squeezed=entry.card["squeezed"])
    except SqueezeError as error:
        raise UnknownModelError(f"'{asked.text}' can't be served: {error}", param="model") from error
