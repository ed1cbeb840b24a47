"""Adapters from a real MLflow registry, followed when an alias moves, and from a store reached by HTTP."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from rayft.registry.store import MlflowRegistry
from rayft.tracking import TrackingConfig, tracker_spec
from rayft.tracking.mlflow import MlflowTracker, prepare
from tests.integration.serving import ADMIN, HEADERS, Base, serving

pytestmark = [pytest.mark.ray, pytest.mark.slow]

FOLLOW, DEADLINE = 0.3, 60.0
"""Seconds between two looks at the registry, and until a change must have come through."""


class Quiet(SimpleHTTPRequestHandler):
    """A store of files; what it sends goes to no terminal."""

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@dataclass(frozen=True)
class Served:
    url: str
    store: str
    base: Base
    registry: MlflowRegistry

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        return httpx.request(method, f"{self.url}{path}", headers=HEADERS, timeout=60, **options)

    def text(self, model: str) -> str:
        body = {"model": model, "prompt": "abcdef", "max_tokens": 12, "temperature": 0}
        answer = self.call("POST", "/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    def versions(self, name: str) -> list[dict[str, Any]]:
        listed = self.call("GET", "/v1/adapters").json()["data"]
        return [one for one in listed if one["id"].partition("@")[0] == name]


@pytest.fixture(scope="module")
def served(local_ray: None, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("sources")
    base = Base.read(tiny_folder, root / "adapters")
    folders = {name: base.save(name, base.adapter(name)) for name in ("first", "second")}
    spec = prepare(tracker_spec(TrackingConfig(), root))
    with MlflowTracker(spec) as tracker:
        run_id = tracker.run("trial", "t0")
    registry = MlflowRegistry(spec.uri)
    for folder in folders.values():
        registry.register("sums", run_id, Path(folder), {"val_score": "0.5"})
    registry.alias("sums", "champion", 1)
    store = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(base.root)))
    threading.Thread(target=store.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{store.server_port}"
    adapters = {"sums": "models:/sums@champion", **folders}
    try:
        with serving(
            base, roots=[address], adapters=adapters, keys=(ADMIN,), registry=spec.uri,
            follow_seconds=FOLLOW, fetched=str(root / "fetched"),
        ) as url:  # fmt: skip
            yield Served(url, address, base, registry)
    finally:
        store.shutdown()
        store.server_close()


def test_an_alias_that_moves_is_followed(served: Served) -> None:
    assert served.text("first") != served.text("second")
    assert served.text("sums") == served.text("first")
    (one,) = served.versions("sums")
    assert (one["version"], one["aliases"], one["score"]) == (1, ["champion"], 0.5)
    assert served.text("sums@champion") == served.text("sums@1") == served.text("first")
    served.registry.alias("sums", "champion", 2)
    until = time.monotonic() + DEADLINE
    while (now := served.text("sums")) != served.text("second"):
        assert now == served.text("first")
        assert time.monotonic() < until, "the server still answers with the former version"
        time.sleep(FOLLOW)
    assert served.versions("sums")[-1]["version"] == 2
    assert served.text("sums@champion") == served.text("second")


def test_one_is_loaded_over_http_and_again_when_it_was_replaced(served: Served) -> None:
    body = {"name": "remote", "source": f"{served.store}/first"}
    loaded = served.call("POST", "/v1/adapters", json=body)
    assert loaded.status_code < 300, loaded.text
    assert served.text("remote") == served.text("first")
    served.base.save("changing", served.base.adapter("first"))
    moved = {"name": "changing", "source": f"{served.store}/changing"}
    assert served.call("POST", "/v1/adapters", json=moved).status_code < 300
    served.base.save("changing", served.base.adapter("second"))
    assert served.call("POST", "/v1/adapters", json=moved).status_code < 300
    assert served.text("changing") == served.text("second")


@pytest.mark.parametrize(
    ("place", "word"),
    [("nothing", "has no adapter_config.json"), ("../outside", "outside"), ("", "no adapter")],
)
def test_what_the_store_has_not_is_refused(served: Served, place: str, word: str) -> None:
    answer = served.call("POST", "/v1/adapters", json={"name": "bad", "source": f"{served.store}/{place}"})
    assert 400 <= answer.status_code < 500, answer.text
    assert word in answer.json()["error"]["message"]
