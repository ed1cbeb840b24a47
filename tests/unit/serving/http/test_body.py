"""What the body of a request may contain, at any depth."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayft.errors import BadRequestError
from rayft.serving.http.body import MAX_DEPTH, read_json, where

HALF = "\ud83d"
"""Half of an emoji."""


def body(value: Any) -> bytes:
    return json.dumps(value).encode()


def nested(depth: int) -> bytes:
    return b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


def test_a_plain_object_is_parsed_as_json_parses_it() -> None:
    value = {"a": [1, 2.5, None, True, "🙂 \0 é"], "b": {"c": []}}
    assert read_json(body(value)) == value
    assert read_json(json.dumps(value, ensure_ascii=False).encode()) == value
    # The two halves together are a character.
    assert read_json(b'{"a": "\\ud83d\\ude00"}') == {"a": "😀"}
    assert read_json(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}


@pytest.mark.parametrize(
    ("given_body", "param", "word"),
    [
        (body({"model": HALF}), "model", "not valid Unicode.*U\\+D83D"),
        (body({"a": [{"b": ["x", "ab" + HALF]}]}), "a[0].b[1]", "character 3"),
        (body({"a": {HALF: 1}}), "a", "a key of 'a'"),
        (body({HALF: 1}), None, "a key of the body"),
        (b'{"a": "\xed\xa0\xbd"}', None, "not UTF-8"),
        (b'{"a": "\xff"}', None, "not UTF-8"),
        (body({"a": 1}).decode().encode("utf-16"), None, "not UTF-8"),
        (body({"a": 1}).decode().encode("utf-32-le"), None, "JSON"),
        (nested(MAX_DEPTH + 1), "a", "nested more than"),
        (nested(100_000), None, "nested more than"),
        (b"[" * 100_000, None, "nested more than"),
        (b'{"a":' * 100_000, None, "nested more than"),
        (b'{"a": {"b": 1, "b": 2}}', None, "'b' occurs twice"),
        (b'{"a": NaN}', None, "NaN"),
        (b'{"a": [-Infinity]}', None, "-Infinity"),
        (b'{"a": [1e400]}', "a[0]", "64 bits"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a", "64 bits"),
        (b'{"a": [0, -9223372036854775809]}', "a[1]", "64 bits"),
        (b"", None, "JSON"),
        (b"{", None, "JSON"),
        (b'{"a": 1} {}', None, "JSON"),
        (b"[]", None, "not an array"),
        (b"3", None, "not a number"),
        (b'"a"', None, "not a string"),
        (b"null", None, "not null"),
        (b"true", None, "not a boolean"),
    ],
)
def test_what_is_not_plain_json_is_refused_with_its_path(
    given_body: bytes, param: str | None, word: str
) -> None:
    with pytest.raises(BadRequestError, match=word) as caught:
        read_json(given_body)
    assert caught.value.param == param
    assert "set_int_max_str_digits" not in str(caught.value)


def test_depth_and_numbers_up_to_the_limits_are_accepted() -> None:
    read_json(nested(MAX_DEPTH))
    numbers = [2**63 - 1, -(2**63), 1e308, -0.0, 5e-324]
    assert read_json(body({"a": numbers})) == {"a": numbers}


def test_paths_are_written_in_the_notation_of_clients() -> None:
    assert where(["messages", 0, "content", 2, "text"]) == "messages[0].content[2].text"
    assert where([]) == ""


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None, categories=["Cs", "L", "Cc"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec=None)), inner),
    max_leaves=20,
)


@given(anything)
def test_any_json_is_refused_or_its_value_can_be_encoded(value: Any) -> None:
    for text in (body(value), json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")):
        try:
            found = read_json(text)
        except BadRequestError as error:
            f"{error}{error.param}".encode()
        else:
            json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
            # Compared as JSON: two halves that stand side by side are one character once they are read.
            assert json.dumps(found) == json.dumps(value)


@given(st.binary())
def test_any_bytes_are_refused_or_parsed(data: bytes) -> None:
    try:
        assert isinstance(read_json(data), dict)
    except BadRequestError as error:
        str(error).encode()
