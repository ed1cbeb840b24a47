"""Encode examples as tokens, with a loss on exactly the text that the model should learn to generate.

A conversation is rendered with the tokenizer's chat template. Without a template, `Example.separator` is put
between turns, and the end-of-sequence token after each answer. The text before an answer is always exactly
the prompt that a model gets when it is asked, and the learnt text ends where the turn ends.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import numpy.typing as npt

from rayft.data.chat_format import PROBE, Answer, ChatFormat, render
from rayft.data.example import REASONING, Example, Message, named, quoted
from rayft.data.pixels import EncodedImage, ImageEncoder, encode_images
from rayft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "IGNORED",
    "Encoded",
    "Style",
    "check_lengths",
    "counted",
    "encode_all",
    "encode_numbered",
    "expected_answer",
    "prompt_ids",
    "prompt_text",
]

IGNORED = -100
"""Label of a token that is not learnt."""

Style = Literal["as_is", "answer_only", "few_shot"]

UNSEEN = {
    "system": frozenset[str](),
    "user": frozenset[str](),
    "assistant": frozenset(REASONING),
    "tool": frozenset({"tool_call_id", "name"}),
}
"""Role → keys that a template may leave out: the answer of a tool follows its call anyway, and reasoning has
a check of its own."""

MOST_PIECES = 1000
"""Number of pieces of text whose tokens are kept, after which all are dropped."""

INSTRUCTION = "Reply with nothing but the answer: no explanation, no full sentence."


@dataclass(frozen=True)
class Encoded:
    """The tokens of one example. `labels[i]` is `input_ids[i]` if that token is learnt, else IGNORED."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    label: int | None = None
    """Number of the class if the text is classified, in which case no token is learnt."""

    def __len__(self) -> int:
        return len(self.input_ids)

    @cached_property
    def arrays(self) -> npt.NDArray[np.int32]:
        """`input_ids` and `labels`: (2, T). Kept, since an example is in many batches."""
        return np.array((self.input_ids, self.labels), np.int32)


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
    """Encode the examples of a part.

    The learnt tokens are: of a conversation, each assistant turn whose `learn` is true, from the end of its
    prompt up to and including the end of the turn; of raw text, all tokens but the first; of a text to
    classify, none. A text to classify gets the special tokens of its tokenizer ([CLS] and [SEP] for BERT).

    An example is encoded as one `Encoded`, unless the chat template renders earlier answers differently once
    another question follows (Qwen3 removes their think blocks). Then each learnt answer gets an `Encoded` of
    its own, in which the text before the answer is the prompt that the model will get.

    Args:
        examples: texts and conversations for a tokenizer, images for an image encoder.
        encoder: tokenizer or image encoder of the model that is trained.
        max_length: most tokens that a text may have.
        context: most tokens that the model supports, if that is known.
        part: name of the examples in messages.

    Raises:
        DataError: if examples are too long, with their number and the length of the longest; if the chat
            template can't render an example, with its number; and as `encode_images`.
    """
    if isinstance(encoder, ImageEncoder):
        return encode_images(examples, encoder)
    numbered = [*encode_numbered(enumerate(examples), encoder, part)]
    encoded = [text for _, text in numbered]
    check_lengths(
        [len(text) for text in encoded], max_length, context, part, examples, [n for n, _ in numbered]
    )
    return encoded


def encode_numbered(
    examples: Iterable[tuple[int, Example]], tokenizer: PreTrainedTokenizerBase, part: str
) -> Iterator[tuple[int, Encoded]]:
    """Encode texts and conversations of any length, as `encode_all` does.

    Args:
        examples: the examples with their index in the part.
        tokenizer: of the model that is trained.
        part: name of the examples in messages.

    Yields:
        The index of an example, and one `Encoded` of it.

    Raises:
        DataError: if the chat template can't render an example, with its number.
    """
    layout = _Layout(tokenizer)
    for index, example in examples:
        for text in layout.encode(example, named(part, index, example)):
            yield index, text


def prompt_text(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    style: Style = "as_is",
    shots: Sequence[Example] = (),
) -> str:
    """Render a question so that the model's answer comes next.

    Args:
        example: a conversation, whose last answer is left out.
        tokenizer: of the model that will answer.
        style: `as_is` changes nothing, `answer_only` requests the answer without an explanation, and
            `few_shot` puts `shots` before the question.
        shots: solved examples of the train part.

    Raises:
        DataError: if the example has no question, or `few_shot` has no shots.
    """
    if not example.messages:
        raise DataError("raw text asks no question, so no answer to it can be scored; score its loss")
    turns = example.messages[:-1]
    if style == "answer_only":
        last = turns[-1]
        turns = (*turns[:-1], replace(last, content=f"{last.content}\n{INSTRUCTION}"))
    elif style == "few_shot":
        if not shots:
            raise DataError("few_shot needs solved examples; pass some of the train part as shots")
        system = 1 if turns[0].role == "system" else 0
        solved = tuple(turn for shot in shots for turn in shot.messages if turn.role != "system")
        turns = (*turns[:system], *solved, *turns[system:])
    return _Layout(tokenizer).text(turns, example, "the prompt", answer_next=True)


