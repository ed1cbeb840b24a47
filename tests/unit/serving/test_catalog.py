from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rayft.artifacts import AdapterArtifact, ArtifactMeta
from rayft.errors import ArtifactError, BaseMismatchError, ResourceError, UnknownModelError
from rayft.methods.base import LoraFactors
from rayft.serving.catalog import Catalog, Limits
from rayft.serving.control.admission import BaseModel, check_adapter
from rayft.serving.control.sources import find
from rayft.serving.control.state import Deployed, Served, loaded, unloaded
from rayft.serving.engine.api import NoRoomError
from rayft.squeeze.rank import squeeze
from tests.unit.serving.adapters import random_adapter

SHAPES = {"layer.q_proj": (6, 4), "layer.v_proj": (3, 4)}
BASE = BaseModel(name="org/tiny", fingerprint="f" * 16, shapes=SHAPES)


class RecordingEngine:
    """Records which adapters are loaded, and has room for a number of them."""

    def __init__(self, room: int = 1000) -> None:
        self.loaded: dict[str, Mapping[str, LoraFactors]] = {}
        self.room = room

    async def load(self, name: str, artifact: AdapterArtifact) -> None:
        assert name not in self.loaded
        await asyncio.sleep(0)
        if len(self.loaded) >= self.room:
            raise NoRoomError("the engine is full")
        self.loaded[name] = artifact.modules

    def unload(self, name: str) -> None:
        del self.loaded[name]


class Server:
    """A catalog with its engine, and the events of the catalog."""

    def __init__(
        self, base: BaseModel = BASE, *, room: int = 1000, keeps: bool = False, **limits: int
    ) -> None:
        self.engine = RecordingEngine(room)
        self.events: list[tuple[str, str]] = []
        self.catalog = Catalog(
            base,
            self.engine,  # type: ignore[arg-type]
            torch.float32,
            keeps=keeps,
            limits=Limits(**limits),
            on_event=lambda deployed, what: self.events.append((deployed.name, what)),
        )
        self.state = Served()

    def sync(self, adapters: dict[str, str], pinned: tuple[str, ...] = ()) -> None:
        asyncio.run(self.async_sync(adapters, pinned))

    async def async_sync(self, adapters: dict[str, str], pinned: tuple[str, ...] = ()) -> None:
        state = self.state
        for name in state.names():
            if name not in adapters:
                state = unloaded(state, name)
        for name, folder in adapters.items():
            state = loaded(state, find(name, folder, None, folder, "1GB", pinned=name in pinned))
        state = replace(state, number=self.state.number + 1)
        await self.catalog.prepare(state)
        await self.catalog.commit(state.number)
        self.state = state

    def names(self) -> list[str]:
        return [card["id"] for card in self.catalog.cards()]

    def keys(self, *models: str) -> list[str | None]:
        """Lease models one after the other, and return the engine's names of their adapters."""

        async def each() -> list[str | None]:
            found = []
            for model in models:
                async with self.catalog.lease(model) as lease:
                    assert lease.adapter is None or lease.adapter in self.engine.loaded
                    found.append(lease.adapter)
            return found

        return asyncio.run(each())


@pytest.fixture
def served() -> Server:
    return Server()


def save(folder: Path, name: str = "a", *, squeezed: bool = False, **extra: Any) -> str:
    artifact = random_adapter(name, SHAPES, BASE.fingerprint, **extra)
    return str((squeeze(artifact) if squeezed else artifact).save(folder / name))


def test_names_resolve_to_base_and_adapters(served: Server, tmp_path: Path) -> None:
    served.sync({"a": save(tmp_path, "a"), "b": save(tmp_path, "b", rank=2)})
    keys = served.keys("base", "org/tiny", "a", "b")
    assert keys[:2] == [None, None]
    assert set(keys[2:]) == set(served.engine.loaded)
    assert served.names() == ["base", "a", "b"]
    card = served.catalog.cards()[2]
    assert (card["rank"], card["base"], card["method"], card["squeezed"]) == (2, "org/tiny", "lora", False)
    assert card["bytes"] == (tmp_path / "b" / "adapter_model.safetensors").stat().st_size


def test_an_adapter_with_the_name_of_the_base_takes_precedence(tmp_path: Path) -> None:
    served = Server(replace(BASE, name="a"))
    assert served.keys("a") == [None]
    served.sync({"a": save(tmp_path, "a")})
    base, adapter = served.keys("base", "a")
    assert base is None
    assert adapter in served.engine.loaded
    assert served.catalog.warm()["a"] == (0.0, 1.0)


