from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsStreaming as TextParams

from rayft.errors import BadRequestError
from rayft.serving.schemas import HARMLESS, NEUTRAL, ChatRequest, CompletionRequest, parse_request

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "m", "prompt": "hi"}
PART = {"type": "text", "text": "a"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}


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
        ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content"),
        ({"messages": [*CHAT["messages"], {"role": "user", "content": 3}]}, "messages[1].content"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["hi"]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{**PART, "text": 1}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [PART, IMAGE]}]}, "messages[0].content[1].type"),
        ({"messages": [{"role": "user", "content": [{**PART, "txt": "a"}]}]}, "messages[0].content[0].txt"),
        ({"messages": [{"role": "user", "content": "hi", "name": "ann"}]}, "messages[0].name"),
        ({"messages": [{"role": "user", "content": "hi", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        (
            {"messages": [{"role": "user", "content": "hi", "reasoning_content": "so"}]},
            "messages[0].reasoning_content",
        ),
        ({"temperature": -1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": "many"}, "max_completion_tokens"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": 3}, "stop"),
        ({"stop": ["a", 3]}, "stop[1]"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream": True, "stream_options": {"include_usages": True}}, "stream_options.include_usages"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
        ),
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
        ({"top_k": -2}, "top_k"),
        ({"top_k": 5.0}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": "0.1"}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": -1}, "repetition_penalty"),
        ({"repetition_penalty": 1e300}, "repetition_penalty"),
        ({"stop_token_ids": 3}, "stop_token_ids"),
        ({"stop_token_ids": [3, "4"]}, "stop_token_ids[1]"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"stop_token_ids": [True]}, "stop_token_ids[0]"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"guided_json": {"type": "object"}}, "guided_json"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
        ({"verbosity": "low"}, "verbosity"),
        ({"max_token": 5}, "max_token"),
        ({"model": "m" * 5000}, "model"),
    ],
)
def test_wrong_and_unsupported_fields_are_refused_by_name(extra: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        chat(**extra)
    assert caught.value.param == param
    assert param in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("max_token", "max_tokens"),
        ("max_new_tokens", "max_tokens"),
        ("temprature", "temperature"),
        ("topk", "top_k"),
        ("repeat_penalty", "repetition_penalty"),
        ("stop_token_id", "stop_token_ids"),
        ("chat_template_kwarg", "chat_template_kwargs"),
        ("message", "messages"),
    ],
)
def test_an_unknown_field_is_refused_with_the_nearest_name(wrong: str, right: str) -> None:
    with pytest.raises(BadRequestError, match=f"'{wrong}': .* did you mean '{right}'\\?"):
        chat(**{wrong: 1})


def test_a_misspelt_field_is_told_before_the_one_that_is_missing() -> None:
    body = {"model": "m", "mesages": CHAT["messages"]}
    with pytest.raises(BadRequestError, match="did you mean 'messages'"):
        parse_request(ChatRequest, json.dumps(body).encode())


def test_images_are_said_to_be_unsupported() -> None:
    with pytest.raises(BadRequestError, match="images are not supported"):
        chat(messages=[{"role": "user", "content": [IMAGE]}])


def test_fields_of_chats_are_none_of_texts() -> None:
    with pytest.raises(BadRequestError, match="'chat_template_kwargs': there is no such field"):
        text(chat_template_kwargs={"a": 1})


def test_an_answer_can_be_sent_back_as_it_came() -> None:
    answer = {
        "role": "assistant", "content": "3", "refusal": None, "annotations": [], "audio": None,
        "function_call": None, "tool_calls": None, "reasoning_content": "1 + 2",
    }  # fmt: skip
    request = chat(messages=[*CHAT["messages"], answer, {**answer, "reasoning_content": None}])
    assert [message.plain() for message in request.messages[1:]] == [
        {"role": "assistant", "content": "3", "reasoning_content": "1 + 2"},
        {"role": "assistant", "content": "3"},
    ]


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


@pytest.mark.parametrize("value", ["auto", {"a": "b"}, False, 3, None])
def test_fields_that_change_nothing_are_let_through(value: Any) -> None:
    assert chat(**dict.fromkeys(HARMLESS, value)) == chat()


def test_all_fields_of_openais_are_supported_ignored_or_refused() -> None:
    for kind, theirs in ((ChatRequest, ChatParams), (CompletionRequest, TextParams)):
        known = {*kind.model_fields, *HARMLESS, *NEUTRAL}
        assert set(theirs.__annotations__) <= known


def test_the_schema_tells_of_ignored_and_unsupported_fields() -> None:
    schema = ChatRequest.model_json_schema()
    assert not schema["additionalProperties"]
    assert {*HARMLESS, *NEUTRAL, *ChatRequest.model_fields} == set(schema["properties"])
    assert schema["properties"]["tool_choice"]["enum"] == ["none", "auto", None]


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
    for wrong, place in (
        ([["a"]], "prompt[0][0]"),
        ([1, "a"], "prompt[1]"),
        (["a", 1], "prompt[1]"),
        ([[]] * 129, "prompt"),
        ([True], "prompt"),
        ([None], "prompt"),
        (3, "prompt"),
        ({"a": 1}, "prompt"),
    ):
        with pytest.raises(BadRequestError) as caught:
            text(prompt=wrong)
        assert caught.value.param == place
