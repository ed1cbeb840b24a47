"""The differences of two identities, as sentences."""

from __future__ import annotations

import pytest

from rayft.identity import UNKNOWN, Identity

BEFORE = Identity(
    rayft="0.2.0", config="c", data="d", base="b", start="s", fingerprint="f",
    parts={"train": "1", "val": "2", "test": "3"}, files={"config.json": "4", "model.safetensors": "5"},
)  # fmt: skip


def now(**changes: object) -> Identity:
    names = {"data_name": "/data/questions.jsonl", "base_name": "/models/base", "start_name": "/adapters/one"}
    return BEFORE.model_copy(update={**names, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"config": "x"}, "the configuration has changed (hash c, now x)"),
        (
            {"data": "x", "parts": {**BEFORE.parts, "test": "x"}},
            "the data has changed: /data/questions.jsonl (test) had the digest d, now x",
        ),
        (
            {"data": "x", "rayft": "0.3.0", "parts": {}},
            "the data has changed: /data/questions.jsonl had the digest d, now x (or rayft reads it "
            "differently now: that was 0.2.0, this is 0.3.0)",
        ),
        (
            {
                "base": "x",
                "files": {"config.json": "4", "model.safetensors": "9", "chat_template.jinja": "1"},
            },
            "the base has changed: /models/base is not what it was in chat_template.jinja, model.safetensors "
            "(hash b, now x)",
        ),
        (
            {"base": "", "fingerprint": "x"},
            "the base has changed: the weights of /models/base had the fingerprint f, now x",
        ),
        ({"start": "x"}, "/adapters/one has changed (content s, now x)"),
    ],
)
def test_a_difference_is_described(changes: dict[str, object], said: str) -> None:
    assert BEFORE.differences(now(**changes)) == [said]
    assert BEFORE.brief.differences(now(**changes))


def test_all_differences_are_described() -> None:
    assert len(BEFORE.differences(now(config="x", data="x", base="x", start="x"))) == 4


def test_unknown_fields_and_names_are_not_compared() -> None:
    assert BEFORE.differences(now(rayft="9", parts={}, files={})) == []
    assert BEFORE.differences(UNKNOWN) == UNKNOWN.differences(BEFORE) == []
    assert BEFORE.of_data().differences(now(base="x", fingerprint="x", config="x")) == []
    assert BEFORE.of_data().differences(now(data="x")) != []


def test_keys_depend_on_data_and_base_only() -> None:
    assert BEFORE.inputs == now(config="x", start="x", fingerprint="x").inputs
    assert (
        len({BEFORE.inputs, now(data="x").inputs, now(base="x").inputs, now(data="db", base="").inputs}) == 4
    )
