import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rayft.artifacts import AdapterArtifact
from rayft.errors import ArtifactError, DiskFullError, PromotionRefusedError, RegistryError, TrackingError
from rayft.registry import AdapterRef
from rayft.registry.store import MlflowRegistry
from rayft.tracking import TrackingConfig, tracker_spec
from rayft.tracking.connection import connect
from rayft.tracking.mlflow import MlflowTracker, prepare
from tests.disks import Disk
from tests.mlflow_server import MlflowServer

Adapter = Callable[[int], Path]


def test_a_registered_adapter_is_resolved_and_fetched(
    registry: MlflowRegistry, run_id: str, adapter: Adapter, tmp_path: Path
) -> None:
    assert registry.register("sums", run_id, adapter(1), {"val_score": "0.5"}) == 1
    assert registry.register("sums", run_id, adapter(2), {"val_score": "0.6"}) == 2
    registry.alias("sums", "champion", 1)
    content = AdapterArtifact.load(adapter(1)).content_hash
    for text in ("models:/sums@champion", "models:/sums/1"):
        ref = registry.resolve(text)
        assert (ref.version, ref.content_hash) == (1, content)
        assert str(ref) == text
    assert registry.resolve("models:/sums").version == 2
    fetched = registry.fetch("models:/sums@champion", tmp_path / "cache")
    assert fetched == tmp_path / "cache" / content
    assert AdapterArtifact.load(fetched).content_hash == content
    assert list((tmp_path / "cache").iterdir()) == [fetched]
    assert registry.fetch("models:/sums/1", tmp_path / "cache") == fetched


def test_an_adapter_that_is_too_large_is_not_downloaded(
    registry: MlflowRegistry, run_id: str, adapter: Adapter, tmp_path: Path
) -> None:
    registry.register("sums", run_id, adapter(1), {})
    size = sum(path.stat().st_size for path in adapter(1).iterdir())
    with pytest.raises(
        ArtifactError, match=f"models:/sums/1 has {size:,} bytes, more than the {size - 1:,} "
    ):
        registry.fetch("models:/sums/1", tmp_path / "cache", size - 1)
    assert not (tmp_path / "cache").exists()
    assert registry.fetch("models:/sums/1", tmp_path / "cache", size).is_dir()


@pytest.mark.parametrize("tag", ["{tmp}/outside/a", "../outside/a", "..", ".", ""])
def test_the_tag_of_a_content_is_no_path(
    registry: MlflowRegistry, run_id: str, adapter: Adapter, tmp_path: Path, tag: str
) -> None:
    registry.register("sums", run_id, adapter(1), {})
    connect(registry.uri).set_model_version_tag("sums", "1", "content_hash", tag.format(tmp=tmp_path))
    with pytest.raises(RegistryError, match="was not registered by rayft"):
        registry.fetch("models:/sums/1", tmp_path / "cache")
    assert not (tmp_path / "outside").exists()


def test_versions_have_their_tags_aliases_and_scores(
    registry: MlflowRegistry, run_id: str, adapter: Adapter
) -> None:
    registry.register("sums", run_id, adapter(1), {"val_score": "0.5", "note": "first"})
    registry.register("sums", run_id, adapter(2), {})
    registry.alias("sums", "champion", 1)
    newest, first = registry.versions("sums")
    assert (newest.number, newest.aliases, newest.score()) == (2, (), None)
    assert (first.number, first.aliases, first.score()) == (1, ("champion",), 0.5)
    assert first.run_id == run_id
    expected = {
        "method": "lora",
        "rank": "2",
        "parameters": "22",
        "base_fingerprint": "f00d",
        "note": "first",
    }
    assert {key: first.tags[key] for key in expected} == expected


def test_the_same_content_is_one_version(registry: MlflowRegistry, run_id: str, adapter: Adapter) -> None:
    first = registry.register("sums", run_id, adapter(1), {"val_score": "0.5"})
    registry.register("sums", run_id, adapter(2), {})
    assert registry.register("sums", run_id, adapter(1), {"val_score": "0.7"}) == first
    assert [version.number for version in registry.versions("sums")] == [2, 1]
    assert registry.versions("sums")[1].score() == 0.7
    assert registry.register("others", run_id, adapter(1), {}) == 1


