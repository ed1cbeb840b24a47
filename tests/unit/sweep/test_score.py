"""Scoring leaves the base and its head unchanged, and says for how many answers the scorer failed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rayft.artifacts import AdapterArtifact, ArtifactMeta
from rayft.config import parse
from rayft.evaluate import tasks
from rayft.methods.base import MethodConfig
from rayft.models.inject import clear, export, inject
from rayft.sweep import score as score_module
from rayft.sweep.score import (
    MOST_TOGETHER,
    TOGETHER,
    ScoreRequest,
    questions,
    room,
    run_score,
    sample,
    score_together,
)
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


def test_adapters_and_the_base_share_batches(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYFT_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"{i}+{i * 3 % 7}=", "completion": str(i + i * 3 % 7)} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = parse(
        RunConfig,
        {
            "model": {"name": str(tiny_folder)},
            "data": {"source": "jsonl", "name": str(tmp_path / "rows.jsonl"), "val": 7, "test": 5},
            "scale": {"device": "cpu", "dtype": "float32", "zero": 0, "threads": 1},
            "evaluate": {"batch_size": 9},
        },
    )
    session = Session.open(run, Worker())
    model, folders = session.loaded.model, dict[str, str]()
    for number, method in enumerate((MethodConfig(rank=2), MethodConfig(name="cla", rank=5))):
        inject(model, method, seed=number)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, 0.3)
        place = export(model, ArtifactMeta(method=method.name)).save(tmp_path / method.name)
        folders[method.name] = str(place)
        clear(model)
    requests = {
        "base": ScoreRequest(run, ("val", "test"), examples=4),
        "lora": ScoreRequest(run, ("test",), folders["lora"]),
        "few": ScoreRequest(run, ("val",), style="few_shot"),
        "cla": ScoreRequest(run, ("val", "test"), folders["cla"]),
    }
    answered: dict[str, list[str]] = {}
    real = score_module.score_answers

    def score_answers(examples: Any, answers: list[str], *rest: Any) -> Any:
        answered.setdefault("together", []).extend(answers)
        return real(examples, answers, *rest)

    monkeypatch.setattr(score_module, "score_answers", score_answers)
    adapters = {
        key: AdapterArtifact.load(one.adapter) if one.adapter else None for key, one in requests.items()
    }
    done: list[int] = []
    rendered: list[object] = []
    render = score_module.prompt_ids
    monkeypatch.setattr(
        score_module, "prompt_ids", lambda *given: rendered.append(given[0]) or render(*given)
    )
    together = score_together(requests, adapters, session, print, done.append)
    # Both adapters are asked the test part as it is.
    assert len(rendered) == sum(done) - 5
    assert sum(done) == sum(questions(one, session) for one in requests.values()) == 4 + 4 + 5 + 7 + 12
    real_answers = tasks.answer

    def answer(*arguments: Any) -> list[str]:
        found = real_answers(*arguments)
        answered.setdefault("alone", []).extend(found)
        return found

    monkeypatch.setattr(tasks, "answer", answer)
    for key, request in requests.items():
        assert run_score(request, session) == together[key]
    assert answered["together"] == answered["alone"]
    # The adapters answer otherwise than the base, and than one another.
    assert len({*answered["alone"]}) > 6


def test_a_batch_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def answer(_model: Any, _tokenizer: Any, prompts: Any, _new: int, batch: int, count: Any, _: Any) -> Any:
        tried.append(batch)
        count(3)
        if batch > 2:
            raise torch.OutOfMemoryError
        return ["yes"] * len(prompts)

    monkeypatch.setattr(score_module, "answer", answer)
    session: Any = SimpleNamespace(loaded=SimpleNamespace(model=None, tokenizer=None))
    done: list[int] = []
    packed: Any = None
    assert score_module._answers(session, [[1]] * 3, 4, 7, packed, done.append) == ["yes"] * 3
    assert tried == [7, 4, 2]
    assert sum(done) == 3


@pytest.mark.parametrize(("free", "questions"), [(0, TOGETHER), (10**9, 1831), (10**12, MOST_TOGETHER)])
def test_a_gpu_takes_up_as_many_questions_as_fit(
    monkeypatch: pytest.MonkeyPatch, free: int, questions: int
) -> None:
    config = SimpleNamespace(
        num_key_value_heads=2, num_attention_heads=4, hidden_size=64, num_hidden_layers=4
    )
    config.get_text_config = lambda: config
    model = SimpleNamespace(config=config, dtype=torch.bfloat16)
    val = [SimpleNamespace(input_ids=(0,) * length) for length in (80, 320)]
    session: Any = SimpleNamespace(worker=Worker(device="cuda"), loaded=SimpleNamespace(model=model), val=val)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 2 * free))
    # A token of 4 layers with 2 heads of 16: 512 bytes.
    assert room(session, 50) == questions
