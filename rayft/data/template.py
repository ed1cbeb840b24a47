"""Examples → tokens, with a loss on what the model should learn to say and on nothing else.

A conversation is laid out by the tokenizer's chat template, or, where it has none, as its turns with
`Example.separator` between them and the end-of-sequence token after each answer. Layouts must have
the prefix property: what stands before an answer is the same text that a model is given to answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, overload

from rayft.data.example import Example, Message
from rayft.data.pixels import EncodedImage, ImageEncoder, encode_images
from rayft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["IGNORED", "Encoded", "Style", "encode", "encode_all", "prompt_ids", "prompt_text"]

IGNORED = -100
"""Label of a token that is not learnt."""

Style = Literal["as_is", "answer_only", "few_shot"]

INSTRUCTION = "Reply with nothing but the answer: no explanation, no full sentence."


@dataclass(frozen=True)
class Encoded:
    """Tokens of one example; `labels[i]` is `input_ids[i]` where that token is learnt, else IGNORED."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    label: int | None = None
    """Class, for a classification (which learns no token)."""

    def __len__(self) -> int:
        return len(self.input_ids)


def encode(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    context: int | None = None,
    name: str = "the example",
) -> Encoded:
    """Turn an example into tokens.

    Learnt are: of a conversation, each assistant turn up to its end-of-sequence token; of raw text,
    all tokens but the first; of a classification, none. A text to classify gets the special tokens that
    its tokenizer puts around one ([CLS] and [SEP] for BERT).

    Args:
        example: what to encode.
        tokenizer: of the model that will learn it.
        max_length: most tokens it may have.
        context: most tokens that the model can take, where that is known.
        name: what messages call the example.

    Raises:
        DataError: if it is too long, or the template can't lay it out.
    """
    encoded = _encode(example, tokenizer, name)
    _check_lengths([len(encoded)], max_length, context, [name])
    return encoded


@overload
def encode_all(
    examples: Sequence[Example],
    encoder: PreTrainedTokenizerBase,
    max_length: int,
    *,
    context: int | None = None,
    part: str = "train",
) -> list[Encoded]: ...


@overload
def encode_all(
    examples: Sequence[Example],
    encoder: ImageEncoder,
    max_length: int,
    *,
    context: int | None = None,
    part: str = "train",
) -> list[EncodedImage]: ...


def encode_all(
    examples: Sequence[Example],
    encoder: PreTrainedTokenizerBase | ImageEncoder,
    max_length: int,
    *,
    context: int | None = None,
    part: str = "train",
) -> list[Encoded] | list[EncodedImage]:
    """Encode the examples of a part, and report all that are too long at once.

    Args:
        examples: all texts for a tokenizer, all images for an image encoder.
        encoder: of the model that will learn them.
        max_length: most tokens that a text may have.
        context: most tokens that the model can take, where that is known.
        part: what messages call the examples.

    Raises:
        DataError: with how many are too long and how long the longest is; and as `encode` and
            `encode_images`.
    """
    if isinstance(encoder, ImageEncoder):
        return encode_images(examples, encoder)
    tokenizer = encoder
    names = [f"{part} example {number}" for number in range(1, len(examples) + 1)]
    encoded = [_encode(example, tokenizer, name) for example, name in zip(examples, names, strict=True)]
    _check_lengths([len(item) for item in encoded], max_length, context, names)
    return encoded


def prompt_text(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    style: Style = "as_is",
    shots: Sequence[Example] = (),
) -> str:
    """Lay out a question so that the model's answer comes next.

    Args:
        example: a conversation; its answer is left out.
        tokenizer: of the model that will answer.
        style: `as_is`; `answer_only` asks for the answer alone; `few_shot` puts `shots` before it.
        shots: solved examples, from train.

    Raises:
        DataError: if the example asks nothing, or few_shot has no shots.
    """
    if not example.messages:
        raise DataError("raw text asks no question, so no answer to it can be scored; score its loss")
    turns = example.messages[:-1]
    if style == "answer_only":
        last = turns[-1]
        turns = (*turns[:-1], replace(last, content=f"{last.content}\n{INSTRUCTION}"))
    elif style == "few_shot":
        if not shots:
            raise DataError("few_shot wants solved examples: give some of train as shots")
        system = 1 if turns[0].role == "system" else 0
        solved = tuple(turn for shot in shots for turn in shot.messages if turn.role != "system")
        turns = (*turns[:system], *solved, *turns[system:])
    return _render(turns, tokenizer, example, "the prompt", answer_next=True)


