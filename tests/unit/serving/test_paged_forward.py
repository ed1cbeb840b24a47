"""Pages, and decoding padded for graphs; tests/gpu runs the graphs themselves."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from rayft.models.load import LoadedModel
from rayft.models.targets import linear_shapes
from rayft.numerics import assert_close
from rayft.serving.engine import EngineLimits, GenerationRequest
from rayft.serving.packed_engine import PackedEngine
from rayft.serving.packed_row import PAGE, Row
from rayft.serving.paged_forward import Batch, Layout, PagedForward, Pages, Pool, _Captured
from tests.unit.serving.adapters import random_adapter
from tests.unit.serving.rows import parts_of

LIMITS = EngineLimits(16, 64, 512)


class Again:
    """Stands in for a graph: replaying it runs the forward again, into the same logits."""

    def __init__(self, forward: PagedForward, batch: Any) -> None:
        self.forward, self.batch = forward, batch
        self.logits: torch.Tensor | None = None
        self.replays = 0

    def replay(self) -> None:
        self.forward._slots.prepare()
        found = self.forward._model_logits(self.batch)
        self.logits = found if self.logits is None else self.logits.copy_(found)
        self.replays += 1


@pytest.fixture
def forward(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> PagedForward:
    engine = PackedEngine(loaded, LIMITS, paged=True)
    engine.stop()
    shapes = linear_shapes(loaded.model)
    for name in ("one", "two"):
        engine.load(name, random_adapter(name, shapes).modules)
    made = engine._forward
    assert isinstance(made, PagedForward)
    return made


def row(forward: PagedForward, tokens: list[int], adapter: str | None) -> Row:
    slot = forward._slots.slot(adapter)
    request = GenerationRequest(tuple(tokens), 4, adapter)
    return Row(request, slot, None, None, tokens, forward.fresh())  # type: ignore[arg-type]


def read(forward: PagedForward, rows: list[Row]) -> torch.Tensor:
    parts = parts_of(rows)
    found = forward.logits(parts)
    for part in parts:
        part.row.cache.length += part.new
    return found


def captured(forward: PagedForward, layout: Layout) -> _Captured:
    batch = Batch(layout, forward._pool, torch.device("cpu"))
    again = Again(forward, batch)
    again.replay()
    assert again.logits is not None
    return _Captured(again, batch, again.logits)


@torch.inference_mode()
def test_padded_decoding_gives_the_same_logits(
    forward: PagedForward, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        row(forward, [5, 6, 7], "one"),
        row(forward, [8] * 70, None),
        row(forward, [9, 1], "two"),
    ]
    read(forward, rows)
    forward._graphs = {}
    monkeypatch.setattr(forward, "_capture", lambda layout: captured(forward, layout))
    for step in range(3):
        for one in rows:
            one.tokens.append(10 + step)
        parts = parts_of(rows)
        expected = forward._run(forward._layout(parts)).clone()
        found = forward._replay(forward._layout(parts))
        assert_close(found, expected, torch.float32, 64, depth=8)
        for part in parts:
            part.row.cache.length += 1
    assert list(forward._graphs) == [(4, 1024, True)]
    graph = forward._graphs[4, 1024, True].graph
    assert graph.replays == 4, "captured once, replayed for each step"


@torch.inference_mode()
def test_the_bases_graph_is_another_than_that_with_adapters(
    forward: PagedForward, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "_capture", lambda layout: captured(forward, layout))
    forward._graphs = {}
    for adapter in (None, "one", None):
        one = row(forward, [3], adapter)
        parts = parts_of([one])
        expected = forward._run(forward._layout(parts)).clone()
        assert_close(forward._replay(forward._layout(parts)), expected, torch.float32, 64, depth=8)
        forward.release(one.cache)
    assert sorted(forward._graphs) == [(1, 1024, False), (1, 1024, True)]


def test_pages_are_given_and_taken_back() -> None:
    pool = Pool(4 * PAGE)
    first, second = Pages(), Pages()
    pool.grow(first, 1)
    pool.grow(second, PAGE + 1)
    pool.grow(first, PAGE)
    assert (len(first.pages), len(second.pages)) == (1, 2)
    pool.grow(first, 2 * PAGE)
    places = [*first.places, *second.places]
    assert len(set(places)) == 4 * PAGE
    assert min(places) >= PAGE, "the first page is for rows that pad"
    with pytest.raises(IndexError):
        pool.grow(second, 3 * PAGE)
    pool.release(first)
    pool.grow(second, 4 * PAGE)
    assert len(set(second.places)) == 4 * PAGE


def test_a_request_that_ends_gives_its_pages_back(loaded: LoadedModel) -> None:
    engine = PackedEngine(loaded, EngineLimits(4, 64, 4 * PAGE), paged=True)

    async def ask() -> list[int]:
        async for step in engine.submit(GenerationRequest(tuple([7] * 150), 30)):
            last = step.generated
        return [last]

    try:
        # Each takes three of the four pages: one that kept them would leave none for the next.
        for _ in range(3):
            assert asyncio.run(ask())
        free = engine._forward._pool._free  # type: ignore[attr-defined]
        with engine._work:
            engine._drop_ended()
        assert len(free) == 4
    finally:
        engine.stop()
