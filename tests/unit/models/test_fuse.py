"""Fused models: which parts are known, and losses and gradients that are those of the plain model."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.llama import modeling_llama

from rayft.data.pack import Batch
from rayft.evaluate.loss import batch_loss, target_losses
from rayft.kernels import fused
from rayft.methods.base import MethodConfig
from rayft.models import fuse as module
from rayft.models.attention import attend_by_segments
from rayft.models.fuse import Fused, FusedHead, FusedNorm, fuse, is_fused, plainly, unfuse
from rayft.models.inject import inject
from rayft.models.packed import skeleton
from rayft.numerics import assert_close

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
LLAMA = {"norms": 5, "feed-forward blocks": 2, "rotary embeddings": 2, "layers": 2, "the loss": 1}
WHOLE_HEADS = {"norms": 5, "rotary embeddings": 2, "the loss": 1}
KNOWN: dict[str, dict[str, int]] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    # Norms of queries and keys.
    "qwen3": LLAMA | {"norms": 9},
    # 1 + w, and GELU.
    "gemma": LLAMA,
    # Norms before and after, and bounded logits.
    "gemma2": {"norms": 9, "feed-forward blocks": 2, "rotary embeddings": 2},
    "gemma3_text": {"norms": 13, "feed-forward blocks": 2, "rotary embeddings": 2, "the loss": 1},
    # Norms after, which round last.
    "olmo2": {"norms": 9, "feed-forward blocks": 2, "rotary embeddings": 2, "the loss": 1},
    "phi3": WHOLE_HEADS,
    # A factor of residuals, and one of logits.
    "granite": {"norms": 5, "feed-forward blocks": 2, "rotary embeddings": 2},
    # LayerNorm, pairs of neighbours, a factor of logits.
    "cohere": {"feed-forward blocks": 2},
    "gpt2": {"the loss": 1},
    "gpt_neox": {"rotary embeddings": 2, "the loss": 1},
    "ministral": LLAMA,
    "smollm3": LLAMA,
    "olmo3": {"norms": 9, "feed-forward blocks": 2, "rotary embeddings": 2, "the loss": 1},
    "exaone4": {"norms": 9, "feed-forward blocks": 2, "rotary embeddings": 2, "the loss": 1},
    # Feed-forward blocks of experts.
    "mixtral": {"norms": 5, "rotary embeddings": 2},
    "qwen3_moe": {"norms": 9, "rotary embeddings": 2},
}
MORE: dict[str, dict[str, Any]] = {
    "granite": {"residual_multiplier": 0.7, "logits_scaling": 3.0},
    "phi3": {"partial_rotary_factor": 0.5},
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3_text": {"query_pre_attn_scalar": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}


def small(kind: str, **more: Any) -> Any:
    """Return a random frozen model with adapters that do something."""
    torch.manual_seed(0)
    given = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64} if kind == "gpt2" else SMALL
    config = CONFIG_MAPPING[kind](**given | MORE.get(kind, {}) | more)
    model = AutoModelForCausalLM.from_config(config).float().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1))
    inject(model, MethodConfig(rank=4), seed=0)
    disturb(model, 0)
    attend_by_segments(model)
    return model


def disturb(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def batch() -> Batch:
    """Return two packed rows of 12 tokens, some of which are learnt."""
    lengths = [5, 1, 6, 3, 9]
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    place = torch.tensor([2, 3, 7, 8, 10, 13, 17, 18, 22])
    return Batch(
        input_ids=torch.randint(1, 64, (2, 12)),
        position_ids=torch.cat([torch.arange(length) for length in lengths]).view(2, 12),
        offsets=offsets,
        completion_index=place,
        targets=torch.randint(1, 64, place.shape),
    )


def computed(model: Any, given: Batch, outer: torch.Tensor) -> list[torch.Tensor]:
    """Return the losses, and the adapters' gradients of their sum weighted by `outer`."""
    losses = target_losses(model, given)
    return [losses.detach(), *torch.autograd.grad(losses, trained(model), outer)]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, torch.float32, 64, depth=32)


@pytest.mark.parametrize("kind", KNOWN)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_and_gradients_are_those_of_the_plain_model(kind: str, checkpointing: bool) -> None:
    model, given, outer = small(kind).train(), batch(), torch.randn(9)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    expected = computed(model, given, outer)
    classes = [type(part) for part in model.modules()]
    assert fuse(model) == KNOWN[kind]
    assert_same(computed(model, given, outer), expected)
    with torch.inference_mode():
        assert_close(batch_loss(model, given)[0], expected[0].sum(), torch.float32, 64, depth=32)
    assert fuse(model) == KNOWN[kind]
    unfuse(model)
    assert [type(part) for part in model.modules()] == classes
    assert all(map(torch.equal, computed(model, given, outer), expected))


@pytest.mark.parametrize("kind", KNOWN)
def test_in_bfloat16_the_outputs_are_those_of_the_plain_model(kind: str) -> None:
    """OLMo 2 has angles in float32."""
    model, given = small(kind).bfloat16().eval(), batch()
    arguments = {"input_ids": given.input_ids, "position_ids": given.position_ids}
    with torch.inference_mode():
        expected = model(**arguments, attention_mask=given.offsets.view(1, 1, 1, -1)).logits
        fuse(model)
        found = model(**arguments, attention_mask=given.offsets.view(1, 1, 1, -1)).logits
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)


