"""ASHA that repeats its decisions when a sweep continues: Li et al. 2020, arXiv:1810.05934."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from rayft.sweep.decisions import Decision, EventLog
from rayft.sweep.space import SweepConfig

__all__ = ["RecordedASHA"]


class RecordedASHA(ASHAScheduler):
    """ASHA on the validation loss, whose decisions are kept in an `EventLog` and repeated from it.

    Trials are identified by their keys, which stay the same when a sweep continues, unlike Tune's own ids.

    Args:
        sweep: the search's settings.
        steps: the last step of each trial.
        log: the decisions so far.
        stop: called with the key of a trial that is stopped and the step, once the decision is written.
    """

    def __init__(
        self, sweep: SweepConfig, steps: int, log: EventLog, stop: Callable[[str, int], None]
    ) -> None:
        super().__init__(
            time_attr="step",
            metric="val_loss",
            mode="min",
            max_t=steps,
            grace_period=min(sweep.grace, steps),
            reduction_factor=sweep.reduction,
        )
        self._log, self._stop = log, stop
        for decision in log.decisions:
            self._decide(decision.trial, decision.step, decision.val_loss)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide on an evaluation; a repeated evaluation gets the same decision again."""
        key, step, loss = str(trial.config["trial"].job.id), int(result["step"]), float(result["val_loss"])
        decision = self._log.find(key, step)
        if decision is None:
            decision = Decision(key, step, loss, self._decide(key, step, loss))
            self._log.append(decision)
        if decision.go_on:
            return str(TrialScheduler.CONTINUE)
        self._stop(key, step)
        return str(TrialScheduler.STOP)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Ignore the end of a trial, which was evaluated at each rung before."""

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        """Keep the trial's evaluations, which count even if it fails later."""

    def _decide(self, key: str, step: int, loss: float) -> bool:
        # ASHA uses only the trial's id, and nothing of the controller.
        trial: Any = SimpleNamespace(trial_id=key)
        nobody: Any = None
        self._trial_info.setdefault(key, self._brackets[0])
        result = {self._time_attr: step, self._metric: loss}
        return bool(super().on_trial_result(nobody, trial, result) == TrialScheduler.CONTINUE)
