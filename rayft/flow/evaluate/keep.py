"""Keep an evaluation with the sweep that its adapters belong to, and show it in the sweep's report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from rayft.analysis.record import SweepAnalysis
from rayft.errors import ConfigError, RayftError
from rayft.flow.evaluate.record import Evaluation
from rayft.flow.hold import hold
from rayft.flow.sweep.folder import RECORD_FILE
from rayft.report.evaluations import EvaluatedDifference, EvaluatedScore, SavedEvaluation, SavedEvaluations
from rayft.report.record import Score, SweepRecord
from rayft.report.render import check_report, render

__all__ = ["keep", "trained_in"]


def trained_in(sweep: Path, runs: Sequence[str]) -> bool:
    """Return whether a sweep has one of some runs among its trials; False if its record can't be read."""
    try:
        return bool({trial.run_id for trial in SweepRecord.load(sweep).trials} & {*runs} - {""})
    except RayftError:
        return False


def keep(
    found: Evaluation, key: str, how: Mapping[str, str], sweep: Path, say: Callable[[str], None]
) -> None:
    """Keep an evaluation in a sweep's folder, and make the sweep's report again with it.

    The scores are printed in any case, so what fails here is only reported. A sweep that runs makes its
    report itself.

    Args:
        found: the evaluation.
        key: identifies it; the same evaluation again replaces the earlier one.
        how: settings that the user has chosen, for the report.
        sweep: folder of a sweep.
        say: called with a sentence for the user.
    """
    report = sweep / "report.html"
    try:
        path = _saved(found, how).save(sweep, key)
        if not (sweep / RECORD_FILE).is_file():
            return
        with hold(sweep, "--output"):
            record = SweepRecord.load(sweep)
            check_report(record, report)
            render(record, report, SweepAnalysis.find(sweep), SavedEvaluations.find(sweep))
        say(f"in the report of the sweep, too: {report}")
    except ConfigError:
        say(f"{sweep} is in use: its report has {path.name} when it is made again (rayft report {sweep})")
    except (RayftError, OSError) as error:
        say(f"not in {report}: {error}")


def _saved(found: Evaluation, how: Mapping[str, str]) -> SavedEvaluation:
    """Return an evaluation without its answers."""
    scores = []
    for target in found.targets:
        for one in target.measures:
            scores.append(
                EvaluatedScore(
                    target=target.name, task=one.task, metric=one.metric, score=one.score, loss=target.loss
                )
            )
        if not target.measures:
            scores.append(EvaluatedScore(target=target.name, task="", metric="", loss=target.loss))
    differences = []
    for both in found.differences:
        n = next(
            one.score.n
            for one in found.targets[0].measures
            if (one.task, one.metric) == (both.task, both.metric)
        )
        differences.append(
            EvaluatedDifference(
                target=found.targets[0].name,
                against=found.targets[1].name,
                task=both.task,
                metric=both.metric,
                difference=Score(value=both.value, low=both.low, high=both.high, n=n),
                p_value=both.p_value,
            )
        )
    return SavedEvaluation(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        base=found.base,
        data_digest=found.data,
        how=dict(how),
        scores=tuple(scores),
        differences=tuple(differences),
    )
