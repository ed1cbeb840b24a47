"""A job that scores an adapter, or the base, on parts of the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import ray
import torch.distributed as dist

from rayft.data.source import Example
from rayft.evaluate.tasks import score
from rayft.identity import UNKNOWN, Identity
from rayft.models.inject import attach, clear
from rayft.peft.folder import load_adapter
from rayft.train.run import RunConfig
from rayft.train.session import Session

if TYPE_CHECKING:
    from rayft.sweep.lane import Lane

__all__ = ["ScoreRequest", "failures_text", "run_score", "sample", "spread"]


@dataclass(frozen=True)
class ScoreRequest:
    """Score an adapter, or the base alone, on parts of the data."""

    kind: ClassVar[str] = "score"
    resumable: ClassVar[bool] = False
    folders: ClassVar[tuple[Path, ...]] = ()

    run: RunConfig
    """Base, data and evaluation settings."""
    parts: tuple[Literal["val", "test"], ...]
    adapter: str | None = None
    """Folder of the adapter; by default the base alone is scored."""
    style: Literal["as_is", "answer_only", "few_shot"] = "as_is"
    expected: Identity = UNKNOWN
    """Identity of data and base, as the driver has read them."""
    examples: int | None = None
    """Most examples of a part that are scored (`sample`); by default all."""

    def __call__(self, lane: Lane) -> dict[str, list[float]]:
        """Return part → the score of each example, in the order of the data (all workers call it)."""
        session = lane.session(self.run, self.expected, whole=True)
        return run_score(self, session, lane.note, lane.progress)


def sample(total: int, most: int | None) -> list[int]:
    """Return the indices of at most `most` of `total` examples, at equal distances."""
    count = total if most is None else min(most, total)
    return [index * total // count for index in range(count)]


def run_score(
    request: ScoreRequest,
    session: Session,
    note: Callable[[str], object] = lambda _: None,
    progress: Callable[[int, int], object] = lambda *_: None,
) -> dict[str, list[float]]:
    """Return part → the score of each example, in the order of the data (all workers call it).

    Args:
        request: what is scored.
        session: its base and data.
        note: called by the first worker with a sentence about answers for which the scorer raised an error.
        progress: called with the number of examples that are scored, and that of all.
    """
    model, worker = session.loaded.model, session.worker
    if request.adapter is None:
        clear(model)
    else:
        attach(model, load_adapter(session.home.local(request.adapter)))
    model.eval()
    found: dict[str, list[float]] = {}
    try:
        chosen = {part: _chosen(getattr(session.parts, part), request.examples) for part in request.parts}
        watch = _Watch(sum(map(len, chosen.values())), worker.world, progress)
        for part, examples in chosen.items():
            values, problem = _score(examples[worker.rank :: worker.world], request, session, watch.add)
            found[part], problems = _gather(values, problem, len(examples), session)
            if problems and worker.rank == 0:
                note(f"{_name(request)}, {part}: {problems}")
    finally:
        clear(model)
    return found


def spread() -> bool:
    """Return whether the joined cluster has several nodes, which may not see each other's files."""
    return len([node for node in ray.nodes() if node["Alive"]]) > 1


class _Watch:
    """Counts the examples that this worker has scored, and passes on those of all workers."""

    def __init__(self, total: int, world: int, progress: Callable[[int, int], object]) -> None:
        self._total, self._world, self._progress = total, world, progress
        self._done = 0

    def add(self, count: int) -> None:
        """Count some more."""
        self._done += count
        self._progress(min(self._done * self._world, self._total), self._total)


def _chosen(examples: Sequence[Example], most: int | None) -> list[Example]:
    return [examples[index] for index in sample(len(examples), most)]


def _score(
    examples: Sequence[Example], request: ScoreRequest, session: Session, add: Callable[[int], None]
) -> tuple[list[float], tuple[int, str]]:
    """Return the scores; and for how many answers the scorer raised an error, and the first of the errors."""
    if not examples:
        return [], (0, "")
    evaluate = request.run.evaluate
    scores = score(
        session.loaded.model,
        session.loaded.tokenizer,
        examples,
        session.parts.scorer,
        style=request.style,
        shots=session.parts.train[: evaluate.shots],
        max_new_tokens=evaluate.max_new_tokens,
        batch_size=evaluate.batch_size,
        advance=add,
    )
    return list(scores.values), (scores.failures, scores.problem)


def _gather(
    values: list[float], problem: tuple[int, str], total: int, session: Session
) -> tuple[list[float], str]:
    """Exchange the workers' scores; return them in the order of the data, and a text about errors."""
    world = session.worker.world
    shares: list[Any] = [(values, problem)]
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, (values, problem))
    failures = sum(count for _, (count, _) in shares)
    first = next((why for _, (count, why) in shares if count), "")
    ordered = [shares[index % world][0][index // world] for index in range(total)]
    return ordered, failures_text(failures, total, first)


def _name(request: ScoreRequest) -> str:
    if request.adapter is None:
        return "base" if request.style == "as_is" else f"base, {request.style}"
    # Of a trial: its key, and `adapter`.
    return "/".join(Path(request.adapter).parts[-2:])


def failures_text(failures: int, total: int, first: str) -> str:
    """Return a sentence about answers for which the scorer raised an error; empty if there are none."""
    if not failures:
        return ""
    return f"the scorer raised an error for {failures} of {total} answers, which score 0; the first: {first}"
