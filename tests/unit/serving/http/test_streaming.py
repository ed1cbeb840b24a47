"""How log-probabilities are written into the answers of completions."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from pydantic import TypeAdapter

from rayft.serving.http.responses import Completion
from rayft.serving.http.streaming import TextForm, collected, events
from rayft.serving.messages import Delta, TokenScore


def scored(text: str, value: float | None, *top: tuple[str, float]) -> TokenScore:
    found = tuple(TokenScore(one, tuple(one.encode()), logprob) for one, logprob in top)
    return TokenScore(text, tuple(text.encode()), value, found)


FIRST = Delta("", 2, 0)
DELTAS = [
    Delta("ab", 2, 0, scores=(scored("a", None), scored("b", -3.0, ("c", -1.0))), offsets=(0, 1)),
    Delta("c", 2, 1, scores=(scored("c", -0.5, ("c", -0.5)),), offsets=(2,)),
    Delta("", 2, 2, "stop", scores=(scored("</s>", -0.25, ("\ufffd", -0.125)),), offsets=(3,)),
]


async def deltas() -> AsyncIterator[Delta]:
    for delta in DELTAS:
        yield delta


def whole() -> dict[str, Any]:
    body = TextForm("m").whole(asyncio.run(collected(deltas())))
    TypeAdapter(Completion).validate_python(body)
    return body


def test_a_token_is_among_the_most_likely_ones_and_the_first_of_a_prompt_has_none() -> None:
    (choice,) = whole()["choices"]
    assert choice["text"] == "abc"
    assert choice["logprobs"] == {
        "tokens": ["a", "b", "c", "</s>"],
        "token_logprobs": [None, -3.0, -0.5, -0.25],
        "top_logprobs": [None, {"c": -1.0, "b": -3.0}, {"c": -0.5}, {"\ufffd": -0.125, "</s>": -0.25}],
        "text_offset": [0, 1, 2, 3],
    }
    assert whole()["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}


def test_of_tokens_with_the_same_text_the_most_likely_one_is_reported() -> None:
    form = TextForm("m")
    one = scored("\ufffd", -4.0, ("\ufffd", -1.0), ("\ufffd", -2.0))
    assert form.scores([one], [0])["top_logprobs"] == [{"\ufffd": -1.0}]


def test_the_chunks_of_a_stream_join_to_the_whole() -> None:
    async def chunks() -> list[str]:
        return [event async for event in events(TextForm("m"), FIRST, deltas(), counts=False)]

    *data, end = asyncio.run(chunks())
    assert end == "data: [DONE]\n\n"
    parts = [json.loads(event.removeprefix("data: "))["choices"][0] for event in data]
    assert "".join(part["text"] for part in parts) == "abc"
    (choice,) = whole()["choices"]
    for name, values in choice["logprobs"].items():
        assert [value for part in parts for value in part["logprobs"][name]] == values
