"""Harmless lines of libraries are hidden, and no others."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from ray._private import worker

from rayft.flow.quiet import hide_known_lines, hide_ray_lines

STOPPED = (
    "Task ServeController.graceful_shutdown failed. There are infinite retries remaining, so the task will "
    "be retried. Error: The actor is dead because it was killed by `ray.kill`."
)


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Return a function that passes lines to Ray's printer, and returns what it printed of them."""
    monkeypatch.setattr(worker, "print_to_stdstream", worker.print_to_stdstream)
    hide_ray_lines()
    once = worker.print_to_stdstream
    hide_ray_lines()
    assert worker.print_to_stdstream is once

    def lines(*text: str) -> str:
        batch = {"lines": [*text], "pid": "raylet", "is_err": False, "ip": "1", "job": "1"}
        worker.print_to_stdstream(batch, ignore_prefix=True)
        return capsys.readouterr().out

    return lines


def test_ray_serves_own_end_is_hidden(printed) -> None:
    assert printed(STOPPED) == ""
    assert printed(STOPPED.replace("graceful_shutdown", "listen_for_change")) == ""


@pytest.mark.parametrize(
    "text",
    [
        STOPPED.replace("killed by `ray.kill`", "out of memory"),
        STOPPED.replace("ServeController", "Replica"),
        "the raylet was killed",
    ],
)
def test_other_lines_of_ray_are_shown(printed, text: str) -> None:
    assert text in printed(STOPPED, text)


def test_ray_serve_and_deepspeed_still_warn(caplog: pytest.LogCaptureFixture) -> None:
    import deepspeed  # noqa: F401
    import ray.serve as ray_serve  # noqa: F401

    hide_known_lines()
    hide_known_lines()
    serve, speed = logging.getLogger("ray.serve"), logging.getLogger("DeepSpeed")
    for logger in (serve, speed):
        logger.addHandler(caplog.handler)
    try:
        serve.setLevel(logging.INFO)
        serve.info("Started Serve")
        serve.warning("a replica has died")
        speed.warning("Setting accelerator to CPU. If you have GPU or other accelerator, …")
        speed.warning("an optimizer is slow")
        speed.error("a step failed")
    finally:
        for logger in (serve, speed):
            logger.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records] == [
        "a replica has died", "an optimizer is slow", "a step failed",
    ]  # fmt: skip
