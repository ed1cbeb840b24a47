"""Tasks of lm-evaluation-harness through the server have the scores that they have in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from mlflow.entities import Run

from rayft.artifacts import AdapterArtifact
from rayft.errors import ModelError, ResourceError
from rayft.flow.evaluate.harness import Harness
from rayft.flow.evaluate.record import Evaluation
from rayft.flow.evaluate.request import EvaluateRequest
from rayft.flow.evaluate.run import evaluate
from rayft.numerics import assert_close
from rayft.tracking import TrackerSpec
from tests.integration.one_server.server import Server
from tests.integration.serving import HEADERS
from tests.unit.flow.evaluate.likelihoods import READ, assert_same, record, with_peft
from tests.unit.flow.evaluate.tasks import TASKS, save_tasks

pytestmark = [pytest.mark.ray, pytest.mark.slow]


FLOAT32 = ("scale.dtype=float32", "scale.device=cpu", "scale.threads=1")


@pytest.fixture
def include(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYFT_KEY", HEADERS["Authorization"].removeprefix("Bearer "))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.chdir(tmp_path)
    return save_tasks(tmp_path / "tasks")


def run(include: Path, *targets: str, tasks: tuple[str, ...] = TASKS, **options: Any) -> Evaluation:
    return evaluate(EvaluateRequest(targets, tasks=tasks, include=include, **options))


def test_the_server_and_peft_give_the_same_scores(restored: Server, include: Path, tiny_folder: Path) -> None:
    names = {"base": str(tiny_folder), "large": restored.adapters["large"]}
    own = {"base": str(tiny_folder), "overrides": FLOAT32}
    served = run(include, *names, url=f"{restored.url}/v1").targets
    here = run(include, *names.values(), **own).targets
    low = run(include, "squeezed@r2", url=f"{restored.url}/v1").targets
    low_here = run(include, restored.adapters["squeezed"], rank=2, **own).targets
    for one, other in zip((*served, *low), (*here, *low_here), strict=True):
        assert [(m.task, m.metric) for m in one.measures] == [(m.task, m.metric) for m in other.measures]
        assert [m.values for m in one.measures] == [m.values for m in other.measures]
        values = [torch.tensor([m.score.value for m in side.measures]) for side in (one, other)]
        assert_close(values[0], values[1], torch.float32, 64, 4)
    bits = [target.measures[1].score.value for target in (*served, *low)]
    assert len(set(bits)) == 3


def test_the_log_likelihoods_are_those_of_the_harness_with_peft(
    restored: Server, include: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = record(monkeypatch)
    served = run(include, "large", "base", url=restored.url, tasks=READ).targets[0]
    theirs = with_peft(include, tiny_folder, restored.adapters["large"], torch.float32)
    adapter, base, peft = read
    assert_same((adapter, served.measures), (peft, theirs), base, torch.float32)


def test_the_chat_template_is_the_same_on_both_ways(
    restored: Server, include: Path, tiny_folder: Path
) -> None:
    said: dict[str, Any] = {"chat_template": True, "system": "Be kind", "tasks": ("local_one", "local_gen")}
    large = restored.adapters["large"]
    (here,) = run(include, large, base=str(tiny_folder), overrides=FLOAT32, **said).targets
    # The base of a configuration, and the prompts of a request.
    named = (f"model.name={tiny_folder}", "evaluate.batch_size=2")
    (served,) = run(include, "large", url=restored.url, overrides=named, **said).targets
    assert served.answers == here.answers
    assert repr(served.measures) == repr(here.measures)
    assert served.answers[0].question.startswith("<|im_start|>system\nBe kind")
    plain = run(include, "large", url=f"{restored.url}/v1", tasks=("local_one", "local_gen")).targets[0]
    assert plain.answers != served.answers


def test_an_adapter_replaced_under_its_name_is_another_evaluation(
    restored: Server, include: Path, spec: TrackerSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, url = MlflowClient(spec.uri), restored.url

    def evaluated(*targets: str) -> Evaluation:
        return run(include, *targets, url=url, tasks=("local_choice",), uri=spec.uri)

    def runs() -> list[Run]:
        return list(client.search_runs([spec.experiment_id]))

    def hashes() -> set[str]:
        return {one.data.params["target_hash"] for one in runs()}

    def load(source: str, weight: float = 1.0) -> None:
        body = {"name": "still", "source": source, "weight": weight}
        assert restored.call("POST", "/v1/adapters", json=body).is_success

    first = evaluated("still").targets[0]
    assert evaluated("still").targets[0] == first
    assert evaluated("still@1").targets[0].content == first.content
    assert first.content == AdapterArtifact.load(restored.adapters["still"]).content_hash
    assert first.base == restored.base.fingerprint
    assert len(runs()) == 2
    load(restored.adapters["squeezed"], 0.5)
    with pytest.raises(ModelError, match=r"two versions under 'still', .*: name still@1 or still@2"):
        evaluated("still")
    load(restored.adapters["large"])
    assert evaluated("still").targets[0].content != first.content
    assert len(runs()) == 3
    assert len(hashes()) == 2
    low, whole = evaluated("squeezed@r2", "squeezed").targets
    assert low.content == f"{whole.content}@r2"
    for name, problem in (
        ("squeezed@r7", "has rank 6"),
        ("large@r2", "never squeezed"),
        ("large@champion", "aliases of large are 1"),
    ):
        with pytest.raises(ModelError, match=problem):
            evaluated(name)
    swap = Harness.run

    def swapped(*arguments: Any) -> Any:
        load(restored.adapters["middle"])
        return swap(*arguments)

    monkeypatch.setattr(Harness, "run", swapped)
    with pytest.raises(ResourceError, match="has replaced what it serves as 'still': evaluate again"):
        evaluated("still")
    assert len(runs()) == 4


def test_a_server_that_does_not_serve_the_target_is_an_error(
    restored: Server, include: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match=r"does not serve 'larg'; did you mean 'large'"):
        run(include, "larg", url=f"{restored.url}/v1")
    with pytest.raises(ModelError, match="no model 'nobody'"):
        run(include, "large", url=f"{restored.url}/v1", base="nobody")
    monkeypatch.setenv("RAYFT_KEY", "wrong")
    with pytest.raises(ResourceError, match=r"refuses \(401\).*RAYFT_KEY"):
        run(include, "large", url=f"{restored.url}/v1")