def prompt_ids(
    example: Example,
    tokenizer: PreTrainedTokenizerBase,
    style: Style = "as_is",
    shots: Sequence[Example] = (),
) -> tuple[int, ...]:
    """Return the tokens of `prompt_text`, or of a text to classify as in `encode_all`."""
    if example.label is not None:
        return _Layout(tokenizer).encode(example, "the example")[0].input_ids
    return _ids(tokenizer, prompt_text(example, tokenizer, style, shots))


def expected_answer(
    example: Example, tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat
) -> tuple[Answer, int]:
    """Return what a model generates that has learnt an example perfectly, and its number of tokens.

    The answer is encoded and decoded again, as a generated answer is decoded. A tokenizer that does not keep
    every character therefore changes both in the same way.

    Args:
        example: a conversation.
        tokenizer: of the model that answers.
        chat_format: the format of the tokenizer's chat template.

    Raises:
        DataError: if the chat template can't render the example.
    """
    prompt, answer = _Layout(tokenizer, chat_format).answer(example, len(example.messages) - 1, "the example")
    tokens = _ids(tokenizer, answer.removesuffix(chat_format.end))
    text = chat_format.decode(tokens)
    return chat_format.parse(text, in_block=chat_format.is_open(prompt)), len(tokens)


class _Layout:
    """Renders and encodes examples with one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_format: ChatFormat | None = None) -> None:
        self.tokenizer, self._given = tokenizer, chat_format
        self._tokens = _Tokens(tokenizer)
        self._written: set[tuple[Any, ...]] = set()
        """Roles and keys of turns that the template is known to write in full. Whether it does depends on
        these, so each sequence of them is tried only once."""

    @cached_property
    def format(self) -> ChatFormat:
        """The format of the chat template, found when it is first needed; prompts alone don't need it."""
        return self._given or ChatFormat.of(self.tokenizer)

    def encode(self, example: Example, name: str) -> list[Encoded]:
        """Encode an example, as several `Encoded` if the template renders earlier answers differently."""
        if example.messages:
            return self._conversation(example, name)
        if example.label is not None:
            ids = tuple(self.tokenizer(example.text)["input_ids"])
            return [Encoded(ids, (IGNORED,) * len(ids), example.label)]
        text = _start(self.tokenizer) + example.text
        ids = (*_ids(self.tokenizer, text), _end_id(self.tokenizer))
        if len(ids) < 2:
            raise DataError(
                f"{name}: the tokenizer has no token for {quoted(example.text)}, so there is nothing to "
                "learn; drop it"
            )
        return [Encoded(ids, (IGNORED, *ids[1:]))]

    def _conversation(self, example: Example, name: str) -> list[Encoded]:
        turns = enumerate(example.messages)
        learnt_turns = [index for index, turn in turns if turn.role == "assistant" and turn.learn]
        if not learnt_turns:
            raise DataError(
                f"{name}: no answer is left to learn from; let one of the assistant's turns be learnt"
            )
        self._check_written(example.messages[: learnt_turns[-1]], example, name)
        found: list[Encoded] = []
        done = ""
        ids: tuple[int, ...] = ()
        labels: tuple[int, ...] = ()
        for index in learnt_turns:
            prompt, answer = self.answer(example, index, name)
            self._tokens.learn(prompt, prompt + answer)
            if not prompt.startswith(done):
                # The template renders earlier answers differently now that another question follows.
                found.append(Encoded(ids, labels))
                done, ids, labels = "", (), ()
            before = self._continue(done, ids, prompt)
            ids, labels = (*ids, *before), (*labels, *(IGNORED for _ in before))
            learnt = self._continue(prompt, ids, prompt + answer)
            ids, labels = (*ids, *learnt), (*labels, *learnt)
            done = prompt + answer
        return [*found, Encoded(ids, labels)]

    def _check_written(self, messages: Sequence[Message], example: Example, name: str) -> None:
        """Refuse a prompt from which the template leaves out a turn, such as one of a role that it ignores.

        Answers are checked when they are learnt.
        """
        kinds = "turns", *_kinds(messages, example)
        if kinds in self._written or not self.tokenizer.chat_template:
            return
        # A mark in each turn, of which templates change at most the case.
        marks = [f"{PROBE}{number}k".casefold() for number in range(len(messages))]
        marked = [*zip(messages, marks, strict=True)]
        turns = [replace(message, content=message.content + mark).turn() for message, mark in marked]
        text = self._rendered(turns, example.tools, name, answer_next=True).casefold()
        for number, (message, mark) in enumerate(marked, start=1):
            if message.role != "assistant" and mark not in text:
                raise DataError(
                    f"{name}, message {number}: the model's chat template leaves out this message from "
                    f"'{message.role}', so the model would not read it; remove it from the data, or use a "
                    "model whose template writes it"
                )
        self._written.add(kinds)

    def _continue(self, before: str, before_ids: tuple[int, ...], after: str) -> tuple[int, ...]:
        """Return the tokens that `after` adds to `before`. Models start from `before_ids`, which are kept."""
        whole = self._tokens.of(after)
        if whole[: len(before_ids)] == before_ids:
            return whole[len(before_ids) :]
        return _ids(self.tokenizer, after[len(before) :])

    def answer(self, example: Example, index: int, name: str) -> tuple[str, str]:
        """Return the prompt for the answer at `index`, and the text that a model should generate after it.

        Raises:
            DataError: if the template can't render them, or leaves out or changes what should be learnt.
        """
        where, ending = f"{name}, message {index + 1}", self.format.end.strip()
        message = example.messages[index]
        if ending and any(ending in str(text) for text in (message.content, *message.extras.values())):
            raise DataError(
                f"{where}: the answer has {quoted(ending)} in it, which ends a turn and is written behind "
                "answers anyway; remove it"
            )
        prompt = self.text(example.messages[:index], example, name, answer_next=True)
        whole = self.text(example.messages[: index + 1], example, name)
        reasoning = self._reasoning(message)
        answer = self._after(prompt, whole, reasoning, where)
        end = answer.rfind(self.format.end) if self.format.end else -1
        if end >= 0:
            answer = answer[: end + len(self.format.end)]
        if reasoning and reasoning not in answer:
            raise DataError(
                f"{where}: the model's chat template leaves out the reasoning of an answer, so it could not "
                "be learnt; remove it from the data, or use a model whose template writes it"
            )
        content = self.format.parse(message.content).content.strip()
        if content not in answer:
            raise DataError(
                f"{where}: the model's chat template does not write the answer as the data has it: "
                f"{quoted(content)} became {quoted(answer)}"
            )
        return prompt, answer

    def _after(self, prompt: str, whole: str, reasoning: str, where: str) -> str:
        """Return the text that the answer adds to its prompt.

        Args:
            prompt: the rendered prompt.
            whole: the rendered prompt and answer.
            reasoning: of the answer.
            where: place of the answer, for messages.
        """
        if whole.startswith(prompt):
            return whole[len(prompt) :]
        block = self.format.prompt_block(prompt)
        before = prompt[: len(prompt) - len(block)]
        if not block or not whole.startswith(before):
            raise DataError(
                f"{where}: the chat template changes what stands before an answer once it is given (it "
                "rewrites earlier turns), so a loss on answers would teach what is never asked; use a "
                "tokenizer with another template"
            )
        answer = whole[len(before) :].lstrip("\n")
        opened, closed = self.format.markers
        if closed in block:
            # The prompt ends with a closed think block, and the answer follows it.
            return answer
        if answer.startswith(opened):
            return answer[len(opened) :].lstrip("\n")
        # The prompt opens a think block that the rendered answer lacks: close it as the model would.
        return f"{reasoning}\n{closed}\n\n{answer}"

    def _reasoning(self, message: Message) -> str:
        """Return the reasoning of a message, from its extra keys or from a think block before the answer."""
        for key in REASONING:
            if key in message.extras:
                return str(message.extras[key]).strip()
        return self.format.parse(message.content).reasoning

    def text(
        self, messages: Sequence[Message], example: Example, name: str, *, answer_next: bool = False
    ) -> str:
        """Render turns.

        Raises:
            DataError: if the template refuses them, or leaves out tools or other keys of a message.
        """
        extras = {key for message in messages for key in message.extras if key not in UNSEEN[message.role]}
        if not self.tokenizer.chat_template:
            wanted = sorted(extras | ({"tools"} if example.tools else set()))
            if wanted:
                raise DataError(
                    f"{name} has {', '.join(wanted)}, and the tokenizer has no chat template to write that "
                    "with; use a model that has one, or remove it from the data"
                )
            start = _start(self.tokenizer)
            return start + "".join(_plain(message, self.tokenizer, example) for message in messages)
        turns = [message.turn() for message in messages]
        found = self._rendered(turns, example.tools, name, answer_next=answer_next)
        kinds = "keys", answer_next, *_kinds(messages, example)
        if kinds in self._written:
            return found
        if example.tools and found == self._rendered(turns, (), name, answer_next=answer_next):
            raise _left_out(name, "tools")
        for key in sorted(extras):
            without = [{field: value for field, value in turn.items() if field != key} for turn in turns]
            if found == self._rendered(without, example.tools, name, answer_next=answer_next):
                raise _left_out(name, key)
        self._written.add(kinds)
        return found

    def _rendered(
        self,
        turns: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        name: str,
        *,
        answer_next: bool,
    ) -> str:
        try:
            return render(self.tokenizer, turns, tools=tools, answer_next=answer_next)
        except DataError as error:
            roles = ", ".join(str(turn["role"]) for turn in turns)
            raise DataError(
                f"{name}: the chat template can't lay out the turns {roles}: {error}; use the roles that "
                "this model knows"
            ) from error