def test_an_alias_points_to_the_version_it_was_given_last(
    registry: MlflowRegistry, run_id: str, adapter: Adapter
) -> None:
    for seed in (1, 2):
        registry.register("sums", run_id, adapter(seed), {})
        registry.alias("sums", "champion", seed)
    assert registry.resolve("models:/sums@champion").version == 2
    assert registry.versions("sums")[1].aliases == ()


def test_an_unknown_name_alias_or_version_is_an_error_that_suggests_the_nearest(
    registry: MlflowRegistry, run_id: str, adapter: Adapter
) -> None:
    registry.register("sums", run_id, adapter(1), {})
    registry.alias("sums", "champion", 1)
    for text, message in (
        ("models:/sumz@champion", "no model 'sumz' is registered; did you mean 'sums'"),
        ("models:/sums@champoin", "no alias 'champoin'; did you mean 'champion'"),
        ("models:/sums/7", "no version 7; valid are 1"),
    ):
        with pytest.raises(RegistryError, match=message):
            registry.resolve(text)


@pytest.mark.parametrize("text", ["sums", "models:/sums@", "models:/sums/latest"])
def test_a_reference_of_another_form_is_an_error_that_shows_the_form(text: str) -> None:
    with pytest.raises(RegistryError, match="models:/name@alias"):
        AdapterRef.parse(text)


def test_an_empty_registry_is_an_error_that_says_so(registry: MlflowRegistry) -> None:
    with pytest.raises(RegistryError, match="none is registered, register one first"):
        registry.versions("sums")


