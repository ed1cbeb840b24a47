"""From a configuration to a running application."""

from __future__ import annotations

import errno
import signal
import socket
import time
import uuid
from pathlib import Path
from typing import Any

import ray
import ray.serve as ray_serve
import torch
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray.serve.config import RequestRouterConfig

from rayft.config import parse
from rayft.errors import ResourceError
from rayft.models.load import load_model, load_skeleton
from rayft.models.targets import linear_shapes
from rayft.paths import check_folder
from rayft.registry.store import MlflowRegistry
from rayft.serving.config import ServeConfig
from rayft.serving.control.admission import BaseModel
from rayft.serving.control.director import DirectorDeployment, initial
from rayft.serving.control.sources import check_source
from rayft.serving.deployment import APPLICATION, PROXY_ENVIRONMENT
from rayft.serving.http.app import IngressDeployment
from rayft.serving.http.auth import resolved
from rayft.serving.presence import Called, start_error
from rayft.serving.replica import ReplicaDeployment
from rayft.serving.router import AdapterRouter
from rayft.serving.slots import widest_rank
from rayft.squeeze.budget import parse_bytes
from rayft.tracking.base import check_uri

__all__ = ["APPLICATION", "app", "build_app", "check", "preflight", "run", "stop"]

WAITING_PER_RUNNING = 4
"""Requests that wait in a replica for each that runs, so that a place is filled at the next step."""

SPARE = 1000
"""Requests to the ingress for more than text: refusals, lists, health."""

ON_HEAD = {"num_cpus": 0, "resources": {HEAD_NODE_RESOURCE_NAME: 0.001}}
"""Places ingress and director on the head, as Ray Serve's controller is: a lost worker node does not take
them. They take no core, which the replicas would miss."""

ROUTING_SECONDS = 1.0
"""How often replicas tell the routers which adapters they have on the device."""


def app(args: dict[str, Any]) -> ray_serve.Application:
    """Build the application from the `args` of a file that `serve run` or `serve deploy` reads.

    Raises:
        ConfigError: as `build_app`, or if they are no settings of `ServeConfig`.
    """
    return build_app(parse(ServeConfig, args))


def build_app(config: ServeConfig) -> ray_serve.Application:
    """Bind ingress, director and replicas.

    `serve/config.yaml` can set a `user_config` of the director with other adapters: a deploy that changes
    nothing else is handed to all running replicas and restarts none.

    Raises:
        ConfigError: if a key is not where it should be.
    """
    device = _device(config)
    config = _absolute(config)
    # The name of this server: its directors, one after the other, find what is served by it.
    server = uuid.uuid4().hex
    replica = ReplicaDeployment.options(
        **_size(config),
        max_ongoing_requests=config.max_running * (1 + WAITING_PER_RUNNING),
        max_queued_requests=config.max_queued,
        request_router_config=_routing(config, "Replica"),
        ray_actor_options={"num_cpus": config.cpus, "num_gpus": 1 if device == "cuda" else 0},
        # So that it is asked to `reconfigure` itself when it starts.
        user_config={},
        graceful_shutdown_timeout_s=config.drain_seconds,
    ).bind(config, device, server)
    director = DirectorDeployment.options(
        num_replicas=1,
        max_ongoing_requests=1000,
        request_router_config=_routing(config, "Director"),
        # There the folder outlives it: one that replaces it goes on from the record.
        ray_actor_options=ON_HEAD,
        user_config={},
        graceful_shutdown_timeout_s=config.drain_seconds,
    ).bind(config, replica, server)
    most = config.max_replicas or config.replicas
    ingress = IngressDeployment.options(
        # Beside all that may wait or run there must be room for those who are told so.
        max_ongoing_requests=most * config.max_running * (1 + WAITING_PER_RUNNING)
        + config.max_queued
        + SPARE,
        ray_actor_options=ON_HEAD,
        graceful_shutdown_timeout_s=config.drain_seconds,
    )
    most_bytes = parse_bytes(config.max_body_bytes)
    waiting = (config.wait_seconds, config.max_seconds)
    return ingress.bind(replica, director, resolved(config.keys), config.roots, most_bytes, waiting)


def preflight(config: ServeConfig) -> None:
    """Check, before anything starts, that the port is free and that each adapter fits the base.

    Raises:
        ResourceError: if the port is in use.
        ModelError: if the base can't be loaded.
        ArtifactError: if an adapter can't be served.
    """
    check(config)
    config = _absolute(config)
    if not config.adapters:
        return
    loaded = load_model(config.model, torch.bfloat16)
    base = BaseModel(
        config.model.name, loaded.fingerprint, linear_shapes(loaded.model), widest_rank(_device(config))
    )
    initial(config, base)


