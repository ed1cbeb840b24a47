"""Linears with the terms of several slots, against autograd in float64; tests/gpu has the Triton kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from rayft.kernels.grouped_linear import Plan, Term, grouped_linear
from rayft.kernels.grouped_linear_table import CHUNK, LONG, PART, STRIP, TRAINS_A, TRAINS_B, Table
from rayft.numerics import assert_close

N, OUT, IN = 40, 7, 150
"""Tokens, outputs and inputs; the inputs leave room for a rank of 130."""
MIXES = ("lora", "asym", "selectors", "chains", "everything", "nothing")


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def lora(rows: slice, rank: int, scale: float = 1.3, *, b: bool = True, a: bool = True) -> Term:
    return Term(rows, random(OUT, rank).requires_grad_(b), scale, a=random(rank, IN).requires_grad_(a))


def selector(rows: slice, rank: int, scale: float = 0.7, *, b: bool = True, first: int | None = None) -> Term:
    columns = torch.randperm(IN)[:rank] if first is None else (torch.arange(rank) + first) % IN
    return Term(rows, random(OUT, rank).requires_grad_(b), scale, columns=columns)


def mix(name: str) -> list[Term]:
    """Return terms of slots between which there are tokens without any."""
    repeated = Term(slice(20, 31), random(OUT, 4), 0.5, columns=torch.tensor([3, 8, 3, 3]), distinct=False)
    made: dict[str, Callable[[], list[Term]]] = {
        "lora": lambda: [lora(slice(0, 11), 3), lora(slice(11, 12), 1, -2.0), lora(slice(20, 40), 130)],
        "asym": lambda: [
            lora(slice(2, 9), 16, a=False), lora(slice(9, 9), 4), lora(slice(9, 38), 64, a=False),
        ],
        "selectors": lambda: [selector(slice(0, 20), 16), selector(slice(20, 33), 130)],
        "chains": lambda: [
            lora(slice(0, 8), 6, b=False, a=False), lora(slice(0, 8), 3),
            # A window that wraps onto columns of an earlier link.
            selector(slice(20, 31), 6, b=False, first=0), repeated, selector(slice(20, 31), 3, first=IN - 1),
        ],
        "everything": lambda: [
            selector(slice(1, 8), 5), *mix("chains")[2:], lora(slice(33, 36), 16, a=False),
            lora(slice(36, 40), 1),
        ],
        "nothing": list,
    }  # fmt: skip
    return made[name]()


def naive(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, terms: Sequence[Term]
) -> torch.Tensor:
    """Compute the output with a dense update of the weight for each token."""
    updates = torch.zeros(x.shape[0], *weight.shape, dtype=x.dtype)
    for term in terms:
        a = term.a if term.columns is None else functional.one_hot(term.columns, IN).to(x)
        update = term.scale * term.b @ a
        inside = torch.zeros(x.shape[0], dtype=x.dtype)
        inside[term.rows] = 1
        updates = updates + inside[:, None, None] * update
    y = torch.einsum("noi,ni->no", weight + updates, x)
    return y if bias is None else y + bias


def results(
    compute: Callable[..., torch.Tensor], x: torch.Tensor, terms: Sequence[Term]
) -> list[torch.Tensor]:
    """Return the output, and the gradients of x and of everything that trains."""
    torch.manual_seed(7)
    weight, bias, x = random(OUT, IN), random(OUT), x.detach().requires_grad_(True)
    trained = [tensor for term in terms for tensor in term.parameters]
    y = compute(x, weight, bias, terms)
    return [y, *torch.autograd.grad(y, [x, *trained], random(*y.shape))]


def assert_same(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, torch.float64, IN + N, depth=3)


@pytest.mark.parametrize("name", MIXES)
def test_like_a_dense_update_for_each_token(name: str) -> None:
    torch.manual_seed(0)
    terms, x = mix(name), random(N, IN)
    assert_same(results(grouped_linear, x, terms), results(naive, x, terms))


def test_the_output_may_be_changed_in_place() -> None:
    x = random(2, N // 2, IN).requires_grad_()
    y = grouped_linear(x, random(OUT, IN), None, Plan(mix("lora")))
    y += 1
    y.sum().backward()


def test_a_plan_is_used_again_after_its_factors_changed() -> None:
    torch.manual_seed(0)
    terms, x = mix("everything"), random(N, IN)
    plan = Plan(terms)
    for _ in range(2):
        found = results(lambda x, w, bias, _: grouped_linear(x, w, bias, plan), x, terms)
        assert_same(found, results(naive, x, terms))
        with torch.no_grad():
            for parameter in plan.parameters:
                parameter.add_(1)


@pytest.mark.parametrize("change", ["rows", "scale", "columns"])
def test_each_property_of_a_term_decides(change: str) -> None:
    torch.manual_seed(0)
    terms, x = mix("everything"), random(N, IN)
    right = results(grouped_linear, x, terms)
    for number, term in enumerate(terms):
        wrong = {
            "rows": {"rows": slice(term.rows.start, term.rows.stop - 1)},
            "scale": {"scale": term.scale + 1e-3},
            "columns": {"columns": None if term.columns is None else (term.columns + 1) % IN},
        }[change]
        if change == "columns" and term.columns is None:
            continue
        # The other terms on these rows lose the same row, because rows of two terms are the same or disjoint.
        changed = [
            replace(other, **wrong)
            if number == place or (change == "rows" and other.rows == term.rows)
            else other
            for place, other in enumerate(terms)
        ]
        with pytest.raises(AssertionError, match="relative error"):
            assert_same(results(grouped_linear, x, changed), right)


def test_gradients_numerically() -> None:
    torch.manual_seed(0)
    terms = [lora(slice(0, 2), 2), *mix("chains")[2:], lora(slice(33, 35), 1, a=False)]
    weight, plan = random(OUT, IN), Plan(terms)
    x = random(N, IN)
    inner = random(3, IN).requires_grad_(True)

    def compute(inner: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        rows = torch.tensor([0, 21, 34])
        return grouped_linear(x.index_copy(0, rows, inner), weight, None, plan)[rows]

    assert torch.autograd.gradcheck(compute, (inner, *plan.parameters))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "b", "g"])
def test_a_slot_that_is_not_finite_leaves_the_others_alone(value: float, where: str) -> None:
    def run(broken: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        terms, x, weight = mix("everything"), random(N, IN).requires_grad_(True), random(OUT, IN)
        bad = terms[2].rows
        upstream = torch.ones(N, OUT, dtype=torch.float64)
        with torch.no_grad():
            if broken and where == "x":
                x[bad] = value
            if broken and where == "b":
                terms[3].b.fill_(value)
            if broken and where == "g":
                upstream[bad] = value
        y = grouped_linear(x, weight, None, terms)
        trained = [(term, tensor) for term in terms for tensor in term.parameters]
        grads = torch.autograd.grad(y, [x, *(tensor for _, tensor in trained)], upstream)
        kept = [
            torch.cat([y[: bad.start], y[bad.stop :]]),
            torch.cat([grads[0][: bad.start], grads[0][bad.stop :]]),
        ]
        others = [grad for (term, _), grad in zip(trained, grads[1:], strict=True) if term.rows != bad]
        return kept + others

    for one, other in zip(run(broken=True), run(broken=False), strict=True):
        assert torch.equal(one, other)


def test_only_what_is_needed_is_saved() -> None:
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    def numbers(terms: Sequence[Term]) -> int:
        """Return how many numbers are saved beside the weight and what trains."""
        saved.clear()
        weight, plan = random(OUT, IN), Plan(terms)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            grouped_linear(random(2, N // 2, IN).requires_grad_(True), weight, None, plan)
        known = (weight, *plan.parameters)
        return sum(t.numel() for t in saved if not any(t.data_ptr() == other.data_ptr() for other in known))

    frozen, link = selector(slice(0, 8), 9, b=False), selector(slice(0, 8), 3)
    assert numbers([frozen, link, lora(slice(9, 14), 2, a=False)]) == 8 * 3 + 5 * 2
    assert numbers([lora(slice(9, 14), 2)]) == 5 * 2 + N * IN
    assert numbers([frozen]) == 0


def test_an_input_without_gradient_and_more_dimensions() -> None:
    torch.manual_seed(0)
    terms, x, weight = mix("everything"), random(2, N // 2, IN), random(OUT, IN)
    y = grouped_linear(x, weight, None, terms)
    trained = [tensor for term in terms for tensor in term.parameters]
    found = torch.autograd.grad(y.sum(), trained)
    expected = naive(x.view(N, IN), weight, None, terms)
    assert_close(y.reshape(N, OUT), expected, torch.float64, IN, depth=3)
    assert_same(found, torch.autograd.grad(expected.sum(), trained))


@pytest.mark.parametrize("rows", [slice(9, 12), slice(2, 5)], ids=["overlapping", "descending"])
def test_rows_that_are_neither_the_same_nor_disjoint_are_refused(rows: slice) -> None:
    with pytest.raises(AssertionError, match="overlap"):
        Plan([lora(slice(5, 10), 2), lora(rows, 2)])


@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("n", [N, 5000])
def test_a_table_divides_rows_and_ranks_without_gap_or_overlap(name: str, n: int) -> None:
    torch.manual_seed(0)
    terms = mix(name)
    if n > N:
        terms = [*terms, lora(slice(N, n - 100), 3)]
    table = Table(terms, n, IN, OUT, random(1))
    division, numbers = table.division, table.numbers.tolist()

    def section(start: int, count: int, size: int) -> list[list[int]]:
        return [numbers[start + size * index : start + size * (index + 1)] for index in range(count)]

    strips = section(0, division.strips, STRIP)
    chunks = section(division.chunks_at, (division.b_at - division.chunks_at) // CHUNK, CHUNK)
    parts = section(division.parts_at, division.parts, PART)
    assert [row for first, rows, *_ in strips for row in range(first, first + rows)] == [*range(n)]
    assert division.several == any(strip[3] > 1 for strip in strips)
    for first, rows, chunk, count, scattered, *copied in strips:
        mine = [term for term in terms if term.rows.start <= first < term.rows.stop]
        assert all(first + rows <= term.rows.stop for term in mine)
        found = chunks[chunk : chunk + count]
        assert copied == (found[0] if count else [0] * CHUNK)
        assert sum(one[3] for one in found) == sum(term.b.shape[1] for term in mine)
        assert scattered == all(term.a is None and term.distinct for term in mine)
    for chunk in chunks:
        mine = [(first, rows, index) for first, rows, index, *of in parts if of == chunk]
        assert [row for first, rows, _ in mine for row in range(first, first + rows)] == [
            *range(chunk[6], chunk[6] + chunk[7])
        ]
        assert [index for _, _, index in mine] == [*range(chunk[12])]
    with_b, with_a = ([chunk for chunk in chunks if chunk[9] & flag] for flag in (TRAINS_B, TRAINS_A))
    assert section(division.b_at, division.with_b, CHUNK) == with_b
    # Of the others torch computes da.
    short = [chunk for chunk in with_a if chunk[7] < LONG]
    assert section(division.a_at, division.with_a, CHUNK) == short
    # Buffers are used up to their ends, and no two chunks share a place in one.
    for place, size in ((8, division.q_numbers), (10, division.sums)):
        places = [chunk[place] for chunk in chunks if chunk[7]]
        assert len({*places}) == len(places)
        assert all(0 <= at < size for at in places)
    shapes = [tuple(tensor.shape) for term in terms for tensor in term.parameters]
    assert [shape for _, shape in division.views] == shapes


@pytest.mark.parametrize("name", MIXES)
def test_layers_of_equal_shapes_share_a_division_and_have_addresses_of_their_own(name: str) -> None:
    torch.manual_seed(0)
    layers = [mix(name), mix(name)]
    tables = [Table(terms, N, IN, OUT, random(1)) for terms in layers]
    assert tables[0].division is tables[1].division
    division = tables[0].division
    for terms, table in zip(layers, tables, strict=True):
        numbers = table.numbers[division.chunks_at : division.b_at].view(-1, CHUNK).tolist()
        chunks = iter(numbers)
        for term in terms:
            for first in range(0, term.b.shape[1], division.ranks):
                factors = (term.b[:, first:], None if term.a is None else term.a[first:])
                columns = None if term.columns is None else term.columns[first:]
                expected = [0 if one is None else one.data_ptr() for one in (*factors, columns)]
                assert next(chunks)[:3] == expected
        assert next(chunks, None) is None


def test_a_factor_that_kernels_cant_read_in_place_is_copied_before_each_use() -> None:
    b = random(4, OUT).t()
    term = Term(slice(0, 8), b, 1.0, a=random(4, IN))
    table = Table([term], N, IN, OUT, random(1))
    assert table.numbers[table.division.chunks_at] != b.data_ptr()
    b += 1
    table.refresh()
    ((copy, _),) = table._copies
    assert table.numbers[table.division.chunks_at] == copy.data_ptr()
    assert torch.equal(copy, b)
