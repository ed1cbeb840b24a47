from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rayft.errors import BadRequestError
from rayft.serving.engine.api import TokenLogprob
from rayft.serving.text import Places, TextStream, chat_tokens, prompt_scores, prompt_tokens, score

TEXT = "Grüße, 世界! 🙂 ok"


def byte_level() -> Tokenizer:
    """Train a tokenizer whose tokens are pieces of the text's bytes, as GPT-2's and Qwen's are."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=["<s>"])
    made.train_from_iterator([f"{TEXT} the quick brown fox, l'été, 世界 🙂🙂"] * 3, trainer)
    return made


def byte_fallback(*, strip: bool) -> Tokenizer:
    """Make a tokenizer of words that has tokens for single bytes, as Llama 2's (which strips) and Gemma's."""
    pieces = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "a", "b", "▁a", "▁hello", "ü", "世", "▁▁", "▁世"]
    merges = [("▁", "a"), ("▁", "▁"), ("▁", "世")]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    made = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    made.add_special_tokens(["<unk>", "<s>"])
    made.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if strip else [])])
    return made


BYTE_LEVEL = byte_level()
BYTE_FALLBACK = [byte_fallback(strip=strip) for strip in (False, True)]


def pushed(tokenizer: Tokenizer, tokens: Sequence[int], step: int, before: Sequence[int] = ()) -> str:
    """Push tokens a few at a time, and return all text that comes out."""
    made = TextStream(lambda some: str(tokenizer.decode(list(some), skip_special_tokens=True)), before=before)
    ends = [*range(step, len(tokens), step), len(tokens)]
    return "".join(made.push(tokens[:end], last=end == len(tokens)).content for end in ends)


@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1), min_size=1), st.integers(1, 4))
def test_any_byte_level_tokens_stream_to_their_text(tokens: list[int], step: int) -> None:
    assert pushed(BYTE_LEVEL, tokens, step) == BYTE_LEVEL.decode(tokens)


@pytest.mark.parametrize("tokenizer", BYTE_FALLBACK, ids=["kept", "stripped"])
@given(
    st.text(st.sampled_from(" ab\x11éü世🙂<0>") | st.characters(codec="utf-8"), min_size=1), st.integers(1, 4)
)
@example("🙂 世", 1)
def test_any_text_streams_through_a_byte_fallback_tokenizer(
    tokenizer: Tokenizer, text: str, step: int
) -> None:
    tokens = tokenizer.encode(text).ids
    assert pushed(tokenizer, tokens, step) == tokenizer.decode(tokens)


@pytest.mark.parametrize("tokenizer", BYTE_FALLBACK, ids=["kept", "stripped"])
@given(st.lists(st.integers(0, BYTE_FALLBACK[0].get_vocab_size() - 1), min_size=1))
@example([56, 185, 262])
def test_tokens_that_are_no_text_raise_no_error(tokenizer: Tokenizer, tokens: list[int]) -> None:
    pushed(tokenizer, tokens, 1)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, *BYTE_FALLBACK], ids=["bytes", "kept", "stripped"])
@given(
    st.text(st.sampled_from(" abéü世🙂"), min_size=1), st.text(st.sampled_from(" abéü世🙂"), min_size=1),
    st.integers(1, 4),
)  # fmt: skip
@example("a", " hello", 1)
@example("éé🙂🙂🙂", " a", 1)
def test_a_text_continues_the_tokens_before_it(
    tokenizer: Tokenizer, before: str, after: str, step: int
) -> None:
    tokens = tokenizer.encode(before + after).ids
    cuts = [cut for cut in range(1, len(tokens)) if tokenizer.decode(tokens[:cut]) == before]
    for cut in cuts:
        assert before + pushed(tokenizer, tokens[cut:], step, before=tokens[:cut]) == tokenizer.decode(tokens)


def test_the_tokens_before_a_text_may_end_within_a_character() -> None:
    prompt, rest = BYTE_LEVEL.encode("a").ids, [BYTE_LEVEL.token_to_id(piece) for piece in "ÃĤ"]
    made = pushed(BYTE_LEVEL, [rest[1], *prompt], 1, before=[*prompt, rest[0]])
    assert made.endswith("a")


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, *BYTE_FALLBACK], ids=["bytes", "kept", "stripped"])
@given(st.text(st.sampled_from(" abéü世🙂") | st.characters(codec="utf-8"), min_size=1))
@example("a hello  世🙂")
def test_the_bytes_of_tokens_join_to_their_text(tokenizer: Tokenizer, text: str) -> None:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    tokens = tokenizer.encode(text).ids
    scores = [score(fast, TokenLogprob(token, -1.0, ((token, -1.0),))) for token in tokens]
    # These tokenizers begin a text with a space.
    begins = "" if tokenizer is BYTE_LEVEL else " "
    joined = bytes(byte for one in scores for byte in one.bytes)
    assert joined.decode() == begins + text.removeprefix(begins)
    places = Places().of([*scores, scores[0]])
    assert places[-1] == len(joined.decode())
    for place, one in zip(places, scores, strict=False):
        if "\N{REPLACEMENT CHARACTER}" not in one.text:
            assert joined.decode().startswith(one.text, place)
    for one in scores:
        assert one.bytes == one.top[0].bytes
        assert "\N{REPLACEMENT CHARACTER}" in one.text or one.text.encode() == bytes(one.bytes)


def decoded(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    return lambda tokens: tokenizer.decode(list(tokens), skip_special_tokens=True)


def stream(tokenizer: Any, text: str, stop: tuple[str, ...] = (), step: int = 1) -> tuple[list[str], bool]:
    """Feed a text's tokens a few at a time; return the pieces and whether a stop string was found."""
    tokens = tokenizer(text)["input_ids"]
    made, pieces = TextStream(decoded(tokenizer), stop), []
    for end in [*range(step, len(tokens), step), len(tokens)]:
        pieces.append(made.push(tokens[:end], last=end == len(tokens)).content)
        if made.stopped:
            break
    return pieces, made.stopped


