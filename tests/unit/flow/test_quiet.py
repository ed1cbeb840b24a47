"""Harmless lines of libraries are hidden, and no others."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from ray._private import worker

from rayft.flow.quiet import FILTERS, LEVELS, hide_known_lines, hide_ray_lines, known_lines_hidden

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


def test_a_users_program_keeps_its_logging(caplog: pytest.LogCaptureFixture) -> None:
    names = [*LEVELS, *FILTERS]
    mine = logging.getLogger("alembic")
    before = {name: (logging.getLogger(name).level, [*logging.getLogger(name).filters]) for name in names}
    level, mine.level = mine.level, logging.DEBUG

    @known_lines_hidden()
    def called() -> None:
        with known_lines_hidden():
            logging.getLogger("mlflow.store.db.utils").info("Updating database tables")
        logging.getLogger("mlflow.store.db.utils").error("a traceback, which is raised too")
        logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load CPU gemm_4bit_forward")
        logging.getLogger("DeepSpeed").warning("Setting accelerator to CPU. If you have GPU, …")
        mine.info("what the program has asked for")
        logging.getLogger("mlflow").warning("a server is slow")

    try:
        with caplog.at_level(logging.INFO):
            called()
            assert mine.level == logging.DEBUG
    finally:
        mine.level = level
    assert [record.getMessage() for record in caplog.records] == [
        "what the program has asked for", "a server is slow",
    ]  # fmt: skip
    after = {name: (logging.getLogger(name).level, [*logging.getLogger(name).filters]) for name in names}
    assert after == before


def test_an_error_restores_it_too() -> None:
    logger = logging.getLogger("mlflow.store.db.utils")
    level, logger.level = logger.level, logging.NOTSET

    @known_lines_hidden()
    def fails() -> None:
        raise ValueError(str(logger.level))

    try:
        with pytest.raises(ValueError, match=str(logging.CRITICAL)):
            fails()
        assert logger.level == logging.NOTSET
    finally:
        logger.level = level
