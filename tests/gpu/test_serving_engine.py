"""The packed engine on a GPU: mixed batches against merged weights in float64, graphs against none.

Without a GPU the same runs on a CPU in float32, without graphs: that checks the tests themselves.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rayft.methods.base import LoraFactors
from rayft.models.load import LoadedModel
from rayft.models.targets import linear_shapes
from rayft.numerics import relative_error, tolerance
from rayft.serving.engine import Engine, EngineLimits, GenerationRequest
from rayft.serving.packed_engine import PackedEngine
from rayft.serving.packed_row import Row
from rayft.serving.paged_forward import PagedForward
from rayft.serving.transformers_engine import TransformersEngine
from tests.unit.serving.adapters import random_adapter
from tests.unit.serving.rows import parts_of

pytestmark = pytest.mark.gpu

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
LAYERS, HIDDEN, VOCABULARY = 4, 256, 512
LIMITS = EngineLimits(64, 512, 16384)
RANKS = (1, 2, 4, 8, 16, 24, 32, 64)


class NoTokenizer:
    chat_template = eos_token = eos_token_id = None


def base() -> LoadedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=640, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=4096, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(DEVICE, DTYPE).eval()
    model.generation_config.eos_token_id = None
    return LoadedModel(model, NoTokenizer(), "", 4096)


def adapters(loaded: LoadedModel) -> dict[str, dict[str, LoraFactors]]:
    """Eight LoRAs, two selectors, and one of the rank that a chain of four links stacks to."""
    shapes = linear_shapes(loaded.model)
    made = {f"r{rank}": random_adapter(f"r{rank}", shapes, rank=rank) for rank in RANKS}
    made |= {f"cla{k}": random_adapter(f"cla{k}", shapes, rank=16, selector=True) for k in range(2)}
    made["chain"] = random_adapter("chain", shapes, rank=4 * 16)
    # Small beside the weights, so that errors of four layers stay those of rounding.
    return {
        name: {path: LoraFactors(f.a, 0.05 * f.b, f.scale, f.columns) for path, f in one.modules.items()}
        for name, one in made.items()
    }


def merged(adapter: dict[str, LoraFactors] | None, prompt: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Logits after the prompt by transformers alone, the adapter in the weights."""
    model: Any = base().model.double()
    for path, found in (adapter or {}).items():
        weight = model.get_submodule(path).weight
        weight.data += (found.scale * found.b.double() @ found.a.double()).to(weight.device)
    with torch.no_grad():
        logits: torch.Tensor = model.to(dtype)(torch.tensor([prompt], device=DEVICE)).logits[0, -1]
    return logits.double()


@pytest.fixture(scope="module")
def engine() -> Iterator[PackedEngine]:
    known = adapters(base())
    made = PackedEngine(base(), LIMITS, paged=True)
    for name, modules in known.items():
        made.load(name, modules)
    yield made
    made.stop()


def ask_all(engine: Engine, jobs: list[GenerationRequest]) -> list[tuple[int, ...]]:
    async def one(job: GenerationRequest) -> tuple[int, ...]:
        async with aclosing(engine.submit(job)) as steps:
            found = [step.tokens async for step in steps]
        return found[-1]

    async def together() -> list[tuple[int, ...]]:
        return await asyncio.gather(*[one(job) for job in jobs])

    return asyncio.run(together())


def prompt_of(index: int) -> list[int]:
    random = torch.Generator().manual_seed(index)
    return torch.randint(0, VOCABULARY, (3 + 37 * index,), generator=random).tolist()  # type: ignore[no-any-return]


def test_a_mixed_prefill_and_decoding_give_each_row_its_own_logits(engine: PackedEngine) -> None:
    forward = engine._forward
    assert isinstance(forward, PagedForward)
    known = adapters(base())
    names = [None, *known]
    rows = [
        Row(GenerationRequest((0,), 1), engine._slots.slot(name), None, None, prompt_of(i), forward.fresh())  # type: ignore[arg-type]
        for i, name in enumerate(names)
    ]
    # The prompts three times: as they are, captured, by the graph; then two tokens more.
    for turn in range(5):
        found = forward.logits(parts_of(rows))
        for index, (row, name) in enumerate(zip(rows, names, strict=True)):
            adapter = known[name] if name else None
            expected = merged(adapter, row.tokens, torch.float64)
            plain = merged(adapter, row.tokens, DTYPE)
            # Rounding takes other ways: the same size of error is what can be asked for.
            off, rounding = relative_error(found[index], expected), relative_error(plain, expected)
            assert off <= 2 * rounding + tolerance(DTYPE, HIDDEN), f"{name}: {off} off, plainly {rounding}"
            if name:
                without = merged(None, row.tokens, torch.float64)
                assert relative_error(found[index], without) > 4 * off, f"{name} makes no difference"
            if turn >= 2:
                row.cache.length = len(row.tokens)
                row.tokens.append(int(expected.argmax()))
    if GPU:
        assert forward._graphs is not None
        assert any(shape.max_q > 1 for shape in forward._graphs), "prompts were captured"
    for row in rows:
        forward.release(row.cache)


@pytest.mark.skipif(not GPU, reason="graphs need a GPU")
def test_graphs_give_what_the_forward_gives(engine: PackedEngine) -> None:
    forward = engine._forward
    assert isinstance(forward, PagedForward)
    jobs = [
        GenerationRequest(tuple(prompt_of(i % 7)), 40, name)
        for i, name in enumerate([None, *adapters(base())] * 3)
    ]
    # What comes first is captured when it comes again.
    graphed = [ask_all(engine, jobs) for _ in range(3)][-1]
    assert forward._graphs, "decoding was captured"
    graphs, forward._graphs = forward._graphs, None
    try:
        plain = ask_all(engine, jobs)
    finally:
        forward._graphs = graphs
    # The padded batch is another product, whose last bits may differ; where a choice was close, texts part.
    same = sum(one == two for one, two in zip(graphed, plain, strict=True))
    assert same >= len(jobs) - 4, f"{same} of {len(jobs)} texts are the same"


def test_adapters_come_and_go_while_others_decode(engine: PackedEngine) -> None:
    shapes = linear_shapes(base().model)
    jobs = [GenerationRequest(tuple(prompt_of(2)), 200, name) for name in ("r8", "cla0", None)]
    before = ask_all(engine, jobs)
    stop = threading.Event()
    loads = 0

    def change() -> None:
        nonlocal loads
        while not stop.is_set():
            engine.load("passing", random_adapter("passing", shapes, rank=64).modules)
            engine.unload("passing")
            loads += 1

    thread = threading.Thread(target=change)
    thread.start()
    try:
        assert ask_all(engine, jobs) == before
    finally:
        stop.set()
        thread.join()
    assert loads > 0


def test_transformers_engine_adds_the_same_adapters(engine: PackedEngine) -> None:
    other = TransformersEngine(base(), EngineLimits(16, 512, 4096))
    try:
        for name, modules in adapters(base()).items():
            other.load(name, modules)
        jobs = [
            GenerationRequest(tuple(prompt_of(1)), 12, name) for name in (None, "r1", "r64", "cla1", "chain")
        ]
        found, expected = ask_all(other, jobs), ask_all(engine, jobs)
    finally:
        other.stop()
    # The first token follows from logits that agree to rounding; later ones may part where a choice is close.
    assert [one[0] for one in found] == [one[0] for one in expected]
    assert sum(one == two for one, two in zip(found, expected, strict=True)) >= len(jobs) - 1
