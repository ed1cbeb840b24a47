"""A server on two nodes that share no disk: the second Ray node has its own mount namespace."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from rayft.flow.demo import wait_ready
from tests.integration.nodes import Nodes, free_port, log_of, two_nodes
from tests.integration.serving import Base
from tests.processes import eventually, process

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@dataclass(frozen=True)
class Cluster(Nodes):
    """A head and a node; the replicas run on the node, where two folders are separate."""

    @property
    def fetched(self) -> Path:
        return self.root / "fetched"

    def copies(self) -> tuple[list[str], list[str]]:
        """List the copies of adapters on the head and on the node."""
        here, there = (
            sorted(path.name for path in place.glob("served-*/*") if path.is_dir())
            for place in (self.fetched, self.there(self.fetched))
        )
        return here, there

    def kill_replica(self) -> None:
        """Kill the process of the replica, which runs on the node."""
        (replica,) = [
            one for one in self.node.children(recursive=True) if ":Replica" in " ".join(one.cmdline()[:1])
        ]
        os.kill(replica.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with two_nodes(("fetched", "private")) as nodes:
        yield Cluster(nodes.root, nodes.port, nodes.node)


@contextmanager
def serving(cluster: Cluster, **settings: Any) -> Iterator[str]:
    """Serve by the command line on the head, and stop the server as a service manager does."""
    port = free_port()
    content = {"fetched": str(cluster.fetched), "dtype": "float32", "port": port, **settings}
    (cluster.root / "serve.yaml").write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "rayft.cli", "serve", str(cluster.root / "serve.yaml")]
    log = cluster.root / "serve.log"
    with process(command, log, RAY_ADDRESS=f"127.0.0.1:{cluster.port}") as server:
        url = f"http://127.0.0.1:{port}"
        try:
            wait_ready(url)
        except Exception as error:
            raise AssertionError(log_of(cluster.root)) from error
        yield url
        server.terminate()
        assert server.wait(60) == 0, log.read_text()


def test_replicas_on_another_node_receive_keep_and_delete_the_servers_copies(
    cluster: Cluster, tiny_folder: Path
) -> None:
    base = Base.read(tiny_folder, cluster.root / "private")
    adapters = {name: base.adapter(name) for name in ("one", "two")}
    folders = {name: base.save(name, adapter) for name, adapter in adapters.items()}
    size = 4 * sum(4 * (rows + columns) for rows, columns in base.shapes.values())
    with ExitStack() as stack:
        url = stack.enter_context(
            serving(
                cluster,
                model={"name": str(tiny_folder)},
                adapters={"one": folders["one"]},
                roots=[str(base.root)],
                # The device has room for one adapter, so that they are evicted and read again.
                device_bytes=f"{size}B",
            )
        )

        def answer(name: str) -> str:
            body = {"model": name, "prompt": "hello", "max_tokens": 8, "temperature": 0}
            got = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
            assert got.status_code == 200, got.text
            found = got.json()
            assert found["system_fingerprint"] == adapters[name].content_hash
            return str(found["choices"][0]["text"])

        def change(verb: str, path: str, body: Any = None) -> None:
            got = httpx.request(verb, f"{url}{path}", json=body, timeout=60)
            assert got.is_success, got.text

        first = {"one": answer("one")}
        change("POST", "/v1/adapters", {"name": "two", "source": folders["two"]})
        first["two"] = answer("two")
        assert first["one"] != first["two"]
        here, there = cluster.copies()
        assert len(here) == 2
        assert here == there
        # The copies are missing when an evicted adapter is read again.
        shutil.rmtree(next(cluster.there(cluster.fetched).glob("served-*")))
        assert {name: answer(name) for name in first} == first
        # A replica starts later on a node where one copy is damaged and one is missing.
        damaged, missing = (next(cluster.there(cluster.fetched).glob(f"served-*/{name}")) for name in here)
        (damaged / "adapter_model.safetensors").write_bytes(b"")
        shutil.rmtree(missing)
        cluster.kill_replica()
        eventually(lambda: httpx.get(f"{url}/readyz", timeout=60).status_code == 503, "the replica is up")
        eventually(lambda: httpx.get(f"{url}/readyz", timeout=60).status_code == 200, "no replica is up")
        assert {name: answer(name) for name in first} == first
        change("DELETE", "/v1/adapters/two")
        here, there = cluster.copies()
        assert len(here) == 1
        assert here == there
    assert cluster.copies() == ([], [])
    assert [*cluster.fetched.glob("served-*"), *cluster.there(cluster.fetched).glob("served-*")] == []
