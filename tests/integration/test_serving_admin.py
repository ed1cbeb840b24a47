"""A real Ray Serve application with two replicas, whose adapters change while it answers."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from rayft.artifacts import AdapterArtifact
from rayft.serving.http.auth import KeyConfig
from tests.integration.serving import Base, serving
from tests.unit.serving.adapters import random_adapter, save_adapters

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ADMIN, USER = "the-key-of-the-admin", "the-key-of-a-user"


@dataclass(frozen=True)
class Server:
    url: str
    root: Path
    shapes: dict[str, tuple[int, int]]
    fingerprint: str

    def call(self, verb: str, path: str, key: str | None = ADMIN, **options: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.request(verb, f"{self.url}{path}", headers=headers, timeout=60, **options)

    def load(self, name: str, source: str | Path, **extra: Any) -> httpx.Response:
        return self.call("POST", "/v1/adapters", json={"name": name, "source": str(source), **extra})

    def ask(self, model: str, key: str | None = ADMIN, prompt: str = "hello") -> httpx.Response:
        body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0}
        return self.call("POST", "/v1/completions", key, json=body)

    def text(self, model: str) -> str:
        answer = self.ask(model)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["choices"][0]["text"])

    def save(self, name: str, folder: str | None = None, **extra: Any) -> Path:
        return random_adapter(name, self.shapes, self.fingerprint, **extra).save(self.root / (folder or name))


@pytest.fixture(scope="module")
def server(local_ray: None, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    base = Base.read(tiny_folder, tmp_path_factory.mktemp("roots"))
    adapters = save_adapters(base.root, base.shapes, base.fingerprint)
    for name, key in (("ADMIN_KEY", ADMIN), ("USER_KEY", USER)):
        os.environ[name] = key
    with serving(
        base,
        adapters={name: adapters[name] for name in ("small", "large")},
        replicas=2,
        keys=(
            KeyConfig(name="ops", role="admin", env="ADMIN_KEY"),
            KeyConfig(name="ann", env="USER_KEY", adapters=("small", "base")),
        ),
        max_adapter_bytes="1MB",
    ) as url:
        yield Server(url, base.root, base.shapes, base.fingerprint)


def test_without_a_key_nothing_is_answered(server: Server) -> None:
    for key in (None, "wrong"):
        for verb, path in (("GET", "/v1/models"), ("GET", "/v1/adapters"), ("DELETE", "/v1/adapters/small")):
            answer = server.call(verb, path, key)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["www-authenticate"] == "Bearer"
        assert server.ask("small", key).status_code == 401
    assert server.call("GET", "/readyz", None).json()["status"] == "ready"
    assert server.call("GET", "/healthz", None).json() == {"status": "ok", "engine": None}
    assert server.call("GET", "/healthz", USER).json()["engine"]["alive"]
    assert server.call("GET", "/", None).headers["content-type"].startswith("text/html")


def test_a_user_neither_sees_nor_changes_the_adapters_of_others(server: Server) -> None:
    assert server.ask("small", USER).status_code == 200
    refused = server.ask("large", USER)
    unknown = server.ask("nobody", USER)
    assert (refused.status_code, unknown.status_code) == (404, 404)
    assert refused.json()["error"]["message"] == unknown.json()["error"]["message"].replace("nobody", "large")
    listed = server.call("GET", "/v1/models", USER).json()["data"]
    assert [model["id"] for model in listed] == ["base", "small"]
    seen = server.call("GET", "/v1/adapters", USER).json()
    assert [one["id"] for one in seen["data"]] == ["small"]
    assert "refused" not in seen
    for path in ("/v1/adapters/large", "/v1/models/large", "/v1/models/large@1", "/v1/models/nobody"):
        assert server.call("GET", path, USER).status_code == 404
    assert server.call("GET", "/v1/models/small@1", USER).json()["id"] == "small"
    body = {"name": "mine", "source": str(server.root / "small")}
    assert server.call("POST", "/v1/adapters", USER, json=body).status_code == 403
    for verb, path in (("DELETE", "large"), ("POST", "large/promote"), ("POST", "large/rollback")):
        assert server.call(verb, f"/v1/adapters/{path}", USER).status_code == 403


def test_an_adapter_is_loaded_and_unloaded_on_all_replicas(server: Server) -> None:
    first = server.load("new", server.save("new"), pinned=True)
    assert first.status_code == 201
    assert (first.json()["version"], first.json()["pinned"]) == (1, True)
    about = server.call("GET", "/v1/adapters/new").json()["versions"][0]
    assert (about["tiers"], about["weight"], about["version"]) == (["device", "device"], 1.0, 1)
    answers = {server.text("new") for _ in range(8)}
    assert len(answers) == 1
    assert server.ask("new").json()["system_fingerprint"] == about["content_hash"]
    assert server.call("GET", "/v1/adapters/new").json()["versions"][0]["traffic"]["requests"] == 9
    assert server.call("DELETE", "/v1/adapters/new").status_code == 200
    assert {server.ask("new").status_code for _ in range(8)} == {404}
    assert server.call("DELETE", "/v1/adapters/new").status_code == 404


def test_a_canary_is_promoted_and_rolled_back(server: Server) -> None:
    old, new = server.save("old", "one"), server.save("newer", "two")
    assert server.load("shared", old).json()["version"] == 1
    before = server.text("shared")
    assert server.load("shared", new, weight=0.3).json()["version"] == 2
    hashes = Counter(server.ask("shared").json()["system_fingerprint"] for _ in range(60))
    assert len(hashes) == 2
    assert 5 <= min(hashes.values()) <= 35
    assert server.text("shared@1") == before != server.text("shared@2")
    for name, version in (("shared", 1), ("shared@2", 2)):
        assert server.call("GET", f"/v1/models/{name}").json()["version"] == version
    shares = [one["weight"] for one in server.call("GET", "/v1/adapters/shared").json()["versions"]]
    assert shares == [0.7, 0.3]
    assert server.load("shared", old, weight=0.5).status_code == 400
    assert server.call("POST", "/v1/adapters/shared/promote").json()["version"] == 2
    assert {server.text("shared") for _ in range(8)} == {server.text("shared@2")}
    assert server.ask("shared@1").status_code == 404
    assert server.call("POST", "/v1/adapters/shared/promote").status_code == 400
    assert server.call("POST", "/v1/adapters/shared/rollback").json()["version"] == 1
    assert {server.text("shared") for _ in range(8)} == {before}
    server.call("DELETE", "/v1/adapters/shared")


def bad_adapters(server: Server, outside: Path) -> dict[str, tuple[Any, str]]:
    """Create adapters that can't be served: what is wrong → (body of the request, part of the reason)."""
    made: dict[str, tuple[Any, str]] = {}

    def folder(what: str, word: str, **change: Any) -> Path:
        path = server.save("small", f"bad-{what}")
        made[what] = ({"name": "bad", "source": str(path), **change}, word)
        return path

    def damage(what: str, word: str, file: str, data: bytes) -> None:
        (folder(what, word) / file).write_bytes(data)

    weights = (server.root / "small" / "adapter_model.safetensors").read_bytes()
    config = json.loads((server.root / "small" / "adapter_config.json").read_text())
    for cut in (0, 4, 8, 100, len(weights) // 2, len(weights) - 1):
        damage(f"cut-{cut}", "bad-cut", "adapter_model.safetensors", weights[:cut])
    damage("noise", "bad-noise", "adapter_model.safetensors", os.urandom(500))
    damage("no-json", "bad-no-json", "adapter_config.json", b"{")
    damage("list", "bad-list", "adapter_config.json", b"[]")
    # Of the same length, so that the rest of the header remains in place.
    other_type = weights.replace(b'"F32"', b'"U16"')
    damage("type", "is of type U16", "adapter_model.safetensors", other_type)
    for key, null_or_part, word in (
        ("lora_alpha", None, "lora_alpha"),
        ("r", None, "r: Input"),
        ("modules_to_save", ["lm_head"], "trains lm_head whole"),
        ("lora_alhpa", 16, "did you mean 'lora_alpha'"),
    ):
        text = json.dumps({**config, key: null_or_part}).encode()
        damage(f"{key}-settings", word, "adapter_config.json", text)
    damage("deep", "nested too deeply", "adapter_config.json", b"[" * 100_000)
    damage("half", "half a surrogate", "adapter_config.json", b'{"peft_type": "LORA", "revision": "\\ud83d"}')
    for key, value in (
        ("r", 0), ("r", "many"), ("r", 10**9), ("lora_alpha", "x"), ("use_dora", True), ("peft_type", "IA3"),
        ("peft_type", "NOPE"), ("target_modules", ["nothing"]), ("r", 7),
    ):  # fmt: skip
        text = json.dumps({**config, key: value}).encode()
        damage(f"{key}-{value if isinstance(value, (int, str)) else 'x'}", "", "adapter_config.json", text)
    (folder("pickle", "pickle") / "adapter_model.safetensors").rename(
        server.root / "bad-pickle" / "adapter_model.bin"
    )
    (folder("gone", "adapter_config") / "adapter_config.json").unlink()
    other = {path: (rows + 1, inner) for path, (rows, inner) in server.shapes.items()}
    for what, shapes, print_ in (
        ("shapes", other, server.fingerprint),
        ("targets", {"model.layers.0.self_attn.w_proj": (4, 4)}, server.fingerprint),
        ("base", server.shapes, "0" * 16),
    ):
        path = random_adapter(what, shapes, print_).save(server.root / f"bad-{what}")
        made[what] = ({"name": "bad", "source": str(path)}, "bad")
    nan = random_adapter("nan", server.shapes, server.fingerprint)
    next(iter(nan.modules.values())).b[0, 0] = torch.nan
    inf = random_adapter("inf", server.shapes, server.fingerprint)
    next(iter(inf.modules.values())).a[0, 0] = torch.inf
    for what, artifact in (("nan", nan), ("inf", inf)):
        raw_folder(artifact, server.root / f"bad-{what}")
        made[what] = ({"name": "bad", "source": str(server.root / f"bad-{what}")}, "NaN")
    whole = random_adapter("head", server.shapes, server.fingerprint)
    meta = whole.meta.model_copy(update={"task": "sequence_classification"})
    head = AdapterArtifact(whole.modules, heads={"score.weight": torch.ones(2, 4)}, meta=meta)
    made["head"] = (
        {"name": "bad", "source": str(head.save(server.root / "bad-head"))},
        "classification head",
    )
    big = random_adapter("big", server.shapes, server.fingerprint, rank=32)
    big.save(server.root / "bad-big")
    with (server.root / "bad-big" / "adapter_model.safetensors").open("ab") as file:
        file.write(b"\0" * 1_000_000)
    made["big"] = ({"name": "bad", "source": str(server.root / "bad-big")}, "more than the 1MB")
    random_adapter("out", server.shapes, server.fingerprint).save(outside)
    (server.root / "bad-link").symlink_to(outside)
    for what, source in (
        ("outside", str(outside)), ("link", str(server.root / "bad-link")), ("dots", f"{server.root}/../x"),
        ("relative", "small"), ("etc", "/etc/passwd"), ("url", "s3://bucket/a"), ("file-url", "file:///etc"),
        ("registry", "models:/a@b"), ("missing", str(server.root / "missing")), ("nul", f"{server.root}/a\0"),
        ("empty", ""), ("long", "/" + "a" * 5000),
    ):  # fmt: skip
        made[what] = ({"name": "bad", "source": source}, "")
    good = str(server.root / "small")
    for what, body in {
        "name-base": {"name": "base", "source": good}, "name-at": {"name": "a@r2", "source": good},
        "name-slash": {"name": "a/b", "source": good}, "no-name": {"source": good},
        "weight-0": {"name": "small", "source": good, "weight": 0},
        "weight-2": {"name": "small", "source": good, "weight": 2},
        "canary-of-nothing": {"name": "nobody", "source": good, "weight": 0.5},
        "duplicate": {"name": "small", "source": good, "weight": 0.5}, "extra": {"name": "a", "path": good},
    }.items():  # fmt: skip
        made[what] = (body, "")
    return made


def raw_folder(artifact: AdapterArtifact, folder: Path) -> None:
    """Write the folder of an adapter that `save` refuses."""
    from safetensors.torch import load_file, save_file

    clean = random_adapter("clean", {n: (f.b.shape[0], f.a.shape[1]) for n, f in artifact.modules.items()})
    clean.save(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, factors in artifact.modules.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = factors.a.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = factors.b.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def test_bad_adapters_are_refused_with_the_reason_and_change_nothing(server: Server, tmp_path: Path) -> None:
    before = server.call("GET", "/v1/adapters").json()
    text = server.text("small")
    cases = bad_adapters(server, tmp_path / "outside")
    assert len(cases) >= 40
    for what, (body, word) in cases.items():
        answer = server.call("POST", "/v1/adapters", json=body)
        assert 400 <= answer.status_code < 500, (what, answer.text)
        message = answer.json()["error"]["message"]
        assert len(message) > 10, what
        assert word in message, (what, message)
    after = server.call("GET", "/v1/adapters").json()
    assert [one["id"] for one in after["data"]] == [one["id"] for one in before["data"]]
    assert after["change"] == before["change"]
    assert server.text("small") == text
    assert server.ask("small@r4").status_code == 404


def test_prometheus_has_the_metrics_of_each_adapter(server: Server) -> None:
    import ray

    for _ in range(3):
        server.text("large")
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = [
        f"ray_rayft_{name}" for name in (
            "requests_total", "prompt_tokens_total", "generated_tokens_total", "first_token_seconds_count",
            "queue_seconds_count", "token_seconds_count", "adapter_loads_total",
        )
    ]  # fmt: skip
    of_it = re.compile(r'adapter="large".*version="[1-9]')
    deadline, missing = time.monotonic() + 60, list(wanted)
    while missing and time.monotonic() < deadline:
        time.sleep(1)
        lines = [line for line in httpx.get(url, timeout=30).text.splitlines() if of_it.search(line)]
        missing = [name for name in wanted if not any(line.startswith(name + "{") for line in lines)]
    assert not missing


class Clients:
    """Threads that send requests without a pause, and check every answer."""

    def __init__(self, server: Server, expected: dict[str, str], still: str) -> None:
        self._server, self._expected, self._still = server, expected, still
        self._stop = threading.Event()
        self.wrong: list[tuple[str, str]] = []
        self.counts = Counter[str]()
        self._threads = [threading.Thread(target=self._ask) for _ in range(4)]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        while not self._stop.is_set():
            for model in ("turning", "large"):
                answer = self._server.ask(model)
                if answer.status_code != 200:
                    self.counts["failed"] += 1
                    continue
                body = answer.json()
                got = body["choices"][0]["text"]
                want = self._expected[body["system_fingerprint"]] if model == "turning" else self._still
                self.counts[model] += 1
                if got != want:
                    self.wrong.append((model, got))

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def kill_a_replica() -> None:
    import ray.serve as ray_serve

    found = ray_serve.get_deployment_handle("Replica", "rayft").broadcast("stats").results()
    assert len(found) == 2
    os.kill(found[0]["pid"], signal.SIGKILL)


def test_no_answer_is_wrong_while_adapters_change_and_a_replica_dies(server: Server) -> None:
    folders = [server.save(name, f"turn-{name}") for name in ("first", "second")]
    expected = {}
    for folder in folders:
        made = server.load("turning", folder).json()
        expected[made["content_hash"]] = server.text("turning")
    clients = Clients(server, expected, server.text("large"))
    loads = []
    for turn in range(6):
        loads.append(server.load("turning", folders[turn % 2]).status_code)
        time.sleep(0.3)
        if turn == 2:
            kill_a_replica()
    clients.end()
    assert not clients.wrong
    assert loads == [201] * 6
    assert min(clients.counts["turning"], clients.counts["large"]) > 5
    # Only requests that the killed replica was answering may have failed.
    assert clients.counts["failed"] <= 8
    deadline, tiers = time.monotonic() + 60, []
    while time.monotonic() < deadline and tiers != ["device", "device"]:
        time.sleep(0.5)
        tiers = server.call("GET", "/v1/adapters/turning").json()["versions"][0]["tiers"]
    # The replica that replaced the killed one has the adapters that were loaded since the start.
    assert tiers == ["device", "device"]
    assert {server.ask("turning").json()["system_fingerprint"] for _ in range(10)} <= set(expected)
    server.call("DELETE", "/v1/adapters/turning")
