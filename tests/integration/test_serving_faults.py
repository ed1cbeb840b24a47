"""A server whose files are deleted, damaged and replaced, and whose processes are killed, while it serves."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from rayft.artifacts import WEIGHTS_FILE, AdapterArtifact
from rayft.flow.commands import adapters as adapters_command
from tests.integration.actors import pids
from tests.integration.serving import Base, replica_stats, serving

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NAMES = ("deleted", "truncated", "replaced", "foreign", "overwritten")
SPOILT = "spoilt"
"""An adapter whose copy is damaged, too."""
BOUND = 10.0
"""Seconds within which a request must be refused: `wait_seconds`, and time for a slow machine."""


@dataclass(frozen=True)
class Server:
    url: str
    base: Base
    first: dict[str, tuple[str | None, str]]
    """Model → fingerprint and text of its answer right after the start."""

    def post(self, model: str, **extra: Any) -> httpx.Response:
        body = {"model": model, "prompt": "hello", "max_tokens": 8, "temperature": 0, **extra}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)

    def answer(self, model: str) -> tuple[str | None, str]:
        answer = self.post(model)
        assert answer.status_code == 200, answer.text
        body = answer.json()
        return body["system_fingerprint"], body["choices"][0]["text"]

    def answers(self) -> dict[str, tuple[str | None, str]]:
        return {name: self.answer(name) for name in ("base", *NAMES)}

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=60)

    def load(self, name: str, folder: Path) -> None:
        body = {"name": name, "source": str(folder)}
        made = httpx.post(f"{self.url}/v1/adapters", json=body, timeout=60)
        assert made.status_code == 201, made.text

    def folder(self, name: str) -> Path:
        return self.base.root / name

    def copy(self, name: str) -> Path:
        return Path(self.get(f"/v1/adapters/{name}").json()["versions"][0]["root"])


@pytest.fixture(scope="module")
def server(local_ray: None, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("faults")
    base = Base.read(Path(shutil.copytree(tiny_folder, root / "base")), root)
    adapters = {name: base.save(name, base.adapter(name)) for name in (*NAMES, SPOILT)}
    size = 4 * sum(4 * (rows + columns) for rows, columns in base.shapes.values())
    # The device has room for two adapters, so that they are evicted and read again.
    with serving(base, adapters=adapters, device_bytes=f"{2 * size}B") as url:
        found = Server(url, base, {})
        found.first.update(found.answers())
        yield found
    assert not list((root / "fetched").glob("served-*"))


def damage(server: Server) -> None:
    """Do to the folder of each adapter what its name says."""
    shutil.rmtree(server.folder("deleted"))
    os.truncate(server.folder("truncated") / WEIGHTS_FILE, 100)
    server.base.adapter("another").save(server.folder("replaced"))
    other = {path: (rows + 1, columns) for path, (rows, columns) in server.base.shapes.items()}
    Base(server.base.model, server.base.root, other, "0" * 16).adapter("x").save(server.folder("foreign"))
    weights = server.folder("overwritten") / WEIGHTS_FILE
    with weights.open("r+b") as file:
        file.seek(weights.stat().st_size // 2)
        file.write(b"\0" * 1000)


def kill_replica() -> None:
    (replica,) = replica_stats()
    os.kill(replica["pid"], signal.SIGKILL)


def kill_actor(name: str) -> None:
    for pid in pids(name):
        os.kill(pid, signal.SIGKILL)


def eventually(check: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.25)


def refused(server: Server, model: str = "base", **extra: Any) -> str:
    """Check that a request is refused in time and in OpenAI's form; return the reason."""
    started = time.monotonic()
    answer = server.post(model, **extra)
    assert time.monotonic() - started < BOUND
    assert answer.status_code == 503, answer.text
    assert int(answer.headers["retry-after"]) > 0
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "unavailable")
    return str(error["message"])


def not_ready(server: Server) -> str:
    """Check that `/readyz` reports in time that requests can't be answered; return the reason."""
    started = time.monotonic()
    answer = server.get("/readyz")
    assert time.monotonic() - started < BOUND
    assert (answer.status_code, answer.json()["status"]) == (503, "not ready")
    return str(answer.json()["reason"])


def lose_replica(server: Server) -> None:
    """Kill the replica, check that no request hangs meanwhile, and wait for the next replica."""
    kill_replica()
    assert "no replica is up" in refused(server)
    assert "no replica is up" in refused(server, "deleted", stream=True)
    assert not_ready(server).startswith("no replica is up")
    assert server.get("/v1/models").status_code == 503
    assert server.get("/healthz").json() == {"status": "ok", "engine": None}
    eventually(lambda: server.get("/readyz").status_code == 200)


