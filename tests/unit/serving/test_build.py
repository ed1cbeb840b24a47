from __future__ import annotations

import io
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import yaml
from ray._common.utils import import_attr
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, ServeDeploySchema
from rich.console import Console

from rayft.config import parse
from rayft.errors import ArtifactError, BaseMismatchError, ConfigError, ModelError, ResourceError
from rayft.flow import commands
from rayft.models.load import ModelConfig
from rayft.models.tiny import save_tiny_llama
from rayft.serving import build
from rayft.serving.build import (
    NICENESS,
    ROUTING_SECONDS,
    _check_gpus,
    app,
    build_app,
    check,
    engine_of,
    preflight,
    run,
)
from rayft.serving.config import ServeConfig
from rayft.serving.deployment import deployment
from rayft.serving.router import RECENT_SECONDS

DEPLOYING = ApplicationStatus.DEPLOYING


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def config(folder: Path, port: int, **adapters: str) -> ServeConfig:
    return ServeConfig(model=ModelConfig(name=str(folder)), port=port, adapters=adapters)


def test_adapters_that_match_the_base_pass(
    tiny_folder: Path, adapter_folders: dict[str, str], free_port: int
) -> None:
    preflight(config(tiny_folder, free_port, **adapter_folders))


@pytest.mark.parametrize(("chosen", "expected"), [(None, "0"), ("5", "5")])
def test_workers_have_the_usual_priority(
    tiny_folder: Path,
    free_port: int,
    monkeypatch: pytest.MonkeyPatch,
    chosen: str | None,
    expected: str,
) -> None:
    found = []

    def start(**_: Any) -> None:
        found.append(os.environ[NICENESS])
        raise ResourceError("not started")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", start)
    # Sets it back in the end.
    monkeypatch.setenv(NICENESS, chosen or "")
    if chosen is None:
        del os.environ[NICENESS]
    with pytest.raises(ResourceError, match="not started"):
        run(config(tiny_folder, free_port))
    assert found == [expected]


class Serve:
    """Ray Serve's states of the application, one after the other; it does not exist after the last."""

    def __init__(self, *states: ApplicationStatus) -> None:
        self._states, self.called = list(states), list[str]()

    def status(self) -> Any:
        if not self._states:
            return SimpleNamespace(applications={})
        state = ApplicationStatusOverview(self._states.pop(0), "Ray Serve's message", 0.0, {})
        return SimpleNamespace(applications={build.APPLICATION: state})

    def delete(self, _name: str, _blocking: bool = True) -> None:
        if _blocking and len(self._states) > 2:
            raise TimeoutError("Some of these applications weren't deleted after 60s")
        self.called.append("delete")

    def shutdown(self) -> None:
        assert not self._states, "requests are still answered"
        self.called.append("shutdown")


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Serve]:
    """Return a function that makes a Ray Serve with given states, and with a reason for them."""

    def make(*states: ApplicationStatus, why: str | None = None) -> Serve:
        found = Serve(*states)
        monkeypatch.setattr(build, "ray_serve", found)
        monkeypatch.setattr(build, "error_of", lambda _: why)
        monkeypatch.setattr(build, "POLL_SECONDS", 0)
        return found

    return make


