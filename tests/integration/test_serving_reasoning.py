"""A server whose model reasons before it answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.integration.serving import Base, serving
from tests.unit.data import templates
from tests.unit.test_chat_templates import save_base, train

pytestmark = [pytest.mark.ray, pytest.mark.slow]

THOUGHT = "2+3\n\nis it"
ASKED: dict[str, Any] = {
    "model": "five",
    "messages": [{"role": "user", "content": "question 7?"}],
    "temperature": 0,
    "max_tokens": 40,
}


@pytest.fixture(scope="module")
def url(local_ray: None, process_group: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("reasoning")
    model = save_base(folder / "base", templates.QWEN3)
    _, adapter = train(model, folder, f"<think>\n{THOUGHT}\n</think>\n\nit is 5")
    with serving(Base.read(model, folder), adapters={"five": adapter}) as address:
        yield address


def post(url: str, path: str = "chat/completions", **extra: Any) -> Any:
    answer = httpx.post(f"{url}/v1/{path}", json={**ASKED, **extra})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def test_reasoning_is_not_part_of_the_content(url: str) -> None:
    choice = post(url)
    assert choice["message"]["content"] == "it is 5"
    assert choice["message"]["reasoning_content"] == THOUGHT
    assert choice["finish_reason"] == "stop"


def test_the_answer_of_a_base_that_does_not_reason_has_no_reasoning(url: str) -> None:
    assert post(url, model="base", max_tokens=3)["message"]["reasoning_content"] is None


def test_a_stream_separates_reasoning_and_content(url: str) -> None:
    deltas = []
    with httpx.stream("POST", f"{url}/v1/chat/completions", json={**ASKED, "stream": True}) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                deltas.append(json.loads(line.removeprefix("data: "))["choices"][0]["delta"])
    assert "".join(delta.get("content") or "" for delta in deltas) == "it is 5"
    assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == THOUGHT
    kinds = [key for delta in deltas for key in ("reasoning_content", "content") if delta.get(key)]
    assert kinds == sorted(kinds, reverse=True)
    assert set(kinds) == {"reasoning_content", "content"}


def test_stop_strings_and_log_probabilities_apply_to_the_content(url: str) -> None:
    # The reasoning contains the stop string, and is complete nevertheless.
    choice = post(url, stop=[" is"], logprobs=True)
    assert choice["message"]["content"] == "it"
    assert choice["message"]["reasoning_content"] == THOUGHT
    whole = post(url, logprobs=True)
    assert "".join(one["token"] for one in whole["logprobs"]["content"]) == "it is 5"


def test_a_plain_completion_includes_the_think_block(url: str) -> None:
    prompt = "<|im_start|>user\nquestion 7?<|im_end|>\n<|im_start|>assistant\n"
    body = {"model": "five", "prompt": prompt, "temperature": 0, "max_tokens": 40}
    answer = httpx.post(f"{url}/v1/completions", json=body).json()["choices"][0]
    assert answer["text"] == f"<think>\n{THOUGHT}\n</think>\n\nit is 5"
    assert answer["finish_reason"] == "stop"
