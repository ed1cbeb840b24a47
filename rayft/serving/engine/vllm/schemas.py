"""Checks that vLLM can make an answer follow a JSON schema, before the request is accepted.

vLLM compiles schemas with xgrammar. It refuses some of what it does not support, and leaves out the rest: of
`{"not": …}`, or of two schemas in `allOf`, any JSON remains. Here both are refused, so that an answer that is
given follows the whole schema. The exception is `oneOf`, which is read as `anyOf`.

In a string with a length or a pattern, xgrammar knows no escapes. What JSON escapes is written as it is if a
pattern names it, which is refused too. A length leaves control characters: a pattern without them, instead of
the length, would take 20 ms for each token with 50,000 tokens, and seconds to compile (xgrammar 0.2.9).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from rayft.errors import BadRequestError

__all__ = ["DEEPEST", "check_schema"]

DEEPEST = 32
"""Most names and indices in the path of a schema inside another. xgrammar takes minutes for a thousand."""
TOO_DEEP = f"it is nested too deeply: paths in it may have {DEEPEST} names"
ALONE = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")
"""Keywords beside which xgrammar reads no other; the first of these decides."""
NUMBER = frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "format"})
OF_TYPE: Mapping[str, frozenset[str]] = {
    "integer": NUMBER,
    "number": NUMBER,
    "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems", "unevaluatedItems"}),
    "object": frozenset(
        {
            "properties", "required", "minProperties", "maxProperties", "additionalProperties",
            "unevaluatedProperties",
        }
    ),
}  # fmt: skip
"""Type → the keywords that xgrammar reads beside it."""
IMPLIES = {
    "array": ("items", "prefixItems", "unevaluatedItems"),
    "object": ("properties", "additionalProperties", "unevaluatedProperties"),
}
"""Type → the keywords from which xgrammar concludes it if there is no `type`."""
NEVER = frozenset(
    {
        "not", "if", "then", "else", "dependentRequired", "dependentSchemas", "dependencies", "contains",
        "minContains", "maxContains", "uniqueItems", "multipleOf", "patternProperties", "propertyNames",
        "additionalItems", "$dynamicRef", "$recursiveRef",
    }
)  # fmt: skip
"""Keywords that xgrammar leaves out, or vLLM refuses."""
KNOWN = NEVER.union(ALONE, *OF_TYPE.values())
"""All keywords that restrict a value. Others, such as `title`, mean nothing to xgrammar either."""
NAMED = ("properties", "$defs", "definitions")
LISTED = ("anyOf", "oneOf", "allOf", "prefixItems")
SINGLE = ("items", "additionalProperties", "unevaluatedItems", "unevaluatedProperties")
"""Where a schema has others: in a mapping, in a list, or as a value."""
LOOKAROUND = re.compile(r"(?<!\\)\(\?<?[=!]")
"""What xgrammar leaves out of a regular expression."""
ONE = r"\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\c.|\\.|[^\]\\]"
"""One character of a class in a regular expression."""
CLASS = re.compile(rf"(?<!\\)\[(?>{ONE}){{2,}}\]", re.DOTALL)
"""A class of which xgrammar leaves out what JSON escapes; it reads one of a single character as that."""
ESCAPED = re.compile(r'"|[\x00-\x1f]|\\[\\nrtfv0c]|\[\\b\]|\\(?:x|u00)(?:[01]|22|5[cC])|\[\^\]')
"""What means a character that JSON escapes, outside of these classes."""
PLACE = re.compile(r"\[[\d:]+\] \S+:\d+: ")
"""The time and the line of xgrammar's source, which precede the reason in its messages."""


def check_schema(text: str) -> None:
    """Refuse a JSON schema that answers would not follow.

    Args:
        text: the schema, as JSON.

    Raises:
        BadRequestError: if it is no schema, or has something that is not supported.
    """
    if problem := _problem(text):
        raise BadRequestError(
            f"the engine can't make an answer follow this JSON schema: {problem}", param="response_format"
        )


@lru_cache(maxsize=64)
def _problem(text: str) -> str | None:
    """Return why a schema is refused; clients tend to send the same one again."""
    try:
        schema = json.loads(text)
    except RecursionError:
        return TOO_DEEP
    except ValueError as error:
        return f"it is no JSON ({error})"
    if not isinstance(schema, dict):
        return "it is no JSON object"
    return _left_out(schema) or _refused(text)


def _left_out(schema: dict[str, Any]) -> str | None:
    """Return what xgrammar would leave out, of a schema and those in it."""
    for path, part in _schemas(schema):
        if len(path) > DEEPEST:
            return TOO_DEEP
        if problem := _left_out_of(part):
            return f"{'.'.join(('$', *path))} has {problem}"
    return None


