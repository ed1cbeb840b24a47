from __future__ import annotations

import asyncio
import errno
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import RayServeException

from rayft.artifacts import AdapterArtifact
from rayft.errors import ArtifactError, BadRequestError, DiskFullError, ResourceError, UnknownModelError
from rayft.registry.ref import AdapterVersion
from rayft.registry.store import MlflowRegistry
from rayft.serving.config import ServeConfig
from rayft.serving.control.copies import Copies
from rayft.serving.control.director import Director
from rayft.serving.control.state import Served
from tests.unit.serving.adapters import random_adapter

SHAPES = {"layer.q_proj": (6, 4)}


class Replica:
    """Records the calls that it receives; `fails` is the result of `prepare`."""

    dropped: tuple[str, ...] = ()

    def __init__(self, fails: Exception | None = None, serving: Served | None = None) -> None:
        self.fails, self.calls = fails, []  # type: ignore[var-annotated]
        self.now = serving or Served()

    def take(self, method: str, *arguments: Any) -> Any:
        self.calls.append(method)
        if method == "prepare":
            self.wanted = arguments[0]
            return self.fails
        if method == "commit":
            self.now = self.wanted
        if method == "drop":
            self.dropped += tuple(arguments[0])
        return self.now if method == "serving" else {}


class Handle:
    """Calls all replicas, as Ray Serve's handle does."""

    def __init__(self, *replicas: Replica) -> None:
        self.replicas = list(replicas)

    def broadcast(self, method: str, *arguments: Any) -> Handle:
        if not self.replicas:
            # The deployment has no replicas yet.
            raise RayServeException("unavailable")
        self.found = [replica.take(method, *arguments) for replica in self.replicas]
        return self

    async def results_async(self, **_: Any) -> list[Any]:
        return self.found


COPIES = Path("runs/serving/adapters/served-one")


@pytest.fixture(autouse=True)
def _folder_of_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], str]:
    return lambda name: str(random_adapter(name, SHAPES).save(tmp_path / name))


def go(
    config: ServeConfig,
    handle: Handle,
    scenario: Callable[[Director], Awaitable[Any]],
    server: str = "one",
) -> Served:
    """Run a scenario with a director, and return what it serves in the end."""

    async def run() -> Served:
        director = Director(config, handle, server)  # type: ignore[arg-type]
        await director.reconfigure({})
        await scenario(director)
        return await director.state()

    return asyncio.run(run())


def test_a_change_is_prepared_by_all_and_then_committed(folder: Callable[[str], str]) -> None:
    replicas = [Replica(), Replica()]

    async def scenario(director: Director) -> None:
        made = await director.load("b", folder("b"), 1.0, pinned=False)
        assert (made.name, made.version) == ("b", 1)
        await director.unload("a")

    served = go(ServeConfig(adapters={"a": folder("a")}), Handle(*replicas), scenario)
    for replica in replicas:
        assert replica.calls == [*["prepare", "commit"] * 2, "drop"]
        assert replica.now.names() == ("b",)
    assert served.number == 3


def test_a_change_that_one_replica_refuses_is_served_by_none(folder: Callable[[str], str]) -> None:
    replicas = [Replica(), Replica(ArtifactError("adapter 'b' is not served: 6x5"))]

    async def scenario(director: Director) -> None:
        with pytest.raises(BadRequestError, match="6x5"):
            await director.load("b", folder("b"), 1.0, pinned=False)
        replicas[1].fails = ResourceError("no room")
        with pytest.raises(ResourceError, match="no room"):
            await director.load("b", folder("b"), 1.0, pinned=False)
        with pytest.raises(BadRequestError, match="nowhere"):
            await director.load("b", "/nowhere", 1.0, pinned=False)
        with pytest.raises(UnknownModelError):
            await director.unload("b")

    served = go(ServeConfig(adapters={"a": folder("a")}), Handle(*replicas), scenario)
    for replica in replicas:
        assert replica.calls == ["prepare", "abandon", "drop"] * 2
    assert served.names() == ("a",)


def test_a_registry_that_can_not_be_reached_is_a_503() -> None:
    async def scenario(director: Director) -> None:
        with pytest.raises(ResourceError, match=r"MLflow at .* can't be used"):
            await director.load("b", "models:/b/1", 1.0, pinned=False)

    go(ServeConfig(registry="http://127.0.0.1:9"), Handle(Replica()), scenario)


def test_a_dead_replica_does_not_prevent_a_change(folder: Callable[[str], str]) -> None:
    replicas = [Replica(), Replica(ActorDiedError())]

    async def scenario(director: Director) -> None:
        await director.load("b", folder("b"), 1.0, pinned=False)

    assert go(ServeConfig(), Handle(*replicas), scenario).names() == ("b",)


