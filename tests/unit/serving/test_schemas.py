from __future__ import annotations

import json
from typing import Any

import pytest

from rayft.errors import BadRequestError
from rayft.serving.schemas import NEUTRAL, ChatRequest, CompletionRequest, parse_request

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "m", "prompt": "hi"}


def chat(**extra: Any) -> ChatRequest:
    return parse_request(ChatRequest, json.dumps({**CHAT, **extra}).encode())


def text(**extra: Any) -> CompletionRequest:
    return parse_request(CompletionRequest, json.dumps({**TEXT, **extra}).encode())


@pytest.mark.parametrize(
    ("body", "word"),
    [(b"{", "JSON"), (b"\xff\xfe", "JSON"), (b"[]", "object"), (b"", "JSON"), (b"3", "object")],
)
def test_bodies_that_are_no_json_object_are_refused(body: bytes, word: str) -> None:
    with pytest.raises(BadRequestError, match=word):
        parse_request(ChatRequest, body)


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": "many"}, "max_completion_tokens"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"model": None}, "model"),
        ({"temperature": "0"}, "temperature"),
        ({"max_tokens": "3"}, "max_tokens"),
        ({"max_tokens": 3.0}, "max_tokens"),
        ({"stream": "false"}, "stream"),
        ({"stream": 0}, "stream"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
    ],
)
def test_wrong_and_unsupported_fields_are_refused_by_name(extra: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        chat(**extra)
    assert caught.value.param == param
    assert param in str(caught.value)


@pytest.mark.parametrize("field", ["model", "messages"])
def test_missing_fields_are_named(field: str) -> None:
    body = {key: value for key, value in CHAT.items() if key != field}
    with pytest.raises(BadRequestError, match=f"'{field}' is missing") as caught:
        parse_request(ChatRequest, json.dumps(body).encode())
    assert caught.value.param == field


def test_logprobs_are_a_number_of_texts_and_a_switch_of_chats() -> None:
    assert [text(logprobs=count).scored for count in (None, 0, 5)] == [None, 0, 5]
    assert [chat(logprobs=switch).scored for switch in (None, False, True)] == [None, None, 0]
    assert chat(logprobs=True, top_logprobs=20).scored == 20
    with pytest.raises(BadRequestError, match="logprobs"):
        text(logprobs=6)


@pytest.mark.parametrize("field", sorted(NEUTRAL))
def test_unsupported_fields_may_ask_for_nothing(field: str) -> None:
    for value in (*NEUTRAL[field], None):
        assert chat(**{field: value}) == chat()


def test_fields_that_change_nothing_are_let_through() -> None:
    assert chat(user="me", metadata={"a": "b"}, store=False, service_tier="auto") == chat()


def test_token_limits() -> None:
    assert (chat().limit, chat(max_tokens=3).limit) == (None, 3)
    assert (text().limit, text(max_tokens=5).limit) == (None, 5)
    assert (chat().default_max_tokens, text().default_max_tokens) == (None, 16)
    assert chat(max_tokens=3, max_completion_tokens=4).limit == 4


def test_stop_is_a_string_or_a_list() -> None:
    assert (chat().stops, chat(stop="a").stops, chat(stop=["a", "b"]).stops) == ((), ("a",), ("a", "b"))


def test_messages_become_what_templates_want() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = chat(
        messages=[{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    )
    wanted = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "ab"}]
    assert [message.plain() for message in request.messages] == wanted


def test_a_prompt_is_a_text_or_tokens_or_several() -> None:
    asked = ("a", ["a", "b"], [1, 2], [[1], [2, 3]])
    assert [text(prompt=p).prompts for p in asked] == [["a"], ["a", "b"], [[1, 2]], [[1], [2, 3]]]
    for wrong in ([["a"]], [1, "a"], 3, {"a": 1}):
        with pytest.raises(BadRequestError, match="prompt"):
            text(prompt=wrong)