@pytest.mark.parametrize("model", ["c", "", "a@", "a@r", "a@v2", "c@r2", "A"])
def test_unknown_names_list_what_is_served(served: Server, tmp_path: Path, model: str) -> None:
    served.sync({"a": save(tmp_path)})
    with pytest.raises(UnknownModelError, match=r"served are base, a|its versions and aliases are") as caught:
        served.keys(model)
    assert caught.value.param == "model"


def test_a_lease_has_the_rank_that_was_asked_for(served: Server, tmp_path: Path) -> None:
    served.sync({"a": save(tmp_path, rank=4, squeezed=True)})

    async def leases() -> list[tuple[str | None, int | None]]:
        found = []
        for model in ("a", "a@r2", "a@r99", "a@1@r2", "base"):
            async with served.catalog.lease(model) as lease:
                found.append((lease.adapter, lease.rank))
        return found

    (key,) = served.engine.loaded
    assert asyncio.run(leases()) == [(key, None), (key, 2), (key, 99), (key, 2), (None, None)]
    assert set(served.engine.loaded) == {key}


@pytest.mark.parametrize(
    ("squeezed", "model", "word"), [(False, "a@r2", "squeeze"), (True, "a@r0", "positive")]
)
def test_a_rank_that_the_adapter_does_not_have_is_not_served(
    served: Server, tmp_path: Path, squeezed: bool, model: str, word: str
) -> None:
    served.sync({"a": save(tmp_path, squeezed=squeezed)})
    with pytest.raises(UnknownModelError, match=word):
        served.keys(model)


def test_only_what_is_on_the_device_is_warm(tmp_path: Path) -> None:
    folders = {name: save(tmp_path, name, squeezed=True) for name in "abc"}
    served, always = Server(device=2 * ONE), (0.0, 1.0)
    base = {"base": always, "org/tiny": always}
    assert served.catalog.warm() == base
    served.sync({name: folders[name] for name in "ab"})
    assert served.catalog.warm() == {**base, **dict.fromkeys(("a", "a@1", "b", "b@1"), always)}
    canary = loaded(served.state, find("b", folders["c"], None, folders["c"], "1GB", pinned=False), 0.25)
    asyncio.run(served.catalog.prepare(canary))
    asyncio.run(served.catalog.commit(canary.number))
    assert served.catalog.warm()["b"] == (0.25, 1.0)
    served.keys("b@1", "b@2@r1")
    # The least recently used adapter was evicted.
    assert served.catalog.warm() == {**base, **dict.fromkeys(("b", "b@1", "b@2"), always)}
    served.keys("a")
    assert served.catalog.warm()["b"] == (0.0, 0.25)


def test_a_draw_decides_during_a_canary(served: Server, tmp_path: Path) -> None:
    served.sync({"a": save(tmp_path, "old")})
    folder = save(tmp_path, "new")
    canary = loaded(served.state, find("a", folder, None, folder, "1GB", pinned=False), 0.25)

    async def versions() -> list[str]:
        await served.catalog.prepare(canary)
        await served.catalog.commit(canary.number)
        found = []
        for draw in (0.1, 0.24, 0.25, 0.9):
            async with served.catalog.lease("a", draw) as lease:
                found.append(lease.version)
        return found

    assert asyncio.run(versions()) == ["2", "2", "1", "1"]


def test_a_change_loads_new_adapters_and_frees_removed_ones(served: Server, tmp_path: Path) -> None:
    a, b = save(tmp_path, "a"), save(tmp_path, "b", squeezed=True)
    served.sync({"a": a})
    kept = dict(served.engine.loaded)
    served.sync({"a": a, "b": b})
    assert kept.items() <= served.engine.loaded.items()
    served.keys("b@r1")
    served.sync({"a": a})
    assert served.engine.loaded == kept
    assert served.names() == ["base", "a"]


def test_an_adapter_in_use_is_freed_when_its_last_request_ends(served: Server, tmp_path: Path) -> None:
    folder = save(tmp_path)

    async def scenario() -> None:
        await served.async_sync({"a": folder})
        async with served.catalog.lease("a") as old:
            shutil.rmtree(folder)
            random_adapter("other", SHAPES, BASE.fingerprint).save(folder)
            await served.async_sync({"a": folder})
            assert old.adapter in served.engine.loaded
            async with served.catalog.lease("a") as new:
                assert new.adapter != old.adapter
                assert (old.version, new.version) == ("1", "2")
                assert old.content_hash != new.content_hash
        assert set(served.engine.loaded) == {new.adapter}

    asyncio.run(scenario())