def test_a_token_is_decoded_once_however_often_it_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=BYTE_LEVEL)
    real, seen = tokenizer.decode, list[int]()

    def decode(tokens: list[int]) -> str:
        seen.extend(tokens)
        return str(real(tokens))

    monkeypatch.setattr(tokenizer, "decode", decode)
    first, second = BYTE_LEVEL.encode("xy").ids
    entry = TokenLogprob(first, -1.0, ((first, -1.0), (second, -2.0)))
    once, before = score(tokenizer, entry), [*seen]
    assert set(before) == {first, second}
    assert prompt_scores(tokenizer, [second] * 20, [None] + [entry] * 19)[1:] == [once] * 19
    assert seen == before


@pytest.mark.parametrize("step", [1, 2, 5, 100])
def test_the_pieces_join_to_the_text(tiny_tokenizer: Any, step: int) -> None:
    pieces, stopped = stream(tiny_tokenizer, TEXT, step=step)
    assert "".join(pieces) == TEXT
    assert not stopped


def test_an_incomplete_character_is_held_back(tiny_tokenizer: Any) -> None:
    pieces, _ = stream(tiny_tokenizer, TEXT)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert "🙂" in pieces


def test_an_incomplete_character_is_returned_at_the_end(tiny_tokenizer: Any) -> None:
    tokens = tiny_tokenizer("a🙂")["input_ids"][:-1]
    assert TextStream(decoded(tiny_tokenizer)).push(tokens, last=True).content == "a\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("step", [1, 3, 100])
