"""Which JSON schemas are refused, and that xgrammar follows what is not."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rayft.errors import BadRequestError
from rayft.serving.engine.vllm.schemas import DEEPEST, check_schema

pytest.importorskip("vllm.v1.structured_output.backend_xgrammar")
xgrammar = pytest.importorskip("xgrammar")

STRING, INTEGER = {"type": "string"}, {"type": "integer"}
OBJECT = {"type": "object", "properties": {"a": STRING}, "required": ["a"]}


def refused(schema: Any) -> str:
    text = schema if isinstance(schema, str) else json.dumps(schema)
    with pytest.raises(BadRequestError, match="can't make an answer follow this JSON schema: ") as caught:
        check_schema(text)
    assert caught.value.param == "response_format"
    return str(caught.value).partition(" schema: ")[2]


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ("{", "it is no JSON (Expecting"),
        ("[1]", "it is no JSON object"),
        ({"type": 5}, "Type should be a string"),
        ({"type": "strng"}, 'Unsupported type "strng"'),
        ({**OBJECT, "properties": [1]}, "properties must be an object"),
        ({**OBJECT, "required": "a"}, "required must be an array"),
        ({"enum": []}, "enum array must not be empty"),
        ({"allOf": 5}, "allOf must be an array"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum greater than maximum"),
        ({"type": "string", "pattern": "("}, "parenthesis is not closed"),
        ({"type": "string", "pattern": "\\bx"}, "Word boundary is not supported"),
        ({"$ref": "#/$defs/b", "$defs": {"a": STRING}}, "Cannot find field 'b'"),
        ({"$ref": "#"}, "Circular $ref"),
    ],
    ids=str,
)
def test_what_xgrammar_refuses_is_refused_with_its_reason(schema: Any, reason: str) -> None:
    found = refused(schema)
    assert reason in found
    assert ".cc" not in found


LEFT_OUT: list[tuple[dict[str, Any], Any, str]] = [
    ({"not": STRING}, "x", "'not', which"),
    ({"if": STRING, "then": {"type": "string", "maxLength": 1}}, "xyz", "'if', which"),
    ({"allOf": [STRING, {"type": "string", "maxLength": 1}]}, 5, "several schemas in 'allOf'"),
    ({"type": "object", "allOf": [OBJECT], "required": ["b"]}, {"a": "x"}, "'required' beside 'allOf'"),
    ({**OBJECT, "anyOf": [{"type": "integer"}]}, 5, "'properties' beside 'anyOf'"),
    ({"$ref": "#/$defs/a", "$defs": {"a": STRING}, "maxLength": 1}, "xyz", "'maxLength' beside '$ref'"),
    ({"$ref": "https://example.com/x.json"}, 5, "a '$ref' to https://example.com/x.json"),
    ({"$ref": "#a", "$defs": {"a": {"$anchor": "a", **STRING}}}, 5, "a '$ref' to #a"),
    ({"minLength": 3}, 5, "'minLength' without the 'type'"),
    ({"required": ["a"]}, 5, "'required' without the 'type'"),
    ({"type": "integer", "maxLength": 3}, 5, "'maxLength' without the 'type'"),
    ({"type": "string", "pattern": "^x*$", "maxLength": 1}, "xxx", "'maxLength' beside 'pattern'"),
    ({"type": "string", "format": "date", "maxLength": 1}, "2020-01-01", "'maxLength' beside 'format'"),
    ({"type": "string", "pattern": "^(?!a)[ab]$"}, "a", "looks ahead or behind"),
    ({"type": "string", "maxLength": -1}, "xyz", "'maxLength' below 0"),
    ({**OBJECT, "required": ["a", "b"]}, {"a": "x"}, "'b' in 'required' that is not in 'properties'"),
    ({"type": ["object", "null"], "required": ["a"]}, {}, "'a' in 'required' that is not in"),
    ({"type": "string", "format": "iban"}, "x", "the format iban, which"),
    ({"type": ["string", "null"], "format": "iban"}, "x", "the format iban, which"),
    ({"type": "array", "uniqueItems": True}, [], "'uniqueItems', which"),
    ({"type": "number", "multipleOf": 0.5}, 0.3, "'multipleOf', which"),
    ({"type": "object", "dependentRequired": {"a": ["b"]}}, {}, "'dependentRequired', which"),
]


@pytest.mark.parametrize(("schema", "answer", "reason"), LEFT_OUT, ids=str)
@pytest.mark.parametrize(
    ("around", "place"),
    [
        (lambda schema: schema, "$ has "),
        (lambda schema: {"type": "object", "properties": {"not": schema}}, "$.properties.not has "),
        (lambda schema: {"type": "array", "items": {"anyOf": [STRING, schema]}}, "$.items.anyOf.1 has "),
        (lambda schema: {"$defs": {"x": schema}, "$ref": "#/$defs/x"}, "$.$defs.x has "),
    ],
    ids=["itself", "property", "choice", "definition"],
)
def test_what_xgrammar_leaves_out_is_refused(
    schema: dict[str, Any], answer: Any, reason: str, around: Any, place: str
) -> None:
    assert refused(around(schema)).startswith(place)
    assert reason in refused(around(schema))


FOLLOWED: list[tuple[dict[str, Any], list[Any], list[Any]]] = [
    ({"type": "object"}, [{}, {"a": [1]}], [5]),
    ({"title": "Any"}, [{}, 5, "x"], []),
    ({"type": "string", "minLength": 2, "maxLength": 3}, ["ab"], ["a", "abcd", 5]),
    ({"type": "string", "pattern": "^a\\(?=b$"}, ["a(=b"], ["ab"]),
    ({"type": ["string", "null"], "title": "T", "description": "d", "default": None}, ["x", None], [5]),
    ({"type": "string", "format": "date"}, ["2020-01-31"], ["x"]),
    ({"type": "integer", "format": "int32", "minimum": 1, "exclusiveMaximum": 30}, [29], [0, 30, 1.5]),
    (
        {"type": "array", "prefixItems": [STRING], "items": INTEGER, "minItems": 2},
        [["x", 1]], [["x"], [1, 1]],
    ),
    ({"items": INTEGER, "maxItems": 1}, [[1]], [[1, 1], ["x"]]),
    ({"properties": {"a": STRING}, "required": ["a"]}, [{"a": "x"}], [{}, {"a": 5}]),
    ({"type": "object", "additionalProperties": INTEGER, "minProperties": 1}, [{"x": 1}], [{}, {"x": "y"}]),
    ({"type": "string", "enum": ["a", "b"]}, ["a"], ["c"]),
    ({"type": "string", "const": "a"}, ["a"], ["b"]),
    ({"allOf": [STRING]}, ["x"], [5]),
    ({"type": "object", "oneOf": [OBJECT, {"type": "integer"}]}, [{"a": "x"}, 5], ["x"]),
    ({"$ref": "#/definitions/a", "title": "t", "definitions": {"a": OBJECT}}, [{"a": "x"}], [{}]),
    (
        {"$defs": {"t": {"type": "object", "properties": {"n": {"anyOf": [{"$ref": "#/$defs/t"},
            {"type": "null"}]}}, "required": ["n"]}}, "$ref": "#/$defs/t"},
        [{"n": {"n": None}}], [{}, {"n": 5}],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "right", "wrong"), FOLLOWED, ids=str)
def test_what_is_not_refused_is_followed(schema: dict[str, Any], right: list[Any], wrong: list[Any]) -> None:
    check_schema(json.dumps(schema))
    for answer in right:
        assert follows(answer, schema), answer
    for answer in wrong:
        assert not follows(answer, schema), answer


UNESCAPED = {
    'a"b': 'a"b', "^\\\\n$": "\\n", "^\\t$": "\t", "\t": "\t", '["]': '"', '\\["x]': '["x]', "[\\b]": "\b",
    "\\x22": '"', "[\\x5C]": "\\", "\\u000a": "\n", "\\cJ": "\n", "[^]": "\n",
}  # fmt: skip
"""Pattern → what a model could write between the quotes, which then is no JSON."""


@pytest.mark.parametrize(("pattern", "written"), UNESCAPED.items())
def test_a_pattern_with_which_an_answer_is_no_json_is_refused(pattern: str, written: str) -> None:
    schema = {"type": "string", "pattern": pattern}
    assert "a 'pattern' with a character that JSON escapes" in refused(schema)
    assert writes(f'"{written}"', schema)


@pytest.mark.parametrize(
    "pattern", ['[^"]', ".", "[ -~]", "[\\s\\S]", "\\W", '["a]', "[\\x22a]", "\\/|\\.", "[\\]a]", "\\[\\^\\]"]
)
def test_other_patterns_leave_out_what_json_escapes(pattern: str) -> None:
    schema = {"type": "string", "pattern": f"^(?:{pattern})+$"}
    check_schema(json.dumps(schema))
    for written in '"\\\n\t\x01':
        assert not writes(f'"{written}"', schema), repr(written)


def follows(answer: Any, schema: dict[str, Any]) -> bool:
    """Return whether xgrammar lets a model write an answer, under the options of the engine."""
    return writes(json.dumps(answer, separators=(", ", ": ")), schema)


def writes(text: str, schema: dict[str, Any]) -> bool:
    """Return whether xgrammar lets a model write a text as its whole answer."""
    characters = [bytes([number]) for number in range(256)]
    tokens = xgrammar.TokenizerInfo([*characters, b"<end>"], stop_token_ids=[256])
    compiled = xgrammar.GrammarCompiler(tokens, max_threads=1).compile_json_schema(
        json.dumps(schema), any_whitespace=False
    )
    matcher = xgrammar.GrammarMatcher(compiled)
    return bool(matcher.accept_string(text) and matcher.accept_token(256))


@pytest.mark.parametrize(("schema", "answer", "_"), LEFT_OUT, ids=str)
def test_xgrammar_would_let_a_model_answer_otherwise(schema: dict[str, Any], answer: Any, _: str) -> None:
    """A release that follows one of these fails here; the engine need not refuse it then."""
    assert follows(answer, schema)


@pytest.mark.parametrize("levels", [DEEPEST + 1, 500, 100_000])
def test_a_schema_that_is_nested_too_deeply_is_refused_at_once(levels: int) -> None:
    deep = '{"type": "array", "items": ' * levels + "{}" + "}" * levels
    assert refused(deep).startswith("it is nested too deeply")


def test_a_schema_may_be_nested() -> None:
    check_schema('{"type": "array", "items": ' * DEEPEST + "{}" + "}" * DEEPEST)
