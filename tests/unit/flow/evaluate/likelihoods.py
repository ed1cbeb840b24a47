"""Log-likelihoods of single requests, and the harness's own way to an adapter, to compare them with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM

from rayft.flow.evaluate.harness import Harness, Prompts
from rayft.flow.evaluate.record import Measure
from rayft.numerics import assert_close

__all__ = ["LAYERS", "PROMISED", "READ", "assert_same", "record", "with_peft"]

READ = ("local_choice", "local_text")
"""Tasks of `save_tasks` whose requests are log-likelihoods."""
LAYERS = 2
"""Layers of the tiny model. Each rounds the sum that it passes on."""
PROMISED = 1e-3
"""By how many nats the log-likelihood of a request may differ in float32, as the documentation says."""


def record(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Return a list that grows by the log-likelihoods of all requests (nats) with each run of tasks."""
    found: list[torch.Tensor] = []
    run = lm_eval.simple_evaluate

    def recorded(**options: Any) -> Any:
        result: Any = run(**options)
        rows = [
            row
            for task in READ
            for row in sorted(result["samples"][task], key=lambda row: int(row["doc_id"]))
        ]
        found.append(torch.tensor([_value(one[0]) for row in rows for one in row["resps"]]).double())
        return result

    monkeypatch.setattr(lm_eval, "simple_evaluate", recorded)
    return found


def _value(response: Any) -> float:
    """Return the log-likelihood of a response, beside which some tasks say whether it is the likeliest."""
    return float(response[0] if isinstance(response, tuple | list) else response)


def with_peft(include: Path, model: Path, adapter: str, dtype: torch.dtype) -> tuple[Measure, ...]:
    """Run the tasks on an adapter that lm_eval loads itself, by PEFT, and return their metrics."""
    kind = str(dtype).removeprefix("torch.")
    asked = HFLM(pretrained=str(model), peft=adapter, dtype=kind, device="cpu", batch_size=4)
    return Harness(READ, include, Prompts()).run(asked, None)[0]


def assert_same(
    found: tuple[torch.Tensor, tuple[Measure, ...]],
    expected: tuple[torch.Tensor, tuple[Measure, ...]],
    other: torch.Tensor,
    dtype: torch.dtype,
) -> None:
    """Assert that two ways to a model give the same log-likelihoods and metrics.

    In float32, no request may differ by `PROMISED`, and no choice at all. In bfloat16 a choice between
    nearly equal answers may differ, so each share of right choices has to lie in the interval of the other.

    Args:
        found: log-likelihoods of the requests, and the metrics of the tasks.
        expected: the same by the other way.
        other: log-likelihoods of another model, which have to differ by more than rounding explains.
        dtype: of the weights and the arithmetic.
    """
    (values, measures), (wanted, theirs) = found, expected
    depth = 4 if dtype == torch.float32 else LAYERS
    assert_close(values, wanted, dtype, 64, depth)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(other, wanted, dtype, 64, depth)
    assert [(one.task, one.metric) for one in measures] == [(one.task, one.metric) for one in theirs]
    choices = [(one, same) for one, same in zip(measures, theirs, strict=True) if one.values]
    assert [one.task for one, _ in choices] == ["local_choice"]
    for one, same in choices:
        assert one.score.low <= same.score.value <= one.score.high
        assert same.score.low <= one.score.value <= same.score.high
    if dtype == torch.float32:
        assert float((values - wanted).abs().max()) < PROMISED
        assert all(one.values == same.values for one, same in choices)
    scores = [
        torch.tensor([one.score.value for one in side if not one.values]) for side in (measures, theirs)
    ]
    assert_close(scores[0], scores[1], dtype, 64, depth)
