"""Tasks through a server in bfloat16 whose context is shorter than its model's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from rayft.flow.evaluate.request import EvaluateRequest
from rayft.flow.evaluate.run import evaluate
from rayft.flow.http import api_url, served_cards
from tests.integration.serving import Base, serving
from tests.unit.flow.evaluate.likelihoods import READ, assert_same, record, with_peft
from tests.unit.flow.evaluate.tasks import save_tasks

pytestmark = [pytest.mark.ray, pytest.mark.slow]

CONTEXT = 64


@dataclass(frozen=True)
class Server:
    url: str
    adapter: str
    """Folder of the adapter that is served as `large`."""


@pytest.fixture(scope="module")
def server(local_ray: None, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    base = Base.read(tiny_folder, tmp_path_factory.mktemp("adapters"))
    folder = base.save("large", base.adapter("large", 8))
    with serving(base, adapters={"large": folder}, dtype="bfloat16", cache_tokens=CONTEXT) as url:
        yield Server(url, folder)


@pytest.fixture
def include(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.chdir(tmp_path)
    return save_tasks(tmp_path / "tasks")


def test_the_log_likelihoods_are_those_of_the_harness_with_peft(
    server: Server, include: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = record(monkeypatch)
    request = EvaluateRequest(("large", "base"), tasks=READ, include=include, url=server.url)
    served = evaluate(request).targets[0]
    theirs = with_peft(include, tiny_folder, server.adapter, torch.bfloat16)
    adapter, plain, peft = read
    assert_same((adapter, served.measures), (peft, theirs), plain, torch.bfloat16)


def test_questions_are_cut_to_the_context_of_the_server(server: Server, include: Path) -> None:
    assert {card["max_model_len"] for card in served_cards(api_url(server.url)).values()} == {CONTEXT}
    rows = [{"q": f"item {number}: " + "and so on " * 20, "gold": number % 2} for number in range(4)]
    (include / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = yaml.safe_load((include / "local_choice.yaml").read_text())
    task |= {"task": "local_long", "doc_to_choice": ["yes", "no"]}
    task["dataset_kwargs"]["data_files"]["test"] = str(include / "long.jsonl")
    (include / "local_long.yaml").write_text(yaml.safe_dump(task))
    tasks = ("local_long", *READ)
    (target,) = evaluate(EvaluateRequest(("large",), tasks=tasks, include=include, url=server.url)).targets
    assert target.measures[0].score.n == 4
