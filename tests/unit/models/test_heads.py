"""Classification heads: what the checkpoint holds is where trials start, and nothing stays in a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from rayft.artifacts import AdapterArtifact, ArtifactMeta
from rayft.errors import BaseMismatchError
from rayft.methods.base import MethodConfig
from rayft.models.heads import head_parameters, reset_heads
from rayft.models.inject import attach, clear, export, inject
from rayft.models.load import ModelConfig, load_model
from rayft.models.tiny import save_tiny_bert
from rayft.peft.folder import PeftFolder

CLASSES = 2
"""Of the checkpoints here."""
TASK = "sequence_classification"


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def deberta(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier whose pooler is no part of its base, with the tokenizer of the tiny BERT."""
    folder = tmp_path_factory.mktemp("deberta")
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    tokenizer.save_pretrained(folder)
    config = transformers.DebertaV2Config(
        vocab_size=len(tokenizer), hidden_size=24, num_hidden_layers=1, num_attention_heads=3,
        intermediate_size=40, num_labels=CLASSES,
    )  # fmt: skip
    transformers.DebertaV2ForSequenceClassification(config).save_pretrained(folder)
    return folder


def load(folder: Path, labels: int = CLASSES, **more: Any) -> Any:
    config = {"name": str(folder), "task": TASK, "num_labels": labels, **more}
    return load_model(ModelConfig.model_validate(config), torch.float32).model


def head(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in head_parameters(model).items()}


def state(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def move(model: Any) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.5


def artifact(model: Any, method: str, rank: int = 2) -> AdapterArtifact | PeftFolder:
    """Train what a method trains, by half a unit in every number, and read it off."""
    inject(model, MethodConfig(name=method, rank=rank), seed=0)
    move(model)
    made = export(model, ArtifactMeta(method=method, task=TASK))
    clear(model)
    return made


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_trials_start_from_the_head_of_the_checkpoint(bert: Path, quantize: str | None) -> None:
    model, file = load(bert, quantize=quantize), load_file(bert / "model.safetensors")
    for seed in (1, 2):
        reset_heads(model, seed)
        assert equal(head(model), {name: file[name] for name in head_parameters(model)})
        inject(model, MethodConfig(rank=2), seed=seed)
        move(model)
        assert not torch.equal(head(model)["classifier.bias"], file["classifier.bias"])


def test_only_what_the_checkpoint_lacks_is_drawn(deberta: Path, tiny_folder: Path) -> None:
    file, model = load_file(deberta / "model.safetensors"), load(deberta, labels=3)
    drawn = []
    for seed in (1, 2, 1):
        reset_heads(model, seed)
        drawn.append(head(model))
        assert torch.equal(drawn[-1]["pooler.dense.weight"], file["pooler.dense.weight"])
    assert equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0]["classifier.weight"], drawn[1]["classifier.weight"])
    language = load(tiny_folder)
    reset_heads(language, seed=1)
    once = head(language)
    reset_heads(language, seed=2)
    assert not equal(head(language), once)


def test_training_from_a_fully_tuned_folder_starts_from_its_head(bert: Path, tmp_path: Path) -> None:
    model = load(bert, labels=3)
    inject(model, MethodConfig(name="full"), seed=0)
    move(model)
    model.save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path)
    again = load(tmp_path, labels=3)
    reset_heads(again, seed=5)
    assert equal(head(again), head(model))


@pytest.mark.parametrize("labels", [CLASSES, 3])
@pytest.mark.parametrize("method", ["lora", "peft:DoRA"])
def test_clear_leaves_no_head_behind(bert: Path, method: str, labels: int) -> None:
    model = load(bert, labels)
    before = state(model)
    made = artifact(model, method)
    attach(model, made)
    assert equal(head(model), dict(made.heads))
    clear(model)
    # Names change as layers are wrapped; values and their order don't.
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    headless = (
        AdapterArtifact(made.modules, meta=made.meta)
        if isinstance(made, AdapterArtifact)
        else PeftFolder({**made.config, "modules_to_save": None}, made.adapter, made.meta)
    )
    attach(model, made)
    attach(model, headless)
    assert equal(head(model), {name: before[name] for name in head(model)})