class _Tokens:
    """Encodes texts that begin alike, such as a prompt and the same prompt with its answer.

    A tokenizer divides a text at its special tokens, and encodes what is between two of them by itself. So
    a text is encoded in pieces, each of which begins with a special token, and each different piece once.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer, self._known = tokenizer, dict[str, tuple[int, ...]]()
        self._divide: re.Pattern[str] | None = None
        if not getattr(tokenizer, "is_fast", False) or getattr(tokenizer, "split_special_tokens", False):
            return
        # Those that are not normalised are found in the text as it is.
        added = [token for token in tokenizer.added_tokens_decoder.values() if not token.normalized]
        if added and not any(token.lstrip or token.single_word for token in added):
            longest_first = sorted((token.content for token in added), key=len, reverse=True)
            self._divide = re.compile("|".join(map(re.escape, longest_first)))

    def learn(self, *texts: str) -> None:
        """Encode several texts at once, so that `of` knows their pieces."""
        if len(self._known) > MOST_PIECES:
            self._known.clear()
        new = [*{piece: None for text in texts for piece in self._pieces(text) if piece not in self._known}]
        if new:
            found = self._tokenizer(new, add_special_tokens=False)["input_ids"]
            self._known |= zip(new, map(tuple, found), strict=True)

    def of(self, text: str) -> tuple[int, ...]:
        """Return the tokens of a text that was learnt."""
        return tuple(chain.from_iterable(self._known[piece] for piece in self._pieces(text)))

    def _pieces(self, text: str) -> list[str]:
        if self._divide is None:
            return [text]
        starts = [0, *[match.start() for match in self._divide.finditer(text) if match.start()]]
        return [text[start:end] for start, end in pairwise([*starts, len(text)])]


def _kinds(messages: Sequence[Message], example: Example) -> tuple[Any, ...]:
    """Return what a template may leave out of turns: tools, and the role and the extra keys of each turn."""
    return bool(example.tools), *((message.role, *sorted(message.extras)) for message in messages)


def _left_out(name: str, what: str) -> DataError:
    return DataError(
        f"{name} has {what}, and the model's chat template does not write it, so it would not be learnt; use "
        f"a model whose template writes {what}, or remove it from the data"
    )


def _plain(message: Message, tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    if message.role != "assistant":
        return message.content + example.separator
    _end_id(tokenizer)
    return f"{message.content}{tokenizer.eos_token}{example.separator}"


def _start(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the token that the tokenizer puts before any text; empty if it puts none."""
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


