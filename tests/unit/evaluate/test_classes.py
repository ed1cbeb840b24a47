"""Classifiers of images and of texts with special tokens: losses and scores."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn import functional

from rayft.data.example import Example, Message
from rayft.data.pack import collate_rows, rows_of
from rayft.data.scorer import Scorer
from rayft.data.template import IGNORED, encode_all, prompt_ids
from rayft.errors import DataError
from rayft.evaluate.loss import batch_loss, mean_loss
from rayft.evaluate.tasks import score
from rayft.models.load import LoadedModel, ModelConfig, load_model
from rayft.models.tiny import TINY
from rayft.numerics import assert_close
from tests.unit.data.pictures import example, noise


def loaded_as(folder, task: str, dtype: torch.dtype = torch.float32) -> LoadedModel:
    return load_model(ModelConfig.model_validate({"name": str(folder), "task": task, "num_labels": 3}), dtype)


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory):
    return TINY["tiny-vit"](tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def vit(vit_folder):
    return loaded_as(vit_folder, "image_classification")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return loaded_as(TINY["tiny-bert"](tmp_path_factory.mktemp("bert")), "sequence_classification")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_of_images_is_the_models_own(vit_folder, dtype):
    loaded = loaded_as(vit_folder, "image_classification", dtype)
    examples = [example(noise(number), number % 3) for number in range(5)]
    batch = collate_rows(rows_of(encode_all(examples, loaded.tokenizer, 8), 8), 0)
    # Pixels are float32 until the model's dtype is known.
    assert batch.pixel_values.dtype == torch.float32
    loss, count = batch_loss(loaded.model, batch)
    assert count == 5
    logits = loaded.model(pixel_values=batch.pixel_values.to(dtype)).logits.float()
    expected = functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0, 1]), reduction="sum")
    assert torch.equal(loss, expected)
    assert mean_loss(loaded.model, [batch, batch]) == (2 * float(expected), 10)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_images_are_scored_by_their_classes(vit, batch_size):
    examples = [example(noise(number)) for number in range(8)]
    pixels = torch.stack([torch.from_numpy(vit.tokenizer.pixels(item.image)) for item in examples])
    # The fresh head predicts the same class for all images, so this one is scaled.
    with torch.no_grad():
        vit.model.classifier.weight.normal_(generator=torch.Generator().manual_seed(1))
        said = vit.model(pixel_values=pixels).logits.argmax(-1).tolist()
    assert len(set(said)) > 1
    right = [dataclasses.replace(e, label=c) for e, c in zip(examples, said, strict=True)]
    assert score(vit.model, vit.tokenizer, right, Scorer(), batch_size=batch_size).mean == 1
    right[5] = dataclasses.replace(right[5], label=(said[5] + 1) % 3)
    found = score(vit.model, vit.tokenizer, right, Scorer(), batch_size=batch_size)
    assert found.values == (1, 1, 1, 1, 1, 0, 1, 1)


def test_images_for_a_model_of_texts_are_refused_and_vice_versa(vit, bert):
    text, picture = Example(text="a", label=0, label_name="x"), example(noise("a"))
    for loaded, item in ((vit, text), (bert, picture)):
        with pytest.raises(DataError, match="images are scored with an image classifier"):
            score(loaded.model, loaded.tokenizer, [item], Scorer())
    turns = Example(messages=(Message("user", "a"), Message("assistant", "b")))
    with pytest.raises(DataError, match="these have no class"):
        score(vit.model, vit.tokenizer, [turns], Scorer())


def test_a_text_to_classify_gets_the_tokenizers_special_tokens(bert, tiny_tokenizer):
    item = Example(text="ab", label=1, label_name="x")
    encoded = encode_all([item], bert.tokenizer, 16)[0]
    assert bert.tokenizer.convert_ids_to_tokens(encoded.input_ids) == ["[CLS]", "a", "b", "[SEP]"]
    assert encoded.labels == (IGNORED,) * 4
    assert prompt_ids(item, bert.tokenizer) == encoded.input_ids
    # A decoder's tokenizer that adds no special tokens still adds none.
    plain = encode_all([item], tiny_tokenizer, 16)[0]
    assert tiny_tokenizer.convert_ids_to_tokens(plain.input_ids) == ["a", "b"]


def test_padding_changes_no_class_of_an_encoder(bert):
    texts = ["a", "longer text", "the longest text of all of them"]
    examples = [Example(text=text, label=0, label_name="x") for text in texts]
    encoded = encode_all(examples, bert.tokenizer, 64)
    together = collate_rows(rows_of(encoded, 64), bert.model.config.pad_token_id)
    with torch.no_grad():
        padded = bert.model(input_ids=together.input_ids, attention_mask=together.attention_mask).logits
        alone = torch.cat([bert.model(input_ids=torch.tensor([item.input_ids])).logits for item in encoded])
    # Two layers of attention and feed-forward, each about eight products deep.
    assert_close(padded, alone, torch.float32, 56, depth=32)
    assert len({tuple(row) for row in alone.tolist()}) == 3