async def nothing(_: Director) -> None:
    await asyncio.sleep(0)


def test_a_change_that_no_replica_could_prepare_is_refused(folder: Callable[[str], str]) -> None:
    for handle in (Handle(), Handle(Replica(ActorDiedError()))):

        async def scenario(director: Director) -> None:
            with pytest.raises(ResourceError, match="no replica is up"):
                await director.load("b", folder("b"), 1.0, pinned=False)

        assert go(ServeConfig(), handle, scenario).names() == ()


@pytest.mark.parametrize("handle", [Handle(), Handle(Replica())])
def test_a_director_that_replaces_a_lost_one_serves_the_same(
    folder: Callable[[str], str], handle: Handle
) -> None:
    async def load(director: Director) -> None:
        await director.load("b", folder("b"), 1.0, pinned=False)
        assert await director.started("base") == "base"

    config = ServeConfig(adapters={"a": folder("a")})
    before = go(config, Handle(Replica()), load)
    shutil.rmtree(folder("a"))
    shutil.rmtree(folder("b"))

    async def another_base(director: Director) -> None:
        assert await director.started("another") == "base"

    assert go(config, handle, another_base) == before
    # Another server serves the adapters of its configuration.
    folder("a")
    assert go(config, handle, nothing, server="two").names() == ("a",)


def test_a_director_that_replaces_a_lost_one_does_not_apply_its_configuration_again(
    folder: Callable[[str], str],
) -> None:
    async def run(user_config: dict[str, Any]) -> tuple[str, ...]:
        director = Director(ServeConfig(), Handle(Replica()), "one")  # type: ignore[arg-type]
        await director.reconfigure(user_config)
        await director.started("base")
        if user_config["adapters"].keys() == {"a"}:
            await director.load("b", folder("b"), 1.0, pinned=False)
        return (await director.state()).names()

    a, c = folder("a"), folder("c")
    # Ray Serve starts a director again that failed to start; the second attempt must fail too.
    for _ in range(2):
        with pytest.raises(ArtifactError, match="nowhere"):
            asyncio.run(run({"adapters": {"a": "/nowhere"}}))
    for wanted, served in (
        ({"a": a}, ("a", "b")),
        ({"a": a}, ("a", "b")),
        ({"lost": "/nowhere"}, ("a", "b")),
        ({"c": c}, ("c",)),
    ):
        assert asyncio.run(run({"adapters": wanted})) == served


def test_a_copy_is_served_and_deleted_once_nothing_needs_it(folder: Callable[[str], str]) -> None:
    replica = Replica()

    def copies() -> int:
        return len([path for path in COPIES.iterdir() if path.is_dir()])

    async def scenario(director: Director) -> None:
        (a,) = (await director.state()).of("a")
        shutil.rmtree(folder("a"))
        assert AdapterArtifact.load(a.folder).content_hash == a.content_hash
        for name, count in (("b", 2), ("c", 2)):
            # The version that a rollback would serve again is kept.
            await director.load("a", folder(name), 1.0, pinned=False)
            assert copies() == count
        with pytest.raises(BadRequestError, match="not served yet"):
            await director.load("new", folder("d"), 0.5, pinned=False)
        assert copies() == 2
        served = await director.state()
        kept = {one.folder for one in (*served.versions, *served.previous.values())}
        await director.unload("a")
        assert copies() == 0
        # Replicas on other nodes delete their copies of unloaded, replaced and refused adapters too.
        assert {Path(one).name for one in kept} <= set(replica.dropped)
        assert len(replica.dropped) == len(set(replica.dropped)) == 4

    go(ServeConfig(adapters={"a": folder("a")}), Handle(replica), scenario)


def test_a_copy_is_sent_in_parts(folder: Callable[[str], str]) -> None:
    async def scenario(director: Director) -> None:
        (a,) = (await director.state()).of("a")
        name = Path(a.folder).name
        sizes = await director.copy_sizes(name, a.content_hash)
        assert sizes == {path.name: path.stat().st_size for path in Path(a.folder).iterdir()}
        weights = (Path(a.folder) / "adapter_model.safetensors").read_bytes()
        assert await director.copy_part(name, "adapter_model.safetensors", 10, 20) == weights[10:30]

    go(ServeConfig(adapters={"a": folder("a")}), Handle(Replica()), scenario)


