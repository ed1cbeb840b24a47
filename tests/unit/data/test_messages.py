"""The keys of messages: each has an effect, or is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rayft.data import template
from rayft.data.example import Example
from rayft.data.section import DataConfig
from rayft.data.source import read
from rayft.data.template import IGNORED, encode_all
from rayft.errors import DataError
from tests.unit.data import templates
from tests.unit.data.templates import chat_tokenizer

USER = {"role": "user", "content": "capital of France?"}
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


def rows(tmp_path: Path, *given: dict[str, Any]) -> list[Example]:
    """Read rows as the train part; val and test are two other rows."""
    other = [{"messages": [USER, {"role": "assistant", "content": name}]} for name in ("val", "test")]
    paths = {}
    for name, lines in (("train", given), ("val", other[:1]), ("test", other[1:])):
        paths[name] = str(tmp_path / f"{name}.jsonl")
        Path(paths[name]).write_text("".join(json.dumps(line) + "\n" for line in lines))
        USER["content"] += "?"
    return list(read(DataConfig(source="jsonl", files=paths)).train)


def talk(*answers: dict[str, Any], **columns: Any) -> dict[str, Any]:
    """Return a row in which a question of the user precedes each answer."""
    turns = []
    for number, answer in enumerate(answers):
        turns += [{"role": "user", "content": f"question {number}?"}, {"role": "assistant", **answer}]
    return {"messages": turns, **columns}


def learnt(example: Example, template: str = templates.CHATML) -> str:
    tokenizer = chat_tokenizer(template)
    [encoded] = encode_all([example], tokenizer, 1000)
    return tokenizer.decode([label for label in encoded.labels if label != IGNORED])


@pytest.mark.parametrize(
    "mask", [{"weight": 0}, {"train": False}, {"loss_mask": 0}, {"weight": 0.0, "train": False}]
)
def test_a_masked_answer_is_read_and_not_learnt(tmp_path: Path, mask: dict[str, Any]) -> None:
    [example] = rows(tmp_path, talk({"content": "WRONG-LYON", **mask}, {"content": "Paris"}))
    assert learnt(example) == "Paris<|im_end|>"
    tokenizer = chat_tokenizer(templates.CHATML)
    assert "WRONG-LYON" in tokenizer.decode(encode_all([example], tokenizer, 1000)[0].input_ids)


def test_the_last_answer_may_be_masked(tmp_path: Path) -> None:
    [example] = rows(tmp_path, talk({"content": "Paris"}, {"content": "WRONG-LYON", "weight": 0}))
    assert learnt(example) == "Paris<|im_end|>"


@pytest.mark.parametrize("mask", [{"weight": 1}, {"train": True}, {"loss_mask": 1}, {"weight": None}])
def test_an_unmasked_answer_is_learnt(tmp_path: Path, mask: dict[str, Any]) -> None:
    [example] = rows(tmp_path, talk({"content": "Lyon", **mask}, {"content": "Paris"}))
    assert learnt(example) == "Lyon<|im_end|>Paris<|im_end|>"


def test_data_with_other_masks_has_another_digest(tmp_path: Path) -> None:
    digests = set()
    for number, mask in enumerate(({}, {"weight": 0}, {"reasoning_content": "why"})):
        folder = tmp_path / str(number)
        folder.mkdir()
        lines = [talk({"content": "Lyon", **mask}, {"content": f"{row}"}) for row in range(12)]
        for index, line in enumerate(lines):
            line["messages"][0]["content"] = f"question {index}"
        (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        digests.add(read(DataConfig(source="jsonl", name=str(folder / "data.jsonl"))).digest)
    assert len(digests) == 3


BAD = [
    ({"content": "a", "weight": 0.5}, "message 2 has weight 0.5; write 0 or false to mask it"),
    ({"content": "a", "train": "no"}, "message 2 has train 'no'; write 0 or false"),
    ({"content": "a", "weight": 0, "train": True}, "message 2: weight and train contradict each other"),
    (
        {"content": "a", "wieght": 0},
        "message 2 has the key 'wieght', which is not known.*did you mean 'weight'",
    ),
    ({"content": "a", "function_call": {"name": "f"}}, "message 2 has the key 'function_call'"),
    ({"content": "a", "weight": 0}, "none of the assistant's messages is to be learnt"),
    (
        {"content": "a", "tool_call_id": "1"},
        "message 2 has 'tool_call_id', which belongs to a message from 'tool'",
    ),
    ({"content": "a", "reasoning": "b", "thinking": "c"}, "message 2 has its reasoning twice"),
    ({"content": "a", "reasoning_content": 3}, "message 2: reasoning_content is 3, not a text"),
    ({"content": "", "tool_calls": []}, "message 2: tool_calls is empty"),
    ({"content": "", "tool_calls": [{"name": "f"}]}, "message 2: tool_calls is .*; write a list of"),
    (
        {"content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]},
        "message 2, arguments of f: '{x' is not JSON",
    ),
    ({"content": None}, "message 2 is .*, not {role, content} texts"),
]


@pytest.mark.parametrize(("answer", "match"), BAD, ids=[str(list(answer)) for answer, _ in BAD])
def test_a_wrong_message_is_an_error_that_names_its_place(
    tmp_path: Path, answer: dict[str, Any], match: str
) -> None:
    with pytest.raises(DataError, match=rf"train\.jsonl, line 2, column 'messages': {match}|line 2, {match}"):
        rows(tmp_path, talk({"content": "fine"}), talk(answer))


def test_only_answers_can_be_learnt(tmp_path: Path) -> None:
    row = talk({"content": "a"})
    row["messages"][0]["weight"] = 1
    with pytest.raises(
        DataError, match="message 1 is from 'user' and has weight 1, but only the assistant's"
    ):
        rows(tmp_path, row)
    row["messages"][0]["weight"] = 0
    assert learnt(rows(tmp_path, row)[0]) == "a<|im_end|>"


def test_tools_are_in_the_prompt_if_the_template_writes_them(tmp_path: Path) -> None:
    answer = {"content": "Let me look.", "tool_calls": [CALL]}
    for tools in ([TOOL], json.dumps([TOOL])):
        [example] = rows(tmp_path, talk(answer, tools=tools))
        tokenizer = chat_tokenizer(templates.TOOLS)
        text = tokenizer.decode(encode_all([example], tokenizer, 1000)[0].input_ids)
        assert text.startswith(
            '<|im_start|>system\n{"type": "function", "function": {"name": "f", "parameters": {}}}'
        )
        call = '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call><|im_end|>'
        assert learnt(example, templates.TOOLS) == f"Let me look.{call}"
    [silent] = rows(tmp_path, talk({"content": None, "tool_calls": [CALL]}, tools=[TOOL]))
    assert learnt(silent, templates.TOOLS) == call


def test_tools_that_the_template_leaves_out_are_an_error_that_names_them(tmp_path: Path) -> None:
    [example] = rows(tmp_path, talk({"content": "Let me look."}, tools=[TOOL]))
    with pytest.raises(
        DataError, match=r"train example 1.* has tools, and the model's chat template does not write it"
    ):
        learnt(example)
    [example] = rows(tmp_path, talk({"content": "Let me look.", "tool_calls": [CALL]}))
    with pytest.raises(
        DataError, match=r"train example 1.* has tool_calls, and the model's chat template does not"
    ):
        learnt(example)
    tokenizer = chat_tokenizer(None)
    with pytest.raises(
        DataError, match=r"train example 1.* has tool_calls, and the tokenizer has no chat template"
    ):
        encode_all([example], tokenizer, 1000)


def test_a_template_is_tried_once_for_each_sequence_of_roles_and_keys(tmp_path: Path, monkeypatch) -> None:
    answers = ({"content": "a"}, {"content": "b"}, {"content": "c", "tool_calls": [CALL]})
    [plain], [other], [calling] = (rows(tmp_path, talk(answer, tools=[TOOL])) for answer in answers)
    tokenizer = chat_tokenizer(
        templates.TOOLS.replace("{% for call in m.tool_calls %}", "{% for call in [] %}")
    )
    rendered: list[int] = []
    render = template.render
    monkeypatch.setattr(
        template, "render", lambda *given, **named: rendered.append(1) or render(*given, **named)
    )
    encode_all([plain], tokenizer, 1000)
    first = len(rendered)
    encode_all([plain, other], tokenizer, 1000)
    assert len(rendered) - 2 * first == 2, "the other's prompt, and the prompt with its answer"
    with pytest.raises(
        DataError, match=r"train example 2.* has tool_calls, and the model's chat template does"
    ):
        encode_all([plain, calling], tokenizer, 1000)


def test_the_answer_of_a_tool_is_a_turn(tmp_path: Path) -> None:
    row = talk({"content": "", "tool_calls": [CALL]}, tools=[TOOL])
    row["messages"] += [
        {"role": "tool", "content": "sunny", "tool_call_id": "1", "name": "f"},
        {"role": "assistant", "content": "It is sunny."},
    ]
    [example] = rows(tmp_path, row)
    assert learnt(example, templates.TOOLS).endswith("</tool_call><|im_end|>It is sunny.<|im_end|>")


@pytest.mark.parametrize(
    ("column", "value"), [("functions", [TOOL]), ("weight", 0), ("system", "be brief"), ("images", ["a.png"])]
)
def test_a_column_that_would_change_what_is_learnt_is_not_ignored(
    tmp_path: Path, column: str, value: Any
) -> None:
    with pytest.raises(
        DataError, match=rf"train\.jsonl, line 2, column '{column}': format 'messages' does not read it"
    ):
        rows(tmp_path, talk({"content": "a"}), talk({"content": "b"}, **{column: value}))
    pair = {"prompt": "a", "completion": "b", column: value}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    with pytest.raises(DataError, match=f"column '{column}': format 'prompt_completion' does not read it"):
        read(DataConfig(source="jsonl", name=str(tmp_path / "pairs.jsonl")))
    assert rows(tmp_path, talk({"content": "a"}, **{column: None}))


def test_a_conversation_may_be_json_text(tmp_path: Path) -> None:
    row = talk({"content": "Paris"})
    assert rows(tmp_path, {"messages": json.dumps(row["messages"])}) == rows(tmp_path, row)
    with pytest.raises(DataError, match=r"line 1, column 'messages': '\[\{\}' is not JSON"):
        rows(tmp_path, {"messages": "[{}"})


@pytest.mark.parametrize(
    ("turn", "match"),
    [
        (
            {"from": "human", "value": "?"},
            r"not \{role, content\} texts; rename from to role \(human to user",
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": "?"}]},
            "write the text itself, without a list",
        ),
        ({"role": "human", "content": "?"}, "the role 'human'; write 'user'"),
        ({"role": "developer", "content": "?"}, "the role 'developer'; write 'system'"),
    ],
)
def test_turns_of_other_formats_are_errors_that_say_what_to_write(
    tmp_path: Path, turn: dict[str, Any], match: str
) -> None:
    with pytest.raises(DataError, match=match):
        rows(tmp_path, {"messages": [turn, {"role": "assistant", "content": "!"}]})
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": [turn], "completion": "!"}))
    with pytest.raises(DataError, match="is no text; write a string, or turns as one list in a column 'mess"):
        read(DataConfig(source="jsonl", name=str(tmp_path / "pairs.jsonl")))


@pytest.mark.parametrize("answer", ["Paris<|im_end|>", "Paris<|im_end|>\n", "Par<|im_end|>is"])
def test_an_answer_with_the_end_of_a_turn_in_it_is_an_error(tmp_path: Path, answer: str) -> None:
    [example] = rows(tmp_path, talk({"content": "Lyon"}, {"content": answer}))
    with pytest.raises(
        DataError, match=r"example 1.*, message 4: the answer has '<\|im_end\|>' in it, which ends"
    ):
        learnt(example)
    [thought] = rows(tmp_path, talk({"content": "Paris", "reasoning_content": answer}))
    function = {"name": "f", "arguments": {"x": [answer]}}
    [called] = rows(
        tmp_path, talk({"content": "", "tool_calls": [{"type": "function", "function": function}]})
    )
    for example, layout in ((thought, templates.QWEN3), (called, templates.TOOLS)):
        with pytest.raises(DataError, match=r"message 2: the answer has '<\|im_end\|>' in it, which ends"):
            learnt(example, layout)
    [masked] = rows(tmp_path, talk({"content": answer, "weight": 0}, {"content": "Paris"}))
    assert learnt(masked) == "Paris<|im_end|>"


def test_other_columns_are_ignored(tmp_path: Path) -> None:
    assert len(rows(tmp_path, talk({"content": "a"}, id=7, source="hand"))) == 1
