"""Publish the findings of a sweep: record and report first, then tracked runs, the registry, serving files.

Whatever fails after the record is saved is reported and left to the next run of the same command, which
repeats nothing that is done.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from rayft.analysis.record import SweepAnalysis
from rayft.config import yaml_text
from rayft.errors import (
    DiskFullError,
    PromotionRefusedError,
    RayftError,
    RegistryError,
    ReportError,
    TrackingError,
    TrainError,
    UnfinishedError,
)
from rayft.files import room_on, write_file
from rayft.flow.address import joined, spread
from rayft.flow.analyze.tracking import track_analysis
from rayft.flow.display import Display
from rayft.flow.selection import ServedAdapter, served_adapters, why_not_served
from rayft.flow.sweep.folder import RECORD_FILE
from rayft.flow.sweep.preflight import Plan
from rayft.flow.sweep.record import Findings, build_record, described, with_run_ids
from rayft.flow.sweep.tracking import SweepTracking
from rayft.paths import runs_folder
from rayft.registry.promote import promote
from rayft.registry.ref import BASE_SCORE_TAG, SCORE_TAG
from rayft.registry.store import MlflowRegistry
from rayft.report.evaluations import SavedEvaluations
from rayft.report.record import SweepRecord
from rayft.report.render import render
from rayft.serving.deployment import deployment
from rayft.tracking.base import PENDING

__all__ = ["Publisher", "check_complete", "on_several_nodes"]

logger = logging.getLogger(__name__)

DEPLOY_HEADER = """\
# For `serve deploy` on the cluster, which RAY_DASHBOARD_ADDRESS names. Every run of the sweep replaces it.
# To accept requests from other machines, copy this file, add `keys` to `args`, and set its `host`.
"""


def on_several_nodes() -> bool:
    """Return whether the sweep runs on a cluster of several nodes, which do not share their files."""
    return joined() and spread()


def check_complete(record: SweepRecord, undone: Sequence[str]) -> None:
    """Check that a published sweep has a trial that did not fail, and that nothing is left to do.

    Args:
        record: the sweep's.
        undone: what is left to do (`Display.undone`).

    Raises:
        TrainError: if every trial has failed.
        UnfinishedError: if something is left to do.
    """
    if all(trial.status == "failed" for trial in record.trials):
        raise TrainError(
            "every trial has failed, for the reasons above; correct them and run the sweep again"
        )
    if undone:
        raise UnfinishedError(
            f"the results are there, but {'; '.join(undone)} (the reasons are above); run the sweep again to "
            "do what is left, without training"
        )


class Publisher:
    """Writes, tracks, registers and promotes the findings of a sweep.

    Args:
        plan: the sweep's.
        display: reports what could not be done, and what to do about it.
        tracking: the sweep's tracked run.
    """

    def __init__(self, plan: Plan, display: Display, tracking: SweepTracking) -> None:
        self._plan, self._display, self._tracking = plan, display, tracking

    def publish(self, found: Findings) -> SweepRecord:
        """Write the report and what `rayft serve` needs; then track, register and promote.

        Raises:
            DiskFullError: if the disk is full. What was done before that is kept.
        """
        plan = self._plan
        record = build_record(plan, found, self._display.timings, self._tracking.run_id)
        record.save(plan.output / RECORD_FILE)
        served, several_nodes = served_adapters(plan.output, record), on_several_nodes()
        if not several_nodes:
            with self._late("serve.yaml was not written"):
                self._write_serve_config({item.name: str(item.folder) for item in served})
        self._render(record)
        record = self._updated(record)
        with self._late("not all that was found is tracked"):
            self._tracking.track(record, found)
        ships = next((item for item in served if item.shipped), None)
        # Without `found.full`, the folder of the winner is one that an earlier run of the sweep has left.
        if ships and (found.full or ships.scored != ships.trial):
            version = ""
            with self._late("not registered"):
                version = self._register_shipped(ships, record, found)
            if several_nodes:
                self._serve_from_registry(served, record, found, version)
        elif found.winner and found.winner.result:
            self._display.say(why_not_served(found.winner, found.trials, extracted=bool(found.squeezed)))
        self._track_report()
        return record

    def add_analysis(self, record: SweepRecord, analysis: SweepAnalysis) -> SweepRecord:
        """Add an analysis to the report and to the tracked runs of what was analysed."""
        plan = self._plan
        path = analysis.save(plan.output)
        record = with_run_ids(record, plan.tracker).model_copy(
            update={"timings": dict(self._display.timings)}
        )
        record.save(plan.output / RECORD_FILE)
        self._render(record)
        with self._late("not all of the analysis is tracked"):
            self._tracking.tracker.artifact(self._tracking.run_id, path)
            runs = {trial.id: trial.run_id for trial in record.trials}
            track_analysis(self._tracking.tracker, analysis, runs, plan.output / "plots")
        self._track_report()
        return record

    @contextmanager
    def _late(self, what: str) -> Iterator[None]:
        """Run a block; if it fails, report that and go on.

        Args:
            what: what is not done if the block fails.

        Raises:
            DiskFullError: if the disk is full, because the following steps would fail too.
        """
        output = self._plan.output
        try:
            with room_on(output):
                yield
        except DiskFullError:
            raise
        except Exception as error:
            logger.debug("%s", what, exc_info=True)
            self._display.undone.append(what)
            name = "" if isinstance(error, RayftError) else f"{type(error).__name__}: "
            self._display.say(
                f"{what}: {name}{' '.join(str(error).split())}. Everything else is in {output}; run the "
                "sweep again to do what is left, without training"
            )

    def _render(self, record: SweepRecord) -> None:
        output = self._plan.output
        try:
            analysis = SweepAnalysis.find(output)
        except ReportError:
            # It is damaged, as the checks of the sweep have reported.
            analysis = None
        with self._late("the report was not drawn"):
            render(record, output / "report.html", analysis, SavedEvaluations.find(output))

    def _updated(self, record: SweepRecord) -> SweepRecord:
        """Return the record with the ids of the runs that MLflow has by now; save it if it has changed."""
        found = with_run_ids(record, self._plan.tracker)
        if found != record:
            found.save(self._plan.output / RECORD_FILE)
            self._render(found)
        return found

    def _track_report(self) -> None:
        output, tracking = self._plan.output, self._tracking
        with self._late("the report is not tracked"):
            tracking.tracker.artifact(tracking.run_id, output / RECORD_FILE)
            if (output / "report.html").is_file():
                tracking.tracker.artifact(tracking.run_id, output / "report.html")

    def _register_shipped(self, ships: ServedAdapter, record: SweepRecord, found: Findings) -> str:
        """Register the adapter that ships, and promote it if it passes the gate.

        The columns of the winner are sorted by singular value, so its version can be served at every rank.

        Returns:
            The version, as `models:/NAME/VERSION`.

        Raises:
            RayftError: if it can't be registered now.
        """
        name = self._plan.config.name
        version = self._register(ships, record, found)
        refused = f"registered as {name} version {version}, not promoted"
        with self._late(refused):
            registry = MlflowRegistry(self._plan.tracker.uri)
            try:
                done = promote(registry, name, version, gate=self._plan.config.promote)
            except PromotionRefusedError as error:
                self._display.say(f"{refused}: {error}")
            else:
                self._display.say(f"registered as models:/{name}@{done.alias} (version {done.version})")
        return f"models:/{name}/{version}"

    def _register(self, item: ServedAdapter, record: SweepRecord, found: Findings) -> int:
        """Register an adapter, or find the version that has the same content; return the version.

        Raises:
            RayftError: if it can't be registered now.
        """
        tags = {"data_digest": record.data_digest}
        if (score := found.scores[item.scored].mean("val")) is not None:
            tags[SCORE_TAG] = repr(score)
        if record.baselines and not any(measured.error for measured in found.baselines.values()):
            # If a baseline could not be scored, the gate gets no baseline to compare with.
            tags[BASE_SCORE_TAG] = repr(max(base.val_score or 0.0 for base in record.baselines))
        run_id = next(trial.run_id for trial in record.trials if trial.id == item.trial)
        if run_id.startswith(PENDING):
            raise TrackingError(
                f"MLflow does not have the run of {item.trial} yet, which started while MLflow did not answer"
            )
        registry, about = MlflowRegistry(self._plan.tracker.uri), described(item, record)
        return registry.register(item.registered, run_id, item.folder, tags, about)

    def _serve_from_registry(
        self, served: list[ServedAdapter], record: SweepRecord, found: Findings, shipped: str
    ) -> None:
        """Write the configurations for `rayft serve` and `serve deploy` on a cluster of several nodes.

        Other nodes do not have the sweep's folders, so each adapter is named by its version in the registry.
        Adapters that do not ship are registered under their own names, without an alias. Adapters that can't
        be registered are left out and reported.

        Args:
            served: the adapters to serve.
            record: the sweep's.
            found: findings of the sweep, with all scores.
            shipped: version of the adapter that ships; empty if it could not be registered.
        """
        sources: dict[str, str] = {}
        problems: dict[str, Exception] = {}
        for item in served:
            if item.shipped and shipped:
                sources[item.name] = shipped
            elif item.shipped:
                problems[item.name] = RegistryError("it is not registered")
            else:
                try:
                    with room_on(self._plan.output):
                        version = self._register(item, record, found)
                    sources[item.name] = f"models:/{item.registered}/{version}"
                except DiskFullError:
                    raise
                except Exception as error:  # noqa: BLE001  (whatever it is, it is reported below)
                    problems[item.name] = error
        if sources:
            with self._late("serve.yaml was not written"):
                self._write_serve_config(sources, self._plan.tracker.uri)
                place = self._plan.output / "deploy.yaml"
                self._display.say(f"to serve the result on this cluster: serve deploy {place}")
        if problems:
            with self._late(f"serve.yaml leaves out {', '.join(problems)}"):
                raise next(iter(problems.values()))

    def _write_serve_config(self, sources: Mapping[str, str], registry: str | None = None) -> None:
        """Write the configuration for `rayft serve`, and on a cluster also the one for `serve deploy`.

        Args:
            sources: served name → adapter folder, or `models:/…`.
            registry: MLflow's URI, for `models:/…`; None on one node.
        """
        config = self._plan.config
        if not sources or config.model.task != "causal_lm":
            return
        cluster = {}
        if registry:
            # A server that `serve deploy` starts has no working directory of its own.
            fetched = runs_folder(cluster=True).absolute() / "serving" / "adapters"
            cluster = {"registry": registry, "fetched": str(fetched)}
        content = {
            "model": config.model.model_dump(),
            "adapters": dict(sources),
            **cluster,
            "host": config.serve.host,
            "port": config.serve.port,
            "cpus": config.serve.cpus,
        }
        write_file(self._plan.output / "serve.yaml", yaml_text(content))
        if registry:
            deployed = yaml_text(deployment(content))
            write_file(self._plan.output / "deploy.yaml", DEPLOY_HEADER + deployed)