def prompt_ids(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    style: Style = "as_is",
    shots: Sequence[Example] = (),
) -> tuple[int, ...]:
    """Give the tokens of `prompt_text`; of a classification, the tokens that `encode` gives."""
    if example.label is not None:
        return _encode(example, tokenizer, "the example").input_ids
    return _ids(tokenizer, prompt_text(example, tokenizer, style, shots))


def _encode(example: Example, tokenizer: PreTrainedTokenizerBase, name: str) -> Encoded:
    if example.messages:
        return _encode_turns(example, tokenizer, name)
    if example.label is not None:
        ids = tuple(tokenizer(example.text)["input_ids"])
        return Encoded(ids, (IGNORED,) * len(ids), example.label)
    ids = (*_ids(tokenizer, _start(tokenizer) + example.text), _end_id(tokenizer))
    return Encoded(ids, (IGNORED, *ids[1:]))


def _encode_turns(example: Example, tokenizer: PreTrainedTokenizerBase, name: str) -> Encoded:
    done = ""
    ids: tuple[int, ...] = ()
    labels: tuple[int, ...] = ()
    for index, turn in enumerate(example.messages):
        if turn.role != "assistant":
            continue
        asked = _render(example.messages[:index], tokenizer, example, name, answer_next=True)
        answered = _render(example.messages[: index + 1], tokenizer, example, name)
        if not (asked.startswith(done) and answered.startswith(asked)):
            raise DataError(
                f"{name}: the chat template changes what stands before answer {index + 1} once it is given "
                "(it rewrites earlier turns), so a loss on answers would teach what is never asked; give "
                "conversations of one question and one answer, or a tokenizer with another template"
            )
        before = _continue(tokenizer, done, ids, asked)
        ids, labels = (*ids, *before), (*labels, *(IGNORED for _ in before))
        answer = _continue(tokenizer, asked, ids, answered)
        learnt = _learnt(answer, tokenizer)
        ids = (*ids, *answer)
        labels = (*labels, *answer[:learnt], *(IGNORED for _ in answer[learnt:]))
        done = answered
    # What follows the last learnt token changes nothing that is learnt: it only takes room.
    end = max(index for index, label in enumerate(labels) if label != IGNORED) + 1
    return Encoded(ids[:end], labels[:end])


def _continue(
    tokenizer: PreTrainedTokenizerBase, before: str, before_ids: tuple[int, ...], after: str
) -> tuple[int, ...]:
    """Tokens that `after` adds to `before`, whose tokens are kept: a model that answers starts from them."""
    whole = _ids(tokenizer, after)
    if whole[: len(before_ids)] == before_ids:
        return whole[len(before_ids) :]
    return _ids(tokenizer, after[len(before) :])


def _learnt(answer: tuple[int, ...], tokenizer: PreTrainedTokenizerBase) -> int:
    """Count the tokens of an answer up to its last end of sequence; all, if the template writes none."""
    ends = [index for index, token in enumerate(answer) if token == tokenizer.eos_token_id]
    return ends[-1] + 1 if ends else len(answer)


def _render(
    messages: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    name: str,
    *,
    answer_next: bool = False,
) -> str:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        return _start(tokenizer) + "".join(_plain(message, tokenizer, example) for message in messages)
    turns = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer_next))
    except (TemplateError, TypeError) as error:
        roles = ", ".join(message.role for message in messages)
        raise DataError(
            f"{name}: the chat template can't lay out the turns {roles}: {error}; give the turns that this "
            "model knows"
        ) from error


def _plain(message: Message, tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    if message.role != "assistant":
        return message.content + example.separator
    _end_id(tokenizer)
    return f"{message.content}{tokenizer.eos_token}{example.separator}"


def _start(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that this tokenizer puts before any text, if it does."""
    ids = tokenizer("")["input_ids"]
    begins = tokenizer.bos_token_id is not None and list(ids[:1]) == [tokenizer.bos_token_id]
    return str(tokenizer.bos_token) if begins else ""


def _end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise DataError("the tokenizer has no end-of-sequence token, so no answer could end; set eos_token")
    return end


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _check_lengths(
    lengths: Sequence[int], max_length: int, context: int | None, names: Sequence[str]
) -> None:
    limit = max_length if context is None else min(max_length, context)
    over = [(length, name) for length, name in zip(lengths, names, strict=True) if length > limit]
    if not over:
        return
    longest, name = max(over)
    count = f"{len(over)} of {len(lengths)} examples are too long; the longest, " if len(lengths) > 1 else ""
    if context is not None and longest > context:
        remedy = (
            f"above the model's context of {context}: shorten or drop it, or take a model of a longer context"
        )
    else:
        remedy = f"above data.max_length = {max_length}: set it to {longest}, or shorten or drop the example"
    raise DataError(f"{count}{name}, has {longest} tokens, {remedy}")
