"""Track a squeezed adapter: as a child run of the trial that it was made from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rayft.artifacts import AdapterArtifact
from rayft.flow.scoring import Measured
from rayft.flow.squeeze.make import SqueezedAdapter
from rayft.report.spectrum import spectrum_plot
from rayft.tracking.base import Former, Tracker

__all__ = ["score_metrics", "track_squeezed"]


def score_metrics(measured: Measured, before: str = "") -> dict[str, float]:
    """Return the scores of an adapter as metrics: test with its interval, and val.

    Args:
        measured: the scores.
        before: prefix of the metrics' names.
    """
    found = {}
    test, val = measured.score("test"), measured.mean("val")
    if test is not None:
        found = {"test_score": test.value, "test_low": test.low, "test_high": test.high}
    if val is not None:
        found["val_score"] = val
    return {f"{before}{name}": value for name, value in found.items()}


def track_squeezed(
    tracker: Tracker,
    item: SqueezedAdapter,
    *,
    parent: str | None,
    settings: Mapping[str, str],
    data: Mapping[str, str],
    after: Measured,
    before: Measured,
    source_bytes: int,
    plots: Path,
) -> str:
    """Track a squeezed adapter, and return the id of its run.

    Args:
        tracker: where to track it.
        item: the adapter.
        parent: id of the run of the trial that it was made from, or of the sweep; None if neither is tracked.
        settings: the source's configuration: leaf → value. The run of an adapter that was trained further
            has its own already.
        data: parameters that identify the data of the scores, as far as known.
        after: scores of the adapter; empty if it was not scored.
        before: scores of its source.
        source_bytes: size of the source's weights.
        plots: folder for the plot, which stays there until it is sent.
    """
    # The rank comes first because MLflow's table cuts off the end of a name.
    shown = f"@{item.label} of {item.source.name}"
    tags = {"rayft.kind": "squeezed", "rayft.how": item.how}
    # The lane has made the run of an adapter that was trained further; the same key finds that run.
    former = Former(item.key) if parent else None
    run = tracker.run(shown, item.tracked_as, parent=parent, tags=tags, former=former, restart=False)
    own = {"squeezed_from": item.source.name, "squeezed_to": item.label, "squeezed_how": item.how}
    if item.how == "post":
        own |= {**settings, "method.name": "squeeze", "method.rank": str(item.rank)}
    tracker.params(run, {**own, **data})
    # Step 0, because the lane may have tracked some of these for an adapter that was trained further, and
    # because squeezing again takes other seconds.
    sizes = {"trainable_parameters": item.parameters, "adapter_bytes": item.bytes}
    tracker.metrics(run, {**sizes, "squeeze_seconds": item.seconds}, 0)
    numbers = {**_numbers(item), "source_bytes": source_bytes}
    numbers |= {**score_metrics(after), **score_metrics(before, "source_")}
    tracker.metrics(run, numbers)
    tracker.artifact(run, item.folder, "adapter")
    tracker.artifact(run, _plot(item, shown, plots))
    tracker.finish(run, "finished")
    return run


def _numbers(item: SqueezedAdapter) -> dict[str, float]:
    return {
        "retained_energy_mean": item.energy_mean,
        "retained_energy_min": item.energy_min,
        **{f"retention/{module}": share for module, share in item.energy.items()},
    }


def _plot(item: SqueezedAdapter, title: str, plots: Path) -> Path:
    artifact = AdapterArtifact.load(item.folder)
    ranks = {name: factors.rank for name, factors in artifact.modules.items()}
    place = plots / item.key.replace("/", "-") / "spectrum.png"
    return spectrum_plot(artifact.meta.singular_values, ranks, title, place, artifact.meta.tail_energy)