def test_a_full_disk_makes_a_change_fail_and_what_was_served_remains(
    folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def scenario(director: Director) -> None:
        before = await director.state()
        with monkeypatch.context() as patched:
            patched.setattr(shutil, "copyfile", full)
            with pytest.raises(DiskFullError, match="runs/serving/adapters"):
                await director.load("b", folder("b"), 1.0, pinned=False)
        assert await director.state() == before
        await director.load("b", folder("b"), 1.0, pinned=False)

    go(ServeConfig(adapters={"a": folder("a")}), Handle(Replica()), scenario)


def test_a_change_that_can_not_be_recorded_is_abandoned(
    folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = Replica()

    def full(*_: object) -> None:
        raise DiskFullError("no space for the record")

    async def scenario(director: Director) -> None:
        monkeypatch.setattr(Copies, "save", full)
        with pytest.raises(DiskFullError, match="no space for the record"):
            await director.load("b", folder("b"), 1.0, pinned=False)

    assert go(ServeConfig(adapters={"a": folder("a")}), Handle(replica), scenario).names() == ("a",)
    assert replica.calls == ["prepare", "abandon", "drop"]


def test_a_changed_user_config_is_served_unless_it_is_wrong(folder: Callable[[str], str]) -> None:
    replica = Replica()

    async def scenario(director: Director) -> None:
        await director.reconfigure({"adapters": {"b": folder("b")}})
        assert (await director.state()).names() == ("b",)
        await director.reconfigure({"adapters": {"c": "/nowhere"}})
        assert (await director.state()).names() == ("b",)
        assert "/nowhere" in (await director.adapters())["refused"]
        before = len(replica.calls)
        await director.reconfigure({"adapters": {"b": folder("b")}})
        assert [what for what in replica.calls[before:] if what == "prepare"] == []

    go(ServeConfig(adapters={"a": folder("a")}), Handle(replica), scenario)


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A registry in which the alias `champion` of `a` denotes the folder and version in the returned dict."""
    where: dict[str, str] = {}

    def resolve(_: MlflowRegistry, ref: Any) -> Any:
        from dataclasses import replace

        return replace(ref, version=int(where["version"]), content_hash="x", uri="")

    monkeypatch.setattr(MlflowRegistry, "resolve", resolve)
    monkeypatch.setattr(MlflowRegistry, "fetch", lambda *_: Path(where["champion"]))
    found = [AdapterVersion("a", number, "", "", "", ("champion",)) for number in (1, 2)]
    monkeypatch.setattr(MlflowRegistry, "versions", lambda *_: found)
    return where


async def turned(director: Director, version: int) -> None:
    """Wait until a version is served, for at most four seconds."""
    for _ in range(200):
        await asyncio.sleep(0.02)
        if (await director.state()).of("a")[0].version == version:
            break


def test_an_alias_that_moves_is_followed(folder: Callable[[str], str], registry: dict[str, str]) -> None:
    registry |= {"champion": folder("one"), "version": "1"}
    config = ServeConfig(
        adapters={"a": "models:/a@champion"}, registry="sqlite:///none.db", follow_seconds=0.02
    )
    replica = Replica()

    async def scenario(director: Director) -> None:
        first = (await director.state()).of("a")[0]
        assert (first.version, first.aliases) == (1, ("champion",))
        await asyncio.sleep(0.1)
        assert "prepare" not in replica.calls
        registry.update(champion=folder("two"), version="2")
        await turned(director, 2)
        assert replica.now.of("a")[0].version == 2
        registry.update(champion="/gone", version="3")
        for _ in range(200):
            await asyncio.sleep(0.02)
            if (await director.adapters())["refused"]:
                break
        assert (await director.state()).of("a")[0].version == 2

    go(config, Handle(replica), scenario)


def test_a_director_that_starts_before_its_replicas_follows_aliases(
    folder: Callable[[str], str], registry: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry |= {"champion": folder("one"), "version": "1"}
    config = ServeConfig(
        adapters={"a": "models:/a@champion"}, registry="sqlite:///none.db", follow_seconds=0.02
    )
    handle, replica, looks = Handle(), Replica(), list[int]()
    look = MlflowRegistry.resolve

    def once_broken(registry: MlflowRegistry, ref: Any) -> Any:
        looks.append(1)
        if len(looks) == 2:
            raise OSError("whatever it may be")
        return look(registry, ref)

    monkeypatch.setattr(MlflowRegistry, "resolve", once_broken)

    async def scenario(director: Director) -> None:
        await asyncio.sleep(0.05)
        handle.replicas.append(replica)
        registry.update(champion=folder("two"), version="2")
        await turned(director, 2)
        assert replica.now.of("a")[0].version == 2
        assert len(looks) > 2

    go(config, handle, scenario)
