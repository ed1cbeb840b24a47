from __future__ import annotations

import copy

import pytest

from rayft.data.example import Example, Message
from rayft.data.template import IGNORED, INSTRUCTION, Encoded, encode_all, prompt_ids, prompt_text
from rayft.errors import DataError


def talk(*contents: str, system: str | None = None) -> Example:
    roles = ("user", "assistant") * len(contents)
    turns = tuple(Message(role, content) for role, content in zip(roles, contents, strict=False))
    return Example(messages=((Message("system", system),) if system else ()) + turns)


def encode(example: Example, tokenizer, max_length: int) -> Encoded:
    [encoded] = encode_all([example], tokenizer, max_length)
    return encoded


def learnt(encoded: Encoded, tokenizer) -> str:
    return tokenizer.decode([label for label in encoded.labels if label != IGNORED])


def test_the_loss_is_on_the_answer_and_its_end_only(tokenizer):
    encoded = encode(talk("2+2?", "four"), tokenizer, 200)
    assert learnt(encoded, tokenizer) == "four<|im_end|>"
    assert all(
        label in (IGNORED, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True)
    )
    assert tokenizer.decode(encoded.input_ids) == (
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\nfour<|im_end|>"
    )


def test_every_answer_of_a_conversation_is_learnt(tokenizer):
    encoded = encode(talk("a?", "one", "b?", "two", system="be brief"), tokenizer, 200)
    assert learnt(encoded, tokenizer) == "one<|im_end|>two<|im_end|>"
    assert "b?" in tokenizer.decode(encoded.input_ids)


def test_a_prompt_is_the_text_before_the_answer(tokenizer, plain_tokenizer):
    example = talk("a?", "one", "b?", "two")
    for each in (tokenizer, plain_tokenizer):
        encoded, prompt = encode(example, each, 200), prompt_ids(example, each)
        assert encoded.input_ids[: len(prompt)] == prompt
        assert all(label != IGNORED for label in encoded.labels[len(prompt) :])


def test_without_a_chat_template_turns_are_joined(plain_tokenizer):
    encoded = encode(talk("2+2?", "four"), plain_tokenizer, 200)
    assert plain_tokenizer.decode(encoded.input_ids) == "<s>2+2?\nfour<|im_end|>"
    assert learnt(encoded, plain_tokenizer) == "four<|im_end|>"
    glued = Example(messages=talk("def f(", "x): ...").messages, separator="")
    assert (
        plain_tokenizer.decode(encode(glued, plain_tokenizer, 200).input_ids) == "<s>def f(x): ...<|im_end|>"
    )


def test_raw_text_is_learnt_but_for_its_first_token(tokenizer, plain_tokenizer):
    assert learnt(encode(Example(text="abc"), tokenizer, 200), tokenizer) == "bc<|im_end|>"
    assert learnt(encode(Example(text="abc"), plain_tokenizer, 200), plain_tokenizer) == "abc<|im_end|>"


def test_raw_text_without_tokens_is_an_error(tokenizer):
    class Dropping:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, text, **options):
            return tokenizer(text.replace("\u200b", ""), **options)

    with pytest.raises(DataError, match=r"train example 1.*: the tokenizer has no token for '\\u200b', so"):
        encode_all([Example(text="\u200b")], Dropping(), 100)


def test_a_classification_learns_no_token(tokenizer):
    encoded = encode(Example(text="good film", label=1, label_name="yes"), tokenizer, 200)
    assert encoded.label == 1
    assert set(encoded.labels) == {IGNORED}
    assert tokenizer.decode(encoded.input_ids) == "good film"
    assert prompt_ids(Example(text="good film", label=1), tokenizer) == encoded.input_ids


