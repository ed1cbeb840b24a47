"""A sweep of a module's `config`, and what it said."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from rayft.flow.config import PipelineConfig
from rayft.flow.display import Display
from rayft.flow.sweep import run_sweep
from rayft.report.frame import SweepRecord


@pytest.fixture(scope="module")
def said() -> io.StringIO:
    return io.StringIO()


@pytest.fixture(scope="module")
def record(local_ray: None, config: PipelineConfig, said: io.StringIO) -> SweepRecord:
    return run_sweep(config, Display(Console(file=said, width=1000)))