def test_a_change_is_visible_once_it_is_committed_and_gone_once_it_is_abandoned(
    served: Server, tmp_path: Path
) -> None:
    served.sync({"a": save(tmp_path)})
    before = dict(served.engine.loaded)
    b = find("b", save(tmp_path, "b"), None, tmp_path, "1GB", pinned=False)
    wanted = loaded(served.state, b)
    asyncio.run(served.catalog.prepare(wanted))
    assert len(served.engine.loaded) == 2
    assert served.names() == ["base", "a"]
    with pytest.raises(UnknownModelError):
        served.keys("b")
    asyncio.run(served.catalog.abandon(wanted.number))
    assert served.engine.loaded == before
    asyncio.run(served.catalog.commit(wanted.number))
    assert served.names() == ["base", "a"]
    # Prepared twice, as if the director repeats its call: nothing remains of the first time.
    for _ in range(2):
        asyncio.run(served.catalog.prepare(wanted))
    asyncio.run(served.catalog.commit(wanted.number))
    assert served.names() == ["base", "a", "b"]
    assert len(served.engine.loaded) == 2


@pytest.mark.parametrize("then", ["nothing", "another"])
def test_a_change_that_is_given_up_while_it_is_prepared_leaves_nothing(
    then: str, served: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served.sync({"a": save(tmp_path)})
    b, c = (find(name, save(tmp_path, name), None, tmp_path, "1GB", pinned=False) for name in "bc")
    slow, quick = loaded(served.state, b), loaded(served.state, c)
    load, begun, go_on = served.engine.load, asyncio.Event(), asyncio.Event()

    async def slowly(name: str, artifact: AdapterArtifact) -> None:
        if name.startswith("b@"):
            begun.set()
            await go_on.wait()
        await load(name, artifact)

    monkeypatch.setattr(served.engine, "load", slowly)

    async def scenario() -> None:
        preparing = asyncio.create_task(served.catalog.prepare(slow))
        await begun.wait()
        # As the director does after a time limit.
        await served.catalog.abandon(slow.number)
        if then == "another":
            await served.catalog.prepare(quick)
        go_on.set()
        with pytest.raises(ResourceError, match="given up"):
            await preparing
        await served.catalog.commit(quick.number)

    asyncio.run(scenario())
    assert served.names() == ["base", "a", *(["c"] if then == "another" else [])]
    assert len(served.engine.loaded) == len(served.names()) - 1


def test_a_change_whose_commit_was_lost_leaves_nothing_when_it_is_served(
    served: Server, tmp_path: Path
) -> None:
    served.sync({"a": save(tmp_path)})
    wanted = loaded(served.state, find("b", save(tmp_path, "b"), None, tmp_path, "1GB", pinned=False))

    async def scenario() -> None:
        await served.catalog.prepare(wanted)
        await served.catalog.catch_up(wanted)

    asyncio.run(scenario())
    assert served.names() == ["base", "a", "b"]
    assert len(served.engine.loaded) == 2
    # It comes after all.
    asyncio.run(served.catalog.commit(wanted.number))
    assert {*served.keys("a", "b")} == {*served.engine.loaded}


def test_a_replica_that_catches_up_while_the_change_is_committed_serves_all_of_it(
    served: Server, tmp_path: Path
) -> None:
    served.sync({"a": save(tmp_path)})
    b = find("b", save(tmp_path, "b"), None, tmp_path, "1GB", pinned=False)
    wanted = loaded(served.state, b)

    async def scenario() -> None:
        await served.catalog.prepare(wanted)
        reading = asyncio.create_task(served.catalog.catch_up(wanted))
        await asyncio.sleep(0)
        await served.catalog.commit(wanted.number)
        for _ in range(2):
            async with served.catalog.lease("b") as lease:
                assert lease.adapter in served.engine.loaded
            await reading
        assert len(served.engine.loaded) == 2

    asyncio.run(scenario())


def test_a_replica_that_catches_up_late_keeps_the_later_change(served: Server, tmp_path: Path) -> None:
    served.sync({"a": save(tmp_path)})
    b = find("b", save(tmp_path, "b"), None, tmp_path, "1GB", pinned=False)
    earlier = loaded(served.state, b)
    later = unloaded(earlier, "b")

    async def scenario() -> None:
        reading = asyncio.create_task(served.catalog.catch_up(earlier))
        await asyncio.sleep(0)
        await served.catalog.prepare(later)
        await served.catalog.commit(later.number)
        await reading
        assert served.names() == ["base", "a"]
        assert len(served.engine.loaded) == 1

    asyncio.run(scenario())


def test_a_prepared_change_keeps_the_adapters_that_another_one_removes(
    served: Server, tmp_path: Path
) -> None:
    served.sync({"a": save(tmp_path)})
    without = unloaded(served.state, "a")
    b = find("b", save(tmp_path, "b"), None, tmp_path, "1GB", pinned=False)
    both = replace(loaded(served.state, b), number=without.number + 1)

    async def scenario() -> None:
        await served.catalog.prepare(both)
        await served.catalog.catch_up(without)
        assert served.names() == ["base"]
        await served.catalog.commit(both.number)
        for model in "ab":
            async with served.catalog.lease(model) as lease:
                assert lease.adapter in served.engine.loaded
        await served.catalog.catch_up(replace(without, number=both.number + 1))
        assert not served.engine.loaded

    asyncio.run(scenario())


def test_an_adapter_that_is_loaded_again_while_a_change_fails_to_load_it_stays_served(tmp_path: Path) -> None:
    fails = asyncio.Event()

    async def fetch(_deployed: Deployed) -> bool:
        await fails.wait()
        return False

    async def scenario() -> None:
        catalog = Catalog(BASE, RecordingEngine(), torch.float32, fetch=fetch)  # type: ignore[arg-type]
        state = Served()
        for name in "bc":
            state = loaded(state, find(name, save(tmp_path, name), None, tmp_path, "1GB", pinned=False))
        only = unloaded(state, "c")
        shutil.move(tmp_path / "b", tmp_path / "away")
        fails.set()
        await catalog.catch_up(only)
        assert set(catalog.problems()) == {"b@1"}
        fails.clear()
        reading = asyncio.create_task(catalog.catch_up(replace(state, number=only.number + 1)))
        await asyncio.sleep(0.1)
        shutil.move(tmp_path / "away", tmp_path / "b")
        await catalog.retry()
        fails.set()
        await reading
        assert catalog.problems() == {}
        assert catalog.tiers() == {"b@1": "device", "c@1": "device"}

    asyncio.run(scenario())


def test_a_folder_whose_content_has_changed_is_not_served(served: Server, tmp_path: Path) -> None:
    folder = save(tmp_path)
    deployed = find("a", folder, None, tmp_path, "1GB", pinned=False)
    shutil.rmtree(folder)
    random_adapter("other", SHAPES, BASE.fingerprint).save(folder)
    with pytest.raises(ArtifactError, match=r"has the content .* now, not .* load it again"):
        asyncio.run(served.catalog.prepare(loaded(Served(), deployed)))
    assert not served.engine.loaded


def test_a_starting_replica_serves_what_it_can_load_and_retries_the_rest(
    served: Server, tmp_path: Path
) -> None:
    state = Served()
    for name in "abc":
        state = loaded(state, find(name, save(tmp_path, name), None, tmp_path, "1GB", pinned=name == "b"))
    shutil.move(tmp_path / "b", tmp_path / "away")
    with pytest.raises(ArtifactError, match="'b' is not served"):
        asyncio.run(served.catalog.prepare(state))
    asyncio.run(served.catalog.catch_up(state))
    assert served.catalog.tiers() == {"a@1": "device", "b@1": "unavailable", "c@1": "device"}
    assert set(served.catalog.lacking()) == {"b", "b@1"}
    assert "b" not in served.catalog.warm()
    card = next(card for card in served.catalog.cards() if card["id"] == "b")
    assert (card["version"], card["pinned"], card.get("rank")) == (1, True, None)
    assert "there is no folder" in card["unavailable"]
    with pytest.raises(ArtifactError, match="'b' is not served"):
        served.keys("b")
    # It does not prevent changes of other adapters, and is loaded once that is possible.
    state = loaded(state, find("d", save(tmp_path, "d"), None, tmp_path, "1GB", pinned=False))
    asyncio.run(served.catalog.prepare(state))
    asyncio.run(served.catalog.commit(state.number))
    asyncio.run(served.catalog.retry())
    assert set(served.catalog.problems()) == {"b@1"}
    shutil.move(tmp_path / "away", tmp_path / "b")
    asyncio.run(served.catalog.retry())
    assert served.catalog.problems() == {}
    assert len(served.keys("a", "b", "c", "d")) == 4


def test_an_evicted_adapter_is_unavailable_while_it_can_not_be_read(tmp_path: Path) -> None:
    served = Server(device=ONE)
    served.sync({name: save(tmp_path, name) for name in "ab"})
    served.keys("b")
    shutil.move(tmp_path / "a", tmp_path / "away")
    with pytest.raises(ArtifactError, match="'a' is not served"):
        served.keys("a")
    assert served.catalog.tiers() == {"a@1": "unavailable", "b@1": "device"}
    asyncio.run(served.catalog.retry())
    assert set(served.catalog.lacking()) == {"a", "a@1"}
    shutil.move(tmp_path / "away", tmp_path / "a")
    asyncio.run(served.catalog.retry())
    assert served.catalog.tiers() == {"a@1": "disk", "b@1": "device"}
    assert len(served.keys("a")) == 1


def test_an_adapter_that_is_unloaded_while_it_is_read_is_no_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Server(device=ONE)
    folders = {name: save(tmp_path, name) for name in "ab"}
    served.sync(folders)
    served.keys("b")
    shutil.move(tmp_path / "a", tmp_path / "away")

    async def unload(_: Deployed) -> bool:
        await served.async_sync({"b": folders["b"]})
        return False

    monkeypatch.setattr(served.catalog, "_fetch", unload)
    with pytest.raises(ArtifactError, match="'a' is not served"):
        served.keys("a")
    assert served.catalog.problems() == {}
    assert served.catalog.tiers() == {"b@1": "device"}


def test_an_adapter_in_memory_does_not_change_with_its_file(served: Server, tmp_path: Path) -> None:
    served.sync({"a": save(tmp_path)})
    (key,) = served.keys("a")
    assert key is not None
    before = {path: f.b.clone() for path, f in served.engine.loaded[key].items()}
    with (tmp_path / "a" / "adapter_model.safetensors").open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(0)
        file.write(b"\xff" * size)
        # Reading a memory map of the file would end this process now.
        file.truncate(0)
    assert all(torch.equal(f.b, before[path]) for path, f in served.engine.loaded[key].items())


ONE = 4 * (4 + 6) * 4 + 4 * (4 + 3) * 4
"""Size of one test adapter in bytes: two modules of rank 4, in float32."""


def test_beyond_the_limit_the_least_recently_used_adapter_is_evicted(tmp_path: Path) -> None:
    served = Server(device=2 * ONE)
    served.sync({name: save(tmp_path, name) for name in "abc"})
    assert served.catalog.tiers() == {"a@1": "device", "b@1": "device", "c@1": "host"}
    served.keys("a", "c")
    assert served.catalog.tiers() == {"a@1": "device", "b@1": "disk", "c@1": "device"}
    assert served.events == [("a", "load"), ("b", "load"), ("b", "eviction"), ("c", "load")]
    # It is loaded again with the same values.
    (key,) = served.keys("b")
    assert key is not None
    want = AdapterArtifact.load(tmp_path / "b").modules
    assert all(torch.equal(served.engine.loaded[key][path].b, want[path].b) for path in SHAPES)
    assert served.catalog.tiers()["a@1"] == "disk"


def test_pinned_adapters_and_those_in_use_are_not_evicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayft.serving.catalog.ROOM_SECONDS", 0.2)
    served = Server(device=2 * ONE)
    adapters = {name: save(tmp_path, name) for name in "abc"}

    async def scenario() -> None:
        await served.async_sync(adapters, pinned=("a",))
        async with served.catalog.lease("b"):
            with pytest.raises(ResourceError, match="no room for 'c'"):
                async with served.catalog.lease("c"):
                    pass

            async def later() -> None:
                async with served.catalog.lease("c"):
                    assert served.catalog.tiers() == {"a@1": "device", "b@1": "disk", "c@1": "device"}

            waits = asyncio.create_task(later())
            await asyncio.sleep(0.05)
            assert served.catalog.tiers()["c@1"] != "device"
        # There is room now.
        await waits

    asyncio.run(scenario())


def test_an_adapter_that_is_pinned_later_is_brought_to_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayft.serving.catalog.ROOM_SECONDS", 0.2)
    served = Server(device=ONE)
    adapters = {name: save(tmp_path, name) for name in "ab"}
    served.sync(adapters)
    served.keys("b")
    assert served.catalog.tiers() == {"a@1": "disk", "b@1": "device"}
    served.sync(adapters, pinned=("a",))
    assert served.catalog.tiers() == {"a@1": "device", "b@1": "disk"}
    # There is room for one.
    with pytest.raises(ResourceError, match=r"no room for 'b' .* in use or pinned"):
        served.sync(adapters, pinned=("a", "b"))
    assert served.catalog.tiers() == {"a@1": "device", "b@1": "disk"}
    assert [card["pinned"] for card in served.catalog.cards()[1:]] == [True, False]
    # Of two that one change pins, the second does not evict the first.
    served = Server(device=ONE)
    served.sync(adapters)
    with pytest.raises(ResourceError, match=r"no room for 'b' .* in use or pinned"):
        served.sync(adapters, pinned=("a", "b"))


def test_if_the_engine_has_no_room_the_least_recently_used_adapter_is_evicted(tmp_path: Path) -> None:
    served = Server(room=2)
    served.sync({name: save(tmp_path, name) for name in "abc"}, pinned=("b",))
    # A change loads what there is room for, and evicts nothing for an adapter that is not pinned.
    assert served.catalog.tiers() == {"a@1": "device", "b@1": "device", "c@1": "host"}
    served.keys("c")
    assert served.catalog.tiers() == {"a@1": "disk", "b@1": "device", "c@1": "device"}
    served.keys("a")
    assert served.catalog.tiers() == {"a@1": "device", "b@1": "device", "c@1": "disk"}
    assert served.events[-2:] == [("c", "eviction"), ("a", "load")]
    assert len(served.engine.loaded) == 2


def test_if_the_engine_has_no_room_and_all_is_in_use_a_request_waits_and_then_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayft.serving.catalog.ROOM_SECONDS", 0.2)
    served = Server(room=1)
    adapters = {name: save(tmp_path, name) for name in "ab"}

    async def scenario() -> None:
        await served.async_sync(adapters)
        async with served.catalog.lease("a"):
            with pytest.raises(ResourceError, match=r"no room for 'b' .* in use or pinned"):
                async with served.catalog.lease("b"):
                    pass

            async def later() -> None:
                async with served.catalog.lease("b") as lease:
                    assert set(served.engine.loaded) == {lease.adapter}

            waits = asyncio.create_task(later())
            await asyncio.sleep(0.05)
            assert served.catalog.tiers() == {"a@1": "device", "b@1": "host"}
        # There is room now.
        await waits
        assert served.catalog.tiers() == {"a@1": "disk", "b@1": "device"}

    asyncio.run(scenario())


def test_factors_on_the_device_are_kept_in_host_memory_too_within_the_limit(tmp_path: Path) -> None:
    served = Server(keeps=True, device=ONE, host=ONE)
    served.sync({name: save(tmp_path, name) for name in "ab"})
    served.keys("b")
    assert served.catalog.tiers() == {"a@1": "disk", "b@1": "device"}
    shutil.rmtree(tmp_path / "b")
    served.keys("a", "a")
    # The host's memory holds one of the two, the one that was used last.
    assert served.catalog.tiers() == {"a@1": "device", "b@1": "disk"}


def test_on_a_cpu_the_host_limit_is_for_what_the_device_had_no_room_for(tmp_path: Path) -> None:
    served = Server(device=ONE, host=ONE)
    served.sync({name: save(tmp_path, name) for name in "abc"})
    assert served.catalog.tiers() == {"a@1": "device", "b@1": "disk", "c@1": "host"}


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("options", [{"device": ONE - 1}, {"device": ONE, "room": 0}, {"room": 0}], ids=str)
def test_an_adapter_that_never_fits_is_refused_when_it_is_loaded(
    options: dict[str, int], pinned: bool, tmp_path: Path
) -> None:
    small = Server(**options)
    with pytest.raises(
        ArtifactError, match=r"'a' is not served: it takes .* squeeze it, or raise device_bytes"
    ):
        small.sync({"a": save(tmp_path)}, pinned=("a",) if pinned else ())
    assert small.names() == ["base"]
    assert small.catalog._taken == 0


def test_concurrent_requests_load_an_adapter_once(tmp_path: Path) -> None:
    served = Server(device=ONE)
    adapters = {name: save(tmp_path, name) for name in ("x", "y")}

    async def scenario() -> None:
        await served.async_sync(adapters)

        async def ask() -> str | None:
            async with served.catalog.lease("y") as lease:
                await asyncio.sleep(0.01)
                return lease.adapter

        assert len(set(await asyncio.gather(*[ask() for _ in range(8)]))) == 1

    asyncio.run(scenario())
    assert served.events.count(("y", "load")) == 1


def test_a_bad_adapter_changes_nothing(served: Server, tmp_path: Path) -> None:
    served.sync({"a": save(tmp_path)})
    before = dict(served.engine.loaded)
    with pytest.raises(ArtifactError, match="adapter 'b' is not served"):
        served.sync({"b": str(tmp_path / "nowhere")})
    assert served.engine.loaded == before
    assert served.names() == ["base", "a"]


def test_an_adapter_for_another_base_is_refused(tmp_path: Path) -> None:
    other = random_adapter("a", SHAPES, "0" * 16).save(tmp_path / "print")
    shape = random_adapter("a", {"layer.q_proj": (6, 5)}).save(tmp_path / "shape")
    module = random_adapter("a", {"layer.k_proj": (6, 4)}).save(tmp_path / "module")
    for folder, word in ((other, "was made for the base"), (shape, "6x5"), (module, "k_proj")):
        with pytest.raises(BaseMismatchError, match=word):
            check_adapter("a", str(folder), BASE)


def test_a_rank_that_the_device_does_not_serve_is_refused(tmp_path: Path) -> None:
    folder = str(random_adapter("a", SHAPES, BASE.fingerprint, rank=4).save(tmp_path / "wide"))
    assert check_adapter("a", folder, replace(BASE, widest=4)).rank == 4
    with pytest.raises(ArtifactError, match=r"has rank 4, but GPUs serve ranks up to 3; .* --rank 3"):
        check_adapter("a", folder, replace(BASE, widest=3))


def test_an_adapter_of_a_layer_that_the_engine_does_not_adapt_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path)
    assert check_adapter("a", folder, replace(BASE, unserved=frozenset({"layer.o_proj"}))).modules
    with pytest.raises(ArtifactError, match=r"can't add an adapter to layer.v_proj .*engine: cpu"):
        check_adapter("a", folder, replace(BASE, unserved=frozenset({"layer.v_proj"})))


