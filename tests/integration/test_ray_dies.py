"""If the Ray cluster of a command dies, the command soon ends with an error that says what to do."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.ray

COMMAND = """
import signal
import sys
import psutil
import ray
from rayft.flow.cluster import cluster
from rayft.flow.interrupt import interrupts

interrupts.install()
with cluster(1, device="cpu"):
    for process in psutil.Process().children():
        if process.name() == sys.argv[1]:
            process.kill()
    try:
        if sys.argv[2:]:
            signal.raise_signal(signal.SIGTERM)
    finally:
        ray.get(ray.remote(lambda: __import__("time").sleep(600)).remote())
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # Users have Ray's token authentication, which the environment of other tests turns off.
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    environment["RAY_ADDRESS"] = "local"
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.mark.parametrize("name", ["gcs_server", "raylet"])
def test_a_process_of_ray_that_dies_ends_the_command(name: str) -> None:
    done = run(name)
    assert done.returncode == 1, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ResourceError: process ")
    assert "of Ray has ended" in last
    assert "Run the same command again" in last


def test_a_signal_that_ends_ray_too_is_an_interruption() -> None:
    done = run("raylet", "signal")
    assert done.returncode == 143, done.stderr
    assert "Interrupted: what is done is kept. Continue with: " in done.stderr
    assert "ResourceError" not in done.stderr
