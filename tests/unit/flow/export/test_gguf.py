"""A LoRA for llama.cpp: its names, its scale and the order of its rows; llama.cpp answers as PEFT does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from rayft.artifacts import AdapterArtifact
from rayft.errors import ArtifactError, ResourceError
from rayft.flow.export import gguf as exporting
from rayft.flow.export.gguf import PROVED, check_gguf, permuted, write_gguf
from rayft.models.load import ModelConfig, load_skeleton
from rayft.models.tiny import save_tiny_gpt2
from rayft.numerics import assert_close, relative_error, tolerance
from tests.unit.flow.export.adapters import random_adapter

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "LlamaForCausalLM": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "MistralForCausalLM": lambda: MistralConfig(**SIZES, head_dim=12, sliding_window=None),
    "Qwen2ForCausalLM": lambda: Qwen2Config(**SIZES),
    "Qwen3ForCausalLM": lambda: Qwen3Config(**SIZES, head_dim=12),
}
TOKENS = [5, 80, 17, 91, 9, 33, 41, 62, 7, 18]
LENGTH, DEPTH = 200, 60
"""Terms of a logit's sums, and roundings on the way to it."""


def base(kind: str, folder: Path) -> ModelConfig:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]())
    assert type(model).__name__ == kind
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder)
    return ModelConfig(name=str(folder))


def tensors(file: Path) -> dict[str, Any]:
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(file).tensors}


def field(file: Path, key: str) -> Any:
    found = gguf.GGUFReader(file).get_field(key)
    return None if found is None else found.contents()


def test_every_architecture_that_is_accepted_is_proved() -> None:
    assert CONFIGS.keys() == PROVED.keys()


def test_the_file_says_what_it_is(tmp_path: Path) -> None:
    model = base("LlamaForCausalLM", tmp_path / "base")
    artifact = random_adapter(model, rank=4)
    write_gguf(artifact, load_skeleton(model), tmp_path / "a.gguf")
    file = tmp_path / "a.gguf"
    assert field(file, "general.type") == "adapter"
    assert field(file, "general.architecture") == "llama"
    assert field(file, "adapter.type") == "lora"
    # The factor that llama.cpp multiplies by is α / R.
    assert field(file, "adapter.lora.alpha") == 4
    assert field(file, "rayft.content_hash") == artifact.content_hash
    factors = artifact.modules["model.layers.1.mlp.down_proj"]
    found = tensors(file)
    assert len(found) == 2 * len(artifact.modules)
    assert np.array_equal(found["blk.1.ffn_down.weight.lora_a"], factors.a.numpy())
    assert np.array_equal(found["blk.1.ffn_down.weight.lora_b"], (factors.b * factors.scale).numpy())


def test_ranks_that_differ_have_no_common_factor(tmp_path: Path) -> None:
    model = base("LlamaForCausalLM", tmp_path / "base")
    write_gguf(random_adapter(model, rank=4, step=1), load_skeleton(model), tmp_path / "a.gguf")
    assert field(tmp_path / "a.gguf", "adapter.lora.alpha") == 0


def test_the_rows_of_queries_and_keys_are_permuted_by_head() -> None:
    config = LlamaConfig(**SIZES)
    rows = torch.arange(48.0)[:, None]
    query = permuted(rows, "model.layers.0.self_attn.q_proj", config)[:, 0].tolist()
    # 6 heads of 8 rows: row 2i of a head was row i, row 2i + 1 was row 4 + i.
    assert query[:8] == [0, 4, 1, 5, 2, 6, 3, 7]
    assert query[8:16] == [8, 12, 9, 13, 10, 14, 11, 15]
    # 2 heads of keys.
    key = permuted(rows[:16], "model.layers.0.self_attn.k_proj", config)[:, 0].tolist()
    assert key[8:] == [8, 12, 9, 13, 10, 14, 11, 15]
    assert torch.equal(permuted(rows, "model.layers.0.self_attn.v_proj", config), rows)


