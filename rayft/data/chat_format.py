"""What a chat template writes around an answer, and how an answer is read back from what a model wrote.

Three things differ between templates, and a model is trained, scored and served correctly only if all three
are known:

- the **opening**: what the template writes between its prompt for an answer and the answer itself, such as
  Qwen3's empty think block or gpt-oss's channel. A model learns to write it, but it is no part of the answer;
- the **end** of a turn, which need not be the tokenizer's end-of-sequence token: ChatML on a base model ends
  turns with `<|im_end|>`, Phi-3 with `<|end|>`. Whatever ends a turn has to end generation;
- **think markers**, between which a model reasons before it answers. The prompt itself may open the block, as
  DeepSeek-R1's does.

`ChatFormat.of` finds them by laying out an answer of its own. `AnswerParser` is the one parser of think
blocks: scoring uses it on whole texts, and serving on texts that grow.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from rayft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Answer", "AnswerParser", "ChatFormat", "ThinkMarkers", "render"]


class ThinkMarkers(NamedTuple):
    """The texts between which a model reasons."""

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
"""Qwen3, DeepSeek-R1 and most others; Seed-OSS; Magistral; Kimi; Command A; gpt-oss. The first is assumed
where a template and its vocabulary name none."""

TAIL = 32
"""Tokens at the end of a prompt that hold an opening marker and what follows it."""

PROBE = "Xq7Zk"
"""An answer that no template changes: letters and digits alone."""


class Answer(NamedTuple):
    """What a model wrote, taken apart."""

    content: str
    """The answer itself."""
    reasoning: str
    """What stood in a think block before it; empty if there was none, or only spaces."""


@dataclass(frozen=True)
class ChatFormat:
    """What a tokenizer's chat template writes around an answer."""

    opening: str = ""
    """What stands between the prompt for an answer and the answer."""
    end: str = ""
    """What ends an answer; empty where the template writes nothing that could."""
    end_ids: frozenset[int] = frozenset()
    """Tokens that end generation: the one that ends a turn and the tokenizer's end of sequence."""
    stop_text: str = ""
    """The text that ends a turn, where that is not a token of its own."""
    trailing: str = ""
    """Spaces that the template writes between an answer and its end."""
    markers: ThinkMarkers = MARKERS[0]
    overhead: int = 0
    """Tokens that a model writes beside the answer when it does not reason."""
    visible: Mapping[int, str] = field(default_factory=dict)
    """Special tokens of the markers and the opening, which decoding must not skip: id → text."""
    problem: str = ""
    """Why generation may not stop after an answer, for a person to read; empty if it does."""
    _tokenizer: Any = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
        """Find the format of a tokenizer's chat template; without one, turns end with its eos token."""
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

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens; special tokens are skipped, except those of markers and the opening."""
        pieces, start = [], 0
        for place, token in enumerate(tokens):
            if token in self.visible:
                pieces += [self._plain(tokens[start:place]), self.visible[token]]
                start = place + 1
        return "".join((*pieces, self._plain(tokens[start:])))

    def in_block(self, prompt: Sequence[int]) -> bool:
        """Return whether the tokens of a prompt end inside a think block that it has opened."""
        return self.is_open(self.decode(prompt[-TAIL:]))

    def is_open(self, prompt: str) -> bool:
        """Return whether the text of a prompt ends inside a think block that it has opened."""
        return _is_open(prompt, self.markers)

    def prompt_block(self, prompt: str) -> str:
        """Return the think block, open or closed, that a prompt ends with; empty if there is none."""
        opened, closed = (re.escape(marker) for marker in self.markers)
        found = re.search(rf"{opened}\s*(?:{closed}\s*)?\Z", prompt)
        return found.group() if found else ""

    def parse(self, text: str, *, in_block: bool = False) -> Answer:
        """Take a whole text apart.

        Args:
            text: what a model wrote, without the token that ended it.
            in_block: whether the prompt had opened a think block.
        """
        if self.stop_text:
            text = text.partition(self.stop_text)[0]
        return AnswerParser(self, in_block=in_block).push(text, last=True)

    def _plain(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True)) if tokens else ""


class AnswerParser:
    """Separates the reasoning and the answer of a text that grows.

    Text is held back as long as it may still turn out to be part of the opening or of a marker.
    """

    def __init__(self, chat_format: ChatFormat, *, in_block: bool = False) -> None:
        """Begin before the first token, inside a think block if the prompt has opened one."""
        self._opening, self._markers = chat_format.opening, chat_format.markers
        self._trailing = chat_format.trailing
        self._held = ""
        self._state: Literal["start", "reasoning", "gap", "content"] = "reasoning" if in_block else "start"
        self._reasoned = False
        self.plain = False
        """Whether the text began with the answer, without an opening or a think block."""

    @property
    def answering(self) -> bool:
        """Whether the answer itself has begun."""
        return self._state == "content"

    def push(self, text: str, *, last: bool = False) -> Answer:
        """Take the next piece of text and return what is certain of it; with `last`, all that is left."""
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
            # Held back: spaces that may turn out to be the template's own, before the end of the answer.
            size = len(self._held) - _overlap(self._held, self._trailing)
            content, self._held = self._held[:size], self._held[size:]
            if last and self._held != self._trailing:
                content += self._held
        return Answer(content, reasoning)

    def _leave_start(self, *, last: bool) -> None:
        """Decide whether the opening, a think block or the answer has begun."""
        held, begun = self._held, self._held.lstrip()
        if self._opening and held.startswith(self._opening):
            self._state, self._held = "content", held[len(self._opening) :]
        elif last and held.strip() and self._opening.startswith(held):
            # Cut off within the opening: nothing of the answer is there yet.
            self._state, self._held = "content", ""
        elif not last and (self._opening.startswith(held) or self._markers.open.startswith(begun)):
            return
        elif begun.startswith(self._markers.open):
            self._state, self._held = "reasoning", begun[len(self._markers.open) :]
        else:
            self._state, self.plain = "content", True

    def _reason(self, *, last: bool) -> str:
        """Return the reasoning that is certain; a think block of nothing but spaces has none."""
        reasoning, close, after = self._held.partition(self._markers.close)
        if close:
            self._state, self._held = "gap", after
        elif last:
            self._held = ""
        else:
            # Held back: what may become the closing marker, and the spaces before it.
            kept = reasoning[: len(reasoning) - _overlap(reasoning, self._markers.close)].rstrip()
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
    """Lay out turns by a tokenizer's chat template.

    Raises:
        DataError: with the template's own reason, if it refuses them.
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
    """Find what ends a turn in what a template writes after an answer.

    Returns:
        The text up to the end, the token that ends it (None if no token does), and the text before that token
        (all of it if there is none).
    """
    added = _added(tokenizer)
    for token in tokenizer(closing, add_special_tokens=False)["input_ids"]:
        if token in added and (place := closing.find(added[token])) >= 0:
            before = closing[:place].strip()
            return closing[: place + len(added[token])], token, before
    text = closing.strip()
    return (closing[: closing.find(text) + len(text)], None, text) if text else ("", None, "")


def _added(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """List the tokens that stand for themselves wherever they occur in a text: id → text."""
    found = getattr(tokenizer, "added_tokens_decoder", {})
    # Gemma's line breaks are added tokens too, and end nothing.
    return {token: str(text) for token, text in found.items() if str(text).strip()}


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """List the tokens that decoding skips."""
    found = getattr(tokenizer, "added_tokens_decoder", {})
    return {token: str(text) for token, text in found.items() if text.special and str(text)}


def _overlap(text: str, marker: str) -> int:
    """Return how many characters at the end of a text are the beginning of a marker."""
    longest = min(len(text), len(marker))
    return next((size for size in range(longest, 0, -1) if text.endswith(marker[:size])), 0)
