"""What is kept is listed, bounded and deleted; nothing else is, and nothing that is in use."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rayft.data import prepared
from rayft.errors import ConfigError, ResourceError
from rayft.files import ABANDONED_SECONDS, locked, machine
from rayft.flow.cache import KINDS, Entry, delete_all, entries, of_kind, shrink
from rayft.models import files
from rayft.models.files import unused, use
from rayft.models.load import ModelConfig, load_encoder
from rayft.sweep.transfer import STALE_SECONDS
from tests.disks import Disk
from tests.unit.data.small_data import config, lines, pairs

KEYS = [digit * 24 for digit in "abcdef"]
KERNEL = "A2" * 26
DAY = 86400.0


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def aged(path: Path, days: float) -> Path:
    moment = time.time() - days * DAY
    os.utime(path, (moment, moment))
    return path


def data(cache: Path, key: str, days: float = 0, size: int = 1000, name: object = "a.jsonl") -> Path:
    """Make a prepared set of `size` bytes."""
    folder = cache / "data" / key
    folder.mkdir(parents=True)
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({"name": name}))
    (folder / "train.arrow").write_bytes(bytes(size - manifest.stat().st_size))
    (cache / "data" / f"{key}.lock").touch()
    aged(manifest, days)
    return folder


def model(cache: Path, name: str = "mine", days: float = 0, size: int = 1000) -> Path:
    """Make a converted model of `size` bytes."""
    folder = cache / "models" / name
    folder.mkdir(parents=True)
    (folder / ".rayft.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(size - 2))
    return aged(folder, days)


def unfinished_set(cache: Path, key: str, of: str = "") -> Path:
    folder = cache / "data" / f".{key}.{of or machine()}-12345678"
    folder.mkdir(parents=True)
    (folder / "train.arrow").write_bytes(bytes(100))
    return folder


def unfinished_model(cache: Path, days: float) -> Path:
    folder = cache / "models" / ".mine-abc_1234"
    (folder / "new").mkdir(parents=True)
    (folder / "new" / "config.json").write_text("{}")
    for path in (folder / "new" / "config.json", folder / "new", folder):
        aged(path, days)
    return folder


def lane(cache: Path, seconds: float) -> Path:
    folder = cache / "lanes" / f"lane-{seconds:.0f}"
    (folder / "copies").mkdir(parents=True)
    return aged(folder, seconds / DAY)


def kernels(folder: Path) -> Path:
    """Make Triton's cache, with a kernel, its lock, and a folder that is no kernel."""
    (folder / KERNEL).mkdir(parents=True)
    (folder / KERNEL / "shrink.cubin").write_bytes(bytes(50))
    (folder / "rayft-shrink.lock").touch()
    (folder / "mine").mkdir()
    return folder