def changed(folder: str, tensors: dict[str, torch.Tensor] | None = None, **settings: Any) -> str:
    """Add settings of PEFT and tensors to an adapter's files."""
    from safetensors.torch import load_file, save_file

    config, weights = Path(folder) / "adapter_config.json", Path(folder) / "adapter_model.safetensors"
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    save_file({**load_file(weights), **(tensors or {})}, weights)
    return folder


EXPERTS = "layer.experts.0.up_proj"
ON_GPU = replace(
    BASE, shapes={**SHAPES, EXPERTS: (6, 4), "layer.fused": (6, 4)}, widest=8,
    unserved=frozenset({EXPERTS, "layer.fused"}),
)  # fmt: skip
"""A base in vLLM, which has the experts' weights, and one more layer, in a form that adapters are not for."""
PART = "base_model.model.layer.q_proj"
VECTOR = torch.ones(6)
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, r"is a DoRA adapter \(use_dora\)"),
    "magnitudes": ({"tensors": {f"{PART}.lora_magnitude_vector": VECTOR}}, r"the magnitude of layer\.q_proj"),
    "biases": ({"bias": "lora_only"}, "trains biases"),
    "a bias": ({"tensors": {f"{PART}.bias": VECTOR}}, r"the bias of layer\.q_proj"),
    "bias of B": ({"tensors": {f"{PART}.lora_B.bias": VECTOR}}, r"the bias of layer\.q_proj \(lora_bias\)"),
    "output layer": ({"modules_to_save": ["lm_head"]}, r"trains lm_head whole"),
    "embedding": ({"modules_to_save": ["embed_tokens"]}, "trains embed_tokens whole"),
    "rows of an embedding": ({"trainable_token_indices": [1]}, "trains rows of an embedding"),
    "expert weights": ({"target_parameters": ["experts.up"]}, r"trains experts\.up \(target_parameters\)"),
}
LAYERS: dict[str, tuple[dict[str, tuple[int, int]], int, str]] = {
    "experts": ({EXPERTS: (6, 4)}, 4, rf"vLLM can't add an adapter to {EXPERTS} .* engine: cpu"),
    "a fused layer": ({**SHAPES, "layer.fused": (6, 4)}, 4, r"can't add an adapter to layer\.fused"),
    "LoRA of the output layer": ({"lm_head": (6, 4)}, 4, r"trains lm_head \(LoRA\)"),
    "another layer": ({"layer.w_proj": (6, 4)}, 4, r"has no linear layer layer\.w_proj"),
    "another shape": ({"layer.q_proj": (6, 5)}, 4, r"is 6x4 in the base and 6x5"),
    "rank": (SHAPES, 9, "has rank 9, but GPUs serve ranks up to 8"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_that_is_more_than_factors_never_reaches_the_engine(kind: str, tmp_path: Path) -> None:
    change, match = KINDS[kind]
    never_loaded(changed(save(tmp_path), **change), match)


@pytest.mark.parametrize("kind", LAYERS)
def test_an_adapter_that_does_not_go_with_the_engine_never_reaches_it(kind: str, tmp_path: Path) -> None:
    shapes, rank, match = LAYERS[kind]
    artifact = random_adapter("a", shapes, BASE.fingerprint, rank=rank)
    never_loaded(str(artifact.save(tmp_path / "a")), match)


def never_loaded(folder: str, match: str) -> None:
    """Check that an adapter is refused with a reason, pinned or not, and that the engine is not asked."""
    served = Server(ON_GPU)
    for pinned in ((), ("a",)):
        with pytest.raises(ArtifactError, match=rf"adapter 'a' is not served: .*{match}"):
            served.sync({"a": folder}, pinned)
    # A replica that starts serves the others, and has the reason.
    one = Deployed("a", 1, folder, "", folder)
    asyncio.run(served.catalog.catch_up(Served(number=1, versions=(one,))))
    assert re.search(match, served.catalog.problems()["a@1"])
    assert served.engine.loaded == {}


def test_an_adapter_with_nan_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save(tmp_path)
    weights = Path(folder) / "adapter_model.safetensors"
    tensors = load_file(weights)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, weights)
    with pytest.raises(ArtifactError, match=r"adapter 'a' is not served.*NaN"):
        check_adapter("a", folder, BASE)


def test_a_truncated_adapter_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path)
    weights = Path(folder) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])
    with pytest.raises(ArtifactError, match="truncated"):
        check_adapter("a", folder, BASE)


