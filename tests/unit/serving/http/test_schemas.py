from __future__ import annotations

import json
from typing import Any

import pytest
from fastapi.testclient import TestClient
from openai.types.chat.completion_create_params import CompletionCreateParamsStreaming as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsStreaming as TextParams
from pydantic import ValidationError

from rayft.errors import BadRequestError
from rayft.serving.http.app import create_app
from rayft.serving.http.schemas import HARMLESS, ChatRequest, CompletionRequest, JsonSchema, TextRequest
from tests.unit.serving.http.recording import RecordingGateway

GATEWAY = RecordingGateway()
CLIENT = TestClient(create_app(GATEWAY))  # type: ignore[arg-type]
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "m", "prompt": "hi"}
PART = {"type": "text", "text": "a"}
SCHEMA: dict[str, Any] = {"name": "a", "schema": {"type": "array"}}
FORM: dict[str, Any] = {"type": "json_schema", "json_schema": SCHEMA}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}


def ask(path: str, body: dict[str, Any]) -> Any:
    """Send a body, and return the request that the gateway received.

    Raises:
        BadRequestError: if the answer is a 400.
    """
    answer = CLIENT.post(f"/v1/{path}", content=json.dumps(body))
    if answer.status_code != 200:
        assert answer.status_code == 400
        error = answer.json()["error"]
        raise BadRequestError(error["message"], param=error["param"])
    return GATEWAY.requests[-1]


def chat(**extra: Any) -> ChatRequest:
    found: ChatRequest = ask("chat/completions", {**CHAT, **extra})
    return found


