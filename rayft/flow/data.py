"""Show what a model will see of a data set: its lengths, its padding, and rows with what is learnt marked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from rayft.data.loader import RowStream
from rayft.data.pack import AnyEncoded, PackedRow, padded
from rayft.data.prepared import prepare
from rayft.data.source import PARTS
from rayft.data.template import IGNORED, Encoded
from rayft.data.texts import lengths_of, notes
from rayft.flow.config import TrainConfig
from rayft.models.files import cache_folder
from rayft.models.load import context_length, load_encoder, load_skeleton
from rayft.train.session import check_task

__all__ = ["DataView", "PartView", "Run", "look"]

READ = 2000
"""Texts of which the share of learnt tokens is computed."""


@dataclass(frozen=True)
class PartView:
    """The lengths of a part, in tokens. Images have no lengths."""

    name: str
    examples: int
    """Number of examples, before any is dropped for its length."""
    texts: int
    """Number of texts that are left of them, or of images: an example may be encoded as several texts."""
    tokens: int
    """Tokens of all of them."""
    learnt: float
    """Share of the tokens that are learnt, in the first `READ` texts."""
    median: int
    most: int
    """95 % of the texts are no longer."""
    longest: int


@dataclass(frozen=True)
class Run:
    """Neighbouring tokens that are all learnt, or all not."""

    text: str
    learnt: bool


@dataclass(frozen=True)
class DataView:
    """What a model will see of a data set."""

    parts: tuple[PartView, ...]
    rows: int
    """Rows of an epoch of training."""
    steps: float
    """Optimizer steps of an epoch."""
    padding: float
    """Share of padding in the batches of an epoch, if each batch has all rows of a step."""
    notes: tuple[str, ...]
    """What was dropped or cut, and why."""
    examples: tuple[tuple[tuple[Run, ...], ...], ...]
    """For each row that is shown, its examples, as text."""


def look(config: TrainConfig, rows: int) -> DataView:
    """Prepare the data of a configuration, and describe it.

    Args:
        config: names the model and the data.
        rows: number of training rows to return as text.

    Raises:
        RayftError: if model or data can't be read, or don't fit each other.
    """
    run = config.run(False)
    settings = load_skeleton(run.model).config
    encoder = load_encoder(run.model, settings)
    prepared = prepare(config.data, encoder, cache_folder())
    check_task(run, prepared.parts)
    context = context_length(run.model, settings, encoder)
    encoded = {part: prepared.encoded(part, context) for part in PARTS}
    stream = RowStream(
        encoded["train"], run.data.max_length, run.optim.rows_per_step, run.seed, packing=run.data.packing
    )
    epoch, step = stream.epoch(0), run.optim.rows_per_step
    shown = [] if prepared.parts.has_images else epoch[:rows]
    return DataView(
        parts=tuple(
            _part(name, len(getattr(prepared.parts, name)), texts) for name, texts in encoded.items()
        ),
        rows=len(epoch),
        steps=len(epoch) / step,
        padding=_padding(epoch.tokens.tolist(), step),
        notes=(*(item.text for item in prepared.parts.dropped), *notes(encoded)),
        examples=tuple(
            tuple(tuple(_runs(example, encoder)) for example in row.examples)
            for row in shown
            if isinstance(row, PackedRow)
        ),
    )


def _part(name: str, examples: int, texts: Sequence[AnyEncoded]) -> PartView:
    lengths = lengths_of(texts)
    read = [text for text in texts[:READ] if isinstance(text, Encoded)]
    learnt = sum(label != IGNORED for text in read for label in text.labels)
    median, most, longest = (
        np.quantile(lengths, (0.5, 0.95, 1), method="inverted_cdf") if len(lengths) else (0, 0, 0)
    )
    return PartView(
        name=name,
        examples=examples,
        texts=len(texts),
        tokens=int(lengths.sum()),
        learnt=learnt / max(1, sum(map(len, read))),
        median=int(median),
        most=int(most),
        longest=int(longest),
    )


def _padding(tokens: Sequence[int], rows: int) -> float:
    batches = [tokens[start : start + rows] for start in range(0, len(tokens), rows)]
    return 1 - sum(tokens) / sum(len(batch) * padded(batch) for batch in batches)


def _runs(example: Encoded, tokenizer: Any) -> Iterator[Run]:
    """Divide an example into what is learnt and what is not, as text."""
    pairs = zip(example.input_ids, example.labels, strict=True)
    for learnt, run in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        yield Run(tokenizer.decode([token for token, _ in run]), learnt)
