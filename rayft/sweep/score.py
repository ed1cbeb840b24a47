"""Scoring an adapter, or the base, on parts of the data: what a lane does when it doesn't train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray
import torch.distributed as dist

from rayft.data.source import Example
from rayft.evaluate.tasks import score
from rayft.identity import UNKNOWN, Identity
from rayft.models.inject import attach, clear
from rayft.peft.folder import load_adapter
from rayft.train.context import Session
from rayft.train.run import RunConfig

__all__ = ["ScoreRequest", "run_score", "spread"]


@dataclass(frozen=True)
class ScoreRequest:
    """Score an adapter (or the base) on parts of the data."""

    run: str
    """The `RunConfig` as JSON: base, data and evaluation settings."""
    parts: tuple[Literal["val", "test"], ...]
    adapter: str | None = None
    """Adapter folder; the base alone where not given."""
    style: Literal["as_is", "answer_only", "few_shot"] = "as_is"
    expected: Identity = UNKNOWN
    """Data and base, as the client has read them."""

    def __call__(self, session: Session, run: RunConfig) -> dict[str, Any]:
        """Score, as a lane's work (all workers call it)."""
        return {"scores": run_score(self, session, run)}


def run_score(request: ScoreRequest, session: Session, run: RunConfig) -> dict[str, list[float]]:
    """Give each example's score, part by part, in the order of the data (all workers call it)."""
    model, worker = session.loaded.model, session.worker
    if request.adapter is None:
        clear(model)
    else:
        attach(model, load_adapter(session.home.local(request.adapter)))
    model.eval()
    found: dict[str, list[float]] = {}
    try:
        for part in request.parts:
            examples: Sequence[Example] = getattr(session.parts, part)
            mine = examples[worker.rank :: worker.world]
            values = _score(mine, request, session, run)
            found[part] = _gather(values, len(examples), session)
    finally:
        clear(model)
    return found


def spread() -> bool:
    """Whether the joined cluster has several nodes, which see each other's files only by agreement."""
    return len([node for node in ray.nodes() if node["Alive"]]) > 1


def _score(
    examples: Sequence[Example], request: ScoreRequest, session: Session, run: RunConfig
) -> list[float]:
    if not examples:
        return []
    scores = score(
        session.loaded.model,
        session.loaded.tokenizer,
        examples,
        session.parts.scorer,
        style=request.style,
        shots=session.parts.train[: run.evaluate.shots],
        max_new_tokens=run.evaluate.max_new_tokens,
        batch_size=run.evaluate.batch_size,
    )
    return list(scores.values)


def _gather(values: list[float], total: int, session: Session) -> list[float]:
    """Put the workers' shares back into the order of the data."""
    world = session.worker.world
    if world == 1:
        return values
    shares: list[Any] = [None] * world
    dist.all_gather_object(shares, values)
    return [shares[index % world][index // world] for index in range(total)]
