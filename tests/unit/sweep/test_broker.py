"""The broker, tested as plain asyncio without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from rayft.errors import DiskFullError, ResourceError
from rayft.sweep.broker import CLOSE, Beat, Broker, Patience
from rayft.sweep.jobs import Event, Job
from rayft.sweep.reasons import NODE_LOST


def play(scene: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scene, 10))


def job(name: str, lane: str | None = None) -> Job[Any, Any]:
    return Job(name, "train", b"", resumable=True, lane=lane)


def test_a_report_waits_for_the_decision() -> None:
    async def scene() -> None:
        broker = Broker()
        await broker.submit(job("a"))
        pulled = await broker.pull("lane")
        assert isinstance(pulled, Job)
        report = asyncio.create_task(broker.report("a", 10, {"val_loss": 1.0}))
        assert await broker.next_event("a") == Event("report", 10, {"val_loss": 1.0})
        await asyncio.sleep(0.05)
        assert not report.done(), "the lane continued before the search had decided"
        waiting = asyncio.create_task(broker.next_event("a"))
        assert await report == "continue"
        await broker.finish("a", b"result")
        assert await waiting == Event("final", payload=b"result")

    play(scene())


def test_announced_evaluations_reach_all_clients_before_any_decision() -> None:
    async def scene() -> None:
        broker = Broker()
        for name in "ab":
            await broker.submit(job(name))
            await broker.pull("lane")
        await broker.announce([("a", 10, {"val_loss": 1.0}), ("b", 10, {"val_loss": 2.0})])
        assert await broker.next_event("a") == Event("report", 10, {"val_loss": 1.0})
        assert await broker.next_event("b") == Event("report", 10, {"val_loss": 2.0})
        # The reports that follow are of the same evaluations, and wait for the decisions.
        reports = [
            asyncio.create_task(broker.report(name, 10, {"val_loss": loss}))
            for name, loss in (("a", 1.0), ("b", 2.0))
        ]
        await asyncio.sleep(0.05)
        assert not any(report.done() for report in reports)
        waiting = asyncio.create_task(broker.next_event("a"))
        await broker.cancel("b", 10)
        assert [await report for report in reports] == ["continue", "stop"]
        await asyncio.sleep(0.05)
        assert not waiting.done(), "an evaluation was passed on twice"
        await broker.finish("a", b"result")
        assert (await waiting).kind == "final"

    play(scene())


def test_a_job_that_has_ended_is_done_again_only_if_asked() -> None:
    async def scene() -> None:
        broker = Broker()
        assert await broker.submit(job("a"), again=False)
        assert not await broker.submit(job("a")), "a job that runs is queued twice"
        await broker.pull("lane")
        await broker.finish("a", b"result", 8, {"val_loss": 0.5})
        ended = Event("final", 8, {"val_loss": 0.5}, b"result")
        assert await broker.next_event("a", 0) == ended
        # The process that had received the end dies, and another one takes its place.
        assert not await broker.submit(job("a"), again=False)
        assert await broker.next_event("a", 0) == ended
        # Another search forgets how it ended.
        await broker.submit(job("b"))
        await broker.forget(["a", "b", "unknown"])
        assert await broker.submit(job("a"), again=False)
        assert not await broker.submit(job("b"), again=False), "a job that has not ended was forgotten"

    play(scene())


def test_a_lane_that_has_a_place_and_does_not_start_is_reported_once() -> None:
    async def scene() -> None:
        broker = Broker(patience=Patience(warn=0.05))
        for lane in ("quick", "slow", "dead"):
            await broker.expect(lane)
            await broker.starts(lane)
        await broker.check_starts()
        await broker.submit(job("a"))
        await broker.pull("quick")
        await broker.lane_died("dead", "no reason")
        left = len(await broker.notices())
        await asyncio.sleep(0.06)
        await broker.check_starts()
        await broker.check_starts()
        (notice,) = await broker.notices(left)
        assert notice.startswith("slow has a place, but has not started for 0 s.")
        # Its processes are started again.
        await broker.starts("slow")
        await asyncio.sleep(0.06)
        await broker.check_starts()
        assert len(await broker.notices(left)) == 2

    play(scene())


def test_a_lane_of_its_own_is_started_by_whoever_finds_it_missing() -> None:
    async def scene() -> None:
        broker = Broker()
        assert await broker.submit(job("a", "lane-a"), again=False)
        # Whoever queued it has died before the lane was started.
        assert await broker.submit(job("a", "lane-a"), again=False)
        await broker.expect("lane-a")
        assert not await broker.submit(job("a", "lane-a"), again=False)
        await broker.pull("lane-a")
        await broker.finish("a", b"result")
        assert not await broker.submit(job("a", "lane-a"), again=False)

    play(scene())


def test_a_cancelled_job_frees_its_lane_at_once() -> None:
    async def scene() -> None:
        broker = Broker()
        await broker.submit(job("a"))
        await broker.submit(job("b"))
        await broker.pull("lane")
        report = asyncio.create_task(broker.report("a", 10, {}))
        await broker.next_event("a")
        await broker.cancel("a", 10)
        assert await report == "stop"
        await broker.finish("a", b"result")
        assert (await broker.result("a")) == Event("final", payload=b"result")
        following = await broker.pull("lane")
        assert isinstance(following, Job)
        assert following.id == "b"

    play(scene())


def test_a_job_about_which_nobody_decides_goes_on() -> None:
    async def scene() -> None:
        broker = Broker()
        await broker.submit(job("a"))
        await broker.pull("lane")
        asked = asyncio.create_task(broker.report("a", 10, {}))
        # The process that has received the report dies.
        await broker.next_event("a")
        await broker.leave("a")
        assert await asked == "continue"
        for step in (20, 30):
            assert await broker.report("a", step, {}) == "continue"
        await broker.finish("a", b"result")
        assert await broker.result("a") == Event("final", payload=b"result")
        await broker.leave("a")
        await broker.leave("unknown")
        assert await broker.notices() == [
            "a: the search can't decide about it any more, so it trains to its end"
        ]

    play(scene())


def test_a_restarted_lane_gets_its_job_and_each_report_is_passed_on_once() -> None:
    async def scene() -> None:
        broker = Broker()
        await broker.submit(job("a"))
        await broker.pull("lane")
        lost = asyncio.create_task(broker.report("a", 10, {"val_loss": 1.0}))
        assert (await broker.next_event("a")).step == 10
        assert await broker.lane_died("lane", "it crashed")
        again = await broker.pull("lane")
        assert isinstance(again, Job)
        assert again.id == "a"
        repeated = asyncio.create_task(broker.report("a", 10, {"val_loss": 1.0}))
        await asyncio.sleep(0.05)
        assert not repeated.done(), "the lane continued before the search had decided"
        following = asyncio.create_task(broker.next_event("a"))
        assert await repeated == await lost == "continue"
        assert await broker.report("a", 10, {"val_loss": 1.0}) == "continue"
        later = asyncio.create_task(broker.report("a", 20, {"val_loss": 0.5}))
        assert (await following).step == 20, "a report that was taken is passed on again"
        later.cancel()

    play(scene())


def test_a_lane_that_announces_its_end_continues_its_job_as_another_request() -> None:
    async def scene() -> None:
        broker = Broker(attempts=1)
        await broker.submit(job("a"))
        await broker.pull("lane")
        for payload in (b"half", b"quarter"):
            await broker.renew("lane", "a", payload, "it did not fit")
            # Another worker of the group says the same, or fails because the first one has ended.
            await broker.renew("lane", "a", payload, "it did not fit")
            await broker.renew("lane", "a", None, "the connection was closed")
            assert await broker.lane_died("lane", "RuntimeError: it did not fit")
            again = await broker.pull("lane")
            assert isinstance(again, Job)
            assert (again.id, again.payload, again.resumable) == ("a", payload, True)
        assert await broker.notices() == ["a: it did not fit"] * 2
        # Another end still counts.
        assert await broker.lane_died("lane", "it crashed")
        assert (
            await broker.next_event("a")
        ).error == "its lane died 1 times, the last time because it crashed"

    play(scene())


def test_a_job_that_is_put_back_goes_on_elsewhere() -> None:
    async def scene() -> None:
        broker = Broker(attempts=1)
        for name in "ab":
            await broker.submit(job(name))
        await broker.pull("lane")
        report = asyncio.create_task(broker.report("a", 10, {"val_loss": 1.0}))
        assert (await broker.next_event("a")).step == 10
        waiting = asyncio.create_task(broker.next_event("a"))
        assert await report == "continue"
        await broker.put_back("a")
        again = await broker.pull("other")
        assert isinstance(again, Job)
        assert again.id == "a"
        assert await broker.report("a", 10, {"val_loss": 1.0}) == "continue"
        waiting.cancel()
        # After an interruption no lane takes it.
        assert await broker.interrupt() == ["a"]
        await broker.put_back("a")
        assert (await broker.result("a")) == Event("interrupted", 10)

    play(scene())


def test_a_lane_that_announces_its_end_with_a_failed_job_takes_the_next() -> None:
    async def scene() -> None:
        broker = Broker(attempts=1)
        for name, lane in (("a", None), ("b", None), ("c", "own")):
            await broker.submit(job(name, lane))
        await broker.pull("lane")
        await broker.renew("lane", "a", None, "it does not fit: take less")
        assert await broker.next_event("a") == Event("failed", error="it does not fit: take less")
        assert await broker.lane_died("lane", "RuntimeError: it does not fit")
        following = await broker.pull("lane")
        assert isinstance(following, Job)
        assert following.id == "b"
        await broker.pull("own")
        await broker.renew("own", "c", None, "it does not fit")
        assert not await broker.lane_died("own", "RuntimeError"), "it has no other job"
        assert await broker.notices() == []

    play(scene())


def test_the_job_of_a_dead_lane_goes_to_the_next_free_lane_before_all_others() -> None:
    async def scene() -> None:
        broker = Broker()
        for name in ("a", "b", "c"):
            await broker.submit(job(name))
        await broker.pull("one")
        await broker.pull("two")
        assert await broker.lane_died("one", "it crashed")
        await broker.finish("b", b"")
        taken = await broker.pull("two")
        assert isinstance(taken, Job)
        assert taken.id == "a"
        following = await broker.pull("one")
        assert isinstance(following, Job)
        assert following.id == "c", "the lane that came back took the same job"

    play(scene())


def test_a_lane_that_died_while_it_waited_for_a_job_gets_none() -> None:
    async def scene() -> None:
        broker = Broker()
        await broker.expect("lane")
        # Ray does not cancel the call of a process that has died.
        dead = asyncio.create_task(broker.pull("lane"))
        await asyncio.sleep(0.05)
        assert await broker.lane_died("lane", "it crashed")
        await broker.submit(job("a"))
        assert await dead is None
        taken = await broker.pull("lane", timeout=0.0)
        assert isinstance(taken, Job), "the job was given to a process that is gone"

    play(scene())


def test_a_job_for_one_lane_waits_until_that_lane_is_back() -> None:
    async def scene() -> None:
        broker = Broker()
        await broker.submit(job("a", lane="own"))
        await broker.pull("own")
        assert await broker.lane_died("own", "it crashed")
        assert await broker.pull("other", timeout=0.05) is None
        assert isinstance(await broker.pull("own"), Job)

    play(scene())


def test_a_lost_node_counts_neither_against_the_trial_nor_the_lane() -> None:
    async def scene() -> None:
        broker = Broker(attempts=1)
        await broker.expect("lane")
        await broker.submit(job("a"))
        for _ in range(3):
            assert isinstance(await broker.pull("lane"), Job)
            assert await broker.lane_died("lane", NODE_LOST)
        assert await broker.lane_died("lane", NODE_LOST), "it was lost again before it had a job"
        assert (await broker.snapshot())[0]["state"] == "queued"
        await broker.pull("lane")
        await broker.lane_died("lane", "it crashed")
        event = await broker.next_event("a")
        assert event.kind == "failed"
        assert "died 1 times, the last time because it crashed" in event.error
        assert NODE_LOST in (await broker.notices())[0]

    play(scene())


def test_a_lane_that_dies_before_it_learns_of_a_stop_stops_at_the_same_step() -> None:
    async def scene() -> None:
        broker = Broker()
        await broker.submit(job("a"))
        await broker.pull("lane")
        first = asyncio.create_task(broker.report("a", 5, {}))
        await broker.next_event("a")
        asking = asyncio.create_task(broker.next_event("a"))
        await first
        report = asyncio.create_task(broker.report("a", 10, {}))
        await asking
        report.cancel()
        await broker.cancel("a", 10)
        assert await broker.lane_died("lane", "it crashed")
        again = await broker.pull("lane")
        assert isinstance(again, Job), "no lane saves the trial's adapter"
        assert await broker.report("a", 5, {}) == "continue"
        assert await broker.report("a", 10, {}) == "stop"
        await broker.finish("a", b"result")
        assert await broker.result("a") == Event("final", payload=b"result")

    play(scene())


def test_an_event_is_kept_until_the_client_has_processed_it() -> None:
    async def scene() -> None:
        broker = Broker()
        await broker.submit(job("a"))
        await broker.pull("lane")
        report = asyncio.create_task(broker.report("a", 10, {}))
        event = await broker.next_event("a", 0)
        # The client dies, and another client asks again in its place.
        assert await broker.next_event("a", 0) == event
        assert not report.done()
        following = asyncio.create_task(broker.next_event("a", event.number))
        assert await report == "continue"
        await broker.finish("a", b"")
        assert (await following).kind == "final"

    play(scene())


def test_a_trial_that_was_stopped_at_an_earlier_checkpoint_is_still_saved() -> None:
    async def scene() -> None:
        broker = Broker()
        await broker.submit(job("a"))
        await broker.cancel("a", 10)
        assert isinstance(await broker.pull("lane"), Job)
        assert await broker.report("a", 10, {}) == "stop"

    play(scene())


def test_an_interrupt_waits_for_resumable_jobs_and_drops_the_others() -> None:
    async def scene() -> None:
        broker = Broker()
        for name in ("decided", "training"):
            await broker.submit(job(name))
        await broker.pull("one")
        await broker.pull("two")
        await broker.submit(Job("scored", "score", b""))
        await broker.pull("three")
        await broker.submit(job("queued"))
        report = asyncio.create_task(broker.report("decided", 10, {}))
        await broker.next_event("decided")
        assert await broker.beat("two", Beat(0, 1)) is False
        assert await broker.interrupt() == ["decided", "training"]
        assert await report == "interrupt"
        assert await broker.beat("two", Beat(0, 1)) is True
        assert await broker.report("training", 10, {}) == "interrupt"
        assert await broker.settled(0.1) == ["decided", "training"]
        settled = asyncio.create_task(broker.settled(5.0))
        await broker.pause("decided", 10)
        assert await broker.settled(0.1) == ["training"]
        assert not settled.done(), "the interrupt does not wait for the checkpoints"
        await broker.pause("training", 10)
        assert await settled == []
        for name in ("decided", "training", "queued", "scored"):
            assert (await broker.result(name) or Event("failed")).kind == "interrupted"
        await broker.submit(job("late"))
        assert (await broker.next_event("late")).kind == "interrupted"
        assert await broker.pull("one") == CLOSE

    play(scene())


def test_a_full_disk_ends_all_jobs_with_one_error() -> None:
    async def scene() -> None:
        broker = Broker()
        for name in ("a", "b", "c"):
            await broker.submit(job(name))
        await broker.pull("one")
        await broker.pull("two")
        await broker.fail("a", "the disk of /x is full", fatal=True)
        await broker.fail("b", "the disk of /y is full", fatal=True)
        await broker.submit(job("d"))
        for name in ("a", "b", "c", "d"):
            with pytest.raises(DiskFullError, match="the disk of /x is full"):
                (await broker.next_event(name)).raise_fatal()
        assert {one["state"] for one in await broker.snapshot()} == {"interrupted"}
        assert await broker.pull("one") == CLOSE

    play(scene())


def test_a_silent_lane_is_reported_and_later_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr("rayft.sweep.broker._end_process", lambda beat: ended.append(beat.pid))

    async def scene() -> None:
        broker = Broker(patience=Patience(warn=0.3, kill=1.2))
        await broker.submit(job("a"))
        await broker.pull("lane")
        # One of two workers hangs, and the other one waits for it.
        await broker.beat("lane", Beat(1, 5, pid=77))
        while not ended:
            await broker.beat("lane", Beat(0, 5, pid=76))
            await asyncio.sleep(0.05)
        first, second = await broker.notices()
        assert "process 77 of lane is silent for 0 s" in first or "computes nothing" in first
        assert "ended" in second
        assert sorted(ended) == [76, 77]

    play(scene())


def test_a_pack_that_hangs_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr("rayft.sweep.broker._end_process", lambda beat: ended.append(beat.pid))

    async def scene() -> None:
        broker = Broker(patience=Patience(warn=0.3, kill=1.2))
        for name in "abc":
            await broker.submit(replace(job(name), pack="p"))
        await broker.pull("lane")
        for _ in "bc":
            await broker.pull("lane", 0.0, "p")
        # One of them waits for the search, and the others should go on meanwhile.
        report = asyncio.create_task(broker.report("b", 10, {}))
        while not ended:
            await broker.beat("lane", Beat(0, 5, pid=77))
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.4)
        first, second = await broker.notices()
        assert first.startswith("a, b, c: process 77 of lane computes nothing")
        assert "its trials continue from the last checkpoint" in second
        assert ended == [77]
        report.cancel()

    play(scene())


async def take(broker: Broker, lane: str = "lane") -> list[str]:
    """Let a lane take a job, and the others that may share its batches; return all."""
    first = await broker.pull(lane)
    assert isinstance(first, Job)
    taken = [first.id]
    while first.pack and isinstance(another := await broker.pull(lane, 0.0, first.pack), Job):
        taken.append(another.id)
    return taken


async def evaluate(broker: Broker, name: str, step: int) -> str:
    """Report an evaluation, after which the search lets the trial go on."""
    report = asyncio.create_task(broker.report(name, step, {}))
    while not broker._entries[name].events:
        await asyncio.sleep(0.001)
    after = broker._entries[name].events[-1].number
    waiting = asyncio.create_task(broker.next_event(name, after))
    verdict = await report
    waiting.cancel()
    return verdict


def test_trials_of_a_pack_that_dies_are_done_alone_until_they_get_on() -> None:
    async def scene() -> None:
        broker = Broker(attempts=3)
        await broker.expect("lane")
        for name in ("good", "bad", "other"):
            await broker.submit(replace(job(name), pack="p"))
        # Once is no reason.
        assert await take(broker) == ["good", "bad", "other"]
        assert await evaluate(broker, "good", 10) == "continue"
        assert await broker.lane_died("lane", "it crashed")
        assert await take(broker) == ["good", "bad", "other"]
        assert await broker.report("good", 10, {}) == "continue"
        assert await evaluate(broker, "other", 10) == "continue"
        assert await broker.lane_died("lane", "it crashed")
        # The other has got on since.
        assert await take(broker) == ["good"]
        assert await broker.report("good", 10, {}) == "continue", "it has not got on yet"
        assert await evaluate(broker, "good", 20) == "interrupt"
        await broker.pause("good", 20)
        assert await take(broker) == ["bad"]
        assert await broker.lane_died("lane", "it crashed")
        event = await broker.next_event("bad")
        assert event.error == "its lane died 3 times, the last time because it crashed"
        assert await take(broker) == ["other", "good"]
        assert await evaluate(broker, "good", 30) == "continue"

    play(scene())


def test_a_trial_that_gets_on_before_it_ends_its_lane_ends_no_other_trial() -> None:
    async def scene() -> None:
        broker = Broker(attempts=2)
        await broker.expect("lane")
        for name in ("bad", "good"):
            await broker.submit(replace(job(name), pack="p"))
        for step in range(10, 60, 10):
            assert await take(broker) == ["bad", "good"]
            assert await evaluate(broker, "bad", step) == "continue"
            assert await evaluate(broker, "good", step) == "continue"
            assert await broker.lane_died("lane", "it crashed")
        assert {one["state"] for one in await broker.snapshot()} == {"queued"}

    play(scene())


def test_a_trial_that_is_done_alone_can_be_stopped_and_interrupted() -> None:
    async def scene() -> None:
        broker = Broker()
        await broker.expect("lane")
        for name in ("stopped", "interrupted"):
            await broker.submit(replace(job(name), pack="p"))
        for _ in range(2):
            assert await take(broker) == ["stopped", "interrupted"]
            assert await broker.lane_died("lane", "it crashed")
        assert await take(broker) == ["stopped"]
        report = asyncio.create_task(broker.report("stopped", 10, {}))
        await broker.next_event("stopped")
        await broker.cancel("stopped", 10)
        assert await report == "stop"
        await broker.finish("stopped", b"")
        assert await take(broker) == ["interrupted"]
        assert await broker.interrupt() == ["interrupted"]
        await broker.pause("interrupted", 5)
        assert await broker.result("interrupted") == Event("interrupted", 5)

    play(scene())


def test_the_clocks_of_other_machines_are_ignored() -> None:
    async def scene() -> None:
        broker = Broker(patience=Patience(warn=0.3, kill=0.6))
        await broker.submit(job("a"))
        await broker.pull("lane")
        for ticks in range(15):
            await broker.beat("lane", Beat(0, ticks, at=-1e6))
            await asyncio.sleep(0.05)
        assert await broker.notices() == []

    play(scene())


def test_a_lane_that_computes_or_waits_for_the_search_is_not_reported() -> None:
    async def scene() -> None:
        broker = Broker(patience=Patience(warn=0.3, kill=0.6))
        for name in ("computes", "waits"):
            await broker.submit(job(name))
        await broker.pull("one")
        await broker.pull("two")
        report = asyncio.create_task(broker.report("waits", 10, {}))
        for ticks in range(30):
            await broker.beat("one", Beat(0, ticks))
            await broker.beat("two", Beat(0, 0))
            await asyncio.sleep(0.05)
        assert await broker.notices() == []
        report.cancel()

    play(scene())


def test_a_job_that_repeatedly_kills_its_lane_fails_and_the_lane_continues() -> None:
    async def scene() -> None:
        broker = Broker(attempts=2)
        await broker.expect("lane")
        for name in ("a", "b", "c"):
            await broker.submit(job(name))
        for name in ("a", "b"):
            for _ in range(2):
                pulled = await broker.pull("lane")
                assert isinstance(pulled, Job)
                assert pulled.id == name
                await broker.beat("lane", Beat(0, 1, memory=3 * 2**30))
                assert await broker.lane_died("lane", "out of memory")
            event = await broker.next_event(name)
            assert event.kind == "failed"
            assert event.error == (
                "its lane died 2 times, the last time because out of memory when it used 3.0 GiB"
            )
        pulled = await broker.pull("lane")
        assert isinstance(pulled, Job)
        assert pulled.id == "c"

    play(scene())


def test_if_no_lane_can_be_started_all_jobs_end_with_one_error() -> None:
    async def scene() -> None:
        broker = Broker(attempts=2)
        for lane in ("one", "two"):
            await broker.expect(lane)
        await broker.submit(job("a"))
        assert await broker.lane_died("one", "no GPU")
        assert not await broker.lane_died("one", "no GPU")
        assert (await broker.snapshot())[0]["state"] == "queued", "the other lane can do it"
        assert await broker.lane_died("two", "no GPU")
        await broker.pull("two")
        assert await broker.lane_died("two", "it crashed"), "it had a job"
        assert await broker.lane_died("two", "no GPU")
        assert not await broker.lane_died("two", "no GPU")
        for name in ("a", "b"):
            if name == "b":
                await broker.submit(job(name))
            event = await broker.next_event(name)
            with pytest.raises(
                ResourceError, match="two can't be started, 2 times, the last time because no"
            ):
                event.raise_fatal()
        assert {one["state"] for one in await broker.snapshot()} == {"interrupted"}

    play(scene())


def test_a_job_that_ended_in_the_queue_leaves_it() -> None:
    async def scene() -> None:
        broker = Broker(attempts=1)
        for name in ("a", "b"):
            await broker.expect(f"own-{name}")
        for name in ("a", "c"):
            await broker.submit(job(name, "own-a"))
        assert not await broker.lane_died("own-a", "no GPU")
        await broker.forget(["a"])
        assert (await broker.next_event("c")).kind == "failed"
        assert await broker.submit(job("c"))
        pulled = await broker.pull("own-b", timeout=0.05)
        assert isinstance(pulled, Job)
        assert pulled.id == "c"
        assert await broker.pull("own-d", timeout=0.05) is None, "two lanes have the same job"

    play(scene())


def test_a_worker_group_that_cant_be_started_fails_only_its_own_jobs() -> None:
    async def scene() -> None:
        broker = Broker(attempts=1)
        for name in ("a", "b"):
            await broker.expect(f"own-{name}")
            await broker.submit(job(name, lane=f"own-{name}"))
        assert not await broker.lane_died("own-a", "no GPU")
        event = await broker.next_event("a")
        event.raise_fatal()
        assert "can't be started" in event.error
        assert isinstance(await broker.pull("own-b"), Job)
        assert not await broker.lane_died("own-b", "it crashed"), (
            "a group is started for a job that has failed"
        )

    play(scene())


def test_a_broker_ends_with_the_process_that_holds_the_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr("rayft.sweep.broker.os._exit", ended.append)

    async def stay() -> None:
        raise ActorDiedError

    launcher = SimpleNamespace(stay=SimpleNamespace(remote=stay))
    play(Broker().depend_on(launcher))
    assert ended == [1]

    async def scene(*, last: bool) -> None:
        broker = Broker()
        await broker.close(last=last)
        await broker.depend_on(launcher)

    # After an interrupt, the command waits for the trials that save their checkpoints.
    play(scene(last=False))
    assert ended == [1, 1]
    play(scene(last=True))
    assert ended == [1, 1]


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
