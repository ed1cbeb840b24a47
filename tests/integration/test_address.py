"""A real head node answers those who ask whether it is alive."""

from __future__ import annotations

import pytest
import ray

from rayft.flow.address import unreachable

pytestmark = pytest.mark.ray


@pytest.mark.usefixtures("local_ray")
def test_a_running_cluster_is_reachable() -> None:
    address = ray.get_runtime_context().gcs_address
    assert unreachable(address) == ""
    host, _, port = address.rpartition(":")
    # Another of its ports: a raylet's, a worker's or nobody's, and no head node's.
    assert unreachable(f"{host}:{int(port) + 1}") != ""
