"""A server in bfloat16, whose scores on tasks are those of the harness with PEFT up to rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rayft.flow.evaluate.request import EvaluateRequest
from rayft.flow.evaluate.run import evaluate
from tests.integration.serving import Base, serving
from tests.unit.flow.evaluate.likelihoods import READ, assert_same, record, with_peft
from tests.unit.flow.evaluate.tasks import save_tasks

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_the_log_likelihoods_are_those_of_the_harness_with_peft(
    local_ray: None, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.chdir(tmp_path)
    include, read = save_tasks(tmp_path / "tasks"), record(monkeypatch)
    base = Base.read(tiny_folder, tmp_path / "adapters")
    folder = base.save("large", base.adapter("large", 8))
    with serving(base, adapters={"large": folder}, dtype="bfloat16") as url:
        served = evaluate(EvaluateRequest(("large", "base"), tasks=READ, include=include, url=url)).targets[0]
    theirs = with_peft(include, tiny_folder, folder, torch.bfloat16)
    adapter, plain, peft = read
    assert_same((adapter, served.measures), (peft, theirs), plain, torch.bfloat16)
