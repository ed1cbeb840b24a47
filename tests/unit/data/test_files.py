"""Files of each kind and format, and the errors for wrong ones."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from rayft.data.files import read_file
from rayft.data.source import PARTS, read
from rayft.errors import DataError
from tests.unit.data.small_data import config, lines, pairs


def test_the_three_kinds_of_file_are_read_as_the_same_examples(tmp_path):
    import datasets

    rows = [
        {"prompt": f'q {n}, "quoted"', "completion": answer}
        for n, answer in enumerate(["007", "NA", "2024-01-01", "true", "1e3"] * 6)
    ]
    lines(tmp_path / "a.jsonl", rows)
    table = datasets.Dataset.from_list(rows)
    table.to_csv(tmp_path / "a.csv")
    table.to_parquet(tmp_path / "a.parquet")
    digests = {
        read(config(source=kind, name=str(tmp_path / f"a.{kind}"))).digest
        for kind in ("jsonl", "csv", "parquet")
    }
    assert len(digests) == 1
    train = read(config(source="csv", name=str(tmp_path / "a.csv"))).train
    assert {example.answer for example in train} <= {"007", "NA", "2024-01-01", "true", "1e3"}


def test_formats_are_found_by_their_columns(tmp_path):
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    kinds = {
        "messages": [{"messages": [{**turns[0], "content": f"{n}"}, turns[1]]} for n in range(10)],
        "text": [{"text": f"text {n}"} for n in range(10)],
        "classification": [{"text": f"text {n}", "label": n % 2 * 10} for n in range(40)],
    }
    found = {kind: read(config(name=lines(tmp_path / f"{kind}.jsonl", rows))) for kind, rows in kinds.items()}
    assert found["messages"].train[0].answer == "!"
    assert found["text"].train[0].messages == ()
    classes = found["classification"]
    assert classes.labels == ("0", "10")
    assert all(example.answer == classes.labels[example.label] for example in classes.train)
    assert found["text"].train[0].label is None


def test_columns_may_have_other_names(tmp_path):
    rows = [{"q": f"q{number}", "a": "x"} for number in range(10)]
    path = lines(tmp_path / "a.jsonl", rows)
    assert read(config(name=path, columns={"prompt": "q", "completion": "a"})).train[0].answer == "x"


def test_a_column_can_not_be_question_and_answer(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"text": "x"}])
    with pytest.raises(
        DataError, match="names 'text' for both prompt and completion; name a column for each"
    ):
        read(config(name=path, columns={"prompt": "text", "completion": "text"}))


GOOD = pairs(0, 5)


@pytest.mark.parametrize(
    ("rows", "form", "match"),
    [
        ([*GOOD, {"prompt": 3, "completion": "x"}], "auto", "line 6, column 'prompt': 3 is no text"),
        ([*GOOD, {"prompt": "x"}], "auto", "line 6, column 'completion': an empty cell is no text"),
        ([*GOOD, {"prompt": "x", "completion": " "}], "auto", "column 'completion': the completion is empty"),
        ([{"promt": "x", "completion": "y"}], "auto", "has the columns promt, completion, but needs one of"),
        (
            [{"promt": "x", "completion": "y"}],
            "prompt_completion",
            "no column 'prompt', .* data.columns.prompt .*; did you mean 'promt'",
        ),
        ([{"messages": "hello"}], "auto", "line 1, column 'messages': 'hello' is no list of"),
        ([{"messages": [{"role": "user"}]}], "auto", "message 1 is .*, not {role, content} texts"),
        ([{"messages": [{"role": "usr", "content": "x"}]}], "auto", "the role 'usr'; did you mean 'user'"),
        (
            [{"messages": [{"role": "user", "content": "x"}]}],
            "auto",
            "last message is from 'user', not from the ass",
        ),
        ([{"messages": [{"role": "assistant", "content": "x"}]}], "auto", "there is only the answer"),
        (
            [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]}],
            "auto",
            "message 2: the answer is empty",
        ),
        ([{"text": "x", "label": 0.5}], "auto", "column 'label': 0.5 is no class"),
        (
            [{"text": f"x{n}", "label": 1} for n in range(9)],
            "auto",
            "all train examples are of one class, '1'",
        ),
        ([], "auto", "is empty"),
        (GOOD[:2], "auto", "too little data: train should have 1 examples and gets 0 of 2"),
        ([1, 2], "auto", "line 1 is no object"),
    ],
)
def test_a_wrong_row_is_an_error_that_names_it(tmp_path, rows, form, match):
    with pytest.raises(DataError, match=match):
        read(config(name=lines(tmp_path / "a.jsonl", rows), format=form))


@pytest.mark.parametrize(
    ("name", "kind", "content", "match"),
    [
        ("none.jsonl", "jsonl", None, "no file at .*none.jsonl; check data.name"),
        ("a.csv", "jsonl", "x", "is not called .jsonl or .ndjson or .json, which source: jsonl reads"),
        ("a.jsonl", "jsonl", '{"prompt": "x"}\n{"prompt": \n', "is not JSON .Expecting value, character 12"),
        ("a.csv", "csv", "prompt,completion\na,b,c\n", "line 2 has 3 fields and the header 2; put quotes"),
        ("a.csv", "csv", 'prompt,completion\n"a,b\n', "is not CSV"),
        ("a.csv", "csv", "prompt,completion\n", "is empty"),
        (
            "a.csv",
            "csv",
            "prompt,note,prompt\na,b,c\n",
            "line 1: the header has 'prompt' more than once; give",
        ),
        (
            "a.csv",
            "csv",
            "prompt,completion\na,b\nc,\n",
            "line 3, column 'completion': the completion is empty",
        ),
        ("a.parquet", "parquet", "no parquet", "is not a readable Parquet file"),
        ("a.csv", "csv", "prompt;completion\na;b\n", "line 1: the header has no comma, but ';': separate"),
        ("a.csv", "csv", "prompt, completion\na, b\n", "has the columns prompt, ' completion', but needs"),
        ("a.json", "jsonl", '{\n "prompt": "x"\n}\n', "has objects of several lines; write one {…} a line"),
        ("a.json", "jsonl", '[\n{"prompt": "x"},\n{"prompt" "y"}]', "is not JSON .*, line 3, character 11"),
        ("a.json", "jsonl", '[{"prompt": "x"}, 3]', "row 2 is no object; write one {…} a line, or one list"),
        ("a.json", "jsonl", "\n[]", "is empty"),
        ("a.jsonl", "jsonl", "\x1f\x8b\x08", "is compressed; unpack it"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_it(tmp_path, name, kind, content, match):
    if content is not None:
        (tmp_path / name).write_bytes(content.encode("latin-1" if content[0] == "\x1f" else "utf-8"))
    with pytest.raises(DataError, match=match):
        read(config(source=kind, name=str(tmp_path / name)))


@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_of_objects_is_read_like_lines_of_them(tmp_path, indent):
    rows = pairs(0, 30)
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(rows, indent=indent), encoding="utf-8")
    found = read(config(name=str(tmp_path / "a.json")))
    assert found.digest == read(config(name=lines(tmp_path / "a.jsonl", rows))).digest
    (tmp_path / "a.json").write_text(json.dumps([*rows, {"prompt": "x"}], indent=indent))
    with pytest.raises(DataError, match=r"a\.json, row 31, column 'completion': an empty cell"):
        read(config(name=str(tmp_path / "a.json")))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "json"])
def test_of_the_first_rows_no_more_is_read(tmp_path, kind):
    import datasets

    rows, path = pairs(0, 40), tmp_path / f"a.{kind}"
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif kind == "csv":
        datasets.Dataset.from_list(rows).to_csv(path)
        path.write_bytes(path.read_bytes() + b'"not, CSV')
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        path.write_bytes(Path(lines(path, rows)).read_bytes() + b"not JSON")
    source = "jsonl" if kind == "json" else kind
    found = read(config(source=source, name=str(path), rows=20))
    assert found.digest == read(config(name=lines(tmp_path / "20.jsonl", rows[:20]))).digest


def test_a_parquet_file_without_rows_or_with_a_column_twice_is_an_error(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    text = pa.array(["a"])
    for table, match in (
        (pa.table([text, text], names=["prompt", "prompt"]), "has the column 'prompt' more than once"),
        (pa.table({"prompt": text, "completion": text}).slice(0, 0), "is empty"),
    ):
        parquet.write_table(table, tmp_path / "a.parquet")
        with pytest.raises(DataError, match=match):
            read(config(source="parquet", name=str(tmp_path / "a.parquet")))


@pytest.mark.parametrize("mixed", [None, "use_json"])
def test_calls_and_tools_of_a_parquet_file_have_their_own_keys_only(tmp_path, mixed):
    """Arrow gives all objects of a column the same keys; as JSON, a null of the data stays."""
    import datasets

    rows = []
    for number in range(10):
        arguments = (
            {"city": "Paris"} if number % 2 else {"ticker": "ACME", "days": [{"first": 1}, {"last": 2}]}
        )
        function = {"name": "f", "arguments": arguments}
        tool = {"name": "f", "parameters": {"properties": {name: {"type": "any"} for name in arguments}}}
        answer = {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": function}],
        }
        turns = [{"role": "user", "content": f"question {number}"}, answer]
        rows.append({"messages": turns, "tools": [{"type": "function", "function": tool}]})
    if mixed:
        rows[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]["days"] = None
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list(rows, on_mixed_types=mixed).to_parquet(path)
    found = read(config(source="parquet", name=str(path)))
    assert found.digest == read(config(name=lines(tmp_path / "a.jsonl", rows))).digest


def test_a_column_that_is_a_part_of_the_question_is_not_ignored(tmp_path):
    rows = [{"instruction": f"do {n}", "input": "", "output": "x"} for n in range(10)]
    columns = {"prompt": "instruction", "completion": "output"}
    assert read(config(name=lines(tmp_path / "a.jsonl", rows), columns=columns)).train
    rows[3]["input"] = "this"
    with pytest.raises(
        DataError, match=r"line 4, column 'input': .* does not read it.*write it into the prom"
    ):
        read(config(name=lines(tmp_path / "a.jsonl", rows), columns=columns))
    # A column called prompt is the whole question.
    whole = [{**pair, "context": "where it is from"} for pair in GOOD]
    assert read(config(name=lines(tmp_path / "b.jsonl", whole))).train


def test_of_many_unknown_classes_some_are_named(tmp_path):
    rows = [{"text": f"text {n}", "label": str(n % 2)} for n in range(20)]
    other = [{"text": f"other {n}", "label": f"class {n:02}"} for n in range(20)]
    files = {"train": lines(tmp_path / "a.jsonl", rows), "val": lines(tmp_path / "b.jsonl", other)}
    with pytest.raises(DataError, match=r"has not: class 00, .*, class 07 and 12 more; .* data.format: text"):
        read(config(files=files))


def test_a_csv_field_may_be_long(tmp_path):
    long = "word " * 40_000 + "end"
    rows = "".join(f"{n} {long},x\n" for n in range(10))
    (tmp_path / "a.csv").write_text(f"prompt,completion\n{rows}")
    limit = csv.field_size_limit()
    parts = read(config(source="csv", name=str(tmp_path / "a.csv")))
    assert all(example.messages[0].content.endswith(long) for example in parts.train)
    assert csv.field_size_limit() == limit
    (tmp_path / "a.csv").write_text('prompt,completion\n"a,b\n')
    with pytest.raises(DataError, match="is not CSV"):
        read(config(source="csv", name=str(tmp_path / "a.csv")))
    assert csv.field_size_limit() == limit


def test_a_folder_and_a_file_of_bytes_are_refused(tmp_path):
    with pytest.raises(DataError, match="is a folder"):
        read(config(name=str(tmp_path)))
    (tmp_path / "a.csv").write_bytes(b"prompt,completion\n\xff\xfe,b\n")
    with pytest.raises(DataError, match=r"a\.csv, line 2 is not UTF-8 \(byte 1 of the line: invalid start"):
        read(config(source="csv", name=str(tmp_path / "a.csv")))


CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def test_half_an_emoji_is_an_error_that_names_its_place(tmp_path):
    path = tmp_path / "half_emoji.jsonl"
    path.write_text('{"prompt": "a \\ud83d b", "completion": "x"}\n{"prompt": "c", "completion": "y"}\n')
    with pytest.raises(DataError) as raised:
        read(config(name=str(path)))
    assert str(raised.value) == (
        f"{path}, line 1, column 'prompt': character 3 is the lone surrogate U+D83D (in 'a \\ud83d b'), "
        "half of a character; write the whole one, or remove it"
    )
    str(raised.value).encode()


@pytest.mark.parametrize(
    ("row", "match"),
    [
        (
            {"prompt": "a", "completion": "x" * 100 + "\udc00"},
            r"column 'completion': character 101 is .*U\+DC00",
        ),
        ({"prompt": "a", "completion\ud83d": "b"}, r"line 1, name of a column: character 11 is .*U\+D83D"),
        ({"text": "a", "label": "\ud83d"}, r"line 1, column 'label': character 1 is .*U\+D83D"),
        (
            {"messages": [{"role": "user", "content": "\ud83d"}, {"role": "assistant", "content": "b"}]},
            r"column 'messages': at \[0\]\.content, character 1 is .*U\+D83D",
        ),
        (
            {"messages": [{"role": "us\udfffer", "content": "a"}, {"role": "assistant", "content": "b"}]},
            r"column 'messages': at \[0\]\.role, character 3 is .*U\+DFFF",
        ),
        (
            {"messages": [{"role": "user", "con\ud83d": "a"}, {"role": "assistant", "content": "b"}]},
            r"column 'messages': at \[0\], character 4 is .*U\+D83D",
        ),
        (
            {**CHAT, "tools": [{"description": "\ud83d"}]},
            r"column 'tools': at \[0\]\.description, character 1 is .*U\+D83D",
        ),
        (
            {**CHAT, "tools": r'[{"description": "\ud83d"}]'},
            r"line 1, tools: at \[0\]\.description, character 1 is .*U\+D83D",
        ),
        ({**CHAT, "tools": '[{"name": "a", "name": "b"}]'}, r"line 1, tools: .*the key 'name' occurs twice"),
        (
            {"messages": [{"role": "user", "content": float("nan")}]},
            r"column 'messages': at \[0\]\.content, nan is no number of JSON",
        ),
        ({"text": eval("[" * 150 + "]" * 150)}, r"column 'text': the value is nested more than 100 deep"),  # noqa: S307
    ],
)
def test_a_value_that_no_later_step_can_read_is_an_error_that_names_it(tmp_path, row, match):
    with pytest.raises(DataError, match=match) as raised:
        read(config(name=lines(tmp_path / "a.jsonl", [row] * 10)))
    str(raised.value).encode()


def test_columns_that_are_not_read_may_have_any_value(tmp_path):
    rows = [
        {"prompt": f"\U0001f600 {n}", "completion": "a\0b", "note": ["\ud83d"], "score": float("nan")}
        for n in range(10)
    ]
    path = lines(tmp_path / "a.jsonl", rows)
    assert "\\ud83d\\ude00" in (tmp_path / "a.jsonl").read_text()
    assert {example.answer for example in read(config(name=path)).train} == {"a\0b"}


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ('{"prompt": "a", "prompt": "b", "completion": "c"}', "the key 'prompt' occurs twice in one object"),
        (
            '{"messages": [{"role": "user", "content": "a", "content": "b"}]}',
            "the key 'content' occurs twice in one object",
        ),
        ('{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}", "is nested too deeply to be read"),
        ('{"prompt": ' + "1" * 5000 + "}", r"can't be read: Exceeds the limit \(4300 digits\)"),
        ('\ufeff{"prompt": "a", "completion": "b"}', "is not JSON .Unexpected UTF-8 BOM"),
        ('{"prompt": "a" "completion": "b"}', "is not JSON .Expecting ',' delimiter, character 16"),
    ],
)
def test_a_line_that_is_not_a_plain_object_is_an_error_that_names_it(tmp_path, line, match):
    path = lines(tmp_path / "a.jsonl", pairs(0, 5))
    with (tmp_path / "a.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")
    with pytest.raises(DataError, match=rf"a\.jsonl, line 6 {match}|a\.jsonl, line 6 can't be read: {match}"):
        read(config(name=path))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_another_encoding_is_an_error_that_names_it(tmp_path, kind, encoding):
    text = {"jsonl": '{"prompt": "a", "completion": "b"}\n', "csv": "prompt,completion\na,b\n"}[kind]
    (tmp_path / f"a.{kind}").write_text(text * 20, encoding=encoding)
    with pytest.raises(DataError, match=rf"a\.{kind} is {encoding.upper()}, not UTF-8; convert it"):
        read(config(source=kind, name=str(tmp_path / f"a.{kind}")))


@pytest.mark.parametrize(("kind", "line"), [("jsonl", 4001), ("csv", 4002)])
def test_a_line_that_is_not_utf8_is_an_error_that_names_it(tmp_path, kind, line):
    rows = {"jsonl": '{"prompt": "a", "completion": "b"}\n', "csv": "a,b\n"}[kind] * 4000
    path = tmp_path / f"a.{kind}"
    path.write_text(("prompt,completion\n" if kind == "csv" else "") + rows)
    with path.open("ab") as stream:
        stream.write(b'{"prompt": "caf\xe9", "completion": "b"}\n' if kind == "jsonl" else b"caf\xe9,b\n")
    with pytest.raises(DataError, match=rf"a\.{kind}, line {line} is not UTF-8 \(byte \d+ of the line: inv"):
        read(config(source=kind, name=str(path)))


@pytest.mark.parametrize("column", ["prompt", "note"])
def test_text_of_a_parquet_file_that_is_not_utf8_is_an_error_that_names_it(tmp_path, column):
    import pyarrow as pa
    from pyarrow import parquet

    raw = pa.array([b"a", b"b", b"\xed\xa0\xbd"])
    texts = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    good = {"prompt": list("abc"), "completion": list("xyz"), "note": list("def")}
    parquet.write_table(pa.table({**good, column: texts}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=rf"a\.parquet, row 3, column '{column}' is not UTF-8 \(byte 1: inv"):
        read(config(source="parquet", name=str(tmp_path / "a.parquet")))


def test_a_parquet_column_whose_name_is_not_utf8_is_an_error(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"prompt": ["a"], "completiox": ["b"]}), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"completiox", b"completio\xff"))
    with pytest.raises(DataError, match=r"a\.parquet has a column whose name is not UTF-8; rename it"):
        read(config(source="parquet", name=str(path)))


def test_maps_of_a_parquet_file_are_objects_with_their_own_keys(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    path, kind = tmp_path / "a.parquet", pa.map_(pa.string(), pa.string())
    talks = [
        [[("role", "user"), ("content", f"{n}?")], [("role", "assistant"), ("content", f"{n}")]]
        for n in "abc"
    ]
    table = pa.table(
        {"messages": pa.array(talks, pa.list_(kind)), "about": pa.array([[("n", "1")], [], None], kind)}
    )
    for given in (table, table.select(["messages"]), table.append_column("number", pa.array([1, 2, 3]))):
        parquet.write_table(given, path)
        found = read_file("parquet", str(path), first=2)
        assert found.columns == tuple(given.column_names)
        assert found.rows == given.slice(0, 2).to_pylist(maps_as_pydicts="strict")
        parts = read(config(source="parquet", name=str(path), val=1, test=1))
        assert {one.question for part in PARTS for one in getattr(parts, part)} == {
            f"user: {n}?" for n in "abc"
        }
    twice = pa.array([[], [], [("n", "1"), ("n", "2")]], kind)
    parquet.write_table(table.set_column(1, "about", twice), path)
    with pytest.raises(DataError, match=r"a\.parquet, row 3, column 'about' has a key twice in one map"):
        read(config(source="parquet", name=str(path)))


def test_a_parquet_column_of_a_kind_that_nothing_reads_is_an_error(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"prompt": ["a"], "x": pa.array([[1]], pa.list_view(pa.int32()))}), path)
    with pytest.raises(
        DataError, match=r"a\.parquet has a column of a kind that can't be read \(.*list_view"
    ):
        read(config(source="parquet", name=str(path)))


def test_classes_of_a_parquet_file_have_the_names_in_it(tmp_path):
    import datasets

    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"])
    )
    rows = {"text": [*"abcdef"], "label": [0, 1, 0, 1, 1, -1]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "a.parquet")
    found = read_file("parquet", str(tmp_path / "a.parquet"))
    assert [row["label"] for row in found.rows] == ["no", "yes", "no", "yes", "yes", -1]


def test_a_path_of_an_image_with_a_nul_is_an_error_that_names_it(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    table = {"image": [{"bytes": None, "path": "a\0.png"}] * 3, "label": [0, 1, 0]}
    parquet.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"can't be read as an image \(embedded null byte\)"):
        read(config(source="parquet", name=str(tmp_path / "a.parquet")))