def test_only_folders_that_load_are_registered(
    registry: MlflowRegistry, run_id: str, adapter: Adapter, tmp_path: Path
) -> None:
    damaged = adapter(1)
    (damaged / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(ArtifactError, match="truncated or damaged"):
        registry.register("sums", run_id, damaged, {})
    with pytest.raises(ArtifactError, match="there is no folder"):
        registry.register("sums", run_id, tmp_path / "none", {})
    with pytest.raises(RegistryError):
        registry.versions("sums")


def test_a_whole_model_is_refused(registry: MlflowRegistry, run_id: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(PromotionRefusedError, match="saved as a model folder; extract to LoRA first"):
        registry.register("sums", run_id, tmp_path, {})


def test_a_run_that_is_not_created_yet_is_refused(registry: MlflowRegistry, adapter: Adapter) -> None:
    with pytest.raises(RegistryError, match="not in MLflow yet"):
        registry.register("sums", "key:t0", adapter(1), {})
    with pytest.raises(RegistryError, match="refuses"):
        registry.register("sums", "0" * 32, adapter(1), {})


def test_a_name_that_mlflow_refuses_is_an_error(
    registry: MlflowRegistry, run_id: str, adapter: Adapter
) -> None:
    for name in ("a/b", "a:b", ""):
        with pytest.raises(RegistryError, match="refuses"):
            registry.register(name, run_id, adapter(1), {})


def test_an_alias_that_mlflow_refuses_or_of_no_version_is_an_error(
    registry: MlflowRegistry, run_id: str, adapter: Adapter
) -> None:
    registry.register("sums", run_id, adapter(1), {})
    with pytest.raises(RegistryError, match="refuses"):
        registry.alias("sums", "v1", 1)
    with pytest.raises(RegistryError, match="no version 2"):
        registry.alias("sums", "champion", 2)


def test_files_that_were_changed_or_deleted_are_not_fetched(
    registry: MlflowRegistry, run_id: str, adapter: Adapter, tmp_path: Path
) -> None:
    registry.register("sums", run_id, adapter(1), {})
    stored = Path(registry.resolve("models:/sums").uri.removeprefix("file://"))
    shutil.copytree(adapter(2), stored, dirs_exist_ok=True)
    with pytest.raises(RegistryError, match="not what was registered"):
        registry.fetch("models:/sums", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    shutil.rmtree(stored)
    with pytest.raises(RegistryError, match="register it again"):
        registry.fetch("models:/sums", tmp_path / "cache")


def test_a_damaged_copy_is_fetched_again(
    registry: MlflowRegistry, run_id: str, adapter: Adapter, tmp_path: Path
) -> None:
    registry.register("sums", run_id, adapter(1), {})
    fetched = registry.fetch("models:/sums", tmp_path / "cache")
    weights = fetched / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert registry.fetch("models:/sums", tmp_path / "cache") == fetched
    assert AdapterArtifact.load(fetched).content_hash == fetched.name
    assert list((tmp_path / "cache").iterdir()) == [fetched]


@pytest.mark.parametrize("lost", [True, False])
def test_registering_again_brings_files_back_that_were_changed_or_deleted(
    registry: MlflowRegistry, run_id: str, adapter: Adapter, tmp_path: Path, lost: bool
) -> None:
    registry.register("sums", run_id, adapter(1), {})
    stored = Path(registry.resolve("models:/sums").uri.removeprefix("file://"))
    if lost:
        shutil.rmtree(stored)
    else:
        shutil.copytree(adapter(2), stored, dirs_exist_ok=True)
    assert registry.register("sums", run_id, adapter(1), {}) == 1
    fetched = registry.fetch("models:/sums", tmp_path / "cache")
    assert AdapterArtifact.load(fetched).content_hash == AdapterArtifact.load(adapter(1)).content_hash


def test_a_name_may_have_an_apostrophe(registry: MlflowRegistry, run_id: str, adapter: Adapter) -> None:
    assert registry.register("bob's sums", run_id, adapter(1), {}) == 1
    assert registry.resolve("models:/bob's sums").version == 1


def test_a_version_from_elsewhere_is_not_trusted(
    registry: MlflowRegistry, adapter: Adapter, tmp_path: Path
) -> None:
    client = connect(registry.uri)
    client.create_registered_model("foreign")
    client.create_model_version("foreign", adapter(1).as_uri())
    with pytest.raises(RegistryError, match="not registered by rayft"):
        registry.fetch("models:/foreign", tmp_path / "cache")


def test_a_registry_that_is_away_names_its_address() -> None:
    with pytest.raises(TrackingError, match=r"http://127\.0\.0\.1:9"):
        MlflowRegistry("http://127.0.0.1:9").versions("sums")


def test_a_pickled_registry_connects_again(registry: MlflowRegistry, run_id: str, adapter: Adapter) -> None:
    registry.register("sums", run_id, adapter(1), {})
    there = pickle.loads(pickle.dumps(registry))  # noqa: S301  (our own bytes)
    assert there.resolve("models:/sums") == registry.resolve(AdapterRef("sums"))


@pytest.mark.slow
def test_a_registry_on_a_server_registers_and_fetches(
    server: MlflowServer, adapter: Adapter, tmp_path: Path
) -> None:
    spec = prepare(tracker_spec(TrackingConfig(uri=server.uri, experiment="registry"), tmp_path / "out"))
    registry = MlflowRegistry(server.uri)
    with MlflowTracker(spec) as tracker:
        run_id = tracker.run("trial", "t0")
        assert registry.register("sums", run_id, adapter(1), {}) == 1
    registry.alias("sums", "champion", 1)
    assert registry.versions("sums")[0].aliases == ("champion",)
    fetched = registry.fetch("models:/sums@champion", tmp_path / "cache")
    assert sorted(file.name for file in fetched.iterdir()) == sorted(
        file.name for file in adapter(1).iterdir()
    )


def test_a_full_disk_leaves_nothing_of_what_was_fetched(
    registry: MlflowRegistry, run_id: str, adapter: Adapter, disk: Disk
) -> None:
    registry.register("sums", run_id, adapter(0), {})
    for make_full in (lambda: disk.resize(0), lambda: disk.hold_files(2)):
        make_full()
        with pytest.raises(DiskFullError, match=f"the disk of {disk.folder}"):
            registry.fetch("models:/sums", disk.folder)
        assert not [*disk.folder.iterdir()]
        disk.resize(2**20)
    disk.hold_files(100)
    assert registry.fetch("models:/sums", disk.folder).is_dir()
