"""Random adapters for tests, large enough to change the text, and the text that PEFT generates with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rayft.artifacts import AdapterArtifact, ArtifactMeta
from rayft.methods.base import LoraFactors
from rayft.methods.c3la import WindowChain
from rayft.numerics import generator

RANKS = {"small": 2, "middle": 4, "large": 8}
SELECTOR = "picks"
LENGTH = 24


def random_adapter(
    name: str,
    shapes: dict[str, tuple[int, int]],
    fingerprint: str = "",
    rank: int = 4,
    selector: bool = False,
) -> AdapterArtifact:
    modules = {}
    for path, (outputs, inputs) in shapes.items():
        random = generator(name, path)
        a = torch.randn(rank, inputs, generator=random) / inputs**0.5
        b = 0.5 * torch.randn(outputs, rank, generator=random)
        columns = None
        if selector:
            columns = tuple(torch.randperm(inputs, generator=random)[:rank].tolist())
            a = torch.eye(inputs)[list(columns)]
        modules[path] = LoraFactors(a, b, 0.8, columns)
    return AdapterArtifact(modules, meta=ArtifactMeta(base_model="tiny", base_fingerprint=fingerprint))


def save_adapters(folder: Path, shapes: dict[str, tuple[int, int]], fingerprint: str) -> dict[str, str]:
    """Save three LoRAs of different ranks and a selector; return name → folder."""
    made = {name: random_adapter(name, shapes, fingerprint, rank) for name, rank in RANKS.items()}
    made[SELECTOR] = random_adapter(SELECTOR, shapes, fingerprint, 6, selector=True)
    return {name: str(adapter.save(folder / name)) for name, adapter in made.items()}


def chain_of(links: Sequence[AdapterArtifact]) -> AdapterArtifact:
    """Stack adapters like the links of a chain, as one LoRA whose rank is the sum of theirs."""
    modules = {}
    for path, first in links[0].modules.items():
        parts = [link.modules[path] for link in links]
        a, b = torch.cat([part.a for part in parts]), torch.cat([part.b for part in parts], dim=1)
        modules[path] = LoraFactors(a, b, first.scale)
    return AdapterArtifact(modules, meta=links[0].meta)


def window_chain(name: str, shapes: dict[str, tuple[int, int]], rank: int) -> AdapterArtifact:
    """Stack four links of a c³LA; the first one's window wraps onto columns that the second one selects."""
    modules = {}
    for path, (outputs, inputs) in shapes.items():
        random = generator(name, path)
        order = torch.tensor([-(-inputs // rank) - 1, 0, 1, 2])
        chain = WindowChain(order, torch.zeros(outputs, rank), inputs, 0.8)
        for link in range(len(order)):
            if link:
                chain.advance(random)
            chain.lora_B.data = 0.2 * torch.randn(outputs, rank, generator=random) / rank**0.5
        modules[path] = chain.to_lora()
        columns = modules[path].columns
        assert columns is not None
        assert len(columns) == 4 * rank > len({*columns}), "no column repeats"
    return AdapterArtifact(modules, meta=ArtifactMeta(base_model="tiny"))


def reference(tiny_folder: Path, adapter: str | None) -> Any:
    """Return the base, or PEFT's model with one adapter."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    return model if adapter is None else PeftModel.from_pretrained(model, adapter)


def generated(model: Any, prompt: Sequence[int], length: int = LENGTH, **options: Any) -> tuple[int, ...]:
    """Return the tokens with which `generate` continues a prompt, without the end token."""
    ids = torch.tensor([prompt])
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=length,
        **options,
    )
    tokens = tuple(made[0, len(prompt) :].tolist())
    return tokens[:-1] if tokens[-1] == model.generation_config.eos_token_id else tokens


def expected(
    tiny_folder: Path, adapter: str | None, prompt: Sequence[int], length: int = LENGTH
) -> tuple[int, ...]:
    """Return the tokens that `generate` gives with the base, or with one adapter by PEFT."""
    return generated(reference(tiny_folder, adapter), prompt, length)
