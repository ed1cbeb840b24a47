"""Read the JSON body of a request and refuse what could do harm further inside.

What passes is plain JSON: UTF-8, valid Unicode in every key and text, no key twice in an object, numbers that
fit 64 bits, and a bounded depth. So no later step (pickling a request for a replica, tokenizing it, writing
its text into an error or a log) can fail on the encoding, the depth or the size of a value.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NoReturn

from rayft.config import lone_surrogate
from rayft.errors import BadRequestError

__all__ = ["MAX_DEPTH", "read_json", "where"]

MAX_DEPTH = 32
"""Objects and arrays within one another."""

LONGEST_NUMBER = 400
"""Characters of a number: more than the longest 64-bit float has when it is written out."""


def where(path: Sequence[str | int]) -> str:
    """Write the place of a value in the body as clients write it: `messages[0].content`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text


def read_json(body: bytes) -> dict[str, Any]:
    """Parse a body into an object.

    Raises:
        BadRequestError: if it is not one, naming the place of the value that is refused.
    """
    try:
        data = json.loads(
            # RFC 8259 allows UTF-8 alone; `json.loads` would guess UTF-16, and let encoded surrogates pass.
            body.decode("utf-8-sig"),
            parse_int=_integer,
            parse_constant=_no_constant,
            object_pairs_hook=_object,
        )
    except UnicodeDecodeError as error:
        raise BadRequestError(
            f"the body is not valid JSON: it is not UTF-8 (byte {error.start}: {error.reason})"
        ) from error
    except RecursionError as error:
        raise BadRequestError(_too_deep("the body")) from error
    except ValueError as error:
        raise BadRequestError(f"the body is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        kinds = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
        raise BadRequestError(f"the body must be a JSON object, not {kinds.get(type(data), 'a number')}")
    _check(data, [])
    return data


def _integer(digits: str) -> int | float:
    # Infinity stands for what is too large; `_check`, which knows its place, refuses it.
    return int(digits) if len(digits) <= LONGEST_NUMBER else math.inf


def _no_constant(name: str) -> NoReturn:
    raise BadRequestError(f"the body is not valid JSON: {name} is no JSON number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise BadRequestError(f"the key {twice!a} is given twice in one object; give it once")
    return found


def _check(value: object, path: list[str | int]) -> None:
    """Check a value and all that is in it."""
    if isinstance(value, str):
        _check_text(value, path)
    elif isinstance(value, dict | list):
        if len(path) >= MAX_DEPTH:
            raise BadRequestError(_too_deep(f"'{where(path[:1])}'"), param=where(path[:1]))
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(key, str):
                _check_text(key, path, "a key of ")
            # Most values of long arrays are token ids, for which a call each would take longest.
            if type(inner) is not int or not -(2**63) <= inner < 2**63:
                _check(inner, [*path, key])
    elif isinstance(value, int | float):
        fits = math.isfinite(value) if isinstance(value, float) else -(2**63) <= value < 2**63
        if not fits:
            raise BadRequestError(f"'{where(path)}' is a number that does not fit 64 bits", param=where(path))


def _check_text(text: str, path: Sequence[str | int], what: str = "") -> None:
    if problem := lone_surrogate(text):
        place = where(path)
        named = f"'{place}'" if place else "the body"
        raise BadRequestError(f"{what}{named} is not valid Unicode: {problem}", param=place or None)


def _too_deep(what: str) -> str:
    return f"{what} is nested more than {MAX_DEPTH} levels deep"
