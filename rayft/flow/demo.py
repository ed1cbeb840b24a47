"""The demo: a sweep, then its result behind HTTP, asked for real."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import ray.serve as ray_serve

from rayft.analysis.record import SweepAnalysis
from rayft.config import load
from rayft.data.source import read
from rayft.errors import ConfigError
from rayft.flow.cluster import cluster
from rayft.flow.config import PipelineConfig
from rayft.flow.display import Display
from rayft.flow.hold import LOCK_FILE, hold
from rayft.flow.serve import ask, served_names, wait_ready
from rayft.flow.sweep.damaged import check_own
from rayft.flow.sweep.preflight import STAMP_FILE, WRITTEN, is_sweep, stamp_line
from rayft.flow.sweep.run import run_sweep
from rayft.report.record import SweepRecord
from rayft.report.render import render
from rayft.serving.build import preflight, run
from rayft.serving.config import ServeConfig

__all__ = ["clear", "run_demo"]


_NAMES = "|".join(map(re.escape, WRITTEN))
OWN = re.compile(rf"({_NAMES}|artifacts|spool|mlflow\.db.*|\.lock|\.({_NAMES})[-.][\w-]+)")
"""Names in a sweep's folder that rayft gives: results, what tracking writes, what an interruption left."""
QUESTIONS = 3
"""Test questions that the served application is asked."""


def run_demo(config: PipelineConfig, display: Display, stay: Callable[[], None] | None = None) -> SweepRecord:
    """Sweep, serve, ask; then stop the server, or call `stay` first.

    Raises:
        RayftError: as `run_sweep` and the serving layer.
    """
    started = time.monotonic()
    _check_port(config)
    record = run_sweep(config, display)
    output = config.folder
    if (output / "serve.yaml").is_file():
        record = _serve_and_ask(config, record, output, display, stay)
    timings = {**record.timings, "total": time.monotonic() - started}
    record = record.model_copy(update={"timings": timings})
    record.save(output / "sweep.json")
    render(record, output / "report.html", SweepAnalysis.find(output))
    return record


def clear(config: PipelineConfig, *, overwrite: bool) -> None:
    """Remove what an earlier demo with the same settings wrote.

    Args:
        config: the demo's.
        overwrite: whether a sweep with other settings is removed too.

    Raises:
        ConfigError: if the folder holds another sweep, or something beside what a sweep writes, or another
            command writes to it.
        ArtifactError: if something was put into an adapter's folder.
    """
    if is_sweep(
        config.folder
    ):  # If not, the sweep's own checks refuse a folder whose files it would replace.
        with hold(config.folder, "--set output=…"):
            _clear(config, overwrite)


def _clear(config: PipelineConfig, overwrite: bool) -> None:
    output = config.folder
    stamp = (output / STAMP_FILE).read_text(encoding="utf-8")
    if not (overwrite or stamp.startswith(stamp_line(config))):
        raise ConfigError(
            f"{output} holds a sweep with another configuration; choose another folder with --set output=…, "
            "or replace it with --overwrite"
        )
    others = sorted(path.name for path in output.iterdir() if not OWN.fullmatch(path.name))
    if others:
        raise ConfigError(
            f"{output} holds {', '.join(others)}, which the demo did not write and would delete; move that "
            "away, or choose another folder with --set output=…"
        )
    check_own(output)
    for path in output.iterdir():
        if path.name == LOCK_FILE:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _serve_and_ask(
    config: PipelineConfig,
    record: SweepRecord,
    output: Path,
    display: Display,
    stay: Callable[[], None] | None,
) -> SweepRecord:
    serve = load(ServeConfig, output / "serve.yaml")
    asked = read(config.data).test[:QUESTIONS]
    questions = {example.messages[-2].content: example.answer for example in asked}
    url = f"http://{serve.host}:{serve.port}"
    with cluster(serve.cpus, device="cpu"):
        try:
            with display.stage("serve"):
                run(serve, blocking=False)
                wait_ready(url)
            with display.stage("ask over HTTP"):
                names = served_names(output, record, among=serve.adapters)
                served = ask(url, names, questions)
            if stay:
                stay()
        finally:
            ray_serve.shutdown()
    return record.model_copy(update={"served": served, "timings": dict(display.timings)})


def _check_port(config: PipelineConfig) -> None:
    """Refuse a port in use before the sweep, not after it."""
    preflight(ServeConfig(model=config.model, host=config.serve.host, port=config.serve.port))
