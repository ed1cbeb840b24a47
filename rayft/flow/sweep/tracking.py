"""Track a sweep in MLflow: its own run, the trials' scores, baselines and squeezed adapters, and its end."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from rayft.config import leaves
from rayft.errors import ResourceError
from rayft.flow.squeeze.tracking import score_metrics, track_squeezed
from rayft.flow.sweep.preflight import Plan
from rayft.flow.sweep.record import Findings
from rayft.report.record import SweepRecord
from rayft.sweep.request import tracking_key
from rayft.sweep.search import Trial
from rayft.tracking.base import PENDING, Former, RunStatus
from rayft.tracking.mlflow import MlflowTracker, flush_spool, resolve_runs
from rayft.tracking.provenance import provenance

__all__ = ["SweepTracking"]


class SweepTracking:
    """The tracked run of a sweep, and the runs below it.

    Args:
        plan: the sweep's.
        tracker: writes to MLflow. The caller closes it.
    """

    def __init__(self, plan: Plan, tracker: MlflowTracker) -> None:
        self._plan, self.tracker = plan, tracker
        self.run_id = self._start()

    @property
    def key(self) -> str:
        """Key of the sweep's run, which the keys of the runs below it begin with."""
        identity = self._plan.identity
        return f"{self._plan.config.name}-{identity.sweep or identity.inputs}"

    def _start(self) -> str:
        """Create the sweep's run, or find it again if the sweep continues; return its id."""
        plan = self._plan
        flush_spool(plan.tracker)
        tags = {"rayft.kind": "sweep", **{f"rayft.{name}": value for name, value in provenance().items()}}
        former = None
        if plan.former_hash:
            former = Former(f"{plan.config.name}-{plan.former_hash}", {"data_digest": plan.parts.digest})
        run_id = self.tracker.run(plan.config.name, self.key, tags=tags, former=former)
        data = {"data_digest": plan.parts.digest}
        if plan.parts.dropped:
            data["data_dropped"] = "\n".join(item.text for item in plan.parts.dropped)
        self.tracker.params(run_id, leaves(plan.config) | data)
        self.tracker.view(run_id, plan.config.name)
        self._track_data(run_id)
        return run_id

    def _track_data(self, run_id: str) -> None:
        plan, parts = self._plan, self._plan.parts
        sizes = {part: (digest, len(getattr(parts, part))) for part, digest in parts.digests.items()}
        self.tracker.data(run_id, plan.identity.data_name, plan.run.data.source, sizes)

    def end(self, status: RunStatus) -> None:
        """Track how a sweep ended that did not finish.

        If the disk has no space for that, the next start of the sweep does it.
        """
        with suppress(ResourceError):
            self.tracker.finish(self.run_id, status)

    def interrupt(self, trials: Sequence[str]) -> None:
        """Track that the sweep and the trials that are training were interrupted.

        Args:
            trials: keys of the trials.
        """
        self.end("interrupted")
        waiting = [PENDING + tracking_key(key, self._plan.identity) for key in trials]
        for run_id in resolve_runs(self._plan.tracker, waiting).values():
            if not run_id.startswith(PENDING):
                with suppress(ResourceError):
                    self.tracker.finish(run_id, "interrupted", if_running=True)

    def with_runs(self, trials: Sequence[Trial]) -> list[Trial]:
        """Return trials with the ids of the runs that MLflow has by now, those of failed trials included."""
        known = {
            trial.point.key: trial.run_id
            or (PENDING + tracking_key(trial.point.key, self._plan.identity) if trial.result is None else "")
            for trial in trials
        }
        ids = resolve_runs(self._plan.tracker, list(known.values()))
        found = {key: ids[run_id] for key, run_id in known.items()}
        # Only the key of a failed trial is known: it may have ended before it had a run.
        lost = {t.point.key for t in trials if t.result is None and found[t.point.key].startswith(PENDING)}
        return [
            replace(trial, run_id="" if trial.point.key in lost else found[trial.point.key])
            for trial in trials
        ]

    def track(self, record: SweepRecord, found: Findings) -> None:
        """Track scores in the runs of the trials, and make runs for baselines and squeezed adapters."""
        digest = {"data_digest": record.data_digest}
        for trial in record.trials:
            if trial.run_id and trial.status == "failed":
                # Its process may have died before it could track that.
                self.tracker.finish(trial.run_id, "failed", if_running=True)
            if trial.run_id and trial.test:
                self.tracker.params(trial.run_id, digest)
                self._track_data(trial.run_id)
                self.tracker.metrics(trial.run_id, score_metrics(found.scores[trial.id]))
        self._track_baselines(record, found)
        settings = {trial.id: trial.settings for trial in record.trials}
        sizes = {trial.id: trial.bytes for trial in record.trials}
        for item in found.squeezed:
            track_squeezed(
                self.tracker,
                item,
                parent=item.source.run_id or self.run_id,
                settings=settings[item.source.name],
                data=digest,
                after=found.scores[item.name],
                before=found.scores[item.source.name],
                source_bytes=sizes[item.source.name],
                plots=self._plan.output / "plots",
            )
        if record.winner:
            best = next(trial for trial in record.trials if trial.id == record.winner.trial)
            if best.test:
                self.tracker.metrics(self.run_id, score_metrics(found.scores[best.id], "best_"))

    def _track_baselines(self, record: SweepRecord, found: Findings) -> None:
        shared = {
            name: value
            for name, value in leaves(self._plan.run).items()
            if name.startswith(("model.", "data.", "evaluate."))
        }
        for base in record.baselines:
            run = self.tracker.run(
                base.name, f"{self.key}-{base.name}", parent=self.run_id, tags={"rayft.kind": "baseline"},
                former=Former(f"{self.run_id}-{base.name}"), restart=False,
            )  # fmt: skip
            self.tracker.params(run, {**shared, "data_digest": record.data_digest, "method.name": base.name})
            self._track_data(run)
            self.tracker.metrics(run, score_metrics(found.baselines[base.name]))
            self.tracker.finish(run, "finished")
