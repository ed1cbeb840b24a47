"""ASHA's decisions are recorded and repeated."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler

from rayft.sweep.asha import RecordedASHA
from rayft.sweep.decisions import Decision, EventLog, rungs
from rayft.sweep.space import MethodSpace, SweepConfig

STEPS = 160
SWEEP = SweepConfig(methods={"lora": MethodSpace()}, grace=10)


def trial(key: str) -> Any:
    return SimpleNamespace(
        trial_id=f"tune-{key}", config={"trial": SimpleNamespace(job=SimpleNamespace(id=key))}
    )


def ask(scheduler: RecordedASHA, key: str, step: int, loss: float) -> str:
    return scheduler.on_trial_result(None, trial(key), {"step": step, "val_loss": loss})


def events(seed: int) -> list[tuple[str, int, float]]:
    """Return evaluations of eight trials in the order of three lanes, at rungs and between them."""
    draw = random.Random(seed)
    left = {f"t{number}": list(range(10, STEPS, 10)) for number in range(8)}
    order = []
    while left:
        key = draw.choice(sorted(left)[:3])
        order.append((key, left[key].pop(0), draw.random()))
        if not left[key]:
            del left[key]
    return order


def test_it_decides_like_tunes_own_asha(tmp_path: Path) -> None:
    ours = RecordedASHA(SWEEP, STEPS, EventLog(tmp_path / "events.jsonl"), lambda *_: None)
    theirs = ASHAScheduler(
        time_attr="step", metric="val_loss", mode="min", max_t=STEPS, grace_period=10, reduction_factor=2
    )
    stopped: set[str] = set()
    nobody: Any = None
    for key, step, loss in events(0):
        if key in stopped:
            continue
        theirs._trial_info.setdefault(f"tune-{key}", theirs._brackets[0])
        result = {"step": step, "val_loss": loss}
        verdict = ask(ours, key, step, loss)
        assert verdict == theirs.on_trial_result(nobody, trial(key), result)
        if verdict == ASHAScheduler.STOP:
            stopped.add(key)
    assert 0 < len(stopped) < 8
    assert rungs(SWEEP, STEPS) == [10, 20, 40, 80]


def test_a_continued_sweep_decides_like_an_uninterrupted_one(tmp_path: Path) -> None:
    order = events(1)
    whole = RecordedASHA(SWEEP, STEPS, EventLog(tmp_path / "whole.jsonl"), lambda *_: None)
    expected = [ask(whole, *event) for event in order]
    assert set(expected) == {ASHAScheduler.CONTINUE, ASHAScheduler.STOP}
    for cut in range(0, len(order), 7):
        path = tmp_path / f"cut-{cut}.jsonl"
        first = RecordedASHA(SWEEP, STEPS, EventLog(path), lambda *_: None)
        for event in order[:cut]:
            ask(first, *event)
        stopped: set[tuple[str, int]] = set()
        second = RecordedASHA(SWEEP, STEPS, EventLog(path), lambda *event, into=stopped: into.add(event))
        # Trials repeat their earlier reports in another order, before the remaining ones.
        again = sorted(order[:cut])
        assert [ask(second, *event) for event in again] == [expected[order.index(event)] for event in again]
        assert [ask(second, *event) for event in order[cut:]] == expected[cut:]
        assert stopped == {order[i][:2] for i, verdict in enumerate(expected) if verdict == "STOP"}
        assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_decision_that_was_not_fully_written_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    kept = [Decision("a", 10, 1.0, True), Decision("b", 10, 2.0, False)]
    for decision in kept:
        log.append(decision)
    whole = path.read_bytes()
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        read = EventLog(path)
        assert read.decisions == kept[: whole[:end].count(b"\n")]
        for decision in kept[len(read.decisions) :]:
            read.append(decision)
        assert path.read_bytes() == whole
    path.write_bytes(b"\0\xffno json\n" + whole)
    assert EventLog(path).decisions == kept
