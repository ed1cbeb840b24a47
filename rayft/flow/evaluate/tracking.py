"""Track an evaluation: in a run of its own."""

from __future__ import annotations

import hashlib
import math
import uuid
from collections.abc import Mapping
from pathlib import Path

from rayft.flow.evaluate.record import Evaluation
from rayft.tracking.base import Tracker

__all__ = ["evaluation_key", "track_evaluation"]


def evaluation_key(found: Evaluation, settings: Mapping[str, str]) -> str:
    """Return what identifies an evaluation: a hash (16 hex digits) of what its scores follow from.

    What a server serves under a name may be replaced. If a server does not say what it is, each evaluation
    has a key of its own.

    Args:
        found: the evaluation.
        settings: the configuration: leaf → value.
    """
    same = [found.base, found.data, *(f"{one.name} {one.content} {one.base}" for one in found.targets)]
    same += sorted(f"{key}={value}" for key, value in settings.items())
    if not all(one.base for one in found.targets):
        same.append(uuid.uuid4().hex)
    return hashlib.sha256("\0".join(same).encode()).hexdigest()[:16]


def track_evaluation(
    tracker: Tracker,
    found: Evaluation,
    key: str,
    settings: Mapping[str, str],
    parent: str | None,
    out: Path | None,
) -> str:
    """Track an evaluation, and return the id of its run. The same evaluation again has the same run.

    Args:
        tracker: where to track it.
        found: the evaluation.
        key: from `evaluation_key`.
        settings: the configuration: leaf → value.
        parent: id of the run that trained the first target; None if that is not tracked.
        out: file of the result, which stays there; None if there is none.
    """
    names = " and ".join(target.name for target in found.targets)
    run = tracker.run(f"eval {names}", f"eval-{key}", parent=parent, tags={"rayft.kind": "evaluation"})
    described = {"base": found.base, "data_digest": found.data} if found.data else {"base": found.base}
    for prefix, target in zip(("", "other_"), found.targets, strict=False):
        described |= {
            f"{prefix}target": target.name,
            f"{prefix}target_hash": target.content or "none",
            f"{prefix}target_base": target.base or "unknown",
        }
    tracker.params(run, {**settings, **described})
    tracker.metrics(run, {name: value for name, value in _numbers(found).items() if math.isfinite(value)})
    if out is not None:
        tracker.artifact(run, out)
    tracker.finish(run, "finished")
    return run


def _numbers(found: Evaluation) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for prefix, target in zip(("", "other_"), found.targets, strict=False):
        for one in target.measures:
            name, score = f"{prefix}{one.task}/{_plain(one.metric)}", one.score
            numbers |= {name: score.value, f"{name}_low": score.low, f"{name}_high": score.high}
        if target.loss is not None:
            numbers[f"{prefix}loss"] = target.loss
    for both in found.differences:
        name = f"difference/{both.task}/{_plain(both.metric)}"
        numbers |= {
            name: both.value,
            f"{name}_low": both.low,
            f"{name}_high": both.high,
            f"{name}_p": both.p_value,
        }
    return numbers


def _plain(metric: str) -> str:
    """Return the name of a metric without the parentheses, which MLflow refuses."""
    return metric.replace("(", "").replace(")", "").replace(",", "-")