def text(**extra: Any) -> CompletionRequest:
    found: CompletionRequest = ask("completions", {**TEXT, **extra})
    return found


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
        ({"response_format": "json_object"}, "response_format"),
        ({"response_format": {"type": "grammar"}}, "response_format.type"),
        ({"response_format": {"schema": {}}}, "response_format.schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "text", "json_schema": SCHEMA}}, "response_format.json_schema"),
        ({"response_format": {**FORM, "json_schema": {"schema": {}}}}, "response_format.json_schema.name"),
        ({"response_format": {**FORM, "json_schema": {"name": "a"}}}, "response_format.json_schema.schema"),
        (
            {"response_format": {**FORM, "json_schema": {"name": "a", "schema": [1]}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {**FORM, "json_schema": {"name": "a", "schema": {"title": "x" * 65_536}}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {**FORM, "json_schema": {**SCHEMA, "schema_": {}}}},
            "response_format.json_schema.schema_",
        ),
        ({"echo": True}, "echo"),
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
def test_wrong_and_unsupported_fields_are_refused_with_their_path(extra: dict[str, Any], param: str) -> None:
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


def test_a_misspelt_field_is_reported_before_a_missing_one() -> None:
    body = {"model": "m", "mesages": CHAT["messages"]}
    with pytest.raises(BadRequestError, match="did you mean 'messages'"):
        ask("chat/completions", body)


def test_an_error_says_that_images_are_not_supported() -> None:
    with pytest.raises(BadRequestError, match="images are not supported"):
        chat(messages=[{"role": "user", "content": [IMAGE]}])


def test_a_field_of_chat_completions_is_unknown_in_completions() -> None:
    with pytest.raises(BadRequestError, match="'chat_template_kwargs': there is no such field"):
        text(chat_template_kwargs={"a": 1})


def test_a_message_can_be_sent_back_as_it_was_received() -> None:
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
def test_a_missing_field_is_named(field: str) -> None:
    body = {key: value for key, value in CHAT.items() if key != field}
    with pytest.raises(BadRequestError, match=f"'{field}' is missing") as caught:
        ask("chat/completions", body)
    assert caught.value.param == field


def test_logprobs_is_a_number_in_completions_and_a_boolean_in_chat_completions() -> None:
    assert [text(logprobs=count).scored for count in (None, 0, 5)] == [None, 0, 5]
    assert [chat(logprobs=switch).scored for switch in (None, False, True)] == [None, None, 0]
    assert chat(logprobs=True, top_logprobs=20).scored == 20
    with pytest.raises(BadRequestError, match="logprobs"):
        text(logprobs=6)


@pytest.mark.parametrize("field", sorted(ChatRequest.neutral))
def test_an_unsupported_field_is_accepted_with_its_default(field: str) -> None:
    for value in (*ChatRequest.neutral[field], None):
        assert chat(**{field: value}) == chat()


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_null_is_the_default_of_every_field(kind: type[TextRequest]) -> None:
    send = chat if kind is ChatRequest else text
    for name, field in kind.model_fields.items():
        if not field.is_required():
            assert send(**{name: None}) == send(), name


@pytest.mark.parametrize("value", ["auto", {"a": "b"}, False, 3, None])
def test_ignored_fields_are_accepted_with_any_value(value: Any) -> None:
    assert chat(**dict.fromkeys(HARMLESS, value)) == chat()


def test_every_field_of_openais_client_is_known() -> None:
    for kind, theirs in ((ChatRequest, ChatParams), (CompletionRequest, TextParams)):
        known = {*kind.model_fields, *HARMLESS, *kind.neutral}
        assert set(theirs.__annotations__) <= known


def test_the_schema_lists_ignored_and_unsupported_fields() -> None:
    for kind in (ChatRequest, CompletionRequest):
        schema = kind.model_json_schema()
        assert not schema["additionalProperties"]
        assert {*HARMLESS, *kind.neutral, *kind.model_fields} == set(schema["properties"])
        assert not kind.model_fields.keys() & {*HARMLESS, *kind.neutral}
        assert schema["properties"]["tool_choice"]["enum"] == ["none", "auto", None]
    assert set(JsonSchema.model_json_schema()["properties"]) == {"name", "schema", "description", "strict"}


def test_the_token_limit_has_two_names_in_chat_completions() -> None:
    assert (chat().limit, chat(max_tokens=3).limit) == (None, 3)
    assert (text().limit, text(max_tokens=5).limit) == (None, 5)
    assert (chat().default_max_tokens, text().default_max_tokens) == (None, 16)
    assert chat(max_tokens=3, max_completion_tokens=4).limit == 4


def test_only_a_completion_that_echoes_its_prompt_may_generate_nothing() -> None:
    assert (text(echo=True, max_tokens=0).limit, text(echo=True).limit) == (0, None)
    assert [text(echo=value).echoes for value in (True, False, None)] == [True, False, False]
    assert not chat().echoes
    for body in ({"max_tokens": 0}, {"max_tokens": 0, "echo": False}, {"max_tokens": -1, "echo": True}):
        with pytest.raises(BadRequestError, match=r"max_tokens.* (at least|greater than or equal)") as caught:
            text(**body)
        assert caught.value.param == "max_tokens"


def test_a_response_format_becomes_a_json_schema() -> None:
    for send in (chat, text):
        assert [send(response_format=form).json_schema for form in (None, {"type": "text"})] == [None, None]
        assert send(response_format={"type": "json_object"}).json_schema == '{"type": "object"}'
        assert send(response_format=FORM).json_schema == '{"type": "array"}'
        named = {**SCHEMA, "strict": True, "description": "a list"}
        assert send(response_format={**FORM, "json_schema": named}) == send(response_format=FORM)
    with pytest.raises(BadRequestError, match=r"has 65,5\d\d bytes as JSON; at most 65,536 are accepted"):
        chat(response_format={**FORM, "json_schema": {"name": "a", "schema": {"title": "x" * 65_536}}})


def test_stop_is_a_string_or_a_list_of_strings() -> None:
    assert (chat().stops, chat(stop="a").stops, chat(stop=["a", "b"]).stops) == ((), ("a",), ("a", "b"))


def test_messages_have_the_form_that_chat_templates_expect() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = chat(
        messages=[{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    )
    wanted = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "ab"}]
    assert [message.plain() for message in request.messages] == wanted


def test_a_prompt_is_a_text_or_token_ids_or_a_list_of_either() -> None:
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


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionRequest, {**TEXT, "prompt": [1, *[""] * 1000]}),
        (CompletionRequest, {**TEXT, "prompt": ["a", *[1] * 100]}),
        (CompletionRequest, {**TEXT, "prompt": [[1], *[1] * 100]}),
        (CompletionRequest, {**TEXT, "prompt": [[1], [""] * 1000]}),
        (CompletionRequest, {**TEXT, "stop": [1] * 1000}),
        (CompletionRequest, {**TEXT, "stop_token_ids": [""] * 1000}),
        (ChatRequest, {**CHAT, "messages": [{}] * 1000}),
        (ChatRequest, {**CHAT, "messages": [1] * 1000}),
        (ChatRequest, {**CHAT, "messages": [{"role": "user", "content": [{}] * 1000}]}),
    ],
)
def test_a_list_is_refused_at_its_first_wrong_value(kind: type[TextRequest], body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(body)
    assert caught.value.error_count() <= 2


def test_messages_without_text_count_as_characters() -> None:
    def characters(**message: str) -> int:
        body = {**CHAT, "messages": [{"role": "assistant", "content": "", **message}] * 100}
        return ChatRequest.model_validate(body).characters

    assert characters() >= 1000
    assert characters(reasoning_content="a" * 1000) >= 100_000
