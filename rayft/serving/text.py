"""Converts prompts into tokens, and tokens back into text while they are generated."""

from __future__ import annotations

import codecs
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from rayft.data.chat_format import Answer, AnswerParser, overlap
from rayft.errors import BadRequestError
from rayft.serving.engine.api import TokenLogprob
from rayft.serving.http.body import where
from rayft.serving.messages import TokenScore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Places", "TextStream", "chat_tokens", "check_tokens", "prompt_scores", "prompt_tokens", "score"]

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""The character that a tokenizer writes for bytes that are not a complete character."""

BYTE = re.compile("<0x([0-9A-F]{2})>")
"""A token for a single byte, in vocabularies of words (Llama 2's, Gemma's)."""

BEFORE = 8
"""Largest number of tokens before a text that are decoded with its beginning."""


def chat_tokens(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, str]],
    variables: Mapping[str, Any] | None = None,
) -> tuple[int, ...]:
    """Apply the model's chat template to messages.

    Args:
        tokenizer: the model's tokenizer.
        messages: the conversation.
        variables: further variables for the template (`chat_template_kwargs`).

    Raises:
        BadRequestError: if the model has no template, or the template refuses the messages or the variables,
            or makes no text of them.
    """
    if not tokenizer.chat_template:
        raise BadRequestError("this model has no chat template; use /v1/completions", param="messages")
    variables = variables or {}
    reserved = reserved_variables(tokenizer)
    for name in variables:
        if name in reserved or not name.isidentifier():
            problem = "is set by the server" if name in reserved else "is not a variable name"
            param = where(["chat_template_kwargs", name])
            raise BadRequestError(f"'{param}': '{name}' {problem}; leave it out", param=param)
    try:
        tokens: Any = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=False, **variables
        )
    except Exception as error:
        # Templates are programs: they may raise anything, depending on their input.
        param = "chat_template_kwargs" if variables else "messages"
        what = "these messages and chat_template_kwargs" if variables else "these messages"
        kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        raise BadRequestError(
            f"the model's chat template refuses {what}: {kind}{error}", param=param
        ) from error
    if not tokens:
        raise BadRequestError("the model's chat template makes no text of these messages", param="messages")
    return tuple(tokens)


def reserved_variables(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """Return the names that can't be variables: those that templates receive anyway, and arguments."""
    arguments = (tokenizer.apply_chat_template, render_jinja_template)
    named = {name for function in arguments for name in inspect.signature(function).parameters}
    given = {"messages", "self", "raise_exception", "strftime_now", *tokenizer.special_tokens_map}
    return frozenset(named | given)


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[int]) -> tuple[int, ...]:
    """Tokenize a text, or check the ids of a prompt that is tokenized already.

    Raises:
        BadRequestError: if the prompt is empty, or has an id that is not a token.
    """
    if isinstance(prompt, str):
        tokens = tuple(tokenizer(prompt)["input_ids"])
    else:
        tokens = tuple(prompt)
        check_tokens(tokenizer, tokens, "prompt")
    if not tokens:
        raise BadRequestError("the prompt is empty; send at least one token", param="prompt")
    return tokens


def check_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], param: str) -> None:
    """Check that numbers are ids of tokens.

    Raises:
        BadRequestError: if one is not; it names the first one.
    """
    size = len(tokenizer)
    if tokens and (min(tokens) < 0 or max(tokens) >= size):
        wrong = next(token for token in tokens if not 0 <= token < size)
        raise BadRequestError(
            f"'{param}': {wrong} is not a token of this model (0 to {size - 1})", param=param
        )


def score(tokenizer: PreTrainedTokenizerBase, entry: TokenLogprob) -> TokenScore:
    """Return a token's log-probability and those of the most likely tokens, with their text and bytes."""
    top = tuple(TokenScore(*_spelled(tokenizer, token), value) for token, value in entry.top)
    return TokenScore(*_spelled(tokenizer, entry.token), entry.logprob, top)


def prompt_scores(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], entries: Sequence[TokenLogprob | None]
) -> list[TokenScore]:
    """Return the log-probabilities of a prompt's tokens as `score` does; none if there are no entries."""
    return [
        TokenScore(*_spelled(tokenizer, token), None) if entry is None else score(tokenizer, entry)
        for token, entry in zip(prompt, entries, strict=bool(entries))
    ]


# To decode one takes 10 µs, in which the replica does nothing else, and a scored prompt has thousands.
@lru_cache(maxsize=2**16)
def _spelled(tokenizer: PreTrainedTokenizerBase, token: int) -> tuple[str, tuple[int, ...]]:
    """Return the text and the bytes of a token inside a text."""
    text = str(tokenizer.decode([token]))
    if UNFINISHED not in text:
        # Many tokenizers omit the space at the beginning of a text, so the second of two tokens has it.
        text = str(tokenizer.decode([token, token])).removeprefix(text)
        return text, tuple(text.encode())
    piece: Any = tokenizer.convert_ids_to_tokens(token)
    table = _byte_of()
    if fallback := BYTE.fullmatch(piece):
        return text, (int(fallback[1], 16),)
    if all(letter in table for letter in piece):
        return text, tuple(table[letter] for letter in piece)
    return text, tuple(text.encode())


