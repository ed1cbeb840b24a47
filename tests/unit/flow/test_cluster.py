"""Which cluster is joined, and what it says of its devices."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayft.errors import ConfigError, RayftError, ResourceError
from rayft.flow import address, cluster
from rayft.flow.config import PipelineConfig, load_config
from rayft.train.run import ScaleConfig
from tests.unit.flow.ray_head import closed, head_node, silent


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    # Short enough for Ray's sockets, which pytest's own folders are not always.
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    monkeypatch.setattr(address, "SECONDS_TO_ANSWER", 1.0)
    monkeypatch.setattr("rayft.flow.address.get_ray_address_file", lambda _: str(tmp_path / "current"))


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Addresses that Ray was told to join."""
    asked: list[str] = []
    monkeypatch.setattr("ray.init", lambda address, **_: asked.append(address))
    return asked


def test_without_a_cluster_nothing_is_joined(joined: list[str]) -> None:
    assert cluster.join() is False
    assert cluster.has_gpus() is None
    assert joined == []


def test_the_address_of_a_running_cluster_is_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, joined: list[str]
) -> None:
    with head_node() as left, head_node() as named:
        (tmp_path / "current").write_text(f"{left}\n", encoding="utf-8")
        assert cluster.join() is True
        monkeypatch.setenv("RAY_ADDRESS", named)
        assert cluster.join() is True
        assert joined == [left, named]


@pytest.mark.parametrize("listens", [closed, silent])
def test_a_stale_address_is_passed_over_unless_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, joined: list[str], listens: type
) -> None:
    with listens() as place:
        (tmp_path / "current").write_text(place, encoding="utf-8")
        assert cluster.join() is False
        monkeypatch.setenv("RAY_ADDRESS", place)
        with pytest.raises(
            ResourceError, match=f"no Ray cluster can be joined at RAY_ADDRESS={place}.* unset"
        ):
            cluster.join()
    assert joined == []


def test_a_cluster_that_answers_and_does_not_take_us(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(**_: object) -> None:
        raise RuntimeError("Version mismatch")

    monkeypatch.setattr("ray.init", refuses)
    with head_node() as place:
        monkeypatch.setenv("RAY_ADDRESS", place)
        with pytest.raises(ResourceError, match="can't be joined"):
            cluster.join()


@pytest.mark.parametrize(
    ("variable", "value", "error", "match"),
    [
        ("RAY_TMPDIR", "", ConfigError, "RAY_TMPDIR is empty"),
        ("RAY_TMPDIR", "relative", ResourceError, "RAY_TMPDIR=relative is a relative path"),
        ("RAY_TMPDIR", "/proc/nothing", ResourceError, "can't write to /proc/nothing/ray.* RAY_TMPDIR"),
        ("RAY_TMPDIR", "/dev/null", ResourceError, "/dev/null is a file"),
        ("RAY_TMPDIR", "/tmp/" + "x" * 60, ResourceError, "too long for Ray"),
        ("TMPDIR", "/proc/nothing", ResourceError, "can't write to /proc/nothing/ray"),
        ("TMPDIR", "/tmp/" + "x" * 60, ResourceError, "set RAY_TMPDIR to a shorter"),
    ],
)
def test_where_ray_cannot_write(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, error: type[RayftError], match: str
) -> None:
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv(variable, value)
    with pytest.raises(error, match=match):
        cluster.join()


def test_a_home_that_takes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/proc/nothing")
    cluster.AuthenticationTokenLoader.instance().reset_cache()
    cluster._settle_token()
    first = cluster.os.environ["RAY_AUTH_TOKEN"]
    assert len(first) == 64
    cluster._settle_token()
    assert cluster.os.environ["RAY_AUTH_TOKEN"] == first
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    cluster.AuthenticationTokenLoader.instance().reset_cache()


def test_a_home_that_takes_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    cluster.AuthenticationTokenLoader.instance().reset_cache()
    cluster._settle_token()
    assert "RAY_AUTH_TOKEN" not in cluster.os.environ
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("resources", "device"),
    [({"CPU": 8.0}, "cpu"), ({"CPU": 8.0, "GPU": 1.0}, "cuda"), ({"gpu_cluster": 1.0}, "cuda")],
)
def test_auto_goes_by_the_clusters_devices(
    monkeypatch: pytest.MonkeyPatch, resources: dict[str, float], device: str
) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.cluster_resources", lambda: resources)
    assert ScaleConfig().settled(cluster.has_gpus()).device == device


def config(output: str | None = None) -> PipelineConfig:
    return load_config("tiny", [] if output is None else [f"output={output}"])


def test_on_this_machine_results_are_in_the_working_directory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cluster.placed(config()).folder == tmp_path / "runs" / "tiny"
    assert cluster.placed(config("here")).folder == tmp_path / "here"
    assert config().folder == tmp_path / "runs" / "tiny"


def test_on_a_cluster_results_are_in_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with head_node() as address:
        (tmp_path / "current").write_text(address, encoding="utf-8")
        placed = cluster.placed(config())
    assert placed.output == str(tmp_path / "home" / "rayft-runs" / "tiny")
    assert cluster.placed(placed) == placed


def test_a_variable_says_where_results_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAYFT_OUTPUT", str(tmp_path / "all"))
    assert cluster.placed(config()).folder == tmp_path / "all" / "tiny"
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    assert cluster.placed(config()).folder == tmp_path / "all" / "tiny"
    assert cluster.placed(config(str(tmp_path / "one"))).folder == tmp_path / "one"


def test_the_working_directory_of_a_job_keeps_no_results(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1f3a"
    package.mkdir(parents=True)
    monkeypatch.chdir(package)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    with pytest.raises(
        ConfigError, match=r"output: here lies in the working directory of a Ray job.*rayft-runs/tiny"
    ):
        cluster.placed(config("here"))
    assert cluster.placed(config(str(tmp_path / "out"))).folder == tmp_path / "out"
    assert cluster.placed(config()).folder.parent.name == "rayft-runs"
