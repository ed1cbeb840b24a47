"""The reader of adapters' weights beside safetensors' own, on valid files and on damaged ones."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from rayft.artifacts.meta import WEIGHTS_FILE
from rayft.artifacts.read import FLOATS, INDICES, read_weights
from rayft.errors import ArtifactError

KINDS = FLOATS | INDICES


def tensors() -> dict[str, torch.Tensor]:
    # Odd numbers of bytes, so that the tensors behind them are at no multiple of their own size.
    found = {f"of {name}": torch.arange(3).to(dtype) for name, dtype in KINDS.items()}
    return found | {"a": torch.randn(4, 6), "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)}


def read(folder: Path, content: bytes) -> dict[str, torch.Tensor]:
    (folder / WEIGHTS_FILE).write_bytes(content)
    return read_weights(folder, KINDS)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def test_tensors_are_those_that_safetensors_reads(tmp_path: Path) -> None:
    content = save(tensors(), {"format": "pt"})
    found = read(tmp_path, content)
    assert same(found, load(content))
    assert len({one.untyped_storage().data_ptr() for one in found.values() if one.numel()}) == len(found) - 1


def parts(content: bytes) -> tuple[dict[str, Any], bytes]:
    (size,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def joined(header: Any, numbers: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + numbers


def changed(**entry: Any) -> Callable[[dict[str, Any], bytes], bytes]:
    return lambda header, numbers: joined({**header, "a": {**header["a"], **entry}}, numbers)


DAMAGES: dict[str, Callable[[dict[str, Any], bytes], bytes]] = {
    "no bytes": lambda header, numbers: b"",
    "half a size": lambda header, numbers: b"\1\0\0",
    "a header of the largest size": lambda header, numbers: b"\xff" * 8 + numbers,
    "a header of half its size": lambda header, numbers: joined(header, numbers)[:40],
    "a header that is a list": lambda header, numbers: joined([], numbers),
    "a header that is no JSON": lambda header, numbers: joined(b"{", numbers),
    "a header that is no text": lambda header, numbers: joined(b"\xff\xfe{}", numbers),
    "nested deeply": lambda header, numbers: joined(b"[" * 100_000, numbers),
    "an entry that is a number": lambda header, numbers: joined({**header, "a": 7}, numbers),
    "an entry without a type": lambda header, numbers: joined({**header, "a": {"shape": [4, 6]}}, numbers),
    "numbers cut off": lambda header, numbers: joined(header, numbers[:-1]),
    "no numbers": lambda header, numbers: joined(header, b""),
    "numbers behind the last": lambda header, numbers: joined(header, numbers + b"\0"),
    "a tensor left out": lambda header, numbers: joined(
        {name: one for name, one in header.items() if name != "a"}, numbers
    ),
    "the bytes of another": lambda header, numbers: joined({**header, "a": header["of F32"]}, numbers),
    "another shape": changed(shape=[5, 6]),
    "a negative shape": changed(shape=[-4, -6]),
    "a shape that is text": changed(shape="4x6"),
    "another type": changed(dtype="F64"),
    "a type that is no text": changed(dtype=None),
    "offsets beyond the end": changed(data_offsets=[0, 2**60]),
    "negative offsets": changed(data_offsets=[-96, 0]),
    "one offset": changed(data_offsets=[0]),
    "offsets that are text": changed(data_offsets="01"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_files_are_refused_as_by_safetensors(
    tmp_path: Path, damage: Callable[[dict[str, Any], bytes], bytes]
) -> None:
    content = damage(*parts(save(tensors())))
    with pytest.raises((SafetensorError, ValueError, TypeError)):
        load(content)
    with pytest.raises(ArtifactError, match=r"is truncated or damaged|is of type None"):
        read(tmp_path, content)


def test_no_damage_of_a_header_is_read_that_safetensors_would_refuse(tmp_path: Path) -> None:
    whole, draw = save(tensors()), random.Random(0)
    size = 8 + struct.unpack("<Q", whole[:8])[0]
    refused = 0
    for _ in range(2000):
        content = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            content[draw.randrange(size)] = draw.choice(b'0123456789[]{},:"FIBU \xff')
        try:
            expected = load(bytes(content))
        except (SafetensorError, ValueError, TypeError, LookupError, RuntimeError):
            refused += 1
            with pytest.raises(ArtifactError):
                read(tmp_path, bytes(content))
            continue
        try:
            assert same(read(tmp_path, bytes(content)), expected)
        except ArtifactError:
            # Such as a type that no adapter has.
            continue
    assert 1000 < refused < 2000
