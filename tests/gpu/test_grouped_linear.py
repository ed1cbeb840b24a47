"""The Triton kernels for the terms of several slots, against plain products in float64.

They also run in Triton's interpreter, without graphs (see test_grouped_lora.py for what it needs):

    TRITON_INTERPRET=1 python -m pytest -m gpu tests/gpu/test_grouped_linear.py
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from rayft.kernels import grouped_linear as module
from rayft.kernels.grouped_linear import (
    Plan,
    Term,
    grouped_linear,
    reference_backward,
    reference_forward,
)
from rayft.numerics import assert_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*deterministic"),
    # Of the interpreter, where a number is not finite.
    pytest.mark.filterwarnings("ignore:.*encountered in"),
]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
N, OUT, IN = 150, 144, 272
"""Tokens, outputs and inputs: several strips, tiles of outputs and tiles of inputs."""
SIZES = [pytest.param(N, OUT, IN, id="by 16"), pytest.param(97, 131, 259, id="sizes that nothing divides")]
if not INTERPRETED:
    SIZES += [pytest.param(8192, 576, 1536, id="135m"), pytest.param(8200, 2048, 2048, id="1b")]


@pytest.fixture(autouse=True)
def nan_in_new_memory() -> Iterator[None]:
    """Fill new memory with NaN, so that numbers that no kernel wrote are found; and use the kernels."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_fast", lambda x: True)
        yield
    torch.use_deterministic_algorithms(False)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def small(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Make a weight so small that an error of a single column of an update stands out."""
    return (torch.randn(*shape, device=DEVICE) / 100).to(dtype)


class Slots:
    """Makes terms of one layer."""

    def __init__(self, outputs: int, inputs: int, dtype: torch.dtype) -> None:
        self.outputs, self.inputs, self.dtype = outputs, inputs, dtype

    def lora(self, rows: slice, rank: int, scale: float = 1.3, *, b: bool = True, a: bool = True) -> Term:
        factor = (random(rank, self.inputs, dtype=torch.float32) / self.inputs**0.5).to(self.dtype)
        return Term(rows, self._b(rank, b=b), scale, a=factor.requires_grad_(a))

    def selector(
        self, rows: slice, rank: int, scale: float = 0.7, *, b: bool = True, first: int | None = None
    ) -> Term:
        columns = torch.randperm(self.inputs, device=DEVICE)[:rank]
        if first is not None:
            columns = (torch.arange(rank, device=DEVICE) + first) % self.inputs
        return Term(rows, self._b(rank, b=b), scale, columns=columns)

    def repeated(self, rows: slice, *, b: bool = False) -> Term:
        columns = torch.tensor([3, 8, 3, 3], device=DEVICE)
        return Term(rows, self._b(4, b=b), 0.5, columns=columns, distinct=False)

    def _b(self, rank: int, *, b: bool) -> torch.Tensor:
        return random(self.outputs, rank, dtype=self.dtype).requires_grad_(b)

    def mix(self, name: str, n: int) -> list[Term]:
        """Return terms of slots that divide n tokens, with tokens without terms between some."""
        cut = [n * part // 10 for part in range(11)]
        rows = [slice(first, end) for first, end in pairwise(cut)]
        lora, selector, last = self.lora, self.selector, self.inputs - 1
        if name == "lora":
            ranks = (1, 3, 4, 8, 16, 32)
            return [lora(part, rank, a=rank != 4) for part, rank in zip(rows, ranks, strict=False)]
        if name == "large ranks":
            return [lora(rows[0], 64), selector(rows[1], 130), lora(rows[3], 256), lora(rows[7], 2)]
        if name == "selectors":
            return [selector(rows[0], 16), selector(slice(cut[2], cut[6]), 5), self.repeated(rows[6], b=True)]
        if name == "chains":
            return [
                lora(rows[0], 6, b=False, a=False), lora(rows[0], 3, 0.8),
                # A window that wraps onto columns of an earlier link.
                selector(rows[4], 8, b=False, first=0), selector(rows[4], 4, 1.1, first=last - 1),
                selector(rows[5], 6, b=False), self.repeated(rows[5]), selector(rows[5], 3, first=last),
                selector(rows[8], 2, b=False),
            ]  # fmt: skip
        if name == "everything":
            return [
                selector(rows[0], 16), lora(rows[1], 8, a=False), *self.mix("chains", n)[2:7],
                lora(rows[6], 32), lora(slice(cut[7], cut[7]), 4), lora(slice(cut[7], n), 16),
            ]  # fmt: skip
        return []


MIXES = ("lora", "large ranks", "selectors", "chains", "everything", "nothing")


def exact(terms: Sequence[Term]) -> list[Term]:
    """Return the terms in float64."""
    return [
        Term(
            term.rows,
            term.b.detach().double().requires_grad_(term.b.requires_grad),
            term.scale,
            None if term.a is None else term.a.detach().double().requires_grad_(term.a.requires_grad),
            term.columns,
            term.distinct,
        )
        for term in terms
    ]


def step(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, plan: Plan, g: torch.Tensor
) -> list[torch.Tensor]:
    """Return y, grad_x and the gradients of what trains, by the kernels."""
    x = x.detach().requires_grad_(True)
    y = grouped_linear(x, weight, bias, plan)
    return [y.detach(), *torch.autograd.grad(y, [x, *plan.parameters], g)]


def check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    plan: Plan,
    g: torch.Tensor,
    found: Sequence[torch.Tensor],
) -> None:
    """Compare the results of `step` with plain products in float64, slot by slot."""
    wide = Plan(exact(plan.terms))
    offset = None if bias is None else bias.double()
    y, kept = reference_forward(x.double(), weight.double(), offset, wide)
    grad_x, grads = reference_backward(g.double(), x.double(), weight.double(), wide, kept)
    assert grad_x is not None
    edges = sorted({0, x.shape[0], *(edge for t in plan.terms for edge in (t.rows.start, t.rows.stop))})
    (outputs, inputs), dtype = weight.shape, x.dtype
    for first, end in pairwise(edges):
        # h or q is rounded, the update is rounded, and the base's product is added to it.
        assert_close(found[0][first:end], y[first:end], dtype, inputs + 256, depth=3)
        assert_close(found[1][first:end], grad_x[first:end], dtype, outputs + 256, depth=3)
    for one, other in zip(found[2:], grads, strict=True):
        assert_close(one, other, dtype, x.shape[0] + outputs, depth=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "outputs", "inputs"), SIZES)
@pytest.mark.parametrize("name", MIXES)
def test_like_plain_products(name: str, n: int, outputs: int, inputs: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plan = Plan(Slots(outputs, inputs, dtype).mix(name, n))
    weight, bias = small(outputs, inputs, dtype=dtype), small(outputs, dtype=dtype)
    x, g = random(n, inputs, dtype=dtype), random(n, outputs, dtype=dtype)
    for offset in (None, bias):
        found = step(x, weight, offset, plan, g)
        check(x, weight, offset, plan, g, found)
    for one, other in zip(found, step(x, weight, bias, plan, g), strict=True):
        assert torch.equal(one, other), "two runs differ"


@pytest.mark.parametrize("write", [True, False], ids=["written", "added to"])
@pytest.mark.parametrize("name", MIXES)
def test_grad_x_is_written_before_the_product_or_added_to_it(
    monkeypatch: pytest.MonkeyPatch, name: str, write: bool
) -> None:
    torch.manual_seed(0)
    plan = Plan(Slots(OUT, IN, torch.bfloat16).mix(name, N))
    x, weight, g = random(N, IN), small(OUT, IN), random(N, OUT)
    monkeypatch.setattr(plan.table(x, OUT).division, "adds", not write)
    check(x, weight, None, plan, g, step(x, weight, None, plan, g))


MUTANTS = {
    "y without the scale": ("o, in_o, rank, R))) * scale\n", "o, in_o, rank, R)))\n"),
    "the second link with the first one's scale": ("rank_2, R))) * scale_2", "rank_2, R))) * scale"),
    "q without the scale": ("return q * _scale(chunk)", "return q"),
    "q of all tiles but the first": ("tile in tl.static_range(TILES)", "tile in tl.static_range(1, TILES)"),
    "db of the last rows alone": ("db += tl.dot(tl.trans(h), g)", "db = tl.dot(tl.trans(h), g)"),
    "db without the scale": ("(db * _scale(chunk))", "db"),
    "the column before": ("column[:, None] == i[None, :]", "column[:, None] == i[None, :] + 1"),
    "no product of the second chunk": ("added += tl.dot(low_2, a_2)", "pass"),
    "columns written, not added to": ("q += tl.load(out, mask=mask, other=0.0).to(tl.float32)", "pass"),
    "the base's gradient lost": ("added += tl.load(out, mask=mask, other=0.0).to(tl.float32)", "pass"),
}  # fmt: skip
"""What is wrong → text of the kernels, and what stands in its place."""


@pytest.mark.parametrize("wrong", MUTANTS)
def test_wrong_kernels_are_noticed(wrong: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from rayft.kernels import grouped_linear_triton as kernels

    text, (right, instead) = Path(kernels.__file__).read_text(encoding="utf-8"), MUTANTS[wrong]
    assert right in text
    file = tmp_path / "mutant.py"
    file.write_text(text.replace(right, instead), encoding="utf-8")
    spec = spec_from_file_location("mutant", file)
    assert spec is not None
    assert spec.loader is not None
    mutant = module_from_spec(spec)
    spec.loader.exec_module(mutant)
    monkeypatch.setattr("rayft.kernels.grouped_linear_triton", mutant)

    def compare(name: str, n: int, *, write: bool) -> None:
        plan = Plan(Slots(OUT, IN, torch.bfloat16).mix(name, n))
        x, weight, g = random(n, IN), small(OUT, IN), random(n, OUT)
        monkeypatch.setattr(plan.table(x, OUT).division, "adds", not write)
        check(x, weight, None, plan, g, step(x, weight, None, plan, g))

    def all_kinds() -> None:
        for name in MIXES:
            for write in (True, False):
                compare(name, N, write=write)
        # Slots with more rows than a program reads at once.
        compare("lora", 10 * N, write=True)

    torch.manual_seed(0)
    with pytest.raises(AssertionError, match="relative error"):
        all_kinds()


def test_strided_operands_and_factors_at_any_address() -> None:
    torch.manual_seed(0)
    slots, cut = Slots(OUT, IN, torch.bfloat16), slice(11, 60)
    moved_b, moved_a = random(OUT * 8 + 1)[1:].view(OUT, 8), random(IN, 8).t()
    plan = Plan([
        Term(cut, moved_b.requires_grad_(True), 1.0, a=moved_a.requires_grad_(True)),
        slots.selector(slice(60, 80), 6),
    ])  # fmt: skip
    x, g = random(N, IN + 3)[:, 1:-2], random(OUT, N).t()
    weight = small(IN, OUT).t()
    for _ in range(2):
        check(x, weight, None, plan, g, step(x, weight, None, plan, g))
        with torch.no_grad():
            moved_b.mul_(-2)
            moved_a.add_(0.1)


def test_an_input_without_gradient() -> None:
    torch.manual_seed(0)
    plan = Plan(Slots(OUT, IN, torch.bfloat16).mix("everything", N))
    x, weight, g = random(N, IN), small(OUT, IN), random(N, OUT)
    whole = step(x, weight, None, plan, g)
    found = torch.autograd.grad(grouped_linear(x, weight, None, plan), plan.parameters, g)
    for one, other in zip(found, whole[2:], strict=True):
        assert torch.equal(one, other)


def test_a_long_slot() -> None:
    torch.manual_seed(0)
    n, slots = 4600, Slots(24, 32, torch.bfloat16)
    terms = [
        slots.lora(slice(0, 300), 4),
        slots.lora(slice(300, 4500), 3),
        slots.selector(slice(4500, n), 2),
    ]
    x, weight, g, plan = random(n, 32), small(24, 32), random(n, 24), Plan(terms)
    check(x, weight, None, plan, g, step(x, weight, None, plan, g))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "b", "g"])
def test_a_slot_that_is_not_finite_leaves_the_others_alone(value: float, where: str) -> None:
    def run(broken: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        terms = Slots(OUT, IN, torch.bfloat16).mix("everything", N)
        x, weight, g = random(N, IN), small(OUT, IN), random(N, OUT)
        bad = next(term for term in terms if not term.b.requires_grad).rows
        with torch.no_grad():
            if broken:
                for tensor in {"x": [x[bad]], "g": [g[bad]], "b": [t.b for t in terms if t.rows == bad]}[
                    where
                ]:
                    tensor.fill_(value)
        plan = Plan(terms)
        y, grad_x, *grads = step(x, weight, None, plan, g)
        owners = [term.rows for term in terms for _ in term.parameters]
        others = [grad for rows, grad in zip(owners, grads, strict=True) if rows != bad]
        return [y[: bad.start], y[bad.stop :], grad_x[: bad.start], grad_x[bad.stop :], *others]

    for one, other in zip(run(broken=True), run(broken=False), strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled in the interpreter")
def test_neither_ranks_nor_rows_nor_slots_are_compiled_for() -> None:
    from rayft.kernels import grouped_linear_triton as kernels

    def compiled() -> int:
        each = (kernels._update, kernels._partial, kernels._total, kernels._of_a)
        return sum(len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in each)

    torch.manual_seed(0)
    slots, weight = Slots(OUT, IN, torch.bfloat16), small(OUT, IN)

    def run(n: int, ranks: Sequence[int]) -> None:
        size = n // len(ranks)
        parts = [slice(index * size, (index + 1) * size) for index in range(len(ranks))]
        plan = Plan([slots.lora(part, rank) for part, rank in zip(parts, ranks, strict=True)])
        x, g = random(n, IN), random(n, OUT)
        check(x, weight, None, plan, g, step(x, weight, None, plan, g))

    run(300, (16, 32))
    run(300, (16, 64))
    before = compiled()
    for n, ranks in ((16, (1,)), (77, (3, 5)), (2048, (4, 8, 16)), (1000, (256, 1, 33)), (333, (32,) * 16)):
        run(n, ranks)
    assert compiled() == before


@pytest.mark.skipif(INTERPRETED, reason="graphs need a GPU")
def test_a_graph_follows_its_parameters() -> None:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(False)
    plan = Plan(Slots(OUT, IN, torch.bfloat16).mix("everything", N))
    x, weight, g = random(N, IN), small(OUT, IN), random(N, OUT)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(x, weight, None, plan, g)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(x, weight, None, plan, g)
    for _ in range(3):
        with torch.no_grad():
            for parameter in plan.parameters:
                parameter.copy_(random(*parameter.shape) / IN**0.5)
            x.copy_(random(N, IN))
            g.copy_(random(N, OUT))
        graph.replay()
        check(x, weight, None, plan, g, found)


@pytest.mark.skipif(INTERPRETED, reason="graphs need a GPU")
def test_a_table_is_not_written_in_a_capture() -> None:
    torch.use_deterministic_algorithms(False)
    plan = Plan(Slots(OUT, IN, torch.bfloat16).mix("lora", N))
    x, weight = random(N, IN), random(OUT, IN)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        # torch warns of a graph of nothing.
        x.add_(0)
        with pytest.raises(AssertionError, match="before the capture"):
            grouped_linear(x, weight, None, plan)
