"""Metrics of each adapter, which Ray exports to Prometheus."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import Any

from rayft.serving.control.state import Deployed
from rayft.serving.messages import BASE_NAME

__all__ = ["Meter", "Metrics"]

SECONDS = [0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60]
TOKEN_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1]
TAGS: Any = ("adapter", "version")


class Metrics:
    """Counters and histograms, tagged by the adapter's served name and its version."""

    def __init__(self) -> None:
        from ray.serve.metrics import Counter, Gauge, Histogram

        def counter(name: str, what: str) -> Any:
            return Counter(f"rayft_{name}", what, tag_keys=TAGS)

        def histogram(name: str, what: str, bounds: list[float]) -> Any:
            return Histogram(f"rayft_{name}", what, boundaries=bounds, tag_keys=TAGS)

        self.requests = counter("requests_total", "Requests that were accepted.")
        self.errors = counter("errors_total", "Requests that failed after they were accepted.")
        self.prompt_tokens = counter("prompt_tokens_total", "Tokens of prompts.")
        self.tokens = counter("generated_tokens_total", "Tokens that were generated.")
        self.loads = counter("adapter_loads_total", "Times that an adapter was loaded onto the device.")
        self.evictions = counter(
            "adapter_evictions_total", "Times that an adapter was evicted from the device."
        )
        self._lacking: Any = Gauge(
            "rayft_adapter_unavailable", "1 if a replica can't load it, else 0.", tag_keys=TAGS
        )
        self._lacked: set[str] = set()
        self.queue = histogram(
            "queue_seconds", "From the request until its adapter is on the device.", SECONDS
        )
        self.first = histogram("first_token_seconds", "From the request to its first token.", SECONDS)
        self.each = histogram("token_seconds", "Mean time between the tokens of a request.", TOKEN_SECONDS)
        self.traffic: dict[str, dict[str, float]] = {}
        """Version → counts of its requests, tokens and errors since the replica started, for the page."""
        self.moves = {"load": 0, "eviction": 0}
        """How often adapters were loaded onto the device and evicted from it."""

    def on_event(self, deployed: Deployed, what: str) -> None:
        """Count a `load` or an `eviction` of a version."""
        self.moves[what] += 1
        tags = {"adapter": deployed.name, "version": str(deployed.version)}
        (self.loads if what == "load" else self.evictions).inc(tags=tags)

    def lack(self, problems: Mapping[str, str]) -> None:
        """Report which versions can't be served (id → reason), and which can be served again."""
        for one in self._lacked | problems.keys():
            name, _, version = one.partition("@")
            self._lacking.set(float(one in problems), tags={"adapter": name, "version": version})
        self._lacked = set(problems)

    def keep(self, versions: Collection[str]) -> None:
        """Delete the counts of all but these versions and the base, so that replaced ones don't pile up."""
        self.traffic = {key: did for key, did in self.traffic.items() if key in versions or key == BASE_NAME}

    def meter(self, name: str, version: str, prompt_tokens: int, started: float) -> Meter:
        """Start to measure an accepted request that arrived at `started` (monotonic seconds)."""
        return Meter(self, name, version, prompt_tokens, started)


class Meter:
    """Measures one request."""

    def __init__(self, metrics: Metrics, name: str, version: str, prompt_tokens: int, started: float) -> None:
        self._metrics, self._started, self._accepted = metrics, started, time.monotonic()
        self._tags = {"adapter": name, "version": version}
        self._first: float | None = None
        self._tokens: dict[int, int] = {}
        self._traffic = metrics.traffic.setdefault(
            f"{name}@{version}" if version else name, {"requests": 0, "tokens": 0, "errors": 0}
        )
        metrics.requests.inc(tags=self._tags)
        metrics.prompt_tokens.inc(prompt_tokens, tags=self._tags)
        metrics.queue.observe(self._accepted - started, tags=self._tags)
        self._traffic["requests"] += 1

    def progress(self, choice: int, tokens: int, first_token_seconds: float | None) -> None:
        """Record how many tokens a choice has, and how long its first one took, if that is known."""
        if self._first is None and tokens:
            now = time.monotonic()
            self._first = now if first_token_seconds is None else self._accepted + first_token_seconds
            self._metrics.first.observe(self._first - self._started, tags=self._tags)
        self._tokens[choice] = tokens

    def end(self, *, failed: bool) -> None:
        """Record the end of the request."""
        made = sum(self._tokens.values())
        if made:
            self._metrics.tokens.inc(made, tags=self._tags)
        longest = max(self._tokens.values(), default=0)
        if self._first is not None and longest > 1:
            each = (time.monotonic() - self._first) / (longest - 1)
            self._metrics.each.observe(each, tags=self._tags)
        self._traffic["tokens"] += made
        if failed:
            self._metrics.errors.inc(tags=self._tags)
            self._traffic["errors"] += 1
