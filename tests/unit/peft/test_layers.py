"""PEFT's layers go into a model, train, are saved, and leave no trace when they are taken out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from rayft.artifacts import AdapterArtifact, ArtifactMeta
from rayft.data.source import DataConfig
from rayft.errors import ArtifactError, MethodError
from rayft.methods.base import AdapterLinear, MethodConfig
from rayft.models.heads import reset_heads
from rayft.models.inject import attach, clear, export, inject, wrap
from rayft.models.load import ModelConfig, load_model
from rayft.models.methods import method
from rayft.models.targets import heads
from rayft.numerics import assert_close
from rayft.peft.folder import PeftFolder, load_adapter
from rayft.peft.method import PeftMethod
from rayft.train.run import EvaluateConfig, OptimConfig, RunConfig, ScaleConfig
from rayft.train.session import Session
from rayft.train.trainer import Reporter, Trainer
from rayft.train.worker import Worker
from tests.reporter import RecordingReporter

LAYERS = 14
"""Linear layers of the tiny Llama: two blocks of 32x32 (2), 16x32 (2), 64x32 (2) and 32x64 (1)."""
SUM = 2 * (2 * (32 + 32) + 2 * (16 + 32) + 3 * (64 + 32))
OUTPUTS = 2 * (2 * 32 + 2 * 16 + 2 * 64 + 32)
NUMBERS = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32)

TRAINED = {
    "peft:LoRA": 4 * SUM,
    "peft:PiSSA": 4 * SUM,
    "peft:DoRA": 4 * SUM + OUTPUTS,
    "peft:MiSS": 4 * OUTPUTS,
    "peft:VeRA": OUTPUTS + 4 * LAYERS,
    "peft:C3A": NUMBERS // 16,
    "peft:LoHa": 8 * SUM,
}
"""What each trains at rank 4 (C3A: in blocks of 16), by its paper's formula."""
LEARNING_RATES = {"peft:C3A": 1e-1, "peft:VeRA": 3e-2}
FOLDERS = ("peft:DoRA", "peft:C3A", "peft:LoHa")


def settings(name: str, **more: Any) -> MethodConfig:
    sized = method(name).rank(MethodConfig()) is not None
    return MethodConfig(name=name, **({"rank": 4} if sized else {}), **more)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=torch.arange(2, 34).unsqueeze(0)).logits)


