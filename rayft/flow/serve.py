"""Serve a sweep's result and ask it something."""

from __future__ import annotations

import functools
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from rayft.errors import ResourceError
from rayft.flow.selection import served_adapters
from rayft.report.record import Exchange, Served, SweepRecord

__all__ = ["ask", "served_names", "wait_ready"]


def served_names(
    output: Path, record: SweepRecord, ranks: int = 2, among: Collection[str] | None = None
) -> list[str]:
    """Give the values of `model` to try: the base, the winner, smaller ranks, other methods.

    The rank to ship is among them, and as many others as `ranks` leaves room for.

    Args:
        output: the sweep's folder.
        record: what the sweep found.
        ranks: how many smaller ranks to try.
        among: the adapters that are served, if some of the sweep's may be missing.
    """
    every = [item.name for item in served_adapters(output, record)]
    adapters = [name for name in every if among is None or name in among]
    if every[:1] != adapters[:1]:
        # The winner could not be registered.
        return ["base", *adapters]
    if not adapters:
        return ["base"]
    ship, winner = (record.winner.ship, record.winner.trial) if record.winner else ("", "")
    # Views of the winner at one rank for all modules; what was trained on is served under its own name.
    views = [item for item in record.squeezed if item.name == f"{winner}@r{item.rank}"]
    smaller = sorted(views, key=lambda item: (item.name != ship, -item.rank))[:ranks]
    names = [f"{adapters[0]}@r{item.rank}" for item in sorted(smaller, key=lambda item: -item.rank)]
    return ["base", adapters[0], *names, *adapters[1:]]


def wait_ready(url: str, timeout: float = 120.0) -> None:
    """Wait until a server answers.

    Raises:
        ResourceError: if it doesn't in time.
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
    """Send each question to all of `names` at once over HTTP and collect the answers.

    Args:
        url: the server's.
        names: values of the `model` field.
        questions: question → right answer.
        max_tokens: longest answer.

    Raises:
        ResourceError: if one of them does not answer with 200.
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
