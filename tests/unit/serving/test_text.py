from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from rayft.errors import BadRequestError
from rayft.serving.text import TextStream, chat_tokens, prompt_tokens

TEXT = "Grüße, 世界! 🙂 ok"


def decoded(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    return lambda tokens: tokenizer.decode(list(tokens), skip_special_tokens=True)


def stream(tokenizer: Any, text: str, stop: tuple[str, ...] = (), step: int = 1) -> tuple[list[str], bool]:
    """Feed a text's tokens a few at a time; give the pieces and whether a stop string was met."""
    tokens = tokenizer(text)["input_ids"]
    made, pieces = TextStream(decoded(tokenizer), stop), []
    for end in [*range(step, len(tokens), step), len(tokens)]:
        pieces.append(made.push(tokens[:end], last=end == len(tokens)).content)
        if made.stopped:
            break
    return pieces, made.stopped


@pytest.mark.parametrize("step", [1, 2, 5, 100])
def test_pieces_add_up_to_the_text(tiny_tokenizer: Any, step: int) -> None:
    pieces, stopped = stream(tiny_tokenizer, TEXT, step=step)
    assert "".join(pieces) == TEXT
    assert not stopped


def test_half_a_character_is_held_back(tiny_tokenizer: Any) -> None:
    pieces, _ = stream(tiny_tokenizer, TEXT)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert "🙂" in pieces


def test_half_a_character_is_given_at_the_end(tiny_tokenizer: Any) -> None:
    tokens = tiny_tokenizer("a🙂")["input_ids"][:-1]
    assert TextStream(decoded(tiny_tokenizer)).push(tokens, last=True).content == "a\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("step", [1, 3, 100])
@pytest.mark.parametrize(
    ("stop", "left"),
    [(("END",), "go on "), ((" on", "END"), "go"), (("nothing", "o"), "g"), (("go on END of it",), "")],
)
def test_a_stop_string_ends_the_text_and_is_no_part_of_it(
    tiny_tokenizer: Any, stop: tuple[str, ...], left: str, step: int
) -> None:
    pieces, stopped = stream(tiny_tokenizer, "go on END of it", stop, step)
    assert "".join(pieces) == left
    assert stopped


def test_the_beginning_of_a_stop_string_is_given_once_it_is_none(tiny_tokenizer: Any) -> None:
    pieces, stopped = stream(tiny_tokenizer, "an EN route", ("END",))
    assert "".join(pieces) == "an EN route"
    assert not stopped
    assert "E" not in pieces


def test_special_tokens_are_not_text(tiny_tokenizer: Any) -> None:
    assert "".join(stream(tiny_tokenizer, "a<|im_start|>b")[0]) == "ab"


def test_messages_go_through_the_template(tiny_tokenizer: Any) -> None:
    tokens = chat_tokens(tiny_tokenizer, [{"role": "user", "content": "hi"}])
    wanted = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tiny_tokenizer.decode(list(tokens)) == wanted


THINKING = """{% for m in messages %}{{ m.content }}{% endfor %}
{{- '<think>' if enable_thinking else '!' }}
{%- if years %}{% for _ in range(years) %}{{ years + 1 }}{% endfor %}{% endif %}"""


def test_a_template_is_given_variables(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_tokenizer, "chat_template", THINKING)
    messages = [{"role": "user", "content": "hi"}]
    for variables, wanted in (
        (None, "hi!"),
        ({}, "hi!"),
        ({"enable_thinking": False}, "hi!"),
        ({"enable_thinking": True}, "hi<think>"),
        ({"unused": {"a": [1, "b"]}}, "hi!"),
    ):
        assert tiny_tokenizer.decode(list(chat_tokens(tiny_tokenizer, messages, variables))) == wanted


@pytest.mark.parametrize(
    "name",
    ["tokenize", "add_generation_prompt", "messages", "conversation", "conversations", "tools", "documents",
     "chat_template", "continue_final_message", "return_dict", "eos_token", "self", "raise_exception",
     "kwargs", "", "a-b", "1a", "a b"],
)  # fmt: skip
def test_variables_that_are_not_the_templates_own_are_refused(tiny_tokenizer: Any, name: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        chat_tokens(tiny_tokenizer, [{"role": "user", "content": "hi"}], {name: True})
    assert caught.value.param == f"chat_template_kwargs.{name}"


@pytest.mark.parametrize("years", ["many", [1], {"a": 1}, 10**7])
def test_variables_that_a_template_fails_on_are_the_requests_fault(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, years: Any
) -> None:
    monkeypatch.setattr(tiny_tokenizer, "chat_template", THINKING)
    with pytest.raises(BadRequestError, match="refuses these messages and chat_template_kwargs") as caught:
        chat_tokens(tiny_tokenizer, [{"role": "user", "content": "hi"}], {"years": years})
    assert caught.value.param == "chat_template_kwargs"


def test_half_a_character_from_a_template_is_an_error_of_ours(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_tokenizer, "chat_template", r"{{ '\ud83d' }}")
    with pytest.raises(BadRequestError, match="chat template"):
        chat_tokens(tiny_tokenizer, [{"role": "user", "content": "hi"}])


def test_a_template_that_refuses_is_the_requests_fault(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(BadRequestError, match="roles must alternate"):
        chat_tokens(tiny_tokenizer, [{"role": "user", "content": "hi"}])
    monkeypatch.setattr(tiny_tokenizer, "chat_template", None)
    with pytest.raises(BadRequestError, match="/v1/completions"):
        chat_tokens(tiny_tokenizer, [{"role": "user", "content": "hi"}])


def test_prompts_are_text_or_tokens(tiny_tokenizer: Any) -> None:
    assert prompt_tokens(tiny_tokenizer, [5, 6]) == (5, 6)
    assert prompt_tokens(tiny_tokenizer, "ab") == tuple(tiny_tokenizer("ab")["input_ids"])


@pytest.mark.parametrize("prompt", ["", [], [5, -1], [10**9]])
def test_prompts_that_are_empty_or_no_tokens_are_refused(tiny_tokenizer: Any, prompt: Any) -> None:
    with pytest.raises(BadRequestError) as caught:
        prompt_tokens(tiny_tokenizer, prompt)
    assert caught.value.param == "prompt"
