"""The arena: where pieces lie, that they never overlap, and that none is lost."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import permutations

import pytest
import torch

from rayft.serving.engine.api import NoRoomError
from rayft.serving.engine.vllm.arena import ALIGNED, Arena, aligned


def make(pieces: int) -> Arena:
    return Arena(pieces * ALIGNED, "cpu")


def test_sizes_are_rounded_up() -> None:
    assert [aligned(size) for size in (0, 1, ALIGNED, ALIGNED + 1)] == [0, ALIGNED, ALIGNED, 2 * ALIGNED]
    arena = Arena(ALIGNED + 1, "cpu")
    assert (arena.memory.dtype, arena.memory.numel(), arena.free) == (torch.uint8, 2 * ALIGNED, 2 * ALIGNED)
    assert (arena.take(1), arena.take(1)) == (0, ALIGNED)
    assert arena.free == 0


def test_the_first_gap_that_is_large_enough_is_taken() -> None:
    arena = make(8)
    first, _, third, _ = (arena.take(2 * ALIGNED) for _ in range(4))
    arena.give(first, 2 * ALIGNED)
    arena.give(third, 2 * ALIGNED)
    assert arena.take(ALIGNED) == first
    assert arena.take(2 * ALIGNED) == third
    assert arena.take(ALIGNED) == first + ALIGNED


@pytest.mark.parametrize("order", [*permutations(range(4))], ids=str)
def test_gaps_are_joined_in_whatever_order_pieces_come_back(order: tuple[int, ...]) -> None:
    arena = make(4)
    places = [arena.take(ALIGNED) for _ in range(4)]
    for index in order:
        arena.give(places[index], ALIGNED)
    assert arena.take(4 * ALIGNED) == 0


def test_gaps_that_do_not_touch_are_not_joined() -> None:
    arena = make(3)
    places = [arena.take(ALIGNED) for _ in range(3)]
    arena.give(places[0], ALIGNED)
    arena.give(places[2], ALIGNED)
    with pytest.raises(NoRoomError, match=r"adapter of 512 bytes.*512 of 768 bytes are free.*device_bytes"):
        arena.take(2 * ALIGNED)
    assert arena.free == 2 * ALIGNED
    assert arena.take(ALIGNED) == 0


def test_pieces_never_overlap_and_none_is_lost() -> None:
    draw, arena = random.Random(0), make(64)
    held: dict[int, int] = {}
    refused = 0
    for _ in range(4000):
        size = draw.randrange(1, 12 * ALIGNED)
        if held and draw.random() < 0.45:
            place = draw.choice([*held])
            arena.give(place, held.pop(place))
        else:
            try:
                held[arena.take(size)] = size
            except NoRoomError:
                refused += 1
        used = sorted((place, place + aligned(size)) for place, size in held.items())
        ends = [0, *(end for _, end in used)]
        assert all(begin % ALIGNED == 0 for begin, _ in used)
        assert all(begin >= end for (begin, _), end in zip(used, ends, strict=False))
        assert ends[-1] <= arena.memory.numel()
        assert arena.free == arena.memory.numel() - sum(aligned(size) for size in held.values())
    assert refused > 100, "never full"
    for place, size in held.items():
        arena.give(place, size)
    assert arena.take(arena.memory.numel()) == 0


def test_threads_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(nbytes: int) -> int:
        """Let another thread go on between two statements."""
        time.sleep(1e-5)
        return aligned(nbytes)

    monkeypatch.setattr("rayft.serving.engine.vllm.arena.aligned", slowly)
    arena = make(32)

    def turns() -> None:
        for _ in range(100):
            places = [arena.take(ALIGNED) for _ in range(8)]
            for place in places:
                arena.give(place, ALIGNED)

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(turns) for _ in range(4)]:
            done.result()
    assert arena.take(arena.memory.numel()) == 0
