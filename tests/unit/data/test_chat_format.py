from __future__ import annotations

import itertools
import math

import pytest
from tokenizers import AddedToken

from rayft.data.chat_format import Answer, AnswerParser, ChatFormat
from rayft.data.example import Example, Message
from rayft.data.template import IGNORED, encode_all, expected_answer, prompt_ids
from rayft.errors import DataError
from tests.unit.data import templates
from tests.unit.data.templates import chat_tokenizer


def talk(*contents: str, **last: str) -> Example:
    """Return a conversation of alternating turns; `last` has extra keys of the last answer."""
    roles = itertools.cycle(("user", "assistant"))
    turns = [Message(role, content) for role, content in zip(roles, contents, strict=False)]
    turns[-1] = Message("assistant", contents[-1], extras=last)
    return Example(messages=tuple(turns))


def sequences(tokenizer, example: Example) -> list[tuple[str, str]]:
    """Encode an example, and return the text of each `Encoded` and the learnt part of it."""
    return [
        (
            tokenizer.decode(item.input_ids),
            tokenizer.decode([label for label in item.labels if label != IGNORED]),
        )
        for item in encode_all([example], tokenizer, 1000)
    ]


ONE_TURN = {
    "chatml": (templates.CHATML, "5<|im_end|>", "<|im_end|>"),
    "qwen3": (templates.QWEN3, "<think>\n\n</think>\n\n5<|im_end|>", "<|im_end|>"),
    "r1": (templates.R1, "\n</think>\n\n5<|im_end|>", "<|im_end|>"),
    "thinking": (templates.THINKING, "\n</think>\n\n5<|im_end|>", "<|im_end|>"),
    "no_thinking": (templates.NO_THINKING, "5<|im_end|>", "<|im_end|>"),
    "phi3": (templates.PHI3, "5<|end|>", "<|end|>"),
    "llama2": (templates.LLAMA2, " 5 <|endoftext|>", " <|endoftext|>"),
    "harmony": (templates.HARMONY, "<|channel|>final<|message|>5<|return|>", "<|return|>"),
    "text_end": (templates.TEXT_END, " 5 [END]", " [END]"),
}
"""Name → template, the learnt text of the answer 5, and the end of it."""


@pytest.mark.parametrize("name", ONE_TURN)
def test_the_learnt_text_follows_the_prompt_that_a_model_gets(name):
    template, learnt, end = ONE_TURN[name]
    tokenizer, example = chat_tokenizer(template), talk("2+3?", "5")
    [(whole, answer)] = sequences(tokenizer, example)
    prompt = tokenizer.decode(prompt_ids(example, tokenizer))
    assert answer == learnt
    assert whole == prompt + answer
    assert ChatFormat.of(tokenizer).end == end


@pytest.mark.parametrize("name", ONE_TURN)
def test_the_learnt_text_is_parsed_as_the_answer(name):
    template, learnt, end = ONE_TURN[name]
    tokenizer, example = chat_tokenizer(template), talk("2+3?", "5")
    chat_format = ChatFormat.of(tokenizer)
    # As generation gives it: up to the token that ends a turn.
    tokens = tokenizer(learnt, add_special_tokens=False)["input_ids"]
    stops = [place for place, token in enumerate(tokens) if token in chat_format.end_ids]
    written = tokens[: stops[0]] if stops else tokens
    in_block = chat_format.in_block(prompt_ids(example, tokenizer))
    assert chat_format.parse(chat_format.decode(written), in_block=in_block) == Answer("5", "")
    assert expected_answer(example, tokenizer, chat_format)[0].content == "5"
    assert bool(stops) == (name != "text_end")
    assert chat_format.problem == ""
    assert end.strip() in [*tokenizer.convert_ids_to_tokens(sorted(chat_format.end_ids)), "[END]"]


def test_the_tokens_around_an_answer_are_counted():
    assert ChatFormat.of(chat_tokenizer(templates.CHATML)).overhead == 0
    assert ChatFormat.of(chat_tokenizer(templates.QWEN3)).overhead == len(
        ("<think>", *"\n\n", "</think>", *"\n\n")
    )
    assert ChatFormat.of(chat_tokenizer(templates.R1)).overhead == len(("\n", "</think>", *"\n\n"))
    assert ChatFormat.of(chat_tokenizer(templates.HARMONY)).overhead == len(
        ("<|channel|>", *"final", "<|message|>")
    )


def test_a_template_that_does_not_end_answers_is_a_problem():
    chat_format = ChatFormat.of(chat_tokenizer(templates.ENDLESS))
    assert "writes nothing after an answer that could end it" in chat_format.problem
    assert "can't lay out" in ChatFormat.of(chat_tokenizer("{{ raise_exception('never') }}")).problem


def test_without_a_template_the_end_of_sequence_ends_an_answer():
    tokenizer = chat_tokenizer(None)
    chat_format = ChatFormat.of(tokenizer)
    assert chat_format.end == "<|endoftext|>"
    assert chat_format.end_ids == {tokenizer.eos_token_id}
    assert chat_format.problem == ""


