"""Tiny random models of several architectures, for smoke tests of the whole path in seconds.

Sizes are odd where the architecture allows it, so that mixed-up dimensions raise errors. All dropouts are 0.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rayft.models.files import save_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

__all__ = [
    "TINY",
    "byte_tokenizer",
    "save_tiny_bert",
    "save_tiny_gpt2",
    "save_tiny_llama",
    "save_tiny_qwen",
    "save_tiny_vit",
]

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Ten times the usual value, because at 0.02 all logits of such a small model are nearly equal.
SPREAD = 0.2


def save_tiny_llama(folder: Path, *, seed: int = 0) -> Path:
    """Save a random Llama (about 70 k parameters) and a tokenizer of bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        initializer_range=SPREAD,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _save(folder, LlamaForCausalLM, config, tokenizer, seed)


def save_tiny_qwen(folder: Path, *, seed: int = 0, tokenizer: Any = None) -> Path:
    """Save a random Qwen3 (heads wider than hidden / heads, norms on queries and keys, no tying).

    Args:
        folder: destination.
        seed: of the weights.
        tokenizer: saved with the model; the tokenizer of bytes where not given.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = tokenizer or byte_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=40,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        initializer_range=SPREAD,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _save(folder, Qwen3ForCausalLM, config, tokenizer, seed)


def save_tiny_gpt2(folder: Path, *, seed: int = 0) -> Path:
    """Save a random GPT-2 (`Conv1D` layers, learnt positions, output layer tied to the embedding)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = byte_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=40,
        n_inner=56,
        n_layer=2,
        n_head=4,
        n_positions=1024,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=SPREAD,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _save(folder, GPT2LMHeadModel, config, tokenizer, seed)


def save_tiny_bert(folder: Path, *, seed: int = 0) -> Path:
    """Save a random BERT for sequence classification; its tokenizer writes [CLS] bytes [SEP]."""
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = _classifier_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=SPREAD,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _save(folder, BertForSequenceClassification, config, tokenizer, seed)


def save_tiny_vit(folder: Path, *, seed: int = 0) -> Path:
    """Save a random ViT for images of 8×8 pixels in grey, 16 patches of 2×2, and its image processor."""
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=40,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=SPREAD,
    )
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])
    return _save(folder, ViTForImageClassification, config, processor, seed)


TINY: dict[str, Callable[[Path], Path]] = {
    "tiny-llama": save_tiny_llama,
    "tiny-qwen": save_tiny_qwen,
    "tiny-gpt2": save_tiny_gpt2,
    "tiny-bert": save_tiny_bert,
    "tiny-vit": save_tiny_vit,
}
"""Name → function that writes the model's folder."""


def _save(folder: Path, kind: Any, config: PreTrainedConfig, encoder: Any, seed: int) -> Path:
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = kind(config)
    torch.set_rng_state(state)
    save_model(model, folder)
    encoder.save_pretrained(folder)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes with a chat template."""
    from transformers import PreTrainedTokenizerFast

    special = ["<|im_start|>", "<|im_end|>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_bytes(special),
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=special,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _classifier_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[CLS]", "[SEP]"]
    core = _bytes(special)
    core.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(token, special.index(token)) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=128,
    )


def _bytes(special: list[str]) -> Any:
    """Return a tokenizer of bytes; special tokens have the first ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(special + alphabet)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return core