@pytest.mark.parametrize(
    ("stop", "left"),
    [
        (("END",), "go on "),
        ((" on", "END"), "go"),
        (("nothing", "o"), "g"),
        (("go on END of it",), ""),
        # Two that are complete at the same place.
        (("D", "on END"), "go "),
        (("on END", "D"), "go "),
    ],
)
def test_a_stop_string_ends_the_text_and_is_not_part_of_it(
    tiny_tokenizer: Any, stop: tuple[str, ...], left: str, step: int
) -> None:
    pieces, stopped = stream(tiny_tokenizer, "go on END of it", stop, step)
    assert "".join(pieces) == left
    assert stopped


def test_the_beginning_of_a_stop_string_is_returned_once_it_can_not_be_one(tiny_tokenizer: Any) -> None:
    pieces, stopped = stream(tiny_tokenizer, "an EN route", ("END",))
    assert "".join(pieces) == "an EN route"
    assert not stopped
    assert "E" not in pieces


def first_stop(text: str, stops: Sequence[str]) -> str:
    """Return a text up to the stop string that is complete first."""
    for end in range(len(text) + 1):
        places = [text[:end].find(stop) for stop in stops if stop in text[:end]]
        if places:
            return text[: min(places)]
    return text


@given(
    st.text("ab", min_size=1, max_size=30),
    st.lists(st.text("ab", min_size=1, max_size=6), min_size=1, max_size=4),
    st.integers(1, 4),
)
def test_no_part_of_a_stop_string_is_returned(text: str, stops: list[str], step: int) -> None:
    letters = PreTrainedTokenizerFast(tokenizer_object=BYTE_LEVEL)
    pieces, stopped = stream(letters, text, tuple(stops), step)
    assert "".join(pieces) == first_stop(text, stops)
    assert stopped == any(stop in text for stop in stops)


class Counting(str):
    """A text that counts the characters that are copied out of it."""

    copied = 0

    def __getitem__(self, place: Any) -> str:
        found = super().__getitem__(place)
        Counting.copied += len(found)
        return found


def test_a_long_stop_string_costs_no_more_than_a_short_one(tiny_tokenizer: Any) -> None:
    text = "an end that is near"
    pieces, stopped = stream(tiny_tokenizer, text, (Counting("an end" + "x" * 10_000),))
    assert ("".join(pieces), stopped) == (text, False)
    assert Counting.copied < len(text) ** 2


def test_special_tokens_are_omitted_from_the_text(tiny_tokenizer: Any) -> None:
    assert "".join(stream(tiny_tokenizer, "a<|im_start|>b")[0]) == "ab"


def test_messages_go_through_the_template(tiny_tokenizer: Any) -> None:
    tokens = chat_tokens(tiny_tokenizer, [{"role": "user", "content": "hi"}])
    wanted = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tiny_tokenizer.decode(list(tokens)) == wanted


THINKING = """{% for m in messages %}{{ m.content }}{% endfor %}
{{- '<think>' if enable_thinking else '!' }}
{%- if years %}{% for _ in range(years) %}{{ years + 1 }}{% endfor %}{% endif %}"""


def test_a_template_receives_variables(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_tokenizer, "chat_template", THINKING)
    messages = [{"role": "user", "content": "hi"}]
    for variables, wanted in (
        (None, "hi!"),
        ({}, "hi!"),
        ({"enable_thinking": False}, "hi!"),
        ({"enable_thinking": True}, "hi<think>"),
        ({"unused": {"a": [1, "b"]}}, "hi!"),
    ):
        assert tiny_tokenizer.decode(list(chat_tokens(tiny_tokenizer, messages, variables))) == wanted


@pytest.mark.parametrize(
    "name",
    ["tokenize", "add_generation_prompt", "messages", "conversation", "conversations", "tools", "documents",
     "chat_template", "continue_final_message", "return_dict", "eos_token", "self", "raise_exception",
     "kwargs", "", "a-b", "1a", "a b"],
)  # fmt: skip
def test_reserved_variables_are_refused(tiny_tokenizer: Any, name: str) -> None:
    with pytest.raises(BadRequestError) as caught:
        chat_tokens(tiny_tokenizer, [{"role": "user", "content": "hi"}], {name: True})
    assert caught.value.param == f"chat_template_kwargs.{name}"


