"""Pages, and forwards padded for graphs; tests/gpu runs the graphs themselves."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

from rayft.kernels.grouped_lora import Rows
from rayft.models.load import LoadedModel
from rayft.models.targets import linear_shapes
from rayft.numerics import assert_close
from rayft.serving.engine import EngineLimits, GenerationRequest
from rayft.serving.packed_engine import PackedEngine
from rayft.serving.packed_row import PAGE, Part, Row
from rayft.serving.paged_batch import Batch, Layout, Pages, Pool, Shape
from rayft.serving.paged_forward import PagedForward, _Captured
from tests.unit.serving.adapters import random_adapter
from tests.unit.serving.rows import parts_of

LIMITS = EngineLimits(16, 64, 512)


class Again:
    """Stands in for a graph: replaying it runs the forward again, into the same logits."""

    def __init__(self, forward: PagedForward, batch: Batch, rows: Rows | None) -> None:
        self.forward, self.batch, self.rows = forward, batch, rows
        self.logits: torch.Tensor | None = None
        self.replays = 0

    def replay(self) -> None:
        found = self.forward._model_logits(self.batch, self.rows)
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


@pytest.fixture
def graphed(forward: PagedForward, monkeypatch: pytest.MonkeyPatch) -> PagedForward:
    """The forward with graphs, which on a CPU are played."""

    def capture(layout: Layout, distinct: int) -> _Captured:
        batch = Batch(layout, forward._pool, torch.device("cpu"))
        rows = forward._rows(batch, layout, distinct)
        again = Again(forward, batch, rows)
        again.replay()
        assert again.logits is not None
        return _Captured(again, batch, rows, again.logits)

    forward._graphs = {}
    monkeypatch.setattr(forward, "_capture", capture)
    return forward


def check(forward: PagedForward, rows: list[Row], length: int | None = None) -> None:
    """Read what rows have not read, or so many tokens of each, with graphs and without."""
    parts, start = [], 0
    for one in rows:
        new = min(one.unread, length or one.unread)
        parts.append(Part(one, start, start + new))
        start += new
    expected = forward._run(forward._layout(parts)).clone()
    assert_close(forward._by_graph(forward._layout(parts)), expected, torch.float32, 64, depth=8)
    for part in parts:
        part.row.cache.length += part.new


def three(forward: PagedForward) -> list[Row]:
    return [row(forward, [5, 6, 7], "one"), row(forward, [8] * 70, None), row(forward, [9, 1], "two")]


@torch.inference_mode()
def test_padded_decoding_gives_the_same_logits(graphed: PagedForward) -> None:
    rows = three(graphed)
    read(graphed, rows)
    for step in range(3):
        for one in rows:
            one.tokens.append(10 + step)
        check(graphed, rows)
    assert graphed._graphs is not None
    shape = Shape(tokens=4, parts=4, max_q=1, gathered=1024, distinct=4)
    assert list(graphed._graphs) == [shape]
    assert graphed._graphs[shape].graph.replays == 4, "captured once, replayed for each step"


@torch.inference_mode()
def test_padded_prompts_give_the_same_logits(graphed: PagedForward) -> None:
    assert graphed._graphs is not None
    for turn in range(3):
        rows = three(graphed)
        check(graphed, rows)
        # The shape is captured when it comes again.
        assert len(graphed._graphs) == min(turn, 1)
        for one in rows:
            graphed.release(one.cache)
    (shape,) = graphed._graphs
    assert shape == Shape(tokens=128, parts=4, max_q=128, gathered=0, distinct=4)


@torch.inference_mode()
def test_prompts_in_pieces_beside_decoding_give_the_same_logits(graphed: PagedForward) -> None:
    assert graphed._graphs is not None
    for _ in range(2):
        rows = three(graphed)
        check(graphed, rows, length=2)
        check(graphed, rows[:2], length=40)
        for one in (rows[0], rows[2]):
            one.tokens.append(3)
        # One request decodes, one reads the rest of its prompt, one has both tokens behind it.
        check(graphed, rows)
        for one in rows:
            graphed.release(one.cache)
    assert {shape.gathered for shape in graphed._graphs} == {0, 1024}


@torch.inference_mode()
def test_a_graph_serves_other_adapters_lengths_and_fewer_requests(graphed: PagedForward) -> None:
    for lengths, names in (((9, 30), ("one", None)), ((40, 2), (None, "two")), ((33, 33), ("two", "one"))):
        rows = [row(graphed, [4] * n, name) for n, name in zip(lengths, names, strict=True)]
        for _ in range(2):
            check(graphed, rows)
            for one in rows:
                one.cache.length = 0
        for one in rows:
            graphed.release(one.cache)
    assert graphed._graphs is not None
    assert {shape.tokens for shape in graphed._graphs} == {64, 128}


@torch.inference_mode()
def test_what_can_not_be_captured_runs_without_graphs(
    graphed: PagedForward, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = row(graphed, [3], "one"), [row(graphed, [4], "two"), row(graphed, [5], None)]
    check(graphed, [one])
    tried = 0

    def no(*_: object) -> None:
        nonlocal tried
        tried += 1
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphed, "_capture", no)
    for _ in range(2):
        check(graphed, two)
        for each in two:
            each.tokens.append(6)
    assert tried == 1
    assert "operation not permitted" in caplog.text
    one.tokens.append(7)
    check(graphed, [one])
    assert graphed._graphs is not None
    (known,) = graphed._graphs.values()
    assert known.graph.replays == 3, "what was captured is replayed on"


@torch.inference_mode()
def test_the_bases_graph_is_another_than_that_with_adapters(graphed: PagedForward) -> None:
    for adapter in (None, "one", None):
        one = row(graphed, [3], adapter)
        check(graphed, [one])
        graphed.release(one.cache)
    assert graphed._graphs is not None
    assert [(shape.tokens, shape.distinct) for shape in graphed._graphs] == [(1, 1), (1, 0)]


@pytest.mark.parametrize(
    ("n", "parts", "tokens"),
    [(300, 1, 320), (513, 3, 576), (1025, 9, 1152), (4000, 8, 4096), (4097, 2, 4608)],
)
def test_shapes_waste_an_eighth_at_most(n: int, parts: int, tokens: int) -> None:
    each = n // parts
    ends = [*range(0, each * parts, each), n]
    numbers = np.zeros(n, np.int64)
    layout = Layout(
        numbers,
        numbers,
        numbers,
        numbers,
        ends,
        ends,
        numbers,
        frozenset({0, 3}),
        [],
        n - ends[-2],
        n,
        past=False,
    )
    shape = Shape.of(layout)
    assert shape.tokens == tokens
    assert (shape.tokens - n) / n < 1 / 8
    padded = layout.padded(shape)
    assert len(padded.ids) == len(padded.slots) == tokens
    assert len(padded.q_ends) == len(padded.k_ends) == shape.parts + 1
    assert padded.q_ends[-1] <= tokens
    assert padded.q_ends == padded.k_ends


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
