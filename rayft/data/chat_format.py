"""What a chat template writes around an answer, and how to parse the answer from what a model generated.

Chat templates differ in three things. A model is trained, scored and served correctly only if all are known:

- the **opening**: what the template writes between the prompt and the answer itself, such as Qwen3's empty
  think block or gpt-oss's channel. A model learns to generate it, but it is not part of the answer;
- the **end** of a turn, which need not be the tokenizer's end-of-sequence token: ChatML on a base model ends
  turns with `<|im_end|>`, Phi-3 with `<|end|>`. Generation must stop at the end of a turn;
- **think markers**, between which a model reasons before it answers. The prompt itself may open the think
  block, as DeepSeek-R1's does.

`ChatFormat.of` finds them by rendering a test answer with the template. `AnswerParser` is the only parser of
think blocks: scoring uses it on whole texts, and serving on streamed texts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from rayft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Answer", "AnswerParser", "ChatFormat", "ThinkMarkers", "overlap", "render"]


class ThinkMarkers(NamedTuple):
    """The texts that begin and end a think block."""

    open: str
    close: str


MARKERS = (
    ThinkMarkers("<think>", "</think>"),
    ThinkMarkers("<seed:think>", "</seed:think>"),
    ThinkMarkers("[THINK]", "[/THINK]"),
    ThinkMarkers("◁think▷", "◁/think▷"),
    ThinkMarkers("<|START_THINKING|>", "<|END_THINKING|>"),
    ThinkMarkers("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
)
"""The markers of Qwen3, DeepSeek-R1 and most others; Seed-OSS; Magistral; Kimi; Command A; gpt-oss. The first
pair is the default for templates and vocabularies that have none."""

TAIL = 32
"""Number of tokens at the end of a prompt that always include an opening marker and what follows it."""

PROBE = "Xq7Zk"
"""A test answer of letters and digits, which no template changes."""


class Answer(NamedTuple):
    """The parts of what a model generated."""

    content: str
    """The answer itself."""
    reasoning: str
    """The content of the think block before the answer; empty if there was none, or only spaces."""


@dataclass(frozen=True)
class ChatFormat:
    """What a tokenizer's chat template writes around an answer."""

    opening: str = ""
    """What the template writes between the prompt and the answer."""
    end: str = ""
    """What the template writes to end an answer; empty if it writes nothing."""
    end_ids: frozenset[int] = frozenset()
    """Tokens that end generation: the token that ends a turn, and the tokenizer's end of sequence."""
    stop_text: str = ""
    """The text that ends a turn, if no single token does; else empty."""
    trailing: str = ""
    """Whitespace that the template writes between an answer and its end."""
    markers: ThinkMarkers = MARKERS[0]
    overhead: int = 0
    """Number of tokens that a model generates in addition to the answer if it does not reason."""
    visible: Mapping[int, str] = field(default_factory=dict)
    """Special tokens of the markers and the opening, which decoding must keep: id → text."""
    problem: str = ""
    """Why generation may not stop after an answer, as a message; empty if it does stop."""
    _tokenizer: Any = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
        """Find the format of a tokenizer's chat template. Without one, turns end with the eos token."""
        eos = {tokenizer.eos_token_id} if isinstance(tokenizer.eos_token_id, int) else set()
        if not tokenizer.chat_template:
            return cls(end=str(tokenizer.eos_token or ""), end_ids=frozenset(eos), _tokenizer=tokenizer)
        markers = _markers(tokenizer)
        user, answer = {"role": "user", "content": "U"}, {"role": "assistant", "content": PROBE}
        try:
            prompt = render(tokenizer, [user], answer_next=True)
            whole = render(tokenizer, [user, answer])
        except DataError as error:
            problem = f"the chat template can't lay out a question and its answer ({error})"
            return cls(end_ids=frozenset(eos), markers=markers, problem=problem, _tokenizer=tokenizer)
        start = whole.rfind(PROBE)
        closing = whole[start + len(PROBE) :] if start >= 0 else ""
        opening = whole[len(prompt) : start] if whole.startswith(prompt) and start >= 0 else ""
        end, end_id, stop_text = _end(tokenizer, closing)
        overhead = f"\n{markers.close}\n\n" if _is_open(prompt, markers) and not opening else opening
        special = _special(tokenizer)
        shown = "".join((opening, *markers))
        return cls(
            opening=opening,
            end=end,
            end_ids=frozenset(eos if end_id is None else {*eos, end_id}),
            stop_text=stop_text,
            trailing=closing[: len(closing) - len(closing.lstrip())] if end else "",
            markers=markers,
            overhead=len(tokenizer(overhead, add_special_tokens=False)["input_ids"]) if overhead else 0,
            visible={token: text for token, text in special.items() if text in shown},
            problem="" if end else "the chat template writes nothing after an answer that could end it",
            _tokenizer=tokenizer,
        )

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end an answer, besides the tokens that do."""
        return (self.trailing + self.stop_text, self.stop_text) if self.stop_text else ()

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without special tokens except those of the markers and the opening."""
        pieces, start = [], 0
        for place, token in enumerate(tokens):
            if token in self.visible:
                pieces += [self._plain(tokens[start:place]), self.visible[token]]
                start = place + 1
        return "".join((*pieces, self._plain(tokens[start:])))

    def in_block(self, prompt: Sequence[int]) -> bool:
        """Return whether a prompt, as tokens, ends inside a think block that it has opened."""
        return self.is_open(self.decode(prompt[-TAIL:]))

    def is_open(self, prompt: str) -> bool:
        """Return whether a prompt, as text, ends inside a think block that it has opened."""
        return _is_open(prompt, self.markers)

    def prompt_block(self, prompt: str) -> str:
        """Return the empty think block, open or closed, that a prompt ends with; empty text if none."""
        opened, closed = (re.escape(marker) for marker in self.markers)
        found = re.search(rf"{opened}\s*(?:{closed}\s*)?\Z", prompt)
        return found.group() if found else ""

    def parse(self, text: str, *, in_block: bool = False) -> Answer:
        """Parse a whole generated text.

        Args:
            text: what a model generated, without the token that ended it.
            in_block: whether the prompt had opened a think block.
        """
        if self.stop_text:
            text = text.partition(self.stop_text)[0]
        return AnswerParser(self, in_block=in_block).push(text, last=True)

    def _plain(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True)) if tokens else ""


