from __future__ import annotations

from collections import Counter

import pytest

from rayft.data import loader
from rayft.data.loader import RowStream
from rayft.data.pack import PackedRow, collate
from rayft.data.template import IGNORED, Encoded
from rayft.errors import DataError


def made(count: int) -> list[Encoded]:
    return [Encoded((number,) * (3 + number % 5), (number,) * (3 + number % 5)) for number in range(count)]


def examples_of(rows: list[PackedRow]) -> list[Encoded]:
    return [example for row in rows for example in row.examples]


def test_every_epoch_has_every_example_once():
    encoded = made(40)
    schedule = RowStream(encoded, 16, 1, seed=0)
    seen: list[Encoded] = []
    step = 0
    while len(seen) < 2 * len(encoded):
        seen += examples_of(schedule.rows(step))
        step += 1
    assert Counter(seen[:40]) == Counter(encoded) == Counter(seen[40:])
    assert seen[:40] != seen[40:]


def test_a_resumed_run_gets_the_rows_of_an_uninterrupted_run():
    straight = RowStream(made(23), 16, 4, seed=7)
    whole = [straight.rows(step) for step in range(20)]
    resumed = RowStream(made(23), 16, 4, seed=7)
    assert [resumed.rows(step) for step in range(11, 20)] == whole[11:]
    # Going back is allowed as well.
    assert [straight.rows(step) for step in (0, 19, 3)] == [whole[0], whole[19], whole[3]]


def test_runs_that_are_epochs_apart_pack_each_epoch_once(monkeypatch: pytest.MonkeyPatch):
    packed: list[tuple[int, ...]] = []

    def rows_of(*arguments, **options):
        packed.append(tuple(options["order"]))
        return real(*arguments, **options)

    real = loader.rows_of
    monkeypatch.setattr(loader, "rows_of", rows_of)
    stream = RowStream(made(120), 16, 4, seed=7)
    runs = [20 * number for number in range(16)]
    for step in range(40):
        for first in runs:
            stream.rows(first + step)
    # Each run at most once, and not at each of its steps in an epoch.
    assert stream.first_step(2) - stream.first_step(1) > 8
    assert max(Counter(packed).values()) <= 3
    for step in range(300, 400):
        stream.rows(step)
    assert len(stream._epochs) <= 1 + loader.RECENT // 8, "they are not kept for ever"


def test_steps_follow_each_other_without_gaps_whatever_their_size():
    by_one = RowStream(made(23), 16, 1, seed=3)
    by_seven = RowStream(made(23), 16, 7, seed=3)
    stream = [row for step in range(42) for row in by_one.rows(step)]
    assert [row for step in range(6) for row in by_seven.rows(step)] == stream


def test_a_step_may_be_larger_than_an_epoch():
    rows = RowStream(made(3), 64, 5, seed=0).rows(0)
    assert len(rows) == 5
    assert all(Counter(row.examples) == Counter(made(3)) for row in rows)


def test_the_rows_depend_on_the_seed():
    assert RowStream(made(30), 16, 8, seed=1).rows(0) == RowStream(made(30), 16, 8, seed=1).rows(0)
    assert RowStream(made(30), 16, 8, seed=1).rows(0) != RowStream(made(30), 16, 8, seed=2).rows(0)


@pytest.mark.parametrize(("world", "accumulation"), [(1, 1), (1, 6), (2, 3), (3, 2), (4, 3)])
def test_shares_partition_the_rows_of_a_step(world, accumulation):
    schedule = RowStream(made(50), 16, 12, seed=0)
    for step in (0, 5):
        shares = [schedule.share(step, rank, world, accumulation) for rank in range(world)]
        assert all(len(share) == accumulation for share in shares)
        assert {len(micro) for share in shares for micro in share} == {12 // world // accumulation}
        flat = [row for share in shares for micro in share for row in micro]
        assert Counter(flat) == Counter(schedule.rows(step))


def test_rows_that_cannot_be_shared_are_refused():
    with pytest.raises(DataError, match="12 rows a step can't be shared by 5 workers x 1"):
        RowStream(made(50), 16, 12, seed=0).share(0, 0, 5, 1)
    with pytest.raises(DataError, match="take a multiple of 8"):
        RowStream(made(50), 16, 4, seed=0).share(0, 0, 4, 2)


def test_no_examples_are_refused():
    with pytest.raises(DataError, match="no examples to train on"):
        RowStream([], 16, 4, seed=0)


def test_labelled_examples_have_a_row_each_and_so_have_all_without_packing():
    labelled = [Encoded((number, 1), (IGNORED, IGNORED), label=number % 2) for number in range(5)]
    assert all(len(row.examples) == 1 for row in RowStream(labelled, 16, 5, seed=0).rows(0))
    assert all(len(row.examples) == 1 for row in RowStream(made(9), 64, 9, seed=0, packing=False).rows(0))
    assert any(len(row.examples) > 1 for row in RowStream(made(9), 64, 9, seed=0).rows(0))


def test_rows_have_at_most_as_many_segments_as_the_stream_says():
    stream = RowStream(made(60), 32, 4, seed=3)
    batches = [
        collate(examples, 0, width=32, segments=len(examples) * stream.most_segments)
        for examples in (stream.rows(step) for step in range(12))
    ]
    assert {len(batch.offsets) for batch in batches} == {4 * (32 // 3 + 1) + 1}
    assert all(batch.offsets[-1] == 4 * 32 for batch in batches)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_the_rows_of_a_rank_are_every_world_th_across_epochs(world):
    whole, own = RowStream(made(23), 16, 7, seed=1), RowStream(made(23), 16, 7, seed=1)
    for step in range(12):
        for rank in range(world):
            assert own.rows(step, rank, world) == whole.rows(step)[rank::world]
