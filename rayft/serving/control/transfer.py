"""Copies an adapter from the director's node to the node of a replica, if the two share no disk.

The director sends the files in parts, which Ray transports. The replica writes them under the same path on
its own node. Other replicas of that node find them there, as does this one when it reads an evicted adapter
again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from typing import Any, TypeVar

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from rayft.artifacts import holds
from rayft.errors import RayftError, ResourceError
from rayft.serving.control.copies import Copies
from rayft.serving.control.state import Deployed
from rayft.serving.presence import cause_of

__all__ = ["PART_BYTES", "receive"]

PART_BYTES = 16 * 2**20
"""Largest number of bytes in one part."""

UP_SECONDS = 10.0
"""Time limit for the director's first answer; Ray Serve starts it again if it is lost."""

CALL_SECONDS = 120.0
"""Time limit for the director to check a copy, or to read a part of it."""

Result = TypeVar("Result")


async def receive(deployed: Deployed, copies: Copies, director: Any) -> bool:
    """Copy an adapter from the director to this node, unless this node has a complete copy.

    Args:
        deployed: the version whose copy is missing or damaged on this node.
        copies: the server's folder on this node.
        director: calls the director.

    Returns:
        Whether it was copied: False if the copy on this node is complete.

    Raises:
        ArtifactError: if the director's copy is missing or damaged, too.
        ResourceError: if the director does not answer, or the files can't be written here.
    """
    folder = Path(deployed.folder)
    if await asyncio.to_thread(holds, folder, deployed.content_hash):
        return False
    await _answer(director.number.remote(), UP_SECONDS)
    sizes = await _answer(director.copy_sizes.remote(folder.name, deployed.content_hash), CALL_SECONDS)
    with copies.staging(sum(sizes.values())) as staging:
        for name, size in sizes.items():
            with (staging / name).open("wb") as file:
                for offset in range(0, size, PART_BYTES):
                    call = director.copy_part.remote(folder.name, name, offset, PART_BYTES)
                    await asyncio.to_thread(file.write, await _answer(call, CALL_SECONDS))
        await asyncio.to_thread(copies.put, staging, folder.name, deployed.content_hash)
    return True


async def _answer(call: Awaitable[Result], seconds: float) -> Result:
    try:
        async with asyncio.timeout(seconds):
            return await call
    except TimeoutError as error:
        raise ResourceError(
            f"the director did not send its copy of the adapter: no answer in {seconds:g} seconds; try again"
        ) from error
    except (RayError, RayServeException) as error:
        cause = cause_of(error)
        if isinstance(cause, RayftError):
            raise cause from error
        raise ResourceError(f"the director did not send its copy of the adapter: {cause}") from error
