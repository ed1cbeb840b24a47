"""A command joins the right cluster, or starts one, and puts its results where they stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from ray._raylet import AuthenticationTokenLoader, Config

from rayft.errors import ConfigError, RayftError, ResourceError
from rayft.flow import address, cluster
from rayft.flow.config import PipelineConfig, load_config
from rayft.train.run import ScaleConfig
from tests.unit.flow.ray_head import closed, head_node, silent


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr(address.own, "joined", False)
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


def test_a_command_that_needs_a_cluster_does_not_import_what_only_its_workers_need() -> None:
    unwanted = ("rayft.sweep.lane", "ray.train.torch", "deepspeed", "mlflow")
    program = f"import sys, rayft.flow.cluster; print(*(name for name in {unwanted} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


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


@pytest.mark.parametrize("joins", [True, False])
@pytest.mark.parametrize("own", [True, False])
def test_a_program_keeps_its_handler_of_sigterm(
    joins: bool, own: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def mine(*_: object) -> None: ...

    def of_ray(*_: object) -> None: ...

    # Another test may have run a command in this process.
    monkeypatch.setattr(cluster.interrupts, "installed", False)
    monkeypatch.setattr("ray.init", lambda **_: signal.signal(signal.SIGTERM, of_ray))
    before = signal.signal(signal.SIGTERM, mine if own else signal.SIG_DFL)
    try:
        with head_node() if joins else nullcontext("") as there:
            (tmp_path / "current").write_text(there, encoding="utf-8")
            assert cluster.join() is joins
            assert address.own.joined is joins
            if not joins:
                monkeypatch.setattr(address.own, "started", False)
                cluster.start_cluster(1)
        assert signal.getsignal(signal.SIGTERM) is (mine if own else of_ray)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("listens", [closed, silent])
def test_a_stale_address_is_ignored_unless_the_user_has_set_it(
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


def test_a_cluster_that_answers_and_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_a_folder_that_ray_can_not_write_to_is_an_error(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, error: type[RayftError], match: str
) -> None:
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv(variable, value)
    with pytest.raises(error, match=match):
        cluster.join()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str | None]]:
    """Tokens in the environment at each start of a local cluster, which does not really start."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    tokens: list[str | None] = []
    monkeypatch.setattr("ray.init", lambda **_: tokens.append(os.environ.get("RAY_AUTH_TOKEN")))
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 8.0})
    AuthenticationTokenLoader.instance().reset_cache()
    yield tokens
    os.environ.pop("RAY_AUTH_TOKEN", None)
    monkeypatch.undo()
    AuthenticationTokenLoader.instance().reset_cache()
    Config.initialize("")


def test_a_local_cluster_gets_a_token_if_the_home_can_not_store_one(
    monkeypatch: pytest.MonkeyPatch, started: list[str | None]
) -> None:
    monkeypatch.setenv("HOME", "/proc/nothing")
    for _ in range(2):
        with cluster.cluster(1, device="cpu"):
            pass
    first, second = started
    assert first == second
    assert first is not None
    assert len(first) == 64


def test_ray_makes_the_token_of_a_local_cluster_if_the_home_can_store_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, started: list[str | None]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with cluster.cluster(1, device="cpu"):
        pass
    assert started == [None]
    assert list(tmp_path.iterdir()) == []


def test_a_machine_that_is_too_small_for_the_workers_is_refused(started: list[str | None]) -> None:
    match = "9 workers need 9 CPUs, this machine has 8; lower scale.workers or sweep.lanes"
    with pytest.raises(ResourceError, match=match), cluster.cluster(9, device="cpu"):
        pass


@pytest.mark.parametrize(
    ("workers", "share", "there", "needed"),
    [
        (3, 1.0, 2.0, 3),
        (1, 1.0, 0.0, 1),
        (2, 1.0, 2.0, None),
        (5, 0.5, 2.0, 3),
        (4, 0.5, 2.0, None),
        # The share of a worker is never split over GPUs.
        (2, 0.6, 1.0, 2),
        (3, 0.6, 2.0, 3),
        (2, 0.6, 2.0, None),
        (11, 0.1, 1.0, 2),
        (10, 0.1, 1.0, None),
    ],
)
def test_fewer_gpus_than_the_workers_need_are_refused(
    monkeypatch: pytest.MonkeyPatch, workers: int, share: float, there: float, needed: int | None
) -> None:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 64.0, "GPU": there})
    match = f"{workers} workers need {needed} GPUs, this machine has {there:g}; lower scale.workers or sweep"
    with nullcontext() if needed is None else pytest.raises(ResourceError, match=match):
        cluster.check_fit(workers, "cuda", share)


@pytest.mark.parametrize(
    ("resources", "device"),
    [({"CPU": 8.0}, "cpu"), ({"CPU": 8.0, "GPU": 1.0}, "cuda"), ({"gpu_cluster": 1.0}, "cuda")],
)
def test_auto_follows_the_devices_of_the_cluster(
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


def test_a_variable_sets_the_folder_of_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
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