@pytest.mark.parametrize("years", ["many", [1], {"a": 1}, 10**7])
def test_a_variable_on_which_a_template_fails_is_a_400(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, years: Any
) -> None:
    monkeypatch.setattr(tiny_tokenizer, "chat_template", THINKING)
    with pytest.raises(BadRequestError, match="refuses these messages and chat_template_kwargs") as caught:
        chat_tokens(tiny_tokenizer, [{"role": "user", "content": "hi"}], {"years": years})
    assert caught.value.param == "chat_template_kwargs"


def test_invalid_unicode_from_a_template_is_a_400(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_tokenizer, "chat_template", r"{{ '\ud83d' }}")
    with pytest.raises(BadRequestError, match="chat template"):
        chat_tokens(tiny_tokenizer, [{"role": "user", "content": "hi"}])


def test_messages_that_a_template_refuses_are_a_400(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(BadRequestError, match="roles must alternate"):
        chat_tokens(tiny_tokenizer, [{"role": "user", "content": "hi"}])
    monkeypatch.setattr(tiny_tokenizer, "chat_template", None)
    with pytest.raises(BadRequestError, match="/v1/completions"):
        chat_tokens(tiny_tokenizer, [{"role": "user", "content": "hi"}])


def test_messages_of_which_the_template_makes_nothing_are_refused(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_tokenizer, "chat_template", "{{ messages[-1].content }}")
    assert chat_tokens(tiny_tokenizer, [{"role": "user", "content": "hi"}])
    with pytest.raises(BadRequestError, match="makes no text") as caught:
        chat_tokens(tiny_tokenizer, [{"role": "user", "content": ""}])
    assert caught.value.param == "messages"


def test_a_prompt_is_text_or_token_ids(tiny_tokenizer: Any) -> None:
    assert prompt_tokens(tiny_tokenizer, [5, 6]) == (5, 6)
    assert prompt_tokens(tiny_tokenizer, "ab") == tuple(tiny_tokenizer("ab")["input_ids"])


@pytest.mark.parametrize("prompt", ["", [], [5, -1], [10**9]])
def test_a_prompt_that_is_empty_or_has_unknown_ids_is_refused(tiny_tokenizer: Any, prompt: Any) -> None:
    with pytest.raises(BadRequestError) as caught:
        prompt_tokens(tiny_tokenizer, prompt)
    assert caught.value.param == "prompt"


def test_a_stop_string_is_found_before_bytes_that_are_no_character_yet(tiny_tokenizer: Any) -> None:
    tokens = tiny_tokenizer("abSTOPé", add_special_tokens=False)["input_ids"]
    # All but the last byte of é come at once, then that byte.
    text = TextStream(decoded(tiny_tokenizer), ["STOP"])
    answer = text.push(tokens[:-1], last=False)
    assert (answer.content, text.stopped) == ("ab", True)
    assert decoded(tiny_tokenizer)(tokens[: text.used]).endswith("STOP")


@pytest.mark.parametrize("step", [1, 3, 100])
def test_the_tokens_up_to_a_stop_string_are_counted_also_if_several_come_at_once(
    tiny_tokenizer: Any, step: int
) -> None:
    tokens = tiny_tokenizer("some text STOP and more of it")["input_ids"]
    text = TextStream(decoded(tiny_tokenizer), ("STOP",))
    ends = [*range(step, len(tokens), step), len(tokens)]
    next(end for end in ends if text.push(tokens[:end], last=end == len(tokens)) and text.stopped)
    assert decoded(tiny_tokenizer)(tokens[: text.used]).endswith("STOP")
    whole = TextStream(decoded(tiny_tokenizer), ("never",))
    whole.push(tokens, last=True)
    assert whole.used == len(tokens)
