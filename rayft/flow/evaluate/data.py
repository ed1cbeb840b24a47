"""Score targets on the data of a configuration, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rayft.data.example import Example
from rayft.data.pack import AnyEncoded
from rayft.data.prepared import Prepared, prepare
from rayft.evaluate.compare import interval
from rayft.evaluate.tasks import check_questions, score
from rayft.flow.evaluate.base import check_model, device_of, loaded, put_on, together
from rayft.flow.evaluate.record import Answer, Evaluation, Measure, TargetResult
from rayft.flow.sweep.identity import current_identity
from rayft.flow.target import Target
from rayft.models.attention import check_packing
from rayft.models.files import cache_folder
from rayft.models.load import LoadedModel, ModelConfig, context_length, load_encoder
from rayft.report.record import Score
from rayft.sweep.score import failures_text
from rayft.train.run import RunConfig
from rayft.train.session import Session, check_task
from rayft.train.validation import validation_loss
from rayft.train.worker import Worker

__all__ = ["OnData", "measure"]


@dataclass(frozen=True)
class _Read:
    """The part of the data that is scored, as a model reads it."""

    run: RunConfig
    """Names the model and the data."""
    prepared: Prepared
    examples: Sequence[Example]
    texts: Sequence[AnyEncoded]
    """For the loss; empty if all were dropped as too long."""

    @property
    def asks(self) -> bool:
        """Whether there are questions or classes; raw text has none."""
        return bool(self.examples[0].messages) or self.examples[0].label is not None


class OnData:
    """An evaluation on a part of the data, whose models, adapters and texts are checked."""

    def __init__(
        self,
        targets: Sequence[Target],
        models: Sequence[ModelConfig],
        run: RunConfig,
        sweep: Path | None,
        part: str,
        samples: int | None,
    ) -> None:
        """Check everything but what only shows in the weights, which are not loaded yet.

        Args:
            targets: adapters or models.
            models: of each target the model that it is, or its base.
            run: names base and data.
            sweep: a sweep whose data and base must be the present ones; None for no such comparison.
            part: part of the data.
            samples: number of examples, from the first; None for all.

        Raises:
            RayftError: if base, data or a target can't be used.
        """
        self._targets, self._part = targets, part
        self._base, self._groups = run.model.name, together(models)
        device_of(run.scale)
        self._read: dict[ModelConfig, _Read] = {}
        skeletons = {
            model: check_model(model, run.scale, [targets[number] for number in numbers])
            for model, numbers in self._groups.items()
        }
        for model, skeleton in skeletons.items():
            own = run.model_copy(update={"model": model})
            self._read[model] = _read(own, skeleton, part, samples)
        if sweep is not None:
            current_identity(run, sweep, next(iter(self._read.values())).prepared.parts)

    @property
    def dropped(self) -> tuple[str, ...]:
        """Sentences about what was dropped of the data."""
        return tuple(one.text for one in next(iter(self._read.values())).prepared.parts.dropped)

    def run(self) -> Evaluation:
        """Load the models one after the other, and score the targets. Those that share a base share it."""
        found: dict[int, TargetResult] = {}
        for config, numbers in self._groups.items():
            read = self._read[config]
            with loaded(config, read.run.scale) as model:
                for number in numbers:
                    put_on(model, self._targets[number])
                    found[number] = _measured(self._targets[number], model, read, self._part)
        results = tuple(found[number] for number in range(len(self._targets)))
        return Evaluation(base=self._base, data=read.prepared.parts.digest, targets=results)


def _read(run: RunConfig, skeleton: object, part: str, samples: int | None) -> _Read:
    """Read the data as a model does, and check that the model has room for it."""
    settings = skeleton.config  # type: ignore[attr-defined]
    encoder = load_encoder(run.model, settings)
    prepared = prepare(run.data, encoder, cache_folder())
    check_task(run, prepared.parts)
    context = context_length(run.model, settings, encoder)
    texts = prepared.encoded(part, context, samples)
    found = _Read(run, prepared, getattr(prepared.parts, part)[:samples], texts)
    if run.model.task == "causal_lm":
        if run.data.packing:
            check_packing(skeleton, run.data.max_length)
        if found.asks:
            check_questions({part: found.examples}, encoder, context, run.evaluate.max_new_tokens)
    return found


def _measured(target: Target, model: LoadedModel, read: _Read, part: str) -> TargetResult:
    parts, evaluate = read.prepared.parts, read.run.evaluate
    loss = _loss(model, read) if len(read.texts) else None
    found = TargetResult(
        name=target.name, content=target.content, parent=target.parent, base=model.fingerprint, loss=loss
    )
    if not read.asks:
        return found
    scores = score(
        model.model,
        model.tokenizer,
        read.examples,
        parts.scorer,
        max_new_tokens=evaluate.max_new_tokens,
        batch_size=evaluate.batch_size,
    )
    metric = parts.scorer.task or ("class" if parts.labels else parts.scorer.config.kind)
    answers = tuple(
        Answer(
            question=example.question,
            wanted=example.answer,
            got=parts.labels[int(got)] if parts.labels else got,
            score=value,
        )
        for example, got, value in zip(read.examples, scores.answers, scores.values, strict=True)
    )
    return found.model_copy(
        update={
            "measures": (measure(part, metric, scores.values),),
            "problem": failures_text(scores.failures, scores.n, scores.problem),
            "answers": answers,
        }
    )


def measure(task: str, metric: str, values: Sequence[float]) -> Measure:
    """Return the mean of the scores of questions, with its interval."""
    low, high = interval(values)
    mean = Score(value=sum(values) / len(values), low=low, high=high, n=len(values))
    return Measure(task=task, metric=metric, score=mean, values=tuple(values))


def _loss(model: LoadedModel, read: _Read) -> float:
    """Return the mean loss (nats) of the targets in the texts."""
    worker = Worker(device=str(model.model.device))
    return validation_loss(
        Session(model, read.prepared, (), read.texts, worker, packing=read.run.data.packing)
    )
