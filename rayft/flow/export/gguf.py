"""An adapter as a LoRA of llama.cpp, in one GGUF file.

    blk.0.attn_q.weight.lora_a      A (R × I), float32
    blk.0.attn_q.weight.lora_b      s·B (O × R), float32, rows in llama.cpp's order

llama.cpp scales a module by `adapter.lora.alpha` / R, or by 1 where `adapter.lora.alpha` is 0. The scale s is
multiplied into B and α chosen so that the factor is 1: R if all modules have one rank, otherwise 0.

llama.cpp rotates neighbouring pairs of a head's rows, transformers its two halves. For the architectures in
which llama.cpp keeps the former order, its conversion of the base permutes the rows of the projections of
queries and keys; the rows of B are permuted likewise. A file without that loads, and answers wrongly.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rayft.artifacts import AdapterArtifact
from rayft.errors import ArtifactError, ResourceError

__all__ = ["ADAPTER_KEY", "PROVED", "check_gguf", "gguf_bytes", "permuted", "write_gguf"]

ADAPTER_KEY = "rayft.content_hash"
"""Key of the file that holds the adapter's identity; a file without it is not replaced."""


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp stores an architecture of transformers."""

    name: str
    """llama.cpp's name of it."""
    permutes: bool
    """Whether it permutes the rows of the projections of queries and keys."""


PROVED: Mapping[str, Architecture] = {
    "LlamaForCausalLM": Architecture("llama", permutes=True),
    "MistralForCausalLM": Architecture("llama", permutes=True),
    "Qwen2ForCausalLM": Architecture("qwen2", permutes=False),
    "Qwen3ForCausalLM": Architecture("qwen3", permutes=False),
}
"""Class of transformers → its architecture. Of these, a test has compared the logits of both programs."""


def check_gguf(artifact: AdapterArtifact, skeleton: Any) -> dict[str, str]:
    """Check that an adapter can be written for llama.cpp.

    Args:
        artifact: the adapter.
        skeleton: the base on the meta device.

    Returns:
        Module path → llama.cpp's name of the weight.

    Raises:
        ArtifactError: naming the architecture or the module that llama.cpp was not proved with.
        ResourceError: if the package gguf is not installed.
    """
    kind = type(skeleton).__name__
    if kind not in PROVED:
        raise ArtifactError(
            f"--gguf: {kind} is an architecture for which llama.cpp's order of weights was not tested, and a "
            f"wrong order gives wrong answers without an error; tested are {', '.join(PROVED)}. Merge the "
            "adapter instead (--merged), and convert the merged model"
        )
    gguf = _package()
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == PROVED[kind].name)
    names = gguf.get_tensor_name_map(arch, skeleton.config.num_hidden_layers)
    found = {}
    for module in artifact.modules:
        name = names.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if name is None:
            raise ArtifactError(
                f"--gguf: llama.cpp has no weight for {module}; merge the adapter instead (--merged), and "
                "convert the merged model"
            )
        found[module] = name
    return found


def gguf_bytes(artifact: AdapterArtifact) -> int:
    """Return the size of an adapter's tensors in the file, in bytes."""
    return sum(4 * (factors.a.numel() + factors.b.numel()) for factors in artifact.modules.values())


def write_gguf(artifact: AdapterArtifact, skeleton: Any, file: Path) -> None:
    """Write the file.

    Raises:
        ArtifactError, ResourceError: as `check_gguf`.
        OSError: if it can't be written.
    """
    names, kind = check_gguf(artifact, skeleton), PROVED[type(skeleton).__name__]
    gguf = _package()
    tensors = {}
    for module, factors in artifact.modules.items():
        b = factors.b.float() * factors.scale
        if kind.permutes:
            b = permuted(b, module, skeleton.config)
        tensors[f"{names[module]}.lora_a"] = factors.a.float().contiguous().numpy()
        tensors[f"{names[module]}.lora_b"] = b.contiguous().numpy()
    ranks = {factors.rank for factors in artifact.modules.values()}
    writer = gguf.GGUFWriter(file, kind.name)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(*ranks) if len(ranks) == 1 else 0.0)
        writer.add_string(ADAPTER_KEY, artifact.content_hash)
        for name, values in tensors.items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    _check_written(file, tensors)


def _check_written(file: Path, tensors: Mapping[str, npt.NDArray[np.float32]]) -> None:
    """Read the file back: numpy's `tofile`, by which it is written, does not report that a disk is full."""
    try:
        found = {tensor.name: tensor.data for tensor in _package().GGUFReader(file).tensors}
        whole = all(np.array_equal(found[name], values) for name, values in tensors.items())
    except (ValueError, IndexError, KeyError):
        whole = False
    if not whole:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))


def permuted(b: torch.Tensor, module: str, config: Any) -> torch.Tensor:
    """Return B (O × R) with the rows of a projection of queries or keys in llama.cpp's order.

    In each head of d rows, row 2i becomes what was row i, and row 2i + 1 what was row d/2 + i.
    """
    counts = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = counts.get(module.rpartition(".")[2])
    if count is None:
        return b
    return b.reshape(count, 2, b.shape[0] // count // 2, b.shape[1]).swapaxes(1, 2).reshape(b.shape)


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ResourceError("--gguf needs the package gguf: run `pip install 'gguf>=0.19,<0.20'`") from error
    return gguf
