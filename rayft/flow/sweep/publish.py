"""Publish what a sweep found: record and report first, then tracked runs, the registry and serving files.

What fails after the record is written is reported and left to the next run of the same command, which finds
everything before it done.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import ray
import yaml

from rayft.analysis.record import SweepAnalysis
from rayft.errors import (
    DiskFullError,
    PromotionRefusedError,
    RayftError,
    RegistryError,
    ReportError,
    TrackingError,
)
from rayft.files import room_on, write_file
from rayft.flow.analyze.tracking import track_analysis
from rayft.flow.display import Display
from rayft.flow.selection import ServedAdapter, served_adapters, why_not_served
from rayft.flow.sweep.preflight import Plan
from rayft.flow.sweep.record import Findings, build_record, with_run_ids
from rayft.flow.sweep.tracking import SweepTracking
from rayft.paths import runs_folder
from rayft.registry.promote import promote
from rayft.registry.ref import BASE_SCORE_TAG, SCORE_TAG
from rayft.registry.store import MlflowRegistry
from rayft.report.record import SweepRecord
from rayft.report.render import render
from rayft.serving.deployment import deployment
from rayft.sweep.score import spread
from rayft.tracking.base import PENDING

__all__ = ["Publisher", "on_several_nodes"]

logger = logging.getLogger(__name__)

DEPLOY_HEADER = """\
# For `serve deploy` on the cluster (RAY_DASHBOARD_ADDRESS says where that is); every sweep writes it anew.
# To let callers in from elsewhere, copy this file, give `args` some `keys`, and set both `host`s.
"""


def on_several_nodes() -> bool:
    """Return whether the sweep runs on a cluster of several nodes, which do not have each other's files."""
    return ray.is_initialized() and spread()


class Publisher:
    """Write, track, register and promote what a sweep found.

    Args:
        plan: of the sweep.
        display: is told what could not be done, and what to do about it.
        tracking: the sweep's tracked run.
    """

    def __init__(self, plan: Plan, display: Display, tracking: SweepTracking) -> None:
        self._plan, self._display, self._tracking = plan, display, tracking

    def publish(self, found: Findings) -> SweepRecord:
        """Write the report and what `rayft serve` needs; then track, register and promote.

        Raises:
            DiskFullError: if the disk is full. What came before is kept.
        """
        plan = self._plan
        record = build_record(plan, found, self._display.timings)
        record.save(plan.output / "sweep.json")
        served, several_nodes = served_adapters(plan.output, record), on_several_nodes()
        if not several_nodes:
            with self._late("serve.yaml was not written"):
                self._write_serve_config({item.name: str(item.folder) for item in served})
        self._render(record)
        record = self._updated(record)
        with self._late("not all that was found is tracked"):
            self._tracking.track(record, found)
        ships = next((item for item in served if item.shipped), None)
        # Without `found.full` the folder of the winner is what an earlier run of the sweep left.
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
        """Add an analysis to the report and to the runs of what was analysed."""
        plan = self._plan
        path = analysis.save(plan.output)
        record = with_run_ids(record, plan.tracker).model_copy(
            update={"timings": dict(self._display.timings)}
        )
        record.save(plan.output / "sweep.json")
        self._render(record)
        with self._late("not all of the analysis is tracked"):
            self._tracking.tracker.artifact(self._tracking.run_id, path)
            runs = {trial.id: trial.run_id for trial in record.trials}
            track_analysis(self._tracking.tracker, analysis, runs, plan.output / "plots")
        self._track_report()
        return record

    @contextmanager
    def _late(self, what: str) -> Iterator[None]:
        """Report a failure and go on, since all that came before is kept.

        Args:
            what: what is not done if the body fails.

        Raises:
            DiskFullError: which leaves no room for what comes after, either.
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
            # It is damaged, which the checks have reported.
            analysis = None
        with self._late("the report was not drawn"):
            render(record, output / "report.html", analysis)

    def _updated(self, record: SweepRecord) -> SweepRecord:
        """Return the record with the runs that MLflow has by now, and save it if there are more."""
        found = with_run_ids(record, self._plan.tracker)
        if found != record:
            found.save(self._plan.output / "sweep.json")
            self._render(found)
        return found

    def _track_report(self) -> None:
        output, tracking = self._plan.output, self._tracking
        with self._late("the report is not tracked"):
            tracking.tracker.artifact(tracking.run_id, output / "sweep.json")
            if (output / "report.html").is_file():
                tracking.tracker.artifact(tracking.run_id, output / "report.html")

    def _register_shipped(self, ships: ServedAdapter, record: SweepRecord, found: Findings) -> str:
        """Register what ships and ask the gate to promote it; return the version as `models:/NAME/VERSION`.

        Columns of the winner are sorted, so that its version can be served at every rank.

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
        tags = {SCORE_TAG: repr(found.scores[item.scored].mean("val")), "data_digest": record.data_digest}
        if not any(measured.error for measured in found.baselines.values()):
            # Where a baseline could not be scored, the gate has nothing to compare with.
            best = max((base.val_score or 0.0 for base in record.baselines), default=0.0)
            tags[BASE_SCORE_TAG] = repr(best)
        run_id = next(trial.run_id for trial in record.trials if trial.id == item.trial)
        if run_id.startswith(PENDING):
            raise TrackingError(
                f"MLflow does not have the run of {item.trial} yet, which began while it was away"
            )
        return MlflowRegistry(self._plan.tracker.uri).register(item.registered, run_id, item.folder, tags)

    def _serve_from_registry(
        self, served: list[ServedAdapter], record: SweepRecord, found: Findings, shipped: str
    ) -> None:
        """Write what `rayft serve` and `serve deploy` need on a cluster of several nodes.

        Other nodes do not have the sweep's folders, so each adapter is named as a version of the registry.
        Those that do not ship are registered under names of their own, without an alias. What can't be
        registered is left out, and reported.

        Args:
            served: what is worth serving.
            record: what the sweep found.
            found: the same with all scores.
            shipped: the version of what ships; empty if it could not be registered.
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
        """Write what `rayft serve` needs, and for a cluster also what `serve deploy` needs.

        Args:
            sources: served name → adapter folder, or `models:/…`.
            registry: MLflow's URI, for `models:/…`.
        """
        config = self._plan.config
        if not sources or config.model.task != "causal_lm":
            return
        cluster = {}
        if registry:
            # `serve deploy` gives a server no working directory to rely on.
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
        write_file(self._plan.output / "serve.yaml", yaml.safe_dump(content, sort_keys=False))
        if registry:
            deployed = yaml.safe_dump(deployment(content), sort_keys=False)
            write_file(self._plan.output / "deploy.yaml", DEPLOY_HEADER + deployed)
