"""Compare an answer with the right one: the ways that `data.scorer` offers, except the user's own function.

Each function takes the answer, the right answer and the settings, and returns a score from 0 to 1. Both texts
have lost the whitespace around them.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

from rayft.data.section import ScorerConfig

__all__ = ["ANSWER_SCORES", "last_number"]

_NUMBER = re.compile(
    r"(?P<sign>(?<![^\W_])[-+−])?"
    # No digits within a word (`x2`) or a number (the `15` of 3.14.15).
    r"(?:(?<![^\W_])(?<!\d\.)"
    r"(?P<whole>\d{1,3}(?:[,'’_\u00a0\u2009\u202f]\d{3})+(?!\d)|\d+)(?P<decimals>\.\d+)?"
    r"|(?<![\w.])(?P<bare>\.\d+))"
    r"(?P<power>[eE][-+]?\d{1,3}(?!\d))?"
)
"""A number: a sign, digits that may be grouped by thousands, decimals after a point, a power of ten."""

_FENCE = re.compile(r"```[\w-]*\n(.*)\n```", re.DOTALL)
"""A block of code in Markdown."""


def _exact(answer: str, expected: str, _: ScorerConfig) -> float:
    return float(answer.casefold() == expected.casefold())


def _contains(answer: str, expected: str, config: ScorerConfig) -> float:
    # An empty text is contained in any.
    return float(expected.casefold() in answer.casefold()) if expected else _exact(answer, expected, config)


def _regex(answer: str, expected: str, config: ScorerConfig) -> float:
    found = _matched(answer, config.pattern)
    if found is None:
        return 0.0
    right = _matched(expected, config.pattern)
    return _exact(found.strip(), (expected if right is None else right).strip(), config)


def _matched(text: str, pattern: str) -> str | None:
    """Return the first group of the first match, or the whole match; None if there is no match."""
    found = re.search(pattern, text)
    if found is None:
        return None
    return found[min(1, found.re.groups)] or ""


def _number(answer: str, expected: str, config: ScorerConfig) -> float:
    found, right = last_number(answer), last_number(expected)
    if found is None or right is None:
        return 0.0
    return float(found == right or abs(found - right) <= Decimal(str(config.tolerance)))


def last_number(text: str) -> Decimal | None:
    """Return the last number in a text; None if there is none.

    Thousands may be separated by commas, apostrophes, underscores or narrow spaces: 1,234.5 is one number,
    and the last number in 1,2 is 2.
    """
    found = None
    for match in _NUMBER.finditer(text):
        found = match
    if found is None:
        return None
    whole = re.sub(r"\D", "", found["whole"] or "0")
    digits = whole + (found["decimals"] or found["bare"] or "") + (found["power"] or "")
    return -Decimal(digits) if found["sign"] in ("-", "−") else Decimal(digits)


def _f1(answer: str, expected: str, _: ScorerConfig) -> float:
    found, right = _squad_words(answer), _squad_words(expected)
    common = sum((Counter(found) & Counter(right)).values())
    return _harmonic(common, found, right)


def _squad_words(text: str) -> list[str]:
    """Return the words of a text as SQuAD's evaluation compares them (Rajpurkar et al., EMNLP 2016)."""
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def _rouge_l(answer: str, expected: str, _: ScorerConfig) -> float:
    found, right = _rouge_words(answer), _rouge_words(expected)
    return _harmonic(_common_subsequence(found, right), found, right)


def _rouge_words(text: str) -> list[str]:
    # The package rouge-score keeps a-z and 0-9 alone, so that other alphabets would always score 0.
    return re.findall(r"[^\W_]+", text.lower())


def _common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Return the length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for word in one:
        before = row
        row = [0]
        for place, second in enumerate(other):
            row.append(before[place] + 1 if word == second else max(row[place], before[place + 1]))
    return row[-1]


def _harmonic(common: int, found: Sequence[str], right: Sequence[str]) -> float:
    """Return the F1 score of words in common; if a text has no words, whether both have none."""
    if not found or not right:
        return float(len(found) == len(right))
    return 2 * common / (len(found) + len(right))


def _json(answer: str, expected: str, _: ScorerConfig) -> float:
    try:
        return float(_same(_parsed(answer), _parsed(expected)))
    except (ValueError, RecursionError):
        return 0.0


def _parsed(text: str) -> Any:
    """Parse JSON, which may stand in a block of code.

    Raises:
        ValueError: if it is not JSON.
    """
    block = _FENCE.search(text)
    return json.loads(block[1] if block else text, parse_float=Decimal)


def _same(one: Any, other: Any) -> bool:
    """Return whether two values of JSON are equal: 1 is 1.0, but not true; the order of keys is free."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


ANSWER_SCORES: dict[str, Callable[[str, str, ScorerConfig], float]] = {
    "exact": _exact,
    "contains": _contains,
    "regex": _regex,
    "number": _number,
    "f1": _f1,
    "rouge_l": _rouge_l,
    "json": _json,
}
"""Kind of `ScorerConfig` → function of the answer, the right answer and the settings."""
