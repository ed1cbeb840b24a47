"""Requests beyond the queue are refused at once, and a server that stops first finishes what is running."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from rayft.serving.build import stop
from tests.integration.serving import Base, serving

pytestmark = [pytest.mark.ray, pytest.mark.slow]

RUNNING, QUEUED = 1, 2
TAKEN = 5 * RUNNING
"""Number of requests that a replica holds: the running ones, and four waiting ones for each."""


@pytest.fixture(scope="module")
def base(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Base:
    return Base.read(tiny_folder, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def url(local_ray: None, base: Base) -> Iterator[str]:
    with serving(base, max_running=RUNNING, max_queued=QUEUED) as found:
        yield found


def test_requests_beyond_the_queue_are_refused_at_once_and_the_others_are_answered(url: str) -> None:
    body = {"model": "base", "prompt": "a", "max_tokens": 150, "temperature": 0}

    def ask(_: int) -> httpx.Response:
        return httpx.post(f"{url}/v1/completions", json=body, timeout=120)

    with ThreadPoolExecutor(40) as pool:
        found = list(pool.map(ask, range(40)))
    counts = Counter(answer.status_code for answer in found)
    assert set(counts) == {200, 429}
    assert TAKEN <= counts[200] < 40
    refused = [answer for answer in found if answer.status_code == 429]
    assert all(int(answer.headers["Retry-After"]) > 0 for answer in refused)
    assert refused[0].json()["error"]["code"] == "rate_limit_exceeded"
    slowest = max(answer.elapsed for answer in refused)
    assert slowest < max(answer.elapsed for answer in found if answer.status_code == 200)
    assert ask(0).status_code == 200, "there is room again afterwards"
    assert httpx.get(f"{url}/healthz").status_code == 200


def test_a_burst_that_fills_all_places_of_an_idle_server_is_answered(url: str) -> None:
    body = {"model": "base", "prompt": "a", "max_tokens": 2, "temperature": 0}
    with ThreadPoolExecutor(TAKEN + QUEUED) as pool:
        for _ in range(20):
            burst = [
                pool.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=120)
                for _ in range(TAKEN + QUEUED)
            ]
            assert {one.result().status_code for one in burst} == {200}


def test_a_server_that_stops_first_answers_running_requests(url: str) -> None:
    """Stop the module's server, which is why this is the last test."""
    body = {"model": "base", "prompt": "a", "max_tokens": 400, "temperature": 0}
    began, text = threading.Event(), list[list[str]]()

    def ask() -> None:
        with httpx.stream(
            "POST", f"{url}/v1/completions", json={**body, "stream": True}, timeout=60
        ) as answer:
            events = answer.iter_lines()
            lines = [next(events)]
            began.set()
            lines += list(events)
        text.append(lines)

    client = threading.Thread(target=ask)
    client.start()
    assert began.wait(60)
    stop()
    client.join(60)
    (lines,) = text
    assert [line for line in lines if line][-1] == "data: [DONE]"
    assert any('"finish_reason":"length"' in line.replace(" ", "") or '"stop"' in line for line in lines)
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url}/healthz", timeout=5)