def assert_metric(pattern: str, value: float) -> None:
    """Wait until a metric has a value."""
    import ray

    (node,) = [node for node in ray.nodes() if node["Alive"]]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    def there() -> bool:
        lines = httpx.get(url, timeout=30).text.splitlines()
        return any(re.match(f"ray_{pattern}", line) and float(line.split()[-1]) == value for line in lines)

    eventually(there)


def test_an_adapter_remains_served_whatever_happens_to_its_folder(server: Server) -> None:
    damage(server)
    assert server.answers() == server.first


def test_a_replica_that_starts_later_serves_the_same_and_reports_what_it_can_not_load(server: Server) -> None:
    os.truncate(server.copy(SPOILT) / WEIGHTS_FILE, 100)
    lose_replica(server)
    assert server.answers() == server.first
    assert "truncated or damaged" in refused(server, SPOILT)
    assert server.get("/readyz").json()["unavailable"] == 1
    listed = {one["id"]: one.get("unavailable", "") for one in server.get("/v1/models").json()["data"]}
    assert {name for name, why in listed.items() if why} == {SPOILT}
    assert "truncated or damaged" in listed[SPOILT]
    console = Console(record=True, width=100)
    adapters_command(server.url, "list", None, None, None, False, console)
    assert f"{SPOILT}@1 is unavailable: " in console.export_text()
    assert_metric(f'rayft_adapter_unavailable{{.*adapter="{SPOILT}".*', 1)


def test_a_damaged_or_replaced_adapter_is_served_once_it_is_loaded_again(server: Server) -> None:
    # Another adapter can be loaded while one is unavailable.
    server.load("new", Path(server.base.save("new", server.base.adapter("new"))))
    server.load(SPOILT, server.folder(SPOILT))
    assert server.answer(SPOILT)[0] == AdapterArtifact.load(server.folder(SPOILT)).content_hash
    server.load("replaced", server.folder("replaced"))
    assert server.answer("replaced")[0] == AdapterArtifact.load(server.folder("replaced")).content_hash
    assert server.answer("replaced@2") != server.first["replaced"]
    # A replica may have noticed before that this one was replaced, too.
    assert server.get("/readyz").json()["unavailable"] == 0
    server.first["replaced"] = server.answer("replaced")


def test_after_the_director_was_killed_the_same_is_served(server: Server) -> None:
    change = server.get("/readyz").json()["change"]
    kill_actor("Director")
    eventually(lambda: "the director, which knows what is served, is not up" in not_ready(server))
    # Requests do not need the director.
    assert server.answer("deleted") == server.first["deleted"]
    eventually(lambda: server.get("/readyz").status_code == 200)
    assert server.get("/readyz").json()["change"] == change
    assert server.answers() == server.first


@pytest.mark.parametrize("name", ["ServeController", "Ingress"])
def test_a_process_between_clients_and_replicas_that_is_killed_comes_back(server: Server, name: str) -> None:
    def answers() -> bool:
        try:
            return server.post("deleted").status_code == 200
        except httpx.TransportError:
            return False

    kill_actor(name)
    eventually(answers)
    assert server.answers() == server.first


def test_clients_that_never_read_do_not_block_others(server: Server) -> None:
    host, port = httpx.URL(server.url).host, httpx.URL(server.url).port
    body = json.dumps({"model": "base", "prompt": "hello", "max_tokens": 200, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    with ExitStack() as deaf:
        for _ in range(40):
            client = deaf.enter_context(socket.socket())
            # Small, so that data for it soon has to wait in the server.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            client.connect((host, port))
            client.sendall(request)
        eventually(lambda: server.post("deleted").status_code == 200, seconds=60)
        assert server.answers() == server.first
    eventually(lambda: all(one["engine"]["running"] == 0 for one in replica_stats()))


def test_a_base_remains_served_when_its_files_are_damaged(server: Server) -> None:
    weights = server.base.model / "model.safetensors"
    whole = weights.read_bytes()
    os.truncate(weights, 1000)
    assert server.answers() == server.first
    kill_replica()
    refused(server)
    eventually(lambda: "none starts" in refused(server))
    assert "ModelError" in refused(server, "replaced")
    assert "none starts: rayft.errors.ModelError: on " in not_ready(server)
    weights.write_bytes(whole)
    eventually(lambda: server.get("/readyz").status_code == 200)
    assert server.answers() == server.first
