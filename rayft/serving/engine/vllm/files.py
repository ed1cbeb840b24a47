"""The file by which an engine passes an adapter to its workers, which are other processes.

It is a safetensors file in shared memory, with `<layer>.b` and `<layer>.a` or `<layer>.columns` for each
layer, and the scales in its metadata. Workers map it, so its numbers are copied only once, to the device.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from rayft.artifacts import AdapterArtifact
from rayft.errors import ResourceError
from rayft.kernels.segment_lora import SlotFactors
from rayft.serving.engine.api import slot_factors

__all__ = ["read", "written"]

SHARED = Path("/dev/shm")  # noqa: S108  (the name of POSIX shared memory on Linux)
SCALES = "scales"
LENGTH, ALIGNED = struct.Struct("<Q"), 64
NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.int64: "I64"}
"""What safetensors calls the dtypes."""


@contextmanager
def written(artifact: AdapterArtifact, dtype: torch.dtype) -> Iterator[Path]:
    """Write an adapter's factors for the workers, and delete the file when the block ends.

    Args:
        artifact: the adapter.
        dtype: the engine's dtype, to which A and B are cast.

    Raises:
        ResourceError: if there is no space for the file.
    """
    tensors: dict[str, torch.Tensor] = {}
    scales: dict[str, float] = {}
    for name, layer in artifact.modules.items():
        found = slot_factors(layer)
        scales[name] = found.scale
        for part in ("b", "a", "columns"):
            if (tensor := getattr(found, part)) is not None:
                tensors[f"{name}.{part}"] = tensor
    # The widest dtype first, so that each tensor is aligned: the format leaves no gaps.
    tensors = dict(sorted(tensors.items(), key=lambda item: -_kind(item[1], dtype).itemsize))
    size = sum(tensor.numel() * _kind(tensor, dtype).itemsize for tensor in tensors.values())
    handle, place = tempfile.mkstemp(".safetensors", "rayft-adapter-", _folder(size))
    os.close(handle)
    try:
        try:
            _write(place, tensors, scales, dtype)
        except (OSError, RuntimeError) as error:
            raise ResourceError(
                f"an adapter of {size:,} bytes can't be passed to the engine's processes through {place} "
                f"({error}); free space there"
            ) from error
        yield Path(place)
    finally:
        Path(place).unlink(missing_ok=True)


def _kind(tensor: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    return dtype if tensor.is_floating_point() else tensor.dtype


def _write(
    place: str, tensors: Mapping[str, torch.Tensor], scales: Mapping[str, float], dtype: torch.dtype
) -> None:
    """Write a safetensors file, whose format is a header in JSON, preceded by its length, and the numbers.

    `safetensors.torch.save_file` keeps Python's lock while it writes, and tokens would wait for it.
    """
    header: dict[str, Any] = {"__metadata__": {SCALES: json.dumps(scales)}}
    end = 0
    for name, tensor in tensors.items():
        kind = _kind(tensor, dtype)
        begin, end = end, end + tensor.numel() * kind.itemsize
        header[name] = {"dtype": NAMES[kind], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(LENGTH.size + len(text)) % ALIGNED)
    first = LENGTH.size + len(text)
    with open(place, "wb") as file:
        file.write(LENGTH.pack(len(text)) + text)
        file.flush()
        # Space is reserved here: writing to a map of a full file system would end the process.
        os.posix_fallocate(file.fileno(), 0, first + end)
    memory = torch.from_file(place, shared=True, size=first + end, dtype=torch.uint8)[first:]
    for name, tensor in tensors.items():
        begin, stop = header[name]["data_offsets"]
        memory[begin:stop].view(_kind(tensor, dtype)).view(tensor.shape).copy_(tensor)


def read(path: Path) -> dict[str, SlotFactors]:
    """Read the factors of each layer from a file of `written`, or from an adapter's folder.

    The tensors of a file are views of its map, and stay usable after the file is deleted.

    Raises:
        ArtifactError: if the folder is no adapter.
    """
    if path.is_dir():
        return {name: slot_factors(layer) for name, layer in AdapterArtifact.load(path).modules.items()}
    with safe_open(path, framework="pt") as opened:
        scales: Mapping[str, float] = json.loads(opened.metadata()[SCALES])
        keys = set(opened.keys())
        return {
            name: SlotFactors(
                b=opened.get_tensor(f"{name}.b"),
                scale=scale,
                a=opened.get_tensor(f"{name}.a") if f"{name}.a" in keys else None,
                columns=opened.get_tensor(f"{name}.columns") if f"{name}.columns" in keys else None,
            )
            for name, scale in scales.items()
        }


def _folder(size: int) -> str:
    """Return the folder of shared memory, or that of temporary files if there is too little of it."""
    roomy = SHARED.is_dir() and shutil.disk_usage(SHARED).free > 2 * size
    return str(SHARED) if roomy else tempfile.gettempdir()