def test_each_style_changes_the_prompt_as_documented(tokenizer):
    example, shot = talk("2+2?", "four", system="be brief"), talk("1+1?", "two", system="be long")
    assert prompt_text(example, tokenizer) == (
        "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert f"2+2?\n{INSTRUCTION}<|im_end|>" in prompt_text(example, tokenizer, "answer_only")
    few = prompt_text(example, tokenizer, "few_shot", [shot])
    order = [few.index(text) for text in ("be brief", "1+1?", "two", "2+2?")]
    assert order == sorted(order)
    assert "be long" not in few
    assert "four" not in few
    with pytest.raises(DataError, match="few_shot needs solved examples"):
        prompt_text(example, tokenizer, "few_shot")
    with pytest.raises(DataError, match="asks no question"):
        prompt_text(Example(text="abc"), tokenizer)


def test_tokens_that_merge_over_the_border_still_start_from_the_prompt(tokenizer):
    class Merging:
        """Joins a line break and the letter after it, as a BPE may."""

        chat_template, eos_token_id = tokenizer.chat_template, tokenizer.eos_token_id
        apply_chat_template = tokenizer.apply_chat_template

        def __call__(self, text, **options):
            ids = tokenizer(text, **options)["input_ids"]
            return {
                "input_ids": tokenizer(text.replace("assistant\nf", "assistantF"), **options)["input_ids"]
                if "assistant\nf" in text
                else ids
            }

    example = talk("2+2?", "four")
    encoded, prompt = encode(example, Merging(), 200), prompt_ids(example, Merging())
    assert encoded.input_ids[: len(prompt)] == prompt
    assert learnt(encoded, tokenizer) == "four<|im_end|>"


def test_an_example_that_is_too_long_is_an_error_that_names_it(tokenizer):
    with pytest.raises(
        DataError, match=r"train example 1.*, has \d+ tokens, above data.max_length = 20: set it to"
    ):
        encode(talk("2+2?", "four"), tokenizer, 20)
    examples = [talk("a", "b"), talk("a" * 100, "b"), talk("a" * 200, "b")]
    with pytest.raises(
        DataError, match=r"2 of 3 examples are too long; the longest, val example 3.*, has 2\d\d tok"
    ):
        encode_all(examples, tokenizer, 100, part="val")
    with pytest.raises(DataError, match="above the model's context of 150"):
        encode_all(examples, tokenizer, 1000, context=150)
    exact = len(encode(talk("a", "b"), tokenizer, 1000))
    assert encode(talk("a", "b"), tokenizer, exact)
    with pytest.raises(DataError, match="max_length"):
        encode(talk("a", "b"), tokenizer, exact - 1)


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    rewriting = copy.deepcopy(tokenizer)
    rewriting.chat_template = (
        "{{ messages | length }}{% for m in messages %}"
        "{{ m['role'] + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}"
    )
    with pytest.raises(
        DataError, match=r"train example 1.*, message 2: the chat template changes what stands before"
    ):
        encode_all([talk("2+2?", "four")], rewriting, 200)


def test_a_template_that_refuses_a_role_is_reported(tokenizer):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = "{{ raise_exception('no system role here') }}"
    with pytest.raises(DataError, match="can't lay out the turns system, user: no system role here"):
        encode(talk("2+2?", "four", system="x"), strict, 200)


ANSWERING = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\n{{ m.content }}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Ignores all roles but two, as the first template of Phi-3 did."""
FIRST_SYSTEM = "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}" + ANSWERING
"""Reads a system message at the start only."""


@pytest.mark.parametrize(
    ("template", "roles", "left_out"),
    [
        (ANSWERING, ("system", "user", "assistant"), "message 1: .* message from 'system'"),
        (ANSWERING, ("user", "assistant", "tool", "assistant"), "message 3: .* message from 'tool'"),
        (FIRST_SYSTEM, ("user", "system", "user", "assistant"), "message 2: .* message from 'system'"),
        (FIRST_SYSTEM, ("system", "user", "assistant", "user", "assistant"), None),
        (
            ANSWERING.replace("user\n{{ m.content }}", "user\n{{ m.content | upper }}"),
            ("user", "assistant"),
            None,
        ),
    ],
)
def test_a_template_that_leaves_out_a_message_of_the_prompt_is_refused(tokenizer, template, roles, left_out):
    leaving = copy.deepcopy(tokenizer)
    leaving.chat_template = template
    read = Example(messages=(Message("user", "first"), Message("assistant", "one")))
    example = Example(messages=tuple(Message(role, f"text {n}") for n, role in enumerate(roles)))
    if left_out is None:
        assert encode_all([read, example], leaving, 500)
        return
    with pytest.raises(DataError, match=rf"train example 2.*, {left_out}, so the model would not read it"):
        encode_all([read, example], leaving, 500)


def test_a_tokenizer_without_an_end_token_is_an_error(plain_tokenizer):
    endless = copy.deepcopy(plain_tokenizer)
    endless.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        encode(Example(text="abc"), endless, 200)