def perturb(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn(parameter.shape))


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_untouched(model: torch.nn.Module, before: Mapping[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert set(after) == set(before)
    for name, value in before.items():
        assert torch.equal(after[name], value), f"{name} is not what it was"


@pytest.fixture
def gpt2() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2,
        bos_token_id=1, eos_token_id=1, loss_type="ForCausalLMLoss",
    )  # fmt: skip
    return GPT2LMHeadModel(config).requires_grad_(False).eval()


@pytest.mark.parametrize("name", TRAINED)
def test_it_trains_what_its_formula_says(tiny_model: Any, name: str) -> None:
    base = logits(tiny_model)
    injected = inject(tiny_model, settings(name), seed=1)
    assert injected.trainable == TRAINED[name]
    assert len(injected.modules) == LAYERS
    if name == "peft:C3A":
        assert not torch.equal(logits(tiny_model), base)
    else:
        assert_close(logits(tiny_model), base, torch.float32, 64, depth=8)


@pytest.mark.parametrize("name", TRAINED)
def test_saved_and_loaded_it_gives_the_same_logits(
    tiny_model: Any, tiny_folder: Path, tmp_path: Path, name: str
) -> None:
    inject(tiny_model, settings(name), seed=1)
    perturb(tiny_model)
    trained = logits(tiny_model)
    made = export(tiny_model, ArtifactMeta(method=name, base_fingerprint="ab"))
    assert isinstance(made, PeftFolder if name in FOLDERS else AdapterArtifact)
    folder = made.save(tmp_path / "adapter")
    loaded = load_adapter(folder)
    assert loaded.content_hash == made.content_hash
    assert loaded.meta.method == name
    assert loaded.meta.base_fingerprint == "ab"
    attach(tiny_model, loaded)
    assert not any(parameter.requires_grad for parameter in tiny_model.parameters())
    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    by_peft = logits(PeftModel.from_pretrained(base, folder).eval())
    if name in FOLDERS:
        assert torch.equal(logits(tiny_model), trained)
        assert torch.equal(by_peft, trained)
    else:
        assert_close(logits(tiny_model), trained, torch.float32, 64, depth=8)
        assert_close(by_peft, trained, torch.float32, 64, depth=8)


@pytest.mark.parametrize("name", [*TRAINED, "peft:OSF", "peft:PSOFT"])
def test_the_base_is_bit_for_bit_what_it_was(tiny_model: Any, name: str) -> None:
    wrap(tiny_model)
    before, base = state(tiny_model), logits(tiny_model)
    modules, names = [id(module) for module in tiny_model.modules()], set(vars(tiny_model))
    inject(tiny_model, settings(name), seed=1)
    perturb(tiny_model)
    clear(tiny_model)
    assert_untouched(tiny_model, before)
    assert [id(module) for module in tiny_model.modules()] == modules
    assert set(vars(tiny_model)) == names
    assert torch.equal(logits(tiny_model), base)
    assert not any(parameter.requires_grad for parameter in tiny_model.parameters())


@pytest.mark.parametrize("start", ["olora", "orthogonal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_starts_of_lora_leave_the_base_alone_too(
    tiny_model: Any, start: str, dtype: torch.dtype
) -> None:
    tiny_model.to(dtype)
    wrap(tiny_model)
    before = state(tiny_model)
    inject(tiny_model, settings("peft:LoRA", options={"init_lora_weights": start}), seed=1)
    perturb(tiny_model)
    trained = logits(tiny_model)
    made = export(tiny_model, ArtifactMeta(method="peft:LoRA"))
    assert isinstance(made, AdapterArtifact)
    assert made.rank == (8 if start == "olora" else 4)
    attach(tiny_model, made)
    # Storing the base without its start rounds each weight once more.
    assert_close(logits(tiny_model), trained, dtype, 64, depth=16)
    clear(tiny_model)
    assert_untouched(tiny_model, before)


def test_pissa_is_exported_at_twice_its_rank(tiny_model: Any) -> None:
    inject(tiny_model, settings("peft:PiSSA"), seed=1)
    untrained = export(tiny_model, ArtifactMeta(method="peft:PiSSA"))
    assert isinstance(untrained, AdapterArtifact)
    assert untrained.rank == 8
    assert not any(factors.delta().abs().max() > 1e-6 for factors in untrained.modules.values())


def test_a_method_of_peft_draws_from_its_seed_alone(tiny_model: Any) -> None:
    def drawn(seed: int) -> str:
        inject(tiny_model, settings("peft:LoRA"), seed)
        return export(tiny_model, ArtifactMeta(method="peft:LoRA")).content_hash

    torch.manual_seed(1)
    first, left = drawn(5), torch.rand(1)
    torch.manual_seed(2)
    assert drawn(5) == first
    assert drawn(6) != first
    torch.manual_seed(1)
    assert torch.equal(left, torch.rand(1))


def test_rank_patterns_and_targets_reach_peft_and_are_exported(tiny_model: Any) -> None:
    config = MethodConfig(name="peft:LoRA", rank=4, rank_pattern={"k_proj": 2}, targets=("q_proj", "k_proj"))
    assert inject(tiny_model, config, seed=0).trainable == 2 * (4 * 64 + 2 * 48)
    perturb(tiny_model)
    trained = logits(tiny_model)
    made = export(tiny_model, ArtifactMeta(method="peft:LoRA"))
    assert isinstance(made, AdapterArtifact)
    assert {factors.scale for factors in made.modules.values()} == {2.0}
    attach(tiny_model, made)
    assert_close(logits(tiny_model), trained, torch.float32, 64, depth=8)


@pytest.mark.parametrize("name", ["peft:LoRA", "peft:DoRA", "peft:PiSSA", "peft:VeRA"])
def test_conv1d_layers_are_adapted_saved_and_restored(gpt2: Any, tmp_path: Path, name: str) -> None:
    wrap(gpt2)
    before = state(gpt2)
    config = settings(name, targets=("c_attn", "c_fc"))
    injected = inject(gpt2, config, seed=1)
    assert injected.trainable > 0
    perturb(gpt2)
    trained = logits(gpt2)
    folder = export(gpt2, ArtifactMeta(method=name)).save(tmp_path / "adapter")
    attach(gpt2, load_adapter(folder))
    assert_close(logits(gpt2), trained, torch.float32, 64, depth=8)
    clear(gpt2)
    assert_untouched(gpt2, before)


@pytest.mark.parametrize("name", ["peft:MiSS", "peft:C3A"])
def test_a_class_without_conv1d_layers_is_refused_and_changes_nothing(gpt2: Any, name: str) -> None:
    wrap(gpt2)
    before = state(gpt2)
    with pytest.raises(MethodError, match=f"PEFT can't put '{name}' into this model: .*Conv1D"):
        inject(gpt2, settings(name), seed=0)
    assert_untouched(gpt2, before)
    assert all(type(layer) is AdapterLinear for layer in gpt2.modules() if hasattr(layer, "adapter"))


def test_a_block_size_that_divides_no_layer_is_refused(tiny_model: Any) -> None:
    with pytest.raises(MethodError, match="block size should be a factor"):
        inject(tiny_model, settings("peft:C3A", options={"block_size": 5}), seed=0)


@pytest.mark.parametrize("name", ["peft:LoRA", "peft:DoRA"])
def test_classification_heads_train_and_are_saved_with_the_adapter(
    tiny_folder: Path, tmp_path: Path, name: str
) -> None:
    config = ModelConfig(name=str(tiny_folder), task="sequence_classification", num_labels=3)
    model = load_model(config, torch.float32).model
    reset_heads(model, seed=3)
    assert inject(model, settings(name), seed=3).trainable == TRAINED[name] + 3 * 32
    perturb(model)
    trained = logits(model)
    meta = ArtifactMeta(method=name, task="sequence_classification")
    folder = export(model, meta).save(tmp_path / "adapter")
    reset_heads(model, seed=4)
    attach(model, load_adapter(folder))
    assert_close(logits(model), trained, torch.float32, 64, depth=8)
    assert not heads(model)["score"].weight.requires_grad  # type: ignore[union-attr]
    fresh = load_model(config, torch.float32).model
    assert_close(logits(PeftModel.from_pretrained(fresh, folder).eval()), trained, torch.float32, 64, depth=8)


@pytest.mark.parametrize(("name", "match"), [("peft:DoRA", "DoRA adapter"), ("peft:C3A", "'C3A' adapter")])
def test_an_adapter_without_factors_is_refused_where_factors_are_needed(
    tiny_model: Any, tmp_path: Path, name: str, match: str
) -> None:
    inject(tiny_model, settings(name), seed=0)
    folder = export(tiny_model, ArtifactMeta(method=name)).save(tmp_path / "adapter")
    with pytest.raises(ArtifactError, match=rf"{match}.*can't be squeezed, promoted or served: train lora"):
        AdapterArtifact.load(folder)


def test_a_damaged_folder_and_nan_are_refused(tiny_model: Any, tmp_path: Path) -> None:
    inject(tiny_model, settings("peft:C3A"), seed=0)
    folder = export(tiny_model, ArtifactMeta(method="peft:C3A")).save(tmp_path / "adapter")
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="is truncated or damaged"):
        load_adapter(folder)
    next(parameter for parameter in tiny_model.parameters() if parameter.requires_grad).data.fill_(torch.nan)
    with pytest.raises(ArtifactError, match="holds NaN or Inf"):
        export(tiny_model, ArtifactMeta(method="peft:C3A")).save(tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.fixture(scope="module")
def run(tiny_folder: Path) -> RunConfig:
    return RunConfig(
        model=ModelConfig(name=str(tiny_folder)),
        data=DataConfig(
            name="needle_haystack",
            params={"min_num_statements": 1, "max_num_statements": 2},
            train=16,
            val=4,
            test=4,
            max_length=512,
        ),
        optim=OptimConfig(lr=1e-2, steps=4, rows_per_step=2, warmup=1),
        scale=ScaleConfig(device="cpu", dtype="float32", zero=0, threads=1),
        evaluate=EvaluateConfig(every=2, checkpoint_seconds=0),
    )


@pytest.fixture(scope="module")
def session(run: RunConfig) -> Session:
    return Session.open(run, Worker())


def trial(run: RunConfig, name: str, **scale: Any) -> RunConfig:
    return run.model_copy(
        update={
            "method": settings(name),
            "optim": run.optim.model_copy(update={"lr": LEARNING_RATES.get(name, 1e-2)}),
            "scale": run.scale.model_copy(update=scale),
        }
    )


class Dies(RecordingReporter):
    """Dies after the first evaluation, as a killed process would."""

    def report(self, step: int, metrics: Mapping[str, float]) -> bool:
        raise KeyboardInterrupt


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("name", TRAINED)
def test_it_learns_and_goes_on_from_a_checkpoint(
    run: RunConfig, session: Session, tmp_path: Path, name: str
) -> None:
    before = state(session.loaded.model)
    wanted = trial(run, name)
    whole = Trainer(wanted, session, Reporter(), tmp_path / "whole").fit()
    assert whole.val_curve[-1][1] < whole.val_curve[0][1]
    assert whole.trainable == TRAINED[name]
    saved = load_adapter(whole.folder)
    assert (saved.content_hash, saved.parameters) == (whole.content_hash, whole.parameters)
    assert whole.bytes == (Path(whole.folder) / "adapter_model.safetensors").stat().st_size
    with pytest.raises(KeyboardInterrupt):
        Trainer(wanted, session, Dies(), tmp_path / "cut").fit()
    resumed = Trainer(wanted, session, Reporter(), tmp_path / "cut").fit()
    assert resumed.train_curve == whole.train_curve
    assert resumed.content_hash == whole.content_hash
    assert_untouched(session.loaded.model, before)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("name", ["peft:DoRA", "peft:VeRA", "peft:C3A", "peft:PiSSA"])
def test_it_trains_in_bfloat16_under_zero_2(run: RunConfig, tmp_path: Path, name: str) -> None:
    wanted = trial(run, name, dtype="bfloat16", zero=2)
    session = Session.open(wanted, Worker())
    before = state(session.loaded.model)
    whole = Trainer(wanted, session, Reporter(), tmp_path / "whole").fit()
    assert whole.val_curve[-1][1] < whole.val_curve[0][1]
    with pytest.raises(KeyboardInterrupt):
        Trainer(wanted, session, Dies(), tmp_path / "cut").fit()
    assert Trainer(wanted, session, Reporter(), tmp_path / "cut").fit().content_hash == whole.content_hash
    assert_untouched(session.loaded.model, before)


@pytest.mark.usefixtures("process_group")
def test_trials_of_a_lane_are_the_same_in_any_order(run: RunConfig, session: Session, tmp_path: Path) -> None:
    names = ["peft:PiSSA", "lora", "peft:DoRA", "peft:VeRA"]
    forth = {
        name: Trainer(trial(run, name), session, Reporter(), tmp_path / f"a{name}").fit() for name in names
    }
    back = {
        name: Trainer(trial(run, name), session, Reporter(), tmp_path / f"b{name}").fit()
        for name in names[::-1]
    }
    for name in names:
        assert forth[name].train_curve == back[name].train_curve
        assert forth[name].content_hash == back[name].content_hash


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("name", ["peft:DoRA", "peft:VeRA"])
def test_activation_checkpointing_gives_the_same_run(
    run: RunConfig, session: Session, tmp_path: Path, name: str
) -> None:
    kept = Trainer(trial(run, name), session, Reporter(), tmp_path / "a").fit()
    again = trial(run, name, activation_checkpointing=True)
    assert Trainer(again, session, Reporter(), tmp_path / "b").fit().train_curve == kept.train_curve


# FRoD makes sparse tensors, about which torch warns once.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
def test_every_method_of_this_peft_goes_in_and_out(tiny_model: Any) -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    wrap(tiny_model)
    before, found = state(tiny_model), set()
    for config_class in PEFT_TYPE_TO_CONFIG_MAPPING.values():
        try:
            kind = method(f"peft:{config_class.__name__}")
        except MethodError:
            continue
        assert isinstance(kind, PeftMethod)
        small = {"n_frequency": 50} if "n_frequency" in kind.fields() else {}
        inject(tiny_model, settings(kind.name, options=small), seed=0)
        perturb(tiny_model)
        trained = logits(tiny_model)
        attach(tiny_model, export(tiny_model, ArtifactMeta(method=kind.name)))
        assert_close(logits(tiny_model), trained, torch.float32, 64, depth=8)
        clear(tiny_model)
        assert_untouched(tiny_model, before)
        found.add(kind.name)
    assert len(found) >= 30