class AnswerParser:
    """Separates the reasoning and the answer of a streamed text.

    Text is held back as long as it may still turn out to be part of the opening or of a marker.

    Args:
        chat_format: of the model's chat template.
        in_block: whether the prompt has opened a think block.
    """

    def __init__(self, chat_format: ChatFormat, *, in_block: bool = False) -> None:
        self._opening, self._markers = chat_format.opening, chat_format.markers
        self._trailing = chat_format.trailing
        self._held = ""
        self._state: Literal["start", "reasoning", "gap", "content"] = "reasoning" if in_block else "start"
        self._reasoned = False
        self.plain = False
        """Whether the text began with the answer itself, without an opening or a think block."""

    @property
    def answering(self) -> bool:
        """Whether the answer itself has begun."""
        return self._state == "content"

    def push(self, text: str, *, last: bool = False) -> Answer:
        """Add the next piece of text, and return the part of the answer and reasoning that is now certain.

        Args:
            text: the next piece; empty pieces are allowed.
            last: whether the text ends here. Then all that was held back is returned.
        """
        self._held += text
        reasoning = ""
        if self._state == "start":
            self._leave_start(last=last)
        if self._state == "reasoning":
            reasoning = self._reason(last=last)
        if self._state == "gap":
            self._held = self._held.lstrip("\r\n")
            if self._held:
                self._state = "content"
        content = ""
        if self._state == "content":
            # Hold back whitespace that may be the template's own, before the end of the answer.
            size = len(self._held) - overlap(self._held, self._trailing)
            content, self._held = self._held[:size], self._held[size:]
            if last and self._held != self._trailing:
                content += self._held
        return Answer(content, reasoning)

    def _leave_start(self, *, last: bool) -> None:
        """Decide whether the text begins with the opening, a think block or the answer."""
        held, begun = self._held, self._held.lstrip()
        if self._opening and held.startswith(self._opening):
            self._state, self._held = "content", held[len(self._opening) :]
        elif last and held.strip() and self._opening.startswith(held):
            # The text was cut off within the opening, before the answer.
            self._state, self._held = "content", ""
        elif not last and (self._opening.startswith(held) or self._markers.open.startswith(begun)):
            return
        elif begun.startswith(self._markers.open):
            self._state, self._held = "reasoning", begun[len(self._markers.open) :]
        else:
            self._state, self.plain = "content", True

    def _reason(self, *, last: bool) -> str:
        """Return the part of the reasoning that is certain. A think block of whitespace has no reasoning."""
        reasoning, close, after = self._held.partition(self._markers.close)
        if close:
            self._state, self._held = "gap", after
        elif last:
            self._held = ""
        else:
            # Hold back what may become the closing marker, and the whitespace before it.
            kept = reasoning[: len(reasoning) - overlap(reasoning, self._markers.close)].rstrip()
            self._held, reasoning = reasoning[len(kept) :], kept
        if not self._reasoned:
            reasoning = reasoning.lstrip()
        if close or last:
            reasoning = reasoning.rstrip()
        self._reasoned = self._reasoned or bool(reasoning)
        return reasoning