@lru_cache(maxsize=1)
def _byte_of() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for (GPT-2's table)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(other)}


class Places:
    """Finds where in a text its tokens begin, in characters; a character may be several tokens."""

    def __init__(self, prompt: str = "", scores: Sequence[TokenScore] = ()) -> None:
        """Begin with an empty text, or with a prompt.

        Args:
            prompt: the prompt's text.
            scores: its tokens. Many tokenizers begin a prompt with a token or a space that its text lacks.
        """
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        whole = b"".join(bytes(one.bytes) for one in scores)
        self._next = len(prompt) - len(whole.decode(errors="replace"))

    def of(self, scores: Sequence[TokenScore]) -> tuple[int, ...]:
        """Return where the next tokens begin."""
        found = []
        for one in scores:
            found.append(max(self._next, 0))
            self._next += len(self._characters.decode(bytes(one.bytes)))
        return tuple(found)


def _last_text(decode: Callable[[Sequence[int]], str], tokens: Sequence[int]) -> list[int]:
    """Return the last tokens that are a text by themselves; none if they end within a character."""
    for size in range(1, min(len(tokens), BEFORE) + 1):
        text = decode(tokens[-size:])
        if text and not text.endswith(UNFINISHED):
            return list(tokens[-size:])
    return []


class TextStream:
    """Turns a growing list of tokens into text, and ends the text at a stop string.

    Text is held back while it may still change: an incomplete character, the beginning of a stop string, or a
    possible part of a think block. Stop strings apply to the answer, not to the reasoning before it.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        stop: Sequence[str] = (),
        parser: AnswerParser | None = None,
        before: Sequence[int] = (),
    ) -> None:
        """Start with no tokens.

        Args:
            decode: converts tokens into text.
            stop: strings that end the text.
            parser: separates the reasoning and the answer of a chat; without it all text is the answer.
            before: the tokens that the text continues. Many tokenizers omit the space before a word at the
                beginning of a text, and write it after these.
        """
        self._tokens_to_text, self._stop, self._parser = decode, tuple(stop), parser
        self._before = _last_text(decode, before)
        self._text = ""
        self._given = 0
        # Tokens before `_context` are not decoded again; the text of those before `_read` has been returned.
        self._context = self._read = 0
        self._pushed = 0
        self.stopped = False
        """Whether a stop string was found, so that no text follows."""
        self.skipped = 0
        """Number of tokens before the answer: the template's opening and the reasoning."""
        self.used = 0
        """Number of tokens of the text: up to the one that completes a stop string, or all."""

    @property
    def answering(self) -> bool:
        """Whether the answer has begun."""
        return self._parser is None or self._parser.answering

    def push(self, tokens: Sequence[int], *, last: bool) -> Answer:
        """Return the new text that can no longer change.

        Args:
            tokens: all tokens so far.
            last: whether no more follow.
        """
        content = reasoning = ""
        # Several tokens may have come at once. They are taken one at a time where it matters which of them
        # completes a stop string, or begins the answer.
        alone = range(self._pushed + 1, len(tokens)) if self._stop or not self.answering else ()
        for end in (*alone, len(tokens)):
            waiting, ending = not self.answering, last and end == len(tokens)
            piece = self._take(tokens[:end], last=ending)
            reasoning += piece.reasoning
            if waiting:
                begins_plainly = self._parser is not None and self._parser.plain
                self.skipped = 0 if begins_plainly else end - bool(piece.content)
            content += self._content(last=ending)
            self._pushed = self.used = end
            if self.stopped:
                break
        return Answer(content, reasoning)

    def _content(self, *, last: bool) -> str:
        """Return the new text of the answer, up to the first stop string."""
        found = []
        for stop in self._stop:
            # Start no earlier than a stop string that the new text completes can start.
            place = self._text.find(stop, max(0, self._given - len(stop) + 1))
            if place >= 0:
                found.append((place + len(stop), place))
        if found:
            # The first one to be complete ends the text, and of several at the same place the longest.
            _, place = min(found)
            self.stopped = True
            self._text = self._text[:place]
        certain = len(self._text) if last or self.stopped else len(self._text) - self._held()
        new = self._text[self._given : certain]
        self._given = max(self._given, certain)
        return new

    def _take(self, tokens: Sequence[int], *, last: bool) -> Answer:
        """Decode the new tokens, and add the part that belongs to the answer to the text."""
        new = self._decode(tokens, last=last)
        piece = Answer(new, "") if self._parser is None else self._parser.push(new, last=last)
        self._text += piece.content
        return piece

    def _decode(self, tokens: Sequence[int], *, last: bool) -> str:
        # Not by the `DecodeStream` of tokenizers 0.23: for tokenizers with byte fallback it raises "Invalid
        # prefix encountered" where bytes that are no character precede another token (for 167 of 3,000
        # random lists of up to 11 tokens), and it never returns what it holds back at the end.
        # Decode with the tokens before: many tokenizers write the space before a word only inside a text.
        before = [] if self._context else self._before
        known = self._tokens_to_text([*before, *tokens[self._context : self._read]])
        longer = self._tokens_to_text([*before, *tokens[self._context :]])
        if len(longer) > len(known) and (last or not longer.endswith(UNFINISHED)):
            self._context, self._read = self._read, len(tokens)
            return longer[len(known) :]
        return ""

    def _held(self) -> int:
        """Return how many characters at the end of the text may be the beginning of a stop string."""
        # Text in which a stop string may begin is held back, so none begins in what was returned. Only the
        # new text is compared, because a stop string may be very long.
        new = self._text[self._given :]
        return max((overlap(new, stop) for stop in self._stop), default=0)