def test_reasoning_in_the_data_is_learnt():
    thought = {"reasoning_content": "2 and 3"}
    wanted = "2 and 3\n</think>\n\n5<|im_end|>"
    for template, before in ((templates.QWEN3, "<think>\n"), (templates.R1, ""), (templates.THINKING, "")):
        tokenizer = chat_tokenizer(template)
        [(_, answer)] = sequences(tokenizer, talk("2+3?", "5", **thought))
        assert answer == before + wanted
    for template, before in ((templates.QWEN3, "<think>\n"), (templates.R1, "")):
        # Written into the answer itself, as many data sets have it.
        [(_, answer)] = sequences(chat_tokenizer(template), talk("2+3?", "<think>\n2 and 3\n</think>\n\n5"))
        assert answer == before + wanted
    [(_, answer)] = sequences(chat_tokenizer(templates.HARMONY), talk("2+3?", "5", thinking="2 and 3"))
    assert (
        answer == "<|channel|>analysis<|message|>2 and 3<|end|><|start|>assistant<|channel|>final<|message|>5"
        "<|return|>"
    )


@pytest.mark.parametrize("template", [templates.CHATML, templates.NO_THINKING, templates.PHI3])
def test_reasoning_that_a_template_leaves_out_is_refused(template):
    with pytest.raises(
        DataError, match=r"train example 1.*, message 2: the model's chat template leaves out the reasoning"
    ):
        encode_all([talk("2+3?", "5", reasoning_content="2 and 3")], chat_tokenizer(template), 1000)


def test_an_answer_that_a_template_changes_is_refused():
    tokenizer = chat_tokenizer(templates.CHATML.replace("{{ m.content }}", "{{ m.content | upper }}"))
    with pytest.raises(DataError, match="does not write the answer as the data has it: 'five' became 'FIVE"):
        encode_all([talk("2+3?", "five")], tokenizer, 1000)


def test_earlier_answers_that_a_template_renders_differently_are_encoded_apart():
    found = sequences(chat_tokenizer(templates.QWEN3), talk("a?", "one", "b?", "two"))
    block, ask = "<think>\n\n</think>\n\n", "<|im_start|>assistant\n"
    assert found == [
        (f"<|im_start|>user\na?<|im_end|>\n{ask}{block}one<|im_end|>", f"{block}one<|im_end|>"),
        (
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            ""
            f"<|im_start|>user\na?<|im_end|>\n{ask}one<|im_end|>\n<|im_start|>user\nb?<|im_end|>\n{ask}{block}two<|im_end|>",
            f"{block}two<|im_end|>",
        ),
    ]


def test_all_answers_are_encoded_together_if_the_template_keeps_them():
    for template, learnt in (
        (templates.CHATML, "one<|im_end|>two<|im_end|>"),
        (templates.PHI3, "one<|end|>two<|end|>"),
    ):
        [(_, answers)] = sequences(chat_tokenizer(template), talk("a?", "one", "b?", "two"))
        assert answers == learnt


def test_special_markers_are_kept_and_other_special_tokens_skipped():
    tokenizer = chat_tokenizer(templates.QWEN3, plain=())
    tokenizer.add_tokens(
        [AddedToken(text, special=True, normalized=False) for text in ("<think>", "</think>")]
    )
    chat_format = ChatFormat.of(tokenizer)
    tokens = tokenizer("<think>\nwhy\n</think>\n\nso<|im_end|>")["input_ids"]
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "\nwhy\n\n\nso"
    assert chat_format.decode(tokens) == "<think>\nwhy\n</think>\n\nso"


PARSED = [
    # Written, whether the prompt opened a block, content, reasoning.
    ("5", False, "5", ""),
    ("  5", False, "  5", ""),
    ("", False, "", ""),
    ("<think>\n\n</think>\n\n5", False, "5", ""),
    ("<think>\nwhy\n</think>\n\n5", False, "5", "why"),
    ("\n<think>why</think>5", False, "5", "why"),
    ("<think>\nwhy <b> not\n\n</think>\n\n  x = 5\n", False, "  x = 5\n", "why <b> not"),
    ("<think>\nwhy", False, "", "why"),
    ("<think>\nwhy</thi", False, "", "why</thi"),
    ("<thi", False, "", ""),
    ("<th5", False, "<th5", ""),
    ("a <think>b</think>", False, "a <think>b</think>", ""),
    ("why\n</think>\n\n5", True, "5", "why"),
    ("\n</think>\n\n5", True, "5", ""),
    ("why", True, "", "why"),
    ("<think>\n\n</think>\n\n<think>5", False, "<think>5", ""),
]


@pytest.mark.parametrize(("text", "in_block", "content", "reasoning"), PARSED)
@pytest.mark.parametrize("step", [1, 2, 3, 7, math.inf])
def test_a_streamed_text_is_parsed_as_the_whole_text(text, in_block, content, reasoning, step):
    chat_format = ChatFormat.of(chat_tokenizer(templates.QWEN3))
    assert chat_format.parse(text, in_block=in_block) == Answer(content, reasoning)
    parser, size = AnswerParser(chat_format, in_block=in_block), int(min(step, max(1, len(text))))
    pieces = [text[start : start + size] for start in range(0, len(text), size)] or [""]
    found = [parser.push(piece, last=place == len(pieces) - 1) for place, piece in enumerate(pieces)]
    assert Answer("".join(one.content for one in found), "".join(one.reasoning for one in found)) == (
        content,
        reasoning,
    )


def test_text_is_returned_as_soon_as_it_is_certain():
    parser = AnswerParser(ChatFormat.of(chat_tokenizer(templates.QWEN3)))
    given = [
        parser.push(piece)
        for piece in ("<think>", "\n", "why", " not", "\n", "</think>", "\n\n", "so", " it")
    ]
    assert [one.reasoning for one in given] == ["", "", "why", " not", "", "", "", "", ""]
    assert [one.content for one in given] == ["", "", "", "", "", "", "", "so", " it"]
    assert parser.answering
