import multiprocessing
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rayft.errors import DiskFullError
from rayft.files import locked
from rayft.tracking.spool import Record, Spool, UndeliveredError


def test_the_lock_of_a_deleted_file_is_not_taken_for_the_new_ones(tmp_path: Path) -> None:
    path, same = tmp_path / "file", []

    def wait() -> None:
        with locked(path) as descriptor:
            assert descriptor is not None
            same.append(os.fstat(descriptor).st_ino == path.stat().st_ino)

    with locked(path):
        waiter = threading.Thread(target=wait)
        waiter.start()
        time.sleep(0.2)  # by now it waits for the old file's lock
        path.unlink()
        path.touch()
    waiter.join()
    assert same == [True]


class Receiver:
    """Takes records; away when told so, after as many batches as told."""

    def __init__(self, *, batches: int = 1000) -> None:
        self.batches = batches
        self.got: list[int] = []

    def __call__(self, records: Sequence[Record]) -> list[tuple[Record, str]]:
        if self.batches == 0:
            raise UndeliveredError("away")
        self.batches -= 1
        self.got += [record["n"] for record in records]
        return [(record, "odd") for record in records if record["n"] == 13]


def test_records_arrive_in_order_and_the_file_goes(tmp_path: Path) -> None:
    spool, receiver = Spool(tmp_path), Receiver()
    for n in range(5):
        spool.append("run", {"n": n})
    done = spool.drain(spool.path("run"), receiver, remove=True)
    assert (done.sent, done.pending) == (5, 0)
    assert receiver.got == [0, 1, 2, 3, 4]
    assert list(tmp_path.iterdir()) == []


def test_what_was_delivered_is_not_sent_again(tmp_path: Path) -> None:
    spool, receiver = Spool(tmp_path), Receiver()
    path = spool.path("run")
    spool.append("run", {"n": 0})
    spool.drain(path, receiver)
    spool.append("run", {"n": 1})
    assert spool.pending(path) == 1
    spool.drain(path, receiver)
    assert receiver.got == [0, 1]


def test_a_receiver_that_goes_away_between_batches(tmp_path: Path) -> None:
    spool, receiver = Spool(tmp_path), Receiver(batches=1)
    for n in range(700):
        spool.append("run", {"n": n + 100})
    done = spool.drain(spool.path("run"), receiver, remove=True)
    assert (done.sent, done.pending, done.reason) == (500, 200, "away")
    receiver.batches = 1
    assert spool.drain(spool.path("run"), receiver, remove=True).sent == 200
    assert receiver.got == list(range(100, 800))


def test_a_line_torn_by_a_crash_costs_no_other(tmp_path: Path) -> None:
    spool, receiver = Spool(tmp_path), Receiver()
    path = spool.path("run")
    spool.append("run", {"n": 1})
    with path.open("a") as file:
        file.write('{"n": 2')
    spool.append("run", {"n": 3})
    with path.open("a") as file:
        file.write('{"n": 4')
    done = spool.drain(path, receiver, remove=True)
    assert receiver.got == [1, 3]
    assert (done.sent, done.rejected, done.pending) == (2, 2, 0)
    assert not path.exists()
    assert "cut off by a crash" in (tmp_path / "rejected.log").read_text()


def test_a_refused_record_is_kept_with_its_reason(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append("run", {"n": 13})
    assert spool.drain(spool.path("run"), Receiver(), remove=True).rejected == 1
    assert (tmp_path / "rejected.log").read_text() == '{"reason": "odd", "n": 13}\n'


def test_a_new_file_is_sent_from_its_start_though_an_old_offset_lies_there(tmp_path: Path) -> None:
    spool, receiver = Spool(tmp_path), Receiver()
    path = spool.path("run")
    spool.append("run", {"n": 1})
    spool.drain(path, receiver)
    (tmp_path / "keeps_the_inode").hardlink_to(path)
    path.unlink()
    spool.append("run", {"n": 2})
    spool.drain(path, receiver)
    assert receiver.got == [1, 2]


def test_a_file_that_is_deleted_while_it_is_sent_is_done(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append("run", {"n": 0})

    def deliver(records: Sequence[Record]) -> list[tuple[Record, str]]:
        spool.path("run").unlink()
        return []

    done = spool.drain(spool.path("run"), deliver, remove=True)
    assert (done.sent, done.pending) == (1, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_was_cut_is_sent_from_its_start(tmp_path: Path) -> None:
    spool, receiver = Spool(tmp_path), Receiver()
    for n in range(3):
        spool.append("run", {"n": n})
    spool.drain(spool.path("run"), receiver)
    first, *_ = spool.path("run").read_bytes().splitlines(keepends=True)
    os.truncate(spool.path("run"), len(first))
    spool.drain(spool.path("run"), receiver, remove=True)
    assert receiver.got == [0, 1, 2, 0]
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool, receiver = Spool(tmp_path), Receiver()
    spool.append("run", {"n": 1})
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:4]))
        with pytest.raises(DiskFullError, match=f"the disk of {tmp_path} is full"):
            spool.append("run", {"n": 2})
    spool.append("run", {"n": 3})
    assert spool.drain(spool.path("run"), receiver).rejected == 0
    assert receiver.got == [1, 3]


def append_many(folder: Path, start: int) -> None:
    spool = Spool(folder)
    # One name for all, as if they had the same pid on two hosts that share a folder.
    spool.path = lambda run: folder / "shared.jsonl"  # type: ignore[method-assign]
    for n in range(start, start + 300):
        spool.append("run", {"n": n})


def test_appending_and_removing_at_the_same_time_loses_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=append_many, args=(tmp_path, start)) for start in (1000, 2000)]
    for writer in writers:
        writer.start()
    spool, receiver = Spool(tmp_path), Receiver(batches=10**9)
    while any(writer.is_alive() for writer in writers):
        spool.drain(tmp_path / "shared.jsonl", receiver, remove=True)
    spool.drain(tmp_path / "shared.jsonl", receiver, remove=True)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert sorted(receiver.got) == [*range(1000, 1300), *range(2000, 2300)]


def test_many_senders_of_one_file_send_each_record_once(tmp_path: Path) -> None:
    spool, receiver = Spool(tmp_path), Receiver(batches=10**9)
    done = threading.Event()

    def send() -> None:
        while not done.is_set():
            spool.drain(spool.path("run"), receiver, wait=1.0, remove=True)

    with ThreadPoolExecutor(4) as pool:
        senders = [pool.submit(send) for _ in range(4)]
        for n in range(200):
            spool.append("run", {"n": n + 100})
        while len(receiver.got) < 200 and not any(sender.done() for sender in senders):
            time.sleep(0.01)
        done.set()
        for sender in senders:
            sender.result(timeout=60)
    assert receiver.got == [*range(100, 300)]
    spool.drain(spool.path("run"), receiver, remove=True)
    assert list(tmp_path.iterdir()) == []