def render(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    answer_next: bool = False,
) -> str:
    """Render turns with a tokenizer's chat template.

    Args:
        tokenizer: has the template.
        turns: messages with `role`, `content` and other keys that the template reads.
        tools: descriptions of tools.
        answer_next: whether to end with the prompt for an answer.

    Raises:
        DataError: if the template refuses the turns, with its reason.
    """
    from jinja2 import TemplateError

    try:
        return str(
            tokenizer.apply_chat_template(
                [dict(turn) for turn in turns],
                tools=[dict(tool) for tool in tools] if tools else None,
                tokenize=False,
                add_generation_prompt=answer_next,
            )
        )
    except (TemplateError, TypeError, ValueError, AttributeError, LookupError) as error:
        raise DataError(str(error)) from error


def _markers(tokenizer: PreTrainedTokenizerBase) -> ThinkMarkers:
    template, vocabulary = str(tokenizer.chat_template), set(_added(tokenizer).values())
    for pair in MARKERS:
        if pair.open in template or pair.close in template:
            return pair
    return next((pair for pair in MARKERS if pair.open in vocabulary), MARKERS[0])


def _is_open(prompt: str, markers: ThinkMarkers) -> bool:
    return prompt.rstrip().endswith(markers.open)


def _end(tokenizer: PreTrainedTokenizerBase, closing: str) -> tuple[str, int | None, str]:
    """Find the end of a turn in the text that a template writes after an answer.

    Returns:
        The text up to and including the end, the token that ends it (None if no token does), and the text
        before that token (the whole text if there is none).
    """
    added = _added(tokenizer)
    for token in tokenizer(closing, add_special_tokens=False)["input_ids"]:
        if token in added and (place := closing.find(added[token])) >= 0:
            before = closing[:place].strip()
            return closing[: place + len(added[token])], token, before
    text = closing.strip()
    return (closing[: closing.find(text) + len(text)], None, text) if text else ("", None, "")


def _added(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return the added tokens, which are single tokens wherever their text occurs: id → text."""
    found = getattr(tokenizer, "added_tokens_decoder", {})
    # Gemma's line breaks are added tokens too, but do not end a turn.
    return {token: str(text) for token, text in found.items() if str(text).strip()}


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Return the special tokens, which decoding skips: id → text."""
    found = getattr(tokenizer, "added_tokens_decoder", {})
    return {token: str(text) for token, text in found.items() if text.special and str(text)}


def overlap(text: str, marker: str) -> int:
    """Return the number of characters at the end of a text that are the beginning of a marker."""
    longest = min(len(text), len(marker))
    return next((size for size in range(longest, 0, -1) if text.endswith(marker[:size])), 0)
