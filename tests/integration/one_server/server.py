"""The server that the tests of this folder share, and what they change and restore."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

from rayft.registry.store import MlflowRegistry
from rayft.serving.http.auth import KeyConfig
from rayft.tracking import TrackerSpec, TrackingConfig, tracker_spec
from rayft.tracking.mlflow import prepare
from tests.integration.serving import ADMIN, HEADERS, Base, replica_stats, serving
from tests.unit.serving.adapters import save_adapters

USER_KEY = "the-key-of-a-user"
USER = KeyConfig(
    name="ann", sha256=hashlib.sha256(USER_KEY.encode()).hexdigest(), adapters=("squeezed", "base")
)
BODY_BYTES = 1_000_000
FOLLOW_SECONDS = 0.3
"""Interval at which the server looks up aliases of the registry."""


@dataclass(frozen=True)
class Server:
    """One replica with six adapters, two keys, a registry, and a store of files that is reached by HTTP."""

    url: str
    base: Base
    adapters: dict[str, str]
    """Name → folder of what is served when a module begins. `still` is last, since tests unload it."""
    store: str
    """URL of the store, which has the base's folder of adapters."""
    tracker: TrackerSpec
    replica: int
    """Process id of the replica."""

    @property
    def registry(self) -> MlflowRegistry:
        return MlflowRegistry(self.tracker.uri)

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Send a request with the admin's key."""
        return httpx.request(method, f"{self.url}{path}", headers=HEADERS, timeout=60, **options)

    def text(self, model: str) -> str:
        """Return what a model answers to a fixed prompt."""
        body = {"model": model, "prompt": "abcdef", "max_tokens": 12, "temperature": 0}
        answer = self.call("POST", "/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    def restore(self) -> None:
        """Serve the adapters again that were served at the start, and no others."""
        listed = self.call("GET", "/v1/adapters").json()["data"]
        versions = {one["id"]: one for one in listed}
        for name in versions.keys() - self.adapters.keys():
            assert self.call("DELETE", f"/v1/adapters/{name}").is_success
        for name, folder in self.adapters.items():
            changed = sum(one["id"] == name for one in listed) != 1 or versions[name]["source"] != folder
            if changed:
                loaded = self.call("POST", "/v1/adapters", json={"name": name, "source": folder})
                assert loaded.is_success, loaded.text


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing to the terminal."""


@contextmanager
def _file_store(folder: Path) -> Iterator[str]:
    store = ThreadingHTTPServer(("127.0.0.1", 0), partial(_QuietHandler, directory=str(folder)))
    threading.Thread(target=store.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{store.server_port}"
    finally:
        store.shutdown()
        store.server_close()


@contextmanager
def start(tiny_folder: Path, root: Path) -> Iterator[Server]:
    """Start the server, which serves until the block ends."""
    base = Base.read(tiny_folder, root / "adapters")
    adapters = save_adapters(base.root, base.shapes, base.fingerprint)
    adapters["squeezed"] = base.save("squeezed", base.squeezed("squeezed", 6))
    adapters["still"] = base.save("still", base.adapter("still"))
    tracker = prepare(tracker_spec(TrackingConfig(), root))
    with (
        _file_store(base.root) as store,
        serving(
            base,
            roots=[store],
            adapters=adapters,
            keys=(ADMIN, USER),
            max_body_bytes=f"{BODY_BYTES}B",
            registry=tracker.uri,
            follow_seconds=FOLLOW_SECONDS,
            fetched=str(root / "fetched"),
        ) as url,
    ):
        yield Server(url, base, adapters, store, tracker, replica_stats()[0]["pid"])
