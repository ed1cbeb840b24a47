"""Generate a model's answers, or predict classes, and score them."""

from __future__ import annotations

import heapq
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from rayft.data.chat_format import ChatFormat
from rayft.data.example import Example
from rayft.data.pack import ClassBatch, ImageBatch, collate_rows, rows_of
from rayft.data.pixels import ImageEncoder
from rayft.data.scorer import Scorer
from rayft.data.template import Style, encode_all, expected_answer, prompt_ids
from rayft.errors import DataError
from rayft.evaluate.compare import interval
from rayft.evaluate.loss import class_logits
from rayft.models.packed import Layout

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Packed",
    "PerfectAnswer",
    "Scores",
    "answer",
    "check_questions",
    "expected_answers",
    "generate",
    "perfect_answers",
    "score",
    "score_answers",
]


CHECKED = 200
"""Number of questions of a part, the longest, that are encoded to find out whether the model has room."""

TEMPLATE_BYTES = 2**11
"""Most bytes that a chat template is expected to add to a question."""


@dataclass(frozen=True)
class Scores:
    """Scores of answers, in the order of the examples."""

    values: tuple[float, ...]
    mean: float
    n: int
    ci_low: float
    ci_high: float
    """95% interval of the mean (`compare.interval`)."""
    seconds: float
    failures: int
    """Number of answers for which the scorer raised an error; each of them scores 0."""
    problem: str = ""
    """The first of these errors."""
    answers: tuple[str, ...] = ()
    """What the model answered; for a classifier, the numbers of the classes."""


class Packed(NamedTuple):
    """Prompts for the adapters of several slots (`rayft.models.packed`)."""

    layout: Layout
    """Read by the model's layers."""
    slots: Sequence[int]
    """The slot of each prompt."""


class PerfectAnswer(NamedTuple):
    """The score of a model that would write exactly an example's own answer."""

    score: float
    """Below 1 if the scorer does not accept the data's own answer."""
    tokens: int
    """Smallest `max_new_tokens` with which the model could write it."""


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | ImageEncoder,
    examples: Sequence[Example],
    scorer: Scorer,
    *,
    style: Style = "as_is",
    shots: Sequence[Example] = (),
    max_new_tokens: int = 16,
    batch_size: int = 32,
    advance: Callable[[int], None] = lambda _: None,
) -> Scores:
    """Score the answers of a language model, or the classes that a classifier predicts.

    Args:
        model: a causal language model, or a classifier of texts or images if the examples have labels.
        tokenizer: the model's tokenizer, or the image encoder of an image classifier.
        examples: of one part, usually val or test.
        scorer: `Parts.scorer`.
        style: how the question is asked (`data.template.prompt_text`).
        shots: solved examples for `few_shot`.
        max_new_tokens: longest answer; what the chat template makes a model write before its answer does not
            count.
        batch_size: number of sequences or images that run together.
        advance: called after each batch with its number of examples.

    Raises:
        DataError: if there are no examples, a prompt is empty or does not fit the model, or images are given
            to a model of texts.
    """
    if not examples:
        raise DataError("there are no examples to score")
    start = time.perf_counter()
    if examples[0].label is not None:
        classes = _classify(model, tokenizer, examples, batch_size, advance)
        values = [float(found == example.label) for found, example in zip(classes, examples, strict=True)]
        return _scores(values, [*map(str, classes)], start)
    if isinstance(tokenizer, ImageEncoder):
        raise DataError("an image classifier is scored on labelled images, and these have no class")
    prompts = [prompt_ids(example, tokenizer, style, shots) for example in examples]
    answers = answer(model, tokenizer, prompts, max_new_tokens, batch_size, advance)
    return score_answers(examples, answers, expected_answers(examples, tokenizer), scorer, start)


