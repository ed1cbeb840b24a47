"""The demo: a sweep, then its result behind HTTP, asked for real."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import ray.serve as ray_serve

from rayft.config import load
from rayft.data.source import read
from rayft.flow.cluster import cluster
from rayft.flow.config import PipelineConfig
from rayft.flow.display import Display
from rayft.flow.serve import ask, served_names, wait_ready
from rayft.flow.sweep import run_sweep
from rayft.report.frame import SweepRecord
from rayft.report.render import render
from rayft.serving.build import preflight, run
from rayft.serving.config import ServeConfig

__all__ = ["run_demo"]


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
    output = Path(config.output).absolute()
    if (output / "serve.yaml").is_file():
        record = _serve_and_ask(config, record, output, display, stay)
    timings = {**record.timings, "total": time.monotonic() - started}
    record = record.model_copy(update={"timings": timings})
    record.save(output / "sweep.json")
    render(record, output / "report.html")
    return record


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
                served = ask(url, served_names(output, record), questions)
            if stay:
                stay()
        finally:
            ray_serve.shutdown()
    return record.model_copy(update={"served": served, "timings": dict(display.timings)})


def _check_port(config: PipelineConfig) -> None:
    """Refuse a port in use before the sweep, not after it."""
    preflight(ServeConfig(model=config.model, host=config.serve.host, port=config.serve.port))
