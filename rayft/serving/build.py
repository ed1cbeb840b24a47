"""Builds, checks, starts and stops the Ray Serve application of a configuration."""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.serve as ray_serve
import torch
from ray._common.constants import HEAD_NODE_RESOURCE_NAME
from ray.serve.config import RequestRouterConfig
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview, LoggingConfig

from rayft.config import parse
from rayft.errors import ResourceError
from rayft.models.load import load_skeleton
from rayft.paths import check_folder
from rayft.serving.config import ServeConfig
from rayft.serving.control.director import DirectorDeployment, initial
from rayft.serving.control.sources import check_source, registry_at
from rayft.serving.deployment import APPLICATION
from rayft.serving.engine.start import EngineName, check_engine, describe
from rayft.serving.http.app import IngressDeployment, IngressOptions
from rayft.serving.http.auth import resolved
from rayft.serving.http.server import bound
from rayft.serving.presence import Called, error_of
from rayft.serving.replica import ReplicaDeployment
from rayft.serving.router import AdapterRouter
from rayft.squeeze.budget import parse_bytes
from rayft.tracking.base import check_uri

__all__ = ["APPLICATION", "app", "build_app", "check", "engine_of", "preflight", "run", "stop"]

logger = logging.getLogger("ray.serve")

WAITING_PER_RUNNING = 4
"""Waiting requests in a replica for each running one, so that a free place is filled at the next step."""

ON_HEAD = {"num_cpus": 0, "resources": {HEAD_NODE_RESOURCE_NAME: 0.001}}
"""Resources that place ingress and director on the head node, beside Ray Serve's controller, so that the loss
of a worker node does not affect them. They reserve no core, which the replicas need."""

QUIET = LoggingConfig(enable_access_log=False)
"""No line in the log for each request, which would take a replica time, and none for each time that a replica
asks the director for changes."""

NICENESS = "RAY_worker_niceness"
"""Ray's variable for the priority of its workers."""

POLL_SECONDS = 0.25
"""Interval at which the state of the application is looked at while it starts or ends."""

ROUTING_SECONDS = 1.0
"""Interval at which replicas report to the routers which adapters they have on the device."""


def app(args: dict[str, Any]) -> ray_serve.Application:
    """Build the application from the `args` in a file for `serve run` or `serve deploy`.

    Raises:
        ConfigError: as `build_app`, or if the `args` are not valid settings of `ServeConfig`.
    """
    return build_app(parse(ServeConfig, args))


def build_app(config: ServeConfig) -> ray_serve.Application:
    """Bind ingress, director and replicas.

    A file for `serve deploy` can set a `user_config` with other adapters for the director. If a deploy
    changes only that, the running replicas serve those adapters, and none restarts.

    Raises:
        ConfigError: if a key is missing or can't be used.
    """
    engine = engine_of(config)
    config = _absolute(config)
    # Identifies this server: a director that replaces a lost one finds the server's record by it.
    server = uuid.uuid4().hex
    held = config.max_running * (1 + WAITING_PER_RUNNING)
    only_one = config.replicas == 1 and config.max_replicas is None
    places = held + config.max_queued if only_one else None
    replica = ReplicaDeployment.options(
        **_size(config),
        max_ongoing_requests=held,
        # Ray Serve counts all requests of a burst as waiting until it has sent them. If there are places, the
        # ingress counts the requests itself.
        max_queued_requests=places or config.max_queued,
        request_router_config=_routing(config, "Replica"),
        ray_actor_options={"num_cpus": config.cpus, "num_gpus": config.gpus if engine == "vllm" else 0},
        # With a `user_config` Ray Serve calls `reconfigure` when a replica starts.
        user_config={},
        logging_config=QUIET,
        graceful_shutdown_timeout_s=config.drain_seconds,
    ).bind(config, engine, server)
    director = DirectorDeployment.options(
        num_replicas=1,
        max_ongoing_requests=1000,
        request_router_config=_routing(config, "Director"),
        # On the head the folder of copies outlives a director, so another one continues from the record.
        ray_actor_options=ON_HEAD,
        logging_config=QUIET,
        user_config={},
        graceful_shutdown_timeout_s=config.drain_seconds,
    ).bind(config, replica, server)
    ingress = IngressDeployment.options(
        num_replicas=1, ray_actor_options=ON_HEAD, graceful_shutdown_timeout_s=config.drain_seconds
    )
    options = IngressOptions(
        host=config.host,
        port=config.port,
        drain_seconds=config.drain_seconds,
        waiting=(config.wait_seconds, config.max_seconds),
        places=places,
        keys=resolved(config.keys),
        roots=config.roots,
        max_body_bytes=parse_bytes(config.max_body_bytes),
    )
    return ingress.bind(replica, director, options)


def preflight(config: ServeConfig) -> None:
    """Check before anything starts that the port is free and that each adapter matches the base.

    Raises:
        ResourceError: if the port is in use.
        ModelError: if the base can't be loaded.
        ArtifactError: if an adapter can't be served.
    """
    check(config)
    config = _absolute(config)
    if not config.adapters:
        return
    initial(config, describe(config, engine_of(config)))


def check(config: ServeConfig) -> None:
    """Check everything that takes only seconds, without starting Ray and without loading the base.

    Raises:
        RayftError: if an address, key, folder, adapter or model can't be used.
    """
    _check_port(config.host, config.port)
    resolved(config.keys)
    engine = engine_of(config)
    check_engine(config, engine)
    if engine == "vllm":
        _check_gpus(config.gpus)
    located = _absolute(config)
    registry = registry_at(located.registry)
    check_folder(Path(located.fetched), "fetched")
    for source in located.adapters.values():
        check_source(source, registry, Path(located.fetched), located.max_adapter_bytes)
    load_skeleton(config.model)


