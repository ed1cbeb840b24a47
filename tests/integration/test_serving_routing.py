"""Two replicas with room for half of the adapters each: a request goes where its adapter is."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from rayft.serving.build import ROUTING_SECONDS
from rayft.serving.http.schemas import CompletionRequest
from tests.integration.serving import Base, serving

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NAMES = ("one", "two", "three", "four")
MAX_RUNNING = 4


@dataclass(frozen=True)
class Server:
    url: str

    def ask(self, model: str, tokens: int = 4, stream: bool = False) -> None:
        body = {
            "model": model, "prompt": "hello", "max_tokens": tokens, "temperature": 0, "stream": stream,
        }  # fmt: skip
        answer = httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        assert not stream or answer.text.endswith("data: [DONE]\n\n")

    def handle(self) -> Any:
        import ray.serve as ray_serve

        return ray_serve.get_deployment_handle("Replica", "rayft")

    def replicas(self) -> list[dict[str, Any]]:
        return sorted(self.handle().broadcast("stats").results(), key=lambda one: one["pid"])

    def moves(self) -> Counter[str]:
        return sum((Counter(one["moves"]) for one in self.replicas()), Counter())

    def requests(self) -> dict[str, list[int]]:
        """Return the number of each adapter's requests on each replica."""
        found = self.replicas()
        return {
            name: [one["traffic"].get(f"{name}@1", {}).get("requests", 0) for one in found] for name in NAMES
        }

    def settle(self) -> None:
        """Send requests for all adapters until no adapter is loaded or evicted any more."""
        deadline, before = time.monotonic() + 60, None
        while before != self.moves():
            assert time.monotonic() < deadline, f"adapters still move: {before}"
            before = self.moves()
            for name in NAMES:
                self.ask(name)
            # Wait until the replicas have reported what they have.
            time.sleep(2 * ROUTING_SECONDS)


@pytest.fixture(scope="module")
def server(local_ray: None, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    base = Base.read(tiny_folder, tmp_path_factory.mktemp("adapters"))
    made = {name: base.adapter(name) for name in NAMES}
    numbers = sum(factors.a.numel() + factors.b.numel() for factors in made["one"].modules.values())
    with serving(
        base,
        adapters={name: base.save(name, adapter) for name, adapter in made.items()},
        replicas=2,
        max_running=MAX_RUNNING,
        device_bytes=str(2 * numbers * torch.float32.itemsize),
    ) as url:
        yield Server(url)


def test_requests_for_an_adapter_go_where_it_is(server: Server) -> None:
    server.settle()
    moves, requests = server.moves(), server.requests()
    for turn in range(12):
        for name in NAMES:
            server.ask(name if turn % 2 else f"{name}@1", stream=turn % 3 == 0)
    assert server.moves() == moves
    for name, counts in server.requests().items():
        new = [after - before for before, after in zip(requests[name], counts, strict=True)]
        assert sorted(new) == [0, 12], name
    tiers = [one["tiers"] for one in server.replicas()]
    assert [sum(tier == "device" for tier in one.values()) for one in tiers] == [2, 2]


@pytest.mark.parametrize(("model", "version"), [("one", "one@1"), ("base", "base")])
def test_requests_for_a_hot_adapter_and_the_base_go_to_both(server: Server, model: str, version: str) -> None:
    def requests() -> list[int]:
        return [one["traffic"].get(version, {}).get("requests", 0) for one in server.replicas()]

    before = requests()
    request = CompletionRequest(model=model, prompt="hello", max_tokens=200, temperature=0)
    # All at once, which no HTTP client could do: Ray Serve chooses replicas for all before it sends the
    # first.
    ask = server.handle().options(stream=True).generate
    burst = [ask.remote(request, 0.5) for _ in range(4 * MAX_RUNNING)]
    assert [list(answer)[-1].completion_tokens for answer in burst] == [200] * len(burst)
    new = [after - then for then, after in zip(before, requests(), strict=True)]
    assert sum(new) == len(burst)
    assert min(new) >= MAX_RUNNING, new
