"""Which Ray cluster is meant, and whether it answers: Ray itself waits for minutes for one that is away."""

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

__all__ = ["default_folder", "find_address", "on_cluster", "unreachable"]

SECONDS_TO_ANSWER = 8.0
"""How long a cluster may take to answer before it counts as away."""


def find_address() -> tuple[str, bool]:
    """Find the cluster to join.

    Returns:
        Its address, empty if there is none, and whether RAY_ADDRESS names it.
    """
    named = os.environ.get("RAY_ADDRESS", "")
    if named == "local":
        return "", False
    if named not in ("", "auto"):
        return named, True
    _send_own_token()
    try:
        # Where `ray start` leaves the address; a cluster that was killed leaves it too.
        current = Path(get_ray_address_file(None)).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        current = ""
    return current or named, named == "auto"


def on_cluster() -> bool:
    """Return whether this process would join, or has joined, a cluster that it does not start itself."""
    if ray.is_initialized():
        return True
    address, named = find_address()
    return bool(address) and (named or not unreachable(address))


def default_folder(name: str) -> Path:
    """Return the folder of a sweep that is given no `output`, as an absolute path."""
    return (runs_folder(cluster=on_cluster()) / name).absolute()


def _send_own_token() -> None:
    """Use this user's token with a cluster of this machine, as Ray does where it looks for one by itself.

    To an address that is named Ray sends none unless RAY_AUTH_MODE=token says so.
    """
    logging.getLogger(maybe_enable_token_auth_if_token_available.__module__).setLevel(logging.ERROR)
    try:
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    except RayError:
        # RAY_AUTH_TOKEN_PATH is wrong, which is told when the cluster refuses.
        return


def unreachable(address: str) -> str:
    """Return why no cluster can be joined at an address; empty if one answers there.

    Args:
        address: `host:port` of a head node; `auto` is for Ray to look up.
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
        return "that is no address; write host:port, such as 127.0.0.1:6379"
    try:
        with init_grpc_channel(address, [("grpc.enable_http_proxy", 0)]) as channel:
            NodeInfoGcsServiceStub(channel).CheckAlive(CheckAliveRequest(), timeout=SECONDS_TO_ANSWER)
    except grpc.RpcError as error:
        return _refusal(error)
    # TLS files that are not there, a token's file that can't be read.
    except (OSError, RuntimeError, ValueError, RayError) as error:
        return str(error)
    return ""


def _refusal(error: grpc.RpcError) -> str:
    code, details = error.code(), " ".join(str(error.details()).split())
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return (
            "it refuses the token of this user: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
            f"~/.ray/auth_token to the cluster's ({details})"
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"no answer within {SECONDS_TO_ANSWER:.0f} seconds"
    return f"no Ray head node answers there ({details[:200]})"
