"""The scores of answers, by reasoning-gym, as configured, and by a function of the user's."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from rayft.data import prepared
from rayft.data.example import Example, Message
from rayft.data.prepared import prepare
from rayft.data.section import DataConfig, ScorerConfig
from rayft.data.source import Scorer, read
from rayft.errors import ConfigError, DataError
from tests.unit.data.small_data import config, lines, pairs, task

FUNCTION = """
def half(answer: str, expected: str, question: str) -> float:
    if answer == "raise":
        raise KeyError(answer)
    return {"much": 2, "text": "x", "right": answer == expected, "asked": "box" in question}.get(answer, 0.5)
"""


def test_strict_scores_only_fully_right_answers():
    parts = read(task("chain_sum"))
    example = parts.test[0]
    partial = f"The answer is {example.answer}, I think"
    native = Scorer("chain_sum", parts.scorer.params, strict=False)
    assert 0 < native.score(example, partial) < 1
    assert parts.scorer.score(example, partial) == 0
    assert parts.scorer.score(example, f" {example.answer}\n") == 1
    assert native.score(example, example.answer) == 1


def test_an_answer_for_which_the_scorer_raises_scores_zero_and_is_counted(monkeypatch):
    class Raising:
        def score_answer(self, answer, entry):
            raise ZeroDivisionError

    monkeypatch.setattr("rayft.data.scorer.build_task", lambda *_, **__: Raising())
    scorer = Scorer("chain_sum")
    assert [scorer.score(Example(entry={"answer": "1"}), text) for text in ("1", "2")] == [0.0, 0.0]
    assert scorer.failures == 2


def test_a_used_scorer_can_be_pickled():
    parts = read(task("needle_haystack"))
    assert parts.scorer.score(parts.test[0], parts.test[0].answer) == 1
    pickled = pickle.dumps(parts.scorer)
    assert pickled == pickle.dumps(read(task("needle_haystack")).scorer), "without the data set"
    copy = pickle.loads(pickled)  # noqa: S301  (its own bytes)
    assert copy.score(parts.test[0], parts.test[0].answer) == 1


def test_answers_to_questions_of_files_are_scored_by_exact_match():
    example = Example(messages=(Message("user", "?"), Message("assistant", "Straße")))
    scorer = Scorer()
    assert [scorer.score(example, text) for text in (" STRASSE\n", "Strasse!", "")] == [1.0, 0.0, 0.0]


@pytest.fixture
def function(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(FUNCTION)
    return path


def questions(folder: Path, **scorer: Any) -> DataConfig:
    return config(name=lines(folder / "data.jsonl", pairs(0, 40)), val=5, test=5, scorer=scorer)


def asked(text: str, answer: str) -> Example:
    return Example(messages=(Message("user", text), Message("assistant", answer)))


def test_a_function_scores_and_what_it_gets_wrong_scores_zero_and_is_counted(
    function: Path, tmp_path: Path
) -> None:
    scorer = read(questions(tmp_path, kind="python", function=f"{function}:half")).scorer
    example = asked("Which box?", "right")
    given = {" right ": 1.0, "asked": 1.0, "other": 0.5, "raise": 0.0, "much": 0.0, "text": 0.0}
    assert {answer: scorer.score(example, answer) for answer in given} == given
    assert scorer.failures == 3
    assert scorer.problem == "KeyError: 'raise'"
    # The right answer may be written otherwise than in the data.
    assert scorer.score(example, "right", "wrong") == 0
    copy = pickle.loads(pickle.dumps(scorer))  # noqa: S301  (its own bytes)
    assert copy.score(example, "other") == 0.5


def test_scorers_have_digests_of_their_own(function: Path, tmp_path: Path) -> None:
    kinds: list[dict[str, Any]] = [
        {"kind": "exact"},
        {"kind": "contains"},
        {"kind": "number"},
        {"kind": "number", "tolerance": 0.1},
        {"kind": "python", "function": f"{function}:half"},
    ]
    found = [read(questions(tmp_path, **kind)) for kind in kinds]
    digests = [parts.digest for parts in found]
    assert len(set(digests)) == len(kinds)
    # Data without a scorer has the digest of its examples, as before there were scorers.
    assert digests[0] == read(config(name=str(tmp_path / "data.jsonl"), val=5, test=5)).digest
    assert [one.digests.get("scorer") is None for one in found] == [True, *[False] * 4]
    # The content of the file counts, and not its place.
    moved = tmp_path / "moved.py"
    moved.write_text(FUNCTION)
    assert read(questions(tmp_path, kind="python", function=f"{moved}:half")).digest == digests[-1]
    moved.write_text(FUNCTION + "\n")
    assert read(questions(tmp_path, kind="python", function=f"{moved}:half")).digest not in digests


def test_prepared_data_is_shared_by_scorers_and_has_the_digest_of_each(
    tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared, "SMALL", 0)
    ways: list[dict[str, Any]] = [{"kind": "f1"}, {"kind": "exact"}, {"kind": "json"}]
    found = [prepare(questions(tmp_path, **way), tiny_tokenizer, tmp_path).parts for way in ways]
    assert len([*(tmp_path / "data").glob("*/manifest.json")]) == 1
    assert [parts.scorer.config.kind for parts in found] == ["f1", "exact", "json"]
    assert [parts.digest for parts in found] == [read(questions(tmp_path, **way)).digest for way in ways]


def test_a_function_that_cannot_be_loaded_is_an_error_before_data_is_read(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def half(: pass")
    (tmp_path / "fails.py").write_text("import sys\nsys.exit(3)")
    (tmp_path / "empty.py").write_text("def whole(a, b, c): return 1\nhalf = 3")
    problems = {
        "none.py": "can't be read .No such file",
        "broken.py": "can't be run .SyntaxError",
        "fails.py": "can't be run .SystemExit: 3",
        "empty.py": "has no function 'half'; it has whole",
    }
    for name, problem in problems.items():
        missing = config(
            name=str(tmp_path / "nothing"), scorer={"kind": "python", "function": f"{tmp_path / name}:half"}
        )
        with pytest.raises(DataError, match=problem):
            read(missing)


def test_a_function_that_changes_meanwhile_is_an_error(function: Path, tmp_path: Path) -> None:
    scorer = read(questions(tmp_path, kind="python", function=f"{function}:half")).scorer
    function.write_text(FUNCTION + "\n")
    with pytest.raises(DataError, match=r"own.py has changed since the data was read"):
        scorer.score(asked("?", "1"), "1")


def test_wrong_settings_of_a_scorer_are_refused() -> None:
    problems: dict[str, dict[str, Any]] = {
        "scorer.kind: Input should be 'exact'": {"kind": "bleu"},
        "pattern is missing": {"kind": "regex"},
        "pattern is not a regular expression": {"kind": "regex", "pattern": "(a"},
        "pattern is a setting of kind: regex": {"kind": "f1", "pattern": "a"},
        "tolerance is a setting of kind: number": {"tolerance": 1},
        "function is missing or names no function": {"kind": "python", "function": "own.py"},
        "function is a setting of kind: python": {"function": "own.py:half"},
    }
    for problem, scorer in problems.items():
        with pytest.raises(ConfigError, match=problem):
            config(name="a.jsonl", scorer=scorer)
    with pytest.raises(ConfigError, match="reasoning-gym tasks have scorers of their own"):
        config(source="reasoning_gym", name="chain_sum", train=1, val=1, test=1, scorer={"kind": "f1"})
    with pytest.raises(ConfigError, match="classes are compared as they are"):
        config(name="a.jsonl", format="classification", scorer={"kind": "f1"})


def test_classes_are_not_compared_as_texts(tmp_path: Path) -> None:
    rows = [{"text": f"text {number}", "label": "ab"[number % 2]} for number in range(20)]
    with pytest.raises(DataError, match="classes are compared as they are"):
        read(config(name=lines(tmp_path / "classes.jsonl", rows), val=2, test=2, scorer={"kind": "f1"}))


def test_the_path_of_a_function_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = config(name="a.jsonl", scorer={"kind": "python", "function": "own.py:half"}).located()
    assert found.scorer == ScorerConfig(kind="python", function=f"{tmp_path / 'own.py'}:half")
    assert found.name == str(tmp_path / "a.jsonl")