def test_a_classifier_is_refused(tmp_path: Path) -> None:
    artifact = random_adapter("a", SHAPES, BASE.fingerprint)
    meta = ArtifactMeta(task="sequence_classification")
    heads = {"score.weight": torch.ones(2, 4)}
    folder = AdapterArtifact(artifact.modules, heads=heads, meta=meta).save(tmp_path / "head")
    with pytest.raises(ArtifactError, match="classification head"):
        check_adapter("a", str(folder), BASE)


def test_a_copy_that_is_missing_on_this_node_is_fetched_whenever_it_is_read(tmp_path: Path) -> None:
    head, node = Path(save(tmp_path / "head")), tmp_path / "node"
    fetched: list[str] = []

    async def fetch(deployed: Deployed) -> bool:
        fetched.append(deployed.id)
        if fetched[3:]:
            raise ArtifactError("the director's copy is damaged")
        shutil.rmtree(node, ignore_errors=True)
        shutil.copytree(head, node)
        return True

    async def scenario() -> None:
        engine, room = RecordingEngine(), Limits(device=ONE)
        catalog = Catalog(BASE, engine, torch.float32, limits=room, fetch=fetch)  # type: ignore[arg-type]
        (found,) = loaded(Served(), find("a", str(head), None, head, "1GB", pinned=False)).versions
        state = Served(1, (replace(found, folder=str(node)),))
        state = loaded(state, find("b", save(tmp_path, "b"), None, tmp_path, "1GB", pinned=False))
        await catalog.prepare(state)
        await catalog.commit(state.number)
        assert fetched == ["a@1"]

        async def evict() -> None:
            async with catalog.lease("b"):
                assert catalog.tiers()["a@1"] == "disk"

        for damage in (lambda: shutil.rmtree(node), lambda: (node / "adapter_config.json").write_text("{")):
            damage()
            await evict()
            async with catalog.lease("a") as lease:
                assert lease.content_hash == found.content_hash
        assert fetched == ["a@1"] * 3
        shutil.rmtree(node)
        await evict()
        with pytest.raises(ArtifactError, match="director's copy is damaged"):
            async with catalog.lease("a"):
                pass
        assert catalog.problems() == {"a@1": "the director's copy is damaged"}

    asyncio.run(scenario())
