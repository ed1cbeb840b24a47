"""The broker's promises, without Ray: it is plain asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from rayft.sweep.broker import CLOSE, Broker, Event, Job


def play(scene: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scene, 10))


def job(name: str, lane: str | None = None) -> Job:
    return Job(name, "train", b"", lane)


def test_a_report_waits_for_the_decision() -> None:
    async def scene() -> None:
        broker = Broker()
        await broker.submit(job("a"))
        pulled = await broker.pull("lane")
        assert isinstance(pulled, Job)
        report = asyncio.create_task(broker.report("a", 10, {"val_loss": 1.0}))
        assert await broker.next_event("a") == Event("report", 10, {"val_loss": 1.0})
        await asyncio.sleep(0.05)
        assert not report.done(), "the lane went on before the search had decided"
        waiting = asyncio.create_task(broker.next_event("a"))
        assert await report is True
        await broker.finish("a", 20, {"score": 3})
        assert await waiting == Event("final", 20, {"score": 3})

    play(scene())


def test_cancelling_frees_the_lane_at_once() -> None:
    async def scene() -> None:
        broker = Broker()
        await broker.submit(job("a"))
        await broker.submit(job("b"))
        await broker.pull("lane")
        report = asyncio.create_task(broker.report("a", 10, {}))
        await broker.next_event("a")
        await broker.cancel("a")
        assert await report is False
        await broker.finish("a", 10, {"kept": True})
        assert (await broker.result("a")) == Event("final", 10, {"kept": True})
        following = await broker.pull("lane")
        assert isinstance(following, Job)
        assert following.id == "b"

    play(scene())


def test_a_job_cancelled_in_the_queue_is_never_run() -> None:
    async def scene() -> None:
        broker = Broker()
        await broker.submit(job("a"))
        await broker.cancel("a")
        assert await broker.pull("lane", timeout=0.05) is None

    play(scene())


def test_a_lane_that_comes_back_gets_its_job_and_reports_once() -> None:
    async def scene() -> None:
        broker = Broker()
        await broker.submit(job("a"))
        await broker.pull("lane")
        lost = asyncio.create_task(broker.report("a", 10, {"val_loss": 1.0}))
        assert (await broker.next_event("a")).step == 10
        again = await broker.pull("lane")
        assert isinstance(again, Job)
        assert again.id == "a"
        assert await broker.report("a", 10, {"val_loss": 1.0}) is True, (
            "a report that was taken is taken again"
        )
        replayed = asyncio.create_task(broker.report("a", 20, {"val_loss": 0.5}))
        assert (await broker.next_event("a")).step == 20
        replayed.cancel()
        lost.cancel()

    play(scene())


def test_a_job_that_kills_its_lane_again_and_again_fails() -> None:
    async def scene() -> None:
        broker = Broker(attempts=2)
        await broker.submit(job("a"))
        await broker.submit(job("b"))
        await broker.pull("lane")
        await broker.pull("lane")
        following = await broker.pull("lane")
        assert isinstance(following, Job)
        assert following.id == "b"
        event = await broker.next_event("a")
        assert event.kind == "failed"
        assert "died 2 times" in event.values["error"]

    play(scene())


def test_jobs_of_a_lane_that_is_lost_for_good_fail() -> None:
    async def scene() -> None:
        broker = Broker()
        await broker.submit(job("a"))
        await broker.submit(job("b"))
        await broker.pull("lane")
        await broker.lane_lost("lane", "out of memory")
        for name in ("a", "b"):
            event = await broker.next_event(name)
            assert event == Event("failed", values={"error": "out of memory"})
        await broker.submit(job("c"))
        assert (await broker.next_event("c")).kind == "failed"

    play(scene())


def test_a_job_for_one_lane_is_not_given_to_another() -> None:
    async def scene() -> None:
        broker = Broker()
        await broker.submit(job("a", lane="own"))
        assert await broker.pull("other", timeout=0.05) is None
        pulled = await broker.pull("own")
        assert isinstance(pulled, Job)

    play(scene())


def test_closing_ends_every_lane() -> None:
    async def scene() -> None:
        broker = Broker()
        waiting = asyncio.create_task(broker.pull("lane"))
        await asyncio.sleep(0.05)
        await broker.close()
        assert await waiting == CLOSE
        assert await broker.pull("late") == CLOSE

    play(scene())


def test_a_submitted_job_is_pulled_by_a_waiting_lane() -> None:
    async def scene() -> None:
        broker = Broker()
        waiting = asyncio.create_task(broker.pull("lane"))
        await asyncio.sleep(0.05)
        await broker.submit(job("a"))
        assert isinstance(await waiting, Job)
        (shown,) = await broker.snapshot()
        assert shown["state"] == "running"
        assert shown["lane"] == "lane"

    play(scene())
