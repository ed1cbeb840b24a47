"""Scoring leaves the base and its head unchanged, and says for how many answers the scorer failed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rayft.artifacts import ArtifactMeta
from rayft.config import parse
from rayft.methods.base import MethodConfig
from rayft.models.inject import clear, export, inject
from rayft.sweep.score import ScoreRequest, run_score, sample
from rayft.train.home import Home
from rayft.train.run import RunConfig
from rayft.train.session import Session
from rayft.train.worker import Worker


@pytest.mark.parametrize("method", ["lora", "peft:DoRA"])
def test_the_base_is_scored_with_its_own_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path / "cache"))
    rows = [{"text": f"{letter}{number:03d}", "label": letter} for letter in "ab" for number in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = "sequence_classification"
    run = parse(
        RunConfig,
        {
            "model": {"name": "tiny-bert", "task": task, "num_labels": 2},
            "data": {"source": "jsonl", "name": str(tmp_path / "rows.jsonl"), "val": 10, "test": 10},
            "scale": {"device": "cpu", "dtype": "float32", "zero": 0, "threads": 1},
        },
    )
    session = Session.open(run, Worker())

    def scored(adapter: str | None) -> list[float]:
        return run_score(ScoreRequest(run, ("val",), adapter), session)["val"]

    base, model = scored(None), session.loaded.model
    inject(model, MethodConfig(name=method, rank=2), seed=0)
    for parameter in model.get_submodule("classifier").parameters():
        parameter.data.neg_()
    folder = export(model, ArtifactMeta(method=method, task=task)).save(tmp_path / "adapter")
    clear(model)
    assert scored(str(folder)) == [1 - value for value in base]
    assert scored(None) == base
    # Of a sample, each example's score is that which it has among all, and the numbers of those done rise.
    done: list[tuple[int, int]] = []
    request = ScoreRequest(run, ("val", "test"), examples=4)
    few = run_score(request, session, progress=lambda *counts: done.append(counts))
    assert few["val"] == [base[0], base[2], base[5], base[7]]
    assert done == [(4, 8), (8, 8)]


@pytest.mark.parametrize(
    ("total", "most", "found"), [(5, None, [0, 1, 2, 3, 4]), (5, 9, [0, 1, 2, 3, 4]), (7, 3, [0, 2, 4])]
)
def test_a_sample_has_equal_distances(total: int, most: int | None, found: list[int]) -> None:
    assert sample(total, most) == found


def test_answers_for_which_the_scorer_raises_are_reported(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"box {number}?", "completion": "5"} for number in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "own.py").write_text("def grade(answer, expected, question): return len(answer) and None")
    scorer = {"kind": "python", "function": f"{tmp_path / 'own.py'}:grade"}
    data = {"source": "jsonl", "name": str(tmp_path / "rows.jsonl"), "val": 4, "test": 4, "scorer": scorer}
    run = parse(
        RunConfig,
        {
            "model": {"name": str(tiny_folder)},
            "data": data,
            "scale": {"device": "cpu", "dtype": "float32", "zero": 0, "threads": 1},
            "evaluate": {"max_new_tokens": 2},
        },
    )
    said: list[str] = []

    class Remote(Home):
        """The file of the function is elsewhere on this node."""

        def local(self, path: str | Path) -> Path:
            return tmp_path / "there.py" if Path(path).name == "own.py" else Path(path)

    (tmp_path / "own.py").rename(tmp_path / "there.py")
    session = Session.open(run, Worker(), Remote())
    found = run_score(ScoreRequest(run, ("val",)), session, said.append)
    assert found == {"val": [0.0] * 4}
    assert said == [
        "base, val: the scorer raised an error for 4 of 4 answers, which score 0; the first: TypeError: "
        "float() argument must be a string or a real number, not 'NoneType'"
    ]