def expected_answers(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return what a model answers that has learnt the examples perfectly."""
    chat_format = ChatFormat.of(tokenizer)
    return [expected_answer(example, tokenizer, chat_format)[0].content for example in examples]


def score_answers(
    examples: Sequence[Example],
    answers: Sequence[str],
    expected: Sequence[str],
    scorer: Scorer,
    start: float,
) -> Scores:
    """Score answers to the questions of examples.

    Args:
        examples: conversations.
        answers: what a model answered.
        expected: `expected_answers`.
        scorer: `Parts.scorer`.
        start: when answering began, by `perf_counter`.
    """
    failures, scorer.problem = scorer.failures, ""
    values = [scorer.score(*one) for one in zip(examples, answers, expected, strict=True)]
    scores = _scores(values, answers, start)
    return replace(scores, failures=scorer.failures - failures, problem=scorer.problem)


def _scores(values: Sequence[float], answers: Sequence[str], start: float) -> Scores:
    low, high = interval(values)
    return Scores(
        values=tuple(values),
        mean=sum(values) / len(values),
        n=len(values),
        ci_low=low,
        ci_high=high,
        seconds=time.perf_counter() - start,
        failures=0,
        answers=tuple(answers),
    )


def check_questions(
    parts: Mapping[str, Sequence[Example]],
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    max_new_tokens: int,
) -> None:
    """Check before a model is loaded that it has room for questions and answers, as `score` does.

    Args:
        parts: part → its conversations. Those with the most text are encoded.
        tokenizer: of the model.
        context: most tokens that the model supports.
        max_new_tokens: as in `score`.

    Raises:
        DataError: with the part and the beginning of a question that the model has no room for.
    """
    room = context - max_new_tokens - ChatFormat.of(tokenizer).overhead
    for name, part in parts.items():
        for example in heapq.nlargest(CHECKED, part, key=_bytes):
            # A token has a byte or more.
            if _bytes(example) + TEMPLATE_BYTES <= room:
                break
            if (tokens := len(prompt_ids(example, tokenizer))) > room:
                raise DataError(
                    f"{name}: the question {example.question[:60]!r} has {tokens} tokens, and the model's "
                    f"context of {context} has no room for it and an answer of {max_new_tokens}, so it can't "
                    "be scored: shorten it or leave it out, lower evaluate.max_new_tokens, or take a model "
                    "of a longer context"
                )


def _bytes(example: Example) -> int:
    """Return how many bytes a question has, without what a chat template adds."""
    return len(example.question.encode()) + sum(len(str(tool).encode()) for tool in example.tools)


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
    advance: Callable[[int], None] = lambda _: None,
    packed: Packed | None = None,
) -> list[str]:
    """Generate answers to prompts, and return what the model writes after its reasoning.

    The arguments are those of `generate`, but what a template makes the model write before its answer does
    not count as tokens of the answer.
    """
    chat_format = ChatFormat.of(tokenizer)
    # Tokens that a template makes a model write before its answer must not count as tokens of the answer.
    limit = max_new_tokens + chat_format.overhead
    texts = generate(model, tokenizer, prompts, limit, batch_size, advance, packed)
    return [
        chat_format.parse(text, in_block=chat_format.in_block(prompt)).content
        for prompt, text in zip(prompts, texts, strict=True)
    ]


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int = 32,
    advance: Callable[[int], None] = lambda _: None,
    packed: Packed | None = None,
) -> list[str]:
    """Continue prompts greedily, each until a turn or sequence ends, or for `max_new_tokens` tokens.

    Prompts of similar length run together, padded on the left. Sequences leave their batch when they are
    done; on a GPU, several at a time. After each batch, `advance` is called with its number of prompts. If
    the model has the adapters of several slots, `packed` says which prompt belongs to which.

    Raises:
        DataError: if a prompt and its answer don't fit the model's context.
    """
    _check_room(getattr(model.config, "max_position_embeddings", None), prompts, max_new_tokens)
    chat_format = ChatFormat.of(tokenizer)
    ends = _end_ids(model, chat_format)
    answers: list[list[int]] = [[] for _ in prompts]
    training = model.training
    model.eval()
    handle = model.get_output_embeddings().register_forward_pre_hook(_contiguous)
    try:
        for batch in _by_length(prompts, batch_size):
            with warnings.catch_warnings(), _without_plans():
                # transformers 5.24 has a new name for the cache, which 5.17 does not know.
                warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
                if packed is not None:
                    batch.sort(key=packed.slots.__getitem__)
                found = _continue_batch(
                    model,
                    [prompts[index] for index in batch],
                    max_new_tokens,
                    ends,
                    partial(_enter, packed, batch) if packed is not None else lambda *_: None,
                )
            for index, tokens in zip(batch, found, strict=True):
                answers[index] = tokens
            advance(len(batch))
    finally:
        handle.remove()
        model.train(training)
    return [chat_format.decode(tokens) for tokens in answers]


def perfect_answers(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, scorer: Scorer
) -> list[PerfectAnswer]:
    """Score the examples' own answers, as if a model had written exactly those.

    Args:
        examples: conversations.
        tokenizer: the tokenizer of the model that is to answer.
        scorer: `Parts.scorer`.
    """
    chat_format = ChatFormat.of(tokenizer)
    found = []
    for example in examples:
        answer, tokens = expected_answer(example, tokenizer, chat_format)
        value = scorer.score(example, answer.content, answer.content)
        found.append(PerfectAnswer(value, tokens - chat_format.overhead))
    return found


def _contiguous(module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    # The last positions are a strided view. For such a view the CPU's product copies the whole output matrix
    # once per sequence, which took 3.4 of the 5.1 s of reading 50 questions with SmolLM2 on two cores.
    return (args[0].contiguous(), *args[1:])


def _by_length(sequences: Sequence[Sized], batch_size: int) -> Iterator[list[int]]:
    """Yield batches of indices, longest sequences first, so that a lack of memory shows at once."""
    order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def _continue_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ends: frozenset[int],
    enter: Callable[[Sequence[int], int], None],
) -> list[list[int]]:
    from transformers import DynamicCache

    width = max(map(len, prompts))
    device = model.device
    # Any token can be used for padding, since the mask hides it.
    padded, real = np.zeros((2, len(prompts), width), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        padded[row, width - len(prompt) :], real[row, width - len(prompt) :] = prompt, 1
    ids, mask = torch.from_numpy(padded).to(device), torch.from_numpy(real).to(device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache: Any = DynamicCache(config=model.config)
    found: list[list[int]] = [[] for _ in prompts]
    rows, done = list(range(len(prompts))), set[int]()
    stay = _stay(device)
    for _ in range(max_new_tokens):
        enter(rows, ids.shape[1])
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        chosen = logits[:, -1].argmax(-1)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            if token in ends:
                done.add(row)
            elif row not in done:
                found[row].append(token)
        going = [place for place, row in enumerate(rows) if row not in done]
        if not going:
            break
        if len(rows) - len(going) > stay * len(rows):
            keep = torch.tensor(going, device=device)
            cache.batch_select_indices(keep)
            rows = [rows[place] for place in going]
            chosen, mask, positions = chosen[keep], mask[keep], positions[keep]
        ids = chosen.unsqueeze(1)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return found


def _stay(device: torch.device) -> float:
    """Return the largest share of a batch that sequences may be that are done and have not left it.

    On a GPU, rows cost little, and another number of them costs the host new tables and copies of all keys.
    """
    return 0.3 if device.type == "cuda" else 0.0


@contextmanager
def _without_plans() -> Iterator[None]:
    """Let PyTorch's attention do without cuDNN in the block.

    With a mask, PyTorch prefers cuDNN on Hopper and later GPUs. cuDNN makes a plan for each new shape, and
    with each token of an answer the keys have another length.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def _enter(packed: Packed, batch: Sequence[int], rows: Sequence[int], width: int) -> None:
    packed.layout.enter([packed.slots[batch[row]] for row in rows], width)


def _end_ids(model: PreTrainedModel, chat_format: ChatFormat) -> frozenset[int]:
    """Return the tokens that end an answer: the chat template's, the tokenizer's, the generation config's."""
    config = getattr(model, "generation_config", None)
    tuned = getattr(config, "eos_token_id", None)
    ids = tuned if isinstance(tuned, list) else [tuned]
    return chat_format.end_ids | {token for token in ids if isinstance(token, int)}


def _check_room(context: int | None, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    lengths = list(map(len, prompts))
    if not lengths or min(lengths) == 0:
        raise DataError("there is no prompt, or an empty one; write something to answer")
    if context is not None and max(lengths) + max_new_tokens > context:
        raise DataError(
            f"prompt {lengths.index(max(lengths)) + 1} has {max(lengths)} tokens; with {max_new_tokens} more "
            f"it exceeds the model's context of {context}: shorten it, or ask for fewer shots or new tokens"
        )


@torch.inference_mode()
def _classify(
    model: PreTrainedModel,
    encoder: PreTrainedTokenizerBase | ImageEncoder,
    examples: Sequence[Example],
    batch_size: int,
    advance: Callable[[int], None],
) -> list[int]:
    if isinstance(encoder, ImageEncoder) != (examples[0].image is not None):
        raise DataError("images are scored with an image classifier, and texts with a model of texts")
    context = int(getattr(model.config, "max_position_embeddings", None) or 1_000_000)
    encoded = rows_of(encode_all(examples, encoder, context, context=context, part="scored"), context)
    classes, pad_id = [0] * len(encoded), int(getattr(model.config, "pad_token_id", None) or 0)
    training = model.training
    model.eval()
    for batch in _by_length(encoded, batch_size):
        tensors = collate_rows([encoded[index] for index in batch], pad_id)
        assert isinstance(tensors, ClassBatch | ImageBatch)
        logits = class_logits(model, tensors.to(model.device))
        for index, found in zip(batch, logits.argmax(-1).tolist(), strict=True):
            classes[index] = found
        advance(len(batch))
    model.train(training)
    return classes
