"""Run a server under load for minutes, while adapters are loaded and unloaded and replicas are killed.

    python benchmarks/bench_serve_soak.py [--minutes 10] [--clients 16] [--kills 2]

The server has two replicas of the tiny random Llama in float32 on the CPU. Each client sends greedy requests
to the base or an adapter without a pause. The `system_fingerprint` of an answer names the content that
answered, which must be one that was served under the name; the answer must equal the one that this content
gave before the load started. Meanwhile the adapter of one name is replaced and another is loaded and
unloaded, over HTTP, and replicas are killed with SIGKILL at regular intervals. The server has recovered when
all replicas answer again. Failures before a recovery are counted apart from others. Memory is the resident
set of each replica.

The exit code is 1 if an answer was wrong, or if a request failed and no kill explains it.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.records import record, save
from rayft.artifacts import AdapterArtifact, ArtifactMeta
from rayft.methods.base import LoraFactors
from rayft.models.load import ModelConfig, load_model
from rayft.models.targets import linear_shapes
from rayft.models.tiny import save_tiny_llama
from rayft.numerics import generator
from rayft.serving.build import APPLICATION, run
from rayft.serving.config import ServeConfig

REPLICAS = 2
RANKS = {"still-2": 2, "still-8": 8, "turning-a": 4, "turning-b": 12, "passing": 3}
STILL, TURNING, PASSING = ("still-2", "still-8"), ("turning-a", "turning-b"), "passing"
PROMPTS = ("hello", "the capital of France is", "one two three " * 8)
TOKENS = 16
SAMPLE_SECONDS = 2.0
Key = tuple[str | None, str]
"""Fingerprint of an answer, and the prompt."""


def adapters(folder: Path, model: Path) -> dict[str, str]:
    """Save random adapters that are large enough to change the generated text, and return name → folder."""
    base = load_model(ModelConfig(name=str(model)), torch.float32)
    meta = ArtifactMeta(base_model="tiny", base_fingerprint=base.fingerprint)
    made = {}
    for name, rank in RANKS.items():
        modules = {}
        for path, (outputs, inputs) in linear_shapes(base.model).items():
            draw = generator(name, path)
            a = torch.randn(rank, inputs, generator=draw) / inputs**0.5
            modules[path] = LoraFactors(a, 0.5 * torch.randn(outputs, rank, generator=draw), 0.8)
        made[name] = str(AdapterArtifact(modules, meta=meta).save(folder / name))
    return made


@dataclass
class Soak:
    """The requests and their outcomes, shared by the threads of the clients."""

    url: str
    folders: dict[str, str]
    right: dict[Key, str] = field(default_factory=dict)
    contents: dict[str | None, str] = field(default_factory=dict)
    """Fingerprint → content."""
    latencies: list[float] = field(default_factory=list)
    """Seconds of each answered request."""
    failures: Counter[tuple[str, bool]] = field(default_factory=Counter)
    """(Kind of failure, whether a replica was down) → number of requests."""
    wrong: list[Any] = field(default_factory=list)
    other: list[Any] = field(default_factory=list)
    """Number of answers by content that was never served under the name."""
    changes: Counter[str] = field(default_factory=Counter)
    memory: list[tuple[float, int, int]] = field(default_factory=list)
    """Memory as (seconds since the start, process, bytes)."""
    recoveries: list[float] = field(default_factory=list)
    down: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def learn(self) -> None:
        """Record the answers of all contents without load. Each is requested twice and must be the same."""
        with httpx.Client(base_url=self.url, timeout=60) as client:
            for name in ("base", *RANKS):
                if name != "base":
                    self.load(client, name, name)
                for prompt in PROMPTS * 2:
                    body = self.post(client, name, prompt).raise_for_status().json()
                    key, text = (body["system_fingerprint"], prompt), body["choices"][0]["text"]
                    self.contents[key[0]] = name
                    if self.right.setdefault(key, text) != text:
                        raise SystemExit(f"{name} answers differently without load")
            for name in (*TURNING, PASSING):
                client.delete(f"/v1/adapters/{name}").raise_for_status()
            self.load(client, "turning", TURNING[0])

    def load(self, client: httpx.Client, name: str, content: str) -> httpx.Response:
        """Load a content under a name."""
        return client.post("/v1/adapters", json={"name": name, "source": self.folders[content]})

    def post(self, client: httpx.Client, model: str, prompt: str) -> httpx.Response:
        """Send a request, and return the answer."""
        body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
        return client.post("/v1/completions", json=body)

    def ask(self, seed: int) -> None:
        """Send requests until the end, and compare the answers."""
        draw = random.Random(seed)
        with httpx.Client(base_url=self.url, timeout=60) as client:
            while not self.ended.is_set():
                model = draw.choice(("base", *STILL, "turning", PASSING))
                prompt, down, started = draw.choice(PROMPTS), self.down.is_set(), time.monotonic()
                try:
                    answer = self.post(client, model, prompt)
                except httpx.TransportError as error:
                    self.failed(type(error).__name__, down)
                    continue
                seconds = time.monotonic() - started
                if answer.status_code == 404 and model == PASSING:
                    continue
                if answer.status_code != 200:
                    self.failed(str(answer.status_code), down)
                    continue
                body = answer.json()
                with self.lock:
                    self.latencies.append(seconds)
                text = body["choices"][0]["text"]
                held = TURNING if model == "turning" else (model,)
                if self.contents.get(body["system_fingerprint"]) not in held:
                    self.other.append((model, prompt, body))
                if self.right.get((body["system_fingerprint"], prompt)) != text:
                    self.wrong.append((model, prompt, body))

    def failed(self, kind: str, down: bool) -> None:
        """Count a failed request."""
        with self.lock:
            self.failures[kind, down or self.down.is_set()] += 1

    def change(self) -> None:
        """Replace one adapter, and load and unload another, until the end."""
        turn = 0
        with httpx.Client(base_url=self.url, timeout=120) as client:
            while not self.ended.is_set():
                turn += 1
                down = self.down.is_set()
                calls: tuple[Callable[[], httpx.Response], ...] = (
                    partial(self.load, client, PASSING, PASSING),
                    partial(self.load, client, "turning", TURNING[turn % 2]),
                    partial(client.delete, f"/v1/adapters/{PASSING}"),
                )
                for call in calls:
                    try:
                        answer = call()
                    except httpx.TransportError as error:
                        self.failed(f"change: {type(error).__name__}", down)
                        continue
                    self.changes["made" if answer.is_success else "refused"] += 1
                    if not answer.is_success:
                        self.failed(f"change: {answer.status_code}", down)
                self.ended.wait(0.2)


def replica_pids() -> set[int]:
    """Return the processes of all replicas that answer."""
    import ray.serve as ray_serve

    handle: Any = ray_serve.get_deployment_handle("Replica", APPLICATION)
    try:
        found = handle.broadcast("stats").results(timeout_s=5, return_exceptions=True)
    except TimeoutError:
        return set()
    return {one["pid"] for one in found if isinstance(one, dict)}


def resident(pids: set[int]) -> dict[int, int]:
    """Return the resident set of each living process in bytes."""
    found = {}
    for pid in pids:
        try:
            found[pid] = psutil.Process(pid).memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return found


def watch(soak: Soak, minutes: float, kills: int) -> None:
    """Measure memory, kill replicas at regular intervals, and time the recoveries."""
    started, pids, killed, victim = time.monotonic(), replica_pids(), 0.0, 0
    ends = started + minutes * 60
    due = [started + minutes * 60 * (i + 1) / (kills + 1) for i in range(kills)]
    while (now := time.monotonic()) < ends or soak.down.is_set():
        soak.memory += [(now - started, pid, size) for pid, size in resident(pids).items()]
        if due and now >= due[0]:
            due.pop(0)
            victim, killed = min(pids), now
            soak.down.set()
            os.kill(victim, signal.SIGKILL)
            pids -= {victim}
            print(f"{now - started:.0f} s: replica {victim} killed", flush=True)
        elif soak.down.is_set() and len(found := replica_pids()) == REPLICAS and victim not in found:
            pids = found
            soak.recoveries.append(time.monotonic() - killed)
            soak.down.clear()
            print(f"back after {soak.recoveries[-1]:.1f} s", flush=True)
        time.sleep(0.2 if soak.down.is_set() else SAMPLE_SECONDS)


def results(soak: Soak, minutes: float, clients: int) -> list[dict[str, Any]]:
    """Return the results of a run."""
    rows = []

    def add(metric: str, value: float, unit: str, **more: Any) -> None:
        rows.append(record("serve_soak", "mixed", metric, value, unit, **more))
        print(f"{metric}: {value:.4g} {unit}", flush=True)

    add("minutes", minutes, "min")
    add("replicas", REPLICAS, "count")
    add("clients", clients, "count")
    add("requests", len(soak.latencies) + sum(soak.failures.values()), "count")
    add("wrong_answers", len(soak.wrong), "count")
    add("wrong_adapter", len(soak.other), "count")
    add("failed", sum(soak.failures.values()), "count")
    for change in ("made", "refused"):
        add(f"changes_{change}", soak.changes[change], "count")
    for down in (False, True):
        found = {kind: count for (kind, while_down), count in soak.failures.items() if while_down is down}
        place = "during_kills" if down else "otherwise"
        add(f"failed_{place}", sum(found.values()), "count")
        for kind, count in sorted(found.items()):
            add(f"failed_{place}/{kind}", count, "count")
    for percent in (50, 95, 99):
        add(f"latency_p{percent}", float(np.percentile(soak.latencies, percent)), "s", n=len(soak.latencies))
    for index, seconds in enumerate(soak.recoveries):
        add(f"recovery/{index}", seconds, "s")
    growth = [0.0]
    for index, pid in enumerate(dict.fromkeys(pid for _, pid, _ in soak.memory)):
        mine = [(at, size) for at, one, size in soak.memory if one == pid]
        growth.append((mine[-1][1] - mine[0][1]) / 1e6)
        for when, (at, size) in (("start", mine[0]), ("middle", mine[len(mine) // 2]), ("end", mine[-1])):
            add(f"resident/replica_{index}/{when}", size / 2**20, "MiB")
            add(f"resident/replica_{index}/{when}_at", at, "s")
    add("memory_growth_mb", max(growth), "MB")
    return rows


def main() -> None:
    """Run the server, the load and the kills, and save the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--kills", type=int, default=2)
    arguments = parser.parse_args()
    import ray
    import ray.serve as ray_serve

    with tempfile.TemporaryDirectory() as scratch:
        model = save_tiny_llama(Path(scratch) / "model")
        folders = adapters(Path(scratch) / "adapters", model)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        # Replicas and clients share the cores, so Ray gets more logical CPUs than there are cores.
        ray.init(num_cpus=2 * REPLICAS, include_dashboard=False, log_to_driver=False)
        run(
            ServeConfig(
                model=ModelConfig(name=str(model)), port=port, dtype="float32", replicas=REPLICAS,
                roots=(str(Path(scratch) / "adapters"),),
            ),
            blocking=False,
        )  # fmt: skip
        soak = Soak(f"http://127.0.0.1:{port}", folders)
        soak.learn()
        threads = [threading.Thread(target=soak.ask, args=(seed,)) for seed in range(arguments.clients)]
        threads.append(threading.Thread(target=soak.change))
        for thread in threads:
            thread.start()
        try:
            watch(soak, arguments.minutes, arguments.kills)
        finally:
            soak.ended.set()
            for thread in threads:
                thread.join()
        save("serve_soak", results(soak, arguments.minutes, arguments.clients), anew=True)
        ray_serve.shutdown()
        ray.shutdown()
    unexplained = sum(count for (_, down), count in soak.failures.items() if not down)
    if soak.wrong or soak.other or unexplained:
        raise SystemExit(
            f"{len(soak.wrong)} wrong answers, {len(soak.other)} of another adapter, {unexplained} failures "
            "without a kill"
        )


if __name__ == "__main__":
    main()