@pytest.mark.parametrize("wrong", ["rms_norm", "add_rms_norm", "gated", "rotate"])
def test_a_wrong_operation_is_not_used(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(fused, wrong)

    def mutant(*arguments: Any) -> Any:
        found = right(*arguments)
        return (found[0], -found[1]) if isinstance(found, tuple) else -found

    monkeypatch.setattr(module, wrong, mutant)
    model = small("llama")
    piece = {"rms_norm": "norms", "add_rms_norm": "layers", "gated": "feed-forward blocks"}
    # What is known of a class of attention is kept for the whole process.
    module._with_rotation.cache_clear()
    try:
        assert piece.get(wrong, "rotary embeddings") not in fuse(model)
    finally:
        module._with_rotation.cache_clear()


def test_operations_that_change_after_a_model_was_fused_would_be_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, given, outer = small("llama"), batch(), torch.randn(9)
    expected = computed(model, given, outer)
    fuse(model)
    for name in ("rms_norm", "add_rms_norm", "gated"):
        right = getattr(module, name)
        with monkeypatch.context() as patched:
            patched.setattr(module, name, lambda x, *rest, right=right: right(x * 1.01, *rest))
            # The scale of what is normalised does not matter, but for eps and in sums.
            if name != "rms_norm":
                with pytest.raises(AssertionError, match="relative error"):
                    assert_same(computed(model, given, outer), expected)
    assert_same(computed(model, given, outer), expected)


def test_each_skeleton_of_a_fused_model_has_adapters_of_its_own() -> None:
    model, given, outer = small("qwen3"), batch(), torch.randn(9)
    fuse(model)
    others = [skeleton(model), copy.deepcopy(skeleton(model))]
    for seed, other in enumerate(others):
        inject(other, MethodConfig(rank=3), seed=seed + 1)
        disturb(other, seed + 1)
    found = [computed(one, given, outer) for one in (model, *others)]
    for one in (model, *others):
        assert is_fused(one)
        unfuse(one)
    expected = [computed(one, given, outer) for one in (model, *others)]
    for mine, plain in zip(found, expected, strict=True):
        assert_same(mine, plain)
    assert not torch.equal(expected[0][0], expected[1][0])
    assert not torch.equal(expected[1][0], expected[2][0])


def test_other_models_of_the_process_stay_as_they_are() -> None:
    rotary = modeling_llama.apply_rotary_pos_emb
    model, other = small("llama"), small("llama")
    fuse(model)
    assert modeling_llama.apply_rotary_pos_emb is rotary
    assert not is_fused(other)
    assert type(other.model.layers[0].self_attn).forward is modeling_llama.LlamaAttention.forward


def test_a_trained_output_layer_gets_its_gradient() -> None:
    model, given, outer = small("llama"), batch(), torch.randn(9)
    model.lm_head.weight.requires_grad_(True)
    expected = computed(model, given, outer)
    fuse(model)
    assert isinstance(model.lm_head, FusedHead)
    assert_same(computed(model, given, outer), expected)


def test_modules_with_a_forward_of_their_own_stay() -> None:
    model = small("llama")
    mlp, layer = model.model.layers[0].mlp, model.model.layers[1]
    for part in (mlp, layer):
        part.forward = part.forward
    # The layer of the first block has an unknown block in it.
    assert fuse(model) == {"norms": 5, "feed-forward blocks": 1, "rotary embeddings": 2, "the loss": 1}


def test_a_layer_whose_norm_was_replaced_computes_plainly() -> None:
    model, given, outer = small("llama"), batch(), torch.randn(9)
    fuse(model)
    layer = model.model.layers[0]
    layer.post_attention_layernorm = nn.Sequential(layer.post_attention_layernorm, nn.Tanh())
    found = computed(model, given, outer)
    unfuse(model)
    assert_same(found, computed(model, given, outer))


def hidden(model: Any) -> dict[str, nn.Module]:
    """Return the modules that a fused model's operations compute without calling them."""
    layer = model.model.layers[0]
    return {"norm": layer.post_attention_layernorm, "activation": layer.mlp.act_fn, "head": model.lm_head}


@pytest.mark.parametrize("part", ["norm", "activation", "head"])
def test_a_forward_hook_of_every_part_runs_and_may_change_the_output(part: str) -> None:
    model, given, outer = small("llama"), batch(), torch.randn(9)
    plain = computed(model, given, outer)
    seen: list[torch.Size] = []

    def hook(_: nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
        seen.append(output.shape)
        return output * 1.5

    handle = hidden(model)[part].register_forward_hook(hook)
    expected = computed(model, given, outer)
    assert not torch.equal(expected[0], plain[0])
    assert fuse(model) == LLAMA
    assert_same(computed(model, given, outer), expected)
    assert seen[0] == seen[1]
    assert len(seen) == 2
    handle.remove()
    assert_same(computed(model, given, outer), plain)


@pytest.mark.parametrize("part", ["norm", "activation"])
@pytest.mark.parametrize("kind", ["forward_pre", "full_backward", "full_backward_pre"])
def test_the_other_hooks_of_every_part_run(part: str, kind: str) -> None:
    model, given, outer = small("llama"), batch(), torch.randn(9)
    fuse(model)
    expected, seen = computed(model, given, outer), []
    getattr(hidden(model)[part], f"register_{kind}_hook")(lambda *_: seen.append(kind))
    assert_same(computed(model, given, outer), expected)
    assert seen == [kind]


def test_hooks_of_all_modules_run() -> None:
    model, given, outer = small("llama"), batch(), torch.randn(9)

    def called() -> set[nn.Module]:
        found: set[nn.Module] = set()
        handle = nn.modules.module.register_module_forward_hook(lambda one, *_: found.add(one))
        try:
            computed(model, given, outer)
        finally:
            handle.remove()
        return found

    expected = called()
    plain = computed(model, given, outer)
    # Fusing tries each operation itself, though with such hooks the modules compute plainly.
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert fuse(model) == LLAMA
    handle.remove()
    assert called() == expected
    assert_same(computed(model, given, outer), plain)


def test_a_forward_that_was_set_after_fusing_is_used() -> None:
    model, given, outer = small("llama"), batch(), torch.randn(9)
    fuse(model)
    norm = model.model.layers[0].post_attention_layernorm
    norm.forward = lambda x: type(norm).forward(norm, x) * 1.5
    found = computed(model, given, outer)
    del norm.forward
    assert not torch.equal(found[0], computed(model, given, outer)[0])
    norm.register_forward_hook(lambda _, __, output: output * 1.5)
    assert_same(found, computed(model, given, outer))


@pytest.mark.parametrize("kind", KNOWN)
def test_a_fused_model_can_be_pickled_and_saved(kind: str, tmp_path: Path) -> None:
    model, given, outer = small(kind).eval(), batch(), torch.randn(9)
    fuse(model)
    expected = computed(model, given, outer)
    torch.save(model, tmp_path / "model.pt")
    for other in (pickle.loads(pickle.dumps(model)), torch.load(tmp_path / "model.pt", weights_only=False)):  # noqa: S301
        assert not is_fused(other)
        assert_same(computed(other, given, outer), expected)
        assert fuse(other) == KNOWN[kind]
    assert is_fused(model)
    for copied in (copy.deepcopy(model), copy.copy(model)):
        assert is_fused(copied)
        assert_same(computed(copied, given, outer), expected)
    deep = copy.deepcopy(model)
    assert not {id(one) for one in deep.parameters()} & {id(one) for one in model.parameters()}


def test_exact_gelu_is_not_taken_for_the_one_with_tanh() -> None:
    assert "feed-forward blocks" in fuse(small("llama", hidden_act="gelu_pytorch_tanh"))
    assert "feed-forward blocks" not in fuse(small("llama", hidden_act="gelu"))


def test_eps_outside_of_the_root_is_another_norm() -> None:
    class Norm(modeling_llama.LlamaRMSNorm):  # type: ignore[misc,no-any-unimported]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight * (x.float() / (x.float().pow(2).mean(-1, keepdim=True).sqrt() + 1e-6)).to(
                x.dtype
            )

    assert fuse(nn.ModuleList([Norm(32)])) == {}
    (norm,) = known = nn.ModuleList([modeling_llama.LlamaRMSNorm(32)])
    assert fuse(known) == {"norms": 1}
    assert isinstance(norm, FusedNorm)


def test_a_block_can_run_plainly() -> None:
    model = small("llama")
    fuse(model)
    before = [type(part) for part in model.modules()]
    with plainly(model):
        assert not is_fused(model)
    assert [type(part) for part in model.modules()] == before
    assert sum(isinstance(part, Fused) for part in model.modules()) == sum(LLAMA.values())


class _Block(nn.Module):
    """A gated feed-forward block that does something else too, as some models' do."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(self, name, nn.Linear(16, 16, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class _Dropping(_Block):
    """As Seed-OSS."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return functional.dropout(y, 0.1, training=self.training)


class _Bounding(_Block):
    """As DeepSeek-V4."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = functional.silu(self.gate_proj(x)).clamp(max=10.0)
        return self.down_proj(gate * self.up_proj(x).clamp(-10.0, 10.0))


class _Plain(_Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class _GatedNorm(nn.Module):
    """As Mamba 2's, whose second argument is optional."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(16)), 1e-5

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        if gate is not None:
            x = x * functional.silu(gate)
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


@pytest.mark.parametrize(
    ("kind", "fused"), [(_Plain, True), (_Dropping, False), (_Bounding, False), (_GatedNorm, False)]
)
@pytest.mark.parametrize("hooked", [False, True])
def test_parts_that_do_something_else_too_stay_plain(
    kind: type[nn.Module], *, fused: bool, hooked: bool
) -> None:
    model = nn.ModuleList([kind().requires_grad_(False)])
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None) if hooked else None
    fuse(model)
    if handle is not None:
        handle.remove()
    assert (type(model[0]) is not kind) == fused
