"""The bytes of an adapter as they lie in a worker's memory."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from rayft.artifacts import AdapterArtifact
from rayft.errors import ArtifactError
from rayft.kernels.grouped_lora import AdapterTable, Group
from rayft.kernels.segment_lora import SlotFactors
from rayft.methods.base import LoraFactors
from rayft.serving.engine.vllm.image import Image, entries_in, factors_of, locate
from rayft.serving.engine.vllm.shard import Part, Parts
from tests.unit.serving.adapters import random_adapter

SHAPES = {"layers.0.q_proj": (13, 20), "layers.0.down_proj": (7, 5), "layers.1.q_proj": (1, 3)}
PARTS = tuple(Part(name, shape, (0, shape[0]), (0, shape[1])) for name, shape in SHAPES.items())
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def mixed() -> AdapterArtifact:
    """An adapter with a LoRA and a selector, and without factors in the second layer."""
    lora, selector = (random_adapter("mixed", SHAPES, rank=3, selector=one) for one in (False, True))
    return AdapterArtifact(
        {
            "layers.1.q_proj": lora.modules["layers.1.q_proj"],
            "layers.0.q_proj": selector.modules["layers.0.q_proj"],
        }
    )


def placed(image: Image, parts: Parts, dtype: torch.dtype, piece: int) -> list[dict[int, SlotFactors]]:
    """Copy an image in pieces, and read it through a table."""
    memory, begin = torch.full((image.nbytes + 256,), 255, dtype=torch.uint8)[256:], 0
    while begin < image.nbytes:
        part = torch.full((piece,), 255, dtype=torch.uint8)
        count = image.read(part, begin)
        assert 0 < count <= piece
        memory[begin : begin + count] = part[:count]
        begin += count
    assert begin == image.nbytes
    entries = entries_in(memory, len(parts))
    locate(entries, memory.data_ptr())
    groups = [Group(part.inputs[1] - part.inputs[0], {part.name: part.size}) for part in parts]
    table = AdapterTable(4, groups, dtype=dtype, device="cpu")
    table.point(2, entries, memory)
    return table.layers


@DTYPES
@pytest.mark.parametrize("piece", [192, 200, 1000, 10**4])
def test_an_image_is_what_a_table_reads(piece: int, dtype: torch.dtype) -> None:
    artifact = mixed()
    image = Image(factors_of(artifact), PARTS, dtype)
    found = placed(image, PARTS, dtype, piece)
    for part, layer in zip(PARTS, found, strict=True):
        assert {*layer} == ({2} if part.name in artifact.modules else set())
    for index, name in ((0, "layers.0.q_proj"), (2, "layers.1.q_proj")):
        expected, factors = factors_of(artifact)[name], found[index][2]
        assert factors.scale == pytest.approx(expected.scale, rel=2**-23)
        assert torch.equal(factors.b, expected.b.to(dtype))
        if expected.a is None:
            assert factors.columns is not None
            assert expected.columns is not None
            assert torch.equal(factors.columns, expected.columns)
        else:
            assert factors.a is not None
            assert torch.equal(factors.a, expected.a.to(dtype))
        # The kernels read whole units of B's rows.
        rows, width = len(factors.b), factors.b.stride(0)
        assert width == 8
        assert not factors.b.as_strided((rows, width), (width, 1))[:, 3:].any()


def test_a_worker_gets_its_part_only() -> None:
    artifact = random_adapter("lora", SHAPES, rank=3)
    parts = (
        Part("layers.0.q_proj", (13, 20), (4, 9), (0, 20)),
        Part("layers.0.down_proj", (7, 5), (0, 7), (1, 4)),
        PARTS[2],
    )
    q, down, _ = placed(Image(factors_of(artifact), parts, torch.float32), parts, torch.float32, 1000)
    whole = artifact.modules
    assert torch.equal(q[2].b, whole["layers.0.q_proj"].b[4:9])
    assert q[2].a is not None
    assert torch.equal(q[2].a, whole["layers.0.q_proj"].a)
    assert torch.equal(down[2].b, whole["layers.0.down_proj"].b)
    assert down[2].a is not None
    assert torch.equal(down[2].a, whole["layers.0.down_proj"].a[:, 1:4])


@pytest.mark.parametrize("columns", [(4, 0), (2, 3), (0, 3)], ids=str)
def test_a_selector_has_its_columns_of_the_worker(columns: tuple[int, int]) -> None:
    factors = LoraFactors(torch.eye(5)[[*columns]], torch.randn(7, 2), 1.5, columns)
    parts = (Part("down", (7, 5), (0, 7), (2, 4)),)
    image = Image(factors_of(AdapterArtifact({"down": factors})), parts, torch.float32)
    (found,) = placed(image, parts, torch.float32, 1000)
    kept = [index for index, column in enumerate(columns) if column in (2, 3)]
    if not kept:
        assert found == {}
        return
    assert torch.equal(found[2].b, factors.b[:, kept])
    assert found[2].columns is not None
    assert found[2].columns.tolist() == [columns[index] - 2 for index in kept]


def test_layers_of_rank_0_and_adapters_without_layers_take_no_place() -> None:
    empty = {"layers.0.q_proj": LoraFactors(torch.zeros(0, 20), torch.zeros(13, 0), 1.0)}
    sizes = {Image(factors_of(AdapterArtifact(one)), PARTS, torch.float32).nbytes for one in (empty, {})}
    assert sizes == {len(PARTS) * 64}
    image = Image(factors_of(AdapterArtifact(empty)), PARTS, torch.float32)
    assert placed(image, PARTS, torch.float32, 192) == [{}, {}, {}]


def test_addresses_are_counted_from_the_images_place() -> None:
    entries = torch.tensor([[512, 256, 0, 3, 8, 7, 0, 0], [0] * 8, [0, 1024, 768, 2, 8, 7, 0, 0]])
    locate(entries, 10**14)
    assert entries.tolist() == [
        [10**14 + 512, 10**14 + 256, 0, 3, 8, 7, 0, 0],
        [0] * 8,
        [0, 10**14 + 1024, 10**14 + 768, 2, 8, 7, 0, 0],
    ]


BAD: Mapping[str, tuple[dict[str, LoraFactors], str]] = {
    "layer": ({"lm_head": LoraFactors(torch.zeros(2, 5), torch.zeros(7, 2), 1.0)}, "no linear layer lm_head"),
    "outputs": (
        {"layers.0.down_proj": LoraFactors(torch.zeros(2, 5), torch.zeros(8, 2), 1.0)},
        "down_proj is 7x5.*its own base",
    ),
    "inputs": ({"layers.0.down_proj": LoraFactors(torch.zeros(2, 6), torch.zeros(7, 2), 1.0)}, "is 7x5"),
    "rank": (
        {"layers.0.down_proj": LoraFactors(torch.zeros(257, 5), torch.zeros(7, 257), 1.0)},
        "rank 257.*up to 256.*squeeze",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused(case: str) -> None:
    modules, message = BAD[case]
    with pytest.raises(ArtifactError, match=message):
        Image(factors_of(AdapterArtifact(modules)), PARTS, torch.float32)