def _refused(text: str) -> str | None:
    """Return why xgrammar refuses a schema."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import StructuredOutputsParams
    from vllm.v1.structured_output.backend_xgrammar import validate_xgrammar_grammar

    try:
        validate_xgrammar_grammar(SamplingParams(structured_outputs=StructuredOutputsParams(json=text)))
    except (ValueError, VLLMValidationError) as error:
        return PLACE.split(str(error))[-1].strip()
    return None


def _schemas(schema: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Yield a schema and all schemas in it, each before those in it, with their paths."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), schema)]
    while waiting:
        path, part = waiting.pop()
        if not isinstance(part, dict):
            # A boolean, or an error that xgrammar reports.
            continue
        yield path, part
        for keyword in (*NAMED, *LISTED, *SINGLE):
            value = part.get(keyword)
            if keyword in SINGLE:
                waiting.append(((*path, keyword), value))
            elif keyword in NAMED and isinstance(value, dict):
                waiting += [((*path, keyword, name), each) for name, each in value.items()]
            elif keyword in LISTED and isinstance(value, list):
                waiting += [((*path, keyword, str(index)), each) for index, each in enumerate(value)]


def _left_out_of(schema: Mapping[str, Any]) -> str | None:
    """Return what xgrammar would leave out of a schema, not counting the schemas in it."""
    used = KNOWN & schema.keys()
    if never := sorted(used & NEVER):
        return f"'{never[0]}', which is not supported; leave it out"
    if deciding := next((keyword for keyword in ALONE if keyword in used), None):
        if others := sorted(used - {deciding}):
            return f"'{others[0]}' beside '{deciding}', which is not supported; keep one of them"
        return _alone(deciding, schema[deciding])
    types = schema.get("type", [name for name, signs in IMPLIES.items() if used.intersection(signs)])
    listed = [str(name) for name in types] if isinstance(types, list) else [str(types)]
    if others := sorted(used.difference(*(OF_TYPE.get(name, ()) for name in listed))):
        return f"'{others[0]}' without the 'type' that it is for; add the type, or leave it out"
    return (_of_string(schema) if "string" in listed else None) or _of_object(schema)


def _alone(keyword: str, value: Any) -> str | None:
    if keyword in LISTED and value == []:
        return f"an empty '{keyword}'; leave it out"
    if keyword == "allOf" and isinstance(value, list) and len(value) > 1:
        return "several schemas in 'allOf', which is not supported; write them as one"
    if keyword == "$ref":
        first, *rest = str(value).split("/")
        if first != "#" or (rest and rest[0] not in (*NAMED, *LISTED, *SINGLE)):
            return f"a '$ref' to {value}; only references into the schema's own '$defs' are supported"
    return None


def _of_string(schema: Mapping[str, Any]) -> str | None:
    from vllm.v1.structured_output.backend_xgrammar import STRING_SUPPORTED_FORMATS

    used = [name for name in ("pattern", "format", "minLength", "maxLength") if name in schema]
    if used[1:] and used != ["minLength", "maxLength"]:
        return f"'{used[1]}' beside '{used[0]}', which is not supported; keep one of them"
    if "format" in schema and str(schema["format"]) not in STRING_SUPPORTED_FORMATS:
        known = ", ".join(sorted(STRING_SUPPORTED_FORMATS))
        return f"the format {schema['format']}, which is not supported; leave it out, or use one of {known}"
    for name in ("minLength", "maxLength"):
        if isinstance(schema.get(name), int) and schema[name] < 0:
            # xgrammar refuses the one when the answer begins, and takes the other for no limit.
            return f"'{name}' below 0; leave it out"
    pattern = str(schema.get("pattern", ""))
    if LOOKAROUND.search(pattern):
        return "a 'pattern' that looks ahead or behind, which is not supported; write it without that"
    if ESCAPED.search(CLASS.sub("", pattern)):
        return (
            "a 'pattern' with a character that JSON escapes (a quote, a backslash or a control character), "
            "which is not supported; write it without that"
        )
    return None


def _of_object(schema: Mapping[str, Any]) -> str | None:
    required, named = schema.get("required"), schema.get("properties", {})
    if not isinstance(required, list) or not isinstance(named, dict):
        # xgrammar reports it.
        return None
    lacking = [name for name in map(str, required) if name not in named]
    return f"'{lacking[0]}' in 'required' that is not in 'properties'; add it there" if lacking else None
