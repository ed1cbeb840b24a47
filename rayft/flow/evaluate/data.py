"""Score targets on the data of a configuration, in this process."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from rayft.data.example import Example
from rayft.errors import ResourceError
from rayft.evaluate.compare import interval
from rayft.evaluate.tasks import score
from rayft.flow.config import PipelineConfig
from rayft.flow.evaluate.record import Answer, Evaluation, Measure, TargetResult
from rayft.flow.evaluate.target import Target
from rayft.flow.squeeze.checks import check_base
from rayft.flow.sweep.identity import current_identity
from rayft.models.inject import attach, clear
from rayft.models.load import load_skeleton
from rayft.report.record import Score
from rayft.sweep.score import failures_text
from rayft.train.run import RunConfig, ScaleConfig
from rayft.train.session import Session
from rayft.train.trainer import validation_loss
from rayft.train.worker import Worker

__all__ = ["device_of", "measure", "on_data"]

ROWS = 4
"""Rows in a batch whose loss is computed."""


def on_data(
    targets: Sequence[Target],
    settings: PipelineConfig,
    sweep: Path | None,
    part: str,
    samples: int | None,
    say: Callable[[str], None],
) -> Evaluation:
    """Score targets on a part of the data.

    Targets that share a base share it in memory; other bases are loaded one after the other.

    Args:
        targets: adapters for the base of the settings, or models.
        settings: names base and data.
        sweep: a sweep whose data and base must be the present ones; None for no such comparison.
        part: part of the data.
        samples: number of examples, from the first; None for all.
        say: called with what was dropped of the data.

    Raises:
        RayftError: if base, data or a target can't be used. Everything but what only shows in the weights is
            found before weights are loaded.
    """
    run = settings.run()
    device_of(run.scale)
    runs = [_with_model(run, target) for target in targets]
    for target, own in zip(targets, runs, strict=True):
        if target.adapter is not None:
            check_base(target.adapter, None, own)
        else:
            load_skeleton(own.model)
    if sweep is not None:
        current_identity(run, sweep)
    found: dict[int, TargetResult] = {}
    digest = ""
    for model in dict.fromkeys(one.model for one in runs):
        chosen = [index for index, one in enumerate(runs) if one.model == model]
        with _opened(runs[chosen[0]]) as session:
            if not digest:
                for dropped in session.parts.dropped:
                    say(dropped.text)
            digest = session.parts.digest
            for index in chosen:
                found[index] = _measured(targets[index], runs[index], session, part, samples)
    results = tuple(found[index] for index in range(len(targets)))
    return Evaluation(base=run.model.name, data=digest, targets=results)


def _with_model(run: RunConfig, target: Target) -> RunConfig:
    if not target.model:
        return run
    return run.model_copy(update={"model": run.model.model_copy(update={"name": target.model})})


def device_of(scale: ScaleConfig) -> str:
    """Return the device of a settled section on this machine.

    Raises:
        ResourceError: if it is a GPU, and there is none.
    """
    if scale.device != "cuda":
        return "cpu"
    if not torch.cuda.is_available():
        raise ResourceError("scale.device is cuda, but no GPU is here: write --set scale.device=cpu")
    return "cuda:0"


@contextmanager
def _opened(run: RunConfig) -> Iterator[Session]:
    """Yield a session of a run in this process, and free the base afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(run.scale.threads or threads)
    session = Session.open(run, Worker(device=device_of(run.scale)), identify_base=False, whole=True)
    try:
        yield session
    finally:
        torch.set_num_threads(threads)
        del session
        gc.collect()


def _measured(
    target: Target, run: RunConfig, session: Session, part: str, samples: int | None
) -> TargetResult:
    model = session.loaded.model
    clear(model)
    if target.adapter is not None:
        attach(model, target.adapter)
    model.eval()
    examples: Sequence[Example] = getattr(session.parts, part)[:samples]
    found = TargetResult(name=target.name, content=target.content, loss=_loss(session, part, samples))
    if not examples[0].messages and examples[0].label is None:
        return found  # Raw text has no question.
    scorer, evaluate = session.parts.scorer, run.evaluate
    scores = score(
        model,
        session.loaded.tokenizer,
        examples,
        scorer,
        max_new_tokens=evaluate.max_new_tokens,
        batch_size=evaluate.batch_size,
    )
    metric = scorer.task or ("class" if session.parts.labels else scorer.config.kind)
    problem = failures_text(scores.failures, scores.n, scores.problem)
    labels = session.parts.labels
    answers = tuple(
        Answer(
            question=example.question,
            wanted=example.answer,
            got=labels[int(got)] if labels else got,
            score=value,
        )
        for example, got, value in zip(examples, scores.answers, scores.values, strict=True)
    )
    return found.model_copy(
        update={
            "measures": (measure(part, metric, scores.values),),
            "problem": problem,
            "answers": answers,
        }
    )


def measure(task: str, metric: str, values: Sequence[float]) -> Measure:
    """Return the mean of the scores of questions, with its interval."""
    low, high = interval(values)
    mean = Score(value=sum(values) / len(values), low=low, high=high, n=len(values))
    return Measure(task=task, metric=metric, score=mean, values=tuple(values))


def _loss(session: Session, part: str, samples: int | None) -> float | None:
    """Return the mean loss (nats) of the targets in a part; None if all texts were dropped as too long."""
    texts = session.prepared.encoded(part, session.loaded.context, samples)
    if not len(texts):
        return None
    return validation_loss(replace(session, val=texts))
