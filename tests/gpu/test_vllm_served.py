"""vLLM behind HTTP on a GPU: through rayft's server, whose engine is killed, and through vLLM's own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

from rayft.models.load import ModelConfig
from rayft.models.tiny import byte_tokenizer
from rayft.serving.build import run
from rayft.serving.config import ServeConfig
from tests.gpu.naming import naming_adapter, new_model

pytest.importorskip("vllm")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM runs on GPUs"),
]

LETTERS = {"first": "d", "second": "x", "third": "n"}
"""What each adapter answers."""
RANKS = {"first": 4, "second": 64, "third": 200}
START_SECONDS = 240
BOUND_SECONDS = 15
METRICS_SECONDS = 60


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place, head, tokenizer = tmp_path_factory.mktemp("adapters"), new_model().lm_head.weight, byte_tokenizer()
    made = {}
    for name, letter in LETTERS.items():
        (token,) = tokenizer.encode(letter, add_special_tokens=False)
        made[name] = str(naming_adapter(head, token, RANKS[name]).save(place / name))
    return made


def post(url: str, model: str, **more: Any) -> httpx.Response:
    body = {"model": model, "prompt": [5, 6, 7, 8], "max_tokens": 8, "temperature": 0, **more}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60)


def text(url: str, model: str) -> str:
    answer = post(url, model)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def assert_right(url: str, base: str) -> None:
    """Check that each adapter answers only its letter, and the base something else."""
    for name, letter in LETTERS.items():
        assert text(url, name) == letter * 8
    assert text(url, base) not in {letter * 8 for letter in LETTERS.values()}


def until_up(url: str, path: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            if httpx.get(f"{url}{path}", timeout=10).status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.5)


@pytest.fixture(scope="module")
def server(
    folder: Path, adapters: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    import ray
    import ray.serve as ray_serve

    ray.init(namespace="rayft", include_dashboard=False, log_to_driver=False)
    port = free_port()
    run(
        ServeConfig(
            model=ModelConfig(name=str(folder)), engine="vllm", adapters=dict(adapters), port=port,
            gpu_memory=0.25, device_bytes="200MB", max_running=8,
            fetched=str(tmp_path_factory.mktemp("fetched")),
        ),
        blocking=False,
    )  # fmt: skip
    yield f"http://127.0.0.1:{port}"
    ray_serve.shutdown()
    ray.shutdown()


def test_each_adapter_answers_under_its_name(server: str) -> None:
    assert_right(server, "base")


def test_an_answer_over_http_follows_a_json_schema(server: str) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "one", "schema": schema}}
    answer = post(server, "base", max_tokens=60, response_format=wanted)
    assert json.loads(answer.json()["choices"][0]["text"]) == {"a": "x"}
    # xgrammar has no form for it.
    wanted["json_schema"]["schema"] = {"type": "no such type"}
    for stream in (False, True):
        refused = post(server, "base", response_format=wanted, stream=stream)
        assert refused.status_code == 400, refused.text
        assert refused.json()["error"]["type"] == "invalid_request_error"


def test_the_metrics_of_vllm_are_exported_beside_those_of_rayft(server: str) -> None:
    import ray

    (node,) = ray.nodes()
    page = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = {"ray_rayft_requests_total", "vllm_generation_tokens"}
    deadline = time.monotonic() + METRICS_SECONDS
    while True:
        assert text(server, "first") == LETTERS["first"] * 8
        lines = [line for line in httpx.get(page).text.splitlines() if not line.startswith("#")]
        # Ray's own prefix may be before vLLM's.
        there = {name for name in wanted for line in lines if name in line and not line.endswith(" 0.0")}
        if there == wanted:
            break
        assert time.monotonic() < deadline, f"{wanted - there} of {len(lines)} lines"
        time.sleep(1)
    assert not [line for line in lines if "lora_requests_info" in line]


def test_a_killed_engine_is_replaced_and_answers_the_same(server: str) -> None:
    (core,) = [one for one in psutil.Process().children(recursive=True) if "EngineCore" in titled(one)]
    with httpx.stream(
        "POST", f"{server}/v1/completions", timeout=60,
        json={"model": "first", "prompt": [5], "max_tokens": 1000, "stream": True},
    ) as answer:  # fmt: skip
        lines = answer.iter_lines()
        next(lines)
        os.kill(core.pid, signal.SIGKILL)
        rest = [line for line in lines if line]
    assert '"error"' in rest[-1], "the client is told"
    started = time.monotonic()
    refused = post(server, "first")
    assert refused.status_code == 503, refused.text
    assert time.monotonic() - started < BOUND_SECONDS
    until_up(server, "/readyz")
    assert_right(server, "base")


def titled(process: psutil.Process) -> str:
    try:
        return " ".join([process.name(), *process.cmdline()])
    except psutil.Error:
        return ""


def test_plain_vllm_serves_the_adapters_from_their_folders(folder: Path, adapters: Mapping[str, str]) -> None:
    port = free_port()
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(folder), "--port", str(port), "--served-model-name", "base",
        "--gpu-memory-utilization", "0.25", "--max-num-seqs", "8",
        "--enable-lora", "--max-loras", "8", "--max-lora-rank", "256",
        "--additional-config", '{"rayft": {"adapter_bytes": 200000000}}',
        "--lora-modules", *(f"{name}={path}" for name, path in adapters.items()),
    ]  # fmt: skip
    process = subprocess.Popen(command)
    try:
        until_up(f"http://127.0.0.1:{port}", "/v1/models")
        assert_right(f"http://127.0.0.1:{port}", "base")
    finally:
        process.terminate()
        process.wait(60)
