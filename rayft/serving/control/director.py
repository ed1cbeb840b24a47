"""The director decides what is served, and changes it on all replicas or on none.

Every replica first prepares a change: it reads and checks the new adapters and loads them onto the device. If
all replicas succeed, they commit the change; otherwise all of them abandon it, and the caller
receives the reason. Replicas that start later, or that missed a change, ask the director for what is served.

Adapters are served from the server's own copies (`copies`), and what is served is recorded beside them. A
director that replaces a lost one continues from the record, whatever has happened to the adapters' own
folders.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray.serve as ray_serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from rayft.errors import BadRequestError, RayftError, RequestError, ResourceError, TrackingError
from rayft.serving.config import ServeConfig
from rayft.serving.control import sources, state
from rayft.serving.control.admission import BaseModel
from rayft.serving.control.copies import TOUCH_SECONDS, Copies, Record
from rayft.serving.control.state import Deployed, Served
from rayft.serving.presence import cause_of, ending

__all__ = ["Director", "DirectorDeployment", "initial"]

logger = logging.getLogger("ray.serve")

PREPARE_SECONDS = 300.0
"""Time limit for the replicas to prepare a change."""

DROP_SECONDS = 10.0
"""Time limit for the replicas to delete copies on their nodes."""


class Director:
    """Keeps and changes what is served; Ray Serve runs one instance."""

    def __init__(self, config: ServeConfig, replicas: DeploymentHandle[Any], server: str) -> None:
        """Copy the configuration's adapters, or continue from the record of a director that was lost.

        Args:
            config: the server's configuration.
            replicas: handle of the replicas.
            server: identifies the server; a director that replaces a lost one receives the same.

        Raises:
            ArtifactError, RegistryError: if an adapter is missing.
            ResourceError: if an adapter can't be copied.
        """
        self._config, self._replicas = config, replicas
        self._registry = sources.registry_at(config.registry)
        self._changing = asyncio.Lock()
        self._copies = Copies(config.fetched, server)
        record = self._copies.record()
        if record is None:
            self._copies.remove_stale()
            record = Record(self._copied(initial(config)))
            self._copies.save(record)
        self._record = record
        self._refused: str | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Start to follow the registry, and serve exactly the adapters that a `user_config` lists.

        Ray Serve calls this when the director starts and when `user_config` changes. If the adapters can't be
        served, what was served before remains, and the reason is in the log and in the result of `adapters`.

        Raises:
            ArtifactError, RegistryError: if an adapter is missing and no replica has started yet.
        """
        wanted, first = user_config.get("adapters"), not self._tasks
        if first:
            self._tasks |= {asyncio.create_task(self._follow()), asyncio.create_task(self._touch())}
        if wanted is None or (first and wanted == self._record.wanted):
            # A lost director applied this `user_config`; adapters loaded over HTTP since then remain.
            return
        try:
            async with self._alone():
                served = await self._exactly(wanted)
                if not first and served.versions != self._served.versions:
                    await self._change(served)
                # Replicas that start ask for what is served, and running ones notice that they missed a
                # change.
                self._keep(replace(self._record, served=served if first else self._served, wanted=wanted))
        except RayftError as error:
            if first and not self._record.base:
                raise
            self._refused = str(error)
            logger.warning("the change of adapters was refused, the previous ones remain served: %s", error)

    @property
    def _served(self) -> Served:
        return self._record.served

    async def state(self) -> Served:
        """Return what is to be served."""
        return self._served

    async def number(self) -> int:
        """Return the number of the last change."""
        return self._served.number

    async def base(self) -> str:
        """Return the fingerprint of the base that is served; empty until a replica has started."""
        return self._record.base

    async def started(self, base: str) -> str:
        """Record the base of the first replica that starts.

        Args:
            base: fingerprint of the calling replica's base.

        Returns:
            The fingerprint of the base that is served: this one, or that of an earlier replica.
        """
        if not self._record.base:
            self._keep(replace(self._record, base=base))
        return self._record.base

    async def copy_sizes(self, name: str, content: str) -> dict[str, int]:
        """Return the sizes of a copy's files, for a replica on another node (see `Copies.sizes`)."""
        return await asyncio.to_thread(self._copies.sizes, name, content)

    async def copy_part(self, name: str, file: str, offset: int, size: int) -> bytes:
        """Return a part of one of a copy's files."""
        return await asyncio.to_thread(self._copies.part, name, file, offset, size)

    async def adapters(self) -> dict[str, Any]:
        """Return what is served, and the reason if the last change was refused."""
        return {"served": self._served, "refused": self._refused}

    async def load(self, name: str, source: str, weight: float, pinned: bool) -> Deployed:
        """Serve an adapter under a name, on all replicas or on none.

        Args:
            name: the name.
            source: where the adapter is loaded from.
            weight: share of the name's traffic; below 1 the adapter becomes a canary.
            pinned: whether it stays on the device.

        Raises:
            BadRequestError: with the reason, if it can't be served.
            ResourceError: if replicas fail or take too long.
        """
        async with self._alone():
            try:
                new = await self._find(name, source, pinned=pinned)
                await self._change(state.loaded(self._served, await self._copy(new), weight))
                return self._served.of(name)[-1]
            except (RequestError, ResourceError):
                raise
            except TrackingError as error:
                # The registry can't be reached, which is not the fault of the request.
                raise ResourceError(str(error)) from error
            except RayftError as error:
                raise BadRequestError(str(error), param="source") from error

    async def unload(self, name: str) -> None:
        """Stop serving a name; requests that are running with it end first."""
        async with self._alone():
            await self._change(state.unloaded(self._served, name))

    async def promote(self, name: str) -> Deployed:
        """Route all traffic of a name to its canary."""
        async with self._alone():
            await self._change(state.promoted(self._served, name))
            return self._served.of(name)[-1]

    async def rollback(self, name: str) -> Deployed:
        """Stop serving the canary of a name, or else undo the name's last change."""
        async with self._alone():
            await self._change(state.rolled_back(self._served, name))
            return self._served.of(name)[-1]

    async def _find(self, name: str, source: str, *, pinned: bool) -> Deployed:
        config = self._config
        return await asyncio.to_thread(
            sources.find,
            name,
            source,
            self._registry,
            config.fetched,
            config.max_adapter_bytes,
            pinned=pinned,
        )

    async def _copy(self, new: Deployed) -> Deployed:
        """Copy a version's adapter, and return the version with the folder of the copy."""
        copy = await asyncio.to_thread(self._copies.take, Path(new.folder), new.content_hash)
        return replace(new, folder=str(copy))

    def _copied(self, served: Served) -> Served:
        """Copy all adapters, and return what is served with the folders of the copies."""
        versions = tuple(
            replace(one, folder=str(self._copies.take(Path(one.folder), one.content_hash)))
            for one in served.versions
        )
        return replace(served, versions=versions)

    def _keep(self, record: Record) -> None:
        """Write the record, and then use it."""
        self._copies.save(record)
        self._record = record

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """Allow one change at a time; afterwards delete the copies that neither it nor a rollback needs."""
        async with self._changing:
            try:
                yield
            finally:
                served = self._served
                folders = {one.folder for one in (*served.versions, *served.previous.values())}
                if gone := self._copies.keep(folders):
                    await self._all("drop", gone, seconds=DROP_SECONDS)

    async def _change(self, wanted: Served) -> None:
        """Let all replicas prepare a change, then record and commit it."""
        try:
            await self._prepare(wanted)
            self._keep(replace(self._record, served=wanted))
        except RayftError:
            await self._all("abandon", wanted.number)
            raise
        self._refused = None
        await self._all("commit", wanted.number)

    async def _prepare(self, wanted: Served) -> None:
        answers = await self._all("prepare", wanted)
        errors = [answer for answer in answers if isinstance(answer, Exception)]
        others = [error for error in errors if not _gone(error)]
        if others:
            raise _cause(others[0])
        if len(errors) == len(answers):
            raise ResourceError("no replica is up to check the adapter; try again")

    async def _all(self, method: str, *arguments: Any, seconds: float = PREPARE_SECONDS) -> list[Any]:
        try:
            call = self._replicas.broadcast(method, *arguments)
            return await call.results_async(timeout_s=seconds, return_exceptions=True)
        except TimeoutError as error:
            if method == "prepare":
                return [
                    ResourceError(
                        f"a replica took more than {PREPARE_SECONDS:g} s to prepare the change; {error}"
                    )
                ]
            return []
        except RayServeException:
            # No replica is up.
            return []

    async def _exactly(self, wanted: Mapping[str, str]) -> Served:
        """Return the state in which exactly these adapters are served."""
        served = self._served
        for name in served.names():
            if name not in wanted:
                served = state.unloaded(served, name)
        for name, source in wanted.items():
            pinned = name in self._config.pinned
            new = await self._copy(await self._find(name, source, pinned=pinned))
            served = state.loaded(served, new)
        return replace(served, number=self._served.number + 1)

    async def _touch(self) -> None:
        """Regularly mark the copies as in use."""
        while True:
            self._copies.touch()
            await asyncio.sleep(TOUCH_SECONDS)

    async def _follow(self) -> None:
        """Regularly look up which versions the registry's aliases denote."""
        while True:
            await asyncio.sleep(self._config.follow_seconds)
            for deployed in self._served.versions:
                if not sources.followed(deployed.source) or len(self._served.of(deployed.name)) > 1:
                    continue
                try:
                    await self._look_again(deployed)
                except RayftError as error:
                    self._refused = str(error)
                    logger.warning("%s remains served as it is: %s", deployed.name, error)
                except Exception:
                    # No error may end this loop.
                    logger.exception("%s remains served as it is", deployed.name)

    async def _look_again(self, deployed: Deployed) -> None:
        assert self._registry is not None
        if not await asyncio.to_thread(sources.moved, deployed, self._registry):
            return
        new = await self._find(deployed.name, deployed.source, pinned=deployed.pinned)
        async with self._alone():
            if deployed not in self._served.versions:
                return
            wanted = state.loaded(self._served, await self._copy(new))
            if wanted.versions == self._served.versions:
                return
            await self._change(wanted)
            logger.info("%s is %s now", deployed.name, wanted.of(deployed.name)[-1].id)

    def __del__(self) -> None:
        # Ray Serve calls this when it stops the director. Another one may replace it, and needs the copies,
        # unless the application is being deleted.
        if ending():
            self._copies.remove()


def initial(config: ServeConfig, base: BaseModel | None = None) -> Served:
    """Find the adapters of a configuration, and check that they match a base if it is given.

    Raises:
        ArtifactError, RegistryError: if an adapter is missing or can't be served.
    """
    served = Served()
    registry = sources.registry_at(config.registry)
    for name, source in config.adapters.items():
        pinned = name in config.pinned
        new = sources.find(
            name, source, registry, config.fetched, config.max_adapter_bytes, pinned=pinned, base=base
        )
        served = state.loaded(served, new)
    return replace(served, number=1)


def _gone(error: Exception) -> bool:
    """Return whether a replica died; the one that replaces it asks for what is served."""
    return isinstance(error, RayActorError)


def _cause(error: Exception) -> Exception:
    cause = cause_of(error)
    return cause if isinstance(cause, RayftError) else ResourceError(f"a replica failed: {cause}")


DirectorDeployment = ray_serve.deployment(name="Director")(Director)
"""What Ray Serve runs; `rayft.serving.build` sets its size and resources."""
