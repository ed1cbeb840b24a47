"""Text in, text out: prompts to tokens, and tokens back to text while they come."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from rayft.errors import BadRequestError
from rayft.serving.engine import TokenLogprob
from rayft.serving.messages import TokenScore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TextStream", "chat_tokens", "prompt_tokens", "score"]

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a tokenizer writes for bytes that are no whole character yet."""


def chat_tokens(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
    """Apply the model's chat template.

    Raises:
        BadRequestError: if there is none, or it refuses the messages.
    """
    if not tokenizer.chat_template:
        raise BadRequestError("this model has no chat template; use /v1/completions", param="messages")
    try:
        tokens: Any = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
        )
    except TemplateError as error:
        raise BadRequestError(
            f"the model's chat template refuses these messages: {error}", param="messages"
        ) from error
    return tuple(tokens)


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[int]) -> tuple[int, ...]:
    """Tokenize a prompt, or check one that is tokens already.

    Raises:
        BadRequestError: if it is empty, or holds a number that is no token.
    """
    if isinstance(prompt, str):
        tokens = tuple(tokenizer(prompt)["input_ids"])
    else:
        tokens, size = tuple(prompt), len(tokenizer)
        wrong = next((token for token in tokens if not 0 <= token < size), None)
        if wrong is not None:
            raise BadRequestError(f"{wrong} is no token of this model (0 to {size - 1})", param="prompt")
    if not tokens:
        raise BadRequestError("the prompt is empty; send at least one token", param="prompt")
    return tokens


def score(tokenizer: PreTrainedTokenizerBase, entry: TokenLogprob) -> TokenScore:
    """Write a token's log-probability, and those of the likeliest ones, with their text and bytes."""
    top = tuple(TokenScore(*_spelled(tokenizer, token), value) for token, value in entry.top)
    return TokenScore(*_spelled(tokenizer, entry.token), entry.logprob, top)


def _spelled(tokenizer: PreTrainedTokenizerBase, token: int) -> tuple[str, tuple[int, ...]]:
    text = str(tokenizer.decode([token]))
    piece: Any = tokenizer.convert_ids_to_tokens(token)
    table = _byte_of()
    if UNFINISHED in text and isinstance(piece, str) and all(letter in table for letter in piece):
        return text, tuple(table[letter] for letter in piece)
    return text, tuple(text.encode())


@lru_cache(maxsize=1)
def _byte_of() -> dict[str, int]:
    """Give the byte that each letter of a byte-level vocabulary stands for (GPT-2's table)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(other)}


class TextStream:
    """Turns growing tokens into growing text, and ends it at a stop string.

    Text is held back while it may still change: half a character, or the beginning of a stop string.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._text = ""
        self._given = 0
        # Tokens before `_context` are not decoded again; those up to `_read` are in `_text`.
        self._context = self._read = 0
        self.stopped = False
        """Whether a stop string was met: nothing follows."""

    def push(self, tokens: Sequence[int], *, last: bool) -> str:
        """Take all tokens so far and give the text that is new and certain."""
        self._decode(tokens, last=last)
        for stop in self._stop:
            # No earlier than what a new end can complete.
            place = self._text.find(stop, max(0, self._given - len(stop) + 1))
            if place >= 0:
                self.stopped = True
                self._text = self._text[:place]
        certain = len(self._text) if last or self.stopped else len(self._text) - self._held()
        new = self._text[self._given : certain]
        self._given = max(self._given, certain)
        return new

    def _decode(self, tokens: Sequence[int], *, last: bool) -> None:
        # Together with the tokens before: many tokenizers write a word's space only inside a text.
        known = self._text_of(tokens[self._context : self._read])
        longer = self._text_of(tokens[self._context :])
        if len(longer) > len(known) and (last or not longer.endswith(UNFINISHED)):
            self._text += longer[len(known) :]
            self._context, self._read = self._read, len(tokens)

    def _text_of(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def _held(self) -> int:
        ends = (n for stop in self._stop for n in range(1, len(stop)) if self._text.endswith(stop[:n]))
        return max(ends, default=0)