def compiled(folder: Path) -> Path:
    """Make Inductor's cache, with what it keeps by hash, and a folder of other files."""
    for name in ("ab/cabcde.py", "fxgraph/xy/xyz", "locks/cabcde.lock", "mn/notes", "models/x"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(bytes(10))
    for path in [*folder.rglob("*"), folder]:
        aged(path, 1)
    return folder


def names(found: list[Entry]) -> list[str]:
    return [entry.paths[0].name for entry in found]


def everything(cache: Path) -> list[str]:
    return sorted(str(path.relative_to(cache)) for path in cache.rglob("*") if path.suffix != ".lock")


def test_nothing_is_kept_in_a_missing_folder(cache: Path, tmp_path: Path) -> None:
    assert entries(cache, tmp_path / "triton") == []
    assert not cache.exists()


def test_each_kind_is_listed_with_its_size_and_its_last_use(cache: Path, tmp_path: Path) -> None:
    data(cache, KEYS[0], days=2, name="questions.jsonl")
    data(cache, KEYS[1], days=1, name="org/set")
    model(cache, days=3, size=5000)
    (cache / "hashes").mkdir()
    for number in range(2):
        (cache / "hashes" / f"{number:024x}.json").write_text("{}")
    (cache / "probes").mkdir()
    (cache / "probes" / f"{0:024x}.json").write_text("{}")
    lane(cache, 60)
    found = entries(cache, kernels(tmp_path / "triton"), compiled(tmp_path / "inductor"))
    assert [(entry.kind, entry.name, len(entry.paths), entry.size) for entry in found] == [
        ("data", "org/set", 1, 1000),
        ("data", "questions.jsonl", 1, 1000),
        ("models", "mine", 1, 5000),
        ("hashes", "hashes of large files", 2, 4),
        ("probes", "settings tried on GPUs", 1, 2),
        ("lanes", "lane-60", 1, 0),
        ("kernels", "compiled kernels", 1, 50),
        ("compiled", "functions compiled by torch.compile", 3, 30),
    ]
    assert all(entry.whole for entry in found)
    ages = [round((time.time() - entry.used) / DAY) for entry in found]
    assert ages == [1, 2, 3, 0, 0, 0, 0, 1]
    assert {entry.kind for entry in found} == set(KINDS)
    assert of_kind(found, "all") == found
    assert names(of_kind(found, "models")) == ["mine"]
    with pytest.raises(ConfigError, match="no 'model'; did you mean 'models'"):
        of_kind(found, "model")


@pytest.mark.parametrize("name", [None, "missing", "damaged"])
def test_a_set_that_can_not_be_named_is_listed_by_its_key(cache: Path, name: str | None) -> None:
    manifest = data(cache, KEYS[0]) / "manifest.json"
    manifest.write_text({None: "[]", "missing": "{}", "damaged": "{"}[name])
    assert [(entry.name, entry.whole) for entry in entries(cache, None)] == [(KEYS[0], True)]


def test_what_rayft_makes_is_found(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYFT_CACHE", str(cache))
    monkeypatch.setattr(prepared, "SMALL", 0)
    monkeypatch.setattr(prepared, "_run", lambda asked: prepared.write(*pickle.loads(asked)))  # noqa: S301
    monkeypatch.setattr(files, "LARGE", 0)
    monkeypatch.setattr(files, "SETTLED", -1.0)
    source = lines(tmp_path / "a.jsonl", pairs(0, 30))
    files.hash_file(Path(source))
    tiny = ModelConfig(name="tiny-llama")
    settings = config(name=source, max_length=1024, val=4, test=3)
    found = prepared.prepare(settings, load_encoder(tiny), cache)
    kept = entries(cache, None)
    assert [(entry.kind, entry.name) for entry in kept] == [
        ("data", source),
        ("models", "tiny-llama"),
        ("hashes", "hashes of large files"),
    ]
    # The model is in use by this process.
    outcome = delete_all(kept)
    assert [(entry.kind, why) for entry, why in outcome.left] == [("models", "a process is using it")]
    assert everything(cache / "data") == everything(cache / "hashes") == []
    # The set that was open stays readable, and is made again.
    assert len(found.encoded("train", None)[0]) > 0
    prepared.prepare(settings, load_encoder(tiny), cache)
    assert names(of_kind(entries(cache, None), "data")) == names(of_kind(kept, "data"))


def test_what_has_other_names_is_neither_listed_nor_deleted(cache: Path, tmp_path: Path) -> None:
    mine = ["data/mine/manifest.json", "data/notes", "data/.git/config", f"data/{KEYS[0]}0/manifest.json"]
    mine += ["models/llama/config.json", "models/.x-abcdefgh/config.json", "models/tiny-llama.txt"]
    mine += ["hashes/notes.json", "lanes/notes", "other/file"]
    for name in mine:
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).write_text("{}")
    before = everything(cache)
    assert entries(cache, None) == []
    triton = kernels(tmp_path / "triton")
    delete_all(entries(cache, triton))
    assert everything(cache) == before
    assert sorted(os.listdir(triton)) == ["mine", "rayft-shrink.lock"]


def test_the_least_recently_used_are_deleted_up_to_the_limit(cache: Path) -> None:
    data(cache, KEYS[0], days=1)
    data(cache, KEYS[1], days=4)
    model(cache, "old", days=3)
    model(cache, "new", days=2)
    lane(cache, 2 * STALE_SECONDS)
    found = entries(cache, None)
    assert shrink(found, 4000)[1] == 4000
    outcome, size = shrink(found, 2000)
    assert (names(outcome.deleted), outcome.freed, size) == ([KEYS[1], "old"], 2000, 2000)
    outcome, size = shrink(entries(cache, None), 1999)
    assert (names(outcome.deleted), size) == (["new"], 1000)
    assert [entry.kind for entry in entries(cache, None)] == ["data", "lanes"]
    assert not (cache / "data" / f"{KEYS[1]}.lock").exists()
    assert (cache / "data" / f"{KEYS[0]}.lock").exists()


def test_what_is_in_use_is_left_and_the_next_is_deleted(cache: Path) -> None:
    held = data(cache, KEYS[0], days=9)
    data(cache, KEYS[1], days=8)
    data(cache, KEYS[2], days=7)
    with locked(held.with_suffix(".lock")):
        outcome, size = shrink(entries(cache, None), 2000)
        assert (names(outcome.deleted), size) == ([KEYS[1]], 2000)
        assert [(entry.paths[0], why) for entry, why in outcome.left] == [(held, "a process is using it")]
        outcome, size = shrink(entries(cache, None), 1)
        assert (names(outcome.deleted), size) == ([KEYS[2]], 1000)
        assert names([entry for entry, _ in delete_all(entries(cache, None)).left]) == [KEYS[0]]
        assert (held / "train.arrow").exists()
    assert names(delete_all(entries(cache, None)).deleted) == [KEYS[0]]


def test_a_model_in_use_is_left(cache: Path) -> None:
    folder = model(cache, days=5)
    use(folder)
    (entry,) = entries(cache, None)
    assert time.time() - entry.used < DAY, "the last use"
    assert delete_all([entry]).left == [(entry, "a process is using it")]
    os.close(files._used.pop(folder))
    assert delete_all([entry]).deleted == [entry]
    assert not folder.exists()


def test_a_model_that_is_made_again_is_in_use(cache: Path) -> None:
    folder = model(cache)
    use(folder)
    folder.rename(cache / "before")
    use(model(cache))
    with unused(folder) as free:
        assert not free
    with unused(cache / "before") as free:
        assert free
    os.close(files._used.pop(folder))
    use(cache / "missing")
    assert not (cache / "missing").exists()


def test_kernels_are_left_while_one_is_compiled(cache: Path, tmp_path: Path) -> None:
    triton = kernels(tmp_path / "triton")
    with locked(triton / "rayft-shrink.lock"):
        outcome = delete_all(entries(cache, triton))
        assert [why for _, why in outcome.left] == ["a process is using it"]
        assert (triton / KERNEL / "shrink.cubin").exists()
    assert delete_all(entries(cache, triton)).freed == 50
    assert not (triton / KERNEL).exists()


def test_what_torch_compile_keeps_is_left_while_it_may_compile(cache: Path, tmp_path: Path) -> None:
    inductor = compiled(tmp_path / "inductor")
    aged(inductor / "ab" / "cabcde.py", 60 / DAY)
    outcome = delete_all(entries(cache, None, inductor))
    assert [why for _, why in outcome.left] == ["it may be in use: it changed 1 min ago"]
    aged(inductor / "ab" / "cabcde.py", 1)
    assert delete_all(entries(cache, None, inductor)).freed == 30
    assert sorted(os.listdir(inductor)) == ["mn", "models"]


def test_a_lane_is_left_until_it_counts_as_abandoned(cache: Path) -> None:
    alive, dead = lane(cache, STALE_SECONDS - 60), lane(cache, STALE_SECONDS + 60)
    outcome = delete_all(entries(cache, None))
    assert [entry.paths for entry in outcome.deleted] == [(dead,)]
    assert [why for _, why in outcome.left] == ["it may be in use: it changed 9 min ago"]
    assert (alive.exists(), dead.exists()) == (True, False)


def test_a_time_in_the_future_is_not_taken_for_a_use(cache: Path) -> None:
    data(cache, KEYS[0], days=-1)
    assert delete_all(entries(cache, None)).left == []


def test_what_killed_preparations_left_is_deleted_at_any_limit(cache: Path) -> None:
    data(cache, KEYS[0])
    left, running = unfinished_set(cache, KEYS[0]), unfinished_set(cache, KEYS[1])
    old, young = unfinished_model(cache, days=2), unfinished_set(cache, KEYS[2])
    (cache / "data" / KEYS[3]).mkdir()
    with locked(cache / "data" / f"{KEYS[1]}.lock"):
        found = entries(cache, None)
        assert [entry.whole for entry in found].count(False) == 5
        outcome, size = shrink(found, 10**6)
        assert {path for entry in outcome.deleted for path in entry.paths} == {
            *(left, old, young, cache / "data" / KEYS[3])
        }
        assert [entry.paths for entry, _ in outcome.left] == [(running,)]
        assert size == 1100
    assert everything(cache / "data") == [
        running.name, f"{running.name}/train.arrow",
        KEYS[0], f"{KEYS[0]}/manifest.json", f"{KEYS[0]}/train.arrow",
    ]  # fmt: skip
    assert (cache / "data" / f"{KEYS[0]}.lock").exists(), "the lock of a set that stays"


def test_a_set_that_another_machine_prepares_is_left_while_it_gives_signs_of_life(cache: Path) -> None:
    alive, silent = unfinished_set(cache, KEYS[0], "another"), unfinished_set(cache, KEYS[1], "another")
    for path in (silent / "train.arrow", silent):
        aged(path, (ABANDONED_SECONDS + 10) / DAY)
    outcome = delete_all(entries(cache, None))
    assert [entry.paths for entry, _ in outcome.left] == [(alive,)]
    assert [entry.paths for entry in outcome.deleted] == [(silent,)]


def test_a_model_that_may_still_be_converted_is_left(cache: Path) -> None:
    folder = unfinished_model(cache, days=0.9)
    assert [why for _, why in delete_all(entries(cache, None)).left] == [
        "it may be in use: it changed 21 h ago"
    ]
    assert folder.exists()


@pytest.mark.parametrize("make", [lambda cache: data(cache, KEYS[0]), model])
def test_a_deletion_that_is_killed_leaves_no_damaged_entry(
    cache: Path, make: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(cache)
    found = entries(cache, None)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            delete_all(found)
    assert not folder.exists()
    (left,) = entries(cache, None)
    assert not left.whole
    assert 0 < left.size < 1000
    outcome, size = shrink([left], 10**6)
    assert (outcome.deleted, size) == ([left], 0)
    assert everything(folder.parent) == []


def killed(folder: Path) -> None:
    """Delete a file of a folder, then end as a process that is killed."""
    next(path for path in folder.iterdir() if path.suffix == ".json").unlink()
    raise KeyboardInterrupt


def test_links_are_deleted_and_not_followed(cache: Path, tmp_path: Path) -> None:
    elsewhere = data(tmp_path / "elsewhere", KEYS[0], size=5000)
    (tmp_path / "large").write_bytes(bytes(9000))
    (cache / "data").mkdir(parents=True)
    (cache / "data" / KEYS[0]).symlink_to(elsewhere)
    inside = model(cache)
    (inside / "link").symlink_to(tmp_path / "large")
    (inside / "folder").symlink_to(elsewhere)
    found = entries(cache, None)
    assert sum(entry.size for entry in found) < 1500
    assert len(delete_all(found).deleted) == 2
    assert everything(cache) == ["data", "models"]
    assert (elsewhere / "manifest.json").exists()
    assert (tmp_path / "large").exists()


def test_an_entry_that_vanishes_while_it_is_listed_is_left_out(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vanishing = data(cache, KEYS[0])
    data(cache, KEYS[1])
    lstat = Path.lstat

    def vanish(path: Path) -> Any:
        if path == vanishing / "train.arrow":
            shutil.rmtree(vanishing)
        return lstat(path)

    monkeypatch.setattr(Path, "lstat", vanish)
    assert names(entries(cache, None)) == [KEYS[1]]


def test_an_entry_that_another_process_deletes_first_is_not_counted(cache: Path) -> None:
    folders = [data(cache, KEYS[0], days=3), model(cache, days=2), lane(cache, DAY)]
    data(cache, KEYS[1], days=1)
    found = entries(cache, None)
    for folder in folders:
        shutil.rmtree(folder)
    outcome, size = shrink(found, 1000)
    assert (outcome.deleted, outcome.left, outcome.refused, size) == ([], [], [], 1000)
    outcome = delete_all(found)
    assert (names(outcome.deleted), outcome.left, outcome.refused) == ([KEYS[1]], [], [])
    assert everything(cache) == ["data", "lanes", "models"]


def test_two_deletions_at_once_end_with_nothing_left(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model(cache)
    rmtree, calls = shutil.rmtree, []

    def overtaken(folder: Path) -> None:
        calls.append(folder)
        if len(calls) == 1:
            (folder / "model.safetensors").unlink()
            raise FileNotFoundError(folder / "model.safetensors")
        rmtree(folder)

    monkeypatch.setattr(shutil, "rmtree", overtaken)
    assert delete_all(entries(cache, None)).freed == 1000
    assert len(calls) == 2
    assert everything(cache) == ["models"]


def test_what_the_system_refuses_does_not_keep_the_rest(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = model(cache, "theirs", days=2)
    model(cache, "ours", days=1)
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path == theirs:
            raise PermissionError(13, "Permission denied", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    outcome, size = shrink(entries(cache, None), 1000)
    assert (names(outcome.deleted), size) == (["ours"], 1000)
    assert [entry.paths for entry, _ in outcome.refused] == [(theirs,)]


def test_a_full_disk_can_be_freed(disk: Disk) -> None:
    for key in KEYS:
        data(disk.folder, key, size=2**20)
    model(disk.folder, size=2**20)
    disk.leave(0)
    disk.hold_files(len([*disk.folder.rglob("*")]))
    with pytest.raises(OSError, match="No space left"):
        (disk.folder / "more").write_bytes(b"0")
    outcome = delete_all(entries(disk.folder, None))
    assert (len(outcome.deleted), outcome.refused) == (len(KEYS) + 1, [])
    assert everything(disk.folder) == ["data", "models"]


@pytest.mark.parametrize("place", ["", "data", "models", "lanes", "hashes"])
def test_a_file_in_place_of_a_folder_is_an_error(cache: Path, place: str) -> None:
    (cache / place).parent.mkdir(parents=True, exist_ok=True)
    (cache / place).write_text("mine")
    with pytest.raises(ResourceError, match=r"is a file, not a folder.*set RAYFT_CACHE"):
        entries(cache, None)


def test_a_folder_that_can_not_be_read_is_named_with_its_setting(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = data(cache, KEYS[0])
    triton = kernels(tmp_path / "triton")
    iterdir = Path.iterdir

    def refuse(path: Path) -> Any:
        if path in (closed, triton):
            raise PermissionError(13, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ResourceError, match=rf"can't read {closed} \(Permission denied.*set RAYFT_CACHE"):
        entries(cache, None)
    with pytest.raises(ResourceError, match=rf"can't read {triton} .*set TRITON_CACHE_DIR"):
        entries(tmp_path / "empty", triton)
    with pytest.raises(ResourceError, match=rf"can't read {triton} .*set TORCHINDUCTOR_CACHE_DIR"):
        entries(tmp_path / "empty", None, triton)
