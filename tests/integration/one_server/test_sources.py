"""Adapters from a registry, whose alias moves, and from a store that is reached by HTTP."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from rayft.tracking.mlflow import MlflowTracker
from tests.integration.one_server.server import FOLLOW_SECONDS, Server

pytestmark = [pytest.mark.ray, pytest.mark.slow]

DEADLINE = 60.0
"""Seconds until a change must be served."""


@pytest.fixture(scope="module")
def server(restored: Server) -> Server:
    """The server with the adapter `sums` of the registry, whose versions 1 and 2 are `small` and `large`."""
    with MlflowTracker(restored.tracker) as tracker:
        run_id = tracker.run("trial", "t0")
    for name in ("small", "large"):
        restored.registry.register("sums", run_id, Path(restored.adapters[name]), {"val_score": "0.5"})
    restored.registry.alias("sums", "champion", 1)
    body = {"name": "sums", "source": "models:/sums@champion"}
    loaded = restored.call("POST", "/v1/adapters", json=body)
    assert loaded.is_success, loaded.text
    return restored


def versions(server: Server, name: str) -> list[dict[str, Any]]:
    listed = server.call("GET", "/v1/adapters").json()["data"]
    return [one for one in listed if one["id"].partition("@")[0] == name]


def test_an_alias_that_moves_is_followed(server: Server) -> None:
    assert server.text("small") != server.text("large")
    assert server.text("sums") == server.text("small")
    (one,) = versions(server, "sums")
    assert (one["version"], one["aliases"], one["score"]) == (1, ["champion"], 0.5)
    assert server.text("sums@champion") == server.text("sums@1") == server.text("small")
    assert server.call("GET", "/v1/models/sums@champion").json()["version"] == 1
    server.registry.alias("sums", "champion", 2)
    until = time.monotonic() + DEADLINE
    while (now := server.text("sums")) != server.text("large"):
        assert now == server.text("small")
        assert time.monotonic() < until, "the server still answers with the former version"
        time.sleep(FOLLOW_SECONDS)
    assert versions(server, "sums")[-1]["version"] == 2
    assert server.text("sums@champion") == server.text("large")


def test_an_adapter_is_loaded_over_http_and_again_after_it_was_replaced(server: Server) -> None:
    body = {"name": "remote", "source": f"{server.store}/small"}
    loaded = server.call("POST", "/v1/adapters", json=body)
    assert loaded.status_code < 300, loaded.text
    assert server.text("remote") == server.text("small")
    server.base.save("changing", server.base.adapter("small", 2))
    moved = {"name": "changing", "source": f"{server.store}/changing"}
    assert server.call("POST", "/v1/adapters", json=moved).status_code < 300
    server.base.save("changing", server.base.adapter("large", 8))
    assert server.call("POST", "/v1/adapters", json=moved).status_code < 300
    assert server.text("changing") == server.text("large")


@pytest.mark.parametrize(
    ("place", "word"),
    [("nothing", "has no adapter_config.json"), ("../outside", "outside"), ("", "no adapter")],
)
def test_an_adapter_that_the_store_lacks_is_refused(server: Server, place: str, word: str) -> None:
    answer = server.call("POST", "/v1/adapters", json={"name": "bad", "source": f"{server.store}/{place}"})
    assert 400 <= answer.status_code < 500, answer.text
    assert word in answer.json()["error"]["message"]
