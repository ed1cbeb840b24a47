from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from rayft.artifacts import WEIGHTS_FILE, AdapterArtifact
from rayft.errors import ArtifactError, ResourceError
from rayft.serving.control import transfer
from rayft.serving.control.copies import Copies
from rayft.serving.control.state import Deployed
from rayft.serving.control.transfer import receive
from tests.unit.serving.adapters import random_adapter

SHAPES = {"layer.q_proj": (6, 4)}


class Method:
    """A method of the director, as Ray Serve's handle calls it."""

    def __init__(self, call: Any) -> None:
        self._call = call

    async def remote(self, *arguments: Any) -> Any:
        try:
            return await self._call(*arguments)
        except ArtifactError as error:
            # Ray raises errors of another process in this form.
            raise RayTaskError("copy_sizes", "traceback", error).as_instanceof_cause() from None


class Director:
    """A director on another node; `error` is raised instead of an answer."""

    def __init__(self, copies: Copies) -> None:
        self.copies, self.asked, self.error = copies, 0, None  # type: ignore[var-annotated]
        self.number, self.copy_sizes, self.copy_part = map(Method, (self._number, self._sizes, self._part))

    async def _number(self) -> int:
        self.asked += 1
        if self.error:
            raise self.error
        return 1

    async def _sizes(self, name: str, content: str) -> dict[str, int]:
        return self.copies.sizes(name, content)

    async def _part(self, name: str, file: str, offset: int, size: int) -> bytes:
        return self.copies.part(name, file, offset, size)


@pytest.fixture
def director(tmp_path: Path) -> Director:
    return Director(Copies(tmp_path / "head", "one"))


@pytest.fixture
def deployed(tmp_path: Path, director: Director) -> Deployed:
    """A version of which the director has a copy, and which a replica on another node needs."""
    artifact = random_adapter("a", SHAPES)
    copy = director.copies.take(artifact.save(tmp_path / "a"), artifact.content_hash)
    folder = tmp_path / "node" / "served-one" / copy.name
    return Deployed("a", 1, str(folder), artifact.content_hash, "models:/a/1")


def test_a_missing_or_damaged_copy_is_received(
    tmp_path: Path, director: Director, deployed: Deployed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "PART_BYTES", 100)
    node, folder = Copies(tmp_path / "node", "one"), Path(deployed.folder)
    assert asyncio.run(receive(deployed, node, director))
    assert AdapterArtifact.load(folder).content_hash == deployed.content_hash
    # A complete copy remains, and the director is not called.
    asked = director.asked
    assert not asyncio.run(receive(deployed, node, director))
    assert director.asked == asked
    (folder / WEIGHTS_FILE).write_bytes(b"")
    assert asyncio.run(receive(deployed, node, director))
    assert AdapterArtifact.load(folder).content_hash == deployed.content_hash


def test_a_copy_that_the_director_can_not_send_is_an_error(
    tmp_path: Path, director: Director, deployed: Deployed, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Copies(tmp_path / "node", "one")
    director.error = ActorDiedError()
    with pytest.raises(ResourceError, match="did not send its copy"):
        asyncio.run(receive(deployed, node, director))
    director.error = None
    shutil.rmtree(tmp_path / "head")
    with pytest.raises(ArtifactError, match=r"there is no folder .*head/served-one/"):
        asyncio.run(receive(deployed, node, director))
    monkeypatch.setattr(transfer, "UP_SECONDS", 0.05)
    director.number = Method(lambda: asyncio.sleep(60))
    with pytest.raises(ResourceError, match=r"no answer in 0\.05 seconds"):
        asyncio.run(receive(deployed, node, director))
    assert not Path(deployed.folder).exists()
