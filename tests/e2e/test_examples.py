"""Every command of the examples' READMEs runs, on tiny models and with few steps."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import ray.serve as ray_serve
from typer.testing import CliRunner

from rayft.cli import app
from rayft.config import load
from rayft.flow.demo import wait_ready
from rayft.flow.quiet import known_lines_hidden
from rayft.report.record import SweepRecord
from rayft.serving.build import run
from rayft.serving.config import ServeConfig
from tests.e2e.warm import WarmWorkers

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.usefixtures("local_ray")]

ROOT = Path(__file__).parents[2]
TEXTS = [
    "model.name=tiny-llama", "optim.steps=4", "sweep.grace=4", "data.train=24", "data.val=4", "data.test=4",
    "sweep.methods={lora: {ranks: [16], lr: [1e-2]}}",
]  # fmt: skip


def readme(example: str) -> list[list[str]]:
    """Return the commands in an example's README, each as a list of its words."""
    text = (ROOT / "examples" / example / "README.md").read_text(encoding="utf-8")
    blocks = "".join(re.findall(r"```bash\n(.*?)```", text, flags=re.S)).replace("\\\n", " ")
    return [shlex.split(line) for line in blocks.replace("$PWD", str(Path.cwd())).splitlines()]


def rayft(command: list[str], *more: str) -> str:
    """Run a command of rayft with further options; return its output."""
    assert command[0] == "rayft"
    # As the command itself does (`rayft.flow.guard`).
    with known_lines_hidden():
        done = CliRunner().invoke(app, [*command[1:], *more], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    return done.output


def python(command: list[str], *more: str) -> None:
    """Run a script with further arguments."""
    assert command[0] == "python"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*command[1:], *more])
        runpy.run_path(command[1], run_name="__main__")


def set_to(settings: list[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


@contextmanager
def serving(command: list[str], *settings: str) -> Iterator[str]:
    """Serve what a `rayft serve` serves, on a free port; yield the server's URL."""
    assert command[:2] == ["rayft", "serve"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    run(load(ServeConfig, command[2], [f"port={port}", *settings]), blocking=False)
    try:
        wait_ready(f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"
    finally:
        ray_serve.shutdown()


@pytest.fixture(scope="module", autouse=True)
def folder(warm_workers: WarmWorkers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory of all examples: it has `examples/`, and gets `runs/`."""
    place = tmp_path_factory.mktemp("examples")
    (place / "examples").symlink_to(ROOT / "examples")
    with pytest.MonkeyPatch.context() as patch, warm_workers.used():
        patch.chdir(place)
        # Of a joined cluster, which that of the tests looks like, the default lies in the home folder.
        patch.setenv("RAYFT_OUTPUT", "runs")
        yield place


@pytest.fixture(autouse=True)
def nothing_else_is_printed(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """No log line, warning or progress bar of a library shows."""
    with known_lines_hidden():
        yield
    assert capfd.readouterr().err == ""


@pytest.fixture(scope="module")
def dates(folder: Path) -> Path:
    """The folder of the sweep of `own_data`."""
    show, sweep, *_ = readme("own_data")
    assert "170" in rayft(show)
    rayft(sweep, *set_to(TEXTS))
    return folder / "runs" / "dates"


def test_own_data_is_swept_and_served(dates: Path) -> None:
    _, _, serve, curl = readme("own_data")
    body = json.loads(curl[curl.index("-d") + 1])
    assert (dates / "report.html").is_file()
    with serving(serve) as url:
        asked = curl[1].replace("http://127.0.0.1:8000", url)
        for model in ("dates", "dates@r4", "base"):
            answer = httpx.post(asked, json={**body, "model": model}, timeout=60)
            assert answer.status_code == 200, answer.text
    assert body["model"] == "dates"


def test_texts_are_classified(folder: Path) -> None:
    show, sweep = readme("text_classification")
    assert "75" in rayft(show)
    rayft(sweep, *set_to([*TEXTS, "model.name=tiny-bert"]))
    record = SweepRecord.load(folder / "runs" / "messages")
    assert {trial.status for trial in record.trials} <= {"finished", "stopped"}
    assert record.winner


def test_images_are_classified(folder: Path) -> None:
    draw, show, sweep = readme("image_classification")
    python(draw)
    assert "120" in rayft(show)
    rayft(sweep)
    record = SweepRecord.load(folder / "runs" / "stripes")
    assert record.winner
    best = next(trial for trial in record.trials if trial.id == record.winner.trial)
    assert best.test
    assert best.test.value > 0.9, "stripes are easy, even for two random layers"


def test_a_canary_is_promoted_and_rolled_back(dates: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sweep, serve, canary, ask, show, promote, again, rollback, last = readme("canary")
    assert sweep == readme("own_data")[1], "its results are there"
    assert ask == again == last

    def versions(url: str) -> set[str]:
        assert capfd.readouterr().err == ""
        python(ask, url)
        said = capfd.readouterr()
        assert said.err == ""
        return set(re.findall(r"version (\w+)", said.out))

    with serving(serve, "model.name=tiny-llama") as url:
        before = versions(url)
        assert len(before) == 1
        rayft(canary, "--server", url)
        assert "30 %" in rayft(show, "--server", url)
        both = versions(url)
        assert len(both) == 2
        assert before < both
        rayft(promote, "--server", url)
        assert versions(url) == both - before
        rayft(rollback, "--server", url)
        assert versions(url) == before