def _check_gpus(wanted: int) -> None:
    """Refuse vLLM where no node has enough GPUs: a replica would wait for them forever."""
    there = _gpus()
    if there < wanted:
        raise ResourceError(
            f"engine is vllm and gpus is {wanted}, but no node has more than {there} GPUs; set engine: cpu, "
            "or lower gpus. On a cluster that starts nodes with GPUs when they are needed, give the head the "
            "resource gpu_cluster"
        )


def _gpus() -> int:
    """Return the most GPUs of a node of the cluster, or of this machine if no cluster runs."""
    if not ray.is_initialized():
        return torch.cuda.device_count()
    # A cluster that declares `gpu_cluster` starts workers with GPUs when they are needed.
    if ray.cluster_resources().get("gpu_cluster", 0):
        return sys.maxsize
    return max((int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]), default=0)


def run(config: ServeConfig, *, blocking: bool = True, ready: Callable[[], object] = lambda: None) -> None:
    """Check the configuration, start Ray if it isn't running, and serve.

    Args:
        config: the configuration.
        blocking: whether to serve until an interrupt; otherwise return once the application runs.
        ready: called once the application runs.

    Raises:
        ResourceError: if the port is in use, or the application does not start.
        RayftError: as `preflight`.
    """
    preflight(config)
    if not ray.is_initialized():
        # Ray's workers otherwise have a low priority, so the engine would wait for all else on the machine.
        os.environ.setdefault(NICENESS, "0")
        ray.init(namespace=APPLICATION)
    ray_serve.start(proxy_location="Disabled")
    target = ray_serve.RunTarget(build_app(config), APPLICATION, route_prefix=None)
    ray_serve.run_many([target], wait_for_applications_running=False)
    _wait_until_running()
    if not _listens(config.host, config.port):
        raise ResourceError(
            f"nothing listens on {config.host}:{config.port} here; this machine is not the head of the "
            "cluster, which receives the requests"
        )
    ready()
    if blocking:
        _wait_for_interrupt()


def _wait_until_running() -> None:
    """Wait until the application runs, and log meanwhile what Ray Serve says about replicas that do not.

    On a cluster without room for them it waits forever, since a node may be added.

    Raises:
        ResourceError: if the application does not start.
    """
    logged = ""
    while (application := _application()) and application.status != ApplicationStatus.RUNNING:
        why = error_of(application) or ""
        if application.status == ApplicationStatus.DEPLOY_FAILED:
            ray_serve.delete(APPLICATION)
            raise ResourceError(f"the application did not start: {why or application.message}")
        if why and why != logged:
            logger.warning("the application does not run yet: %s", why)
            logged = why
        time.sleep(POLL_SECONDS)
    if application is None:
        raise ResourceError("the application did not start: it was deleted")


def _application() -> ApplicationStatusOverview | None:
    return ray_serve.status().applications.get(APPLICATION)


def _size(config: ServeConfig) -> dict[str, Any]:
    """Return the number of replicas: fixed, or scaled so that half of each one's places stay free."""
    if config.max_replicas is None:
        return {"num_replicas": config.replicas}
    scaling = {
        "min_replicas": config.replicas,
        "max_replicas": config.max_replicas,
        "target_ongoing_requests": max(1, config.max_running // 2),
    }
    return {"autoscaling_config": scaling}


def _routing(config: ServeConfig, called: Called) -> RequestRouterConfig:
    """Route requests to where their adapters are, until half a batch more waits there than elsewhere.

    The director has the same router, from which `presence` learns whether it is up.
    """
    options: dict[str, Any] = {
        "request_router_class": AdapterRouter,
        "request_router_kwargs": {"slack": max(1, config.max_running // 2), "called": called},
        "request_routing_stats_period_s": ROUTING_SECONDS,
    }
    return RequestRouterConfig(**options)


def _absolute(config: ServeConfig) -> ServeConfig:
    """Make the paths of folders absolute, so that they are the same in every process."""

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
    """Stop the server; requests that are running are answered first, for up to `drain_seconds`."""
    # A shutdown alone would close their connections.
    ray_serve.delete(APPLICATION, _blocking=False)
    # Ray Serve itself would wait for a minute at most.
    while _application():
        time.sleep(POLL_SECONDS)
    ray_serve.shutdown()


def _wait_for_interrupt() -> None:
    # Ctrl-C sends SIGINT; service managers and containers send SIGTERM.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        while True:
            time.sleep(1)
    except KeyboardInterrupt:
        stop()


def engine_of(config: ServeConfig) -> EngineName:
    """Return the engine that serves: the configured one, or vLLM where there are GPUs."""
    if config.engine != "auto":
        return config.engine
    return "vllm" if _gpus() >= 1 else "cpu"


def _check_port(host: str, port: int) -> None:
    try:
        bound(host, port).close()
    except socket.gaierror as error:
        raise ResourceError(f"{host} is not an address of this machine ({error}); set host to one") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ResourceError(
                f"port {port} on {host} is in use; stop the process that listens there (`serve shutdown` "
                f"for an earlier deployment) or choose another port: --set port={port + 1}"
            ) from error
        raise ResourceError(f"can't listen on {host}:{port} ({error}); set another host or port") from error


def _listens(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=5):
            return True
    except OSError:
        return False