OTHERS = {
    "lora": r"the base has no linear layer bert\.encoder.*its own base or train it again",
    "peft:DoRA": r"the base has no linear layer for bert\.encoder.*its own base or train it again",
}


@pytest.mark.parametrize("inside", ["lora", "peft:DoRA"])
@pytest.mark.parametrize("method", OTHERS)
def test_an_adapter_of_another_model_changes_nothing(
    bert: Path, tiny_folder: Path, method: str, inside: str
) -> None:
    made, model = artifact(load(bert), method), load(tiny_folder)
    attach(model, artifact(model, inside))
    before = state(model)
    with pytest.raises(BaseMismatchError, match=OTHERS[method]):
        attach(model, made)
    assert equal(state(model), before)


@pytest.mark.parametrize("method", OTHERS)
def test_a_head_for_another_number_of_classes_is_refused(bert: Path, method: str) -> None:
    made, model = artifact(load(bert, labels=3), method), load(bert)
    attach(model, artifact(model, "lora"))
    before = state(model)
    match = r"classifier\.(weight is 2x24|bias is 2) in the base and 3(x24)? in the adapter: .*num_labels"
    with pytest.raises(BaseMismatchError, match=match):
        attach(model, made)
    assert equal(state(model), before)


@pytest.mark.parametrize("method", OTHERS)
def test_a_head_of_one_number_is_refused_instead_of_broadcast(bert: Path, method: str) -> None:
    model = load(bert)
    made = artifact(model, method)
    before = state(model)
    made.heads["classifier.bias"].resize_(1)  # type: ignore[no-untyped-call]
    with pytest.raises(BaseMismatchError, match=r"classifier\.bias is 2 in the base and 1 in the adapter"):
        attach(model, made)
    assert equal(state(model), before)


def test_a_parameter_that_is_no_head_is_not_overwritten(tiny_model: Any) -> None:
    made = artifact(tiny_model, "lora")
    assert isinstance(made, AdapterArtifact)
    before = state(tiny_model)
    whole = AdapterArtifact(made.modules, {"lm_head.weight": torch.ones(1)}, made.meta)
    with pytest.raises(BaseMismatchError, match=r"no classification head lm_head\.weight.*model\.task"):
        attach(tiny_model, whole)
    assert equal(state(tiny_model), before)


@pytest.mark.parametrize(
    ("method", "match"), [("lora", "is 24x24 in the base"), ("peft:DoRA", "has no place")]
)
def test_an_adapter_for_layers_of_another_size_is_refused(
    bert: Path, tmp_path: Path, method: str, match: str
) -> None:
    config = transformers.AutoConfig.from_pretrained(bert)
    config.hidden_size = 48
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path)
    made, model = artifact(load(tmp_path), method), load(bert)
    if isinstance(made, PeftFolder):
        # The head's size would be found first.
        made = PeftFolder({**made.config, "modules_to_save": None}, made.adapter, made.meta)
    clear(model)
    before = state(model)
    with pytest.raises(BaseMismatchError, match=match):
        attach(model, made)
    assert equal(state(model), before)


def test_an_adapter_of_peft_that_lacks_a_layer_is_refused(bert: Path) -> None:
    model = load(bert)
    made = artifact(model, "peft:DoRA")
    assert isinstance(made, PeftFolder)
    before = state(model)
    some = {n: v for n, v in made.tensors.items() if "layer.0.attention.self.query" not in n}
    with pytest.raises(BaseMismatchError, match=r"has no .*layer\.0\.attention\.self\.query.*own base"):
        attach(model, PeftFolder(made.config, some, made.meta))
    assert equal(state(model), before)
