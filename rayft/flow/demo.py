"""`rayft demo`: run a sweep, serve its result over HTTP, and ask the server test questions."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import ray.serve as ray_serve

from rayft.analysis.record import SweepAnalysis
from rayft.config import load
from rayft.data.source import read
from rayft.errors import ConfigError, ResourceError
from rayft.flow.ahead import Ahead
from rayft.flow.cluster import cluster
from rayft.flow.config import PipelineConfig
from rayft.flow.display import Display
from rayft.flow.hold import hold
from rayft.flow.selection import served_adapters
from rayft.flow.sweep.folder import check_stamp, clear_folder, is_sweep
from rayft.flow.sweep.run import run_sweep
from rayft.report.evaluations import SavedEvaluations
from rayft.report.record import Exchange, Served, SweepRecord
from rayft.report.render import render
from rayft.serving.build import preflight, run
from rayft.serving.config import ServeConfig
from rayft.sweep.result import RESULT_FILE

__all__ = ["ask", "earlier", "run_demo", "served_names", "wait_ready"]

STAGES = (
    "check", "start workers", "score the base", "squeeze", "register", "serve", "ask",
)  # fmt: skip
"""How the names of the demo's stages begin."""
QUESTIONS = 3
"""How many test questions the server is asked."""


def run_demo(
    config: PipelineConfig,
    display: Display,
    stay: Callable[[], None] | None = None,
    lanes: Ahead | None = None,
) -> SweepRecord:
    """Run the sweep, serve its result, and ask the server; then stop the server.

    Args:
        config: the sweep's.
        display: shows the stages.
        stay: called before the server stops, if given. The server answers until it returns.
        lanes: lanes that have been started for the sweep.

    Raises:
        RayftError: as `run_sweep` and the serving layer.
    """
    started = time.monotonic()
    display.plan(*STAGES)
    _check_port(config)
    record = run_sweep(config, display, lanes)
    output = config.folder
    if (output / "serve.yaml").is_file():
        record = _serve_and_ask(config, record, output, display, stay)
    timings = {**record.timings, "total": time.monotonic() - started}
    record = record.model_copy(update={"timings": timings})
    record.save(output / "sweep.json")
    render(record, output / "report.html", SweepAnalysis.find(output), SavedEvaluations.find(output))
    return record


def earlier(config: PipelineConfig, *, overwrite: bool) -> str:
    """Return what an earlier demo has left in the folder for this one to start from; empty if nothing.

    Args:
        config: the demo's.
        overwrite: whether to delete it instead, also if it is a sweep with other settings.

    Raises:
        ConfigError: if the folder holds another sweep (unless `overwrite`). With `overwrite`: if it holds
            anything that rayft did not write, or if another command writes to it.
        ArtifactError: if one of its adapter folders holds a user's files.
    """
    folder = config.folder
    if not is_sweep(folder):
        # The checks of the sweep refuse the folder if it would lose files.
        return ""
    if overwrite:
        with hold(folder, "--set output=…"):
            clear_folder(folder)
        return ""
    try:
        check_stamp(config, folder)
    except ConfigError as error:
        raise ConfigError(f"{error}, as --overwrite does") from None
    trained = len(list(folder.glob(f"trials/*/{RESULT_FILE}")))
    adapters, them = ("adapter", "it") if trained == 1 else ("adapters", "them")
    return (
        f"{folder} holds an earlier demo with {trained} trained {adapters}: this one starts from {them} "
        "(--overwrite starts from nothing)"
    )


def served_names(
    output: Path, record: SweepRecord, ranks: int = 2, among: Collection[str] | None = None
) -> list[str]:
    """Return the values of the `model` field to try: the base, the winner, lower ranks, other methods.

    The rank that ships is among the lower ranks, if any are returned.

    Args:
        output: the sweep's folder.
        record: what the sweep found.
        ranks: how many lower ranks of the winner to try.
        among: the adapters that are served; all of the sweep's if not given.
    """
    every = [item.name for item in served_adapters(output, record)]
    adapters = [name for name in every if among is None or name in among]
    if every[:1] != adapters[:1]:
        # The winner could not be registered.
        return ["base", *adapters]
    if not adapters:
        return ["base"]
    ship, winner = (record.winner.ship, record.winner.trial) if record.winner else ("", "")
    # Views of the winner at one rank for all modules. What was trained further is served under its own name.
    views = [item for item in record.squeezed if item.name == f"{winner}@r{item.rank}"]
    smaller = sorted(views, key=lambda item: (item.name != ship, -item.rank))[:ranks]
    names = [f"{adapters[0]}@r{item.rank}" for item in sorted(smaller, key=lambda item: -item.rank)]
    return ["base", adapters[0], *names, *adapters[1:]]


def wait_ready(url: str, timeout: float = 120.0) -> None:
    """Wait until a server is ready for requests.

    Args:
        url: the server's.
        timeout: seconds to wait.

    Raises:
        ResourceError: if it is not ready in time.
    """
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/readyz", timeout=5).is_success:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.25)
    raise ResourceError(f"{url} did not answer within {timeout:.0f} s; look at Ray Serve's logs")


def ask(url: str, names: Sequence[str], questions: Mapping[str, str], max_tokens: int = 16) -> Served:
    """Send each question to all models of a server at once, and collect their answers.

    Args:
        url: the server's.
        names: values of the `model` field.
        questions: question → right answer.
        max_tokens: length limit of an answer.

    Raises:
        ResourceError: if a request is not answered with status 200.
    """
    exchanges = []
    with ThreadPoolExecutor(len(names)) as pool:
        for question, expected in questions.items():
            texts = pool.map(functools.partial(_one, url, question, max_tokens), names)
            answers = dict(zip(names, texts, strict=True))
            exchanges.append(Exchange(question=question, expected=expected, answers=answers))
    return Served(url=url, names=tuple(names), exchanges=tuple(exchanges))


def _one(url: str, question: str, max_tokens: int, name: str) -> str:
    body = {
        "model": name,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    if answer.status_code != 200:
        raise ResourceError(f"{name} answered {answer.status_code}: {answer.text[:300]}")
    return str(answer.json()["choices"][0]["message"]["content"]).strip()


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
    """Refuse a port that is in use before the sweep runs, not after it."""
    preflight(ServeConfig(model=config.model, host=config.serve.host, port=config.serve.port))