def check(config: ServeConfig) -> None:
    """Check what can be told in seconds, without Ray and without loading the base.

    Raises:
        RayftError: naming the address, key, folder, adapter or model that can't be used.
    """
    _check_port(config.host, config.port)
    resolved(config.keys)
    _check_device(config)
    located = _absolute(config)
    registry = MlflowRegistry(located.registry) if located.registry else None
    check_folder(Path(located.fetched), "fetched")
    for source in located.adapters.values():
        check_source(source, registry, Path(located.fetched), located.max_adapter_bytes)
    load_skeleton(config.model)


def _check_device(config: ServeConfig) -> None:
    """Refuse a GPU that will never come: a replica would wait for it without an end."""
    if config.device != "cuda":
        return
    resources = ray.cluster_resources() if ray.is_initialized() else {}
    if not (resources.get("GPU", 0) or resources.get("gpu_cluster", 0) or torch.cuda.is_available()):
        raise ResourceError("device is cuda, but no GPU is here; set device: cpu or auto")


def run(config: ServeConfig, *, blocking: bool = True) -> None:
    """Check, start Ray if it isn't running, and serve; returns at once if not `blocking`.

    Raises:
        ResourceError: if the port is in use, or the application does not start.
        RayftError: as `preflight`.
    """
    preflight(config)
    if not ray.is_initialized():
        ray.init(namespace=APPLICATION)
    http: dict[str, Any] = {"host": config.host, "port": config.port}
    ray_serve.start(http_options=http, controller_options={"runtime_env": {"env_vars": PROXY_ENVIRONMENT}})
    try:
        ray_serve.run(build_app(config), name=APPLICATION, route_prefix="/", blocking=False)
    except RuntimeError as error:
        cause = start_error() or str(error)
        ray_serve.delete(APPLICATION)
        raise ResourceError(f"the application did not start: {cause}") from error
    if not _listens(config.host, config.port):
        raise ResourceError(
            f"nothing listens on {config.host}:{config.port} here: Ray Serve runs in this cluster already, "
            "with another address (use that one, or end it with `serve shutdown`), or this machine is not "
            "the head of the cluster, where requests are taken"
        )
    if blocking:
        _wait_for_interrupt()


def _size(config: ServeConfig) -> dict[str, Any]:
    """Say how many replicas there are: a fixed number, or as many as keep half of each one's places free."""
    if config.max_replicas is None:
        return {"num_replicas": config.replicas}
    scaling = {
        "min_replicas": config.replicas,
        "max_replicas": config.max_replicas,
        "target_ongoing_requests": max(1, config.max_running // 2),
    }
    return {"autoscaling_config": scaling}


def _routing(config: ServeConfig, called: Called) -> RequestRouterConfig:
    """Send requests to where their adapters are, until half a batch more waits there than elsewhere.

    The director has the same router, by which `presence` knows whether it is up.
    """
    options: dict[str, Any] = {
        "request_router_class": AdapterRouter,
        "request_router_kwargs": {"slack": max(1, config.max_running // 2), "called": called},
        "request_routing_stats_period_s": ROUTING_SECONDS,
    }
    return RequestRouterConfig(**options)


def _absolute(config: ServeConfig) -> ServeConfig:
    """Write folders so that they mean the same wherever a replica runs."""

    def absolute(place: str) -> str:
        return place if ":/" in place else str(Path(place).expanduser().absolute())

    return config.model_copy(
        update={
            "adapters": {name: absolute(source) for name, source in config.adapters.items()},
            "roots": tuple(map(absolute, config.roots)),
            "fetched": absolute(config.fetched),
            "registry": check_uri(config.registry) if config.registry else None,
        }
    )


def stop() -> None:
    """Serve no more: requests that were begun are answered first, for as long as `drain_seconds` says."""
    # A shutdown alone would cut their connections.
    ray_serve.delete(APPLICATION)
    ray_serve.shutdown()


def _wait_for_interrupt() -> None:
    # To be ended is how a server ends: by Ctrl-C, or as service managers and containers end what they run.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        stop()


def _device(config: ServeConfig) -> str:
    if config.device != "auto":
        return config.device
    if ray.is_initialized():
        return "cuda" if ray.cluster_resources().get("GPU", 0) >= 1 else "cpu"
    return "cuda" if torch.cuda.is_available() else "cpu"


def _check_port(host: str, port: int) -> None:
    try:
        address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ResourceError(f"{host} is no address of this machine ({error}); set host to one") from error
    with socket.socket(address[0], socket.SOCK_STREAM) as probe:
        # As servers do: an address whose last connection has just ended is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address[4])
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ResourceError(
                    f"port {port} on {host} is in use; stop what listens there (`serve shutdown` for an "
                    f"earlier deployment) or choose another: --set port={port + 1}"
                ) from error
            raise ResourceError(f"can't listen on {host}:{port} ({error}); set another one") from error


def _listens(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=5):
            return True
    except OSError:
        return False