def test_an_architecture_that_was_not_proved_is_refused(tmp_path: Path) -> None:
    model = ModelConfig(name=str(save_tiny_gpt2(tmp_path / "gpt2")))
    with pytest.raises(ArtifactError, match=r"GPT2LMHeadModel is an architecture for which .*\(--merged\)"):
        check_gguf(random_adapter(model), load_skeleton(model))


def test_a_module_that_llama_cpp_does_not_know_is_refused(tmp_path: Path) -> None:
    model = base("LlamaForCausalLM", tmp_path / "base")
    factors = next(iter(random_adapter(model).modules.values()))
    artifact = AdapterArtifact({"model.layers.0.adapter.up": factors})
    with pytest.raises(ArtifactError, match=r"no weight for model\.layers\.0\.adapter\.up"):
        check_gguf(artifact, load_skeleton(model))


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    model = base("LlamaForCausalLM", tmp_path / "base")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ResourceError, match="pip install 'gguf"):
        check_gguf(random_adapter(model), load_skeleton(model))


NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
"""transformers' name of a module, without its layer → llama.cpp's."""


def write_base(model: Any, file: Path) -> None:
    """Write a model as llama.cpp stores it, in float32 and without a tokenizer."""
    config, arch = model.config, PROVED[type(model).__name__]
    heads, keys = config.num_attention_heads, config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer = gguf.GGUFWriter(file, arch.name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(keys)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        value = parameter.detach().float().numpy()
        if arch.permutes and module.endswith(("q_proj", "k_proj")):
            count = heads if module.endswith("q_proj") else keys
            value = value.reshape(count, 2, width // 2, -1).swapaxes(1, 2).reshape(value.shape)
        if module.startswith("model.layers."):
            _, _, layer, inner = module.split(".", 3)
            written = f"blk.{layer}.{NAMES[inner]}.{kind}"
        else:
            written = f"{NAMES[module]}.{kind}"
        writer.add_tensor(written, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def answers(file: Path, lora: Path | None = None) -> torch.Tensor:
    """Return llama.cpp's logits for `TOKENS`; skip the test where its bindings are not installed."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is built from source where wanted")
    options: dict[str, Any] = {} if lora is None else {"lora_path": str(lora)}
    llama = llama_cpp.Llama(
        str(file), logits_all=True, n_ctx=64, n_threads=1, verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, **options,
    )  # fmt: skip
    llama.eval(TOKENS)
    found = torch.tensor(llama.scores[: len(TOKENS)].copy())
    llama.close()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize("kind", PROVED)
def test_llama_cpp_has_the_logits_of_peft(
    kind: str, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(
        "llama_cpp", reason="llama-cpp-python, which pip builds from source, is not installed"
    )
    config = base(kind, tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(config.name)
    write_base(model, tmp_path / "base.gguf")
    with torch.no_grad():
        plain = model(torch.tensor([TOKENS])).logits[0]
    # Without an adapter: the base was converted as llama.cpp expects it.
    assert_close(answers(tmp_path / "base.gguf"), plain, torch.float32, LENGTH, DEPTH)
    artifact = random_adapter(config, rank=4, step=step)
    write_gguf(artifact, load_skeleton(config), tmp_path / "a.gguf")
    adapted = PeftModel.from_pretrained(model, artifact.save(tmp_path / "adapter"))
    with torch.no_grad():
        expected = adapted(torch.tensor([TOKENS])).logits[0]
    assert relative_error(expected, plain) > 0.1
    assert_close(answers(tmp_path / "base.gguf", tmp_path / "a.gguf"), expected, torch.float32, LENGTH, DEPTH)
    # With the other order of rows the file loads, and the answer is wrong.
    other = dataclasses.replace(PROVED[kind], permutes=not PROVED[kind].permutes)
    monkeypatch.setattr(exporting, "PROVED", {**PROVED, kind: other})
    write_gguf(artifact, load_skeleton(config), tmp_path / "wrong.gguf")
    wrong = answers(tmp_path / "base.gguf", tmp_path / "wrong.gguf")
    assert relative_error(wrong, expected) > 100 * tolerance(torch.float32, LENGTH, DEPTH)
