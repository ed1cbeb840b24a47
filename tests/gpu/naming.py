"""A model for vLLM, and adapters with which it only generates one token, so that a wrong adapter shows."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rayft.artifacts import AdapterArtifact, ArtifactMeta
from rayft.methods.base import LoraFactors

HIDDEN, INNER, LAYERS, VOCABULARY = 256, 640, 4, 2048
NEURON = 7


def new_model() -> Any:
    """A Llama whose hidden states have a large positive number in place 0, whatever the tokens are."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=2048, eos_token_id=0,
        bos_token_id=None, pad_token_id=0, initializer_range=0.05,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 2.0
        head = model.lm_head.weight
        head.copy_(4 * torch.nn.functional.normalize(torch.randn_like(head), dim=1))
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
    return model.to(torch.bfloat16).eval()


def naming_adapter(head: torch.Tensor, token: int, rank: int) -> AdapterArtifact:
    """An adapter that only generates `token`: it drives a neuron, and writes the token's row of the head."""
    layer = f"model.layers.{LAYERS - 1}.mlp"
    drive = torch.zeros(INNER, rank)
    drive[NEURON, 0] = 6.0
    write = torch.zeros(HIDDEN, rank)
    write[:, 0] = head[token].float()
    first = torch.zeros(rank, HIDDEN)
    first[0, 0] = 1.0
    pick = torch.zeros(rank, INNER)
    pick[0, NEURON] = 1.0
    modules = {
        f"{layer}.gate_proj": LoraFactors(first, drive, 1.0),
        f"{layer}.up_proj": LoraFactors(first, drive, 1.0),
        f"{layer}.down_proj": LoraFactors(pick, write, 4.0),
    }
    return AdapterArtifact(modules, meta=ArtifactMeta(base_model="tiny"))