def test_a_start_that_waits_for_room_says_so_once(
    serve: Callable[..., Serve], monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[str] = []
    monkeypatch.setattr(build.logger, "warning", lambda text, *arguments: logged.append(text % arguments))
    serve(*[DEPLOYING] * 3, ApplicationStatus.RUNNING, why="1 replica has to be scheduled: 8 CPU")
    build._wait_until_running()
    assert logged == ["the application does not run yet: 1 replica has to be scheduled: 8 CPU"]


@pytest.mark.parametrize(
    ("end", "why", "message"),
    [
        ([ApplicationStatus.DEPLOY_FAILED], "rayft.errors.ModelError: no file", "ModelError: no file"),
        ([ApplicationStatus.DEPLOY_FAILED], None, "Ray Serve's message"),
        ([], None, "it was deleted"),
    ],
)
def test_an_application_that_does_not_start_is_deleted_and_says_why(
    end: list[ApplicationStatus], why: str | None, message: str, serve: Callable[..., Serve]
) -> None:
    made = serve(DEPLOYING, *end, why=why)
    with pytest.raises(ResourceError, match=f"the application did not start: .*{message}"):
        build._wait_until_running()
    assert made.called == ["delete"] * len(end)


def test_a_server_that_is_stopped_has_all_of_its_time_for_running_requests(
    serve: Callable[..., Serve],
) -> None:
    made = serve(*[ApplicationStatus.DELETING] * 9)
    build.stop()
    assert made.called == ["delete", "shutdown"]


@pytest.mark.parametrize("start", [preflight, run])
def test_the_error_about_a_port_in_use_names_another(start: Any, tiny_folder: Path, taken_port: int) -> None:
    with pytest.raises(ResourceError, match=rf"port {taken_port} .*in use.*--set port={taken_port + 1}"):
        start(config(tiny_folder, taken_port))


def test_an_unknown_base_is_refused_before_anything_starts(free_port: int) -> None:
    with pytest.raises(ModelError, match="no model 'nothing'"):
        run(config(Path("nothing"), free_port))


def test_an_address_of_another_machine_is_refused(tiny_folder: Path, free_port: int) -> None:
    with pytest.raises(ResourceError, match="can't listen"):
        preflight(config(tiny_folder, free_port).model_copy(update={"host": "203.0.113.7"}))


def test_a_bad_adapter_is_refused_before_anything_starts(
    tiny_folder: Path, adapter_folders: dict[str, str], free_port: int, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(adapter_folders["small"], broken)
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ArtifactError, match=r"adapter 'bad' is not served.*truncated"):
        run(config(tiny_folder, free_port, bad=str(broken)))


def test_an_adapter_for_another_base_is_refused(
    adapter_folders: dict[str, str], free_port: int, tmp_path: Path
) -> None:
    other = save_tiny_llama(tmp_path / "other", seed=1)
    with pytest.raises(BaseMismatchError, match="adapter 'small' is not served"):
        preflight(config(other, free_port, **adapter_folders))


@pytest.mark.parametrize(
    ("data", "word"),
    [
        ({"adapters": {"base": "x"}}, "the base itself"),
        ({"adapters": {"a@r2": "x"}}, "letters from a to z, digits"),
        ({"adapters": {"a/b": "x"}}, "letters from a to z, digits"),
        ({"replicas": 3, "max_replicas": 2}, "max_replicas"),
        ({"adapters": {"a": "models:/a@b"}}, "set registry to MLflow"),
        ({"pinned": ["a"]}, "pinned: there is no adapter 'a'"),
        ({"device_bytes": "big"}, "'big' is no size"),
        ({"port": 0}, "port"),
        ({"prot": 8000}, "did you mean 'port'"),
        ({"dtype": "float16"}, "dtype"),
    ],
)
def test_a_wrong_option_is_an_error_that_names_it(data: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        parse(ServeConfig, data)


def test_the_number_of_replicas_is_fixed_or_follows_the_traffic() -> None:
    def replicas(**options: Any) -> Any:
        application = build_app(ServeConfig(engine="cpu", **options))
        return application._bound_deployment.init_args[0]._bound_deployment._deployment_config

    fixed, scaled = replicas(replicas=3), replicas(replicas=1, max_replicas=4, max_running=8)
    assert (fixed.num_replicas, fixed.autoscaling_config) == (3, None)
    scaling = scaled.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 4, 4)


def test_requests_are_routed_by_adapter_with_half_a_batch_of_slack() -> None:
    for most, slack in ((8, 4), (1, 1)):
        application = build_app(ServeConfig(engine="cpu", max_running=most))
        routing = application._bound_deployment.init_args[0]._bound_deployment._deployment_config
        config = routing.request_router_config
        assert config.get_request_router_class().__name__ == "AdapterRouter"
        assert config.request_router_kwargs == {"slack": slack, "called": "Replica"}
        assert config.request_routing_stats_period_s == ROUTING_SECONDS
        assert 2 * ROUTING_SECONDS <= RECENT_SECONDS


def test_the_application_in_files_for_serve_deploy_can_be_built() -> None:
    packaged = yaml.safe_load(Path("serve/config.yaml").read_text())
    made = deployment({"host": "127.0.0.1", "port": 8000, "engine": "cpu"})
    for file in (packaged, made):
        application = ServeDeploySchema.model_validate(file).applications[0]
        built = import_attr(application.import_path)(application.args)
        assert built._bound_deployment.name == "Ingress"
    assert parse(ServeConfig, packaged["applications"][0].pop("args")).model.name == "smollm2-135m-instruct"
    del made["applications"][0]["args"]
    assert made == packaged
    with pytest.raises(ConfigError, match="did you mean 'adapters'"):
        app({"adapterz": {}})


def test_ingress_and_director_are_placed_on_the_head() -> None:
    ingress = build_app(ServeConfig(engine="cpu"))._bound_deployment
    replica, director = (one._bound_deployment for one in ingress.init_args[:2])
    for one in (ingress, director):
        assert one.ray_actor_options == {"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}}
    assert "resources" not in replica.ray_actor_options
    assert director._deployment_config.request_router_config.request_router_kwargs["called"] == "Director"


@pytest.mark.parametrize(
    ("settings", "places"),
    [
        ({}, 5 * 32 + 256),
        ({"max_running": 2, "max_queued": 3}, 13),
        ({"replicas": 2}, None),
        ({"max_replicas": 2}, None),
    ],
)
def test_the_ingress_counts_requests_itself_if_there_is_only_one_replica(
    settings: dict[str, int], places: int | None
) -> None:
    ingress = build_app(ServeConfig(engine="cpu", **settings))._bound_deployment
    assert ingress.init_args[2].places == places


def has_gpus(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    """Set the number of GPUs of this machine, and join no cluster, whatever other tests have started."""
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)


@pytest.mark.parametrize(("gpus", "engine"), [(0, "cpu"), (1, "vllm"), (8, "vllm")])
def test_the_engine_follows_the_gpus(monkeypatch: pytest.MonkeyPatch, gpus: int, engine: str) -> None:
    has_gpus(monkeypatch, gpus)
    assert engine_of(ServeConfig()) == engine
    assert engine_of(ServeConfig(engine="cpu")) == "cpu"
    assert engine_of(ServeConfig(engine="vllm")) == "vllm"


def test_a_replica_needs_its_gpus_on_one_node_unless_nodes_are_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    nodes = [
        {"Alive": alive, "Resources": {"CPU": 4.0, "GPU": gpus}}
        for alive, gpus in ((True, 2.0), (False, 8.0))
    ]
    resources = {"GPU": 3.0}
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.nodes", lambda: [*nodes, {"Alive": True, "Resources": {"GPU": 1.0}}])
    monkeypatch.setattr("ray.cluster_resources", lambda: resources)
    _check_gpus(2)
    with pytest.raises(ResourceError, match="gpus is 3, but no node has more than 2"):
        _check_gpus(3)
    resources["gpu_cluster"] = 1.0
    _check_gpus(8)


@pytest.mark.parametrize(
    ("release", "options", "gpus", "error", "word"),
    [
        (None, {}, 1, ResourceError, r"not installed; run `pip install 'rayft\[vllm\]'`, or set engine"),
        ("0.25.1", {"vllm_untested": True}, 1, ResourceError, "0.25.1 is not supported; install vllm>=0.26"),
        ("0.31.0", {}, 1, ResourceError, "0.31.0 was not tried on a GPU.*vllm_untested: true"),
        ("0.26.1", {"gpus": 2}, 1, ResourceError, "gpus is 2, but no node has more than 1 GPUs.*gpu_cluster"),
        ("0.26.1", {"model": {"quantize": "nf4"}}, 1, ConfigError, "nf4 is not served by vLLM.*fp8"),
        (None, {"fp8": True, "engine": "cpu"}, 1, ConfigError, "fp8 is a setting of vLLM"),
    ],
)  # fmt: skip
def test_what_vllm_can_not_serve_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, free_port: int, tiny_folder: Path,
    release: str | None, options: dict[str, Any], gpus: int, error: type[Exception], word: str,
) -> None:  # fmt: skip
    def version(_: str) -> str:
        if release is None:
            raise PackageNotFoundError
        return release

    monkeypatch.setattr("importlib.metadata.version", version)
    has_gpus(monkeypatch, gpus)
    model = {"name": str(tiny_folder), **options.pop("model", {})}
    with pytest.raises(error, match=word):
        check(parse(ServeConfig, {"port": free_port, "model": model, **options}))


def test_the_user_is_told_when_requests_are_answered(
    tiny_folder: Path, free_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = Console(file=io.StringIO(), width=200)
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump({"model": {"name": str(tiny_folder)}, "port": free_port}))
    seen: list[str] = []
    monkeypatch.setattr("rayft.flow.cluster.join", lambda: None)
    monkeypatch.setattr("rayft.flow.cluster.cluster", lambda *_, **__: nullcontext())
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(build.ray_serve, "start", lambda **_: None)
    monkeypatch.setattr(build.ray_serve, "run_many", lambda *_, **__: None)
    monkeypatch.setattr(build, "build_app", lambda _: None)
    monkeypatch.setattr(build, "_listens", lambda *_: True)
    for step in ("_wait_until_running", "_wait_for_interrupt"):
        monkeypatch.setattr(build, step, lambda: seen.append(shown.file.getvalue()))  # type: ignore[attr-defined]
    commands.serve(str(file), [], shown)
    ready = f"serving on http://127.0.0.1:{free_port}/v1 until Ctrl-C"
    assert [ready in text for text in seen] == [False, True]
