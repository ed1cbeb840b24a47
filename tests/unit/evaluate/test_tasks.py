from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from rayft.data.example import Example, Message
from rayft.data.scorer import Scorer
from rayft.data.template import prompt_ids
from rayft.errors import DataError
from rayft.evaluate import tasks
from rayft.evaluate.tasks import generate, score
from rayft.models.tiny import save_tiny_llama


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = save_tiny_llama(tmp_path_factory.mktemp("tiny"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def prompts(loaded):
    _, tokenizer = loaded
    return [
        tokenizer(text)["input_ids"] for text in ("a", "a longer one", "three words here", "zz", "hello" * 5)
    ]


def one_by_one(model, prompt: list[int], new: int, ends: set[int]) -> list[int]:
    """Generate greedily without cache, batch or padding."""
    ids, found = list(prompt), []
    for _ in range(new):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in ends:
            break
        found.append(token)
        ids.append(token)
    return found


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_a_batch_gives_the_answers_of_single_prompts(loaded, prompts, batch_size):
    model, tokenizer = loaded
    expected = [
        tokenizer.decode(one_by_one(model, p, 12, {tokenizer.eos_token_id}), skip_special_tokens=True)
        for p in prompts
    ]
    assert len(set(expected)) > 1
    assert generate(model, tokenizer, prompts, 12, batch_size) == expected


def test_padding_shifts_no_learnt_position(loaded, prompts):
    # Rotary positions are relative, so only a model with learnt positions shows whether padding shifts them.
    _, tokenizer = loaded
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.5
    )
    model = GPT2LMHeadModel(config).double().eval()
    ends = {tokenizer.eos_token_id, config.eos_token_id}
    expected = [
        tokenizer.decode(one_by_one(model, prompt, 8, ends), skip_special_tokens=True) for prompt in prompts
    ]
    assert generate(model, tokenizer, prompts, 8, 5) == expected


def test_a_sequence_stops_at_its_end_and_the_others_continue(loaded, prompts, monkeypatch):
    model, tokenizer = loaded
    free = [one_by_one(model, prompt, 12, set()) for prompt in prompts]
    # A token that ends some answers early, but not all of them, chosen among those that the model writes.
    end = free[1][3]
    expected = [one_by_one(model, prompt, 12, {end, tokenizer.eos_token_id}) for prompt in prompts]
    assert len({len(tokens) for tokens in expected}) > 1
    monkeypatch.setattr(model.generation_config, "eos_token_id", [end, tokenizer.eos_token_id])
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in expected]
    assert generate(model, tokenizer, prompts, 12, 5) == texts


@pytest.mark.parametrize("stay", [0.3, 0.9])
def test_sequences_that_are_done_may_stay_for_a_while(loaded, prompts, monkeypatch, stay):
    model, tokenizer = loaded
    free = [one_by_one(model, prompt, 12, set()) for prompt in prompts]
    end = free[1][3]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [end, tokenizer.eos_token_id])
    sizes = []
    handle = model.register_forward_hook(lambda *given: sizes.append(len(given[2].logits)))
    try:
        expected = generate(model, tokenizer, prompts, 12, 5)
        left_at_once, sizes[:] = [*sizes], []
        monkeypatch.setattr(tasks, "_stay", lambda _: stay)
        assert generate(model, tokenizer, prompts, 12, 5) == expected
    finally:
        handle.remove()
    assert sum(sizes) > sum(left_at_once)
    assert len(set(sizes)) < len(set(left_at_once))


def test_cudnn_is_back_after_answers(loaded, prompts):
    model, tokenizer = loaded
    seen = []
    handle = model.register_forward_hook(lambda *_: seen.append(torch.backends.cuda.cudnn_sdp_enabled()))
    try:
        generate(model, tokenizer, prompts, 1)
    finally:
        handle.remove()
    assert seen == [False]
    assert torch.backends.cuda.cudnn_sdp_enabled()


def test_a_batch_ends_when_all_its_sequences_have_ended(loaded, prompts, monkeypatch):
    model, tokenizer = loaded
    first = [tokens[0] for tokens in (one_by_one(model, prompt, 1, set()) for prompt in prompts)]
    monkeypatch.setattr(model.generation_config, "eos_token_id", first)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    try:
        assert generate(model, tokenizer, prompts, 100, 5) == [""] * 5
    finally:
        handle.remove()
    assert len(calls) == 1


def test_the_mode_of_the_model_is_restored(loaded, prompts):
    model, tokenizer = loaded
    model.train()
    try:
        generate(model, tokenizer, prompts, 1)
        assert model.training
    finally:
        model.eval()


def test_prompts_that_do_not_fit_are_refused(loaded):
    model, tokenizer = loaded
    with pytest.raises(
        DataError, match="prompt 2 has 1020 tokens; with 5 more it exceeds the model's context of 1024"
    ):
        generate(model, tokenizer, [[5], [5] * 1020], 5)
    with pytest.raises(DataError, match="an empty one"):
        generate(model, tokenizer, [[5], []], 5)


def test_scores_are_those_of_the_answers_in_the_order_of_the_examples(loaded):
    model, tokenizer = loaded
    asked = [
        Example(messages=(Message("user", text), Message("assistant", "?"))) for text in ("b" * 9, "a", "cc")
    ]
    said = generate(model, tokenizer, [prompt_ids(example, tokenizer) for example in asked], 4)
    right = [
        dataclasses.replace(example, messages=(example.messages[0], Message("assistant", text)))
        for example, text in zip(asked, said, strict=True)
    ]
    wrong = dataclasses.replace(right[1], messages=(right[1].messages[0], Message("assistant", "never said")))
    found = score(model, tokenizer, [right[0], wrong, right[2]], Scorer(), max_new_tokens=4, batch_size=2)
    assert found.values == (1.0, 0.0, 1.0)
    assert found.n == 3
    assert found.ci_low < found.mean < found.ci_high
    assert found.failures == 0
    assert found.seconds > 0


def test_only_failures_of_this_scoring_are_counted(loaded, monkeypatch):
    model, tokenizer = loaded
    monkeypatch.setattr("rayft.data.scorer.build_task", lambda *_, **__: None)
    scorer = Scorer("chain_sum", failures=4)
    example = Example(messages=(Message("user", "a"), Message("assistant", "?")), entry={"answer": "?"})
    assert score(model, tokenizer, [example], scorer, max_new_tokens=1).failures == 1


def test_an_empty_list_of_examples_is_refused(loaded):
    model, tokenizer = loaded
    with pytest.raises(DataError, match="no examples to score"):
        score(model, tokenizer, [], Scorer())
    with pytest.raises(DataError, match="asks no question"):
        score(model, tokenizer, [Example(text="raw")], Scorer())


def test_a_classifier_is_scored_by_its_classes(loaded):
    _, tokenizer = loaded
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_labels=3,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.5,
    )
    model = LlamaForSequenceClassification(config).double().eval()
    texts = [f"text {number} " * (number + 1) for number in range(8)]
    with torch.no_grad():
        said = [
            int(model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits.argmax())
            for text in texts
        ]
    assert len(set(said)) > 1
    examples = [
        Example(text=text, label=label, label_name=str(label))
        for text, label in zip(texts, said, strict=True)
    ]
    assert score(model, tokenizer, examples, Scorer(), batch_size=3).mean == 1
    examples[5] = dataclasses.replace(examples[5], label=(said[5] + 1) % 3)
    assert score(model, tokenizer, examples, Scorer(), batch_size=3).values == (1, 1, 1, 1, 1, 0, 1, 1)
