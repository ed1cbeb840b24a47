"""The one place that decides what is served: it changes all replicas together, or none.

A change is prepared by every replica (read, checked, brought to the device), and only if all of them could
is it told to be served; else it is undone everywhere, and who asked hears why. Replicas that start later, or
missed a change, ask for what is served by themselves. A director that was lost takes over what its replicas
serve.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ray.serve as ray_serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from rayft.errors import BadRequestError, RayftError, RequestError, ResourceError
from rayft.registry.ref import Registry
from rayft.registry.store import MlflowRegistry
from rayft.serving import sources, state
from rayft.serving.admission import BaseModel
from rayft.serving.config import ServeConfig
from rayft.serving.state import Deployed, Served

__all__ = ["Director", "DirectorDeployment", "initial"]

logger = logging.getLogger("ray.serve")

PREPARE_SECONDS = 300.0
"""How long the replicas may take to prepare a change."""


class Director:
    """Keeps what is served; Ray Serve makes one."""

    def __init__(self, config: ServeConfig, replicas: DeploymentHandle[Any]) -> None:
        """Take the configuration's adapters from where they are.

        Raises:
            ArtifactError, RegistryError: if one is not there.
        """
        self._config, self._replicas = config, replicas
        self._registry = _registry(config)
        self._changing = asyncio.Lock()
        self._served = initial(config)
        self._refused: str | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Begin to follow the registry, and serve the adapters of a `user_config` that names some.

        What can't be served is refused, and what was served is served on: `adapters` and the log tell why.

        Raises:
            ArtifactError, RegistryError: if one is not there when the director starts.
        """
        wanted = user_config.get("adapters")
        if not self._tasks:
            # Replicas start by asking what is served: there is none to tell yet.
            if wanted is not None:
                self._served = await self._exactly(wanted)
            self._tasks.add(asyncio.create_task(self._follow()))
        elif wanted is not None:
            try:
                async with self._changing:
                    served = await self._exactly(wanted)
                    if served.versions != self._served.versions:
                        await self._change(served)
            except RayftError as error:
                self._refused = str(error)
                logger.warning("the change of adapters was refused, the old ones are served on: %s", error)

    async def state(self) -> Served:
        """Give what is to be served."""
        return self._served

    async def number(self) -> int:
        """Give the number of the last change."""
        return self._served.number

    async def adapters(self) -> dict[str, Any]:
        """Tell what is served, and why the last change was refused, if it was."""
        return {"served": self._served, "refused": self._refused}

    async def load(self, name: str, source: str, weight: float, pinned: bool) -> Deployed:
        """Serve an adapter under a name, on all replicas or on none.

        Raises:
            BadRequestError: with the reason, if it can't be served.
            ResourceError: if replicas fail or take too long.
        """
        async with self._changing:
            try:
                new = await self._find(name, source, pinned=pinned)
                await self._change(state.loaded(self._served, new, weight))
                return self._served.of(name)[-1]
            except (RequestError, ResourceError):
                raise
            except RayftError as error:
                raise BadRequestError(str(error), param="source") from error

    async def unload(self, name: str) -> None:
        """Serve a name no more; requests that run with it end first."""
        async with self._changing:
            await self._change(state.unloaded(self._served, name))

    async def promote(self, name: str) -> Deployed:
        """Give all of a name's traffic to its canary."""
        async with self._changing:
            await self._change(state.promoted(self._served, name))
            return self._served.of(name)[-1]

    async def rollback(self, name: str) -> Deployed:
        """Take back a canary, or the last change of a name."""
        async with self._changing:
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

    async def _change(self, wanted: Served) -> None:
        """Have all replicas prepare a change, then serve it."""
        answers = await self._all("prepare", wanted)
        errors = [answer for answer in answers if isinstance(answer, Exception) and not _gone(answer)]
        if errors:
            await self._all("abandon", wanted.number)
            raise _cause(errors[0])
        self._served, self._refused = wanted, None
        await self._all("commit", wanted.number)

    async def _all(self, method: str, *arguments: Any) -> list[Any]:
        try:
            call = self._replicas.broadcast(method, *arguments)
            return await call.results_async(timeout_s=PREPARE_SECONDS, return_exceptions=True)
        except TimeoutError as error:
            if method == "prepare":
                return [
                    ResourceError(f"a replica took more than {PREPARE_SECONDS:g} s to get ready; {error}")
                ]
            return []

    async def _exactly(self, wanted: Mapping[str, str]) -> Served:
        """Give what is served with these adapters and no others."""
        served = self._served
        for name in served.names():
            if name not in wanted:
                served = state.unloaded(served, name)
        for name, source in wanted.items():
            pinned = name in self._config.pinned
            served = state.loaded(served, await self._find(name, source, pinned=pinned))
        return replace(served, number=self._served.number + 1)

    async def _take_over(self) -> None:
        """After a director was lost: go on with what its replicas serve."""
        try:
            found = await self._replicas.broadcast("serving").results_async(
                timeout_s=5, return_exceptions=True
            )
        except (TimeoutError, RayServeException):
            # Replicas that are not deployed yet ask the director what to serve.
            return
        newest = max(
            (one for one in found if isinstance(one, Served)), key=lambda one: one.number, default=None
        )
        if newest is not None and newest.number > self._served.number:
            self._served = newest

    async def _follow(self) -> None:
        """Look up again, now and then, what the registry's aliases point to."""
        await self._take_over()
        while True:
            await asyncio.sleep(self._config.follow_seconds)
            for deployed in self._served.versions:
                if not sources.followed(deployed.source) or len(self._served.of(deployed.name)) > 1:
                    continue
                try:
                    await self._look_again(deployed)
                except RayftError as error:
                    self._refused = str(error)
                    logger.warning("%s is served on as it is: %s", deployed.name, error)
                except Exception:
                    # Whatever it was, it must not be the last look.
                    logger.exception("%s is served on as it is", deployed.name)

    async def _look_again(self, deployed: Deployed) -> None:
        assert self._registry is not None
        if not await asyncio.to_thread(sources.moved, deployed, self._registry):
            return
        new = await self._find(deployed.name, deployed.source, pinned=deployed.pinned)
        async with self._changing:
            if deployed not in self._served.versions or new == deployed:
                return
            await self._change(state.loaded(self._served, new))
            logger.info("%s is %s now", deployed.name, new.id)


def initial(config: ServeConfig, base: BaseModel | None = None) -> Served:
    """Find the adapters of a configuration, and check them against a base where one is given.

    Raises:
        ArtifactError, RegistryError: if one is not there, or can't be served.
    """
    served = Served()
    registry = _registry(config)
    for name, source in config.adapters.items():
        pinned = name in config.pinned
        new = sources.find(
            name, source, registry, config.fetched, config.max_adapter_bytes, pinned=pinned, base=base
        )
        served = state.loaded(served, new)
    return replace(served, number=1)


def _registry(config: ServeConfig) -> Registry | None:
    return MlflowRegistry(config.registry) if config.registry else None


def _gone(error: Exception) -> bool:
    """Say whether a replica died: the one that takes its place asks for what is served."""
    return isinstance(error, RayActorError)


def _cause(error: Exception) -> Exception:
    cause = error.cause if isinstance(error, RayTaskError) else error
    return cause if isinstance(cause, RayftError) else ResourceError(f"a replica failed: {cause}")


DirectorDeployment = ray_serve.deployment(name="Director")(Director)
"""What Ray Serve runs; `rayft.serving.build` sets its size and resources."""
