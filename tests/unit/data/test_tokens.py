"""Texts that are encoded in pieces, divided at special tokens, have the tokens of the whole text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rayft.data import template as module
from rayft.data.template import _Tokens

SPECIAL = ["<s>", "</s>", "<|im|>", "<|im|>user", "[SEP]", "<a", "<a<b", "<b>"]
ALPHABET = " aAbé\n<|im>sSEP[]/▁user"
MERGES = [
    ("a", "b"),
    ("b", "a"),
    ("<", "s"),
    ("\u0120", "a"),
    ("▁", "a"),
    ("a", "▁"),
    ("s", "<"),
    ("ab", "a"),
]


def fast(core: Tokenizer, special: list[AddedToken | str] = SPECIAL, **options: Any) -> Any:
    core.add_special_tokens(
        [AddedToken(one, normalized=False) if isinstance(one, str) else one for one in special]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", **options)


def bpe(pre: Any, decoder: Any, normalizer: Any = None) -> Tokenizer:
    letters = dict.fromkeys([*pre_tokenizers.ByteLevel.alphabet(), *ALPHABET, "<unk>"])
    words = [*letters, *dict.fromkeys(one + other for one, other in MERGES)]
    vocabulary = {word: number for number, word in enumerate(words)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES, unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre, decoder
    if normalizer is not None:
        core.normalizer = normalizer
    return core


def word_piece() -> Tokenizer:
    words = ["[UNK]", *ALPHABET, *[f"##{letter}" for letter in ALPHABET], "user", "##ab"]
    core = Tokenizer(
        models.WordPiece({word: n for n, word in enumerate(dict.fromkeys(words))}, unk_token="[UNK]")
    )
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return core


LEFT = AddedToken("<|im|>", normalized=False, lstrip=True)
RIGHT = AddedToken("<|im|>", normalized=False, rstrip=True)
NORMALIZED = AddedToken("a<", normalized=True)
TOKENIZERS = {
    "bytes": lambda: fast(bpe(pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel())),
    "bytes, prefix": lambda: fast(bpe(pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel())),
    "metaspace, first": lambda: fast(
        bpe(pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace())
    ),
    "metaspace, always": lambda: fast(bpe(pre_tokenizers.Metaspace(), decoders.Metaspace())),
    "prepended": lambda: fast(
        bpe(
            None,
            decoders.Fuse(),
            normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        )
    ),
    "stripped": lambda: fast(bpe(pre_tokenizers.Whitespace(), decoders.Fuse(), normalizers.Strip())),
    "words": lambda: fast(word_piece()),
    "left": lambda: fast(bpe(pre_tokenizers.ByteLevel(), decoders.ByteLevel()), ["</s>", LEFT]),
    "right": lambda: fast(bpe(pre_tokenizers.ByteLevel(), decoders.ByteLevel()), ["</s>", RIGHT]),
    "normalized": lambda: fast(
        bpe(pre_tokenizers.ByteLevel(), decoders.ByteLevel()), ["</s>", "<s>", NORMALIZED]
    ),
    "special as text": lambda: fast(
        bpe(pre_tokenizers.ByteLevel(), decoders.ByteLevel()), split_special_tokens=True
    ),
}
PIECES = st.lists(
    st.sampled_from([*SPECIAL, *ALPHABET, "ab", "  ", "user", "ba<s>", "<a<b>"]), max_size=20
).map("".join)


@pytest.fixture(scope="module", params=TOKENIZERS)
def any_tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


@settings(max_examples=150)
@given(before=PIECES, after=PIECES)
def test_the_tokens_are_those_of_the_whole_text(any_tokenizer: Any, before: str, after: str) -> None:
    tokens = _Tokens(any_tokenizer)
    texts = [before, before + after, after]
    tokens.learn(*texts)
    for text in texts:
        expected = any_tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokens.of(text) == tuple(expected), text


def test_a_piece_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, asked = TOKENIZERS["bytes"](), []

    class Recorder:
        is_fast, added_tokens_decoder = True, tokenizer.added_tokens_decoder

        def __call__(self, texts: list[str], **options: Any) -> Any:
            asked.append(texts)
            return tokenizer(texts, **options)

    tokens = _Tokens(Recorder())  # type: ignore[arg-type]
    tokens.learn("<s>a<|im|>b", "<s>a<|im|>b</s>", "<s>a<|im|>userb")
    tokens.learn("<s>a", "c")
    assert asked == [["<s>a", "<|im|>b", "</s>", "<|im|>userb"], ["c"]]
    monkeypatch.setattr(module, "MOST_PIECES", 3)
    tokens.learn("d<s>a")
    assert asked[2:] == [["d", "<s>a"]]
    assert tokens.of("d<s>a") == tuple(tokenizer("d<s>a", add_special_tokens=False)["input_ids"])
