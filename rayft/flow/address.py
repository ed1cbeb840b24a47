"""Find the Ray cluster to join, and check within seconds that it answers. Ray itself waits for minutes."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import grpc
import ray
from ray._common.utils import get_ray_address_file
from ray._private.authentication.authentication_token_setup import (
    maybe_enable_token_auth_if_token_available,
)
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated.gcs_service_pb2 import CheckAliveRequest  # type: ignore[attr-defined]
from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub
from ray.exceptions import RayError

from rayft.paths import runs_folder

__all__ = ["default_folder", "find_address", "joined", "on_cluster", "own", "spread", "unreachable"]

SECONDS_TO_ANSWER = 8.0
"""How long a cluster may take to answer before it counts as unreachable."""


def find_address() -> tuple[str, bool]:
    """Find the cluster to join, without contacting it.

    Returns:
        Its address (`host:port` or `auto`; empty if there is none), and whether RAY_ADDRESS asks for it.
    """
    named = os.environ.get("RAY_ADDRESS", "")
    if named == "local":
        return "", False
    if named not in ("", "auto"):
        return named, True
    _send_own_token()
    try:
        # `ray start` writes the address here. The file stays if the cluster is killed.
        current = Path(get_ray_address_file(None)).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        current = ""
    return current or named, named == "auto"


class Own:
    """How this process has come to a Ray cluster, unless the program that it runs has joined it.

    Attributes:
        started: whether it has started one for itself, on this machine; set before Ray starts, and unset when
            it has ended.
        joined: whether it has joined one that was there.
    """

    started = False
    joined = False


own = Own()


def joined() -> bool:
    """Return whether this process has joined a cluster that it did not start itself."""
    return not own.started and ray.is_initialized()


def on_cluster() -> bool:
    """Return whether this process would join, or has joined, a cluster that it does not start itself."""
    if own.started:
        return False
    if ray.is_initialized():
        return True
    address, named = find_address()
    return bool(address) and (named or not unreachable(address))


def spread() -> bool:
    """Return whether the joined cluster has several nodes, which may not see each other's files."""
    return len([node for node in ray.nodes() if node["Alive"]]) > 1


def default_folder(name: str) -> Path:
    """Return the absolute path of the folder of a sweep whose configuration has no `output`."""
    return (runs_folder(cluster=on_cluster()) / name).absolute()


def _send_own_token() -> None:
    """Use this user's token for a cluster on this machine, as Ray does for a cluster that it finds by itself.

    For an address in RAY_ADDRESS, Ray sends a token only if RAY_AUTH_MODE=token is set.
    """
    logging.getLogger(maybe_enable_token_auth_if_token_available.__module__).setLevel(logging.ERROR)
    try:
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    except RayError:
        # RAY_AUTH_TOKEN_PATH is wrong. The message follows when the cluster refuses the connection.
        return


def unreachable(address: str) -> str:
    """Return why no cluster can be joined at an address; empty if one answers there.

    Args:
        address: `host:port` of a head node, or `auto`, which Ray looks up and which is not checked here.
    """
    if address == "auto":
        return ""
    if "://" in address:
        return (
            "only the address of a head node, host:port, can be joined, and on a node of the cluster; from "
            "elsewhere submit a job with `ray job submit` (RAY_API_SERVER_ADDRESS names the cluster for that)"
        )
    found = re.fullmatch(r"(?:\[[0-9A-Fa-f:.%\w]+\]|[^\s:/\[\]]+):(\d{1,5})", address)
    if found is None or not 0 < int(found[1]) < 2**16:
        return "that is not an address; write host:port, such as 127.0.0.1:6379"
    try:
        with init_grpc_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
            NodeInfoGcsServiceStub(channel).CheckAlive(CheckAliveRequest(), timeout=SECONDS_TO_ANSWER)
    except grpc.RpcError as error:
        return _refusal(error)
    # TLS files are missing, or the token's file can't be read.
    except (OSError, RuntimeError, ValueError, RayError) as error:
        return str(error)
    return ""


def _refusal(error: grpc.RpcError) -> str:
    """Return why a call to a head node failed, with what to do about it."""
    code, details = error.code(), " ".join(str(error.details()).split())
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return (
            "it refuses the token of this user: set RAY_AUTH_MODE=token, and put the cluster's token into "
            f"RAY_AUTH_TOKEN or ~/.ray/auth_token ({details})"
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"no answer within {SECONDS_TO_ANSWER:.0f} seconds"
    return f"no Ray head node answers there ({details[:200]})"