def counted(some: Iterable[int], all_indices: Iterable[int]) -> str:
    """Return the number of examples that some texts come from, for messages: "2 of 9 examples".

    Args:
        some: index of the example of each of these texts.
        all_indices: the same of all texts.
    """
    return f"{len({*some})} of {len({*all_indices})} examples"


def check_lengths(
    lengths: Sequence[int],
    max_length: int,
    context: int | None,
    part: str,
    examples: Sequence[Example],
    indices: Sequence[int],
) -> None:
    """Refuse texts that are too long.

    Args:
        lengths: number of tokens of each text.
        max_length: most tokens that a text may have.
        context: most tokens that the model supports, if that is known.
        part: name of the examples in the message.
        examples: those of the part.
        indices: index of the example of each text.

    Raises:
        DataError: with their number, and the length of the longest.
    """
    limit = max_length if context is None else min(max_length, context)
    over = [(length, -place) for place, length in enumerate(lengths) if length > limit]
    if not over:
        return
    longest, place = max(over)
    some = counted((indices[-place] for _, place in over), indices)
    count = f"{some} are too long; the longest, " if len(lengths) > 1 else ""
    if context is not None and longest > context:
        remedy = f"above the model's context of {context}: take a model of a longer context, or"
    else:
        remedy = f"above data.max_length = {max_length}: set it to {longest}, or"
    worst = indices[-place]
    raise DataError(
        f"{count}{named(part, worst, examples[worst])}, has {longest} tokens, {remedy} set data.too_long to "
        "drop such examples or to cut their prompts"
    )
